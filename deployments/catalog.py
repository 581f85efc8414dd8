"""The typed view of configs/catalog.yaml: what exists, what opens it, what it fits, what it may be used for.

Answers questions about models and touches none of them: implementations are import strings, imported when asked for, and
importing this module imports neither torch nor any model library.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deployments.errors import InvalidCatalog, LicenseRefused, UnknownModel, UnsupportedCombination
from deployments.weights import RelativePath, WeightFile, WeightFolder, locate, locate_folder

CATALOG_PATH = Path(__file__).resolve().parents[1] / "configs" / "catalog.yaml"
POLICY_VARIABLE = "LICENSE_POLICY"

Role = Literal["base", "identity", "control", "lora", "faces", "parser", "judge", "keypoints", "attributes", "gate"]
Policy = Literal["any", "commercial"]
Part = Literal["prompts", "denoiser", "encoder", "adapter", "control"]
ImportString = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
"""`module:object`."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Licence(_Strict):
    """name: an SPDX identifier, or the name its owner gives it. commercial: whether it allows commercial use."""

    name: str = Field(min_length=1)
    commercial: bool
    url: str | None = None


class Entry(_Strict):
    """One model. The YAML key is its id.

    family: what the request names (a base family, or an identity method); several entries may share one.
    implementation: `module:object`, what opens the weights. weights: by the part they play.
    fits: ids of the base models that it works on; empty for what does not attach to a base.
    defaults: request fields where the caller leaves them out. memory_bytes: held by a process that loaded it, where measured.
    options: what the implementation has to be told.
    parts: where a model runs in several processes, what each of them imports: `prompts` and `denoiser` of a base model, `encoder`
    and `adapter` of an identity method, `control` of a ControlNet.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    role: Role
    family: str = Field(min_length=1)
    implementation: ImportString
    weights: Mapping[str, WeightFile | WeightFolder] = Field(min_length=1)
    licence: Licence
    fits: tuple[str, ...] = ()
    defaults: Mapping[str, JsonValue] = {}
    memory_bytes: int | None = Field(default=None, gt=0)
    options: Mapping[str, JsonValue] = {}
    parts: Mapping[Part, ImportString] = {}

    def located(self, weights: str) -> Path:
        """Where one of its `weights` lies, checked. Raises as `locate` and `locate_folder` do."""
        record = self.weights[weights]
        return locate_folder(record) if isinstance(record, WeightFolder) else locate(record)

    def single_files(self, *parts: str) -> dict[str, Path]:
        """Where those of the parts lie that a base model has as single files beside its pipeline's folder (`transformer`, `vae`,
        `text_encoder`, `text_encoder_2`): they are read in place of the folder's weights."""
        return {part: self.located(part) for part in parts if part in self.weights}


class Refusal(_Strict):
    """A pair that people ask for and that cannot work: `method` on any base of `base_family`, with the reason and a way out."""

    method: str
    base_family: str
    reason: str
    instead: str


class Combination(_Strict):
    """Whether two things may be asked for in one request, on bases of `base_family`, and what is to be known of it. Each is a method of
    identity (by family), or `loras`, `controls`, `image` (to begin from), `true_cfg`, `people` (several), `masks`.

    Where works is false, note says why, and instead what to do.
    """

    first: str
    second: str
    base_family: str
    works: bool = True
    note: str = Field(min_length=1)
    instead: str | None = None

    @model_validator(mode="after")
    def _way_out(self) -> Self:
        if self.works == (self.instead is not None):
            raise ValueError(f"{self.first} with {self.second}: `instead` belongs to what does not work, and only to it")
        return self

    @property
    def pair(self) -> frozenset[str]:
        return frozenset((self.first, self.second))


