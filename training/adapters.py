"""The LoRA itself: put into a frozen transformer in fp32, averaged in fp32, taken out again. Knows no data, loss or file.

peft gives new factors the base's own type: in bf16, at a learning rate of 1e-4, two of three entries do not move in a step, and an average
with a decay of 0.99 never moves at all. Hence both are fp32 whatever the base is.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from deployments.errors import InvalidRequest

_QWEN_DEAD = re.compile(r"attn\.(?:to_add_out|add_q_proj)|txt_mlp\..+")
"""What only makes the text stream's output, which Qwen-Image's last block throws away (diffusers, transformer_qwenimage.py): LoRAs there
never receive a gradient."""


def target_names(transformer: nn.Module, targets: str) -> list[str]:
    """The linear modules that `targets` matches whole, without those that cannot learn. Raises InvalidRequest where none is matched."""
    wanted = re.compile(targets)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    dead = _dead_modules(transformer)
    found = [name for name in linear if wanted.fullmatch(name) and name not in dead]
    if not found:
        message = f"targets = {targets!r} matches none of the {len(linear)} linear modules of the base model."
        raise InvalidRequest(message, f"Write a pattern of whole names, such as {linear[len(linear) // 2]}.")
    return found


def _dead_modules(transformer: nn.Module) -> set[str]:
    if type(transformer).__name__ != "QwenImageTransformer2DModel":
        return set()
    prefix = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."  # type: ignore[arg-type]
    names = (name for name, _ in transformer.named_modules() if name.startswith(prefix))
    return {name for name in names if _QWEN_DEAD.fullmatch(name.removeprefix(prefix))}


def parameter_count(transformer: nn.Module, targets: str, rank: int) -> int:
    """Numbers of the LoRA; the transformer may lie on the meta device."""
    modules = dict(transformer.named_modules())
    linear = (modules[name] for name in target_names(transformer, targets))
    return sum(rank * (module.in_features + module.out_features) for module in linear)


def add_lora(transformer: Any, targets: str, rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Freezes the transformer and gives it a LoRA that changes nothing yet. Returns what is to be trained, fp32, in the order of names.

    A as peft begins it (Kaiming, a = sqrt 5: uniform within 1 / sqrt of the inputs), B zero; from the seed and the names alone, hence the
    same on every device and in every process.
    """
    transformer.requires_grad_(False)
    names = target_names(transformer, targets)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=_plain(alpha), target_modules=names))
    cast_training_params(transformer, torch.float32)
    found = sorted((name, p) for name, p in transformer.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, p in found:
            if ".lora_A." in name:
                number = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
                drawn = torch.rand(p.shape, generator=torch.Generator().manual_seed(number))
                p.copy_((2 * drawn - 1) / math.sqrt(p.shape[1]))
    return [p for _, p in found]


def _plain(alpha: float) -> float:
    """32 and not 32.0, as files say it."""
    return int(alpha) if alpha == int(alpha) else alpha


def adapter_state(transformer: Any) -> dict[str, Tensor]:
    """The LoRA as it is now, in peft's names without prefix, on the CPU."""
    state = get_peft_model_state_dict(transformer)
    return {name: value.detach().cpu().clone() for name, value in sorted(state.items())}


class Average:
    """An exponential moving average of parameters. Warmed up as OneTrainer and diffusers do: min(decay, (1 + n) / (10 + n)) at update n,
    or the zeros that a LoRA begins with would count for the first hundreds of steps."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = list(parameters), decay
        self.values = [p.detach().clone() for p in parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._parameters], 1 - decay)

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor], updates: int) -> None:
        for mine, saved in zip(self.values, values, strict=True):
            mine.copy_(saved)
        self.updates = updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters have the averaged values."""
        kept = [p.detach().clone() for p in self._parameters]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self._parameters, values, strict=True):
            p.copy_(value)
