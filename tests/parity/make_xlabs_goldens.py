"""Writes goldens/xflux.npz, xflux_denoise.npz and xflux_comfyui.npz by running XLabs' published code: see goldens/README.md.

    PYTHONPATH=. python tests/parity/make_xlabs_goldens.py <checkout of XLabs-AI/x-flux> <checkout of XLabs-AI/x-flux-comfyui>

No test: it needs those checkouts and the package einops. Nothing of ours computes a stored number, except for drawing inputs and weights.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tests.named_weights import fill
from tests.parity import cases
from tests.parity.original_flux import provide, reference_call, reference_flux, reference_texts, write

# The name under which x-flux-comfyui's checkout, a package without one, is imported.
_NODES = "x_flux_comfyui"


def _adapter(layers: ModuleType, reader: str) -> Any:
    """The published checkpoint's tree, made of a checkout's own modules. reader: which class holds a double block's keys and values."""
    config = cases.XLABS
    adapter: Any = nn.Module()
    adapter.ip_adapter_proj_model = layers.ImageProjModel(config.token_dim, config.image_dim, config.tokens)
    adapter.double_blocks = nn.ModuleList(nn.Module() for _ in range(config.blocks))
    for block in adapter.double_blocks:
        block.processor = getattr(layers, reader)(config.token_dim, config.dim)
    fill(adapter)
    return adapter


def _xflux() -> tuple[Any, dict[str, Tensor]]:
    """x-flux's Flux with the adapter's processors, and the tokens that the adapter makes of each picture."""
    adapter = _adapter(importlib.import_module("src.flux.modules.layers"), "IPDoubleStreamBlockProcessor")
    flux = reference_flux(importlib.import_module("src.flux.model"))
    for block, half in zip(flux.double_blocks, adapter.double_blocks, strict=True):
        block.set_processor(half.processor)
    return flux, {which: adapter.ip_adapter_proj_model(embeds) for which, embeds in cases.image_embeds().items()}


def xflux_golden() -> dict[str, Tensor]:
    flux, tokens = _xflux()
    people = torch.cat([tokens["own"], tokens["negative"]])
    velocities = {f"velocity_{scale}": flux(**reference_call(), image_proj=people, ip_scale=scale) for scale in cases.IP_SCALES}
    base = reference_flux(importlib.import_module("src.flux.model"))(**reference_call())
    return {"tokens": people, "velocity_base": base, **velocities}


def denoise_golden() -> dict[str, Tensor]:
    """The latents that x-flux's loop ends with, for every case.

    x-flux's pipeline asks for the schedule of a 64th of the picture's tokens; here it is asked for as many as there are.
    """
    sampling = importlib.import_module("src.flux.sampling")
    flux, tokens = _xflux()
    noise = cases.denoise_input()["noise"]
    timesteps = sampling.get_schedule(cases.STEPS, noise.shape[1])
    return {
        case.name: sampling.denoise(
            flux, noise, **reference_texts(), timesteps=timesteps, guidance=cases.GUIDANCE, true_gs=case.true_gs,
            timestep_to_start_cfg=case.timestep_to_start_cfg, image_proj=tokens["own"], neg_image_proj=tokens["negative"],
            ip_scale=case.ip_scale, neg_ip_scale=case.neg_ip_scale,
        )
        for case in cases.STEERINGS
    }  # fmt: skip


def _nodes(checkout: Path, module: str) -> ModuleType:
    """A module of x-flux-comfyui without its package's __init__, which is the nodes: they need the whole of ComfyUI."""
    provide(_NODES, __path__=[str(checkout)])
    for parent in ("comfy", "comfy.ldm", "comfy.ldm.flux"):
        provide(parent)
    provide("comfy.ldm.flux.layers", DoubleStreamBlock=None)
    provide("comfy.utils", get_attr=None, set_attr=None)
    return importlib.import_module(f"{_NODES}.{module}")


def _strengths(checkout: Path, form: str, blocks: int) -> list[float]:
    function, begin, end = cases.RAMPS[form]
    return [float(strength) for strength in getattr(_nodes(checkout, "utils"), function)(begin, end, blocks)]


def comfyui_golden(checkout: Path) -> dict[str, Tensor]:
    """Each ramp, and what its strengths make of one forward, the processors put together as ApplyAdvancedFluxIPAdapter does."""
    ramps = {
        f"{form}_{blocks}": torch.tensor(_strengths(checkout, form, blocks), dtype=torch.float64)
        for form in cases.RAMPS
        for blocks in cases.RAMP_BLOCKS
    }
    return ramps | {f"velocity_{form}": _ramped(checkout, _strengths(checkout, form, cases.XLABS.blocks)) for form in cases.SMALL_RAMPS}


def _ramped(checkout: Path, strengths: list[float]) -> Tensor:
    layers = _nodes(checkout, "layers")
    flux = reference_flux(importlib.import_module(f"{_NODES}.xflux.src.flux.model"))
    adapter = _adapter(layers, "IPProcessor")
    for block, half, strength in zip(flux.double_blocks, adapter.double_blocks, strengths, strict=True):
        half.processor.ip_scale = strength
        half.processor.ip_hidden_states = adapter.ip_adapter_proj_model(cases.image_embeds()["own"])
        mixer = layers.DoubleStreamMixerProcessor()
        mixer.add_ipadapter(half.processor)
        block.set_processor(mixer)
    # One picture: the processor adds to all pictures of a batch what is the mean over them.
    velocity: Tensor = flux(**{name: given[:1] for name, given in reference_call().items()})
    return velocity


def main(xflux: Path, comfyui: Path) -> None:
    sys.path.insert(0, str(xflux))
    torch.set_num_threads(1)
    with torch.no_grad():
        write("xflux", xflux_golden())
        write("xflux_denoise", denoise_golden())
        write("xflux_comfyui", comfyui_golden(comfyui))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
