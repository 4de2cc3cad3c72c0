"""libvirt's save images: its header, and the streams in it, compressed or not."""

from __future__ import annotations

import io
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.native_reader import NativeReader
from tests.unit.samples_libvirt_save import COOKIE, FORMATS, SPARSE, STREAM, XML, compressed, header, image
from tests.unit.streams import Record, build, page_of
from tests.unit.test_formats_qemu import captured, content


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("piped", [0, 700])
def test_every_form(kind: str, piped: int) -> None:
    data = image(kind)
    built = SPARSE if kind == "sparse" else STREAM
    with captured(data, piped) as capture:
        assert capture.source_format == "libvirt-save"
        assert content(capture.memory) == built.memory
        assert content(capture.state) == built.state
        assert content(NativeReader(capture.native, capture.memory)) == data
        assert capture.config["domain.xml"] == XML
        assert capture.config["cookie.xml"] == COOKIE
        assert capture.restore["libvirt_format"] == kind
        assert capture.restore["was_running"] is True
        assert capture.restore["ram_block"] == "pc.ram"


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "lzop", "zstd"])
def test_several_members(kind: str) -> None:
    """As their programs make them of several files, or with several threads."""
    parts = [STREAM.data[:5000], b"", STREAM.data[5000:]]
    data = header(kind) + b"".join(compressed(kind, part) for part in parts if part or kind != "lzop")
    with captured(data) as capture:
        assert content(capture.memory) == STREAM.memory
        assert content(NativeReader(capture.native, capture.memory)) == data


def test_windows_of_zstd(tmp_path: Path) -> None:
    """As large as the program takes without being asked; larger ones would not fit into what a split may use."""

    def packed(window_log: int) -> bytes:
        parameters = zstandard.ZstdCompressionParameters(window_log=window_log)
        writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        return header("zstd") + writer.compress(STREAM.data) + writer.flush()

    with captured(packed(27)) as capture:
        assert content(capture.memory) == STREAM.memory
    assert refusal(packed(28), tmp_path).field == "compressed stream"


def test_other_byte_order_and_no_cookie() -> None:
    with captured(header("raw", order=">", running=0, cookie=b"") + STREAM.data) as capture:
        assert "cookie.xml" not in capture.config
        assert capture.restore["was_running"] is False


def test_version_1_is_never_compressed() -> None:
    with captured(header("gzip", version=1) + STREAM.data) as capture:
        assert capture.restore["libvirt_format"] == "raw"
        assert capture.source_version == "1"


@pytest.mark.parametrize("kind", ["raw", "gzip"])
def test_superseded_pages(kind: str) -> None:
    """Of a compressed stream nobody asks for them."""
    built = build([[Record("page", "pc.ram", 1, page_of(seed)) for seed in range(3)], []])
    data = image(kind, built)
    with captured(data) as capture:
        assert content(capture.memory) == built.memory
        assert content(NativeReader(capture.native, capture.memory)) == data
        assert (capture.native.superseded.size > 0) == (kind == "raw")


def refusal(data: bytes, directory: Path) -> UnsupportedInputError:
    with (
        pytest.raises(UnsupportedInputError) as caught,
        open_capture(io.BytesIO(data), spool_dir=directory, format="libvirt-save"),
    ):
        pass
    return caught.value


@pytest.mark.parametrize(
    ("at", "new", "field", "reason"),
    [
        (0, b"LibvirtQemudPart", "magic", "incomplete"),
        (0, b"LibvirtQemudSav?", "magic", "is not"),
        (16, struct.pack("<I", 0), "version", "00000000"),
        (16, struct.pack("<I", 3), "version", "03000000"),
        (28, struct.pack("<I", 7), "format", "none of raw"),
        (20, struct.pack("<I", 5 << 20), "data length", "5,242,880"),
        (92, b"x" * len(header("raw")[92:]), "domain XML", "domain.xml does not end"),
    ],
)
def test_header_that_is_refused(at: int, new: bytes, field: str, reason: str, tmp_path: Path) -> None:
    data = image("raw")
    error = refusal(data[:at] + new + data[at + len(new) :], tmp_path)
    assert (error.field, error.offset) == (field, at)
    assert reason in str(error)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "lzop", "zstd"])
def test_damage_in_compressed_streams(kind: str, tmp_path: Path) -> None:
    data = image(kind)
    for changed in (data[:-1], data[:-40], data + b"garbage", data[: len(header(kind))]):
        error = refusal(changed, tmp_path)
        assert error.field == "compressed stream", changed[-10:]
        assert error.offset is not None
        assert error.offset <= len(changed)
    # lzop asks for no more than it needs.
    middle = len(header(kind)) + 20
    assert refusal(data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :], tmp_path).offset is not None


def test_damage_inside_of_a_compressed_stream(tmp_path: Path) -> None:
    error = refusal(header("gzip") + compressed("gzip", STREAM.data[:-3]), tmp_path)
    assert error.field == "vmdescription"
    assert "in the decompressed stream" in str(error)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd"])
def test_a_bomb_is_not_unpacked_at_once(kind: str, tmp_path: Path) -> None:
    """32 MiB of zeros in some kilobytes: refused at its first byte, in no more memory than anything else."""
    program = {"bzip2": "bzip2", "gzip": "gzip", "xz": "xz", "zstd": "zstd"}[kind]
    command = f"head -c {32 << 20} /dev/zero | {program} -c"
    packed = subprocess.run(["sh", "-c", command], capture_output=True, check=True).stdout
    error = refusal(header(kind) + packed, tmp_path)
    assert (error.field, error.offset) == ("magic", 0)


def test_lzop_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = image("lzop")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"lzop: .*install it"), captured(data):
        pass
