"""Union ControlNets in our loop against stock FluxControlNetPipeline beside it, from noise to latents, both on the same random weights.

The nets are made as the published ones are, smaller: one with mode tokens and single blocks (Union-Pro), one with neither, whose last block
goes to nobody (Union-Pro-2.0). Stock draws the condition's latents from their posterior; here that is so narrow that it has one point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxTransformer2DModel,
)
from torch import Tensor

from deployments.denoisers.flux1_controlnet import Control, UnionControl
from deployments.denoisers.flux1_loop import Call, Text, denoise
from deployments.denoisers.latents import Grid, pack, positions
from deployments.denoisers.schedule import sampler
from tests.named_weights import fill, named_tensor
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, relative_error

GRID = Grid(4, 6, 2)
PIXELS_A_TOKEN = 4
BASE: dict[str, Any] = cases.FLUX | {"num_layers": 5}
NETS: dict[str, dict[str, Any]] = {
    "pro": {"num_layers": 3, "num_single_layers": 2, "num_mode": 7},
    "pro-2": {"num_layers": 4, "num_single_layers": 0, "num_mode": None},
    "not distilled": {"num_layers": 2, "num_single_layers": 0, "num_mode": None, "guidance_embeds": False},
}
_UNNUMBERED: dict[str, int | None] = {"canny": None, "pose": None}
MODES: dict[str, dict[str, int | None]] = {"pro": {"canny": 0, "pose": 4}, "pro-2": _UNNUMBERED, "not distilled": _UNNUMBERED}


@dataclass(frozen=True)
class Wanted:
    """One control. picture: the name of what it is shown."""

    net: str
    mode: str = "pose"
    picture: str = "condition"
    scale: float = 0.8
    start: float = 0.0
    end: float = 1.0


CASES: dict[str, tuple[Wanted, ...]] = {
    "mode tokens": (Wanted("pro"),),
    "another mode": (Wanted("pro", "canny"),),
    "no mode tokens": (Wanted("pro-2"),),
    "deaf to the guidance": (Wanted("not distilled"),),
    "stronger": (Wanted("pro-2", scale=1.3),),
    "in a window": (Wanted("pro", start=0.2, end=0.8),),
    "two of one net": (Wanted("pro"), Wanted("pro", "canny", "another", 0.5)),
    "two of one net in two windows": (Wanted("pro", end=0.4), Wanted("pro", "canny", "another", 0.5, start=0.4)),
    "two nets": (Wanted("pro", end=0.8), Wanted("pro-2", "canny", "another", 0.6, start=0.2)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each net as it would be published."""
    shared = {name: value for name, value in BASE.items() if not name.startswith("num_") or name == "num_attention_heads"}
    found = {}
    for name, own in NETS.items():
        net = FluxControlNetModel(**(shared | own))
        fill(net)
        found[name] = tmp_path_factory.mktemp("controlnet")
        net.save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**BASE)
    fill(model)
    return model.eval()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        latent_channels=GRID.channels, norm_num_groups=4, scaling_factor=0.4, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    fill(model)
    with torch.no_grad():
        # The logarithm of the variance, as low as diffusers lets it be: a deviation of 3e-7.
        model.encoder.conv_out.weight[GRID.channels :] = 0
        model.encoder.conv_out.bias[GRID.channels :] = -30
    return model.eval()


def _picture(name: str) -> Tensor:
    return named_tensor(name, 1, 3, GRID.rows * PIXELS_A_TOKEN, GRID.columns * PIXELS_A_TOKEN).clamp(-1, 1)


