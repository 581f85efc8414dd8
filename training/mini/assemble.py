"""From a workspace to a pack: the stages' results in the layouts that stock libraries open."""

from __future__ import annotations

from pathlib import Path

from training.mini.workspace import Workspace


def refuse_existing_pack(out: Path, overwrite: bool) -> None:
    """Raises FileExistsError if `out` holds anything and may not be overwritten."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} already holds a pack; pass --overwrite to replace it, or choose another --out")


def assemble(workspace: Workspace, out: Path, overwrite: bool) -> None:
    raise FileNotFoundError("not yet")
