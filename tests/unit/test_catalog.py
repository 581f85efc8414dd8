"""The catalogue: the shipped one is sound, and each rule of it refuses with a reason and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.catalog import Catalog, load_catalog
from deployments.errors import InvalidCatalog, LicenseRefused, UnknownModel, UnsupportedCombination
from deployments.weights import WeightFile, WeightFolder

MINIMAL = """
pins: [toy.yaml]
models:
  base:
    role: base
    family: flux1
    implementation: collections:OrderedDict
    weights: {pipeline: {repo: toy, folder: flux1}}
    licence: {name: Apache-2.0, commercial: true}
  face:
    role: identity
    family: pulid
    implementation: collections:OrderedDict.fromkeys
    weights: {adapter: {repo: toy, file: pulid.safetensors}}
    licence: {name: FLUX-1-dev-Non-Commercial, commercial: false}
    fits: [base]
"""
PINS = f"""
repo: toy
files:
  flux1/model_index.json: {{sha256: {"a" * 64}, bytes: 2}}
  flux1/vae/config.json: {{sha256: {"b" * 64}, bytes: 3}}
  flux10/other.json: {{sha256: {"c" * 64}, bytes: 4}}
  pulid.safetensors: {{sha256: {"d" * 64}, bytes: 5}}
"""


@pytest.fixture(scope="module")
def shipped() -> Catalog:
    return load_catalog()


def write(folder: Path, catalog: str = MINIMAL, pins: str = PINS) -> Path:
    (folder / "catalog.yaml").write_text(catalog)
    (folder / "toy.yaml").write_text(pins)
    return folder / "catalog.yaml"


def test_the_shipped_catalogue_has_the_whole_pack(shipped: Catalog) -> None:
    pack = [entry for entry in shipped.models.values() if all(weight.repo == "mini" for weight in entry.weights.values())]
    roles = sorted(entry.role for entry in pack)
    assert roles == ["attributes", "base", "control", "faces", "gate", *["identity"] * 3, "judge", "keypoints", "lora", "parser"]
    assert all(entry.licence.commercial for entry in pack)


def test_every_shipped_implementation_can_be_imported(shipped: Catalog) -> None:
    for entry in shipped.models.values():
        assert callable(shipped.resolve(entry)), entry.id


def test_pins_are_merged_into_files_and_folders(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path))
    adapter, pipeline = catalog.entry("face").weights["adapter"], catalog.entry("base").weights["pipeline"]
    assert isinstance(adapter, WeightFile) and (adapter.sha256, adapter.bytes) == ("d" * 64, 5)
    assert isinstance(pipeline, WeightFolder)
    assert [file.file for file in pipeline.files] == ["flux1/model_index.json", "flux1/vae/config.json"]


def test_pins_do_not_spill_into_another_repo(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, pins=PINS.replace("repo: toy", "repo: other")))
    adapter = catalog.entry("face").weights["adapter"]
    assert isinstance(adapter, WeightFile) and adapter.sha256 is None


def test_an_unknown_id_names_close_ones(shipped: Catalog) -> None:
    with pytest.raises(UnknownModel, match="'flux-mini'.*flux1-mini") as caught:
        shipped.entry("flux-mini")
    assert caught.value.status == 404


def test_an_id_like_no_other_lists_what_there_is(shipped: Catalog) -> None:
    with pytest.raises(UnknownModel, match=r"There are: antelopev2, .*xlabs-ip-adapter-v2"):
        shipped.entry("ÿÿÿ")


@pytest.mark.parametrize(
    ("method", "entry"),
    [
        ("pulid", "pulid-mini"),
        ("pulid-mini", "pulid-mini"),
        ("xlabs-ip-adapter-v2", "xlabs-ip-adapter-mini"),
        ("instantx-ip-adapter", "instantx-ip-adapter-mini"),
    ],
)
def test_a_method_finds_its_weights_for_a_base(shipped: Catalog, method: str, entry: str) -> None:
    assert shipped.fitting(method, "flux1-mini").id == entry


@pytest.mark.parametrize(("method", "way_out"), [("instantid", "/sdxl-instantid"), ("faceid", "/sdxl-faceid")])
def test_methods_of_stable_diffusion_are_refused_on_flux_with_the_reason(shipped: Catalog, method: str, way_out: str) -> None:
    with pytest.raises(UnsupportedCombination) as caught:
        shipped.fitting(method, "flux1-mini")
    assert f"{method} does not work on flux1-mini" in caught.value.message and "cross-attention" in caught.value.message
    assert all(name in caught.value.remedy for name in ("pulid", "xlabs-ip-adapter-v2", way_out))


def test_what_the_refusals_recommend_exists(shipped: Catalog) -> None:
    methods = {entry.family for entry in shipped.models.values() if entry.role == "identity"}
    for refusal in shipped.refusals:
        assert sum(method in refusal.instead for method in methods) == 2


def test_weights_for_another_base_are_refused(tmp_path: Path) -> None:
    other = MINIMAL.replace("fits: [base]", "fits: []")
    with pytest.raises(UnsupportedCombination, match="No weights of pulid fit base. Nothing of role identity fits base"):
        load_catalog(write(tmp_path, other)).fitting("pulid", "base")


def test_a_method_nobody_has_is_unknown(shipped: Catalog) -> None:
    with pytest.raises(UnknownModel, match="'pullid'.*pulid"):
        shipped.fitting("pullid", "flux1-mini")


def test_the_commercial_policy_refuses_before_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = load_catalog(write(tmp_path, MINIMAL.replace("collections:OrderedDict.fromkeys", "no_such_module:Thing")))
    monkeypatch.setenv("LICENSE_POLICY", "commercial")
    with pytest.raises(LicenseRefused, match="face is under FLUX-1-dev-Non-Commercial"):
        catalog.resolve(catalog.entry("face"))
    assert catalog.resolve(catalog.entry("base")).__name__ == "OrderedDict"  # type: ignore[attr-defined]


def test_without_a_policy_every_licence_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LICENSE_POLICY", raising=False)
    catalog = load_catalog(write(tmp_path))
    assert catalog.resolve(catalog.entry("face")).__name__ == "fromkeys"  # type: ignore[attr-defined]


def test_a_misspelt_policy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = load_catalog(write(tmp_path))
    monkeypatch.setenv("LICENSE_POLICY", "comercial")
    with pytest.raises(InvalidCatalog, match="LICENSE_POLICY is 'comercial'"):
        catalog.resolve(catalog.entry("base"))


def test_an_implementation_that_is_not_there_is_named(tmp_path: Path) -> None:
    catalog = load_catalog(write(tmp_path, MINIMAL.replace("collections:OrderedDict.fromkeys", "collections:Nothing")))
    with pytest.raises(InvalidCatalog, match="collections:Nothing of face"):
        catalog.resolve(catalog.entry("face"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("role: identity", "role: identity\n    colour: red", "colour"),
        ("role: identity", "role: wizard", "models.face.role"),
        ("role: identity", "role: identity\n    id: mask", "calls itself 'mask'"),
        ("fits: [base]", "fits: [bass]", "fits 'bass'"),
        ("fits: [base]", "fits: [face]", "fits 'face'"),
        ("collections:OrderedDict.fromkeys", "collections.OrderedDict", "models.face.implementation"),
        ("file: pulid.safetensors", "file: ../pulid.safetensors", "plain relative path"),
        ("file: pulid.safetensors", "file: pulid.safetensors, revision: main", "revision"),
        ("models:", "models: [", "flow sequence"),
        ("pins: [toy.yaml]", "pins: [absent.yaml]", "absent.yaml"),
    ],
)
def test_a_wrong_catalogue_is_refused_by_file_and_field(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in MINIMAL
    with pytest.raises(InvalidCatalog, match=said):
        load_catalog(write(tmp_path, MINIMAL.replace(old, new)))


def test_two_entries_that_could_both_be_meant_are_refused(tmp_path: Path) -> None:
    content = yaml.safe_load(MINIMAL)
    content["models"]["face-2"] = content["models"]["face"]
    with pytest.raises(InvalidCatalog, match="2 entries of role identity and family 'pulid' fit 'base'"):
        load_catalog(write(tmp_path, yaml.safe_dump(content)))
