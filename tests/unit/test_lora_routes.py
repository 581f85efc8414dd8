"""`/v1/loras` and the SDK's `client.loras`, over a true LoraServer: what goes up is what is kept, and whose it is stays so."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from safetensors.torch import save
from starlette.types import Message, Receive, Scope, Send

from deployments.errors import InvalidLora, InvalidRequest, LoraIncompatible, LoraNotFound, ServerUnreachable, StoreUnavailable
from deployments.lora_server import LoraServer
from deployments.store.settings import EVERYBODY, StoreSettings
from serve.client import AsyncClient, Client
from serve.client_loras import AsyncLoras, Loras
from serve.file_names import attachment, file_name
from serve.ingress import Calls, api
from tests.lora_serving import ADA, KOHYA, LIMIT, SDXL, LorasOnly, kept, over_a_socket, routes

URL = "http://likeness.local"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[FastAPI]:
    server = LoraServer("flux1-mini", StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files"))
    yield routes(server)
    server.close()


@pytest.fixture
def http(app: FastAPI) -> Iterator[httpx.Client]:
    with Client(URL, transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
        yield client._http


@pytest.fixture
def mine(http: httpx.Client) -> Loras:
    return Loras(http)


def test_a_file_goes_up_comes_back_in_the_list_and_goes(mine: Loras, tmp_path: Path) -> None:
    path = tmp_path / "Ada at sea.safetensors"
    path.write_bytes(ADA)
    told: list[tuple[int, int]] = []
    item = mine.add(path, description="Twenty pictures.", progress=lambda done, total: told.append((done, total)))
    assert (item.name, item.trigger_word, item.description, item.base) == ("Ada at sea", "ada", "Twenty pictures.", "flux1-mini")
    assert item.bytes == len(ADA) and [file.read_bytes() for file in kept(tmp_path / "files")] == [ADA]
    assert told == sorted(told) and told[-1] == (len(ADA), len(ADA)) and len(told) > 1
    assert mine.list().data == [item] and mine.get(item.id) == item
    assert mine.delete(item.id).id == item.id
    assert mine.list().data == [] and kept(tmp_path / "files") == []
    for question in (mine.get, mine.delete):
        with pytest.raises(LoraNotFound, match=item.id):
            question(item.id)


def test_bytes_have_a_name_too(mine: Loras) -> None:
    assert mine.add(KOHYA).name == "lora"
    item = mine.add(KOHYA, name="Ada, 50 %", trigger_word="ada person")
    assert (item.name, item.trigger_word) == ("Ada, 50 %", "ada person")


def test_json_with_base64_does_the_same(http: httpx.Client) -> None:
    body = {"file": base64.b64encode(ADA).decode(), "name": "Ada", "trigger_word": "ada person"}
    answer = http.post("/v1/loras", json=body)
    assert answer.status_code == 201 and answer.headers["location"] == f"/v1/loras/{answer.json()['id']}"
    assert http.get(answer.headers["location"]).json() == answer.json()
    assert answer.json()["trigger_word"] == "ada person"


def test_another_owners_lora_is_not_there(http: httpx.Client, mine: Loras) -> None:
    item = mine.add(KOHYA)
    known = {"if-none-match": f'"{item.sha256}"'}
    for method, rest in (("GET", ""), ("DELETE", ""), ("GET", "/file")):
        answer = http.request(method, f"/v1/loras/{item.id}{rest}", headers={"x-owner": "bruno", **known})
        assert (answer.status_code, answer.json()["code"]) == (404, "lora_not_found")
        nobodys = http.request(method, f"/v1/loras/lora_{'0' * 24}{rest}")
        assert nobodys.json() | {"detail": "", "details": {}} == answer.json() | {"detail": "", "details": {}}
    assert http.get("/v1/loras", headers={"x-owner": "bruno"}).json() == {"data": []}
    assert mine.list().data == [item]


@pytest.mark.parametrize("id", ["x", "lora_", "%00", "..%2f..", "lora_" + "f" * 5000])
def test_ids_that_are_none_are_not_found(http: httpx.Client, id: str) -> None:
    assert http.get(f"/v1/loras/{id}").status_code == http.delete(f"/v1/loras/{id}").status_code == 404
    assert http.get(f"/v1/loras/{id}/file").status_code == 404


def test_what_stands_behind_the_address_is_not_passed_over(http: httpx.Client, mine: Loras) -> None:
    item = mine.add(KOHYA)
    one = f"/v1/loras/{item.id}"
    for method, path in (("GET", "/v1/loras"), ("GET", one), ("GET", f"{one}/file"), ("DELETE", one)):
        answer = http.request(method, path, params={"owner": "bruno"})
        assert (answer.status_code, answer.json()["code"], answer.json()["param"]) == (422, "invalid_request", "owner")
    assert mine.list().data == [item]


def test_the_file_comes_back_as_it_went_up(http: httpx.Client, mine: Loras, tmp_path: Path) -> None:
    item = mine.add(ADA, name='Ada "at sea"/ü')
    answer = http.get(f"/v1/loras/{item.id}/file")
    assert (answer.content, answer.headers["content-length"]) == (ADA, str(len(ADA)))
    assert answer.headers["content-type"] == "application/octet-stream" and answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["etag"] == f'"{sha256(ADA).hexdigest()}"' and answer.headers["cache-control"] == "private, no-cache"
    disposition = "attachment; filename=\"Ada _at sea___.safetensors\"; filename*=UTF-8''Ada%20_at%20sea__%C3%BC.safetensors"
    assert answer.headers["content-disposition"] == disposition
    again = http.get(f"/v1/loras/{item.id}/file", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    (file,) = kept(tmp_path / "files")
    file.unlink()
    assert http.get(f"/v1/loras/{item.id}/file").json()["code"] == "missing_weights"
    mine.delete(item.id)
    assert http.get(f"/v1/loras/{item.id}/file").json()["code"] == "lora_not_found"


def test_a_file_that_is_gone_when_it_is_opened_is_no_answer_that_breaks_off(tmp_path: Path) -> None:
    """Deleted by another request in between it is not there; where the store's folder is not seen, the operator has to act."""
    server = LoraServer("flux1-mini", StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files"))

    happens: list[Callable[[], object]] = []

    class Meanwhile(LorasOnly):
        """Once the path was told, something happens."""

        async def lora(self, method: str, *args: Any) -> Any:
            found = await super().lora(method, *args)
            if method == "path":
                await asyncio.to_thread(happens[0])
            return found

    def unseen() -> None:
        for file in kept(tmp_path / "files"):
            file.unlink()

    def deleted() -> None:
        server.delete(item.id, EVERYBODY)

    app = api(cast(Calls, Meanwhile(server)), LIMIT, LIMIT)
    with Client(URL, transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
        for content, between, error in ((KOHYA, unseen, StoreUnavailable), (ADA, deleted, LoraNotFound)):
            item, happens[:] = client.loras.add(content), [between]
            with pytest.raises(error, match=item.id):
                client.loras.download(item.id)
    server.close()


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("ada", "ada"), ("ada.safetensors", "ada"), ("../../etc/passwd", "_.._etc_passwd"), ("C:\\loras\\ada", "C__loras_ada"),
        ("..", "unnamed"), (".ada", "ada"), ("ada\u202egpj", "ada_gpj"), ("ä" * 200, "ä" * 90), ("x" * 200, "x" * 180),
        ("Ada, 50 %", "Ada, 50 %"),
    ],
)  # fmt: skip
def test_files_are_called_as_any_folder_takes_it(name: str, called: str) -> None:
    assert file_name(name, ".safetensors") == f"{called}.safetensors"
    header = attachment(f"{called}.safetensors")
    assert header.isascii() and header.count('"') == 2


