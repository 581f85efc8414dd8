"""Ray's own ports (its control store, its raylets, workers, replicas, dashboard): whoever reaches one unasked can run what they like.

Hence a token for all of them, and for a Ray of this machine alone the loopback address. The API's keys are another matter: they guard the
HTTP port, which Ray's token does not cover. Settings of the environment only: imports no Ray, and has to be called before anybody does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import MutableMapping
from pathlib import Path

from deployments.errors import StoreUnavailable
from deployments.store.settings import store_root

_MODE, _TOKEN, _TOKEN_PATH, _ADDRESS = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"
# Ray 2.60 takes the loopback address for its node exactly where it will not be a cluster of machines; this, despite its name, is what says
# so on every system (ray/_private/services.py: get_node_ip_address). `_node_ip_address` does not: Ray replaces a 127.0.0.1 in it.
_SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_TOKEN_BYTES = 32


def guard_ray_ports(environment: MutableMapping[str, str] = os.environ, folder: Path | None = None) -> None:
    """Sets what Ray reads when it is imported, and passes on to all of its processes. What the operator has set already stays.

    folder: where the token is made, once, for this user alone; by default the store's. A Ray that is joined (RAY_ADDRESS) has a token of
    its own, which the operator gives. Raises StoreUnavailable where the folder cannot be written.
    """
    joined = bool(environment.get(_ADDRESS))
    if not joined:
        environment.setdefault(_SEVERAL_MACHINES, "0")
    if environment.setdefault(_MODE, "token") == "token" and not joined and _TOKEN not in environment and _TOKEN_PATH not in environment:
        environment[_TOKEN_PATH] = str(_token_file(store_root() if folder is None else folder))


def _token_file(folder: Path) -> Path:
    path = folder / "ray_token"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Made whole under another name: of two that start at once, both have read one token afterwards.
        fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(_TOKEN_BYTES))
        try:
            os.link(fresh, path)
        except FileExistsError:
            os.chmod(path, 0o600)
        finally:
            fresh.unlink()
    except OSError as error:
        raise StoreUnavailable(f"The token for Ray's ports cannot be kept in {folder}: {error.strerror}.") from error
    return path
