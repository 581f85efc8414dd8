"""Sets of pictures on their way in: how many are taken in at once, how much text their forms may have, what is said of a wrong one."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import InvalidRequest
from deployments.urls import UrlPolicy
from serve.limits import Sets
from serve.training_bodies import TrainingRequest
from serve.training_desk import _parsed
from tests.hostile.listener import OK, Listener
from tests.job_asking import PICTURE
from tests.unit.test_training_routes import ADA, EVALUATIONS, SET_BYTES, TRAININGS, House, standing

PATHS = (TRAININGS, EVALUATIONS)
TEXT_BYTES = 2**20
"""What JSON may have there, and the text of a form."""
MEDIA = {"content-type": "multipart/form-data; boundary=b"}


def part(name: str, content: bytes, file: bool = False) -> bytes:
    return b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (name.encode(), b'; filename="a"' * file, content)


FORM = part("trigger_word", b"ohwx") + part("images", ADA.read_bytes(), file=True) + b"--b--\r\n"


class Upload:
    """A form that comes in two halves, the second when it may. begun: how many bytes of it were read."""

    def __init__(self, content: bytes = FORM) -> None:
        self.content, self.begun, self.may_end = content, 0, asyncio.Event()

    async def _chunks(self) -> AsyncIterator[bytes]:
        half = len(self.content) // 2
        for chunk in (self.content[:half], self.content[half:]):
            self.begun += len(chunk)
            yield chunk
            await self.may_end.wait()

    async def post(self, house: House, owner: str, path: str = TRAININGS) -> httpx.Response:
        headers = {"x-owner": owner, "content-length": str(len(self.content)), **MEDIA}
        transport = httpx.ASGITransport(house.app)
        async with asyncio.timeout(60), httpx.AsyncClient(transport=transport, base_url="http://likeness.local") as http:
            return await http.post(path, content=self._chunks(), headers=headers)


async def begun(house: House, uploads: list[Upload], *owners: str) -> list[asyncio.Task[httpx.Response]]:
    tasks = [asyncio.create_task(upload.post(house, owner)) for upload, owner in zip(uploads, owners, strict=True)]
    async with asyncio.timeout(60):
        while not all(upload.begun for upload in uploads):
            await asyncio.sleep(0.01)
    return tasks


def test_of_many_sets_at_once_few_are_read_and_the_others_come_again(tmp_path: Path) -> None:
    async def run(house: House) -> None:
        uploads = [Upload() for _ in range(4)]
        tasks = await begun(house, uploads[:2], "ada", "ada")
        for path in PATHS:  # they are counted together
            more = Upload()
            refused = await more.post(house, "ada", path)
            assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded"), refused.text
            assert int(refused.headers["retry-after"]) > 0 and more.begun == 0
        tasks += await begun(house, uploads[2:], "bea", "carl")
        full = Upload()
        refused = await full.post(house, "dora")
        assert (refused.status_code, refused.json()["code"]) == (429, "queue_full"), refused.text
        assert int(refused.headers["retry-after"]) > 0 and full.begun == 0
        for upload in uploads:
            upload.may_end.set()
        assert [task.status_code for task in await asyncio.gather(*tasks)] == [202] * 4
        full.may_end.set()
        assert (await full.post(house, "dora")).status_code == 202, "those that were answered hold nothing"

    with standing(tmp_path) as house:
        asyncio.run(run(house))


def test_a_set_by_address_counts_until_it_has_been_fetched(tmp_path: Path) -> None:
    async def run() -> None:
        asked, may_answer = asyncio.Event(), asyncio.Event()

        async def slowly(writer: asyncio.StreamWriter) -> None:
            asked.set()
            await may_answer.wait()
            writer.write(OK)
            await writer.drain()

        async with Listener({"/slow.png": slowly}).open() as listener:
            with standing(tmp_path, UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",))) as house:
                body: dict[str, Any] = {"trigger_word": "ohwx", "image_urls": [f"http://127.0.0.1:{listener.port}/slow.png"]}
                tasks = []
                for _ in range(2):
                    asked.clear()
                    tasks.append(asyncio.create_task(asyncio.to_thread(house.post, TRAININGS, **body)))
                    await asyncio.wait_for(asked.wait(), 60)
                third = asyncio.create_task(asyncio.to_thread(house.post, TRAININGS, **body))
                await asyncio.wait([third], timeout=60)
                may_answer.set()
                refused, *answers = await asyncio.gather(third, *tasks)
                assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded"), refused.text
                assert [answer.status_code for answer in answers] == [202] * 2

    asyncio.run(run())


def test_what_is_refused_or_goes_away_leaves_its_place() -> None:
    sets = Sets(most=2, of_owner=1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), sets.one("ada"), sets.one("bea"):
            raise ZeroDivisionError


def test_whoever_only_waits_for_a_job_takes_no_place(tmp_path: Path) -> None:
    async def run(house: House) -> None:
        waiting = [
            asyncio.create_task(
                asyncio.to_thread(
                    house.post, TRAININGS, headers={"prefer": "wait=60"}, trigger_word="ohwx", images=[PICTURE], job_id=str(key)
                )
            )
            for key in range(2)
        ]
        async with asyncio.timeout(60):
            while len(house.jobs.list("ada")) < 2:
                await asyncio.sleep(0.01)
        assert (await asyncio.to_thread(house.post, TRAININGS, trigger_word="ohwx", images=[PICTURE])).status_code == 202
        assert not any(task.done() for task in waiting)
        for job in house.jobs.list("ada"):
            house.jobs.cancel(job.id, "ada")
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 2

    with standing(tmp_path) as house:
        asyncio.run(run(house))


def test_the_text_of_a_form_is_bounded_as_a_whole_and_its_files_are_not(tmp_path: Path) -> None:
    """Text stays in memory while the form comes."""
    texts = [part("images", b"A" * (TEXT_BYTES // 2 - 1000)) for _ in range(3)]
    padded = ADA.read_bytes() + bytes(TEXT_BYTES)

    async def run(house: House) -> None:
        for path in PATHS:
            many = Upload(part("trigger_word", b"ohwx") + b"".join(texts) + bytes(TEXT_BYTES) + b"\r\n--b--\r\n")
            assert len(many.content) < SET_BYTES
            many.may_end.set()
            refused = await many.post(house, "ada", path)
            assert (refused.status_code, refused.json()["code"]) == (413, "too_large"), refused.text
            assert "text" in refused.json()["detail"] and "as files" in refused.json()["remedy"]
        large = Upload(
            part("trigger_word", b"ohwx") + part("images", padded, file=True) * 2 + part("images", PICTURE.encode()) + b"--b--\r\n"
        )
        large.may_end.set()
        assert (await large.post(house, "ada")).status_code == 202, "files, and pictures as text, within their limits"

    with standing(tmp_path) as house:
        asyncio.run(run(house))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [("image_urls", b"\xff" * 2**22, "(4194304 bytes)"), ("trigger_word", "\x00" * 2**22, "(4194304 characters)")],
    ids=["bytes", "text"],
)
def test_a_file_in_the_wrong_place_is_not_spelt_out_to_say_so(field: str, value: object, says: str) -> None:
    body = {"trigger_word": "ohwx", "images": ["QUJD"]} | {field: value}
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest) as caught:
            _parsed(TrainingRequest, body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert says in caught.value.message and len(caught.value.message) < 300 and peak < 2**20
