"""From a workspace to a pack: the stages' results in the layouts that stock libraries open, and the catalogue's pins."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, SiglipVisionModel

from deployments.identity import eva_clip, pulid
from training.mini.flux_folder import clip_vision_config, controlnet_from, scheduler, siglip_vision_config
from training.mini.folders import save_controlnet, save_flux_folder, save_picture_encoder, save_siglip
from training.mini.generator import autoencoder, base, lora
from training.mini.generator.flow import TIME_SHIFT
from training.mini.generator.ip_adapter import PictureAdapter
from training.mini.generator.sizes import EVA, PULID
from training.mini.storage import MATRIX_DTYPE, save_weights, stored
from training.mini.tokenisers import build_tokenisers
from training.mini.workspace import Workspace
from training.mini.xlabs_adapter import export_xlabs

_CPU = torch.device("cpu")
_ONNX_FILES = {
    "scrfd.onnx": "insightface",
    "arcface.onnx": "insightface",
    "genderage.onnx": "insightface",
    "arcface_judge.onnx": "judge",
    "face_parser.onnx": "parser",
    "body_keypoints.onnx": "keypoints",
    "attributes.onnx": "attributes",
}


def refuse_existing_pack(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError if `out` holds anything and may not be overwritten."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} already holds a pack; pass --overwrite to replace it, or choose another --out")


def assemble(workspace: Workspace, out: Path, overwrite: bool = False) -> None:
    """Writes the whole pack beside `out` and puts it in its place at the end: `out` holds the old pack or the new one.

    Raises FileExistsError (see refuse_existing_pack), FileNotFoundError naming a stage's result that is missing.
    """
    refuse_existing_pack(out, overwrite)
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    for name, folder in _ONNX_FILES.items():
        _copy(workspace.folder / name, draft / folder / name)
    _write_generator(workspace, draft)
    _write_adapters(workspace, draft)
    _write_siglip_adapters(workspace, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist: run the stage that makes it, or import its exported parts (--import)")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_generator(workspace: Workspace, out: Path) -> None:
    generator = base.load(workspace, _CPU)
    save_flux_folder(
        out / "flux1",
        transformer=generator.transformer,
        vae=autoencoder.load(workspace, _CPU),
        t5=generator.text.t5,
        clip=generator.text.clip,
        tokenisers=build_tokenisers(),
        scheduler=scheduler(TIME_SHIFT),
    )
    controlnet = controlnet_from(generator.transformer)
    controlnet.load_state_dict(workspace.load("pose-control"))
    save_controlnet(out / "flux1-controlnet-union", controlnet)


def _write_adapters(workspace: Workspace, out: Path) -> None:
    face = workspace.load("pulid")
    metadata = pulid.metadata_of(PULID)
    save_weights(out / "pulid" / "pulid_flux_mini.safetensors", stored(_part(face, "pulid."), MATRIX_DTYPE), metadata)
    tower = {f"visual.{name}": value for name, value in _part(face, "eva.").items()}
    save_weights(out / "eva-clip" / "eva_clip_mini.safetensors", stored(tower, MATRIX_DTYPE), eva_clip.metadata_of(EVA))
    picture = PictureAdapter(CLIPVisionModelWithProjection(clip_vision_config()))
    picture.load_state_dict(workspace.load("ip-adapter"))
    save_weights(out / "xlabs-ip-adapter" / "ip_adapter.safetensors", stored(export_xlabs(picture.adapter)))
    save_picture_encoder(out / "clip-vision", picture.clip)
    character = workspace.load("lora")
    save_weights(out / "loras" / f"{lora.TRIGGER_WORD}.safetensors", stored(lora.published(character)), lora.metadata())


def _write_siglip_adapters(workspace: Workspace, out: Path) -> None:
    """InstantX, Redux and the encoder that they share: what there is of them, since without them a pack is whole."""
    files = {"instantx": out / "instantx-ip-adapter" / "ip-adapter.safetensors", "redux": out / "redux" / "redux.safetensors"}
    trained = [name for name in files if workspace.has(name)]
    for name in trained:
        save_weights(files[name], stored(workspace.load(name), MATRIX_DTYPE))
    if trained:
        encoder = SiglipVisionModel(siglip_vision_config())
        encoder.load_state_dict(_part(workspace.load("siglip-vision"), "siglip."))
        save_siglip(out / "siglip-vision", encoder)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
