"""How the mini FLUX pipeline is built: the sizes of its parts, as the configs of the stock diffusers and transformers classes.

Same classes and same fields as black-forest-labs/FLUX.1-dev, smaller numbers: 192-px pictures, latents 48 x 48 x 16 (an 8x
autoencoder would blur the eyes of a 192-px face), 24 x 24 packed tokens of 64 numbers. Knows no weights: storage.py writes them.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPVisionConfig, SiglipVisionConfig, T5Config

from training.mini.tokenisers import PROMPT_TOKENS, T5_EOS_ID, T5_PAD_ID, tokeniser_facts

TEXT_DIM: Final = 128
"""Width of T5's states (`joint_attention_dim`) and of CLIP's pooled vector (`pooled_projection_dim`)."""
LATENT_CHANNELS: Final = 16
CLIP_PICTURE_PX: Final = 112
"""Side of the square that the CLIP picture encoder sees."""
CLIP_EMBEDDING_DIM: Final = 128
SIGLIP_PICTURE_PX: Final = 112
SIGLIP_DIM: Final = 96
"""Width of the SigLIP picture encoder, hence of its patches and of its pooled output."""
CONTROL_MODES: Final = 10
"""As Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro; its mode 4 is the pose."""


def flux_config() -> dict[str, Any]:
    """Of FluxTransformer2DModel: width 256, 2 double and 6 single blocks, guidance distilled into an embedding."""
    return {
        "patch_size": 1,
        "in_channels": LATENT_CHANNELS * 4,  # packed by 2 x 2
        "num_layers": 2,
        "num_single_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "guidance_embeds": True,
        "axes_dims_rope": (8, 28, 28),  # FLUX.1-dev's proportions (16, 56, 56 of 128)
    }


def vae_config(scaling_factor: float = 1.0, shift_factor: float = 0.0) -> dict[str, Any]:
    """Of AutoencoderKL, 4x down. The factors normalise the latents, (z - shift) * scaling; they are measured after its training."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 1,
        "latent_channels": LATENT_CHANNELS,
        "norm_num_groups": 16,
        "sample_size": 192,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "force_upcast": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }


def t5_config() -> T5Config:
    """Of T5EncoderModel."""
    return T5Config(
        vocab_size=tokeniser_facts().t5_vocabulary,
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        pad_token_id=T5_PAD_ID,
        eos_token_id=T5_EOS_ID,
        dtype=torch.float32,
    )


def clip_text_config() -> CLIPTextConfig:
    """Of CLIPTextModel. Its pooled output is the state at the first `eos_token_id`, after the final norm, without a projection."""
    facts = tokeniser_facts()
    return CLIPTextConfig(
        vocab_size=facts.clip_vocabulary,
        hidden_size=TEXT_DIM,
        intermediate_size=2 * TEXT_DIM,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_TOKENS,
        bos_token_id=facts.clip_bos_id,
        eos_token_id=facts.clip_eos_id,
        pad_token_id=facts.clip_eos_id,
        dtype=torch.float32,
    )


def clip_vision_config() -> CLIPVisionConfig:
    """Of CLIPVisionModelWithProjection: what the XLabs adapter reads."""
    return CLIPVisionConfig(
        image_size=CLIP_PICTURE_PX,
        patch_size=14,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=CLIP_EMBEDDING_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        dtype=torch.float32,
    )


def clip_processor_config() -> dict[str, Any]:
    """Of CLIPImageProcessor (`preprocessor_config.json`): shortest side to 112 px, centre crop, OpenAI's mean and deviation.

    Stock `load_ip_adapter` doesn't read this file, it builds the same processor from the picture encoder's `image_size`.
    """
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": CLIP_PICTURE_PX},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": CLIP_PICTURE_PX, "width": CLIP_PICTURE_PX},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],  # openai/CLIP, clip/clip.py
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def siglip_vision_config() -> SiglipVisionConfig:
    """Of SiglipVisionModel: what the InstantX adapter (its pooled output) and Redux (its 8 x 8 patches) read."""
    return SiglipVisionConfig(
        image_size=SIGLIP_PICTURE_PX,
        patch_size=14,
        hidden_size=SIGLIP_DIM,
        intermediate_size=2 * SIGLIP_DIM,
        num_hidden_layers=3,
        num_attention_heads=3,
        dtype=torch.float32,
    )


def siglip_processor_config() -> dict[str, Any]:
    """Of SiglipImageProcessor: the whole picture squeezed into a square, and -1..1 (google/siglip-so400m-patch14-384)."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": SIGLIP_PICTURE_PX, "width": SIGLIP_PICTURE_PX},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }


def scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """shift: static, sigma -> shift * sigma / (1 + (shift - 1) * sigma); the resolution-dependent one is off, at one resolution."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)


def controlnet_from(transformer: FluxTransformer2DModel, num_layers: int = 1) -> FluxControlNetModel:
    """A union ControlNet that begins as the transformer's first double blocks and, its outputs being zero, changes nothing yet.

    (FluxControlNetModel.from_transformer makes no union: it takes the modes from a config that has none.)
    """
    fields = {key: transformer.config[key] for key in flux_config()}
    controlnet = FluxControlNetModel(**fields | {"num_layers": num_layers, "num_single_layers": 0, "num_mode": CONTROL_MODES})
    kept = controlnet.state_dict()
    shared = {key: value for key, value in transformer.state_dict().items() if key in kept and value.shape == kept[key].shape}
    controlnet.load_state_dict(kept | shared)
    return controlnet
