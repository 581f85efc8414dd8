"""The two halves of an identity method, as the rest of the house sees them.

An encoder turns a person into tokens, far from the denoiser and once a person; an adapter lets a transformer read such tokens. What
passes between the halves is `IdentityTokens`. Knows no method and no schedule: when an identity acts is the denoise loop's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.contracts import IdentityRequest, IdentityTokens, Person

Condition = tuple[Any, ...]
"""One identity, or several (`+` of tuples), as the blocks of a transformer read it; opaque to all but the adapter that made it."""


class IdentityEncoder(Protocol):
    """The encoder half: one for each file of weights, used by one thread at a time."""

    def encode(self, person: Person, request: IdentityRequest) -> IdentityTokens:
        """All reference pictures of a person, as one set of tokens; what nobody would give lies beside them."""
        ...

    def forget(self, older_than: float = 0.0) -> None:
        """Drops what it remembers of faces and pictures since more than so many seconds; everything, by default. From any thread."""
        ...


class IdentityAdapter(Protocol):
    """The denoiser half, attached to a transformer from construction to `eject`.

    It holds weights and no identity: what belongs to a request is in its conditions, which travel with every call.
    """

    @property
    def key(self) -> str:
        """The item of `joint_attention_kwargs` under which the sum of all conditions travels. Adapters may share one."""
        ...

    def condition(self, tokens: Tensor, request: IdentityRequest, mask: Tensor | None = None) -> Condition:
        """What the blocks read: keys and values, computed here and once a request, and the request's weight.

        tokens: [1, n, width] of `IdentityTokens`, on any device. mask: what each of the picture's tokens takes of this person, [1, s, 1]
        in the transformer's type and on its device; None: all. Raises InvalidRequest for options that the method does not know.
        """
        ...

    def eject(self) -> None:
        """Leaves the transformer as it was before. Adapters go in the reverse of the order in which they came."""
        ...
