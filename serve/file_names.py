"""What a thing with a name of its owner's is called as a file, and how a header says that. Touches no file, and knows no thing."""

from __future__ import annotations

import re
from urllib.parse import quote

# Separators of folders, and what some system does not take in a file's name.
_REFUSED = frozenset('/\\<>:"|?*')
# Of the 255 that file systems take; the rest is for an ending, and for that of a file which is still coming.
_BYTES = 180
_UNNAMED = "unnamed"


def file_name(name: str, ending: str) -> str:
    """A name of one part that lies in no other folder, is not hidden and fits any file system. ending: `.safetensors`, say; given once."""
    spelt = "".join(letter if letter.isprintable() and letter not in _REFUSED else "_" for letter in name.removesuffix(ending))
    cut = spelt.strip(" .").encode()[:_BYTES].decode(errors="ignore").rstrip(" .")
    return f"{cut or _UNNAMED}{ending}"


def attachment(filename: str) -> str:
    """The header content-disposition: the name in ASCII, and as it is for whoever reads RFC 6266."""
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", filename)
    exact = f"; filename*=UTF-8''{quote(filename, safe='')}" if plain != filename else ""
    return f'attachment; filename="{plain}"{exact}'
