"""A Qwen-Image pipeline's folder of random weights, in the published layout, small enough to train in a second, and a catalogue with it.

Its tokeniser has the published one's files and special tokens, and a dozen merges in place of 151 thousand.
"""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from deployments.catalog import Catalog, load_catalog
from deployments.weights import WeightFile, WeightFolder
from tests.named_weights import fill

BASE, REPO, FOLDER = "qwen-image-toy", "toy", "qwen"
_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_MERGES = ("t h", "Ġ th", "Ġth e", "o r", "Ġ a", "i n", "Ġ p", "Ġp or", "o h", "w x", "oh wx", "r a", "i t", "ra it")
# What Qwen/Qwen-Image has in scheduler/scheduler_config.json.
_SCHEDULER: dict[str, Any] = {
    "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9, "shift": 1.0, "shift_terminal": 0.02,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
MEANS, DEVIATIONS = [-0.7, 0.3, 0.1, 1.2], [0.5, 2.0, 1.1, 0.9]


def make(root: Path) -> Path:
    """The folder below `root`, which is to be the root of all models."""
    folder = root / REPO / FOLDER
    tokeniser = _tokeniser(folder / "tokenizer")
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_SCHEDULER), vae=_vae(), text_encoder=_text_encoder(tokeniser),
        tokenizer=tokeniser, transformer=transformer(),
    ).save_pretrained(folder)  # fmt: skip
    shutil.rmtree(folder / "tokenizer")
    _tokeniser(folder / "tokenizer")
    return folder


def catalog_of(root: Path) -> Catalog:
    """The shipped catalogue, and the folder below `root` as it is now: its files are pinned anew at each call."""
    files = tuple(
        WeightFile(
            repo=REPO, file=path.relative_to(root / REPO).as_posix(), bytes=path.stat().st_size,
            sha256=sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted((root / REPO / FOLDER).rglob("*"))
        if path.is_file()
    )  # fmt: skip
    shipped = load_catalog()
    entry = shipped.entry("qwen-image").model_copy(
        update={
            "id": BASE, "weights": {"pipeline": WeightFolder(repo=REPO, folder=FOLDER, files=files)},
            "defaults": {"num_inference_steps": 2, "true_cfg_scale": 4.0, "max_sequence_length": 512},
        }
    )  # fmt: skip
    return shipped.model_copy(update={"models": {**shipped.models, BASE: entry}})


def transformer() -> Any:
    """Width 32, two blocks; the same numbers each time."""
    return _filled(
        QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), in_channels=16,
            out_channels=4,
        )
    )  # fmt: skip


def _vae() -> Any:
    """Eight pixels to a latent's side and four channels, none of them normalised like another."""
    return _filled(
        AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True], latents_mean=MEANS,
            latents_std=DEVIATIONS,
        )
    )  # fmt: skip


def _text_encoder(tokeniser: Any) -> Any:
    id_of = tokeniser.convert_tokens_to_ids
    ends = {"bos_token_id": None, "eos_token_id": id_of("<|im_end|>")}
    text = {
        **ends,
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": len(tokeniser), "max_position_embeddings": 4096, "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=id_of("<|image_pad|>"), video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"), vision_end_token_id=id_of("<|vision_end|>"), **ends,
    )  # fmt: skip
    return _filled(Qwen2_5_VLForConditionalGeneration(config))


def _filled(model: Any) -> Any:
    fill(model)
    return model.eval()


def _tokeniser(folder: Path) -> Any:
    """vocab.json, merges.txt and what says of the special tokens: there is no tokenizer.json in the published folder."""
    folder.mkdir(parents=True)
    vocabulary = {letter: number for number, letter in enumerate([*_letters(), *(merge.replace(" ", "") for merge in _MERGES)])}
    special = {token: len(vocabulary) + number for number, token in enumerate(_SPECIAL)}
    as_token = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(_SPECIAL[1:])}
    said = {
        **named, "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "bos_token": None, "unk_token": None,
        "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 131072, "split_special_tokens": False,
        "added_tokens_decoder": {str(number): {"content": token, **as_token} for token, number in special.items()},
    }  # fmt: skip
    content = {"vocab": vocabulary, "added_tokens": special, "special_tokens_map": named, "tokenizer_config": said}
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES, ""]), encoding="utf-8")
    return Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)


def _letters() -> list[str]:
    """A printable letter for each byte, as GPT-2's tokeniser has them (openai/gpt-2, src/encoder.py: bytes_to_unicode)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    spelt = {byte: chr(byte) for byte in plain} | {byte: chr(256 + number) for number, byte in enumerate(rest)}
    return [spelt[byte] for byte in range(256)]
