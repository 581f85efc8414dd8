"""Pictures that a request gives by address: fetched into their fields, each once; what is wrong with one names its field."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from deployments.errors import InvalidImage, InvalidRequest, LikenessError, TooLarge, UrlNotAllowed
from deployments.urls import UrlGuard, UrlPolicy
from serve.picture_urls import MOST_PICTURES, fetched
from tests.hostile.listener import PICTURE, Listener


def test_pictures_by_address_become_pictures_wherever_they_stand() -> None:
    async def run() -> tuple[dict[str, Any], int]:
        async with Listener().open() as listener:
            a, b = (f"http://127.0.0.1:{listener.port}/{name}.png" for name in "ab")
            guard = UrlGuard(UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",)))
            body = {
                "prompt": a,
                "reference_images": [a, "data:image/png;base64,AAAA", f" {b} "],
                "identities": [{"images": [b], "mask": a}, {"images": ["AAAA"]}],
                "controls": [{"type": "pose", "image": a.replace("http", "HTTP", 1)}],
                "images": [[a]],
            }
            return await fetched(body, guard), listener.connections

    body, connections = asyncio.run(run())
    uri = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
    assert body["prompt"].startswith("http://"), "only picture fields are looked at"
    assert body["reference_images"] == [uri, "data:image/png;base64,AAAA", uri]
    assert body["identities"] == [{"images": [uri], "mask": uri}, {"images": ["AAAA"]}]
    assert body["controls"] == [{"type": "pose", "image": uri}]
    assert connections == 3, "each address once, however often it stands there"


def test_what_is_wrong_with_an_address_names_its_field_and_nothing_is_fetched() -> None:
    async def run(body: dict[str, Any], **changes: Any) -> tuple[LikenessError, int]:
        async with Listener({"/html": b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n"}).open() as listener:
            filled = {name: [item.replace("{}", f"http://127.0.0.1:{listener.port}") for item in items] for name, items in body.items()}
            policy = UrlPolicy(fetch=changes.pop("fetch", "allow"), allow=(f"127.0.0.1:{listener.port}",))
            with pytest.raises(LikenessError) as caught:
                await fetched({"identities": [filled]}, UrlGuard(policy, "pictures_by_url"), **changes)
            return caught.value, listener.connections

    error, connections = asyncio.run(run({"images": ["{}/a", "http://10.0.0.1/"]}))
    assert isinstance(error, UrlNotAllowed) and error.details["param"] == "identities[0].images[1]" and connections == 0
    error, connections = asyncio.run(run({"images": ["{}/a"]}, fetch="off"))
    assert isinstance(error, UrlNotAllowed) and "pictures_by_url" in error.remedy and connections == 0
    error, _ = asyncio.run(run({"images": ["{}/a", "{}/html"]}))
    assert isinstance(error, InvalidImage) and error.details["param"] == "identities[0].images[1]"
    error, connections = asyncio.run(run({"images": [f"{{}}/{k}" for k in range(MOST_PICTURES + 1)]}))
    assert isinstance(error, InvalidRequest) and connections == 0
    error, _ = asyncio.run(run({"images": ["{}/a", "{}/b"]}, max_bytes=len(PICTURE) * 2 - 1))
    assert isinstance(error, TooLarge) and error.status == 413


def test_a_body_without_addresses_passes_even_where_nothing_is_followed() -> None:
    body = {"prompt": "http://example.com", "reference_image": "AAAA"}
    assert asyncio.run(fetched(body, UrlGuard(UrlPolicy()))) == body
