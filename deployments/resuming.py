"""A large file of the hub, fetched so that a later process goes on where an earlier one was cut.

huggingface_hub resumes within one process only: each writes a temporary file of its own and removes it when it fails (its pull request
4228). Here the part that has arrived stays beside the blobs of the cache under the file's checksum, and becomes the blob when it is
whole; `hf_hub_download` then finds it and links it. Knows no catalogue.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

from filelock import FileLock

# huggingface_hub writes down ten million bytes at a time: of less, nothing would be left to go on from.
RESUMED_FROM_BYTES = 20_000_000


def fetch_blob(repo: str, file: str, revision: str | None, token: str | None) -> None:
    """Puts the content of a file into the cache of huggingface_hub, unless it is small or there already.

    Raises what huggingface_hub raises; what has arrived until then is kept. Plain HTTP with ranges, also where the repo offers Xet.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils._headers import build_hf_headers

    url = hf_hub_url(repo, file, revision=revision)
    facts = get_hf_file_metadata(url, token=token)
    if facts.etag is None or facts.size is None or facts.size < RESUMED_FROM_BYTES:
        return
    blob = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs" / facts.etag
    part = blob.with_name(f"{blob.name}.part")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):
        if blob.exists():
            return
        headers = build_hf_headers(token=token)
        if urlparse(facts.location).netloc != urlparse(url).netloc:
            headers.pop("authorization", None)  # the token is the hub's, not its storage's
        part.touch()
        with part.open("r+b") as stream:  # not "ab": the library goes back to the start where a server ignores the range
            here = stream.seek(0, 2)
            if here > facts.size:
                here = stream.seek(0)
                stream.truncate()
            http_get(facts.location, stream, resume_size=here, headers=headers, expected_size=facts.size, displayed_filename=file)
        part.replace(blob)
