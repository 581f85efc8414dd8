"""What an identity method adds to the picture's tokens inside the blocks of a FLUX transformer.

Steered by one item of `joint_attention_kwargs`, so that whatever belongs to a request travels with the call and never rests on the
model. Knows nothing of any method: a method hands over one function a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

# (picture tokens [n, s, width] as the block leaves them, the call's item) -> what is added to them
Residual = Callable[[Tensor, Any], Tensor]
_ARGUMENT = "joint_attention_kwargs"
# Where gradient checkpointing, which passes everything by position, puts that argument of a block.
_POSITION = 4


class _BlockHook(ModelHook):
    """Runs inside a block's forward: takes the item out of the arguments, and adds the residual to the picture's tokens.

    A block without a residual has a hook too, because an attention processor that meets an item it does not know logs a warning.
    """

    def __init__(self, key: str, residual: Residual | None) -> None:
        super().__init__()
        self.key = key
        self.residual = residual

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        args, kwargs, item = _take(self.key, args, kwargs)
        text, image = cast(Any, self.fn_ref).original_forward(*args, **kwargs)
        if self.residual is not None and item is not None:
            image = image + self.residual(image, item)
        return text, image


def _take(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments of a block without the item, and the item. The caller's own dictionary is left as it is."""
    by_position = len(args) > _POSITION
    items = args[_POSITION] if by_position else kwargs.get(_ARGUMENT)
    if not items or key not in items:
        return args, kwargs, None
    rest = {name: value for name, value in items.items() if name != key}
    if by_position:
        return (*args[:_POSITION], rest, *args[_POSITION + 1 :]), kwargs, items[key]
    return args, {**kwargs, _ARGUMENT: rest}, items[key]


class BlockResiduals:
    """Residuals in force on a transformer, from construction to `eject`.

    The hooks are innermost: what a cache or a ControlNet sees of a block includes the residual. (Outside of a first-block cache it
    would be counted twice.) Hence they come before any cache or offload of the blocks, and go after it.
    """

    def __init__(self, transformer: FluxTransformer2DModel, key: str, residuals: Sequence[Residual | None]) -> None:
        """residuals: one a block, double blocks first. Raises ValueError if their number differs, or if blocks have other hooks."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        blocks: list[nn.Module] = [*model.transformer_blocks, *model.single_transformer_blocks]
        if len(residuals) != len(blocks):
            raise ValueError(f"{key}: {len(residuals)} residuals for {len(blocks)} blocks; give one (or None) for each block.")
        foreign = {name for block in blocks for name, hook in _hooks(block).items() if not isinstance(hook, _BlockHook)}
        if foreign:
            raise ValueError(f"{key}: the blocks already have the hooks {sorted(foreign)}; inject before caches and offloads are enabled.")
        if any(key in _hooks(block) for block in blocks):
            raise ValueError(f"{key}: already injected into this transformer; eject the former injection first.")
        self._transformer, self._key, self._blocks = transformer, key, blocks
        for block, residual in zip(blocks, residuals, strict=True):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(_BlockHook(key, residual), key)

    def eject(self) -> None:
        """Leaves the transformer as it was. Raises ValueError while hooks that came later stand on these, and when called twice."""
        above = {name for block in self._blocks for name in list(_hooks(block))[list(_hooks(block)).index(self._key) + 1 :]}
        if above:
            raise ValueError(f"{self._key}: the hooks {sorted(above)} were added later; remove them first (disable_cache, or their eject).")
        if not self._blocks:
            raise ValueError(f"{self._key}: ejected already.")
        for block in self._blocks:
            _remove(block, self._key)
        if hasattr(self._transformer, "_diffusers_hook"):
            self._transformer._diffusers_hook.invalidate_child_registries_cache()
        self._blocks = []


def _hooks(block: nn.Module) -> dict[str, ModelHook]:
    """The hooks of a block by name, innermost first."""
    registry = getattr(block, "_diffusers_hook", None)
    return registry.hooks if isinstance(registry, HookRegistry) else {}


def _remove(block: nn.Module, key: str) -> None:
    """diffusers leaves an empty registry and an instance attribute `forward` behind; these go too if nothing else needs them."""
    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.remove_hook(key, recurse=False)
    if registry.hooks:
        return
    del block._diffusers_hook
    if getattr(block.forward, "__func__", None) is type(block).forward:
        del block.forward
