"""EVA02-CLIP's published checkpoint -> the vision tower as safetensors, in the type it is stored in. The text tower is left behind."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from deployments.conversion.pickles import read_pickle, tensors_of
from deployments.identity.eva_clip import VISUAL_PREFIX, EvaConfig, EvaVisionTransformer, metadata_of, visual_state
from deployments.weights import check_state_dict


def convert(source: Path, target: Path, config: EvaConfig | None = None) -> None:
    """config: the tower's sizes; the published ones where None. Raises CheckpointMismatch for tensors missing, left over or misshapen."""
    config = config or EvaConfig()
    state = visual_state(tensors_of(read_pickle(source), str(source)))
    with torch.device("meta"):
        model = EvaVisionTransformer(config)
    check_state_dict({name: tensor.shape for name, tensor in model.state_dict().items()}, state, str(source))
    named = {f"{VISUAL_PREFIX}{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(named, target, metadata=metadata_of(config))
