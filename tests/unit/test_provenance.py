"""That a picture says a machine drew it: read by Pillow and by a parser of this file's own; and signed, where c2pa-python is there."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ET
import zlib
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from deployments.errors import DeploymentFailed
from deployments.images import Format, decode, drawn_by, encode, parameters_of
from deployments.provenance import SOFTWARE, PictureSigner, ProvenanceSettings, Source, signer_of, source_of, xmp

FORMATS, SOURCES = get_args(Format), get_args(Source)
RECIPE = {"prompt": "Ada „im Regen“", "seed": 7}
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
TERM = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"


def packet_of(data: bytes) -> bytes | None:
    """The XMP packet, found by the formats' own structure, independently of what wrote it."""
    if data[:4] == b"\x89PNG":
        for kind, body in _png_chunks(data):
            if kind == b"iTXt" and body.startswith(b"XML:com.adobe.xmp\0\0\0\0\0"):
                return body[len(b"XML:com.adobe.xmp\0\0\0\0\0") :]
    elif data[:2] == b"\xff\xd8":
        place, opening = 2, b"http://ns.adobe.com/xap/1.0/\0"
        while data[place] == 0xFF and data[place + 1] != 0xDA:
            length = struct.unpack(">H", data[place + 2 : place + 4])[0]
            body = data[place + 4 : place + 2 + length]
            if data[place + 1] == 0xE1 and body.startswith(opening):
                return body[len(opening) :]
            place += 2 + length
    elif data[:4] == b"RIFF":
        place = 12
        while place + 8 <= len(data):
            kind, length = data[place : place + 4], struct.unpack("<I", data[place + 4 : place + 8])[0]
            if kind == b"XMP ":
                return data[place + 8 : place + 8 + length]
            place += 8 + length + length % 2
    return None


def _png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place < len(data):
        length = struct.unpack(">I", data[place : place + 4])[0]
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        assert zlib.crc32(kind + body) == struct.unpack(">I", data[place + 8 + length : place + 12 + length])[0]
        chunks.append((kind, body))
        place += 12 + length
    return chunks


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_file_names_its_source_in_well_formed_xmp(format: Format, source: Source) -> None:
    data = encode(PIXELS, format, RECIPE, source=source)
    packet = packet_of(data)
    assert packet is not None
    (description,) = ET.fromstring(packet.decode()).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description.attrib[_IPTC] == f"http://cv.iptc.org/newscodes/digitalsourcetype/{source}"
    assert description.attrib["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == SOFTWARE
    assert drawn_by(data) == source
    assert parameters_of(data) == RECIPE, "the mark stands beside the recipe, not in its place"


@pytest.mark.parametrize("format", FORMATS)
def test_people_read_it_too(format: Format) -> None:
    with Image.open(BytesIO(encode(PIXELS, format))) as image:
        said = image.info["Software"] if format == "png" else image.getexif()[0x0131]
    assert said == SOFTWARE and "AI-generated" in said


@pytest.mark.parametrize("format", FORMATS)
def test_the_mark_changes_no_pixel_and_no_two_files_of_one_picture_differ(format: Format) -> None:
    marked, plain = encode(PIXELS, format, RECIPE), encode(PIXELS, format, RECIPE, source=None)
    assert (decode(marked) == decode(plain)).all()
    assert marked == encode(PIXELS, format, RECIPE) and marked != plain
    assert drawn_by(plain) is None and packet_of(plain) is None and SOFTWARE.encode() not in plain
    assert len(marked) - len(plain) < 1000


def test_the_mark_of_another_program_is_read_whichever_way_it_is_written() -> None:
    assert source_of(xmp("trainedAlgorithmicMedia").encode()) == "trainedAlgorithmicMedia"
    assert source_of(f"<Iptc4xmpExt:DigitalSourceType>\n{TERM}</Iptc4xmpExt:DigitalSourceType>".encode()) == "trainedAlgorithmicMedia"
    assert source_of(b'<x DigitalSourceType="http://example.com/else"/>') is None
    assert source_of(b"") is None


def test_half_a_signature_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="belong together"):
        ProvenanceSettings(c2pa_certificate=tmp_path / "a.pem")
    assert signer_of(ProvenanceSettings()) is None
    with pytest.raises(DeploymentFailed, match=r"cannot be read|c2pa-python cannot be imported"):
        signer_of(ProvenanceSettings(c2pa_certificate=tmp_path / "a.pem", c2pa_key=tmp_path / "b.pem"))


