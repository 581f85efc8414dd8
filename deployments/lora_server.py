"""LoraServer: keeps the LoRAs of owners, after each was read and fitted to the base model. See deployments/store/ and denoisers/lora/.

Holds no weights: the transformer lies on the meta device. Draws nothing, and knows no scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING

from deployments.catalog import Entry, load_catalog
from deployments.errors import InvalidCatalog, InvalidLora, LoraIncompatible, UnsupportedCombination
from deployments.store.loras import TRIGGER_CHARACTERS, LoraFile, LoraInfo, LoraStore, labelled
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from deployments.weights import WeightFolder, locate

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from deployments.denoisers.lora.weights import LoraFacts

_CONFIG = ("transformer", "config.json")
# Where trainers write what calls a LoRA up: our own, and ModelSpec (kohya, OneTrainer).
_TRIGGER_KEYS = ("trigger_word", "modelspec.trigger_phrase")
_FAMILIES = ("flux1",)


class LoraServer:
    def __init__(self, base: str, settings: StoreSettings, max_bytes: int = 2**30) -> None:
        """base: the catalogue's id of the model that LoRAs are checked against. max_bytes: of a file. Brings the database up to date and
        removes what dying processes left in the folder."""
        self._entry = load_catalog().entry(base)
        if self._entry.family not in _FAMILIES:
            raise UnsupportedCombination(f"{base} is a {self._entry.family}, whose LoRAs cannot be read here.", "Use a FLUX base model.")
        self._max_bytes = max_bytes
        self._transformer: FluxTransformer2DModel | None = None
        self._turn = Lock()
        migrate(settings.database)
        self._store = LoraStore(settings.database, settings.files)
        self._store.sweep()

    def add(self, content: bytes, name: str, owner: str, trigger_word: str | None = None, description: str = "") -> LoraInfo:
        """content: a safetensors file. Nothing of it is kept unless all of it fits. trigger_word: if None, what the file itself says.

        Raises InvalidRequest for what the owner says of it, InvalidLora and LoraIncompatible for the file.
        """
        labels = labelled(name, trigger_word, description)
        if len(content) > self._max_bytes:
            raise InvalidLora(
                f"{labels.name} has {len(content)} bytes, at most {self._max_bytes} are kept.", "Send a LoRA of a lower rank."
            )
        with self._store.arriving(content) as arrival:
            facts = self._read(arrival.path, labels.name)
            if labels.trigger_word is None:
                labels = replace(labels, trigger_word=_trigger_word(facts.metadata))
            return self._store.keep(arrival, owner, labels, _file(facts, self._entry))

    def list(self, owner: str) -> tuple[LoraInfo, ...]:
        """The owner's, the newest first."""
        return self._store.list(owner)

    def get(self, id: str, owner: str) -> LoraInfo:
        """Raises LoraNotFound, also for another owner's."""
        return self._store.get(id, owner)

    def find(self, ids: Sequence[str], owner: str) -> tuple[LoraInfo, ...]:
        """Those of a request, in its order. Raises LoraNotFound, and LoraIncompatible for one of another family of base models. (Whether
        its shapes are those of another model of the family, the denoiser finds when it reads it.)"""
        found = self._store.find(ids, owner)
        for info in found:
            if info.family != self._entry.family:
                message = f"The LoRA {info.id} ({info.name}) is for {info.base}, and this server draws with {self._entry.id}."
                raise LoraIncompatible(message, "Ask the server that draws with its base model.")
        return found

    def delete(self, id: str, owner: str) -> str:
        """Returns the sha256 of its file, which is gone too unless somebody else has it. Raises LoraNotFound."""
        return self._store.delete(id, owner)

    def path(self, sha256: str) -> Path:
        """Where the file of a LoRA that `find` named lies. Raises as `LoraStore.path`."""
        return self._store.path(sha256)

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        self._store.close()

    def _read(self, path: Path, source: str) -> LoraFacts:
        """One at a time: a file of the largest size is held in memory while it is read."""
        # Imports torch and diffusers, without which a store can be listed.
        from deployments.denoisers.lora.uploads import outline, read_uploaded

        with self._turn:
            if self._transformer is None:
                self._transformer = outline(_config(self._entry))
            return read_uploaded(path, self._transformer, source)


def _config(entry: Entry) -> Path:
    """The transformer's configuration in the pipeline folder of a base model; its weights need not be here. Raises InvalidCatalog."""
    folder = entry.weights.get("pipeline")
    files = folder.files if isinstance(folder, WeightFolder) else ()
    for file in files:
        if PurePosixPath(file.file).parts[-2:] == _CONFIG:
            return locate(file)
    raise InvalidCatalog(f"The entry {entry.id} names no {'/'.join(_CONFIG)} among the files of its pipeline.")


def _file(facts: LoraFacts, entry: Entry) -> LoraFile:
    low, high = facts.ranks
    return LoraFile(
        base=entry.id, family=entry.family, format=facts.format, keys=facts.keys, rank_low=low, rank_high=high, error=facts.error,
        metadata=facts.metadata,
    )  # fmt: skip


def _trigger_word(metadata: Mapping[str, str]) -> str | None:
    said = next((metadata[key].strip() for key in _TRIGGER_KEYS if key in metadata), "")
    return said if said and said.isprintable() and len(said) <= TRIGGER_CHARACTERS else None
