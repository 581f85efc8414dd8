"""GateServer: pictures in, nothing or a refusal out. onnxruntime only; no torch in this process.

A thin Ray server: what is judged is deployments/safety/. Its methods are synchronous, so that Serve runs them in `max_ongoing_requests`
threads. Keeps no picture, and logs what was found of one, never the picture.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deployments.catalog import load_catalog
from deployments.contracts import RGB
from deployments.errors import InvalidCatalog, ModeratedInput, ModeratedOutput
from deployments.images import DEFAULT_LIMITS, Limits, decode
from deployments.safety.gate import Finding, GateSettings

if TYPE_CHECKING:
    from deployments.safety.gate import Gate

_LOG = logging.getLogger("likeness")


class GateServer:
    def __init__(self, settings: GateSettings, limits: Limits = DEFAULT_LIMITS) -> None:
        """limits: of the pictures that are opened here. Without a model everything passes. Raises InvalidCatalog for an entry of another
        role and for labels that it does not have, LicenseRefused, and what opening the model raises."""
        self._settings, self._limits = settings, limits
        self._gate = None if settings.model is None else _gate(settings, settings.model)

    def check(self, pictures: Sequence[RGB]) -> tuple[Finding | None, ...]:
        """One a picture; None passes."""
        return (None,) * len(pictures) if self._gate is None else tuple(self._gate.check(pictures))

    def admit(self, pictures: Sequence[bytes]) -> None:
        """Judges pictures as they came. Raises ModeratedInput for the first that is refused, InvalidImage for one that is none."""
        if self._gate is None or not self._settings.input:
            return
        for index, data in enumerate(pictures):
            (finding,) = self.check([decode(data, self._limits)])
            if finding is not None:
                _LOG.info("a picture was not let in: %s, %.3f", finding.label, finding.score)
                raise ModeratedInput(f"A picture was not let in: {finding.label}.", None, {"picture": index, "label": finding.label})

    def release(self, pictures: Sequence[RGB]) -> None:
        """Judges what was drawn. Raises ModeratedOutput for the first that is refused."""
        if self._gate is None or not self._settings.output:
            return
        for index, finding in enumerate(self.check(pictures)):
            if finding is not None:
                _LOG.info("a drawn picture was not let out: %s, %.3f", finding.label, finding.score)
                raise ModeratedOutput(
                    f"A drawn picture was not let out: {finding.label}.", None, {"picture": index, "label": finding.label}
                )

    def ready(self) -> bool:
        return True


def _gate(settings: GateSettings, model: str) -> Gate:
    """What the entry names. Raises LicenseRefused before anything is opened."""
    from deployments.safety.gate import ThresholdGate

    catalog = load_catalog()
    entry = catalog.entry(model)
    if entry.role != "gate":
        raise InvalidCatalog(f"The content gate is to be {model}, whose role is {entry.role}.", "Set a model of role gate.")
    kind: Any = catalog.resolve(entry)
    files = {name: entry.located(name) for name in entry.weights}
    return ThresholdGate(kind(files, entry.options, settings.provider, settings.threads), settings.refuse)
