"""The summary as a picture: every cosine a dot, mean with its interval, median, the same-person threshold and the photographs' own ceiling.

Drawn with Pillow at twice its size and reduced, for smooth edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deployments.images import encode
from training.evaluation.rows import Row

_SCALE = 2
_LINE_PX, _LEFT_PX, _WIDTH_PX, _TOP_PX, _BOTTOM_PX = 56, 230, 900, 44, 64
_LOW, _HIGH, _STEP = -0.2, 1.0, 0.2
_INK, _GREY, _PALE = (32, 32, 32), (130, 130, 130), (226, 226, 226)
_DOT, _NO_FACE, _MARK, _CEILING = (90, 140, 200), (205, 92, 62), (20, 40, 90), (60, 140, 80)


@dataclass(frozen=True)
class _Canvas:
    """Pixels of the finished picture in, _SCALE times as many drawn."""

    draw: ImageDraw.ImageDraw

    def line(self, points: Sequence[float], colour: tuple[int, int, int], width: int = 1) -> None:
        self.draw.line([point * _SCALE for point in points], fill=colour, width=width * _SCALE)

    def dot(self, x: float, y: float, radius: float, colour: tuple[int, int, int]) -> None:
        self.draw.ellipse([(x - radius) * _SCALE, (y - radius) * _SCALE, (x + radius) * _SCALE, (y + radius) * _SCALE], fill=colour)

    def text(self, x: float, y: float, words: str, colour: tuple[int, int, int] = _INK, anchor: str = "lm", size: int = 14) -> None:
        self.draw.text((x * _SCALE, y * _SCALE), words, fill=colour, font=ImageFont.load_default(size * _SCALE), anchor=anchor)


def write(summary: Mapping[str, Any], configurations: Mapping[str, Sequence[Row]], path: Path) -> None:
    """summary: of summary.summary; configurations: the rows behind it, by name."""
    height = _TOP_PX + _LINE_PX * len(configurations) + _BOTTOM_PX
    image = Image.new("RGB", (_WIDTH_PX * _SCALE, height * _SCALE), "white")
    canvas = _Canvas(ImageDraw.Draw(image))
    bottom = height - _BOTTOM_PX
    _axis(canvas, summary, bottom)
    for number, (name, rows) in enumerate(configurations.items()):
        _line(canvas, summary["configurations"][name], rows, _TOP_PX + _LINE_PX * (number + 0.5))
    _legend(canvas, bottom + 46)
    path.write_bytes(encode(np.asarray(image.resize((_WIDTH_PX, height), Image.Resampling.LANCZOS), np.uint8)))


def _x(value: float) -> float:
    inside = min(max(value, _LOW), _HIGH)
    return _LEFT_PX + (inside - _LOW) / (_HIGH - _LOW) * (_WIDTH_PX - _LEFT_PX - 30)


def _axis(canvas: _Canvas, summary: Mapping[str, Any], bottom: float) -> None:
    for value in np.arange(_LOW, _HIGH + _STEP / 2, _STEP):
        canvas.line((_x(value), _TOP_PX, _x(value), bottom), _PALE)
        canvas.text(_x(value), bottom + 12, f"{value:.1f}".replace("-0.0", "0.0"), _GREY, "mm", 12)
    canvas.line((_x(summary["threshold"]), _TOP_PX, _x(summary["threshold"]), bottom), _GREY, 2)
    canvas.text(_x(summary["threshold"]), 22, f"same person from {summary['threshold']:g}", _GREY, "mm", 12)
    ceilings = [subject["leave_one_out"]["median"] for subject in summary["subjects"].values() if subject["leave_one_out"]]
    if ceilings:
        middle = float(np.median(ceilings))
        canvas.line((_x(middle), _TOP_PX, _x(middle), bottom), _CEILING, 2)
        canvas.text(_x(middle), 22, f"photographs {middle:.2f}", _CEILING, "mm", 12)


def _line(canvas: _Canvas, configuration: Mapping[str, Any], rows: Sequence[Row], y: float) -> None:
    figures = configuration["all"]
    identity = figures["identity"]
    canvas.text(12, y - 9, configuration["label"])
    mean = identity["mean_of_faces"]
    said = "no faces" if mean is None else f"mean {mean:.3f}, no face {figures['no_face_rate']:.1%}"
    canvas.text(12, y + 10, said, _GREY, size=12)
    heights = np.random.default_rng(0).uniform(-14, 14, len(rows))  # only so that dots do not hide one another
    for row, height in zip(rows, heights, strict=True):
        canvas.dot(_x(row.identity_or_zero), y + float(height), 3, _DOT if row.identity is not None else _NO_FACE)
    if mean is None:
        return
    low, high = identity["interval"]
    canvas.line((_x(low), y, _x(high), y), _MARK, 3)
    canvas.line((_x(identity["median"]), y - 13, _x(identity["median"]), y + 13), _MARK, 2)
    canvas.dot(_x(mean), y, 6, _MARK)


def _legend(canvas: _Canvas, y: float) -> None:
    canvas.dot(24, y, 3, _DOT)
    canvas.text(34, y, "a picture", _GREY, size=12)
    canvas.dot(124, y, 3, _NO_FACE)
    canvas.text(134, y, "no face, as 0", _GREY, size=12)
    canvas.dot(248, y, 6, _MARK)
    canvas.text(262, y, "mean of faces and its 95 % interval", _GREY, size=12)
    canvas.line((512, y - 8, 512, y + 8), _MARK, 2)
    canvas.text(522, y, "median; cosine of the judge to the references", _GREY, size=12)
