"""Hostile requests to the whole application: each is refused with the right code, nothing is kept or fetched, and the next is served."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

import httpx
import numpy as np
import psutil
import pytest

from deployments.errors import InvalidImage
from deployments.images import decode, encode
from deployments.picture_metadata import without_metadata
from tests.character_serving import sample
from tests.hostile.addresses import HOSTILE
from tests.hostile.conftest import LIMIT
from tests.hostile.files import MARK, OPENED, REFUSED
from tests.hostile.listener import Listener
from tests.isolation import routes_with_ids
from tests.lora_serving import over_a_socket
from tests.whole_application import Whole

Headers = dict[str, str]
MB = 2**20
TEN_GB = 10 * 2**30
JSON, FORM = "application/json", "multipart/form-data; boundary=b"
PARAMETER = re.compile(r"{[^{}]+}")
IDS = [
    # other folders, in every spelling, as one segment of a path
    "%2e%2e", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "..%2f..%2f..%2fetc%2fpasswd", "%252e%252e%252fetc%252fpasswd",
    "..%5c..%5cwindows",
    "%c0%ae%c0%ae%c0%afetc", "....%2f%2f....%2f%2fetc", "%2fetc%2fpasswd", "file:%2f%2f%2fetc%2fpasswd",
    "~%2f.ssh%2fid_rsa", "C:%5cboot.ini",
    "job_%2e%2e%2f0123456789abcdef012345", "lora_0123456789abcdef01234567%2f..%2f..", "character_0123456789abcdef0123456%2f",
    # what ends a text elsewhere
    "%00", "job_0123456789abcdef01234567%00", "lora_0123456789abcdef01234567%00.safetensors", "%0d%0aset-cookie:%20a=b", "%0a", "%09",
    "%20",
    # of other alphabets and of none
    "%ff%fe", "%ed%a0%80", "%f0%9f%92%a9", "%e2%80%ae", "job_%ef%bc%90123456789abcdef01234567", "lora_%d9%a0123456789abcdef01234567",
    "%f4%90%80%80",
    # for other readers
    "'%20OR%20'1'='1", "%22;DROP%20TABLE%20jobs;--", "%25s%25n", "$%7bjndi:ldap:%2f%2fx%7d", "%7b%7b7*7%7d%7d", "%3Cscript%3E",
    "*", "%25", "%",
    "null", "-1", "0", "JOB_0123456789ABCDEF01234567", "job_0123456789abcdef01234567%0a", "a" * 10_240, "%41" * 3_400,
]  # fmt: skip


@pytest.fixture(scope="module")
def key(house: Whole) -> Headers:
    return house.key("eve")


@pytest.fixture(autouse=True)
def nothing_stays(house: Whole, key: Headers) -> Iterator[None]:
    """After every test: no file more than before, nothing that anybody has, and a small request is served."""
    files, owned = house.files(), house.owned(key)
    yield
    assert house.files() == files
    assert house.owned(key) == owned
    picture = base64.b64encode(sample("ada-1").read_bytes()).decode()
    answer = house.http.post("/v1/faces/analyze", json={"image": picture}, headers=key)
    assert answer.is_success and len(answer.json()["faces"]) == 1


def _refused(answer: httpx.Response, *expected: tuple[int, str]) -> None:
    """It is a problem, told as one, of one of these statuses and codes."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text[:300]
    told = answer.json()
    assert (answer.status_code, told["code"]) in expected and told["status"] == answer.status_code, (answer.url, answer.text[:300])
    assert "Traceback" not in answer.text and "/site-packages/" not in answer.text and len(answer.text) < 20_000


# --- What stands in the address


def test_no_id_leads_anywhere(house: Whole, key: Headers) -> None:
    """In every place of every route. A route that does not need its body to know that there is no such thing need not read it."""
    for method, template in routes_with_ids(house.app):
        kind = template.split("/")[2]
        codes = {"characters": "character_not_found", "loras": "lora_not_found", "artifacts": "artifact_not_found"}
        for id in IDS:
            answer = house.http.request(method, id.join(PARAMETER.split(template)), headers=key, json=_body_of(method, template))
            # With a slash inside it is another address.
            elsewhere = [(404, "not_found"), (405, "method_not_allowed")] if "%2f" in id.lower() else []
            # Trainings and evaluations are jobs.
            _refused(answer, (404, codes.get(kind, "job_not_found")), *elsewhere)


