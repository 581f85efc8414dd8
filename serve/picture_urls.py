"""Pictures that a request gives as addresses: fetched through the guard before anything else looks at the request, or refused.

What comes is not opened here; the byte limits of a request hold for what is fetched, too. Knows no model and no network of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deployments.errors import InvalidRequest, LikenessError, TooLarge
from deployments.urls import UrlGuard
from serve.attachments import PICTURE_FIELDS, data_uri, media_of

MOST_PICTURES = 20
"""In one request that draws, repeated addresses counted once."""
_AT_A_TIME = 4
_SCHEMES = ("http:", "https:")
# Deeper than any request (serve/ingress.py refuses what is deeper).
_MOST_LEVELS = 16


async def fetched(
    body: Mapping[str, Any], guard: UrlGuard, max_bytes: int = 64 * 2**20, most: int = MOST_PICTURES, as_bytes: bool = False
) -> dict[str, Any]:
    """The body with each http(s) address in a picture field, at any depth, replaced by the picture as a data URI; a body without one comes
    back as it is. max_bytes: of all of them together. most: how many. as_bytes: the pictures stay what they are, for a body that is not
    sent on: of a large set, text would take twice as much memory again.

    Raises UrlNotAllowed (also where the policy is `off`) and InvalidImage with the field, InvalidRequest for more than `most`, TooLarge.
    All addresses are checked before the first is reached, and the first error ends the others.
    """
    places: dict[str, str] = {}
    for where, text in _addresses(body, "", 0):
        places.setdefault(text.strip(), where)
    if not places:
        return dict(body)
    for url, where in places.items():
        with _named(where):
            guard.check(url)
    if len(places) > most:
        raise InvalidRequest(f"The request names {len(places)} pictures by address; {most} are fetched.", "Send the others themselves.")
    pictures: Mapping[str, bytes | str] = await _all(places, guard, max_bytes)
    if not as_bytes:
        pictures = {url: data_uri(content) for url, content in pictures.items()}
    replaced: dict[str, Any] = _replaced(body, pictures, 0)
    return replaced


def addressed(body: Mapping[str, Any]) -> bool:
    """Whether any of its pictures is given by address."""
    return any(True for _ in _addresses(body, "", 0))


async def _all(places: Mapping[str, str], guard: UrlGuard, max_bytes: int) -> dict[str, bytes]:
    """url -> picture."""
    turn, came = asyncio.Semaphore(_AT_A_TIME), 0

    async def one(url: str, where: str) -> bytes:
        nonlocal came
        async with turn:
            with _named(where):
                content = await guard.fetch(url)
                came += len(content)
                if came > max_bytes:
                    raise TooLarge(f"The pictures by address have more than {max_bytes} bytes together.")
                media_of(content)  # raises for what is no picture
                return content

    tasks = [asyncio.create_task(one(url, where)) for url, where in places.items()]
    try:
        return dict(zip(places, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Tells which field an error is about."""
    try:
        yield
    except LikenessError as error:
        raise type(error)(f"`{where}`: {error.message}", error.remedy, {**error.details, "param": where}) from error


def _addresses(value: Any, where: str, level: int) -> Iterator[tuple[str, str]]:
    """(path of the field, address) of every one."""
    if level > _MOST_LEVELS:
        return
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _of_field(str(name), item, f"{where}.{name}" if where else str(name), level)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _addresses(item, f"{where}[{index}]", level + 1)


def _of_field(name: str, value: Any, where: str, level: int) -> Iterator[tuple[str, str]]:
    if name not in PICTURE_FIELDS:
        yield from _addresses(value, where, level + 1)
        return
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        if _is_address(item):
            yield (f"{where}[{index}]" if isinstance(value, list) else where), item
        else:
            yield from _addresses(item, where, level + 1)


def _replaced(value: Any, pictures: Mapping[str, bytes | str], level: int, picture: bool = False) -> Any:
    """The same, with addresses in picture fields replaced. picture: the value stands in such a field."""
    if level > _MOST_LEVELS:
        return value
    if isinstance(value, Mapping):
        return {name: _replaced(item, pictures, level + 1, name in PICTURE_FIELDS) for name, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, pictures, level + 1, picture) for item in value]
    return pictures.get(value.strip(), value) if picture and _is_address(value) else value


def _is_address(value: object) -> bool:
    return isinstance(value, str) and value.lstrip()[:6].lower().startswith(_SCHEMES)
