"""LoraServer: a file is read to its last key before it is kept, whatever a stranger sends, and what is refused leaves nothing behind."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from deployments.catalog import load_catalog
from deployments.denoisers.lora import uploads
from deployments.denoisers.lora.formats import open_lora
from deployments.errors import InvalidCatalog, InvalidLora, InvalidRequest, LikenessError, LoraIncompatible, LoraNotFound, UnknownModel
from deployments.lora_server import LoraServer
from deployments.store.loras import LoraStore, labelled
from deployments.store.settings import StoreSettings
from tests.lora_files import FORMATS, TRANSFORMER, State, export, kohya
from tests.lora_serving import ADA, KOHYA, SDXL, kept
from tests.store_places import FILE

QKV = "lora_unet_double_blocks_1_img_attn_qkv"


@pytest.fixture
def settings(tmp_path: Path) -> StoreSettings:
    return StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files")


@pytest.fixture
def server(settings: StoreSettings) -> Iterator[LoraServer]:
    server = LoraServer("flux1-mini", settings, max_bytes=8 * 2**20)
    yield server
    server.close()


def test_the_sample_is_kept_with_what_is_in_it_and_draws_from_where_it_lies(server: LoraServer, tmp_path: Path) -> None:
    info = server.add(ADA, "Ada", "ada")
    assert (info.base, info.family, info.format, info.rank_low, info.rank_high, info.error) == ("flux1-mini", "flux1", "diffusers", 8, 8, 0)
    assert info.metadata["pictures"] == "20" and info.bytes == len(ADA) and info.keys > 0
    path = server.path(info.sha256)
    assert path.read_bytes() == ADA and open_lora(path, TRANSFORMER).facts.keys == info.keys
    assert server.find([info.id], "ada") == server.list("ada") == (server.get(info.id, "ada"),)
    assert server.delete(info.id, "ada") == info.sha256
    assert kept(tmp_path / "files") == [] and server.list("ada") == ()


def test_who_says_no_trigger_word_gets_the_files_own(server: LoraServer) -> None:
    assert server.add(ADA, "Ada", "ada").trigger_word == "ada"
    assert server.add(ADA, "Ada", "ada", "ohwx").trigger_word == "ohwx"
    spec = save(kohya(), {"modelspec.trigger_phrase": "a woman"})
    assert server.add(spec, "hers", "ada").trigger_word == "a woman"
    assert server.add(save(kohya(), {"trigger_word": "\x1b[2J"}), "hers", "ada").trigger_word is None
    assert server.add(KOHYA, "hers", "ada").trigger_word is None


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "xlabs", "peft", "onetrainer"])
def test_the_transformer_without_weights_reads_what_the_true_one_reads(server: LoraServer, spelling: str) -> None:
    state = export(*FORMATS[spelling])
    info = server.add(save(state), spelling, "ada")
    assert info.keys == len(state) and spelling in info.format.split("+") and (info.rank_low, info.rank_high) == (4, 4)


def test_the_same_content_of_two_owners_is_one_file_and_two_loras(server: LoraServer, tmp_path: Path) -> None:
    mine, theirs = server.add(KOHYA, "hers", "ada"), server.add(KOHYA, "hers", "bruno")
    assert mine.id != theirs.id and kept(tmp_path / "files") == [server.path(mine.sha256)]
    for question in (server.get, server.delete):
        with pytest.raises(LoraNotFound):
            question(theirs.id, "ada")
    with pytest.raises(LoraNotFound, match=theirs.id):
        server.find([mine.id, theirs.id], "ada")
    server.delete(mine.id, "ada")
    assert server.path(theirs.sha256).read_bytes() == KOHYA


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weights": [1]}))
    return stream.getvalue()


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32") -> dict[str, object]:
    return {f"{QKV}.lora_up.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def _peft(**said: object) -> bytes:
    return save(
        export(*FORMATS["diffusers"]), {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in said.items()})}
    )


def _loha(rank: int) -> State:
    sides = {"w1_a": (768, rank), "w1_b": (rank, 256), "w2_a": (768, rank), "w2_b": (rank, 256)}
    return {f"{QKV}.hada_{part}": torch.ones(shape) for part, shape in sides.items()}


BAD: dict[str, tuple[Callable[[], bytes], type[LikenessError], str]] = {
    "nothing": (lambda: b"", InvalidLora, "is empty"),
    "a few bytes": (lambda: b"abc", InvalidLora, "no whole safetensors"),
    "text": (lambda: b"<!doctype html><title>Sign in</title>" * 9, InvalidLora, "no whole safetensors"),
    "the first half": (lambda: KOHYA[: len(KOHYA) // 2], InvalidLora, "no whole safetensors"),
    "all but a byte": (lambda: KOHYA[:-1], InvalidLora, "no whole safetensors"),
    "a byte too many": (lambda: KOHYA + b"\0", InvalidLora, "no whole safetensors"),
    "a pickle": (lambda: pickle.dumps({"weights": [1, 2]}), InvalidLora, "holds a pickle"),
    "what torch.save writes": (_zip, InvalidLora, "holds a pickle"),
    "a header without end": (lambda: struct.pack("<Q", 2**63) + b"{", InvalidLora, "header is not there"),
    "a header of nine megabytes": (lambda: _file({"__metadata__": {"x": "y" * 9 * 2**20}}), InvalidLora, "at most"),
    "a header of many levels": (lambda: _file(b"[" * 100_000), InvalidLora, "no whole safetensors"),
    "a header that is a list": (lambda: _file([1]), InvalidLora, "no whole safetensors"),
    "metadata that are no text": (lambda: _file({"__metadata__": {"x": [1]}}), InvalidLora, "no whole safetensors"),
    "negative offsets": (lambda: _file(_tensor(offsets=(-4, 0))), InvalidLora, "no whole safetensors"),
    "offsets that are text": (lambda: _file(_tensor(offsets=("a", "b"))), InvalidLora, "no whole safetensors"),
    "offsets beyond the end": (lambda: _file(_tensor(offsets=(0, 2**60)), b"1234"), InvalidLora, "no whole safetensors"),
    "a shape beyond all bounds": (lambda: _file(_tensor(shape=(2**62, 2**62)), b"1234"), InvalidLora, "no whole safetensors"),
    "a type that nobody knows": (lambda: _file(_tensor(dtype="F1"), b"1234"), InvalidLora, "no whole safetensors"),
    "numbers of four bits": (lambda: _file(_tensor(shape=(2, 4), dtype="F4"), b"1234"), InvalidLora, "less than a byte"),
    "very many tensors": (
        lambda: save({f"lora_unet_x_{k}.alpha": torch.zeros(0) for k in range(uploads.TENSORS + 1)}), InvalidLora, "20001 tensors",
    ),
    "larger than is kept": (lambda: KOHYA + bytes(8 * 2**20), InvalidLora, "at most 8388608 are kept"),
    "no tensor at all": (lambda: save({}), LoraIncompatible, "changes no module"),
    "another family's": (lambda: save(SDXL), LoraIncompatible, "changes no module"),
    "another width": (lambda: save(kohya() | {f"{QKV}.lora_down.weight": torch.ones(4, 3072)}), LoraIncompatible, "shapes that do not fit"),
    "a key too many": (lambda: save(kohya() | {f"{QKV}.lora_mid.weight": torch.ones(4, 4)}), LoraIncompatible, "lead nowhere"),
    "not a number": (lambda: save(kohya() | {f"{QKV}.lora_up.weight": torch.full((768, 4), torch.nan)}), LoraIncompatible, "not finite"),
    "complex numbers": (
        lambda: save(kohya() | {f"{QKV}.lora_up.weight": torch.ones(768, 4, dtype=torch.complex64)}), LoraIncompatible, "not finite",
    ),
    "an endless strength": (lambda: _peft(r=4, alpha_pattern={".*": float("inf")}), InvalidLora, "no finite number"),
    "a pattern that never ends": (lambda: _peft(alpha_pattern={r"([\w.]+)+!": 1}), InvalidLora, "take forever"),
    "another one": (lambda: _peft(alpha_pattern={".*.*.*.*.*.*!": 1}), InvalidLora, "take forever"),
    "very many patterns": (lambda: _peft(alpha_pattern={f"block{k}": 1 for k in range(5000)}), InvalidLora, "5000 patterns"),
    "metadata of many levels": (
        lambda: save(kohya(), {"lora_adapter_metadata": "[" * 100_000 + "]" * 100_000}), InvalidLora, "too many levels",
    ),
    "unreadable metadata": (lambda: save(kohya(), {"lora_adapter_metadata": "{"}), LoraIncompatible, "unreadable metadata"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_refused_as_the_callers_fault_soon_and_leaves_nothing(server: LoraServer, tmp_path: Path, what: str) -> None:
    make, kind, says = BAD[what]
    content, started = make(), time.monotonic()
    with pytest.raises(kind, match=says) as caught:
        server.add(content, "hers", "ada")
    assert time.monotonic() - started < 20
    assert type(caught.value) is kind and caught.value.status == 422
    assert "hers" in caught.value.message and str(tmp_path) not in str(caught.value)
    assert kept(tmp_path / "files") == [] and server.list("ada") == ()
    assert server.add(KOHYA, "the next", "ada").format == "kohya"


def test_changes_that_would_take_an_hour_to_bring_to_a_low_rank_are_refused_by_their_shapes(
    monkeypatch: pytest.MonkeyPatch, server: LoraServer
) -> None:
    lokr = {f"{QKV}.lokr_w1": torch.eye(1), f"{QKV}.lokr_w2": torch.ones(768, 256)}
    long = {f"{QKV}.lokr_w1": torch.eye(1), f"{QKV}.lokr_w2_a": torch.ones(768, 4), f"{QKV}.lokr_w2_b": torch.ones(4, 256)}
    work = 768 * 256.0**2
    for state, least in ((lokr, work), (long, work), (_loha(16), work), (_loha(4), 768 * 16.0**2)):
        monkeypatch.setattr(uploads, "_WORK", least - 1)
        with pytest.raises(InvalidLora, match="too large"):
            server.add(save(state), "hers", "ada")
        monkeypatch.setattr(uploads, "_WORK", least + 1)
        assert server.add(save(state), "hers", "ada").format == "kohya"


def test_patterns_as_peft_writes_them_are_read(server: LoraServer) -> None:
    for pattern in ("double_blocks.0.img_mlp.0", r"transformer_blocks\.\d+\.attn\.to_[qkv]", ".*attn.*", "^x_embedder$", "a|b"):
        state = export(*FORMATS["diffusers"])
        said = json.dumps({"transformer.lora_alpha": 4, "transformer.alpha_pattern": {pattern: 2}})
        assert server.add(save(state, {"lora_adapter_metadata": said}), "hers", "ada").format == "diffusers"


def test_what_is_said_of_a_file_is_checked_before_the_file(server: LoraServer) -> None:
    with pytest.raises(InvalidRequest, match="`name` is empty"):
        server.add(b"", " ", "ada")


def test_a_lora_of_another_family_is_not_found_fitting(server: LoraServer, settings: StoreSettings) -> None:
    mine = server.add(KOHYA, "hers", "ada")
    store = LoraStore(settings.database, settings.files)
    with store.arriving(b"for another model") as arrival:
        other = store.keep(arrival, "ada", labelled("scene"), replace(FILE, base="qwen-image", family="qwen"))
    store.close()
    assert {info.id for info in server.list("ada")} == {mine.id, other.id}
    with pytest.raises(LoraIncompatible, match="scene.*qwen-image.*flux1-mini"):
        server.find([mine.id, other.id], "ada")


def test_a_server_for_no_base_model_does_not_start(settings: StoreSettings) -> None:
    with pytest.raises(UnknownModel):
        LoraServer("flux1-nobody", settings)


def test_a_base_without_its_configuration_is_told(settings: StoreSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = load_catalog()
    entry = catalog.entry("flux1-mini")
    bare = entry.model_copy(update={"weights": {"pipeline": entry.weights["pipeline"].model_copy(update={"files": ()})}})
    monkeypatch.setattr("deployments.lora_server.load_catalog", lambda: catalog.model_copy(update={"models": {"flux1-mini": bare}}))
    server = LoraServer("flux1-mini", settings)
    with pytest.raises(InvalidCatalog, match="transformer/config.json"):
        server.add(KOHYA, "hers", "ada")
    server.close()
