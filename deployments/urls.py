"""The one way out: which addresses this server may fetch from or post to, and a connection that goes nowhere else.

A name is resolved once, every address that it has is judged, and the connection is made to one of those very addresses: what is checked
is what is used, whatever a name server says the next time. Redirects are new addresses. Knows no picture and no route.

The classes of attack are those of vLLM's CVE-2026-24779 (two parsers, one address) and CVE-2026-25960 (a redirect after the check), and
of LightRAG's CVE-2026-85740 (IPv4 within IPv6).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Any, Final, Literal

import httpcore
import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deployments.errors import InvalidImage, UrlNotAllowed

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""(name, port) -> the addresses of the name, as text."""

# A name server that never answers holds a thread for half a minute: of these, not of those that the rest of the server works with.
_RESOLVERS = ThreadPoolExecutor(8, "resolve")
_SCHEME_PORTS: Final = {"http": 80, "https": 443}
_MOST_CHARACTERS = 2048
_UNSEEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ufeff]")
# Labels of letters, digits and hyphens (RFC 1123), and the underscore that some storage hosts have.
_NAME = re.compile(r"(?=.{1,253}\Z)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# What the URL standard of browsers, and inet_aton, read as a number: 2130706433, 0x7f000001, 0177.0.0.1, 127.1.
_NUMBER = re.compile(r"(0x[0-9a-f]*|[0-9]+)\Z")
_ENTRY = re.compile(r"(?P<host>\[[0-9a-f:.]+\]|\*\.[a-z0-9_.-]+|[a-z0-9_.-]+)(:(?P<port>[0-9]{1,5}))?")
# Names that only a local network knows (RFC 6761, 6762, 8375; ICANN keeps .internal for it).
_LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa", "test", "invalid", "onion")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

# IANA's registries of special-purpose addresses, and what is not unicast. By hand: Python's `is_global` differs between its versions.
_CLOSED_4 = [
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
        "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24",
        "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    )
]  # fmt: skip
_UNICAST_6 = ipaddress.IPv6Network("2000::/3")
# Within it: protocol assignments with Teredo and ORCHID, documentation, 6to4, AS112.
_CLOSED_6 = [ipaddress.IPv6Network(text) for text in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")]
# RFC 6052: where a network translates to IPv4 (NAT64), every public name has such an address.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# RFC 5214: the second half of an ISATAP address, before its IPv4 address.
_ISATAP = (0x00005EFE, 0x02005EFE)
# Where clouds tell their machines' secrets: AWS and most others, its containers, Alibaba, Oracle, Azure (a public address), AWS and Google
# by IPv6. They are reached only where the operator writes exactly them.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "192.0.0.192", "168.63.129.16",
        "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
    )
)  # fmt: skip


def _is_entry(text: str) -> str:
    """One item of an allow-list, in lower case. Raises ValueError for what is none: a typing error must not open or close a door unseen."""
    text = text.strip().lower()
    _Entry.of(text)
    return text


class UrlPolicy(BaseModel):
    """What may be reached. fetch: `off`, nothing; `public`, every public address; `allow`, only what `allow` lists.

    allow: `host`, `host:port`, `*.suffix`, an address (`[::1]:8000`) or a CIDR range. A name opens its public addresses; a private address
    is reached only where an address or a range is listed that holds it. ports: those of hosts that are listed without one.
    max_bytes: of one answer. timeout_s: from the question to the last byte, redirects included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fetch: Literal["off", "public", "allow"] = "off"
    allow: tuple[Annotated[str, AfterValidator(_is_entry)], ...] = ()
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = (80, 443)
    max_bytes: int = Field(default=32 * 2**20, ge=1)
    timeout_s: float = Field(default=20.0, gt=0)
    max_redirects: int = Field(default=3, ge=0, le=10)

    @cached_property
    def entries(self) -> tuple[_Entry, ...]:
        return tuple(_Entry.of(text) for text in self.allow)


@dataclass(frozen=True)
class _Entry:
    """One item of an allow-list: a name (`.suffix` for any name below it) or a range of addresses, and the port it is for."""

    name: str | None
    network: Network | None
    port: int | None

    @classmethod
    def of(cls, text: str) -> _Entry:
        if "/" in text:
            return cls(None, ipaddress.ip_network(text), None)
        found = _ENTRY.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no `host`, `host:port`, `*.suffix`, address or CIDR range")
        host, port = found["host"].strip("[]"), int(found["port"]) if found["port"] else None
        try:
            return cls(None, ipaddress.ip_network(host), port)
        except ValueError:
            if _NUMBER.search(host.rpartition(".")[2]) or not _NAME.fullmatch(host.removeprefix("*.")):
                raise ValueError(f"{text!r} names no host") from None
        return cls(host.removeprefix("*"), None, port)

    def has_name(self, name: str) -> bool:
        return self.name is not None and (name.endswith(self.name) if self.name.startswith(".") else name == self.name)

    def has_address(self, address: Address) -> bool:
        if self.network is None or address not in self.network:
            return False
        return address not in _METADATA or self.network.num_addresses == 1

    def has_port(self, port: int, usual: Iterable[int]) -> bool:
        return port == self.port if self.port is not None else port in usual


def is_public(address: Address) -> bool:
    """Whether an address is somebody's on the internet: no special range, no metadata service, no tunnel. IPv4 within IPv6 is unwrapped
    where today's networks write it so (mapped, NAT64); the tunnels of the past (6to4, Teredo, ISATAP, compatible) are refused."""
    address = unwrapped(address)
    if address in _METADATA or not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _CLOSED_4)
    if address not in _UNICAST_6 or any(address in network for network in _CLOSED_6):
        return False
    return (int(address) >> 32) & 0xFFFFFFFF not in _ISATAP


