"""Webhooks: what a receiver gets, checked as any receiver would check it, how often, and whom nothing is sent to."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from deployments.errors import JobNotFound, UrlNotAllowed
from deployments.store.job_values import JobInfo
from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY
from deployments.urls import UrlGuard, UrlPolicy
from deployments.webhooks import Guard, Sender, WebhookSettings, signed
from serve.job_answers import body_of
from tests.job_serving import desk_of, ended, new, opened, routes, running, until

SOON = WebhookSettings(timeout_s=1.0, retry_s=(0.1, 0.1, 0.1))


@dataclass
class Received:
    """A request as it came over the socket."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """An HTTP server that keeps what it is sent, and answers what it was told to: one status after the other, the last again and again."""

    answers: list[tuple[int, str]] = field(default_factory=lambda: [(200, "")])
    delay_s: float = 0.0
    received: list[Received] = field(default_factory=list)
    port: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        self.received.append(Received(head[0].split(" ")[1], headers, body))
        with suppress(TimeoutError):
            await asyncio.wait_for(self.over.wait(), self.delay_s)
        status, extra = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        writer.write(f"HTTP/1.1 {status} x\r\nset-cookie: a=b\r\n{extra}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        with suppress(ConnectionError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[Receiver]:
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    async with server:
        yield receiver
        receiver.over.set()
        await asyncio.sleep(0.05)  # for those that were still being answered


def open_to(*receivers: Receiver) -> Guard:
    return UrlGuard(UrlPolicy(fetch="allow", allow=tuple(f"127.0.0.1:{receiver.port}" for receiver in receivers)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


def finished(store: JobStore, url: str, owner: str = EVERYBODY) -> JobInfo:
    """A job that ended, with a webhook to be sent."""
    job, _ = store.submit(owner, new(webhook_url=url))
    return store.cancel(job.id, owner)[0]


def sender(store: JobStore, guard: Guard, settings: WebhookSettings = SOON) -> Sender:
    def body(job: str, owner: str) -> bytes | None:
        try:
            return body_of(store.get(job, owner))
        except JobNotFound:
            return None

    return Sender(store.outbox, body, guard, settings)


async def sent(sender: Sender, seconds: float) -> None:
    """As the job server does it, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await sender.turn()
        await asyncio.sleep(0.02)
    await sender.close()


def verified(received: Received, secret: str) -> bool:
    """By the words of the specification, without a line of ours."""
    key = base64.b64decode(secret[len("whsec_") :])
    content = f"{received.headers['webhook-id']}.{received.headers['webhook-timestamp']}.".encode() + received.body
    expected = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    fresh = abs(time.time() - int(received.headers["webhook-timestamp"])) < 30
    return fresh and f"v1,{expected}" in received.headers["webhook-signature"].split(" ")


def test_the_signature_is_the_one_of_the_specification() -> None:
    """The example of standard-webhooks' own libraries (their test vectors)."""
    at = datetime.fromtimestamp(1614265330, UTC)
    headers = signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", at, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_receiver_gets_the_body_of_the_jobs_address_once_and_can_verify_it(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver()) as receiver:
            desk = desk_of(store, guard=open_to(receiver))
            transport = httpx.ASGITransport(routes(desk))
            async with httpx.AsyncClient(base_url="http://likeness.local", transport=transport) as http:
                body = {"input": {"prompt": "a portrait"}, "webhook_url": receiver.url}
                posted = await http.post("/v1/jobs", json=body)
                assert posted.status_code == 202, posted.text
                job = posted.json()["id"]
                async with running(store):
                    await until(lambda: ended(store, job))
                await sent(sender(store, open_to(receiver)), 0.5)
                (got,) = receiver.received
                assert got.path == "/hook" and got.body == (await http.get(f"/v1/jobs/{job}")).content
                assert json.loads(got.body)["status"] == "succeeded" and json.loads(got.body)["result"]["data"][0]["url"]
                secret = (await http.get("/v1/webhooks/secret")).json()["secret"]
                assert verified(got, secret) and not verified(got, "whsec_" + base64.b64encode(bytes(24)).decode())
                assert (await http.get("/v1/webhooks/secret")).json()["secret"] == secret
                rotated = (await http.post("/v1/webhooks/secret/rotate")).json()["secret"]
                assert rotated != secret and not verified(got, rotated)
                other = await http.get("/v1/webhooks/secret", headers={"x-owner": "bruno"})
                assert other.json()["secret"] not in (secret, rotated)

    asyncio.run(main())


