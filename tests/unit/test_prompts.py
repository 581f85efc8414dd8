"""FLUX's texts: equal to the stock pipeline, nothing lost in silence, and nothing encoded twice."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from deployments.catalog import CATALOG_PATH
from deployments.contracts import PromptEmbeds
from deployments.errors import CheckpointMismatch, InvalidRequest, MissingWeights
from deployments.prompts.cache import CacheStats, PromptCache
from deployments.prompts.flux import FluxPrompts
from deployments.prompts.shared_folder import SharedFolder

FOLDER = CATALOG_PATH.parents[1] / "models" / "mini" / "flux1"
TEXTS = ("a portrait of a woman with red hair", "", "Ünknown wörds, twice  spaced: 雨!", "a close-up photo of a man " * 12)
LENGTH = 48
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def prompts() -> FluxPrompts:
    return FluxPrompts(FOLDER, torch_threads=1)


@pytest.mark.parametrize("length", [LENGTH, 128])
def test_states_and_pooled_vector_are_the_stock_pipelines(prompts: FluxPrompts, length: int) -> None:
    pipe = FluxPipeline.from_pretrained(FOLDER, transformer=None, vae=None, dtype=torch.float32)
    with torch.no_grad():
        states, pooled, _ = pipe.encode_prompt(list(TEXTS), prompt_2=None, max_sequence_length=length)
    embeds = prompts.encode(TEXTS, length)
    assert embeds.states.shape == states.shape == (len(TEXTS), length, states.shape[2])
    assert torch.allclose(embeds.states, states, atol=1e-6, rtol=1e-5)
    assert torch.allclose(embeds.pooled, pooled, atol=1e-6, rtol=1e-5)


def test_a_text_does_not_depend_on_its_neighbours(prompts: FluxPrompts) -> None:
    together = prompts.encode(TEXTS, LENGTH)
    for row, text in enumerate(TEXTS):
        alone = prompts.encode([text], LENGTH)
        assert torch.equal(alone.states[0], together.states[row]) and torch.equal(alone.pooled[0], together.pooled[row])


def test_what_is_not_read_is_told_word_for_word(prompts: FluxPrompts) -> None:
    short = "a portrait of a woman"
    assert prompts.unread(short, LENGTH) == "" and prompts.unread("", 1) == ""
    long = " ".join(["a portrait"] * 30) + " standing in the rain"
    rest = prompts.unread(long, LENGTH)
    assert rest and long.endswith(rest) and rest.endswith("standing in the rain")
    # What is said to be unread changes nothing, and what is said to be read does.
    read = long.removesuffix(rest)
    one, other, less = (prompts.encode([text], LENGTH).states for text in (long, read + "a man", read.rsplit(maxsplit=1)[0]))
    assert torch.equal(one, other) and not torch.equal(one, less)


@pytest.mark.parametrize("length", [0, 513])
def test_a_length_that_flux_does_not_read_is_refused(prompts: FluxPrompts, length: int) -> None:
    with pytest.raises(InvalidRequest, match=f"max_sequence_length is {length}"):
        prompts.encode(["a"], length)


def test_half_precision_gives_half_precision_and_another_revision(prompts: FluxPrompts) -> None:
    halved = FluxPrompts(FOLDER, dtype=torch.bfloat16)
    embeds = halved.encode(TEXTS[:1], LENGTH)
    assert embeds.states.dtype == embeds.pooled.dtype == torch.bfloat16
    assert halved.revision != prompts.revision
    assert FluxPrompts(FOLDER).revision == prompts.revision
    assert FluxPrompts(FOLDER, revision="named").revision == "named-float32"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in TEXT_PARTS:
        shutil.copytree(FOLDER / name, tmp_path / name)
    return tmp_path


def test_other_weights_are_another_revision(prompts: FluxPrompts, copy: Path) -> None:
    assert FluxPrompts(copy).revision == prompts.revision
    file = copy / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    changed = max(tensors)
    save_file({**tensors, changed: (-tensors[changed].float()).to(tensors[changed].dtype)}, file, {"format": "pt"})
    assert FluxPrompts(copy).revision != prompts.revision


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_encoders_load_strictly(copy: Path, part: str) -> None:
    file = copy / part / "model.safetensors"
    tensors = load_file(file)
    first = next(name for name in sorted(tensors) if "layer" in name)
    for changed, word in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, "missing"),
        ({**tensors, "a.stranger": torch.zeros(1)}, "left over: a.stranger"),
        ({**tensors, first: torch.zeros(3)}, "does not fit"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointMismatch, match=word):
            FluxPrompts(copy)


@pytest.mark.parametrize("part", TEXT_PARTS)
def test_a_folder_that_lacks_a_part_is_named(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(MissingWeights, match=part):
        FluxPrompts(copy)


def test_a_pickle_is_not_opened(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), copy / "text_encoder" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(MissingWeights, match="text_encoder"):
        FluxPrompts(copy)


def test_a_prompt_that_was_encoded_is_not_encoded_again(prompts: FluxPrompts) -> None:
    cache = PromptCache(prompts)
    first = cache.encode(TEXTS, LENGTH)
    assert cache.stats().encodes == len(TEXTS) and cache.stats().hits == 0
    again = cache.encode(tuple(reversed(TEXTS)), LENGTH)
    assert torch.equal(again.states, first.states.flip(0)) and torch.equal(again.pooled, first.pooled.flip(0))
    size = first.states.nbytes + first.pooled.nbytes
    assert cache.stats() == CacheStats(hits=len(TEXTS), encodes=len(TEXTS), bytes=size)
    cache.encode(TEXTS[:1], LENGTH - 1)
    assert cache.stats().encodes == len(TEXTS) + 1, "another length is another reading"


def test_what_a_caller_does_to_an_answer_stays_with_the_caller(prompts: FluxPrompts) -> None:
    cache = PromptCache(prompts)
    first = cache.encode(TEXTS[:1], LENGTH)
    kept = first.states.clone()
    first.states.zero_()
    assert torch.equal(cache.encode(TEXTS[:1], LENGTH).states, kept)


class _Counting:
    """A small true encoder: a text is its length and its first letter. gate: holds every encoding until it opens."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.revision, self.gate, self.texts = "letters", gate, list[str]()

    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds:
        (text,) = texts
        self.texts.append(text)
        if self.gate is not None:
            assert self.gate.wait(10)
        if text == "broken":
            raise InvalidRequest("This text cannot be encoded.")
        return PromptEmbeds(torch.full((1, max_length, 4), float(len(text))), torch.full((1, 2), float(ord(text[0]))))