def _stock(vae: Any, transformer: Any, folders: dict[str, Path], controls: Sequence[Wanted], true_cfg: float, multi: bool) -> Tensor:
    """The published way: one net alone, or lists of everything. multi: the lists also for one."""
    given = cases.denoise_input()
    names = list(dict.fromkeys(wanted.net for wanted in controls))
    nets = [FluxControlNetModel.from_pretrained(folders[name]) for name in names]
    lists: dict[str, list[Any]] = {
        "control_image": [_picture(wanted.picture) for wanted in controls],
        "control_mode": [MODES[wanted.net][wanted.mode] for wanted in controls],
        "controlnet_conditioning_scale": [wanted.scale for wanted in controls],
        "control_guidance_start": [wanted.start for wanted in controls],
        "control_guidance_end": [wanted.end for wanted in controls],
    }
    many = multi or len(controls) > 1
    pipe = FluxControlNetPipeline(
        FlowMatchEulerDiscreteScheduler(**cases.SCHEDULE), vae, None, None, None, None, transformer,
        FluxMultiControlNetModel(nets) if many else nets[0],
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    negative = {"negative_prompt_embeds": given["negative_states"], "negative_pooled_prompt_embeds": given["negative_pooled"]}
    latents: Tensor = pipe(
        prompt_embeds=given["states"], pooled_prompt_embeds=given["pooled"], **(negative if true_cfg != 1 else {}),
        true_cfg_scale=true_cfg, guidance_scale=cases.GUIDANCE, num_inference_steps=cases.STEPS, latents=_noise(),
        height=GRID.rows * PIXELS_A_TOKEN, width=GRID.columns * PIXELS_A_TOKEN, generator=torch.Generator().manual_seed(3),
        output_type="latent", **(lists if many else {name: values[0] for name, values in lists.items()}),
    ).images  # fmt: skip
    return latents


def _noise() -> Tensor:
    return named_tensor("noise of a controlled picture", 1, GRID.tokens, BASE["in_channels"])


def _ours(vae: Any, transformer: Any, folders: dict[str, Path], controls: Sequence[Wanted], true_cfg: float) -> Tensor:
    given = cases.denoise_input()
    nets = {name: UnionControl(transformer, folders[name], MODES[name]) for name in {wanted.net for wanted in controls}}

    def control(wanted: Wanted) -> Control:
        seen = (vae.encode(_picture(wanted.picture)).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
        return nets[wanted.net].prepare(pack(seen), wanted.mode, wanted.scale, wanted.start, wanted.end)

    with torch.inference_mode():
        call = Call(
            _noise(), positions(GRID), Text(given["states"], given["pooled"]), cases.GUIDANCE,
            negative=Text(given["negative_states"], given["negative_pooled"]) if true_cfg != 1 else None, true_cfg_scale=true_cfg,
            controls=[control(wanted) for wanted in controls],
        )  # fmt: skip
        scheduler = sampler(cases.SCHEDULE, cases.STEPS, GRID.tokens)
        return denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_the_loop_ends_where_stock_ends(vae: Any, transformer: Any, folders: dict[str, Path], case: str, true_cfg: float) -> None:
    controls = CASES[case]
    theirs = _stock(vae, transformer, folders, controls, true_cfg, multi=False)
    assert relative_error(_ours(vae, transformer, folders, controls, true_cfg), theirs) <= TOLERANCE
    # It would prove nothing if the controls hardly mattered.
    assert relative_error(_ours(vae, transformer, folders, (), true_cfg), theirs) > 0.03


@pytest.mark.parametrize("case", ["mode tokens", "no mode tokens"])
def test_one_control_in_lists_is_the_same(vae: Any, transformer: Any, folders: dict[str, Path], case: str) -> None:
    """As the model cards recommend."""
    theirs = _stock(vae, transformer, folders, CASES[case], 1.0, multi=True)
    assert relative_error(_ours(vae, transformer, folders, CASES[case], 1.0), theirs) <= TOLERANCE


def test_every_case_differs_from_every_other(vae: Any, transformer: Any, folders: dict[str, Path]) -> None:
    ends = [_ours(vae, transformer, folders, controls, 1.0) for controls in CASES.values()]
    assert min(relative_error(one, other) for i, one in enumerate(ends) for other in ends[:i]) > 0.003


def test_stock_forgets_the_single_blocks_of_a_second_net_and_ours_does_not(vae: Any, transformer: Any, folders: dict[str, Path]) -> None:
    """FluxMultiControlNetModel keeps the first net's None. With the nets in the other order it adds them up, as ours does in any."""
    controls = CASES["two nets"]
    ours = [_ours(vae, transformer, folders, order, 1.0) for order in (controls, controls[::-1])]
    assert relative_error(ours[0], ours[1]) <= TOLERANCE
    assert relative_error(_stock(vae, transformer, folders, controls[::-1], 1.0, multi=True), ours[0]) > 0.01
