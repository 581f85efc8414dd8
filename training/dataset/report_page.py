"""The report as one page of HTML: no script, nothing loaded from anywhere, pictures inside. What came from outside is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Final

from training.dataset.values import REASONS

if TYPE_CHECKING:
    from training.dataset.report import Report, ReportPicture

_STYLE: Final = """
:root { color-scheme: light dark; --ok: #188c46; --no: #c82828; --line: #8884; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
table { border-collapse: collapse } td, th { padding: .15rem 1rem .15rem 0; text-align: left; font-variant-numeric: tabular-nums }
.warning { border-left: 4px solid #d80; padding: .3rem .8rem; margin: .4rem 0 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem; overflow-wrap: anywhere }
.card img { display: block; max-width: 100%; margin: 0 auto .5rem }
.badge { color: #fff; border-radius: 3px; padding: 0 .45rem; background: var(--no) } .badge.ok { background: var(--ok) }
.numbers { font-size: 12px; opacity: .85; margin: .3rem 0 0 } details pre { overflow: auto; font-size: 12px }
"""
_NUMBERS: Final = {
    "size": "{:.0f} px wide", "sharpness": "sharpness {:.0f}", "yaw": "turned {:+.0f}°", "quality": "quality {:.2f}",
    "compression": "compressed {:.0%}", "score": "detector {:.2f}",
}  # fmt: skip


def page(report: Report, pictures: Sequence[ReportPicture], thumbnails: Sequence[bytes]) -> str:
    """pictures, in the order in which they are shown, and a JPEG of each."""
    cards = "\n".join(_card(picture, thumbnail) for picture, thumbnail in zip(pictures, thumbnails, strict=True))
    warnings = "\n".join(f'<p class="warning">{escape(notice.message)}{_named(notice.pictures)}</p>' for notice in report.notices)
    rows = "".join(f"<tr><td>{reason}</td><td>{count}</td><td>{REASONS[reason]}</td></tr>" for reason, count in report.reasons.items())
    rejected = f"<table><tr><th>reason</th><th>pictures</th><th></th></tr>{rows}</table>" if rows else ""
    title = f"{report.accepted} of {len(report.pictures)} pictures accepted"
    content = "" if report.content_sha256 is None else f"dataset {report.content_sha256[:16]}, "
    settings = escape(report.settings.model_dump_json(indent=2))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>{escape(content)}trigger word <b>{escape(report.settings.trigger)}</b>, looked at by {escape(" and ".join(report.models))}.
A likeness is the judge's cosine to the mean of the subject's other pictures.</p>
{warnings}
{rejected}
<h2>Pictures</h2>
<div class="cards">
{cards}
</div>
<details><summary>Settings</summary><pre>{settings}</pre></details>
</body></html>
"""


def _card(picture: ReportPicture, thumbnail: bytes) -> str:
    verdict = picture.verdict
    badge = '<span class="badge ok">accepted</span>' if verdict.reason is None else f'<span class="badge">{verdict.reason}</span>'
    alike = [] if verdict.cosine is None else [f"likeness {verdict.cosine:.3f}"]
    measured = [text.format(picture.numbers[name]) for name, text in _NUMBERS.items() if name in picture.numbers]
    crop = [] if verdict.crop is None else [f"kept {_extent(verdict.crop.box)} of {picture.width} x {picture.height}"]
    facts = " · ".join([*alike, *measured, *crop, f"{picture.faces} face{'' if picture.faces == 1 else 's'}", verdict.state])
    caption = "" if picture.caption is None else f"<p>“{escape(picture.caption)}”</p>"
    image = f'<img alt="" src="data:image/jpeg;base64,{b64encode(thumbnail).decode()}">'
    return (
        f'<div class="card">{image}{badge} <b>{escape(picture.name)}</b>'
        f'<div>{escape(verdict.says)}</div>{caption}<div class="numbers">{escape(facts)}</div></div>'
    )


def _extent(box: tuple[int, int, int, int]) -> str:
    return f"{box[2] - box[0]} x {box[3] - box[1]}"


def _named(pictures: Sequence[str]) -> str:
    return f" ({escape(', '.join(pictures))})" if pictures else ""
