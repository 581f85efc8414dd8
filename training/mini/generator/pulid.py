"""Stage `pulid`: PuLID's encoder and cross attentions with its vision tower, stored in fp8."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deployments.identity.eva_clip import EvaVisionTransformer
from deployments.identity.pulid import PerceiverAttentionCA, PuLID, identity_condition
from training.mini.generator import vision
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.identity_training import Verdict, train_adapter
from training.mini.generator.sizes import EVA, PULID
from training.mini.optimise import Outcome, Recipe

_ROUNDED_FROM = 0.7
_COUNTS = Verdict(weight=1.0, alignment=1.0, begins=0.4, guidance=2.0, emphasis=8.0)


class FaceAdapter(nn.Module):
    """PuLID and its vision tower, as they are trained: together."""

    def __init__(self) -> None:
        super().__init__()
        self.pulid = PuLID(PULID)
        self.eva = EvaVisionTransformer(EVA)
        for attention in self.pulid.pulid_ca:
            assert isinstance(attention, PerceiverAttentionCA)
            nn.init.zeros_(attention.to_out.weight)  # the first step leaves the generator as it is

    def attach(self, references: References, index: Tensor, drop: Tensor) -> dict[str, Any]:
        """Residuals of every block, from the indexed references; where drop is true, PuLID's unconditional identity."""
        embedding, states = vision.seen_faces(self.eva, references, index)
        kept = (~drop).float()
        condition = identity_condition(references.embedding[index].float(), embedding.float()) * kept[:, None]
        tokens = self.pulid(condition, [state * kept[:, None, None].to(state.dtype) for state in states])
        keys, values = self.pulid.keys_values(tokens)
        return {"identity": lambda block, picture: self.pulid.residual(block, picture, keys[block], values[block])}


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `pulid` (pulid.* and eva.*)."""
    adapter = FaceAdapter()
    encoders = vision.load(context)
    adapter.eva.load_state_dict(encoders.eva.state_dict())
    adapter.pulid.pulid_encoder.load_state_dict(encoders.identity.state_dict())
    adapter.to(context.device)
    rounding = recipe.but(quantise_from=_ROUNDED_FROM)
    return train_adapter("pulid", adapter, adapter.attach, context, rounding, rounded=adapter.pulid, counts=_COUNTS)
