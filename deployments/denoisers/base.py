"""What every family of denoisers is to its server: one method, which draws one picture and can be stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from deployments.contracts import Drawn, GenerationSpec, Guides, IdentityTokens, Progress, PromptEmbeds
from deployments.denoisers.lora.cache import CacheCounts

OnStep = Callable[[Progress], None]
"""Called in the drawing thread after every step; what it does delays the next one."""
Cancelled = Callable[[], bool]
"""Whether nobody wants the picture any more; asked before every forward, so it must be quick."""


NO_GUIDES = Guides()


def ignored(progress: Progress) -> None:
    """Where nobody watches."""


def never() -> bool:
    """Where nobody can cancel."""
    return False


class Denoiser(Protocol):
    """One base model with the adapters that were attached to it. Draws one picture at a time; a second thread waits its turn."""

    @property
    def lora_counts(self) -> CacheCounts:
        """Of the LoRAs that are kept between requests."""
        ...

    def draw(
        self,
        spec: GenerationSpec,
        embeds: PromptEmbeds,
        identities: Sequence[IdentityTokens] = (),
        guides: Guides = NO_GUIDES,
        *,
        on_step: OnStep = ignored,
        cancelled: Cancelled = never,
        previews: int = 0,
    ) -> Drawn:
        """The picture of a spec. The same spec and inputs give the same pixels, whatever was drawn before.

        embeds: row 0 is the prompt, row 1 (only if `spec.needs_negative`) the negative prompt. identities: one for each of
        `spec.identities`, in their order. guides: the pictures that lead the drawing, as many as the spec asks for. Decoding is the
        last step that is reported. previews: so many steps, at most, bring a small picture of what is coming; the picture is the same.
        Raises Cancelled: no forward starts after `cancelled` has said so. Raises InvalidRequest and UnsupportedCombination before
        anything is computed.
        """
        ...
