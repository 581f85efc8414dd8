"""Modules that live on the CPU and come to the device only while they work: all at once, or one ahead of the computation.

Weights are never copied back, since nothing changes them: a module that leaves is pointed at its home again. Moving is done by torch's
own forward hooks. They stand outside of whatever replaces a `forward` (diffusers' hooks, hence PuLID's; a LoRA's), so neither has to
come before or go after the other. Knows no model, no mode by name, and no pixels.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# What CUDA aligns its own allocations to; vectorised kernels count on far less.
_ALIGNMENT_BYTES = 256
# Smaller ones would share pages, and a copy of theirs takes no time to speak of.
_WORTH_PINNING_BYTES = 2**20
_AWAY = "The weights of this module are away; call it within `present()` of its placement."
_log = logging.getLogger(__name__)


class Placement(Protocol):
    """Where some modules are: the parts of a model that are moved, made from them and the device."""

    def present(self) -> AbstractContextManager[None]:
        """Within it the parts may be called; outside they hold no memory on the device, unless they always stay there."""
        ...

    def release(self) -> None:
        """Leaves the parts where they rest, without a hook of this placement."""
        ...


class Resident:
    """The parts stay on the device."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        for part in parts:
            part.to(device)

    def present(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        """There is nothing to undo."""


class _Luggage:
    """The tensors of a module, which travel together: one block of bytes at home on the CPU, hence one copy.

    Pinned where the device is a GPU, in place: torch's own pinned allocations are rounded up to powers of two, which for the blocks of
    FLUX.1-dev would be half as much again.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._tensors = [*module.parameters(), *module.buffers()]
        self._offsets, self.nbytes = [], 0
        for tensor in self._tensors:
            self._offsets.append(self.nbytes)
            self.nbytes += -(-tensor.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self._home = torch.empty(self.nbytes, dtype=torch.uint8)
        if device.type == "cuda" and self.nbytes >= _WORTH_PINNING_BYTES:
            _pin(self._home)
        self._homes = self._views(self._home)
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            home.copy_(tensor.detach())
        self.leave()

    def arrive(self, room: Tensor) -> None:
        """room: [at least nbytes] uint8 on the device. The copy is queued on the current stream."""
        # Tensors born in inference mode could not stand in parameters that live longer than it.
        with torch.inference_mode(False), torch.no_grad():
            room[: self.nbytes].copy_(self._home, non_blocking=True)
            for tensor, place in zip(self._tensors, self._views(room), strict=True):
                tensor.data = place

    def leave(self) -> None:
        for tensor, home in zip(self._tensors, self._homes, strict=True):
            tensor.data = home

    def _views(self, room: Tensor) -> list[Tensor]:
        return [
            room[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, offset in zip(self._tensors, self._offsets, strict=True)
        ]


class Whole:
    """All parts come together, and go together."""

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._luggage = [_Luggage(part, device) for part in parts]

    @contextmanager
    def present(self) -> Iterator[None]:
        try:
            for luggage in self._luggage:
                luggage.arrive(_memory(luggage.nbytes, self._device))
            yield
        finally:
            for luggage in self._luggage:
                luggage.leave()

    def release(self) -> None:
        """There is nothing to undo."""


class OneAhead:
    """While a part computes, the next one comes: two rooms, each of the largest part's size, taken in turns.

    Which one is next is what came next the last time, and at first what stands next in the list. Parts run one after the other, none
    within another; they may be left out and run in any order, and one that was not expected is waited for.
    """

    def __init__(self, parts: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._luggage = [_Luggage(part, device) for part in parts]
        self._next = dict(zip(range(len(parts)), range(1, len(parts)), strict=False))
        self._last: int | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._rooms: list[_Room] = []
        self._handles: list[RemovableHandle] = []
        for index, part in enumerate(parts):
            self._handles += _around(part, partial(self._arrive, index), partial(self._leave, index))

    @contextmanager
    def present(self) -> Iterator[None]:
        try:
            largest = max(luggage.nbytes for luggage in self._luggage)
            self._rooms = [_Room(_memory(largest, self._device), self._side) for _ in range(2)]
            yield
        finally:
            for luggage in self._luggage:
                luggage.leave()
            for room in self._rooms:
                room.wait()  # so that the memory is not given to others before the last copy into it
            self._rooms, self._last = [], None

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _arrive(self, index: int) -> None:
        if not self._rooms:
            raise RuntimeError(_AWAY)
        first, second = self._rooms
        here, other = (second, first) if second.holds is self._luggage[index] else (first, second)
        here.fetch(self._luggage[index])
        here.wait()
        if self._last is not None:
            self._next[self._last] = index
        self._last = index
        following = self._next.get(index, index)
        if following != index:
            other.fetch(self._luggage[following])

    def _leave(self, index: int) -> None:
        for room in self._rooms:
            if room.holds is self._luggage[index]:
                room.clear()


class _Room:
    """Memory on the device for one part; it is filled on a stream of its own. holds: what is in it, or None."""

    def __init__(self, memory: Tensor, side: torch.cuda.Stream | None) -> None:
        self.holds: _Luggage | None = None
        self._memory, self._side = memory, side
        if side is not None:
            self._filled, self._free = torch.cuda.Event(), torch.cuda.Event()
        self.clear()

    def fetch(self, luggage: _Luggage) -> None:
        """Fills the room as soon as the last reader is through. Does nothing if it is filled with that already."""
        if self.holds is luggage:
            return
        if self.holds is not None:
            self.holds.leave()  # it was expected, and did not run
        self.holds = luggage
        if self._side is None:
            luggage.arrive(self._memory)
            return
        self._side.wait_event(self._free)
        with torch.cuda.stream(self._side):
            luggage.arrive(self._memory)
            self._filled.record()

    def wait(self) -> None:
        """What the current stream does from here on finds the room filled."""
        if self._side is not None:
            self._filled.wait()

    def clear(self) -> None:
        """What the current stream was given so far is all that reads the room."""
        if self.holds is not None:
            self.holds.leave()
        self.holds = None
        if self._side is not None:
            self._free.record()


def _around(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> list[RemovableHandle]:
    """Calls `before` and `after` around every call of the module, whatever its forward is replaced with meanwhile."""
    return [
        module.register_forward_pre_hook(lambda *_: before()),
        module.register_forward_hook(lambda *_: after()),
    ]


def _memory(nbytes: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _pin(memory: Tensor) -> None:
    """Makes memory of the CPU readable by the GPU while both go on working. Undone when the tensor dies, before its memory is freed."""
    runtime = torch.cuda.cudart()
    failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if failed:
        _log.warning("%d MiB cannot be pinned (CUDA error %d); bringing them will be slow.", memory.nbytes >> 20, failed)
        return
    finalizer = weakref.finalize(memory, _unpin, memory.data_ptr())
    finalizer.atexit = False  # the driver has gone by then


def _unpin(address: int) -> None:
    torch.cuda.synchronize()  # nothing may still be reading it
    torch.cuda.cudart().cudaHostUnregister(address)
