"""A summary as Markdown: one line a configuration, then the differences, then every score by framing, turn and sex. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_Figures = Mapping[str, Any]


def markdown(summary: _Figures) -> str:
    """summary: of summary.summary."""
    return "\n".join([*_head(summary), *_main(summary), *_differences(summary), *_slices(summary)]) + "\n"


def _head(summary: _Figures) -> Iterator[str]:
    prompts, seeds, people = (len(summary[part]) for part in ("prompts", "seeds", "subjects"))
    yield f"{summary['description']}".strip()
    yield ""
    yield f"{prompts} prompts x {_counted(seeds, 'seed')} x {_counted(people, 'person', 'people')}: {prompts * seeds * people} pictures a"
    yield f"configuration. Cosine of `{summary['judge']}`, which conditions none of them, to the centroid of the references."
    yield ""
    for name, subject in summary["subjects"].items():
        said, shown = _spread(subject["leave_one_out"]), _counted(subject["references"], "reference")
        yield f"- {name}: {shown}, {subject['held_out']} held out; among themselves (leave-one-out) {said}."
    yield ""


def _main(summary: _Figures) -> Iterator[str]:
    every: Mapping[str, _Figures] = {item["label"]: item["all"] for item in summary["configurations"].values()}
    yield from _table("Configuration", every, summary["threshold"])
    for name, why in summary["left_out"].items():
        yield f"\n{name} was not drawn: {why}."


def _differences(summary: _Figures) -> Iterator[str]:
    if not summary["differences"]:
        return
    labels = {name: item["label"] for name, item in summary["configurations"].items()}
    yield "\nDifferences of identity in pairs of the same person, prompt and seed, no face as 0; 95 % bootstrap over prompts:\n"
    yield "| | than | difference | higher in | pairs |\n|---|---|---|---|---|"
    for gap in summary["differences"]:
        said = f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})"
        yield f"| {labels[gap['of']]} | {labels[gap['than']]} | {said} | {gap['higher']:.0%} | {gap['pairs']} |"


def _slices(summary: _Figures) -> Iterator[str]:
    for slice in ("framing", "yaw", "sex"):
        lines = {
            f"{item['label']}, {value}": figures for item in summary["configurations"].values() for value, figures in item[slice].items()
        }
        if len({value for item in summary["configurations"].values() for value in item[slice]}) > 1:
            yield f"\nBy {slice}:\n"
            yield from _table("", lines, summary["threshold"])


def _table(first: str, lines: Mapping[str, _Figures], threshold: float) -> Iterator[str]:
    measures = list(dict.fromkeys(name for figures in lines.values() for name in figures["adherence"]))
    heads = [
        first, "Mean (95 %)", "Median", "Std", "No-face rate", "Mean, no face as 0", f">= {threshold:g}", "Relative", "Held out",
        "Copy-paste", *measures, "s a picture", "Peak GiB", "Pictures",
    ]  # fmt: skip
    yield _row(heads)
    yield _row(["---"] * len(heads))
    for label, figures in lines.items():
        yield _row([label, *_cells(figures), *(_number(figures["adherence"].get(name)) for name in measures), *_last(figures)])


def _cells(figures: _Figures) -> list[str]:
    identity, held_out, copied = figures["identity"], figures["held_out"], figures["copy_paste"]
    low, high = identity["interval"] or (None, None)
    mean = f"{_number(identity['mean_of_faces'])} ({_number(low)} to {_number(high)})"
    return [
        mean, _number(identity["median"]), _number(identity["std"]), f"{figures['no_face_rate']:.1%}",
        _number(identity["mean_no_face_as_0"]), f"{figures['above_threshold']:.1%}", _number(figures["relative_identity"], 2),
        _number(held_out and held_out["mean"]), _number(copied and copied["mean"]),
    ]  # fmt: skip


def _last(figures: _Figures) -> list[str]:
    peak = figures["peak_bytes"]
    return [_number(figures["seconds"]["median"], 2), _number(peak and peak / 2**30, 2), str(figures["pictures"])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(found: _Figures | None) -> str:
    return "not known" if found is None else f"{found['mean']:.3f}, median {found['median']:.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
