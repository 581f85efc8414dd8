"""`python -m training.mini.evaluate`: measures a pack on held-out people and writes its CARD.md, metrics.json and grid of people.

The card is written by this alone, never by hand; what people have to say about a bar that was not reached stands in REMARKS.md
beside this file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.mini import measures
from training.mini.card import card, missed
from training.mini.faces import verification
from training.mini.pack import DOCUMENTS
from training.mini.sitting import Sitting
from training.mini.studio import Pictures, Studio

_GRID = "people.jpg"
_REMARKS = Path(__file__).with_name("REMARKS.md")


def measure(pack: Path, people: int, pictures: int, device: torch.device) -> tuple[dict[str, Any], Pictures]:
    """All figures, and the grid of people. people: per identity measurement; pictures: for the face models, a third of them a framing."""
    sitting, studio = Sitting(pack), Studio(pack, device)
    cast = measures.cast_of(sitting, people)
    steps = {
        "faces": lambda: verification.verify(pack, pictures // 3),
        "autoencoder": lambda: measures.autoencoder_psnr(studio, people),
        "speed": lambda: measures.speed(pack),
        "prompts": lambda: measures.prompts(studio, sitting, cast),
        "pulid": lambda: measures.pulid(studio, sitting, cast),
        "pose": lambda: measures.pose(studio, people + people // 2),
        "ip_adapter": lambda: measures.ip_adapter(studio, sitting, cast),
    }
    figures: dict[str, Any] = {}
    for name, step in tqdm(steps.items(), desc="evaluating", unit="part"):
        figures[name] = step()
        print(f"{name}: {json.dumps(figures[name])[:400]}", flush=True)
    shown, texts = measures.grid(Studio(pack, device), sitting)
    figures["grid"] = {"file": _GRID, "prompts": texts}
    figures["size_mib"] = round(sum(f.stat().st_size for f in pack.rglob("*") if f.is_file() and f.name not in DOCUMENTS) / 2**20, 2)
    return figures, shown


def speed_again(pack: Path) -> dict[str, Any]:
    """The figures of the pack's metrics.json with the speed measured anew: a machine that was busy meanwhile spoils that one alone."""
    figures: dict[str, Any] = json.loads((pack / "metrics.json").read_text())["figures"]
    return figures | {"speed": measures.speed(pack)}


def save_grid(pack: Path, shown: Pictures) -> None:
    columns = 11
    rows = [np.concatenate(list(shown[start : start + columns]), 1) for start in range(0, len(shown), columns)]
    Image.fromarray(np.concatenate(rows)).save(pack / _GRID, quality=76)


def write(pack: Path, figures: dict[str, Any], notes: dict[str, Any]) -> None:
    """CARD.md and metrics.json."""
    (pack / "metrics.json").write_text(json.dumps({"figures": figures, "training": notes}, indent=1, sort_keys=True) + "\n")
    remarks = _REMARKS.read_text() if _REMARKS.is_file() else ""
    (pack / "CARD.md").write_text(card(figures, notes, remarks))


def main() -> None:
    parser = argparse.ArgumentParser("training.mini.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=Path("models/mini"), help="the folder to measure (default models/mini)")
    parser.add_argument("--people", type=int, default=24, help="people per identity measurement (default 24: some 20 minutes on two cores)")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures for the face models, a third of them a framing (default 1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where pictures are drawn")
    parser.add_argument(
        "--workspace", type=Path, help="the training run's folder; its facts go into the card (else those of the old metrics.json)"
    )
    parser.add_argument("--speed-again", action="store_true", help="measure the speed alone anew, and keep the other figures")
    options = parser.parse_args()
    notes = _notes(options.pack, options.workspace)
    if options.speed_again:
        figures = speed_again(options.pack)
    else:
        figures, shown = measure(options.pack, options.people, options.pictures, torch.device(options.device))
        save_grid(options.pack, shown)
    write(options.pack, figures, notes)
    print("\n".join(["bars not reached:", *missed(figures)]) if missed(figures) else "every bar is reached")


def _notes(pack: Path, workspace: Path | None) -> dict[str, Any]:
    if workspace is not None:
        from training.mini.workspace import Workspace

        return Workspace(workspace).notes()
    old = pack / "metrics.json"
    notes: dict[str, Any] = json.loads(old.read_text())["training"] if old.is_file() else {}
    return notes


if __name__ == "__main__":
    main()