def test_a_download_is_bytes_or_a_file_and_tells_how_far_it_is(app: FastAPI, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with over_a_socket(app) as url, Client(url) as client:
        item = client.loras.add(ADA, name="Ada")
        assert client.loras.download(item.id, progress=lambda done, total: told.append((done, total))) == ADA
        assert told == sorted(told) and told[-1] == (len(ADA), len(ADA)) and len(told) > 1
        file, folder = tmp_path / "new" / "her.safetensors", tmp_path / "folder"
        assert client.loras.download(item.id, file) == file and file.read_bytes() == ADA
        file.write_bytes(b"another")
        assert client.loras.download(item.id, file) == file and file.read_bytes() == ADA
        assert client.loras.download(item.id, folder) == folder / "Ada.safetensors"
        assert kept(folder) == [folder / "Ada.safetensors"] and kept(tmp_path / "new") == [file]
        with pytest.raises(InvalidRequest, match="cannot be written"):
            client.loras.download(item.id, file / "within.safetensors")
        for path in (None, tmp_path / "none.safetensors", tmp_path / "none"):
            with pytest.raises(LoraNotFound):
                client.loras.download(f"lora_{'0' * 24}", path)
        assert not (tmp_path / "none").exists() and not list(tmp_path.glob("none*"))


def test_a_download_that_is_cut_off_leaves_what_was_there(app: FastAPI, tmp_path: Path) -> None:
    async def breaking(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            await send(message)
            if scope["path"].endswith("/file") and message["type"] == "http.response.body":
                raise OSError("The cable is out.")

        await app(scope, receive, sending)

    folder = tmp_path / "loras"
    path = folder / "ada.safetensors"
    folder.mkdir()
    path.write_bytes(b"what was there")
    with over_a_socket(breaking) as url, Client(url) as client:
        item = client.loras.add(ADA)
        told: list[int] = []
        with pytest.raises(ServerUnreachable):
            client.loras.download(item.id, path, progress=lambda done, total: told.append(done))
    assert 0 < told[-1] < len(ADA) and kept(folder) == [path] and path.read_bytes() == b"what was there"


def test_what_is_no_lora_for_this_model_is_told_with_its_keys(mine: Loras, tmp_path: Path) -> None:
    with pytest.raises(LoraIncompatible, match="other changes no module") as caught:
        mine.add(save(SDXL), name="other")
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight" in str(caught.value.details["left_over"])
    with pytest.raises(InvalidLora, match="no whole safetensors"):
        mine.add(KOHYA[:1000])
    with pytest.raises(InvalidRequest, match="cannot be read") as absent:
        mine.add(tmp_path / "absent.safetensors")
    assert "absent.safetensors" in absent.value.message
    assert kept(tmp_path / "files") == []


FORM = "multipart/form-data; boundary=zz"
ENCODED = base64.b64encode(KOHYA).decode()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"json": {"name": "x"}}, "`file`: this field is needed"),
        ({"json": {"file": ENCODED}}, "`name`: this field is needed"),
        ({"json": {"file": "?" * 99, "name": "x"}}, "`file` is no base64"),
        ({"json": {"file": 7, "name": "x"}}, "`file` is no base64"),
        ({"json": {"file": ENCODED, "name": "x", "scale": 1}}, "`scale`: there is no such field"),
        ({"json": {"file": ENCODED, "name": ["x"]}}, "`name`"),
        ({"json": {"file": ENCODED, "name": ""}}, "`name` is empty"),
        ({"json": [1]}, "not a JSON object"),
        ({"content": b"{"}, "no JSON"),
        ({"content": b"[" * 100_000}, "no JSON"),
        ({"content": b'{"name": "a", "name": "b"}'}, "'name' is given twice"),
        ({"data": {"name": "x"}, "files": {}}, "no JSON"),
        ({"files": {"file": ("a.safetensors", KOHYA), "picture": ("b", b"x")}}, "Too many files"),
        ({"files": {"picture": ("b", b"x")}}, "'picture' came as a file"),
        ({"files": {"name": (None, "x"), "file": (None, "text")}}, "'file' came as a text"),
        ({"files": [("file", ("a.safetensors", KOHYA)), ("name", (None, "x")), ("name", (None, "y"))]}, "'name' is given twice"),
        ({"files": {"file": ("a.safetensors", KOHYA)}, "data": {"description": "x" * 70_000}}, "cannot be read"),
        ({"files": {"file": ("a.safetensors", KOHYA)}, "data": {"description": "x" * 5000}}, "`description` has 5000 characters"),
        ({"files": {"file": ("a.safetensors", KOHYA)}, "params": {"owner": "ada"}}, "behind the `?`"),
        ({"content": b"abc", "headers": {"content-type": FORM}}, "cannot be read"),
        ({"files": {"file": ("a.safetensors", bytes(LIMIT + 2**17))}}, "larger than 1048576 bytes"),
        ({"files": {"file": ("a.safetensors", bytes(LIMIT + 9))}}, "larger than 1048576 bytes"),
        ({"json": {"name": "x", "file": "A" * 2 * LIMIT}}, "larger than 1048576 bytes"),
    ],
)
def test_an_upload_that_cannot_be_meant_is_refused(http: httpx.Client, tmp_path: Path, request_: dict[str, Any], says: str) -> None:
    answer = http.post("/v1/loras", **request_)
    assert (answer.status_code, answer.json()["code"]) == ((413, "too_large") if "larger" in says else (422, "invalid_request")), (
        answer.text
    )
    assert says in answer.json()["detail"] and answer.json()["remedy"] and len(answer.text) < 5000
    assert kept(tmp_path / "files") == []


