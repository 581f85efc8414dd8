"""The SDK: what it sends, how it reads answers and errors, over a socket and in one process; it starts without Ray and torch."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from deployments.errors import InvalidImage, InvalidRequest, LikenessError, MultipleFaces, QueueFull, ServerUnreachable
from serve.answers import GenerateResponse, ImageItem
from serve.attachments import data_uri, with_pictures
from serve.client import AsyncClient, Client
from serve.problem import MEDIA_TYPE, problem_of

ROOT = Path(__file__).resolve().parents[2]
ADA = ROOT / "samples" / "characters" / "ada-1.png"
PICTURE = base64.b64encode(ADA.read_bytes()).decode()
ANSWER = GenerateResponse(
    created=1, model="flux1-mini", data=[ImageItem(b64_json=PICTURE, seed=7, width=192, height=192, format="png")], request={"seed": 7}
)

Message = MutableMapping[str, Any]


class Echo:
    """An ASGI application that answers as a server would, and keeps what it was asked and in which loop."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.loops: set[int] = set()

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]) -> None:
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        fields = json.loads(body + message["body"] or b"null")
        self.asked.append((scope["path"], fields))
        self.loops.add(id(asyncio.get_running_loop()))
        status, media, content = self.answer(scope["path"], fields or {})
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", media.encode())]})
        await send({"type": "http.response.body", "body": content})

    def answer(self, path: str, fields: dict[str, Any]) -> tuple[int, str, bytes]:
        error = {"two": MultipleFaces("Two faces.", details={"boxes": [[0, 0, 9, 9]]}), "busy": QueueFull("Full.")}.get(
            fields.get("prompt", "")
        )
        if error is not None:
            return error.status, MEDIA_TYPE, problem_of(error).model_dump_json().encode()
        return 200, "application/json", {
            "/v1/generate": ANSWER.model_dump_json(),
            "/v1/faces/compare": '{"cosine": 0.5, "threshold": 0.3, "verdict": "same", "model": "face-judge-mini"}',
            "/v1/faces/analyze": '{"width": 192, "height": 192, "faces": []}',
            "/v1/workflows": '{"workflows": [], "methods": {}}',
            "/v1/models": '{"data": []}',
            "/readyz": '{"faces": true}',
        }.get(path, "what?").encode()  # fmt: skip


def test_importing_the_client_loads_neither_ray_nor_torch() -> None:
    heavy = {"ray", "torch", "numpy", "PIL", "diffusers", "transformers", "onnxruntime", "fastapi", "huggingface_hub"}
    source = f"import serve.client, sys; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_every_call_in_one_process_shares_one_loop() -> None:
    app = Echo()
    with Client("http://likeness.local", transport=httpx.ASGITransport(app)) as client:
        answer = client.generate(workflow="flux-pulid", prompt="x", reference_image=ADA, seed=7, weight=None)
        assert answer.data[0].content == ADA.read_bytes() and answer.request == {"seed": 7}
        assert client.compare(ADA, ADA, threshold=0.4).verdict == "same"
        assert client.analyze(ADA).faces == [] and client.workflows().workflows == [] and client.models().data == []
        assert client.ready()
    assert len(app.loops) == 1
    (path, fields), (_, compared) = app.asked[:2]
    assert path == "/v1/generate"
    assert fields == {"workflow": "flux-pulid", "prompt": "x", "reference_image": f"data:image/png;base64,{PICTURE}", "seed": 7}
    assert compared == {"first": f"data:image/png;base64,{PICTURE}", "second": f"data:image/png;base64,{PICTURE}", "threshold": 0.4}


def test_errors_come_back_as_what_they_were() -> None:
    with Client("http://likeness.local", transport=httpx.ASGITransport(Echo())) as client:
        with pytest.raises(MultipleFaces, match="Two faces") as caught:
            client.generate(prompt="two")
        assert caught.value.details == {"boxes": [[0, 0, 9, 9]]} and "face_index" in caught.value.remedy
        with pytest.raises(QueueFull):
            client.generate(prompt="busy")


def test_the_asynchronous_client_does_the_same() -> None:
    async def run() -> None:
        async with AsyncClient("http://likeness.local", transport=httpx.ASGITransport(Echo())) as client:
            both = await asyncio.gather(client.generate(prompt="x"), client.compare(ADA, ADA))
            assert both[0] == ANSWER and both[1].cosine == 0.5
            assert await client.ready() and (await client.models()).data == []
            assert (await client.workflows()).methods == {} and (await client.analyze(ADA)).width == 192
            with pytest.raises(MultipleFaces):
                await client.generate(prompt="two")

    asyncio.run(run())


