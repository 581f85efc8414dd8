"""The spelling of a LoRA's keys: what part of the change a tensor is, which module it belongs to, and whose spelling that is.

Reads names only, no tensor. A name that is not understood is never guessed at: it is left over, and its file is refused by the reader.
"""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass

from deployments.denoisers.lora.places import underscored

# What may stand before a module's name, and whose habit that is. One may stand before another (a compiled model, saved by peft).
_PREFIXES = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",  # and ai-toolkit
    "lora_transformer_": "onetrainer",
    "lora_unet_": "kohya",
    "lycoris_": "lycoris",
    "_orig_mod.": "",
    "module.": "",
}
# Without a prefix the names themselves tell.
_BARE = {"diffusers": "peft", "bfl": "bfl", "xlabs": "xlabs"}
# kohya and OneTrainer: lora_te1_; diffusers: text_encoder(_2).; ComfyUI: text_encoders.clip_l.; a text encoder's own names: text_model.
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(lora_te\d?_|lora_text_encoder|text_encoders?(_\d)?\.|text_model\.|clip_[lg]\.|t5xxl\.)")
_DORA = re.compile(r"\.(dora_scale|lora_magnitude_vector(\.[\w-]+)*|magnitude)$")
_PARTS = (
    # peft | its state of a live model, which names the adapter | kohya | diffusers before peft | XLabs
    ("down", re.compile(r"(.+?)\.(?:lora_A(?:\.[\w-]+)?|lora_down|lora(?:_linear_layer)?\.down|down)\.weight")),
    ("up", re.compile(r"(.+?)\.(?:lora_B(?:\.[\w-]+)?|lora_up|lora(?:_linear_layer)?\.up|up)\.weight")),
    ("alpha", re.compile(r"(.+)\.alpha")),
    ("", re.compile(r"(.+)\.((?:lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|diff|diff_b))(?:\.weight)?")),
)


@dataclass(frozen=True)
class Part:
    """One key, understood so far as its spelling goes.

    module: as the file spells it, with its prefix. kind: down, up, alpha, diff, diff_b, lokr_w1, lokr_w1_a, ..., hada_w1_a, ...
    """

    module: str
    kind: str


def of_text_encoder(key: str) -> bool:
    return _TEXT_ENCODER.match(key) is not None


def of_dora(key: str) -> bool:
    """Whether it is a magnitude of DoRA, without which the other tensors of its module mean something else."""
    return _DORA.search(key) is not None


def part_of(key: str) -> Part | None:
    """None for a key that ends like nothing known."""
    for kind, pattern in _PARTS:
        if found := pattern.fullmatch(key):
            return Part(found[1], kind or found[2])
    return None


def name_of(module: str, known: Container[str]) -> tuple[str, str] | None:
    """The underscored name of a module among the known ones, and the habit of the prefix before it (empty without one)."""
    name, habit = module, ""
    while underscored(name) not in known:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return None
        name = name.removeprefix(prefix)
        habit = habit or _PREFIXES[prefix]
    return underscored(name), habit


def format_of(habit: str, naming: str) -> str:
    """What a spelling is called, by the prefix and by whose names the modules have."""
    if naming == "xlabs":
        return naming
    return habit or _BARE[naming]
