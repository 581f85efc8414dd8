"""The model card: what was measured beside what was asked, as Markdown. Measures nothing itself."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
_HEAD = """# The embedded pack: mini

Small models, truly trained, of a world of drawn characters: a FLUX pipeline, identity adapters, a pose ControlNet, face and body
models, in the classes and file layouts of the published ones. **They know only their own people**: a photograph means nothing
to them. Nobody in the world exists.

Written by `python -m training.mini.evaluate`; every figure below was measured by it on people whom no model was trained on.
"""


@dataclass(frozen=True)
class Bar:
    """A line of the card. read: finds the value in the figures; passes: whether it reaches what was asked."""

    what: str
    asked: str
    read: Callable[[Figures], Any]
    passes: Callable[[Any], bool]


def _recognition(model: str) -> Callable[[Figures], tuple[float, float, float]]:
    """(lowest same-person mean, largest |different mean|, lowest TAR) over close-ups and portraits."""

    def read(f: Figures) -> tuple[float, float, float]:
        lines = [f["faces"]["recognition"][model][framing] for framing in ("close-up portrait", "portrait")]
        return min(x["same"] for x in lines), max(abs(x["different"]) for x in lines), min(x["tar"] for x in lines)

    return read


def _detection(figure: str, framing: str | None = None) -> Callable[[Figures], float]:
    def read(f: Figures) -> float:
        values = [x[figure] for name, x in f["faces"]["detection"]["320"].items() if framing is None or name == framing]
        return float(min(values) if figure == "recall" else max(values))

    return read


def _attributes(f: Figures) -> tuple[float, ...]:
    return tuple(f["prompts"]["attributes"][name] for name in ("scene", "clothes", "colour", "framing"))


def _recognises(value: tuple[float, float, float]) -> bool:
    same, different, tar = value
    return same >= 0.80 and different <= 0.02 and tar >= 0.97


def _pulid_by_weight(f: Figures) -> tuple[float, ...]:
    return tuple(f["pulid"][weight]["portrait"]["cosine"]["mean"] for weight in ("0", "0.5", "1"))


def _follows_prompts(value: tuple[float, ...]) -> bool:
    return all(map(operator.ge, value, (0.97, 0.92, 0.97, 0.97)))


BARS = (
    Bar("recogniser: same / different / TAR at FAR 1e-3", "0.80 / 0.02 / 0.97", _recognition("recogniser"), _recognises),
    Bar("judge: same / different / TAR at FAR 1e-3", "0.80 / 0.02 / 0.97", _recognition("judge"), _recognises),
    Bar("detector, recall: close-up", "0.99", _detection("recall", "close-up portrait"), lambda v: v >= 0.99),
    Bar("detector, recall: portrait", "0.99", _detection("recall", "portrait"), lambda v: v >= 0.99),
    Bar("detector, recall: full body", "0.95", _detection("recall", "full body photo"), lambda v: v >= 0.95),
    Bar("detector, landmark error over eye distance (worst framing)", "0.05", _detection("landmark_error"), lambda v: v <= 0.05),
    Bar("autoencoder, PSNR (dB)", "33", lambda f: f["autoencoder"]["psnr_db"], lambda v: v >= 33),
    Bar("prompt followed: scene / clothes / colour / framing", "0.97 / 0.92 / 0.97 / 0.97", _attributes, _follows_prompts),
    Bar("no identity given: cosine to a reference", "within 0.03 of 0", lambda f: f["prompts"]["cosine"]["mean"], lambda v: abs(v) <= 0.03),
    Bar("IP-Adapter, weight 1 (close-up, portrait)", "0.35", lambda f: f["ip_adapter"]["together"]["mean"], lambda v: v >= 0.35),
    Bar("PuLID, weight 1 (close-up, portrait)", "0.60", lambda f: f["pulid"]["1"]["close-up and portrait"], lambda v: v >= 0.60),
    Bar("PuLID, portrait, at weights 0 / 0.5 / 1", "rising", _pulid_by_weight, lambda v: v[0] < v[1] < v[2]),
    Bar("pose ControlNet: arms within 8 % of where asked, full body", "0.90", lambda f: f["pose"]["obeyed"], lambda v: v >= 0.90),
    Bar("one picture, 20 steps, fp32, 2 CPU threads (s)", "3", lambda f: f["speed"]["20 steps"], lambda v: v <= 3),
    Bar("one picture, 8 steps, fp32, 2 CPU threads (s)", "1.3", lambda f: f["speed"]["8 steps"], lambda v: v <= 1.3),
    Bar("size of the pack (MiB)", "30", lambda f: f["size_mib"], lambda v: v <= 30),
)  # fmt: skip


def missed(figures: Figures) -> list[str]:
    """The bars that were not reached, with what they reached."""
    return [f"{bar.what}: {_shown(bar.read(figures))}, asked {bar.asked}" for bar in BARS if not bar.passes(bar.read(figures))]


def card(figures: Figures, notes: Figures, remarks: str) -> str:
    """figures: of evaluate.measure; notes: facts of the training stages; remarks: Markdown by people, about the bars not reached."""
    return (
        "\n".join([_HEAD, *_bars(figures), *_without_bar(figures), *_people(figures), *_details(figures), *_training(notes), remarks])
        + "\n"
    )


def _bars(figures: Figures) -> Iterator[str]:
    yield "| what | asked | measured | |"
    yield "|---|---|---|---|"
    for bar in BARS:
        value = bar.read(figures)
        yield f"| {bar.what} | {bar.asked} | {_shown(value)} | {'reached' if bar.passes(value) else '**not reached**'} |"


def _without_bar(figures: Figures) -> Iterator[str]:
    """InstantX's adapter, which came after the bars."""
    if "instantx" in figures:
        yield f"\nWithout a bar: InstantX's IP-Adapter, weight 1 (close-up, portrait): {_interval(figures['instantx']['together'])}."
        yield f"It and its picture encoder take {figures['size_apart_mib']} MiB beside those of the pack's size above."