def _body_of(method: str, template: str) -> dict[str, Any] | None:
    if method == "PATCH":
        return {"name": "Mine"}
    if template.endswith("/loras"):
        return {"lora_id": "lora_0123456789abcdef01234567"}
    return {"pictures": [base64.b64encode(sample("ada-1").read_bytes()).decode()]} if method == "POST" and "pictures" in template else None


def test_ids_in_bodies_and_queries_lead_nowhere(house: Whole, key: Headers) -> None:
    for id in (
        "../../etc/passwd",
        "\0",
        "job_" + "0" * 24 + "\n",
        "٠" * 24,
        "a" * 10_000,
        "' OR 1=1 --",
        "\\\\x\\share",
        "lora_" + "f" * 24,
    ):
        missing = (404, "lora_not_found"), (404, "character_not_found"), (404, "job_not_found"), (422, "invalid_request")
        for body in ({"character_id": id, "workflow": "flux-pulid"}, {"loras": [{"id": id}]}, {"workflow": id}, {"pose": id}):
            _refused(house.http.post("/v1/generate", json={"prompt": "x", **body}, headers=key), *missing)
            _refused(house.http.post("/v1/jobs", json={"input": {"prompt": "x", **body}}, headers=key), *missing)
        _refused(house.http.post("/v1/jobs", json={"workflow": id, "input": {"prompt": "x"}}, headers=key), *missing)
        _refused(house.http.get("/v1/jobs", params={"before": id}, headers=key), *missing)


def test_raw_addresses_and_headers_through_a_true_server(house: Whole, key: Headers) -> None:
    """What no client library would send, byte for byte."""
    said = f"host: localhost\r\nauthorization: {key['authorization']}\r\nconnection: close\r\n".encode()
    json_body = b'content-type: application/json\r\n%s\r\n\r\n{"image": "QUFB"}'
    with over_a_socket(cast(Any, house.entry)) as url:
        port = httpx.URL(url).port or 0
        for target in (b"/v1/loras/../../../etc/passwd", b"/v1/jobs/..", b"/v1/artifacts/%00", b"//etc/passwd", b"/v1/jobs/\x80\xff",
    b"/../openapi.json",
                       b"http://169.254.169.254/v1/jobs/x", b"/v1/jobs/x;a=b", b"/v1/characters/%ff/pictures/%2e%2e",
    b"/V1/JOBS/x"):  # fmt: skip
            assert _status(port, b"GET " + target + b" HTTP/1.1\r\n" + said + b"\r\n") in (400, 404), target
        begin = b"POST /v1/faces/analyze HTTP/1.1\r\n" + said
        for lengths in (b"content-length: 17\r\ncontent-length: 18", b"content-length: -1", b"content-length: 1e9", b"content-length: 0x11",
                        b"content-length: 17\r\ntransfer-encoding: identity"):  # fmt: skip
            assert _status(port, begin + json_body % lengths) in (400, 413, 422, 501), lengths
        for twice in (said, b"authorization: Bearer x\r\n"):
            request = b"GET /v1/jobs HTTP/1.1\r\nhost: localhost\r\n" + twice + f"authorization: {key['authorization']}\r\n\r\n".encode()
            assert _status(port, request) == 401, "two keys are none"
        assert _status(port, b"BREW /v1/jobs HTTP/1.1\r\n" + said + b"\r\n") in (400, 404, 405)
        assert _status(port, b"GET /v1/jobs HTTP/1.1\r\n" + said + b"\r\n") == 200


