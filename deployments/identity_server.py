"""IdentityServer: people in, identity tokens out, by every method that is deployed. See deployments/identity/."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

from deployments.catalog import load_catalog
from deployments.contracts import Identities, IdentityRequest, IdentityTokens, People, Person
from deployments.errors import InvalidRequest, UnsupportedCombination
from deployments.hardware import TorchSettings, claim
from deployments.identity.token_cache import KEPT_S

if TYPE_CHECKING:
    from deployments.identity.base import IdentityEncoder


class IdentityServer:
    def __init__(self, methods: Sequence[str], settings: TorchSettings) -> None:
        """methods: ids of identity entries of the catalogue; each encoder is loaded here."""
        dtype = claim(settings)
        catalog = load_catalog()
        entries = [catalog.entry(method) for method in methods]
        self._encoders: dict[str, IdentityEncoder] = {}
        for entry in entries:
            adapter, image_encoder = (entry.located(part) for part in ("adapter", "image_encoder"))
            encoder = catalog.part(entry, "encoder")
            own = cast(Mapping[str, Any], entry.options.get("encoder", {}))
            self._encoders[entry.family] = encoder(adapter, image_encoder, settings.device, dtype, model=entry.id, **own)
        self._turn = Lock()

    def encode(self, people: People, requests: Sequence[IdentityRequest]) -> Identities:
        """Tokens of person k for request k.

        Raises UnsupportedCombination for a method that is not deployed here, InvalidRequest naming a person whose references disagree.
        """
        if len(people.persons) != len(requests):
            raise ValueError(f"{len(people.persons)} people came for {len(requests)} requests; give one for each.")
        started = time.perf_counter()
        with self._turn:
            tokens = tuple(self._encoded(number, people.persons, request) for number, request in enumerate(requests))
        return Identities(tokens, {**people.seconds, "identity": time.perf_counter() - started})

    def forget(self, older_than: float = 0.0) -> None:
        """Drops what this replica remembers of faces since more than so many seconds; everything, by default."""
        for encoder in self._encoders.values():
            encoder.forget(older_than)

    def check_health(self) -> None:
        """Serve asks every ten seconds, each replica for itself: an idle one forgets too."""
        self.forget(KEPT_S)

    def ready(self) -> bool:
        return True

    def _encoded(self, number: int, persons: Sequence[Person], request: IdentityRequest) -> IdentityTokens:
        try:
            return self._encoder(request).encode(persons[number], request)
        except InvalidRequest as error:
            whose = f"Person {number}: " if len(persons) > 1 else ""
            raise InvalidRequest(f"{whose}{error.message}", error.remedy, {**error.details, "person": number}) from error

    def _encoder(self, request: IdentityRequest) -> IdentityEncoder:
        if request.method not in self._encoders:
            there = ", ".join(self._encoders) or "none"
            raise UnsupportedCombination(f"{request.method} is not deployed on this server.", f"Deployed are: {there}.")
        return self._encoders[request.method]
