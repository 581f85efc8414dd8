"""Settings: every file of configs/serve/ is valid for us and for Ray, and nothing unknown slips through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.catalog import load_catalog
from deployments.errors import InvalidCatalog
from serve.settings import CONFIGS, AppSettings, load_settings

FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_is_valid_and_names_models_that_fit(file: Path) -> None:
    settings, catalog = load_settings(str(file)), load_catalog()
    base = catalog.entry(settings.base)
    assert base.role == "base" and set(base.parts) == {"prompts", "denoiser"}
    for method in settings.methods:
        assert settings.base in catalog.entry(method).fits and set(catalog.entry(method).parts) == {"encoder", "adapter"}
    models = settings.faces.models
    assert [catalog.entry(name).role for name in (models.faces, models.judge, models.parser)] == ["faces", "judge", "parser"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_reads_the_file_and_loses_no_key_of_it(file: Path) -> None:
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    ServeDeploySchema.model_validate(content)
    assert set(content) <= set(ServeDeploySchema.model_fields)
    assert set(content["http_options"]) <= set(HTTPOptionsSchema.model_fields)
    for application in content["applications"]:
        assert set(application) <= set(ServeApplicationSchema.model_fields)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bases": "flux1-mini"}, "bases"),
        ({"denoiser": {"pool": {"num_gpu": 1}}}, "num_gpu"),
        ({"denoiser": {"pool": {"max_ongoing_requests": 3}}}, "one picture at a time"),
        ({"denoiser": {"pool": {"max_ongoing_requests": 2, "replicas": 2}}}, "another one may be free"),
        ({"identity": {"torch": {"device": "cuda"}}}, "exactly if it is reserved"),
        ({"identity": {"pool": {"num_gpus": 0.5}}}, "exactly if it is reserved"),
        ({"identity": {"torch": {"device": "cuda", "gpu_fraction": 0.9}, "pool": {"num_gpus": 0.5}}}, "more than the num_gpus"),
        ({"faces": {"models": {"faces": "f", "judge": "j", "parser": "p", "provider": "tpu"}}}, "provider"),
        ({"limits": {"pixel": 3}}, "pixel"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        AppSettings.model_validate(change)


def test_a_missing_or_broken_file_says_which_there_are(tmp_path: Path) -> None:
    with pytest.raises(InvalidCatalog, match="flux-dev, local"):
        load_settings("production")
    broken = tmp_path / "broken.yaml"
    broken.write_text("applications: [{args: {base: 3}}]")
    with pytest.raises(InvalidCatalog, match="base"):
        load_settings(str(broken))


def test_a_gpu_class_becomes_a_label_and_a_fraction_a_reservation() -> None:
    settings = load_settings("flux-dev")
    options = settings.denoiser.pool.options()
    assert options["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0.7, "label_selector": {"gpu-class": "a6000"}}
    assert options["autoscaling_config"]["max_replicas"] == 4 and settings.denoiser.room == 4 + 64