# From here on: signatures, with a chain of certificates made here.


@pytest.fixture(scope="module")
def c2pa() -> Any:
    return pytest.importorskip("c2pa", reason="c2pa-python is not installed: signed pictures are not tested")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> ProvenanceSettings:
    pytest.importorskip("cryptography", reason="the package cryptography makes the certificates")
    return _chain(tmp_path_factory.mktemp("certificates"), datetime.now(UTC) - timedelta(days=1))


def _chain(folder: Path, begins: datetime) -> ProvenanceSettings:
    """A root and a signer below it, as C2PA's profile of certificates asks (specification 2.1, 14.5.1)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Likeness"), x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def certificate(subject: str, key: Any, issuer: str, by: Any, authority: bool) -> x509.Certificate:
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "crl_sign", "encipher_only", "decipher_only"),
            False,
        )
        made = (
            x509.CertificateBuilder(
                name(issuer), name(subject), key.public_key(), x509.random_serial_number(), begins, begins + timedelta(days=30)
            )
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
        )
        if not authority:
            made = made.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        return made.sign(by, hashes.SHA256())

    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    both = [certificate("signer", leaf, "root", root, False), certificate("root", root, "root", root, True)]
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in both))
    (folder / "key.pem").write_bytes(leaf.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return ProvenanceSettings(c2pa_certificate=folder / "chain.pem", c2pa_key=folder / "key.pem")


def _read(c2pa: Any, data: bytes, format: Format) -> dict[str, Any]:
    with c2pa.Reader(f"image/{format}", BytesIO(data)) as reader:
        report: dict[str, Any] = json.loads(reader.json())
    return report


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_picture_is_the_same_picture_and_says_how_it_was_made(c2pa: Any, chain: ProvenanceSettings, format: Format) -> None:
    data = encode(PIXELS, format, RECIPE)
    signed = PictureSigner(chain).signed(data, format)
    assert (decode(signed) == decode(data)).all() and parameters_of(signed) == RECIPE
    assert drawn_by(signed) == "trainedAlgorithmicMedia" and len(signed) - len(data) < 40_000
    report = _read(c2pa, signed, format)
    manifest = report["manifests"][report["active_manifest"]]
    (actions,) = (item["data"]["actions"] for item in manifest["assertions"] if item["label"].startswith("c2pa.actions"))
    assert [(action["action"], action["digitalSourceType"]) for action in actions] == [("c2pa.created", TERM)]
    assert manifest["signature_info"]["alg"].lower() == "es256"
    # Ours is a certificate that nobody knows; nothing else is found wrong.
    assert {item["code"] for item in report.get("validation_status", [])} <= {"signingCredential.untrusted"}


@pytest.mark.parametrize("format", FORMATS)
def test_a_signed_picture_that_was_changed_is_found_out(c2pa: Any, chain: ProvenanceSettings, format: Format) -> None:
    data = bytearray(PictureSigner(chain).signed(encode(PIXELS, format), format))
    data[data.index(b"VP8 ") + 300 if format == "webp" else -200] ^= 1  # among the pixels
    codes = {item["code"] for item in _read(c2pa, bytes(data), format).get("validation_status", [])}
    assert "assertion.dataHash.mismatch" in codes


def test_what_cannot_sign_is_refused_at_the_start_or_by_name(c2pa: Any, chain: ProvenanceSettings, tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no key")
    with pytest.raises(DeploymentFailed, match=r"broken\.pem"):
        signer_of(chain.model_copy(update={"c2pa_key": broken}))
    old = PictureSigner(_chain(tmp_path, datetime.now(UTC) - timedelta(days=400)))
    with pytest.raises(DeploymentFailed, match="could not be signed"):
        old.signed(encode(PIXELS), "png")