ROW_BYTES = 8 * 4 * 4 + 2 * 4


def test_the_least_recently_used_is_forgotten() -> None:
    encoder = _Counting()
    cache = PromptCache(encoder, memory_bytes=2 * ROW_BYTES)
    for text in ("a", "bb", "a", "ccc", "a", "bb"):
        assert cache.encode([text], 8).states[0, 0, 0] == len(text)
    assert encoder.texts == ["a", "bb", "ccc", "bb"]
    assert cache.stats().bytes == 2 * ROW_BYTES


def test_a_text_too_large_to_keep_is_still_encoded() -> None:
    cache = PromptCache(_Counting(), memory_bytes=ROW_BYTES - 1)
    assert cache.encode(["a"], 8).pooled[0, 0] == ord("a")
    assert cache.stats().bytes == 0


def _asked_at_once(cache: PromptCache, encoder: _Counting, text: str, threads: int) -> list[PromptEmbeds | InvalidRequest]:
    answers: list[PromptEmbeds | InvalidRequest] = []

    def ask() -> None:
        try:
            answers.append(cache.encode([text], 8))
        except InvalidRequest as error:
            answers.append(error)

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    deadline = time.monotonic() + 10
    while cache.stats().hits < threads - 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert encoder.gate is not None
    encoder.gate.set()
    for thread in asking:
        thread.join()
    return answers