def test_what_a_receiver_does_not_take_comes_again_with_the_same_id_until_it_does(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver([(500, ""), (503, ""), (204, "")])) as receiver:
            finished(store, receiver.url)
            await sent(sender(store, open_to(receiver)), 1.5)
            assert len(receiver.received) == 3
            assert len({got.headers["webhook-id"] for got in receiver.received}) == 1
            assert len({got.body for got in receiver.received}) == 1
            assert not any("cookie" in got.headers for got in receiver.received)

    asyncio.run(main())


@pytest.mark.parametrize(("status", "times"), [(410, 1), (404, 4)])
def test_it_is_given_up_in_the_end_and_at_once_where_the_receiver_says_so(store: JobStore, status: int, times: int) -> None:
    async def main() -> None:
        async with receiving(Receiver([(status, "")])) as receiver:
            finished(store, receiver.url)
            await sent(sender(store, open_to(receiver)), 1.5)
            assert len(receiver.received) == times

    asyncio.run(main())


def test_a_redirect_is_not_followed(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver()) as elsewhere:
            async with receiving(Receiver([(307, f"location: {elsewhere.url}\r\n")])) as receiver:
                finished(store, receiver.url)
                await sent(sender(store, open_to(receiver, elsewhere)), 0.3)
                assert receiver.received and not elsewhere.received

    asyncio.run(main())


def test_a_slow_receiver_holds_up_nobody_else_and_is_left_after_the_time(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver(delay_s=30)) as slow, receiving(Receiver()) as quick:
            for _ in range(3):
                finished(store, slow.url)
            finished(store, quick.url)
            began = time.monotonic()
            posting = sender(store, open_to(slow, quick))
            sending = asyncio.create_task(sent(posting, 30.0))
            await until(lambda: quick.received, 5.0)
            assert time.monotonic() - began < 5.0  # while the slow ones are still being waited for, or tried again
            await until(lambda: len(slow.received) >= 6, 30.0)  # each was given up after a second, and tried again
            sending.cancel()

    asyncio.run(main())


def test_an_address_that_may_not_be_posted_to_is_refused_when_submitted_and_not_reached_later(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver()) as receiver:
            public = UrlGuard(UrlPolicy(fetch="public"))
            transport = httpx.ASGITransport(routes(desk_of(store, guard=public)))
            async with httpx.AsyncClient(base_url="http://likeness.local", transport=transport) as http:
                answer = await http.post("/v1/jobs", json={"input": {"prompt": "x"}, "webhook_url": receiver.url})
            assert (answer.status_code, answer.json()["code"]) == (422, "url_not_allowed")
            assert store.list(EVERYBODY) == ()
            finished(store, receiver.url)  # as if it had been allowed then
            await sent(sender(store, public), 0.3)
            assert not receiver.received

    asyncio.run(main())
    with pytest.raises(UrlNotAllowed):
        UrlGuard(UrlPolicy(fetch="public")).check("http://169.254.169.254/latest")


def test_a_job_that_is_deleted_is_told_of_no_more(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver([(500, "")])) as receiver:
            job = finished(store, receiver.url)
            posting = sender(store, open_to(receiver))
            await posting.turn()
            await until(lambda: receiver.received)
            await asyncio.to_thread(store.delete, job.id, job.owner)
            await sent(posting, 0.5)
            assert len(receiver.received) == 1

    asyncio.run(main())


def test_two_senders_and_one_that_died_deliver_each_once(store: JobStore) -> None:
    async def main() -> None:
        async with receiving(Receiver()) as receiver:
            for _ in range(30):
                finished(store, receiver.url)
            dead = store.outbox.due(limit=5, lease_s=0.5)  # claimed, never sent
            assert len(dead) == 5
            guard = open_to(receiver)
            await asyncio.gather(sent(sender(store, guard), 1.2), sent(sender(store, guard), 1.2))
            ids = [got.headers["webhook-id"] for got in receiver.received]
            assert len(ids) == len(set(ids)) == 30

    asyncio.run(main())
