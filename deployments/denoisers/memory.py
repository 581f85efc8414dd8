"""How a FLUX transformer and its VAE lie in memory: the modes by name, what each costs in pixels, and one function that arranges them.

A mode is how the weights of the blocks are stored (as they are, 8 bits, 4 bits) and where they are while they do not work. What lies
beside the blocks, half a percent of FLUX.1-dev, always stays on the device: so a transformer's `device` and `dtype` are in every mode
those it computes with, and adapters and LoRAs, which go by them and stay on the device too, may be attached before or after.
Knows no loop, no request and no file. Measured in docs/memory_modes.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from deployments.denoisers.packed import Storage, pack
from deployments.denoisers.placement import OneAhead, Placement, Resident, Whole
from deployments.hardware import MemoryMode

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxTransformer2DModel


@dataclass(frozen=True)
class _Mode:
    """blocks: how the blocks are placed; by_leaves: not as such, but the modules in them that have weights."""

    storage: Storage | None
    blocks: type[Resident | Whole | OneAhead]
    by_leaves: bool = False

    @property
    def vae(self) -> type[Resident | Whole]:
        return Resident if self.blocks is Resident else Whole


_MODES: Mapping[MemoryMode, _Mode] = {
    "full": _Mode(None, Resident),
    "offload": _Mode(None, Whole),
    "group": _Mode(None, OneAhead),
    "sequential": _Mode(None, OneAhead, by_leaves=True),
    "fp8": _Mode("fp8", Resident),
    "fp8-offload": _Mode("fp8", Whole),
    "fp8-sequential": _Mode("fp8", OneAhead, by_leaves=True),
    "nf4": _Mode("nf4", Resident),
    "nf4-offload": _Mode("nf4", Whole),
}
"""full: everything on the device. offload: the blocks only while they denoise. group: two blocks at a time, the next one coming while
one computes. sequential: the same with linear modules and norms in place of blocks. In these three the VAE comes only while it decodes.
fp8, nf4: weights of the blocks in 8 or 4 bits, see deployments/denoisers/packed.py."""

CHANGES_PIXELS: Mapping[MemoryMode, bool] = {mode: what.storage is not None for mode, what in _MODES.items()}
"""Whether a picture differs from that of `full`. Where weights lie changes no pixel; how they are stored does."""


class Arrangement:
    """A transformer, a VAE and nets beside the transformer (ControlNets), each where its mode has it. Made by `arrange`."""

    def __init__(self, transformer: Placement, vae: Placement, nets: Mapping[nn.Module, Placement]) -> None:
        self._transformer, self._vae, self._nets = transformer, vae, nets

    @contextmanager
    def denoising(self, nets: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Within it the transformer may be called, and those of the nets that are named (once or more)."""
        with ExitStack() as present:
            for placement in (self._transformer, *(self._nets[net] for net in dict.fromkeys(nets))):
                present.enter_context(placement.present())
            yield

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it the VAE may be called, to encode as well."""
        with self._vae.present():
            yield

    def release(self) -> None:
        """Takes the hooks off. Everything is left where it rests (on the device in `full`, on the CPU else); packed weights stay packed."""
        for placement in (self._transformer, self._vae, *self._nets.values()):
            placement.release()


def arrange(
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    mode: MemoryMode,
    device: torch.device | str,
    nets: Sequence[nn.Module] = (),
) -> Arrangement:
    """Puts everything where the mode has it. All may be on the CPU: nothing comes to the device that the mode does not keep there.

    nets: the transformer's ControlNets; they lie as the transformer does. Raises ValueError for an unknown mode, and for a transformer
    that was packed before.
    """
    if mode not in _MODES:
        raise ValueError(f"There is no memory mode {mode!r}; use one of {', '.join(_MODES)}.")
    chosen, device = _MODES[mode], torch.device(device)
    base = cast(nn.Module, transformer)
    placements = {net: chosen.blocks(_settled(net, chosen, device), device) for net in (base, *nets)}
    return Arrangement(placements.pop(base), chosen.vae([*cast(nn.Module, vae).children()], device), placements)


def _settled(net: nn.Module, mode: _Mode, device: torch.device) -> list[nn.Module]:
    """What is to be placed of a net: its blocks, packed if they are to be, or their leaves. Everything else of it goes to the device."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for child in lists for block in child]
    if mode.storage is not None:
        pack(blocks, mode.storage, device, rests_on=device if mode.blocks is Resident else torch.device("cpu"))
    for child in net.children():
        if child not in lists:
            child.to(device)
    return [leaf for block in blocks for leaf in _leaves(block)] if mode.by_leaves else blocks


def _leaves(block: nn.Module) -> Iterator[nn.Module]:
    """Raises ValueError for a module that has both weights of its own and modules below it: they could not come one by one."""
    for module in block.modules():
        if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            if any(True for _ in module.children()):
                raise ValueError(f"{type(module).__name__} has both weights of its own and modules below it; use the mode `group`.")
            yield module
