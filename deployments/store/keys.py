"""API keys: made, listed, revoked, verified. Of a key only the sha256 of its secret is kept; the key itself is shown once.

    lk_0123456789ab_<43 characters>        the key; its first part, `lk_0123456789ab`, is its id and no secret

The secret is 256 random bits in base 62. That many cannot be guessed, however fast the hash is: the slow hashes that passwords need
would only make every request slow. Knows no HTTP, and not what a scope is for.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta

from sqlalchemy import or_, select, update

from deployments.errors import InvalidRequest, Unauthenticated
from deployments.store.engine import Database
from deployments.store.key_tables import KeyRow

NAME_CHARACTERS = 200
USED_EVERY = timedelta(minutes=1)
"""How often the time of a key's last use is written, at most."""
_SECRET_BYTES, _SECRET_CHARACTERS = 32, 43  # 62 ** 43 is the first power above 2 ** 256
_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
_KEY = re.compile(rf"(lk_[0-9a-f]{{12}})_([0-9A-Za-z]{{{_SECRET_CHARACTERS}}})")
_ID = re.compile(r"lk_[0-9a-f]{12}")
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SCOPE = re.compile(r"[a-z]{1,32}")
# What is compared where there is no such key, so that its absence takes as long as a wrong secret. No sha256 is known to be this.
_NOBODYS = "0" * 64
_LARGEST = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class KeyLimits:
    """What one key may do at once; None: what the server's settings say.

    requests_per_minute: all of them may come at once. concurrent_requests: being answered. queued_jobs: waiting or running.
    """

    requests_per_minute: int | None = None
    concurrent_requests: int | None = None
    queued_jobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class KeyInfo(KeyLimits):
    """A key, without its secret. owner: whose things it reaches; several keys may have one owner. Times are UTC; last_used_at is exact to
    USED_EVERY. expires_at: from when on it is not valid. revoked_at: since when it is not."""

    id: str
    owner: str
    name: str
    scopes: frozenset[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None


class KeyStore:
    """For any number of threads, processes and machines on one database, which was migrated."""

    def __init__(self, url: str) -> None:
        """Raises StoreUnavailable for a URL that leads nowhere."""
        self._database = Database(url)

    def create(
        self,
        name: str,
        owner: str | None = None,
        scopes: Iterable[str] = ("generate",),
        expires_at: datetime | None = None,
        limits: KeyLimits | None = None,
    ) -> tuple[KeyInfo, str]:
        """The new key's facts, and the key itself, which cannot be had again. owner: by default the key's own id, hence nobody else's.

        Raises InvalidRequest, which names the field: a name of no or too many characters, an owner with others than letters, digits and
        ._@-, no scope, a time that is past, a limit below 1.
        """
        id, secret = f"lk_{secrets.token_hex(6)}", _base62(secrets.token_bytes(_SECRET_BYTES))
        now, given = datetime.now(UTC), limits or KeyLimits()
        _check(name.strip(), owner, scopes := sorted(set(scopes)), given)
        if expires_at is not None and expires_at <= now:
            raise _wrong("expires_at", "is past")
        row = KeyRow(
            id=id, owner=id if owner is None else owner, name=name.strip(), secret_sha256=_hashed(secret), scopes=scopes, created_at=now,
            expires_at=expires_at, requests_per_minute=given.requests_per_minute, concurrent_requests=given.concurrent_requests,
            queued_jobs=given.queued_jobs,
        )  # fmt: skip
        with self._database.writing() as session:
            session.add(row)
            session.flush()
            return _info(row), f"{id}_{secret}"

    def list(self, owner: str | None = None) -> tuple[KeyInfo, ...]:
        """Every key, or those of one owner, the newest first; those that are not valid any more too."""
        wanted = select(KeyRow).order_by(KeyRow.created_at.desc(), KeyRow.id)
        with self._database.reading() as session:
            return tuple(_info(row) for row in session.scalars(wanted if owner is None else wanted.where(KeyRow.owner == owner)))

    def revoke(self, id: str) -> KeyInfo:
        """Ends a key for good; what its owner has stays. Done before: the time of then stays. Raises InvalidRequest for an id of none."""
        with self._database.writing() as session:
            row = session.get(KeyRow, id) if _ID.fullmatch(id) else None
            if row is None:
                raise InvalidRequest(f"There is no API key {ascii(id[:60])}.", "Use an id that `likeness keys list` prints: lk_....")
            row.revoked_at = row.revoked_at or datetime.now(UTC)
            session.flush()
            return _info(row)

    def verify(self, key: str) -> KeyInfo:
        """The facts of a valid key. Writes nothing (see `touch`).

        Raises Unauthenticated. Who does not have the secret learns nothing, also not whether there is such a key; who has it is told that
        the key was revoked, or when it expired.
        """
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise Unauthenticated("What came as an API key is none.")
        with self._database.reading() as session:
            row = session.get(KeyRow, parts[1])
            if not hmac.compare_digest(_hashed(parts[2]), row.secret_sha256 if row is not None else _NOBODYS) or row is None:
                raise Unauthenticated("The API key is not valid.")
            info = _info(row)
        if info.revoked_at is not None:
            raise Unauthenticated(f"The API key {info.id} was revoked.")
        if info.expires_at is not None and info.expires_at <= datetime.now(UTC):
            raise Unauthenticated(f"The API key {info.id} expired at {info.expires_at:%Y-%m-%d %H:%M} UTC.")
        return info

    def touch(self, id: str) -> bool:
        """Writes down that the key is in use. Whether it did: not within USED_EVERY of the last time, whoever wrote it."""
        now = datetime.now(UTC)
        unwritten = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at <= now - USED_EVERY)
        with self._database.writing() as session:
            changed = update(KeyRow).where(KeyRow.id == id, unwritten).values(last_used_at=now).returning(KeyRow.id)
            return session.scalar(changed) is not None

    def close(self) -> None:
        self._database.close()


def is_key(text: str) -> bool:
    """Whether the text has the form of a key; costs no look into a database."""
    return _KEY.fullmatch(text) is not None


def _check(name: str, owner: str | None, scopes: Iterable[str], limits: KeyLimits) -> None:
    if not 0 < len(name) <= NAME_CHARACTERS or not name.isprintable():
        raise _wrong("name", f"has no or more than {NAME_CHARACTERS} characters, or such that cannot be printed")
    if owner is not None and not _OWNER.fullmatch(owner):
        raise _wrong("owner", "is not 1 to 64 letters, digits and ._@-, the first a letter or digit")
    if not scopes or not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise _wrong("scopes", "holds none, or what is no scope")
    for field in fields(KeyLimits):
        value = getattr(limits, field.name)
        if value is not None and not 1 <= value <= _LARGEST:
            raise _wrong(field.name, f"is not between 1 and {_LARGEST}")


def _info(row: KeyRow) -> KeyInfo:
    own = {field.name: getattr(row, field.name) for field in fields(KeyInfo) if field.name != "scopes"}
    return KeyInfo(scopes=frozenset(map(str, row.scopes)), **own)


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _base62(content: bytes) -> str:
    number, digits = int.from_bytes(content, "big"), ""
    for _ in range(_SECRET_CHARACTERS):
        number, digit = divmod(number, len(_ALPHABET))
        digits += _ALPHABET[digit]
    return digits


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{field}` {what}.", None, {"param": field})