def test_names_come_without_folders(http: httpx.Client) -> None:
    for filename, name in (("../../ada.safetensors", "ada"), ("C:\\loras\\ada.safetensors", "ada"), ("ada", "ada")):
        answer = http.post("/v1/loras", files={"file": (filename, KOHYA)})
        assert answer.json()["name"] == name


def test_the_asynchronous_client_does_the_same(app: FastAPI, tmp_path: Path) -> None:
    path = tmp_path / "ada.safetensors"
    path.write_bytes(ADA)

    async def run() -> None:
        async with AsyncClient(URL, transport=httpx.ASGITransport(app)) as client:
            mine = AsyncLoras(client._http)
            item = await mine.add(path)
            assert (await mine.list()).data == [item] and await mine.get(item.id) == item
            assert await mine.download(item.id) == ADA
            copy = await mine.download(item.id, tmp_path / "copies")
            assert copy == tmp_path / "copies" / "ada.safetensors" and copy.read_bytes() == ADA
            assert (await mine.delete(item.id)).deleted
            for gone in (mine.get, mine.download):
                with pytest.raises(LoraNotFound):
                    await gone(item.id)

    asyncio.run(run())


def test_over_a_socket_a_body_of_unknown_length_is_refused_before_its_end(app: FastAPI, tmp_path: Path) -> None:
    head = f"POST /v1/loras HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    opening = b'--zz\r\ncontent-disposition: form-data; name="file"; filename="a.safetensors"\r\n\r\n'
    with over_a_socket(app) as url, httpx.Client(base_url=url) as http:
        mine = Loras(http)
        item = mine.add(ADA, name="Ada")
        with socket.create_connection(("127.0.0.1", http.base_url.port), timeout=30) as connection:
            connection.sendall(head + b"%x\r\n%b\r\n" % (len(opening), opening))
            for _ in range(2 * LIMIT // 2**16):
                connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
            answer = connection.recv(2**16)
        assert answer.startswith(b"HTTP/1.1 413")
        assert mine.list().data == [item] and len(kept(tmp_path / "files")) == 1
    with pytest.raises(ServerUnreachable), httpx.Client(base_url=url) as http:
        Loras(http).list()


def test_the_documentation_says_what_goes_up(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    content = paths["/v1/loras"]["post"]["requestBody"]["content"]
    form, body = content["multipart/form-data"]["schema"], content["application/json"]["schema"]
    assert form["required"] == ["file"] and set(body["required"]) == {"file", "name"}
    assert json.dumps(paths["/v1/loras/{id}"]["delete"]["responses"]).count("Problem")
    answers = paths["/v1/loras/{id}/file"]["get"]["responses"]
    assert list(answers["200"]["content"]) == ["application/octet-stream"] and "404" in answers
