"""Says in a picture's file that a machine drew it: in words for people, in XMP for machines, and signed (C2PA) where a certificate is set.

The plain marks are part of what `deployments.images.encode` writes, the same for every picture, hence equal pictures stay equal files. A
signature has the time of signing in it and is put around the finished file. Knows no picture library, no model and no network.
"""

from __future__ import annotations

import re
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from deployments.errors import DeploymentFailed

Source = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
"""Terms of IPTC's vocabulary of digital source types: drawn by a model; or a camera's picture of which a model drew a part."""
Algorithm = Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]

SOFTWARE: Final = "Likeness (AI-generated)"
"""The text `Software` of PNG and EXIF."""
XMP_KEYWORD: Final = "XML:com.adobe.xmp"
"""The keyword of the iTXt chunk that XMP lies in (XMP specification, part 3, 1.1.5)."""
# cv.iptc.org/newscodes/digitalsourcetype; the address is the term's name, and http on purpose.
_VOCABULARY: Final = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_GENERATOR: Final = "Likeness"
# XMP specification, part 1, 7.3.2: the id is a constant; `r`, since nobody needs room to edit it in place.
_PACKET: Final = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="{software}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_SOURCE = re.compile(rb"""DigitalSourceType(?:="|[^<>]*>)\s*""" + re.escape(_VOCABULARY).encode() + rb"""([A-Za-z]+)""")
_MEDIA: Final = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def xmp(source: Source) -> str:
    """The XMP packet that names the source. Every byte of it is constant."""
    return _PACKET.format(source=_VOCABULARY + source, software=SOFTWARE)


def source_of(packet: bytes) -> str | None:
    """The term that an XMP packet names, ours or another program's; None where it names none of IPTC's."""
    found = _SOURCE.search(packet)
    return found[1].decode("ascii") if found else None


class ProvenanceSettings(BaseModel):
    """c2pa_certificate: a PEM file, the signer's certificate first, then those above it. c2pa_key: the signer's key (PEM, PKCS 8), readable
    by the server alone. Both or neither. c2pa_algorithm: what the key is for. c2pa_timestamp_url: a time-stamping authority (RFC 3161);
    each picture is then told to it by its hash, and signing waits for its answer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    c2pa_certificate: Path | None = None
    c2pa_key: Path | None = None
    c2pa_algorithm: Algorithm = "es256"
    c2pa_timestamp_url: str | None = None

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.c2pa_certificate is None) != (self.c2pa_key is None):
            raise ValueError("c2pa_certificate and c2pa_key belong together; give both or neither")
        return self


class PictureSigner:
    """Signs finished files with a C2PA manifest. Thread-safe: every file has a builder and a signer of its own."""

    def __init__(self, settings: ProvenanceSettings) -> None:
        """Raises DeploymentFailed where the library c2pa-python or one of the files is missing, or they do not make a signer."""
        if settings.c2pa_certificate is None or settings.c2pa_key is None:
            raise ValueError("There is nothing to sign with: c2pa_certificate and c2pa_key are not set.")
        try:
            self._c2pa: Any = import_module("c2pa")
        except (ImportError, OSError, AttributeError) as error:
            message = "The settings ask for signed pictures (c2pa_certificate), and c2pa-python cannot be imported."
            raise DeploymentFailed(message, "Install it (`pip install c2pa-python`), or leave c2pa_certificate out.") from error
        self._algorithm, self._timestamps = settings.c2pa_algorithm.encode(), (settings.c2pa_timestamp_url or "").encode()
        self._certificate, self._key = _read(settings.c2pa_certificate, "c2pa_certificate"), _read(settings.c2pa_key, "c2pa_key")
        try:
            self._signer().close()
        except self._c2pa.C2paError as error:
            message = f"{settings.c2pa_certificate} and {settings.c2pa_key} make no C2PA signer: {error}"
            raise DeploymentFailed(message, "Set a certificate chain, its key and the algorithm of that key.") from error

    def signed(self, data: bytes, format: Literal["png", "jpeg", "webp"], source: Source = "trainedAlgorithmicMedia") -> bytes:
        """The same file with a signed manifest in it. Its marks, parameters and pixels stay as they were; two signatures of a file differ.

        Raises DeploymentFailed where the certificate is not one that C2PA lets sign, or has run out.
        """
        finished = BytesIO()
        try:
            with self._signer() as signer, self._settings() as context, self._c2pa.Builder(_manifest(source), context) as builder:
                builder.sign(signer, _MEDIA[format], BytesIO(data), finished)
        except self._c2pa.C2paError as error:
            message = f"The picture could not be signed: {error}"
            raise DeploymentFailed(
                message, "Set a certificate for signing documents that is valid now, or leave c2pa_certificate out."
            ) from error
        return finished.getvalue()

    def _settings(self) -> Any:
        """Without the library's own picture of the picture: it makes a file up to 2 MB larger."""
        return self._c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})

    def _signer(self) -> Any:
        information = self._c2pa.C2paSignerInfo(self._algorithm, self._certificate, self._key, self._timestamps or None)
        return self._c2pa.Signer.from_info(information)


def signer_of(settings: ProvenanceSettings) -> PictureSigner | None:
    """None where no certificate is set. Raises as PictureSigner does."""
    return PictureSigner(settings) if settings.c2pa_certificate is not None else None


def _manifest(source: Source) -> dict[str, Any]:
    """C2PA specification 2.1, 18.15: a picture begins with the action that made it."""
    action = {"action": "c2pa.created", "digitalSourceType": _VOCABULARY + source, "softwareAgent": {"name": _GENERATOR}}
    return {
        "claim_generator_info": [{"name": _GENERATOR}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DeploymentFailed(
            f"{path} ({setting}) cannot be read: {error.strerror}.", "Correct the path, or leave the setting out."
        ) from error