class Pin(_Strict):
    """What the bytes of one file must be: sha256 in hex, size in bytes."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Pins(_Strict):
    """The files of one repo, as a program found them (configs/mini.yaml): facts that no hand should write."""

    repo: str
    files: Mapping[RelativePath, Pin] = {}

    def fill(self, weight: WeightFile | WeightFolder) -> WeightFile | WeightFolder:
        """The same record with the pins of this repo in it; records of another repo pass unchanged."""
        if weight.repo != self.repo:
            return weight
        if isinstance(weight, WeightFile):
            pin = self.files.get(weight.file)
            return weight.model_copy(update=pin.model_dump()) if pin else weight
        below = {file: pin for file, pin in self.files.items() if file.startswith(f"{weight.folder}/")}
        files = tuple(WeightFile(repo=self.repo, file=file, **pin.model_dump()) for file, pin in sorted(below.items()))
        return weight.model_copy(update={"files": files})


class Catalog(_Strict):
    """Everything that exists. pins: files beside the catalogue whose facts are merged into it. combinations: every pair of what a request
    may hold at once, said once."""

    pins: tuple[str, ...] = ()
    models: Mapping[str, Entry]
    refusals: tuple[Refusal, ...] = ()
    combinations: tuple[Combination, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _key_is_id(cls, content: object) -> object:
        if not isinstance(content, dict) or not isinstance(content.get("models"), dict):
            return content
        models = {name: {"id": name, **entry} if isinstance(entry, dict) else entry for name, entry in content["models"].items()}
        return {**content, "models": models}

    @model_validator(mode="after")
    def _refers_to_what_exists(self) -> Self:
        for name, entry in self.models.items():
            if entry.id != name:
                raise ValueError(f"the entry {name!r} calls itself {entry.id!r}")
            for base in entry.fits:
                if base not in self.models or self.models[base].role != "base":
                    raise ValueError(f"{entry.id} fits {base!r}, which is no base model of this catalogue")
        said = Counter((rule.base_family, rule.pair) for rule in self.combinations)
        if twice := [sorted(pair) for (_, pair), count in said.items() if count > 1]:
            raise ValueError(f"the combination of {' and '.join(twice[0])} is said more than once")
        pairs = Counter((entry.role, entry.family, base) for entry in self.models.values() for base in entry.fits if entry.role != "lora")
        for (role, family, base), count in pairs.items():
            if count > 1:
                raise ValueError(f"{count} entries of role {role} and family {family!r} fit {base!r}; one must be meant")
        return self

    def refuse_combination(self, family: str, present: Collection[str]) -> None:
        """Raises UnsupportedCombination for the first pair out of `present` that does not work on bases of the family."""
        for rule in self.combinations:
            if rule.base_family == family and not rule.works and rule.pair <= set(present):
                message = f"{rule.first} and {rule.second} do not go together: {rule.note}"
                raise UnsupportedCombination(message, rule.instead or "", {"pair": sorted(rule.pair)})

    def entry(self, model: str) -> Entry:
        """The entry with this id. Raises UnknownModel, which names close matches."""
        if model not in self.models:
            raise _unknown("model", model, self.models)
        return self.models[model]

    def servable(self, base: str) -> Entry:
        """The base model with this id, for a server to draw with. Raises UnknownModel, and UnsupportedCombination for what is no base
        model, or is one that nothing here draws with (LoRAs may be trained on it)."""
        entry = self.entry(base)
        if entry.role == "base" and "denoiser" in entry.parts:
            return entry
        able = sorted(e.id for e in self.models.values() if e.role == "base" and "denoiser" in e.parts)
        reason = f"there is no denoiser for {entry.family} here" if entry.role == "base" else f"it is of role {entry.role}"
        raise UnsupportedCombination(f"A server cannot draw with {base}: {reason}.", f"Let `base` be {_either(able)}.", {"param": "base"})

    def resolve(self, entry: Entry, policy: Policy | None = None) -> object:
        """Imports the implementation of an entry. Raises LicenseRefused before anything is imported, InvalidCatalog if there is none.

        policy: defaults to the installation's, see `license_policy`.
        """
        refuse_licence(entry, policy if policy is not None else license_policy())
        return _imported(entry.implementation, entry.id)

    def part(self, entry: Entry, name: Part) -> Any:
        """Imports one part of an entry. Raises LicenseRefused before anything is imported, InvalidCatalog if there is none."""
        refuse_licence(entry, license_policy())
        if name not in entry.parts:
            raise InvalidCatalog(f"{entry.id} names no {name} under `parts`.", "Correct the entry, or choose another model.")
        return _imported(entry.parts[name], entry.id)

    def fitting(self, method: str, base: str, role: Role = "identity") -> Entry:
        """The entry of `role` that does `method` (a family, or an id) on the base model with the id `base`.

        Raises UnsupportedCombination, with the reason and what to use instead, and UnknownModel for a base or a method nobody has.
        """
        family = self.entry(base).family
        for refusal in self.refusals:
            if refusal.method == method and refusal.base_family == family:
                raise UnsupportedCombination(f"{method} does not work on {base}: {refusal.reason}", refusal.instead)
        named = [entry for entry in self.models.values() if entry.role == role and method in (entry.family, entry.id)]
        for entry in named:
            if base in entry.fits:
                return entry
        if not named:
            raise _unknown(f"method of role {role}", method, [entry.family for entry in self.models.values() if entry.role == role])
        fitting = sorted(entry.family for entry in self.models.values() if entry.role == role and base in entry.fits)
        instead = f"On {base} use {_either(fitting)}." if fitting else f"Nothing of role {role} fits {base}: use another base."
        raise UnsupportedCombination(f"No weights of {method} fit {base}.", instead, {"instead": fitting})


def _imported(name: str, owner: str) -> object:
    module, _, path = name.partition(":")
    try:
        found: object = import_module(module)
        for step in path.split("."):
            found = getattr(found, step)
    except (ImportError, AttributeError) as error:
        message = f"The implementation {name} of {owner} cannot be imported: {error}."
        raise InvalidCatalog(message, "Install the extra that brings it, or correct the entry.") from error
    return found


def license_policy() -> Policy:
    """What this installation may use: $LICENSE_POLICY, `any` (the default) or `commercial`."""
    chosen = os.environ.get(POLICY_VARIABLE, "any")
    if chosen == "any":
        return "any"
    if chosen == "commercial":
        return "commercial"
    raise InvalidCatalog(f"{POLICY_VARIABLE} is {chosen!r}.", "Set it to `any` or to `commercial`.")


def refuse_licence(entry: Entry, policy: Policy) -> None:
    """Raises LicenseRefused if the policy is `commercial` and the entry's licence does not allow commercial use."""
    if policy == "commercial" and not entry.licence.commercial:
        raise LicenseRefused(f"{entry.id} is under {entry.licence.name}, which does not allow commercial use.")


def load_catalog(path: Path = CATALOG_PATH) -> Catalog:
    """Reads and checks a catalogue and merges the pins it names. Raises InvalidCatalog, which names the file and the field."""
    catalog = _read(path, Catalog)
    pins = [_read(path.parent / name, Pins) for name in catalog.pins]
    if not pins:
        return catalog
    models = {}
    for name, entry in catalog.models.items():
        weights = dict(entry.weights)
        for pin in pins:
            weights = {part: pin.fill(weight) for part, weight in weights.items()}
        models[name] = entry.model_copy(update={"weights": weights})
    return catalog.model_copy(update={"models": models})


_Model = TypeVar("_Model", bound=BaseModel)


def _read(path: Path, kind: type[_Model]) -> _Model:
    try:
        return kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidCatalog(f"{path} is not a valid {kind.__name__.lower()} file: {error}") from error


def _unknown(kind: str, name: str, known: Iterable[str]) -> UnknownModel:
    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    offer = f"Did you mean {_either(close)}?" if close else f"There are: {', '.join(names) or 'none'}."
    return UnknownModel(f"There is no {kind} {name!r} in the catalogue.", offer, {"close_matches": close})


def _either(names: list[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
