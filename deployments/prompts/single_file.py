"""FLUX's text encoders out of single files (`clip_l.safetensors`, `t5xxl_fp16.safetensors` and their fp8 forms), strictly.

The configuration comes from the folder of the diffusers pipeline that the file belongs to; so do the tokenisers, elsewhere.
Knows no text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from deployments.checkpoints import Checkpoint
from deployments.errors import CheckpointMismatch, MissingWeights
from deployments.weights import check_state_dict

# ComfyUI's all-in-one checkpoints.
_CLIP_PREFIX, _T5_PREFIX = "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."
# What files made from a whole CLIP hold beside the text tower: a table that is computed, and the projection, which FLUX does not use.
_CLIP_SPARE = frozenset({"embeddings.position_ids", "text_projection.weight", "logit_scale"})
# Some releases of transformers have it in the names of the tower, some have not.
_CLIP_TOWER = "text_model."
_T5_TABLE, _T5_COPY = "shared.weight", "encoder.embed_tokens.weight"


def open_clip(path: Path, config: Path, device: torch.device | str, dtype: torch.dtype) -> CLIPTextModel:
    """config: the pipeline's folder `text_encoder`. In evaluation mode.

    Raises UnsafeWeights, DamagedWeights, MissingWeights (no configuration), or CheckpointMismatch, which names the keys.
    """
    found = {name.removeprefix(_CLIP_TOWER): tensor for name, tensor in Checkpoint(path, _CLIP_PREFIX).tensors(dtype)}
    return _opened(CLIPTextModel, path, config, {name: tensor for name, tensor in found.items() if name not in _CLIP_SPARE}).to(device)


def open_t5(path: Path, config: Path, device: torch.device | str, dtype: torch.dtype) -> T5EncoderModel:
    """config: the pipeline's folder `text_encoder_2`. Otherwise as `open_clip`."""
    found = dict(Checkpoint(path, _T5_PREFIX).tensors(dtype))
    copy = found.pop(_T5_COPY, None)  # published files hold the table under both of its names
    if copy is not None and not torch.equal(copy, found.setdefault(_T5_TABLE, copy)):
        raise CheckpointMismatch(f"{path} holds two different tables of words, {_T5_TABLE} and {_T5_COPY}; FLUX's T5 has one.")
    return _opened(T5EncoderModel, path, config, found).to(device)


def _opened(kind: Any, path: Path, config: Path, state: Mapping[str, Tensor]) -> Any:
    """state: by names without the tower's prefix, all in one type."""
    if not (config / "config.json").is_file():
        raise MissingWeights(f"{config} holds no config.json of a {kind.__name__}.", "Fetch the folder, or correct the catalogue's entry.")
    sizes = kind.config_class.from_pretrained(config, local_files_only=True)
    with torch.device("meta"):
        places = {name: tensor.shape for name, tensor in kind(sizes).state_dict().items() if name != _T5_COPY}
    check_state_dict({name.removeprefix(_CLIP_TOWER): shape for name, shape in places.items()}, state, str(path))
    named = {name: state[name.removeprefix(_CLIP_TOWER)] for name in places}
    # Not `load_state_dict` on an empty model: the library fills in what is computed and what is shared.
    model = kind.from_pretrained(None, config=sizes, state_dict=named, dtype=next(iter(named.values())).dtype)
    return model.requires_grad_(False).eval()