@contextmanager
def over_http(status: int, media: str, content: bytes) -> Iterator[str]:
    """The address of a server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-type", media)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _answer

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_over_a_socket() -> None:
    with over_http(200, "application/json", ANSWER.model_dump_json().encode()) as url, Client(url) as client:
        assert client.generate(prompt="x") == ANSWER
    problem = problem_of(InvalidRequest("`n`: too many.", "Ask for fewer.", {"param": "n"})).model_dump_json().encode()
    with over_http(422, MEDIA_TYPE, problem) as url, Client(url) as client, pytest.raises(InvalidRequest) as caught:
        client.generate(prompt="x", n=99)
    assert (caught.value.remedy, caught.value.details) == ("Ask for fewer.", {"param": "n"})


@pytest.mark.parametrize(
    ("status", "media", "content", "said"),
    [
        (502, "text/html", b"<h1>Bad Gateway</h1>", "502.*Bad Gateway"),
        (500, MEDIA_TYPE, b"{broken", "500"),
        (200, "application/json", b'{"hello": "world"}', "no GenerateResponse"),
    ],
)
def test_an_answer_that_is_not_ours_is_told_as_such(status: int, media: str, content: bytes, said: str) -> None:
    with over_http(status, media, content) as url, Client(url) as client, pytest.raises(ServerUnreachable, match=said):
        client.generate(prompt="x")


def test_nobody_answers() -> None:
    with over_http(200, "text/plain", b"") as url:
        pass
    with Client(url) as client:
        assert not client.ready()
        with pytest.raises(ServerUnreachable, match="does not answer") as caught:
            client.models()
    assert "likeness serve" in caught.value.remedy and caught.value.status == 503


def test_pictures_of_every_kind_become_data_uris() -> None:
    data = ADA.read_bytes()
    expected = f"data:image/png;base64,{PICTURE}"
    assert {data_uri(kind) for kind in (ADA, str(ADA), data, bytearray(data), memoryview(data), expected)} == {expected}
    pixels = np.asarray(Image.open(ADA).convert("RGB"))
    for kind in (pixels, Image.open(ADA)):
        sent = base64.b64decode(data_uri(kind).partition(",")[2])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sent)).convert("RGB")), pixels)


def test_jpeg_and_webp_are_named_as_such() -> None:
    for kind, media in (("JPEG", "image/jpeg"), ("WEBP", "image/webp")):
        stream = io.BytesIO()
        Image.open(ADA).convert("RGB").save(stream, kind)
        assert data_uri(stream.getvalue()).startswith(f"data:{media};base64,")


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("no-such-file.png", "no-such-file.png cannot be read"),
        (Path("nowhere"), "nowhere cannot be read"),
        (b"GIF89a", "not a PNG"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (3.5, "float is no picture"),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_sent(picture: object, said: str) -> None:
    with pytest.raises(InvalidImage, match=said):
        data_uri(picture)


def test_people_in_lists_have_their_pictures_sent_too() -> None:
    uri = f"data:image/png;base64,{PICTURE}"
    sent = with_pictures({"prompt": "p.png", "identities": [{"method": "pulid", "images": [ADA, str(ADA)]}, {"reference_image": ADA}]})
    assert sent == {"prompt": "p.png", "identities": [{"method": "pulid", "images": [uri, uri]}, {"reference_image": uri}]}


def test_addresses_are_left_for_the_server_to_refuse() -> None:
    assert with_pictures({"reference_image": "https://example.org/me.png"}) == {"reference_image": "https://example.org/me.png"}


def test_a_picture_that_the_server_kept_has_no_content(tmp_path: Path) -> None:
    kept = ImageItem(path="pictures/1.png", seed=1, width=64, height=64, format="png")
    with pytest.raises(ValueError, match="ask for response_format b64_json"):
        kept.save(tmp_path / "1.png")
    assert ANSWER.data[0].save(tmp_path / "new" / "2.png").read_bytes() == ADA.read_bytes()


def test_errors_of_a_newer_server_keep_their_code() -> None:
    content = b'{"title": "New.", "status": 418, "code": "teapot", "detail": "Short and stout."}'
    with over_http(418, MEDIA_TYPE, content) as url, Client(url) as client, pytest.raises(LikenessError, match="Short and stout") as caught:
        client.generate(prompt="x")
    assert caught.value.details == {"code": "teapot", "status": 418}
