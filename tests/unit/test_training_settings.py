"""What a training is told and what it is warned of: settings, presets, sizes, rates, memory, trigger words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from benchmarks.true_size import true_sizes
from deployments.catalog import load_catalog
from deployments.errors import (
    InvalidImage,
    InvalidRequest,
    LikenessError,
    NotEnoughMemory,
    TrainingDiverged,
    UnknownModel,
    UnsupportedCombination,
)
from tests.lora_training import settings
from training.base_models import open_base
from training.buckets import Batches, Bucket, ladder, places_of
from training.memory_plan import MemoryPlan, estimate, free_bytes, plan
from training.optimisers import rate_at
from training.settings import base_entry, checked, preset, presets
from training.trigger_words import trigger_warnings

GB = 10**9


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_valid_and_may_be_changed(name: str) -> None:
    assert preset(name, steps=7, warm_up_steps=0).steps == 7
    assert {"flux-a6000", "flux-a100", "qwen-a100", "mini"} == set(presets())


def test_the_a6000_preset_is_the_published_recipe() -> None:
    told = preset("flux-a6000")
    assert (told.optimiser, told.rank, told.alpha, told.batch, told.grad_accum) == ("adamw8bit", 32, 32, 2, 1)
    assert (told.learning_rate, told.ema, told.resolutions, told.steps) == (1e-4, 0.99, (768, 1024), 2500)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("rank", 33, "rank: Value error, 33 is no rank"),
        ("learning_rate", 0, "learning_rate"),
        ("targets", "(", "no regular expression"),
        ("resolutions", [1024, 1024], "different sides"),
        ("warm_up_steps", 9000, "more than the"),
        ("sample_every", 5, "sample_prompts says nothing"),
        ("ranks", 8, "ranks: Extra inputs"),
    ],
)
def test_what_cannot_be_meant_is_named(field: str, value: object, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        checked({"base": "flux1-mini", field: value})


def test_unknown_presets_and_bases_are_refused_with_what_there_is() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean flux-a6000"):
        preset("flux-a600")
    with pytest.raises(UnknownModel, match="Did you mean flux1-mini"):
        base_entry(settings(base="flux1-mimi"), load_catalog())
    with pytest.raises(UnsupportedCombination, match="pulid-mini is a pulid of role identity.*flux1-mini"):
        base_entry(settings(base="pulid-mini"), load_catalog())


def test_ladders_keep_area_and_shape() -> None:
    for bucket in ladder(1024, 16):
        assert bucket.width % 16 == bucket.height % 16 == 0
        assert 0.49 < bucket.width / bucket.height < 2.03 and abs(bucket.width * bucket.height / 2**20 - 1) < 0.04
    assert Bucket(1024, 1024) in ladder(1024, 16)


def test_no_picture_is_ever_enlarged() -> None:
    for size in [(3000, 2000), (800, 1100), (700, 700), (500, 400), (100, 90), (768, 768)]:
        for place in places_of(*size, (768, 1024), 16):
            assert place.width <= size[0] and place.height <= size[1]
            assert place.left >= 0 and place.left + place.bucket.width <= place.width
            assert place.top >= 0 and place.top + place.bucket.height <= place.height
    assert [str(place.bucket) for place in places_of(3000, 3000, (768, 1024), 16)] == ["768x768", "1024x1024"]
    assert [str(place.bucket) for place in places_of(800, 800, (768, 1024), 16)] == ["768x768"]
    assert [str(place.bucket) for place in places_of(500, 500, (768, 1024), 16)] == ["496x496"]
    with pytest.raises(InvalidImage, match="20 x 20"):
        places_of(20, 20, (768,), 16)


def test_every_item_comes_equally_often_with_changing_companions() -> None:
    members = {Bucket(64, 64): [0, 1, 2, 3, 4], Bucket(32, 64): [5], Bucket(64, 32): [6, 7]}
    batches = Batches(members, 2, seed=3)
    groups = [batches.at(k) for k in range(400)]
    counts = Counter(item for group in groups for item in group)
    assert set(counts) == set(range(8)) and max(counts.values()) - min(counts.values()) <= 4
    assert all(len({next(b for b, m in members.items() if item in m) for item in group}) == 1 for group in groups)
    assert len({frozenset(group) for group in groups if group[0] < 5}) > 6
    assert [Batches(members, 2, seed=3).at(k) for k in (399, 0, 17)] == [groups[399], groups[0], groups[17]]
    assert [Batches(members, 2, seed=4).at(k) for k in range(400)] != groups


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    told = settings(steps=100, warm_up_steps=10, schedule="cosine", learning_rate=1.0)
    assert [rate_at(told, step) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    assert rate_at(told, 55) == pytest.approx(0.5) and rate_at(told, 100) == pytest.approx(0)
    assert rate_at(settings(steps=100, learning_rate=0.3), 99) == 0.3


def _flux() -> Any:
    with torch.device("meta"):
        return FluxTransformer2DModel(**true_sizes().flux)


def _estimate(checkpointing: bool, **changes: Any) -> MemoryPlan:
    told = preset("flux-a100", **changes)
    return estimate(told, _flux(), told.targets_of("flux1"), 16, 512, checkpointing)


def test_the_plan_of_flux_is_near_what_was_counted_and_measured() -> None:
    """23.8 GB of base and 130.7 million numbers of LoRA were counted; 27.8 and 77.5 GB measured for a LoRA on attention alone."""
    whole = _estimate(True)
    assert whole.parts["base"] / GB == pytest.approx(23.8, abs=0.1)
    assert whole.parts["LoRA and its gradient"] / 8 == pytest.approx(130.7e6, rel=0.02)
    assert whole.bytes < 42 * GB
    attention = r".*attn\.to_(q|k|v|out\.0)"
    assert _estimate(True, targets=attention, rank=16, resolutions=[1024]).bytes / GB == pytest.approx(27.8, rel=0.12)
    assert _estimate(False, targets=attention, rank=16, resolutions=[1024]).bytes / GB == pytest.approx(77.5, rel=0.06)


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    told, flux = preset("flux-a100"), _flux()

    def planned(free: int | None, **changes: Any) -> MemoryPlan:
        changed = told.model_copy(update=changes)
        return plan(changed, flux, changed.targets_of("flux1"), 16, 512, free)

    assert planned(None).checkpointing is False and planned(141 * GB).checkpointing is False
    assert planned(48 * GB).checkpointing is True
    with pytest.raises(NotEnoughMemory, match="gradient_checkpointing = on"):
        planned(48 * GB, gradient_checkpointing="off")
    with pytest.raises(NotEnoughMemory, match="batch = 1") as refused:
        planned(31 * GB)
    assert refused.value.details["free_bytes"] == 31 * GB
    with pytest.raises(NotEnoughMemory, match="a device with more memory"):
        planned(24 * GB)
    assert (free_bytes(torch.device("cpu")) or GB) > 0


def _machine(root: Path, available: float, files: Mapping[str, str] | None = None) -> int | None:
    """What may be taken on a machine of ten million KiB, of which millions are available."""
    meminfo = f"MemTotal:       10000000 kB\nMemFree:  1 kB\nMemAvailable:    {round(available * 1e6)} kB\n"
    for name, content in ({"proc/meminfo": meminfo} | dict(files or {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return free_bytes(torch.device("cpu"), root)


@pytest.mark.parametrize(("available", "taken"), [(8.0, 6.5), (1.5, 0.0), (0.5, 0.0)])
def test_on_the_machines_own_memory_a_share_stays_for_who_serves(tmp_path: Path, available: float, taken: float) -> None:
    assert _machine(tmp_path, available) == pytest.approx(taken * 1e6 * 1024, abs=1024)
    (tmp_path / "proc/meminfo").write_text("MemFree:  1 kB\n")
    assert free_bytes(torch.device("cpu"), tmp_path) is None


GROUP, OWN = "sys/fs/cgroup", {"proc/self/cgroup": "0::/pods/one\n"}
LIMITED = {f"{GROUP}/memory.max": "2000000000\n", f"{GROUP}/memory.current": "1500000000\n"}
CACHED = {f"{GROUP}/memory.stat": "anon 7\ninactive_file 300000000\nactive_file 100000000\nshmem 9\n"}
WITHIN = {name.replace(GROUP, f"{GROUP}/pods/one"): content for name, content in LIMITED.items()}
UNLIMITED = {f"{GROUP}/pods/memory.max": "max\n", f"{GROUP}/pods/memory.current": "8000000000\n"}
OLD = {
    "proc/self/cgroup": "12:cpu,cpuacct:/\n4:memory:/docker/one\n0::/\n",
    f"{GROUP}/memory/docker/one/memory.limit_in_bytes": "2000000000\n",
    f"{GROUP}/memory/docker/one/memory.usage_in_bytes": "1500000000\n",
    f"{GROUP}/memory/docker/one/memory.stat": "active_file 9\ntotal_inactive_file 300000000\ntotal_active_file 100000000\n",
    f"{GROUP}/memory/memory.limit_in_bytes": "9223372036854771712\n",
    f"{GROUP}/memory/memory.usage_in_bytes": "8000000000\n",
}


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (LIMITED, 0.2),  # 2.0 less 1.5, less 15 % of 2.0
        (LIMITED | CACHED, 0.6),
        (OWN | WITHIN | UNLIMITED, 0.2),
        (OWN | {f"{GROUP}/memory.max": "9000000000\n", f"{GROUP}/memory.current": "0\n"} | WITHIN, 0.2),
        (OLD, 0.6),
    ],
)
def test_in_a_container_its_own_limit_counts(tmp_path: Path, files: Mapping[str, str], taken: float) -> None:
    assert _machine(tmp_path, 8.0, files) == pytest.approx(taken * 1e9, abs=1)


def test_a_limit_above_the_machine_is_none(tmp_path: Path) -> None:
    files = {f"{GROUP}/memory.max": "90000000000\n", f"{GROUP}/memory.current": "1\n"} | OWN | UNLIMITED
    assert _machine(tmp_path, 8.0, files) == pytest.approx(6.5e6 * 1024, abs=1024)


@pytest.mark.parametrize("kind", [NotEnoughMemory, TrainingDiverged])
def test_the_trainers_errors_say_what_to_do(kind: type[LikenessError]) -> None:
    assert kind("It broke.").remedy == kind.advice and kind.advice.endswith(".")


def test_trigger_words_that_cannot_be_told_apart_are_warned_of() -> None:
    catalog = load_catalog()
    tokenisers = open_base(catalog, catalog.entry("flux1-mini"), torch.device("cpu"), torch.float32).tokenisers()
    assert trigger_warnings("ohwx", ["ohwx, a portrait"], tokenisers) == []
    spelt = trigger_warnings("zqxjv", ["zqxjv, a portrait"], tokenisers)
    assert len(spelt) == 2 and "T5 reads 'zqxjv' in 5 pieces" in spelt[1]
    assert "1 of 2 captions do not hold" in trigger_warnings("ohwx", ["ohwx", "a portrait"], tokenisers)[0]
    assert any("cannot read" in said for said in trigger_warnings("人", ["人"], tokenisers))
    assert "no trigger word" in trigger_warnings("", ["a portrait"], tokenisers)[0]