def _people(figures: Figures) -> Iterator[str]:
    yield f"\n## Six people, ten prompts\n\n![Six people in ten prompts, the reference first]({figures['grid']['file']})\n"
    yield "Each row: the reference, then PuLID at weight 1 with the prompts\n"
    yield from (f"{number}. {text}" for number, text in enumerate(figures["grid"]["prompts"], 1))


def _details(figures: Figures) -> Iterator[str]:
    yield "\n## Identity, with 95 % bootstrap intervals\n\n| | framing | cosine of the judge | no face found |\n|---|---|---|---|"
    base = figures["prompts"]
    yield f"| prompt alone | all | {_interval(base['cosine'])} | {base['no_face']} |"
    adapters = (("IP-Adapter, 1", figures["ip_adapter"]), ("InstantX, 1", figures.get("instantx", {})))
    for name, method in (*adapters, *((f"PuLID, {w}", figures["pulid"][w]) for w in ("0", "0.5", "1"))):
        for framing, line in method.items():
            if isinstance(line, Mapping) and "cosine" in line:
                yield f"| {name} | {framing} | {_interval(line['cosine'])} | {line['no_face']} |"
    pose = figures["pose"]
    yield f"\nPose, {pose['n']} full bodies: {pose['obeyed']} with the ControlNet, {pose['without_control']} without it."
    yield "\n## Detector at other sizes\n\n| size | framing | recall | landmark error |\n|---|---|---|---|"
    for size, lines in figures["faces"]["detection"].items():
        yield from (f"| {size} | {framing} | {line['recall']:.3f} | {line['landmark_error']:.3f} |" for framing, line in lines.items())


def _training(notes: Figures) -> Iterator[str]:
    yield "\n## Training\n\n| stage | steps | seconds | processes | device |\n|---|---|---|---|---|"
    for stage, facts in sorted(notes.items()):
        yield f"| {stage} | {facts.get('steps', '')} | {facts.get('seconds', '')} | {facts.get('devices', 1)} | {facts.get('device', '')} |"


def _interval(figure: Figures) -> str:
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f}, n = {figure['n']})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " / ".join(_shown(v) for v in value)
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