def unwrapped(address: Address) -> Address:
    """The IPv4 address that a machine really speaks to through ::ffff:a.b.c.d or 64:ff9b::a.b.c.d; any other as it is, without its zone."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    number = int(address)
    return ipaddress.IPv4Address(number & 0xFFFFFFFF) if address in _NAT64 else ipaddress.IPv6Address(number)


class UrlGuard:
    """Judges addresses by a policy, and connects only to what it found good.

    setting, instead: what the operator calls the policy, and what the caller can do, for the remedy. resolve: (name, port) -> addresses;
    the system's by default.
    """

    def __init__(
        self, policy: UrlPolicy, setting: str = "urls", instead: str = "Send the content itself", resolve: Resolver | None = None
    ) -> None:
        self.policy, self._setting, self._instead = policy, setting, instead
        self._resolve = resolve if resolve is not None else _resolved

    def check(self, url: str) -> httpx.URL:
        """The address as everything after it uses it; nothing is resolved or reached. Raises UrlNotAllowed with the reason."""
        if self.policy.fetch == "off":
            raise self._refused("This server follows no addresses.")
        if len(url) > _MOST_CHARACTERS or _UNSEEN.search(url):
            raise self._refused("The address is too long, or has blanks, control characters or backslashes.")
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise self._refused("The address cannot be read.") from error
        if parsed.scheme not in _SCHEME_PORTS:
            raise self._refused("The address is not http or https.")
        # Also behind a `?` or `#` at once after the host, where programs differ in what they take for the host.
        if parsed.userinfo or "@" in url.partition("//")[2].partition("/")[0]:
            raise self._refused("The address holds a user name.")
        self._check_host(parsed.raw_host.decode("ascii"), self._port(parsed))
        return parsed

    @cached_property
    def certificates(self) -> ssl.SSLContext:
        """Whom TLS trusts: the usual authorities, whatever the environment says. Read once, which takes tens of milliseconds."""
        return httpx.create_ssl_context(trust_env=False)

    def transport(self) -> httpx.AsyncBaseTransport:
        """For an httpx.AsyncClient (or `client()`): each request, also one that follows a redirect, is checked and connected as here."""
        return _GuardedTransport(self)

    def client(self) -> httpx.AsyncClient:
        """Follows no redirect, reads no proxy, certificate folder or password from the environment."""
        return httpx.AsyncClient(transport=self.transport(), follow_redirects=False, trust_env=False, timeout=self.policy.timeout_s)

    async def fetch(self, url: str) -> bytes:
        """The picture at the address. Raises UrlNotAllowed, also for where it redirects to; InvalidImage where no picture comes: another
        status or kind, more than max_bytes (known early where it is announced), later than timeout_s."""
        first = self.check(url)
        try:
            async with asyncio.timeout(self.policy.timeout_s), self.transport() as transport:
                return await self._followed(transport, first)
        except TimeoutError as error:
            raise InvalidImage(f"The picture did not come within {self.policy.timeout_s:g} s.", "Send the picture itself.") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise InvalidImage("The picture's address does not answer as a server does.", "Send the picture itself.") from error

    async def addresses(self, host: str, port: int) -> list[Address]:
        """Every address that the host has now, all found good. Raises UrlNotAllowed if one is not: a name that mixes them means harm."""
        literal = _literal(host)
        try:
            texts = [str(literal)] if literal is not None else await self._resolve(host, port)
            found = [ipaddress.ip_address(text.partition("%")[0]) for text in texts]
        except (OSError, ValueError) as error:
            raise httpcore.ConnectError("the name has no address") from error
        if not found:
            raise httpcore.ConnectError("the name has no address")
        if not all(self._allowed(host, address, port) for address in found):
            # Which address it was would tell a stranger what names mean inside this network.
            raise self._refused("The address leads to where this server does not go.")
        return found

    def _check_host(self, host: str, port: int) -> None:
        literal = _literal(host)
        if literal is not None:
            if not self._allowed(host, literal, port):
                raise self._refused("The address leads to where this server does not go.")
            return
        if not _NAME.fullmatch(host):
            raise self._refused("The address names no host, or names it in an unusual way.")
        if _NUMBER.fullmatch(host.rpartition(".")[2]):
            raise self._refused("The address is a number in disguise.")
        usual = self.policy.ports
        # A range may turn out to hold what the name leads to: then the connection decides.
        own = [entry for entry in self.policy.entries if entry.network is not None or entry.has_name(host)]
        if any(entry.has_port(port, usual) for entry in own):
            return
        local = "." not in host or any(host.endswith(f".{name}") for name in _LOCAL_NAMES)
        if self.policy.fetch != "public" or port not in usual or local:
            raise self._refused("The host, or its port, is not one that this server goes to.")

    def _allowed(self, host: str, address: Address, port: int) -> bool:
        """By the range that holds it, by its name together with being public, or by being public where the policy is so."""
        usual, real = self.policy.ports, unwrapped(address)
        if any(entry.has_address(real) and entry.has_port(port, usual) for entry in self.policy.entries):
            return True
        if not is_public(address):
            return False
        if any(entry.has_name(host) and entry.has_port(port, usual) for entry in self.policy.entries):
            return True
        return self.policy.fetch == "public" and port in usual

    def _port(self, url: httpx.URL) -> int:
        port = url.port if url.port is not None else _SCHEME_PORTS[url.scheme]
        if not 0 < port < 2**16:
            raise self._refused(f"There is no port {port}.")
        return port

    async def _followed(self, transport: httpx.AsyncBaseTransport, current: httpx.URL) -> bytes:
        """Requests are made one by one, without a client: no cookie and no header of one answer reaches the next host."""
        limits = httpx.Timeout(self.policy.timeout_s).as_dict()
        for _ in range(self.policy.max_redirects + 1):
            request = httpx.Request("GET", current, headers=_HEADERS, extensions={"timeout": limits})
            response = await transport.handle_async_request(request)
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._read(response)
                following = current.join(response.headers.get("location", ""))
            finally:
                await response.aclose()
            if current.scheme == "https" and following.scheme != "https":
                raise self._refused("The address redirects from https to something else.")
            current = following  # which the transport checks, as every address
        raise self._refused(f"The address redirects more than {self.policy.max_redirects} times.")

    async def _read(self, response: httpx.Response) -> bytes:
        """The body, no further than allowed and as it was sent: an answer that is packed could unpack to anything."""
        limit, headers = self.policy.max_bytes, response.headers
        if response.status_code != 200:
            raise InvalidImage(f"The picture's address answers with status {response.status_code}.", "Send the picture itself.")
        if not headers.get("content-type", "").strip().lower().startswith("image/"):
            raise InvalidImage("What is at the picture's address calls itself no picture.", "Send the picture itself.")
        if headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise InvalidImage("The picture's address answers packed, which was not asked for.", "Send the picture itself.")
        length, content = headers.get("content-length", "0"), bytearray()
        too_long = InvalidImage(f"The picture at the address has more than {limit} bytes.", "Send a smaller one.")
        # No number of bytes that is allowed has more digits than these.
        if not (length.isascii() and length.isdecimal()) or len(length) > 18 or int(length) > limit:
            raise too_long
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > limit:
                raise too_long
        return bytes(content)

    def _refused(self, message: str) -> UrlNotAllowed:
        way = f"`{self._setting}.fetch` (off, public, allow) and `{self._setting}.allow` of the server's settings say what is followed"
        return UrlNotAllowed(message, f"{self._instead}; {way}.", {"setting": self._setting})


_HEADERS = {
    "accept": "image/png, image/jpeg, image/webp",
    "accept-encoding": "identity",
    "user-agent": "likeness",
    "connection": "close",
}


class _GuardedTransport(httpx.AsyncHTTPTransport):
    """httpx's own, but for the network beneath it, which httpx gives no way to choose: the pool is made anew, as its constructor does."""

    def __init__(self, guard: UrlGuard) -> None:
        super().__init__(verify=guard.certificates, trust_env=False)
        self._guard = guard
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=guard.certificates,
            # A connection that is kept is a judgement that is kept: each request is judged anew.
            max_keepalive_connections=0,
            max_connections=100,
            network_backend=_GuardedNetwork(guard),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._guard.check(str(request.url))
        return await super().handle_async_request(request)


class _GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connections by address. TLS and the Host header, which lie above, still have the name, so that certificates are the name's."""

    def __init__(self, guard: UrlGuard) -> None:
        self._guard, self._inner = guard, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                found = await self._guard.addresses(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from error
        for place, address in enumerate(found):
            try:
                stream = await self._inner.connect_tcp(str(address), port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if place == len(found) - 1:
                    raise
                continue
            peer = ipaddress.ip_address(stream.get_extra_info("server_addr")[0].partition("%")[0])
            if unwrapped(peer) != unwrapped(address):
                await stream.aclose()
                raise httpcore.ConnectError("the connection leads elsewhere")
            return stream
        raise httpcore.ConnectError("the name has no address")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("a socket of this machine is no address")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _literal(host: str) -> Address | None:
    """The address, if the host is one in its usual spelling: four plain numbers, or IPv6 without a zone."""
    try:
        return ipaddress.ip_address(host) if "%" not in host else None
    except ValueError:
        return None


async def _resolved(name: str, port: int) -> Sequence[str]:
    ask = partial(socket.getaddrinfo, name, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_RESOLVERS, ask)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))
