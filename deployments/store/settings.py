"""Where the store is: a database by URL, and a folder of files. Imports no database library and opens nothing."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict

STORE_ROOT_VARIABLE = "LIKENESS_STORE"
EVERYBODY = "local"
"""The owner of everything on a server that tells nobody apart."""


class StoreSettings(BaseModel):
    """url: `sqlite:////absolute/path.db`, or `postgresql://user:password@host/name` (the extra `postgres`). folder: absolute; with several
    machines one that they share. artifacts: the files of jobs, an absolute path or whatever fsspec reaches (`s3://bucket/folder`); with
    several machines one that they share. What is left out lies beneath `store_root()`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    folder: Path | None = None
    artifacts: str | None = None

    @property
    def database(self) -> str:
        return self.url if self.url is not None else f"sqlite:///{store_root() / 'likeness.db'}"

    @property
    def files(self) -> Path:
        return self.folder if self.folder is not None else store_root()

    @property
    def artifacts_url(self) -> str:
        return self.artifacts if self.artifacts is not None else str(self.files / "artifacts")


def store_root() -> Path:
    """The folder of the embedded store: $LIKENESS_STORE, else `out/store/` of this repository."""
    chosen = os.environ.get(STORE_ROOT_VARIABLE)
    return Path(chosen).absolute() if chosen else Path(__file__).resolve().parents[2] / "out" / "store"
