"""InstantX's FLUX.1-dev IP-Adapter, published as a pickle of two tables -> one safetensors file with both, their names joined by a dot.

Layout: InstantX/FLUX.1-dev-IP-Adapter, pipeline_flux_ipa.py (MLPProjModel) and attention_processor.py (to_k_ip, to_v_ip, no bias).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from deployments.conversion.pickles import read_pickle
from deployments.errors import CheckpointMismatch
from deployments.weights import check_state_dict

_TABLES = ("image_proj", "ip_adapter")


@dataclass(frozen=True, kw_only=True)
class InstantXSizes:
    """The defaults are the published file's: SigLIP so400m's width, tokens made of it, FLUX's text width and own width, all 57 blocks."""

    image_dim: int = 1152
    tokens: int = 128
    token_dim: int = 4096
    dim: int = 3072
    blocks: int = 57

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor: 2,645.6 M parameters as published."""
        hidden, out = 2 * self.image_dim, self.tokens * self.token_dim
        projection: dict[str, tuple[int, ...]] = {
            "image_proj.proj.0.weight": (hidden, self.image_dim),
            "image_proj.proj.0.bias": (hidden,),
            "image_proj.proj.2.weight": (out, hidden),
            "image_proj.proj.2.bias": (out,),
            "image_proj.norm.weight": (self.token_dim,),
            "image_proj.norm.bias": (self.token_dim,),
        }
        read = {f"ip_adapter.{i}.to_{part}_ip.weight": (self.dim, self.token_dim) for i in range(self.blocks) for part in "kv"}
        return {**projection, **read}


def convert(source: Path, target: Path, sizes: InstantXSizes | None = None) -> None:
    """sizes: the published ones where None. Raises CheckpointMismatch for any tensor missing, left over or misshapen."""
    checkpoint = read_pickle(source)
    if not isinstance(checkpoint, Mapping) or set(checkpoint) != set(_TABLES):
        raise CheckpointMismatch(f"{source} does not consist of the tables {' and '.join(_TABLES)}.")
    state = {f"{table}.{name}": tensor for table in _TABLES for name, tensor in checkpoint[table].items() if isinstance(tensor, Tensor)}
    check_state_dict((sizes or InstantXSizes()).shapes(), state, str(source))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target)
