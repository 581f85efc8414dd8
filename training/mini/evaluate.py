"""`python -m training.mini.evaluate`: measures a pack on held-out people and writes its CARD.md, metrics.json and grid of people.

The card is written by this alone, never by hand; what people have to say about a bar that was not reached stands in REMARKS.md
beside this file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.mini import measures
from training.mini.card import card, missed
from training.mini.faces import verification
from training.mini.pack import PACK_DIR, sizes_mib
from training.mini.sitting import Sitting
from training.mini.studio import Pictures, Studio

_GRID = "people.jpg"
_REMARKS = Path(__file__).with_name("REMARKS.md")


@dataclass(frozen=True)
class Bench:
    """What every part of an evaluation is measured with. people: per identity measurement; pictures: for the face models, a third of
    them a framing."""

    pack: Path
    people: int
    pictures: int
    sitting: Sitting
    studio: Studio
    cast: measures.Cast


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "faces": lambda bench: verification.verify(bench.pack, bench.pictures // 3),
    "autoencoder": lambda bench: measures.autoencoder_psnr(bench.studio, bench.people),
    "speed": lambda bench: measures.speed(bench.pack),
    "prompts": lambda bench: measures.prompts(bench.studio, bench.sitting, bench.cast),
    "pulid": lambda bench: measures.pulid(bench.studio, bench.sitting, bench.cast),
    "pose": lambda bench: measures.pose(bench.studio, bench.people + bench.people // 2),
    "ip_adapter": lambda bench: measures.ip_adapter(bench.studio, bench.sitting, bench.cast),
    "instantx": lambda bench: measures.instantx(bench.studio, bench.sitting, bench.cast),
}
"""By their names in metrics.json."""


def bench_of(pack: Path, people: int, pictures: int, device: torch.device) -> Bench:
    sitting = Sitting(pack)
    return Bench(pack, people, pictures, sitting, Studio(pack, device), measures.cast_of(sitting, people))


def measure(bench: Bench, parts: Sequence[str]) -> dict[str, Any]:
    """The figures of the named parts, and the pack's sizes."""
    figures: dict[str, Any] = {}
    for name in tqdm(parts, desc="evaluating", unit="part"):
        figures[name] = PARTS[name](bench)
        print(f"{name}: {json.dumps(figures[name])[:400]}", flush=True)
    own, apart = sizes_mib(bench.pack)
    return figures | {"size_mib": own, "size_apart_mib": apart}


def draw_grid(bench: Bench) -> dict[str, Any]:
    """Saves the grid of people, and says where it lies and of which prompts it is."""
    shown, texts = measures.grid(Studio(bench.pack, bench.studio.device), bench.sitting)
    _save_grid(bench.pack, shown)
    return {"file": _GRID, "prompts": texts}


def _save_grid(pack: Path, shown: Pictures) -> None:
    columns = 11
    rows = [np.concatenate(list(shown[start : start + columns]), 1) for start in range(0, len(shown), columns)]
    Image.fromarray(np.concatenate(rows)).save(pack / _GRID, quality=76)


def write(pack: Path, figures: dict[str, Any], notes: dict[str, Any]) -> None:
    """CARD.md and metrics.json."""
    (pack / "metrics.json").write_text(json.dumps({"figures": figures, "training": notes}, indent=1, sort_keys=True) + "\n")
    remarks = _REMARKS.read_text() if _REMARKS.is_file() else ""
    (pack / "CARD.md").write_text(card(figures, notes, remarks))


def main() -> None:
    options = _arguments().parse_args()
    old = _written(options.pack)
    if options.only and not old["figures"]:
        raise SystemExit(f"{options.pack} has no metrics.json whose other figures could be kept; leave --only out")
    bench = bench_of(options.pack, options.people, options.pictures, torch.device(options.device))
    figures = old["figures"] | measure(bench, options.only) if options.only else {**measure(bench, [*PARTS]), "grid": draw_grid(bench)}
    write(options.pack, figures, old["training"] | _facts(options.workspace))
    print("\n".join(["bars not reached:", *missed(figures)]) if missed(figures) else "every bar is reached")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("training.mini.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, default=PACK_DIR, help="the folder to measure (default models/mini)")
    parser.add_argument("--people", type=int, default=24, help="people per identity measurement (default 24: some 20 minutes on two cores)")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures for the face models, a third of them a framing (default 1000)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where pictures are drawn")
    parser.add_argument(
        "--workspace", type=Path, help="a training run's folder; its facts go into the card, in place of those of the old metrics.json"
    )
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=[],
        help="measure these parts anew and keep the other figures: speed, where the machine was busy; one adapter, where it alone is new",
    )  # fmt: skip
    return parser


def _written(pack: Path) -> dict[str, dict[str, Any]]:
    """What the pack's metrics.json holds: `figures` and `training`."""
    path = pack / "metrics.json"
    written: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {"figures": {}, "training": {}}
    return written


def _facts(workspace: Path | None) -> dict[str, Any]:
    if workspace is None:
        return {}
    from training.mini.workspace import Workspace

    return Workspace(workspace).notes()


if __name__ == "__main__":
    main()
