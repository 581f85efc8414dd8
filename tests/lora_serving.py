"""LoRA files that are true and one that is another family's, and a LoraServer behind routes, in this process or over a socket."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn
from fastapi import FastAPI, Request
from safetensors.torch import save
from starlette.types import ASGIApp

from deployments.lora_server import LoraServer
from deployments.store.settings import EVERYBODY
from serve.ingress import Calls, api
from tests.lora_files import State, kohya

ADA = (Path(__file__).resolve().parents[1] / "models" / "mini" / "loras" / "ada.safetensors").read_bytes()
KOHYA = save(kohya())
SDXL: State = {
    "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 640),
    "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(640, 4),
}
LIMIT = 2**20


class LorasOnly:
    """Of the calls behind the routes those about LoRAs, answered in threads."""

    def __init__(self, server: LoraServer) -> None:
        self._server = server

    async def lora(self, method: str, *args: Any) -> Any:
        return await asyncio.to_thread(getattr(self._server, method), *args)


def routes(server: LoraServer) -> FastAPI:
    """Whose a request is, its header says; without one it is everybody's. Files have at most LIMIT bytes."""

    def owner(request: Request) -> str:
        return request.headers.get("x-owner", EVERYBODY)

    return api(cast(Calls, LorasOnly(server)), LIMIT, LIMIT, owner_of=owner)


def kept(folder: Path) -> list[Path]:
    """Every file beneath a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


@contextmanager
def over_a_socket(app: ASGIApp) -> Iterator[str]:
    """The address of a server of this application."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
