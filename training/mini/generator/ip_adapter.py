"""Stage `ip-adapter`: an XLabs-layout IP-Adapter and its CLIP vision encoder.

It only reaches into the double blocks, and what the data say about a face through them is faint: it learns from PuLID, trained before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.mini.generator import vision
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.identity_training import Verdict, train_adapter
from training.mini.generator.pulid import FaceAdapter
from training.mini.optimise import Outcome, Recipe
from training.mini.xlabs_adapter import XLabsAdapter

_COUNTS = Verdict(weight=1.0, alignment=1.0, begins=0.4, emphasis=8.0, pictures=96)


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
    """Saves `ip-adapter` (adapter.* and clip.*); PuLID of the same workspace is its teacher."""
    module = PictureAdapter(vision.load(context).clip).to(context.device)
    face = FaceAdapter().to(context.device).requires_grad_(False)
    face.load_state_dict(context.workspace.load("pulid", context.device))
    return train_adapter("ip-adapter", module, module.attach, context, recipe, counts=_COUNTS, teacher=face.attach)
