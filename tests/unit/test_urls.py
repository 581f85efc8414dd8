"""The one way out: about sixty hostile addresses, none of which makes a connection; names that change their mind; and what does work."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from pydantic import ValidationError

from deployments.errors import InvalidImage, LikenessError, UrlNotAllowed
from deployments.urls import UrlGuard, UrlPolicy, is_public
from tests.hostile.addresses import HOSTILE
from tests.hostile.listener import PICTURE, Listener, redirect, resolving


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_address_makes_no_connection(url: str) -> None:
    """The listener's port is one that may be reached, so that the address alone is what is refused; no name is even asked for."""

    async def run() -> tuple[int, LikenessError]:
        async with Listener().open() as listener:
            policy = UrlPolicy(fetch="public", ports=(80, 443, listener.port), timeout_s=5)

            async def asked(name: str, port: int) -> Sequence[str]:
                raise AssertionError(f"{name} was asked for")

            guard = UrlGuard(policy, "pictures_by_url", resolve=asked)
            with pytest.raises(UrlNotAllowed) as caught:
                await guard.fetch(url.replace("{port}", str(listener.port)))
            return listener.connections, caught.value

    connections, error = asyncio.run(run())
    assert connections == 0
    assert (error.code, error.status) == ("url_not_allowed", 422) and "pictures_by_url.allow" in error.remedy
    assert "127.0.0.1" not in error.message, "what a name means inside this network is nobody's business"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b::10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::168.63.129.16", False),
        ("2002:808:808::", False),
        ("2001:db8::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("4000::1", False),
    ],
)
def test_what_counts_as_public(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


@pytest.mark.parametrize(
    "addresses", [["10.0.0.1"], ["93.184.216.34", "127.0.0.1"], ["::ffff:127.0.0.1"], ["fe80::1%lo"], ["2606:4700::1", "fd00:ec2::254"]]
)
def test_a_name_with_one_bad_address_is_refused_whole(addresses: list[str]) -> None:
    guard = UrlGuard(UrlPolicy(fetch="public"), resolve=resolving(evil__example=addresses))
    with pytest.raises(UrlNotAllowed):
        asyncio.run(guard.fetch("http://evil.example/"))


def test_a_name_that_changes_its_mind_gains_nothing() -> None:
    """DNS rebinding: good when it is asked first, this machine when it is asked again. It is asked once a request, and judged."""

    async def run() -> tuple[int, int]:
        async with Listener({"/hop": redirect("http://turn.example:{}/secret")}).open() as listener:
            listener.answers["/hop"] = redirect(f"http://turn.example:{listener.port}/secret")
            policy = UrlPolicy(fetch="public", allow=(f"127.0.0.1:{listener.port}",), ports=(80, listener.port), timeout_s=5)
            # 127.0.0.1 stands for a public address here, 127.0.0.2 for the inside.
            turns = resolving(turn__example=[["127.0.0.1"], ["127.0.0.2"]])
            asked = 0

            async def counted(name: str, port: int) -> Sequence[str]:
                nonlocal asked
                asked += 1
                return await turns(name, port)

            with pytest.raises(UrlNotAllowed):
                await UrlGuard(policy, resolve=counted).fetch(f"http://turn.example:{listener.port}/hop")
            assert [head.split(b" ")[1] for head in listener.asked] == [b"/hop"]
            return listener.connections, asked

    assert asyncio.run(run()) == (1, 2)


@pytest.mark.parametrize(
    ("to", "error"),
    [
        ("http://127.0.0.2:{port}/", UrlNotAllowed),
        ("http://169.254.169.254/", UrlNotAllowed),
        ("http://[::1]:{port}/", UrlNotAllowed),
        ("file:/etc/passwd", UrlNotAllowed),
        ("//127.0.0.2:{port}/", UrlNotAllowed),
        ("gopher://127.0.0.1:{port}/", UrlNotAllowed),
        ("http://user@127.0.0.1:{port}/", UrlNotAllowed),
        ("/start", UrlNotAllowed),
    ],
    ids=["loopback", "metadata", "ipv6", "file", "schemeless", "gopher", "user", "circle"],
)
def test_a_redirect_is_an_address_like_any_other(to: str, error: type[LikenessError]) -> None:
    async def run() -> Listener:
        async with Listener().open() as listener:
            listener.answers["/start"] = redirect(to.replace("{port}", str(listener.port)))
            policy = UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",), max_redirects=2, timeout_s=5)
            with pytest.raises(error):
                await UrlGuard(policy).fetch(f"http://127.0.0.1:{listener.port}/start")
            return listener

    listener = asyncio.run(run())
    assert {head.split(b" ")[1] for head in listener.asked} == {b"/start"}
    assert listener.connections == (3 if to == "/start" else 1)


def test_an_allowed_picture_comes_also_by_name_and_over_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Host header has the name; no proxy of the environment, cookie or password of an address goes along."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    async def run() -> list[bytes]:
        cookie = b"HTTP/1.1 302 Found\r\nset-cookie: a=b\r\nlocation: /a.png\r\ncontent-length: 0\r\n\r\n"
        async with Listener({"/start": cookie}).open() as listener:
            policy = UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",))
            guard = UrlGuard(policy, resolve=resolving(files__example=["127.0.0.1"]))
            assert await guard.fetch(f"http://127.0.0.1:{listener.port}/a.png") == PICTURE
            assert await guard.fetch(f"http://files.example:{listener.port}/start") == PICTURE
            return listener.asked

    asked = asyncio.run(run())
    assert len(asked) == 3 and b"host: files.example:" in asked[1].lower() and asked[2].startswith(b"GET /a.png ")
    assert all(b"cookie" not in head.lower() and b"authorization" not in head.lower() for head in asked)


def test_a_listed_name_opens_public_addresses_and_a_listed_range_private_ones() -> None:
    async def found(allow: tuple[str, ...], address: str, host: str = "cdn.example.com") -> object:
        guard = UrlGuard(UrlPolicy(fetch="allow", allow=allow), resolve=resolving(cdn__example__com=[address]))
        guard.check(f"http://{host}/")
        return await guard.addresses(host, 80)

    public, private = "93.184.216.34", "10.1.2.3"
    for allow, address in [(("cdn.example.com",), public), (("*.example.com",), public), (("10.0.0.0/8",), private)]:
        assert asyncio.run(found(allow, address)) == [ipaddress.ip_address(address)]
    for allow, address in [
        (("cdn.example.com",), private),
        (("*.example.org",), public),
        (("10.0.0.0/8",), public),
        (("*.cdn.example.com",), public),
    ]:
        with pytest.raises(UrlNotAllowed):
            asyncio.run(found(allow, address))
    with pytest.raises(UrlNotAllowed):  # a range that happens to hold a metadata service does not open it; its very address does
        asyncio.run(found(("169.254.0.0/16",), "169.254.169.254"))
    assert asyncio.run(found(("169.254.169.254",), "169.254.169.254"))


@pytest.mark.parametrize(
    "entry", ["", "http://x/", "127.1", "0x7f.1", "[::1", "a b", "x:y", "*", "*.*.org", "10.0.0.1/8", "::1", "evil.com@x"]
)
def test_a_list_with_a_typing_error_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError):
        UrlPolicy(fetch="allow", allow=(entry,))


