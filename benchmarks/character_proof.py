"""`python -m benchmarks.character_proof [--write docs/character_proof.md]`: from photographs to a character, through a running service.

Of each of several people whom no model has seen: two dozen pictures go to `POST /v1/training/jobs`, which curates them, trains a LoRA on
this machine's processor cores, chooses the checkpoint and gives it to a character. Then the seed's four configurations are drawn by the
same service (base; + LoRA; + LoRA + PuLID; + pose), and PuLID alone, with the same prompts and seeds, and a recogniser that had no part in
any of it says whose face each is. What is there is kept: the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import io
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from rich.progress import Progress

from deployments.store.settings import StoreSettings
from serve.cli_evaluate import drawn_by
from serve.client import Client
from serve.cluster import serving
from serve.settings import load_settings
from serve.training_answers import TrainedLora
from training.evaluation.cases import Subject
from training.evaluation.plan import load_plan
from training.evaluation.run import bench_of, evaluate
from training.evaluation.summary import write
from training.mini.heldout import character_identity
from training.mini.world.render import render
from training.mini.world.scene import CLOSE_UP, FULL_BODY, PORTRAIT, sample_scenes

PEOPLE = ("Bruno", "Chiyo", "Esi")
TRIGGER = "ohwx"
_SEED = 940_000
_PHOTOGRAPHS: Mapping[int, int] = {CLOSE_UP: 10, PORTRAIT: 8, FULL_BODY: 6}
"""By framing: as the seed's twenty, most of the face."""
_UNSEEN = 6
_SEEDS = 2


class Trained(NamedTuple):
    """training_s: from curating to the last step; job_s: from the job's start to its end, with the choice of a checkpoint."""

    lora: TrainedLora
    training_s: float
    job_s: float


Bars = Sequence[tuple[str, float, bool]]
"""What is asked, what was measured, whether it is enough."""


def photographs(name: str) -> tuple[list[bytes], list[bytes]]:
    """PNG files of one person in scenes of their own: those to train on, and close-ups that nothing is shown."""
    number = PEOPLE.index(name)
    shown = [_drawn(name, framing, count, _SEED + 100 * number + framing) for framing, count in _PHOTOGRAPHS.items()]
    return [picture for pictures in shown for picture in pictures], _drawn(name, CLOSE_UP, _UNSEEN, _SEED + 100 * number + 50)


def _drawn(name: str, framing: int, count: int, seed: int) -> list[bytes]:
    pictures = render(character_identity(name).expand(count, -1), sample_scenes(count, seed, framing=framing))
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    files = []
    for picture in pixels:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


def trained(client: Client, name: str, pictures: Sequence[bytes], steps: int | None) -> Trained:
    """The LoRA that the service made of the pictures."""
    changes = {} if steps is None else {"steps": steps}
    for attempt in itertools.count():  # one that was stopped is not taken up again
        key = f"proof-{name}-{steps}" + (f"-{attempt}" if attempt else "")
        job = client.training.submit(
            job_id=key, images=list(pictures), trigger_word=TRIGGER, character_id=name, name=name, settings=changes
        )  # fmt: skip
        if job.refresh().status not in ("failed", "canceled"):
            break
    with Progress(transient=True) as progress:
        bar = progress.add_task(f"training {name}", total=None)
        while (item := job.refresh()).status in ("queued", "running"):
            if item.progress is not None:
                progress.update(bar, completed=item.progress.step, total=item.progress.total or None)
            time.sleep(2)
    lora = job.lora()
    assert item.started is not None and item.finished is not None
    return Trained(lora, item.timings["training"], item.finished - item.started)


def subject(client: Client, name: str, pictures: Sequence[bytes], unseen: Sequence[bytes], lora: TrainedLora) -> Subject:
    """As requests name them: for PuLID the four first pictures, close-ups."""
    return Subject(
        name=name, references=list(pictures[:4]), held_out=list(unseen), lora=lora.lora_id, lora_sha256=lora.sha256, trigger=TRIGGER
    )  # fmt: skip


