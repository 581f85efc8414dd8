"""Characters behind routes: true faces, a true store, the samples."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI

from deployments.catalog import CATALOG_PATH
from deployments.curation import Curated
from deployments.errors import LikenessError
from deployments.face_server import FaceServer, FaceSettings
from deployments.store.character_values import PictureFacts
from deployments.store.settings import EVERYBODY
from serve.characters import CharacterDesk, add_character_routes
from serve.ingress import _answer

SAMPLES = CATALOG_PATH.parents[1] / "samples"
LIMIT = 8 * 2**20
SETTINGS = FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini")


def sample(name: str) -> Path:
    return SAMPLES / ("characters" if name[-1].isdigit() else "groups") / f"{name}.png"


ADA = [sample(f"ada-{number}") for number in (1, 2, 3, 4)]


class Looked:
    """FaceServer.curate in threads, as a handle answers; counts the pictures that were looked at."""

    def __init__(self, faces: FaceServer) -> None:
        self._faces, self.pictures = faces, 0

    async def __call__(self, pictures: Sequence[bytes], known: Sequence[PictureFacts], best: int | None) -> Curated:
        self.pictures += len(pictures)
        return await asyncio.to_thread(self._faces.curate, pictures, known, best)


def application(desk: CharacterDesk) -> FastAPI:
    """Whose a request is, its header says. Bodies have at most LIMIT bytes."""
    app = FastAPI()
    app.add_exception_handler(LikenessError, _answer)
    add_character_routes(app, desk, LIMIT, lambda request: request.headers.get("x-owner", EVERYBODY))
    return app
