"""libvirt's save images of QEMU guests: what ``virsh save`` and ``virsh managedsave`` write.

As libvirt's src/qemu/qemu_saveimage.h and .c have it; integers in the byte order of the host that saved, which the
version tells:

| offset | bytes | field         | meaning                                                                     |
|-------:|------:|---------------|-----------------------------------------------------------------------------|
|      0 |    16 | magic         | ``LibvirtQemudSave``; ``LibvirtQemudPart`` while it is being written        |
|     16 |     4 | version       | 2; 1 for images before 2009, never compressed                               |
|     20 |     4 | data length   | bytes from 92 to the stream                                                 |
|     24 |     4 | was running   | 0 if the guest was paused                                                   |
|     28 |     4 | format        | 0 raw, 1 gzip, 2 bzip2, 3 xz, 4 lzop, 5 zstd, 6 sparse (libvirt 11.2)       |
|     32 |     4 | cookie offset | of the cookie in the data, 0 if there is none                               |
|     36 |    56 | unused        |                                                                             |
|     92 |     … | data          | the domain's XML, its cookie's XML, each ending with NUL; padding           |
|      … |     … | stream        | a QEMU migration stream (qemu_sections.py), compressed as ``format`` says;  |
|        |       |               | sparse: with its pages at fixed offsets of this file (qemu_mapped_ram.py)   |

Compressing again need not give the same bytes, so the native file keeps a compressed stream as it came, beside the
pages that are out of it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imagefs.errors import UnsupportedInputError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.decompress import decompressed
from imagefs.formats.qemu_sections import Guest, StreamReader
from imagefs.formats.stream_cursor import BUFFER_SIZE, StreamCursor
from imagefs.formats.stream_pages import LatestPages, keeper
from imagefs.image.capture import Capture
from imagefs.image.native import TemplateBuilder

MAGIC = b"LibvirtQemudSave"
PARTIAL = b"LibvirtQemudPart"
NEWEST_VERSION = 2

FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
_AS_IT_IS = ("raw", "sparse")

_SIZE = 92
_FIELDS = struct.Struct("5I")
_FIELDS_AT = len(MAGIC)
_MAX_DATA = BUFFER_SIZE
"""Bytes. XML takes some kilobytes, the padding 64 KiB."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fields that say something."""

    version: int
    data_length: int
    was_running: bool
    format: str
    cookie_offset: int


class LibvirtSave:
    """The format ``libvirt-save``."""

    name = "libvirt-save"

    def matches(self, source: Input) -> bool:
        return source.head.startswith((MAGIC, PARTIAL))

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        native = NativeRecorder(workspace)
        cursor = StreamCursor(source.read_into, native.builder.literal)
        header = _read_header(cursor)
        config = _read_data(cursor, header)
        if header.format in _AS_IT_IS:
            guest = StreamReader(cursor, native.builder, workspace, keeper(source, workspace), memory_files).read()
        else:
            guest = _read_compressed(cursor, header.format, workspace, memory_files)
        capture = guest.capture(
            self.name, str(header.version), native.finish(guest.exceptions, guest.superseded), config
        )
        about = {"libvirt_format": header.format, "was_running": header.was_running}
        return replace(capture, restore={**capture.restore, **about})


FORMAT = LibvirtSave()


def _read_header(cursor: StreamCursor) -> Header:
    data = cursor.take(_SIZE, "header")
    magic = data[:_FIELDS_AT]
    if magic == PARTIAL:
        raise cursor.error("libvirt did not finish this image, it is incomplete", "magic", back=_SIZE)
    if magic != MAGIC:
        raise cursor.error(f"{magic!r} is not {MAGIC!r}", "magic", back=_SIZE)
    for order in "<>":
        version, length, running, kind, cookie = struct.unpack_from(f"{order}5I", data, _FIELDS_AT)
        if 0 < version <= NEWEST_VERSION:
            break
    else:
        raise cursor.error(f"{data[16:20].hex()} is neither 1 nor {NEWEST_VERSION}", "version", back=_SIZE - 16)
    if version == 1:
        kind = 0
    if kind >= len(FORMATS):
        raise cursor.error(f"{kind} is none of {', '.join(FORMATS)}", "format", back=_SIZE - 28)
    if not 0 < length <= _MAX_DATA:
        raise cursor.error(f"{length:,} bytes of XML", "data length", back=_SIZE - 20)
    if cookie >= length:
        raise cursor.error(f"{cookie:#x} is beyond the data of {length:#x} bytes", "cookie offset", back=_SIZE - 32)
    return Header(version, length, bool(running), FORMATS[kind], cookie)


def _read_data(cursor: StreamCursor, header: Header) -> dict[str, bytes]:
    """The domain's XML and the cookie, as files under ``config/``."""
    data = cursor.take(header.data_length, "domain XML")
    parts = {"domain.xml": data[: header.cookie_offset or len(data)]}
    if header.cookie_offset:
        parts["cookie.xml"] = data[header.cookie_offset :]
    config = {}
    for name, part in parts.items():
        text, end, _ = part.partition(b"\0")
        if not end:
            raise cursor.error(f"{name} does not end", "domain XML", back=header.data_length)
        config[name] = text
    return config


def _read_compressed(cursor: StreamCursor, kind: str, workspace: Workspace, memory_files: Sequence[Path]) -> Guest:
    """The stream inside; what is read of the outer one becomes literals, whole as it is."""

    def rest(buffer: memoryview) -> int:
        if not cursor.reach(1):
            return 0
        count = min(len(buffer), cursor.available)
        buffer[:count] = cursor.buffer[cursor.start : cursor.start + count]
        cursor.skip(count)
        cursor.flush()
        return count

    stream = workspace.adopt(decompressed(kind, rest, lambda: cursor.position))
    inner = StreamCursor(stream.read_into, _ignore)
    builder = TemplateBuilder(_ignore, _ignore)
    try:
        return StreamReader(inner, builder, workspace, lambda pages: LatestPages(workspace, pages), memory_files).read()
    except UnsupportedInputError as error:
        if error.field == "compressed stream":
            raise
        raise UnsupportedInputError(
            f"{error.reason} (in the decompressed stream)", field=error.field, offset=error.offset
        ) from error
    finally:
        stream.close()


def _ignore(data: bytes | memoryview) -> None:
    pass