def _status(port: int, request: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has refused already
        answer = b""
        while b"\r\n" not in answer and (part := connection.recv(65_536)):
            answer += part
        return int(answer.split(b" ", 2)[1])


# --- Bodies that do not end


class Flood:
    """Ten gigabytes after an opening, a megabyte at a time; how much of it was asked for, and what the process grew by meanwhile."""

    def __init__(self, opening: bytes, part: bytes = b"A" * MB) -> None:
        self._opening, self._part = opening, part
        self.bytes, self.grown = 0, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        process = psutil.Process()
        before = process.memory_info().rss
        yield self._opening
        while self.bytes < TEN_GB:
            yield bytes(self._part)
            self.bytes += len(self._part)
            self.grown = max(self.grown, process.memory_info().rss - before)


def _file(name: str) -> bytes:
    return f'--b\r\ncontent-disposition: form-data; name="{name}"; filename="a.png"\r\ncontent-type: image/png\r\n\r\n'.encode()


TEXT_PARTS = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n' * (MB // 60)
FLOODS: list[tuple[str, str, bytes, bytes]] = [
    ("/v1/generate", JSON, b'{"prompt": "', b"A" * MB),
    ("/flux-pulid", JSON, b"", b" " * MB),
    ("/v1/faces/analyze", JSON, b'{"image": "', b"A" * MB),
    ("/v1/jobs", JSON, b'{"input": {"prompt": "x", "reference_image": "', b"A" * MB),
    ("/v1/training/jobs", JSON, b'{"trigger_word": "x", "images": ["', b"A" * MB),
    ("/v1/loras", JSON, b'{"name": "x", "file": "', b"A" * MB),
    ("/v1/loras", FORM, _file("file"), b"\0" * MB),
    ("/v1/loras", "application/octet-stream", b"", b"\0" * MB),
    ("/v1/characters", JSON, b'{"name": "x", "pictures": ["', b"A" * MB),
    ("/v1/characters", FORM, _file("pictures"), b"\0" * MB),
    ("/v1/characters/character_0123456789abcdef01234567/pictures", FORM, _file("pictures"), b"\0" * MB),
    ("/v1/characters/import", FORM, _file("file"), b"\0" * MB),
]


@pytest.mark.parametrize(("path", "media", "opening", "part"), FLOODS)
def test_ten_gigabytes_are_refused_while_they_come(house: Whole, key: Headers, path: str, media: str, opening: bytes, part: bytes) -> None:
    flood = Flood(opening, part)
    _refused(_flooded(house, key, path, media, flood), (413, "too_large"))
    assert flood.bytes <= 1.5 * LIMIT and flood.grown < 4 * LIMIT
    announced = Flood(opening, part)
    answer = _flooded(house, key, path, media, announced, {"content-length": str(TEN_GB)})
    _refused(answer, (413, "too_large"))
    assert announced.bytes == 0, "what says that it is too large is not read"


@pytest.mark.parametrize("path", ["/flux-pulid", "/v1/training/jobs", "/v1/evaluations"])
@pytest.mark.parametrize("opening", [_file("reference_image"), b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n'])
def test_a_form_that_lies_about_its_length_is_refused_while_it_comes(house: Whole, key: Headers, path: str, opening: bytes) -> None:
    flood = Flood(opening)
    _refused(_flooded(house, key, path, FORM, flood, {"content-length": "1000"}), (413, "too_large"))
    assert flood.bytes <= 1.5 * LIMIT and flood.grown < 4 * LIMIT
    unsaid = Flood(opening)
    _refused(_flooded(house, key, path, FORM, unsaid), (422, "invalid_request"))
    assert unsaid.bytes == 0, "a form of no length is not read"


@pytest.mark.parametrize("path", ["/v1/characters", "/v1/loras"])
def test_a_form_of_ever_more_parts_is_refused(house: Whole, key: Headers, path: str) -> None:
    flood = Flood(b"", TEXT_PARTS)
    _refused(_flooded(house, key, path, FORM, flood), (422, "invalid_request"), (413, "too_large"))
    assert flood.bytes <= 1.5 * LIMIT and flood.grown < 4 * LIMIT


def _flooded(house: Whole, key: Headers, path: str, media: str, flood: Flood, headers: Mapping[str, str] | None = None) -> httpx.Response:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(house.entry), base_url="http://localhost", timeout=120) as client:
            return await client.post(path, headers={**key, "content-type": media, **(headers or {})}, content=flood.__aiter__())

    return asyncio.run(run())


# --- Bodies that mean something else

DEEP = "[" * 100_000 + "]" * 100_000
ODD: dict[str, str | bytes] = {
    "deep": DEEP,
    "deep objects": '{"a":' * 100_000,
    "deep in a field": f'{{"prompt": "x", "name": "x", "identities": {DEEP}, "pictures": {DEEP}, "file": {DEEP}, "input": {DEEP}}}',
    "not a number": '{"prompt": "x", "guidance_scale": NaN, "input": {"prompt": "x", "guidance_scale": NaN}}',
    "infinite": '{"prompt": "x", "guidance_scale": 1e999, "input": {"prompt": "x", "guidance_scale": -Infinity}}',
    "a number of 5000 digits": f'{{"prompt": "x", "seed": {"9" * 5000}}}',
    "half a character": '{"prompt": "\\ud800", "name": "\\ud800", "input": {"prompt": "\\udfff"}}',
    "half a character for a name": '{"\\ud800": "\\udfff"}',
    "a name given twice": '{"prompt": "x", "prompt": "y", "name": "x", "name": "y"}',
    "many names": json.dumps({f"field{k}": 1 for k in range(50_000)}),
    "a name of a megabyte": json.dumps({"a" * MB: 1}),
    "a list": "[]",
    "nothing": "",
    "null": "null",
    "bytes that are no text": b"\xff\xfe{\x00",
    "packed": b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
    "XML": '<!DOCTYPE x [<!ENTITY e SYSTEM "file:' + '///etc/passwd">]><x>&e;</x>',
}
MEDIA_TYPES = [JSON, "", "text/plain", "application/xml", "application/x-www-form-urlencoded", "multipart/form-data", FORM,
    "multipart/mixed; boundary=b",
               "application/json; charset=utf-7", "a" * 5_000, "multipart/form-data; boundary=" + "b" * 5_000]  # fmt: skip
BODIES = ("/v1/generate", "/flux-pulid", "/v1/faces/compare", "/v1/jobs", "/v1/loras", "/v1/characters", "/v1/characters/import")
REFUSALS = (422, "invalid_request"), (422, "invalid_image"), (422, "invalid_lora")


@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_is_none_is_refused(house: Whole, key: Headers, path: str) -> None:
    for name, body in ODD.items():
        content = body.encode() if isinstance(body, str) else body
        for media in MEDIA_TYPES if name in ("deep", "XML", "packed", "null") else [JSON]:
            _refused(house.http.post(path, content=content, headers={**key, "content-type": media}), *REFUSALS)


def test_headers_given_twice_or_beyond_measure_are_refused_or_harmless(house: Whole, key: Headers) -> None:
    own = list(key.items())
    body = json.dumps({"input": {"prompt": "x", "num_inference_steps": 1, "seed": 1}})
    for headers, expected in (
        ([("idempotency-key", "a"), ("idempotency-key", "b")], (422, "invalid_request")),
        ([("idempotency-key", "a" * 10_000)], (422, "invalid_request")),
        ([("prefer", "wait=" + "9" * 5_000)], (422, "invalid_request")),
        ([("content-type", JSON), ("content-type", FORM), ("content-length", "abc")], (422, "invalid_request")),
        ([("content-length", "9" * 5_000)], (413, "too_large")),
        ([("authorization", "Bearer x")], (401, "unauthenticated")),
        ([("x-request-timeout-seconds", "0.001")], (422, "invalid_request")),
        ([("x-request-disconnect-disabled", "1")], (422, "invalid_request")),
    ):
        _refused(house.http.post("/v1/jobs", content=body, headers=[*own, *headers]), expected)
    for header in ("last-event-id", "if-none-match", "accept", "cookie", "x-forwarded-for", "x-request-id"):
        answer = house.http.get("/v1/jobs", headers=[*own, (header, "a" * 5_000), (header, "\x7f" * 100)])
        assert answer.is_success and "\x7f" not in str(answer.headers)


# --- Pictures that are something else


HEADERS_ARE_WELL = {"a colour profile of 256 MB", "PNG of empty pixels", "PNG of chunks behind the pixels"}
COSTLY = {"text of 256 MB", "international text of 256 MB", "a hundred texts of 1 MB", "JPEG of comments"}
"""Seconds each, in every place; test_hostile_files.py asserts what one costs where it is opened."""
LARGE = {
    "PNG of private chunks",
    "PNG of empty pixels",
    "PNG of chunks behind the pixels",
    "JPEG of fill bytes",
    "JPEG of application data",
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in REFUSED])
def test_a_hostile_file_is_refused_wherever_a_picture_goes(house: Whole, key: Headers, name: str) -> None:
    data = REFUSED[name]()
    picture, ada = base64.b64encode(data).decode(), base64.b64encode(sample("ada-1").read_bytes()).decode()
    person = {"prompt": "x", "workflow": "flux-pulid", "reference_image": picture}
    masked = {"prompt": "x", "identities": [{"method": "pulid", "images": [ada], "mask": picture}]}
    pose = {"prompt": "x", "controls": [{"type": "pose", "image": picture, "prepared": True}]}
    places: list[tuple[str, dict[str, Any]]] = [
        ("/v1/generate", person),
        ("/v1/generate", {"prompt": "x", "image": picture}),
        ("/v1/generate", {"prompt": "x", "pose_image": picture}),
        ("/v1/generate", pose),
        ("/v1/generate", masked),
        ("/v1/faces/analyze", {"image": picture}),
        ("/v1/faces/compare", {"first": ada, "second": picture}),
    ]
    for path, body in places[:1] if name in COSTLY else places:
        _refused(house.http.post(path, json=body, headers=key), (422, "invalid_image"))
    # Without what stands beside its pixels some of them are harmless pictures, of nobody.
    expected = (422, "no_face_detected") if _harmless(data) else (422, "invalid_image")
    files = [("pictures", ("a.png", data, "image/png"))]
    _refused(house.http.post("/v1/characters", data={"name": "x"}, files=files, headers=key), expected)
    for body in (person,) if name in COSTLY else (person, pose, masked):
        answer = house.http.post("/v1/jobs", json={"input": body}, headers=key)
        if answer.is_success:  # its header is that of a picture; whoever does the job finds the rest
            assert name.endswith("cut short") or name in HEADERS_ARE_WELL, answer.text
            house.http.delete(answer.json()["links"]["job"], headers=key).raise_for_status()
        else:
            _refused(answer, (422, "invalid_image"))


def _harmless(data: bytes) -> bool:
    try:
        decode(without_metadata(data))
    except InvalidImage:
        return False
    return True


@pytest.mark.parametrize("name", [name for name, build in OPENED.items() if MARK in build()])
def test_what_else_a_picture_is_does_not_come_back(house: Whole, key: Headers, name: str) -> None:
    """As a character's picture, behind a face: a file that is served again."""
    face = decode(sample("ada-1").read_bytes())
    data = encode(face, "jpeg")
    data = data[:2] + b"\xff\xfe" + (len(MARK) + 2).to_bytes(2, "big") + MARK + data[2:] + MARK if "JPEG" in name else encode(face) + MARK
    assert MARK in data and np.array_equal(decode(data).shape, face.shape)
    files = [("pictures", ("a.html", data, "text/html"))]
    made = house.http.post("/v1/characters", data={"name": MARK.decode()}, files=files, headers=key)
    assert made.status_code == 201, made.text
    character = made.json()
    answer = house.http.get(f"/v1/characters/{character['id']}/pictures/{character['best']}", headers=key)
    assert answer.headers["content-type"] in ("image/png", "image/jpeg") and answer.headers["x-content-type-options"] == "nosniff"
    assert MARK not in answer.content and "sandbox" in answer.headers["content-security-policy"]
    house.http.delete(f"/v1/characters/{character['id']}", headers=key).raise_for_status()


# --- Addresses that lead inside


def test_no_hostile_address_is_reached(house: Whole, key: Headers) -> None:
    """As a picture, and as where a webhook goes. Pictures by address are on: it is the guard that refuses."""

    async def run() -> Listener:
        async with Listener().open() as listener:
            await asyncio.to_thread(_all_refused, house, key, [url.format(port=listener.port) for url in HOSTILE])
            return listener

    assert asyncio.run(run()).connections == 0


def _all_refused(house: Whole, key: Headers, urls: list[str]) -> None:
    for url in urls:
        # What is no address of the web at all is read as base64, which it is not either.
        asked = (422, "url_not_allowed") if url.lower().startswith(("http:", "https:")) else (422, "invalid_image")
        for body in (
            {"prompt": "x", "workflow": "flux-pulid", "reference_image": url},
            {"prompt": "x", "identities": [{"method": "pulid", "images": [url]}]},
            {"prompt": "x", "pose_image": url},
        ):
            _refused(house.http.post("/v1/generate", json=body, headers=key), asked)
            # A job's pictures are opened when it is submitted, also those that are none.
            _refused(house.http.post("/v1/jobs", json={"input": body}, headers=key), asked)
        _refused(house.http.post("/v1/faces/analyze", json={"image": url}, headers=key), asked)
        _refused(house.http.post("/v1/characters", json={"name": "x", "pictures": [url]}, headers=key), (422, "invalid_image"))
        hook = {"input": {"prompt": "x"}, "webhook_url": url}
        _refused(house.http.post("/v1/jobs", json=hook, headers=key), (422, "url_not_allowed"), (422, "invalid_request"))
