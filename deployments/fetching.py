"""From a catalogue entry to its files in the Hugging Face cache: which are needed, how large they are, and the fetching itself.

Only `likeness models pull` calls this; what serves never has a network. Resumable (deployments/resuming.py),
verified: against the catalogue's sha256 and size where they are pinned, else against the hub's own checksum of the file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deployments.catalog import Catalog, Entry, Licence
from deployments.conversion.table import Conversion, making
from deployments.errors import DamagedWeights, FetchFailed, WeightsError
from deployments.resuming import fetch_blob
from deployments.weights import WeightFile, WeightFolder, sha256_of

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGINGFACE_TOKEN")
# The hub names a file that it keeps in LFS or Xet by its sha256, others by git's sha1.
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Wanted:
    """One published file. model: the entry, or the conversion, that wants it; conversion: what is to be made of it then, if anything."""

    model: str
    file: WeightFile
    licence: Licence
    conversion: str | None = None


def needed_by(catalog: Catalog, base: Entry) -> list[Entry]:
    """A base model and all that fits it: identity methods, faces, parser, judge. Other models stand for themselves."""
    return [base, *(entry for entry in catalog.models.values() if base.role == "base" and base.id in entry.fits)]


def wanted(entries: Iterable[Entry], conversions: Mapping[str, Conversion]) -> list[Wanted]:
    """The published files of these entries, each once; for a file that is made here, its source. Files of the repository need nothing."""
    found: dict[tuple[str, str], Wanted] = {}
    for entry in entries:
        for file in _files(entry):
            made = making(conversions, file)
            if made is not None:
                name, conversion = made
                found.setdefault(
                    (conversion.source.repo, conversion.source.file), Wanted(name, conversion.source, conversion.licence, name)
                )
            elif not file.local:
                found.setdefault((file.repo, file.file), Wanted(entry.id, file, entry.licence))
    return list(found.values())


def size_of(file: WeightFile) -> int | None:
    """Bytes, as pinned or as the hub says; None where the hub doesn't say. Raises FetchFailed where it cannot be asked."""
    if file.bytes is not None:
        return file.bytes
    from huggingface_hub import hf_hub_download

    with _told(file):
        return hf_hub_download(file.repo, file.file, revision=file.revision, token=token(), dry_run=True).file_size


def is_here(file: WeightFile) -> bool:
    """Whether the file lies in the cache already, whole; its checksum is not looked at."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(file.repo, file.file, revision=file.revision), str)


def fetch(file: WeightFile) -> Path:
    """The file in the cache, fetched or found there, and verified.

    Raises FetchFailed: no network, no permission, no such file, a full disk. A file of other bytes than the pinned ones is deleted, and
    DamagedWeights raised: the next call fetches it anew.
    """
    from huggingface_hub import hf_hub_download

    with _told(file):
        if not is_here(file):
            fetch_blob(file.repo, file.file, file.revision, token())
        path = Path(hf_hub_download(file.repo, file.file, revision=file.revision, token=token()))
    _verify(file, path)
    return path


def token() -> str | None:
    """The hub's access token out of the environment; None lets the library use a stored login."""
    return next((value for name in TOKEN_VARIABLES if (value := os.environ.get(name))), None)


def conversions_due(wanted_files: Iterable[Wanted], conversions: Mapping[str, Conversion]) -> list[str]:
    """Names of the conversions whose source is among the files and whose target is not there yet."""
    return [item.conversion for item in wanted_files if item.conversion and not conversions[item.conversion].target_path.is_file()]


def _files(entry: Entry) -> Iterator[WeightFile]:
    for weight in entry.weights.values():
        yield from weight.files if isinstance(weight, WeightFolder) else (weight,)


def _verify(file: WeightFile, path: Path) -> None:
    blob = path.resolve()
    expected = file.sha256 or (blob.name if _SHA256.fullmatch(blob.name) else None)
    wrong = None
    if file.bytes is not None and blob.stat().st_size != file.bytes:
        wrong = f"has {blob.stat().st_size} bytes instead of {file.bytes}"
    elif expected is not None and (found := sha256_of(blob)) != expected:
        wrong = f"has the sha256 {found} instead of {expected}"
    if wrong:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        message = f"{file.file} of {file.repo} {wrong}; it was deleted."
        raise DamagedWeights(
            message, "Run the command again; if it happens twice, the published file is not the one that the catalogue means."
        )


@contextmanager
def _told(file: WeightFile) -> Iterator[None]:
    """The library's errors as ours, with what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    what = f"{file.file} of {file.repo}"
    try:
        yield
    except WeightsError:
        raise
    except GatedRepoError as error:
        page = f"https://huggingface.co/{file.repo}"
        raise FetchFailed(
            f"{what} is given to those who accepted its licence.", f"Accept it at {page}, then set {TOKEN_VARIABLES[0]}."
        ) from error
    except RepositoryNotFoundError as error:
        remedy = f"Check the catalogue's entry; for a private repo set {TOKEN_VARIABLES[0]}."
        raise FetchFailed(f"{what}: there is no such repo, or this account may not see it.", remedy) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise FetchFailed(f"{what} cannot be fetched: {_first_line(error)}") from error
    except EntryNotFoundError as error:
        raise FetchFailed(f"{what} is not in revision {file.revision or 'main'}.", "Correct the catalogue's entry.") from error
    except OSError as error:  # the library's errors of transport and of HTTP are of this family too
        if error.errno == errno.ENOSPC:
            raise FetchFailed(f"The disk is full: {what} does not fit.", "Free some, or let HF_HOME name a larger one.") from error
        raise FetchFailed(f"{what} cannot be fetched: {_first_line(error)}") from error
    except Exception as error:
        # Errors of its HTTP library, which has changed before and may again: told apart by where they come from.
        if type(error).__module__.partition(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "huggingface_hub"}:
            raise FetchFailed(f"{what} cannot be fetched: {_first_line(error)}") from error
        raise


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__).rstrip(".") + "."
