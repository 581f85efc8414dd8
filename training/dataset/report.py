"""What was decided about every picture, with its numbers: as JSON, as one page that needs nothing else, and as a contact sheet.

Decides nothing and looks at no original: thumbnails were made when the pictures were looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict, ValidationError

from deployments.contact_sheet import contact_sheet
from deployments.contracts import RGB
from deployments.errors import InvalidRequest
from deployments.images import encode
from training.dataset.files import KeptAnalyses, write
from training.dataset.report_page import page
from training.dataset.settings import CurationSettings
from training.dataset.values import Notice, PictureAnalysis, Reason, Verdict

REPORT, PAGE, SHEET = "report.json", "report.html", "contact_sheet.png"
_KEPT: Final = (24, 140, 70)
_REJECTED: Final = (200, 40, 40)
_SHADE: Final = 0.45
"""Of what is outside the crop."""
_BORDER_PX: Final = 4
_MISSING_PX: Final = 160


class ReportPicture(BaseModel):
    """numbers: of the face that was judged: size and yaw in pixels and degrees, sharpness, frontality, score, quality, compression. file,
    caption, composition: of an accepted picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sha256: str
    width: int
    height: int
    faces: int
    verdict: Verdict
    numbers: Mapping[str, float] = {}
    file: str | None = None
    caption: str | None = None
    composition: str | None = None


class Report(BaseModel):
    """models: ids of faces and judge, by which what was measured is found again. content_sha256: of the dataset, if there is one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...]
    settings: CurationSettings
    content_sha256: str | None
    notices: tuple[Notice, ...]
    pictures: tuple[ReportPicture, ...]

    @property
    def accepted(self) -> int:
        return sum(picture.verdict.reason is None for picture in self.pictures)

    @property
    def reasons(self) -> dict[Reason, int]:
        """How many were rejected for what, the most frequent first."""
        counted = Counter(picture.verdict.reason for picture in self.pictures if picture.verdict.reason is not None)
        return dict(counted.most_common())


def numbers(analysis: PictureAnalysis, verdict: Verdict) -> dict[str, float]:
    """Of the face that was judged, rounded for a reader."""
    if verdict.face is None:
        return {}
    face = analysis.faces[verdict.face]
    found = {"size": face.size, "sharpness": face.sharpness, "yaw": face.yaw, "frontality": face.frontality, "score": face.score}
    return {**found, "quality": round(face.quality, 3), "compression": round(analysis.compression, 3)}


def write_report(folder: Path, report: Report, analysis: Callable[[str], PictureAnalysis | None]) -> None:
    """report.json, report.html and contact_sheet.png in the folder. analysis: by sha256, for the thumbnails."""
    shown = sorted(report.pictures, key=lambda picture: (picture.verdict.reason is not None, picture.verdict.reason or ""))
    thumbnails = [_thumbnail(picture, analysis(picture.sha256)) for picture in shown]
    write(folder / REPORT, f"{report.model_dump_json(indent=2)}\n".encode())
    write(folder / PAGE, page(report, shown, [encode(thumbnail, "jpeg", quality=85, source=None) for thumbnail in thumbnails]).encode())
    sheet = contact_sheet(thumbnails, [_label(picture) for picture in shown])
    write(folder / SHEET, encode(sheet, source=None))


def read_report(folder: Path) -> Report:
    """Raises InvalidRequest where the folder holds none."""
    try:
        return Report.model_validate_json((folder / REPORT).read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidRequest(f"{folder} holds no report that can be read: {error}", "Make it with `likeness dataset curate`.") from error


def rewrite_report(folder: Path) -> Report:
    """The page and the sheet anew, from what is kept in the folder. Raises as read_report does."""
    report = read_report(folder)
    write_report(folder, report, KeptAnalyses(folder, report.models).get)
    return report


def _label(picture: ReportPicture) -> str:
    verdict, size = picture.verdict, picture.numbers.get("size")
    said = (verdict.reason or picture.composition or "accepted").replace("_", " ")
    measured = "" if size is None else f"{size:.0f} px, sharp {picture.numbers['sharpness']:.0f}"
    alike = "" if verdict.cosine is None else f"likeness {verdict.cosine:.2f}"
    return f"{picture.name}\n{said}\n{', '.join(part for part in (measured, alike) if part)}"


def _thumbnail(picture: ReportPicture, analysis: PictureAnalysis | None) -> RGB:
    """The picture with a border in the verdict's colour, the faces framed, the one that was judged in that colour, and what is cropped away
    dark; a grey square where there is nothing to show."""
    colour = _REJECTED if picture.verdict.reason else _KEPT
    if analysis is None or not analysis.thumbnail:
        blank = np.full((_MISSING_PX, _MISSING_PX, 3), 128, np.uint8)
        return np.pad(blank, ((_BORDER_PX, _BORDER_PX), (_BORDER_PX, _BORDER_PX), (0, 0)), constant_values=60)
    image = Image.open(BytesIO(analysis.thumbnail)).convert("RGB")
    scale = image.width / analysis.width
    if picture.verdict.crop is not None:
        image = _shaded(image, tuple(round(side * scale) for side in picture.verdict.crop.box))
    draw = ImageDraw.Draw(image)
    for place, face in enumerate(analysis.faces):
        judged = place == picture.verdict.face
        draw.rectangle([side * scale for side in face.box], outline=colour if judged else (240, 240, 240), width=2 if judged else 1)
    framed = Image.new("RGB", (image.width + 2 * _BORDER_PX, image.height + 2 * _BORDER_PX), colour)
    framed.paste(image, (_BORDER_PX, _BORDER_PX))
    return np.array(framed, dtype=np.uint8)


def _shaded(image: Image.Image, kept: tuple[int, ...]) -> Image.Image:
    dark = image.point(lambda value: value * _SHADE)
    dark.paste(image.crop((kept[0], kept[1], kept[2], kept[3])), (kept[0], kept[1]))
    return dark