def test_a_name_that_is_not_listed_is_not_even_asked_for() -> None:
    guard = UrlGuard(UrlPolicy(fetch="allow", allow=("example.com", "files.example.org:8443", "*.example.net")))
    for good in ("http://example.com/", "https://EXAMPLE.com/a?b#c", "https://files.example.org:8443/", "http://a.b.example.net/"):
        assert guard.check(good).host
    for bad in (
        "example.org",
        "www.example.com",
        "example.com.evil.org",
        "example.net",
        "evilexample.net",
        "files.example.org",
        "example.com:8443",
    ):
        with pytest.raises(UrlNotAllowed):
            guard.check(f"https://{bad}/")


def test_where_it_is_off_the_setting_is_named() -> None:
    with pytest.raises(UrlNotAllowed) as caught:
        UrlGuard(UrlPolicy(), "pictures_by_url").check("https://example.com/a.png")
    assert "`pictures_by_url.fetch`" in caught.value.remedy and caught.value.details == {"setting": "pictures_by_url"}


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
    for _ in range(10_000):
        writer.write(bytes(65_536))
        await writer.drain()


async def _dripping(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (_endless, "more than 100000 bytes"),
        (_dripping, "within 1 s"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: 10000000000\r\n\r\n", "more than 100000 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n", "."),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 3\r\n\r\n<b>", "no picture"),
        (b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-encoding: gzip\r\ncontent-length: 1\r\n\r\nx", "packed"),
        (b"SSH-2.0-OpenSSH_9.7\r\n", "as a server does"),
        (b"", "as a server does"),
        (b"HTTP/1.1 200 OK\r\n" + b"x-many: 1\r\n" * 50_000, "as a server does"),
    ],
    ids=["endless", "dripping", "long", "absurd", "404", "html", "gzip", "ssh", "nothing", "headers"],
)
def test_what_is_no_picture_is_cut_off(answer: Any, says: str) -> None:
    async def run() -> float:
        async with Listener({"/": answer}).open() as listener:
            policy = UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",), max_bytes=100_000, timeout_s=1)
            with pytest.raises(InvalidImage, match=says):
                started = time.perf_counter()
                await UrlGuard(policy).fetch(f"http://127.0.0.1:{listener.port}/")
            return time.perf_counter() - started

    assert asyncio.run(run()) < 4


