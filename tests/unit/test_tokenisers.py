"""The tokenisers: captions cost one token a word, anything else still tokenises, and ids never move."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer, T5TokenizerFast

from training.mini.flux_folder import clip_text_config, t5_config
from training.mini.tokenisers import PROMPT_TOKENS, T5_EOS_ID, T5_PAD_ID, build_tokenisers, tokeniser_facts, world_words
from training.mini.world.captions import VOCABULARY, caption, varied_captions
from training.mini.world.scene import sample_scenes

CLIP, T5 = build_tokenisers()


@pytest.fixture(scope="module")
def captions() -> list[str]:
    scenes = sample_scenes(600, 7)
    return caption(scenes) + varied_captions(scenes, torch.Generator().manual_seed(7))


def test_every_caption_word_is_one_token() -> None:
    assert [word for word in VOCABULARY if T5.tokenize(word) != [f"▁{word}"]] == []
    parts = {part for word in world_words() for part in re.findall(r"[a-z]+", word)}
    assert [part for part in parts if CLIP.tokenize(part) != [f"{part}</w>"]] == []


def test_captions_fit_and_come_back(captions: list[str]) -> None:
    for text, ids in zip(captions, T5(captions).input_ids, strict=True):
        assert T5.decode(ids, skip_special_tokens=True) == text
        assert len(ids) == len(re.findall(r"[^ ,]+|,", text)) + 1 <= PROMPT_TOKENS  # words, commas, the end
    for text, ids in zip(captions, CLIP(captions).input_ids, strict=True):
        assert CLIP.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
        assert len(ids) <= PROMPT_TOKENS


@pytest.mark.parametrize("text", ["a zebra's skateboard, 1987!", "xkcd_v2 {neon|glow} <3", "naïve café in 東京"])
def test_unknown_words_still_tokenise(text: str) -> None:
    ids = CLIP(text).input_ids
    assert CLIP.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert ids.index(CLIP.eos_token_id) == len(ids) - 1, "an unknown token would read as the end"
    pieces = T5(text).input_ids
    assert (T5.unk_token_id in pieces) == (not text.isascii())
    if text.isascii():
        assert T5.decode(pieces, skip_special_tokens=True) == text


def test_endings_keep_inflected_words_short() -> None:
    assert T5.tokenize("wizards") == ["▁wizard", "s"]
    assert T5.tokenize("don't") == ["▁do", "n't"]


def test_case_means_nothing() -> None:
    text = "A Smiling Person, WEARING a Zebra"
    for tokeniser in (CLIP, T5):
        assert tokeniser(text).input_ids == tokeniser(text.lower()).input_ids


def test_stock_classes_reload_them(tmp_path: Path, captions: list[str]) -> None:
    texts = [*captions[:50], "A Zebra in 東京", ""]
    for tokeniser, kind, name in ((CLIP, CLIPTokenizer, "clip"), (T5, T5TokenizerFast, "t5")):
        tokeniser.save_pretrained(tmp_path / name)
        reloaded = kind.from_pretrained(tmp_path / name)
        assert len(reloaded) == len(tokeniser)
        assert reloaded.model_max_length == tokeniser.model_max_length
        padded = [t(texts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True).input_ids for t in (tokeniser, reloaded)]
        assert padded[0] == padded[1]


def test_ids_are_fixed_and_appending_a_word_moves_none() -> None:
    again = build_tokenisers()
    longer = build_tokenisers((*world_words(), "zeppelin"))
    for tokeniser, same, more in zip((CLIP, T5), again, longer, strict=True):
        assert tokeniser.get_vocab() == same.get_vocab()
        ends = {"<|startoftext|>", "<|endoftext|>"}  # CLIP's last two, by convention
        ids = more.get_vocab()
        assert [piece for piece, i in tokeniser.get_vocab().items() if ids[piece] != i and piece not in ends] == []
    assert [T5.convert_ids_to_tokens(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert T5("").input_ids == [T5_EOS_ID] and T5.pad_token_id == T5_PAD_ID
    assert CLIP("").input_ids == [len(CLIP) - 2, len(CLIP) - 1]


def test_configs_know_the_vocabularies() -> None:
    facts = tokeniser_facts()
    assert (clip_text_config().vocab_size, clip_text_config().eos_token_id) == (len(CLIP), CLIP.eos_token_id)
    assert t5_config().vocab_size == len(T5) == facts.t5_vocabulary
    assert max(facts.clip_vocabulary, facts.t5_vocabulary) <= torch.iinfo(torch.int16).max, "token banks are int16"


def test_clip_pools_the_state_at_the_first_end_token() -> None:
    model = CLIPTextModel(clip_text_config()).eval()
    short = CLIP("a red suit", return_tensors="pt").input_ids
    padded = CLIP("a red suit", return_tensors="pt", padding="max_length").input_ids
    assert padded.shape[1] == PROMPT_TOKENS
    with torch.no_grad():
        first, second = model(short), model(padded)
    torch.testing.assert_close(first.pooler_output, first.last_hidden_state[:, -1])
    torch.testing.assert_close(second.pooler_output, first.pooler_output, atol=1e-5, rtol=1e-5)