def bars(found: Mapping[str, Any]) -> Bars:
    """found: a summary (training/evaluation/summary.py). Means count a picture without a face as 0."""
    of = {name: item["all"] for name, item in found["configurations"].items()}
    mean = {name: figures["identity"]["mean_no_face_as_0"] for name, figures in of.items()}
    followed = {name: figures["adherence"] for name, figures in of.items()}
    stack = ("lora", "lora_pulid", "full")
    said: list[tuple[str, float, bool]] = [
        ("base, at most 0.10 from 0", mean["base"], abs(mean["base"]) <= 0.10),
        ("LoRA, at least 0.50", mean["lora"], mean["lora"] >= 0.50),
        ("LoRA + PuLID, at least 0.65", mean["lora_pulid"], mean["lora_pulid"] >= 0.65),
        ("LoRA + PuLID less the better of the two alone, above 0", *_more(mean["lora_pulid"] - max(mean["lora"], mean["pulid"]))),
        ("with the pose less without, at least -0.08", mean["full"] - mean["lora_pulid"], mean["full"] - mean["lora_pulid"] >= -0.08),
    ]
    for measure, least in (("clothes", 0.85), ("scene", 0.95)):
        worst = min(followed[name][measure] for name in stack)
        said.append((f"{measure} followed, the worst of the three, at least {least}", worst, worst >= least))
    return said


def _more(gap: float) -> tuple[float, bool]:
    return gap, gap > 0


def page(table: str, said: Bars, trainings: Mapping[str, Trained]) -> str:
    """The document."""
    lines = [
        "# From photographs to a character, measured",
        "",
        "`python -m benchmarks.character_proof --write docs/character_proof.md`",
        "",
    ]
    lines += [" ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    lines += ["| asked | measured | |", "|---|---|---|"]
    lines += [f"| {what} | {value:.3f} | {'reached' if enough else '**not reached**'} |" for what, value, enough in said]
    lines += [
        "",
        "| person | pictures | checkpoint taken | its identity, fresh seeds | trained in, minutes, two CPU cores | the job |",
        "|---|---|---|---|---|---|",
    ]
    for name, made in trainings.items():
        lora = made.lora
        fresh = lora.scores.get("identity")
        shown = "–" if fresh is None else f"{fresh:.3f}"
        minutes = f"{made.training_s / 60:.1f} | {made.job_s / 60:.1f}"
        lines.append(f"| {name} | {lora.pictures.accepted} | {lora.step} of {lora.steps} | {shown} | {minutes} |")
    lines += ["", "![Reference, base, + LoRA, + PuLID, + LoRA + PuLID, + pose](character_proof.jpg)", "", table]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", nargs="+", choices=PEOPLE, default=list(PEOPLE), help="whom (default: all three)")
    parser.add_argument("--steps", type=int, help="of each training (default: the preset's)")
    parser.add_argument("--out", type=Path, default=Path("out/character_proof"), help="folder that keeps everything")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures; its picture is laid beside it")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    settings = load_settings("local").model_copy(update={"store": StoreSettings(url=f"sqlite:///{out / 'store.db'}", folder=out / "store")})
    pictures = {name: photographs(name) for name in options.people}
    with serving(settings, port=8190) as url, Client(url, timeout=600) as client:
        trainings = {name: trained(client, name, pictures[name][0], options.steps) for name in options.people}
        people = [subject(client, name, *pictures[name], trainings[name].lora) for name in options.people]
        plan = load_plan("mini")
        plan = plan.but(seeds=plan.seeds[:_SEEDS])
        with Progress(transient=True) as progress:
            bar = progress.add_task("drawing and judging", total=None)
            found = evaluate(
                plan,
                people,
                drawn_by(client),
                out / "evaluation",
                bench_of(plan),
                lambda done, total: progress.update(bar, completed=done, total=total),
            )
    summary = write(found)
    said = bars(summary)
    text = page((out / "evaluation" / "table.md").read_text(encoding="utf-8"), said, trainings)
    print(text)
    if options.write is not None:
        options.write.write_text(text, encoding="utf-8")
        Image.open(out / "evaluation" / "grid_small.png").convert("RGB").save(options.write.with_suffix(".jpg"), quality=85)
    if not all(enough for _, _, enough in said):
        raise SystemExit("a bar was not reached")


if __name__ == "__main__":
    main()
