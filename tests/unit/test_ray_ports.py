"""The environment that Ray's ports are guarded by: made once, for one user, and never in the way of what the operator says."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.errors import StoreUnavailable
from deployments.store.settings import STORE_ROOT_VARIABLE
from serve.ray_ports import guard_ray_ports

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def test_a_token_of_this_users_own_and_the_loopback(tmp_path: Path) -> None:
    environment: dict[str, str] = {}
    guard_ray_ports(environment, tmp_path / "store")
    path = tmp_path / "store" / "ray_token"
    assert environment == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), LOOPBACK: "0"}
    assert len(path.read_text()) == 64 and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_token_stays_the_same_whoever_starts_at_once(tmp_path: Path) -> None:
    def token(_: int) -> str:
        environment: dict[str, str] = {}
        guard_ray_ports(environment, tmp_path)
        return Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(token, range(64)))) == 1
    (path,) = tmp_path.iterdir()
    path.chmod(0o644)
    assert token(0) == path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "said",
    [
        {"RAY_AUTH_MODE": "disabled", LOOPBACK: "0"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x", LOOPBACK: "1"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/somewhere", LOOPBACK: "0"},
        {"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "10.0.0.1:6379"},
    ],
)
def test_what_the_operator_says_stays(tmp_path: Path, said: dict[str, str]) -> None:
    environment = dict(said)
    guard_ray_ports(environment, tmp_path)
    assert environment == said and list(tmp_path.iterdir()) == []


def test_the_store_is_where_the_token_lies_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path / "kept"))
    environment: dict[str, str] = {}
    guard_ray_ports(environment)
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "kept" / "ray_token")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="token for Ray"):
        guard_ray_ports({}, tmp_path / "file")
