"""Published pickles become safetensors and ONNX: the same numbers, every tensor accounted for, and nothing in them is run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from deployments.checking import check_onnx
from deployments.conversion.bisenet import BiSeNet
from deployments.conversion.bisenet import convert as convert_bisenet
from deployments.conversion.eva_clip import convert as convert_eva
from deployments.conversion.instantx import InstantXSizes
from deployments.conversion.instantx import convert as convert_instantx
from deployments.conversion.pickles import read_pickle
from deployments.conversion.table import CONVERSIONS_PATH, convert, load_conversions
from deployments.errors import CheckpointMismatch, DamagedWeights, MissingWeights, UnsafeWeights
from deployments.identity.eva_clip import EvaConfig, EvaVisionTransformer, load_eva
from serve.cli import app

TINY = EvaConfig(image_size=16, patch_size=8, width=32, depth=3, heads=2, mlp_width=48, embed_dim=16, rope_grid=2, taps=(1, 2))


def eva_checkpoint(path: Path, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tower = {f"visual.{name}": tensor.half() for name, tensor in EvaVisionTransformer(TINY).state_dict().items()}
    rope = {"visual.rope.freqs_cos": torch.zeros(4, 16), "visual.blocks.0.attn.rope.freqs_sin": torch.zeros(4, 16)}
    text = {"text.ln_final.weight": torch.zeros(3), "logit_scale": torch.zeros(())}
    torch.save({**tower, **rope, **text, **changes}, path)
    return tower


def test_eva_becomes_safetensors_that_load_strictly(tmp_path: Path) -> None:
    tower = eva_checkpoint(tmp_path / "eva.pt")
    convert_eva(tmp_path / "eva.pt", tmp_path / "eva.safetensors", TINY)
    found = load_file(tmp_path / "eva.safetensors")
    assert found.keys() == tower.keys() and all(torch.equal(found[name], tower[name]) for name in tower)
    assert load_eva(tmp_path / "eva.safetensors").config == TINY


def test_an_eva_file_of_other_sizes_or_with_strangers_is_refused(tmp_path: Path) -> None:
    eva_checkpoint(tmp_path / "eva.pt")
    with pytest.raises(CheckpointMismatch, match="missing: blocks.10"):
        convert_eva(tmp_path / "eva.pt", tmp_path / "eva.safetensors")
    eva_checkpoint(tmp_path / "eva.pt", stranger=torch.zeros(1))
    with pytest.raises(CheckpointMismatch, match="stranger"):
        convert_eva(tmp_path / "eva.pt", tmp_path / "eva.safetensors", TINY)
    assert not (tmp_path / "eva.safetensors").exists()


def test_instantx_becomes_one_flat_file(tmp_path: Path) -> None:
    sizes = InstantXSizes(image_dim=6, tokens=2, token_dim=8, dim=12, blocks=3)
    state = {name: torch.randn(shape).bfloat16() for name, shape in sizes.shapes().items()}
    tables: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in state.items():
        table, _, rest = name.partition(".")
        tables[table][rest] = tensor
    torch.save(tables, tmp_path / "ip.bin")
    convert_instantx(tmp_path / "ip.bin", tmp_path / "ip.safetensors", sizes)
    found = load_file(tmp_path / "ip.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
    del tables["ip_adapter"]["2.to_v_ip.weight"]
    torch.save(tables, tmp_path / "ip.bin")
    with pytest.raises(CheckpointMismatch, match=r"1 missing: ip_adapter\.2\.to_v_ip\.weight"):
        convert_instantx(tmp_path / "ip.bin", tmp_path / "ip.safetensors", sizes)


def test_the_published_sizes_of_instantx() -> None:
    shapes = InstantXSizes().shapes()
    assert len(shapes) == 6 + 114 and sum(int(np.prod(shape)) for shape in shapes.values()) == 2_645_600_512


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BiSeNet]:
    folder = tmp_path_factory.mktemp("bisenet")
    torch.manual_seed(1)
    model = BiSeNet().eval()
    # As published: by an old torch, in the old format.
    torch.save(model.state_dict(), folder / "parser.pth", _use_new_zipfile_serialization=False)
    convert_bisenet(folder / "parser.pth", folder / "parser.onnx")
    return folder, model


def test_the_parser_becomes_onnx_that_answers_the_same(parser: tuple[Path, BiSeNet]) -> None:
    folder, model = parser
    pixels = torch.randn(1, 3, 512, 512, generator=torch.Generator().manual_seed(2))
    session = onnxruntime.InferenceSession(folder / "parser.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": pixels.numpy()})
    with torch.no_grad():
        expected = model(pixels).numpy()
    assert found.shape == (1, 19, 512, 512)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    check_onnx(folder / "parser.onnx")


def test_the_published_parser_has_these_tensors() -> None:
    """79999_iter.pth: 53,289,463 bytes, of which about 37 kB are names and lengths."""
    state = BiSeNet().state_dict()
    assert sum(tensor.numel() for tensor in state.values()) * 4 == 53_252_476
    assert state["cp.resnet.layer4.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    assert state["ffm.conv1.weight"].shape == (64, 256, 1, 1) and state["conv_out16.conv_out.weight"].shape == (19, 64, 1, 1)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UnsafeWeights, match="holds more than tensors"):
        read_pickle(tmp_path / "evil.pt")
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04nonsense", b"hello"])
def test_a_broken_pickle_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises((DamagedWeights, UnsafeWeights), match=r"broken\.pt"):
        read_pickle(tmp_path / "broken.pt")


def test_converting_verifies_pins_and_leaves_no_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parser: tuple[Path, BiSeNet]
) -> None:
    monkeypatch.setenv("LIKENESS_MODELS", str(tmp_path / "models"))
    source = parser[0] / "parser.pth"
    table = yaml.safe_load(CONVERSIONS_PATH.read_text())
    table["face-parser-bisenet"]["source"] |= {"sha256": hashlib.sha256(source.read_bytes()).hexdigest(), "bytes": source.stat().st_size}
    (tmp_path / "conversions.yaml").write_text(yaml.safe_dump(table))
    arguments = ["models", "convert", "face-parser-bisenet", "--source", str(source), "--conversions", str(tmp_path / "conversions.yaml")]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    target = tmp_path / "models" / "converted" / "face-parser-bisenet.onnx"
    pins = yaml.safe_load((tmp_path / "converted.yaml").read_text())
    assert pins["files"][target.name] == {"sha256": hashlib.sha256(target.read_bytes()).hexdigest(), "bytes": target.stat().st_size}
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_source_that_is_another_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_MODELS", str(tmp_path))
    (tmp_path / "eva.pt").write_bytes(b"something else")
    conversion = load_conversions()["eva02-clip-l-336"]
    with pytest.raises(DamagedWeights, match="has 14 bytes; EVA02_CLIP_L_336_psz14_s6B.pt"):
        convert("eva02-clip-l-336", conversion, tmp_path / "eva.pt", tmp_path / "converted.yaml")
    with pytest.raises(MissingWeights, match="no file"):
        convert("eva02-clip-l-336", conversion, tmp_path / "nowhere.pt", tmp_path / "converted.yaml")
    assert not (tmp_path / "converted.yaml").exists()
