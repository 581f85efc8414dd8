"""One row a picture, in a CSV file that survives whatever stops the evaluation. Knows no model and no statistics.

A row is appended whole by one write and brought to the disk, after its picture; half a row, of a machine that went down, is cut off when
the file is opened again. So a second run draws what is missing and nothing twice. A file of before `peak_bytes` was measured is given that
column when it is opened.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self, cast, get_args
from uuid import uuid4

from deployments.errors import InvalidRequest
from deployments.store.durable import placed
from training.evaluation.cases import Key
from training.evaluation.likeness import Measured
from training.evaluation.plan import Framing

Band = Literal["front", "turned", "profile"]
_FRONT_TO: Final = 15.0
"""Degrees: as far as pictures count as seen from one angle (deployments/curation.py)."""
_TURNED_TO: Final = 40.0
"""Degrees, up to which recognisers are commonly trusted (lora-dataset-studio, docs/guide/settings-reference.md)."""
_MEASURED: Final = tuple(Measured.__dataclass_fields__)
_WHOLE: Final = frozenset({"faces", "nearest_reference"})
_LATER: Final = "peak_bytes"
_FIXED: Final = (
    "subject", "sex", "configuration", "prompt", "framing", "seed", "asked", *_MEASURED, "seconds", "models", "picture", _LATER,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """One picture. asked: see Case.asked. seconds: that it took. models: ids of all that drew it. picture: its file, below the folder of
    the evaluation. peak_bytes: the most memory that the denoiser held, where that is known. adherence: measure -> number."""

    key: Key
    framing: Framing
    sex: Literal["F", "M"] | None
    asked: str
    measured: Measured
    seconds: float
    models: tuple[str, ...]
    picture: str
    peak_bytes: int | None = None
    adherence: Mapping[str, float] = field(default_factory=dict)

    @property
    def identity(self) -> float | None:
        return self.measured.identity

    @property
    def identity_or_zero(self) -> float:
        """A picture without a face is nobody's."""
        return 0.0 if self.measured.identity is None else self.measured.identity

    @property
    def cluster(self) -> tuple[str, str]:
        """What its seeds share."""
        return self.key.subject, self.key.prompt

    @property
    def pair(self) -> tuple[str, str, int]:
        """What it has in common with one picture of every other configuration."""
        return self.key.subject, self.key.prompt, self.key.seed

    @property
    def band(self) -> Band | None:
        if self.measured.yaw is None:
            return None
        turned = abs(self.measured.yaw)
        return "front" if turned <= _FRONT_TO else "turned" if turned <= _TURNED_TO else "profile"


class RowFile:
    """rows: those that were there. measures: names of the columns that hold how prompts were followed."""

    def __init__(self, path: Path, measures: Sequence[str]) -> None:
        """Raises InvalidRequest for a file with other columns."""
        self._path, self._measures = path, tuple(measures)
        self._columns = (*_FIXED, *self._measures)
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_half_a_row(path)
        self.rows = self._read()

    @classmethod
    def of(cls, folder: Path, measures: Sequence[str]) -> Self:
        return cls(folder / "scores.csv", measures)

    def append(self, row: Row) -> None:
        texts = [_line(self._columns)] if not self._path.exists() or not self._path.stat().st_size else []
        data = "".join([*texts, _line(self._values(row))]).encode()
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(file, data) != len(data):
                raise OSError(f"The disk of {self._path} is full.")
            os.fsync(file)
        finally:
            os.close(file)
        self.rows.append(row)

    def _read(self) -> list[Row]:
        if not self._path.exists() or not self._path.stat().st_size:
            return []
        with self._path.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns, lines = tuple(reader.fieldnames or ()), list(reader)
        if columns == tuple(column for column in self._columns if column != _LATER):
            lines = [line | {_LATER: ""} for line in lines]
            self._rewrite(lines)
        elif columns != self._columns:
            message = f"{self._path} has other columns than this evaluation writes."
            raise InvalidRequest(message, "Choose another folder, or the plan and the measures that it was begun with.")
        return [_row(line, self._measures) for line in lines]

    def _rewrite(self, lines: Iterable[Mapping[str, str]]) -> None:
        """Every row in our columns, whole or not at all."""
        texts = [_line(self._columns), *(_line(line[column] for column in self._columns) for line in lines)]
        placed(self._path.with_name(f"{self._path.name}.{uuid4().hex}.part"), "".join(texts).encode(), self._path)

    def _values(self, row: Row) -> list[Any]:
        own: dict[str, Any] = {
            **row.key._asdict(), "sex": row.sex or "", "framing": row.framing, "asked": row.asked, "seconds": round(row.seconds, 4),
            "models": " ".join(row.models), "picture": row.picture, "peak_bytes": _short(row.peak_bytes),
            **{name: _short(getattr(row.measured, name)) for name in _MEASURED},
            **{name: _short(row.adherence.get(name)) for name in self._measures},
        }  # fmt: skip
        return [own[column] for column in self._columns]


def _line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _short(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.6g}"


def _row(line: Mapping[str, str], measures: Sequence[str]) -> Row:
    numbers = {name: (int(line[name]) if name in _WHOLE else float(line[name])) for name in _MEASURED if line[name]}
    if line["framing"] not in get_args(Framing):
        raise InvalidRequest(f"A row has the framing {line['framing']!r}.", "Choose another folder; this file was changed by hand.")
    return Row(
        key=Key(line["subject"], line["configuration"], line["prompt"], int(line["seed"])),
        framing=cast(Framing, line["framing"]),
        sex=cast(Literal["F", "M"] | None, line["sex"] or None),
        asked=line["asked"],
        measured=Measured(**cast(dict[str, Any], numbers)),
        seconds=float(line["seconds"]),
        models=tuple(line["models"].split()),
        picture=line["picture"],
        peak_bytes=int(line["peak_bytes"]) if line["peak_bytes"] else None,
        adherence={name: float(line[name]) for name in measures if line[name]},
    )


def _cut_half_a_row(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