def test_the_transport_guards_whoever_posts_and_follows() -> None:
    """As webhooks use it: a plain client, even one that is told to follow redirects."""

    async def run() -> list[bytes]:
        async with Listener({"/hook": redirect("http://127.0.0.2/")}).open() as listener:
            guard = UrlGuard(UrlPolicy(fetch="public", allow=(f"127.0.0.1:{listener.port}",)), "webhooks")
            async with guard.client() as client:
                assert (await client.post(f"http://127.0.0.1:{listener.port}/", content=b"body")).status_code == 200
                assert (await client.post(f"http://127.0.0.1:{listener.port}/hook")).status_code == 302
            async with httpx.AsyncClient(transport=guard.transport(), follow_redirects=True) as client:
                with pytest.raises(UrlNotAllowed):
                    await client.post(f"http://127.0.0.1:{listener.port}/hook")
                with pytest.raises(UrlNotAllowed):
                    await client.get("http://10.0.0.1/")
            # No connection is used twice: what was judged was judged for one request.
            assert listener.connections == len(listener.asked)
            return [head.split(b" ")[0] for head in listener.asked]

    assert asyncio.run(run()) == [b"POST"] * 3


def test_a_connection_that_leads_elsewhere_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a rule of the kernel, or a library that knows better: 127.0.0.2 was judged, 127.0.0.1 answers."""
    connect = httpcore.AnyIOBackend.connect_tcp

    async def elsewhere(backend: httpcore.AnyIOBackend, host: str, *rest: Any) -> httpcore.AsyncNetworkStream:
        return await connect(backend, "127.0.0.1", *rest)

    async def run() -> list[bytes]:
        async with Listener().open() as listener:
            guard = UrlGuard(UrlPolicy(fetch="allow", allow=("127.0.0.0/8",), ports=(listener.port,), timeout_s=5))
            assert await guard.fetch(f"http://127.0.0.1:{listener.port}/") == PICTURE
            monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", elsewhere)
            with pytest.raises(InvalidImage):
                await guard.fetch(f"http://127.0.0.2:{listener.port}/")
            return listener.asked

    assert len(asyncio.run(run())) == 1


def test_certificates_are_of_the_name_not_of_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, secure = _certificate(tmp_path, "files.example")
    # Where the system's trust is read from, for the time of this test: the guard itself has no way to trust less.
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: ssl.create_default_context(cafile=str(authority)))

    async def run() -> None:
        async with Listener().open(secure) as listener:
            policy = UrlPolicy(fetch="allow", allow=(f"127.0.0.1:{listener.port}",), timeout_s=5)
            guard = UrlGuard(policy, resolve=resolving(files__example=["127.0.0.1"], other__example=["127.0.0.1"]))
            assert await guard.fetch(f"https://files.example:{listener.port}/") == PICTURE
            with pytest.raises(InvalidImage):
                await guard.fetch(f"https://other.example:{listener.port}/")
            listener.answers["/down"] = redirect(f"http://127.0.0.1:{listener.port}/")
            with pytest.raises(UrlNotAllowed, match="from https"):
                await guard.fetch(f"https://files.example:{listener.port}/down")

    asyncio.run(run())


def _certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    x509 = pytest.importorskip("cryptography.x509", reason="the package cryptography makes the certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number(), now, now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path, secret = folder / "certificate.pem", folder / "key.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    kind, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    secret.write_bytes(key.private_bytes(kind, form, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, secret)
    return path, context
