"""Samples of libvirt's save images, and how they are made."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable

import zstandard

from tests.unit.samples import Length, Sample
from tests.unit.streams import Built, Mapped, Record, build, build_mapped, page_of

XML = b"<domain type='qemu'><name>vm</name></domain>"
COOKIE = b"<qemusave/>"
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")


def header(
    kind: str, *, order: str = "<", version: int = 2, padding: int = 100, running: int = 1, cookie: bytes = COOKIE
) -> bytes:
    data = XML + b"\0" + (cookie + b"\0" if cookie else b"") + bytes(padding)
    fields = (version, len(data), running, FORMATS.index(kind), len(XML) + 1 if cookie else 0)
    return b"LibvirtQemudSave" + struct.pack(f"{order}5I", *fields) + bytes(56) + data


def compressed(kind: str, data: bytes) -> bytes:
    if kind == "lzop":
        return subprocess.run(["lzop", "-c"], input=data, capture_output=True, check=True).stdout
    if kind == "zstd":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    compress: dict[str, Callable[[bytes], bytes]] = {
        "raw": bytes,
        "gzip": gzip.compress,
        "bzip2": bz2.compress,
        "xz": lzma.compress,
    }
    return compress[kind](data)


STREAM = build([[Record("page", "pc.ram", 1, page_of(1)), Record("fill", "pc.ram", 2, b"\0")], []])
SPARSE = build_mapped(
    {"pc.ram": Mapped(3 * 4096, {0: page_of(1)}), "pc.rom": Mapped(4096, {0: page_of(2)})}, ["pc.ram"], header("sparse")
)


def image(kind: str, stream: Built = STREAM) -> bytes:
    return SPARSE.data if kind == "sparse" else header(kind) + compressed(kind, stream.data)


_LENGTHS = (
    Length("data length", 20, 4, "little", refused=(0, 1, len(XML))),
    Length("cookie offset", 32, 4, "little", refused=(1, len(header("raw")) - 92)),
)


def _sample(kind: str) -> Sample:
    def may_end(file: str, length: int) -> bool:
        # Cut just behind EOF, a stream is one without a description, and nothing of the guest is missing.
        whole = {"raw": len(header("raw")) + STREAM.eof_at + 1, "sparse": SPARSE.eof_at + 1}
        return length == whole.get(kind)

    return Sample.of_file(f"libvirt-save-{kind}", "libvirt-save", image(kind), _LENGTHS, may_end)


SAMPLES = [_sample(kind) for kind in FORMATS if kind != "lzop"]
