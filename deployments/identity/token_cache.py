"""What an encoder made of a face or a picture, kept by content: equal input is encoded once while it is remembered.

In memory only, and not for long: what is deleted of a person elsewhere is forgotten here by itself.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

_ENTRIES = 512
"""PuLID's tokens of one face are 128 KiB in bf16."""
KEPT_S = 600.0
"""What was made longer ago is made anew: it may be of somebody who was deleted."""


def content_key(model: str, *arrays: NDArray[np.generic]) -> str:
    """sha256 over the encoder's name and all that it reads, with types and shapes."""
    digest = hashlib.sha256(model.encode())
    for array in arrays:
        digest.update(f"\0{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


class TokenCache:
    """The least recently used entries go, and the oldest. The tensors handed out are shared: nobody writes into them."""

    def __init__(self, entries: int = _ENTRIES) -> None:
        self._entries, self._lock = entries, Lock()
        self._kept: OrderedDict[str, tuple[Tensor, float]] = OrderedDict()

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """The entry, made now if it is not there. Two threads that miss at once both make it: equal, and only slower."""
        self.forget(KEPT_S)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
        made = make()
        with self._lock:
            self._kept[key] = made, time.monotonic()
            while len(self._kept) > self._entries:
                self._kept.popitem(last=False)
        return made

    def forget(self, older_than: float = 0.0) -> None:
        """Drops what was made more than so many seconds ago; everything, by default."""
        before = time.monotonic() - older_than
        with self._lock:
            for key in [key for key, (_, made) in self._kept.items() if made <= before]:
                del self._kept[key]
