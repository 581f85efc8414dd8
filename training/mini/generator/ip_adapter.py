"""Stage `ip-adapter`: an XLabs-layout IP-Adapter and its CLIP vision encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.mini.generator import vision
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.identity_training import train_adapter
from training.mini.optimise import Outcome, Recipe
from training.mini.xlabs_adapter import XLabsAdapter


class PictureAdapter(nn.Module):
    """The adapter with its encoder, as they are trained: together."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.adapter = XLabsAdapter()
        self.clip = encoder

    def attach(self, references: References, index: Tensor, drop: Tensor) -> dict[str, Any]:
        """Keys and values of the double blocks; where drop is true, of a zero embedding."""
        seen = vision.seen_pictures(self.clip, references, index)
        return {"image": self.adapter.key_values(self.adapter.tokens(seen * (~drop)[:, None].to(seen.dtype)))}


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `ip-adapter` (adapter.* and clip.*)."""
    module = PictureAdapter(vision.load(context).clip).to(context.device)
    return train_adapter("ip-adapter", module, module.attach, context, recipe)