def test_equal_texts_asked_at_once_are_encoded_once() -> None:
    encoder = _Counting(threading.Event())
    cache = PromptCache(encoder)
    answers = _asked_at_once(cache, encoder, "word", threads=8)
    assert encoder.texts == ["word"] and len(answers) == 8
    assert all(isinstance(answer, PromptEmbeds) and answer.states[0, 0, 0] == 4 for answer in answers)


def test_an_error_reaches_everybody_and_is_not_remembered() -> None:
    encoder = _Counting(threading.Event())
    cache = PromptCache(encoder)
    answers = _asked_at_once(cache, encoder, "broken", threads=4)
    assert len(answers) == 4 and all(isinstance(answer, InvalidRequest) for answer in answers)
    with pytest.raises(InvalidRequest):
        cache.encode(["broken"], 8)
    assert encoder.texts == ["broken"] * 2


def test_other_texts_are_not_held_up_by_one_that_takes_long() -> None:
    gate = threading.Event()
    encoder = _Counting(gate)
    cache = PromptCache(encoder)
    slow = threading.Thread(target=lambda: cache.encode(["slow"], 8))
    slow.start()
    while not encoder.texts:
        time.sleep(0.001)
    encoder.gate = None
    assert cache.encode(["quick"], 8).states[0, 0, 0] == 5
    assert slow.is_alive()
    gate.set()
    slow.join()


def test_replicas_share_a_folder(tmp_path: Path, prompts: FluxPrompts) -> None:
    halved = FluxPrompts(FOLDER, dtype=torch.bfloat16)
    for encoder in (prompts, halved):
        one, other = (PromptCache(encoder, folder=SharedFolder(tmp_path / "embeds")) for _ in range(2))
        first, second = one.encode(TEXTS[:2], LENGTH), other.encode(TEXTS[:2], LENGTH)
        assert torch.equal(first.states, second.states) and torch.equal(first.pooled, second.pooled)
        assert (one.stats().encodes, other.stats().encodes, other.stats().shared_hits) == (2, 0, 2)
    assert len(list((tmp_path / "embeds").iterdir())) == 4


def test_a_damaged_file_is_made_anew(tmp_path: Path) -> None:
    encoder = _Counting()
    for damage in (b"", b"not a safetensors file", None):
        PromptCache(encoder, folder=SharedFolder(tmp_path)).encode(["word"], 8)
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    assert PromptCache(encoder, folder=SharedFolder(tmp_path)).encode(["word"], 8).states[0, 0, 0] == 4
    assert encoder.texts == ["word"] * 4


def test_a_folder_that_cannot_be_written_costs_nothing_but_encodings(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    cache = PromptCache(_Counting(), folder=SharedFolder(folder))
    folder.rmdir()
    folder.write_text("a file stands where the folder was")
    assert cache.encode(["word"], 8).states[0, 0, 0] == 4
    assert cache.stats().encodes == 1


def test_a_shared_folder_stays_within_its_limit_and_keeps_what_is_read(tmp_path: Path) -> None:
    row = _Counting().encode(["word"], 64)
    shared = SharedFolder(tmp_path)
    shared.put("0", row)
    (file,) = tmp_path.iterdir()
    limit = 5 * file.stat().st_size
    bounded = SharedFolder(tmp_path, limit)
    for number in range(1, 20):
        for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)):
            os.utime(path, (1e9 + age, 1e9 + age))  # a clock may be coarser than this loop
        assert bounded.get("0") is not None
        bounded.put(str(number), row)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert bounded.get("1") is None and bounded.get("19") is not None


def test_what_a_killed_process_left_half_written_goes(tmp_path: Path) -> None:
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    SharedFolder(tmp_path)
    assert not old.exists() and new.exists()
