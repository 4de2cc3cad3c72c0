"""What ``xl save`` and, on Xen, ``virsh save`` write, and the streams inside it: PV, PVH and HVM guests since Xen 4.6.

Three layers, each of which may be the outermost (``struct save_file_header`` of tools/xl/xl.h, or
``struct _libxlSavefileHeader`` of libvirt's src/libxl/libxl_conf.h; docs/specs/libxl-migration-stream.pandoc and
libxc-migration-stream.pandoc of Xen):

| bytes | field           | meaning                                                                       |
|------:|-----------------|-------------------------------------------------------------------------------|
|       |                 | (xl, little-endian)                                                           |
|    32 | magic           | ``Xen saved domain, xl format\\n \\0 \\r``                                       |
|     4 | byteorder       | 0x01020304                                                                    |
|     4 | mandatory flags | bit 0: the configuration is JSON; bit 1: libxl's stream is of version 2       |
|     4 | optional flags  |                                                                               |
|     4 | optional length | bytes of what follows: length u32 and the guest's configuration, maybe more   |
|       |                 | (or libvirt, little-endian)                                                   |
|    16 | magic           | ``libvirt-xml\\n \\0 \\r``                                                     |
|     4 | version         | 2                                                                             |
|     4 | XML length      |                                                                               |
|    40 | reserved        |                                                                               |
|     … | XML             | the guest's, and NUL                                                          |
|       |                 | (libxl, big-endian)                                                           |
|     8 | ident           | ``LibxlFmt``                                                                  |
|     4 | version         | 2                                                                             |
|     4 | options         | bit 0: big-endian; bit 1: converted from a stream of an older Xen             |
|       |                 | (libxl's records, as in xen_stream.py)                                        |
|     0 | LIBXC_CONTEXT 1 | a libxc stream follows: see xen_libxc.py                                      |
|     … | EMULATOR_XENSTORE_DATA 2, EMULATOR_CONTEXT 3: emulator u32, index u32, opaque. Of HVM guests    ||
|     … | CHECKPOINT_END 4, CHECKPOINT_STATE 5: of Remus and COLO, refused                                ||
|     0 | END 0           | the last one                                                                  |

A restore that loads pages on demand wants those with a vcpu_info at once (``restore.vcpu_info_pfns``, see xen_time.py)
and those that ``restore.hvm_params`` names: Xen itself looks into them.

``state`` is the whole file without the PAGE_DATA records: where they were, at ``restore.pages_at`` of it, records with
the pages that a restore wants at once can be put in.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from imagefs.errors import UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.xen_libxc import MARKER, LibxcReader
from imagefs.formats.xen_stream import XenCursor
from imagefs.formats.xen_time import find_time_pages
from imagefs.image.capture import Capture

XL_MAGIC = b"Xen saved domain, xl format\n \0 \r"
LIBVIRT_MAGIC = b"libvirt-xml\n \0 \r"
LIBXL_IDENT = b"LibxlFmt"

_XL_HEADER = struct.Struct("<32sIIII")
_BYTE_ORDER = 0x01020304
_JSON, _STREAM_V2 = 1, 2
_LENGTH = struct.Struct("<I")
_MAX_CONFIG = 1 << 20

_LIBVIRT_HEADER = struct.Struct("<16sII40x")
_LIBVIRT_VERSION = 2

_LIBXL_HEADER = struct.Struct(">8sII")
_LIBXL_VERSION = 2
_BIG_ENDIAN = 1

END, LIBXC_CONTEXT, EMULATOR_XENSTORE, EMULATOR_CONTEXT, CHECKPOINT_END, CHECKPOINT_STATE = range(6)
NAMES = {
    END: "END",
    LIBXC_CONTEXT: "LIBXC_CONTEXT",
    EMULATOR_XENSTORE: "EMULATOR_XENSTORE_DATA",
    EMULATOR_CONTEXT: "EMULATOR_CONTEXT",
    CHECKPOINT_END: "CHECKPOINT_END",
    CHECKPOINT_STATE: "CHECKPOINT_STATE",
}
_EMULATOR_HEADER_SIZE = 8


class Xen:
    """The format ``xen``."""

    name = "xen"

    def matches(self, source: Input) -> bool:
        return source.head.startswith((XL_MAGIC, LIBVIRT_MAGIC, LIBXL_IDENT, MARKER))

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if memory_files:
            raise UsageError(f"--memory {memory_files[0]}: a Xen stream has the guest's pages itself")
        return _Reader(source, workspace).read()


FORMAT = Xen()


class _Reader:
    def __init__(self, source: Input, workspace: Workspace) -> None:
        self._native = NativeRecorder(workspace)
        self._state = workspace.spool()
        self._cursor = XenCursor(source, self._native.builder, self._state)
        self._libxc = LibxcReader(self._cursor, self._native.builder, source, workspace)
        self._config: dict[str, bytes] = {}
        self._stream = "libxc"

    def read(self) -> Capture:
        cursor = self._cursor
        cursor.reach(len(XL_MAGIC))
        head = bytes(cursor.buffer[cursor.start : cursor.start + min(cursor.available, len(XL_MAGIC))])
        if head.startswith(MARKER):
            self._libxc.read()
        elif head.startswith(LIBXL_IDENT):
            self._stream = "libxl"
            self._read_libxl()
        elif head.startswith(LIBVIRT_MAGIC):
            self._stream = "libvirt"
            self._read_libvirt_header()
            self._read_libxl()
        else:
            self._stream = "xl"
            self._read_xl_header()
            self._read_libxl()
        if cursor.reach(1):
            raise cursor.error("the stream has ended, and more follows", "end")
        cursor.flush()
        self._state.flush()
        pages = self._libxc.finish()
        restore = self._libxc.describe() | {"stream": self._stream}
        if self._libxc.is_hvm:
            found = find_time_pages(pages.memory, self._libxc.tsc_khz)
            restore["vcpu_info_pfns"] = [pages.geometry.pfn_of_page(page) for page in found]
        return Capture(
            source_format=FORMAT.name,
            source_version=str(self._libxc.version),
            geometry=pages.geometry,
            memory=pages.memory,
            native=self._native.finish(pages.exceptions, pages.superseded, pages.geometry.page_of_pfn),
            state=self._state,
            config=self._config,
            restore=restore,
            vcpus=self._libxc.vcpus,
            essential=pages.page_tables,
        )

    def _read_xl_header(self) -> None:
        cursor = self._cursor
        magic, order, mandatory, _, length = _XL_HEADER.unpack(cursor.take(_XL_HEADER.size, "xl header"))
        if magic != XL_MAGIC:
            raise cursor.error(f"{magic[:8].hex()}… is not of xl, libvirt, libxl or libxc", "magic", _XL_HEADER.size)
        if order != _BYTE_ORDER:
            raise cursor.error(f"{order:#010x} is not {_BYTE_ORDER:#010x}", "xl byte order", back=16)
        if not mandatory & _STREAM_V2:
            reason = "a stream of Xen before 4.6: convert it with Xen's convert-legacy-stream"
            raise cursor.error(reason, "xl mandatory flags", back=12)
        if mandatory & ~(_JSON | _STREAM_V2):
            raise cursor.error(f"{mandatory:#x} has bits that are not understood", "xl mandatory flags", back=12)
        if not length:
            return
        if length < _LENGTH.size:
            raise cursor.error(f"{length} bytes have no room for a length", "xl optional length", back=4)
        (size,) = cursor.unpack(_LENGTH, "length of xl configuration")
        if size > min(length - _LENGTH.size, _MAX_CONFIG):
            reason = f"{size:#x} bytes, of {length:#x} that are optional, and of {_MAX_CONFIG:#x} at most"
            raise cursor.error(reason, "length of xl configuration", back=4)
        self._config["xl.json" if mandatory & _JSON else "xl.cfg"] = cursor.take(size, "xl configuration").rstrip(b"\0")
        cursor.skip_long(length - _LENGTH.size - size, "xl optional data")

    def _read_libvirt_header(self) -> None:
        cursor = self._cursor
        _, version, size = _LIBVIRT_HEADER.unpack(cursor.take(_LIBVIRT_HEADER.size, "libvirt header"))
        if version != _LIBVIRT_VERSION:
            reason = f"{version} is not {_LIBVIRT_VERSION}: 1 has a stream of Xen before 4.6"
            raise cursor.error(reason, "libvirt version", back=_LIBVIRT_HEADER.size - 16)
        if not 0 < size <= _MAX_CONFIG:
            reason = f"{size:#x} bytes, 1 to {_MAX_CONFIG:#x} are understood"
            raise cursor.error(reason, "length of libvirt XML", back=_LIBVIRT_HEADER.size - 20)
        self._config["domain.xml"] = cursor.take(size, "libvirt XML").rstrip(b"\0")

    def _read_libxl(self) -> None:
        cursor = self._cursor
        ident, version, options = _LIBXL_HEADER.unpack(cursor.take(_LIBXL_HEADER.size, "libxl header"))
        if ident != LIBXL_IDENT:
            raise cursor.error(f"{ident.hex()} is not {LIBXL_IDENT.hex()} (LibxlFmt)", "libxl ident", back=16)
        if version != _LIBXL_VERSION:
            raise cursor.error(f"{version} is not {_LIBXL_VERSION}", "libxl version", back=8)
        if options & _BIG_ENDIAN:
            raise cursor.error("the stream is big-endian, x86's is not", "libxl options", back=4)
        read = False
        while (record := cursor.peek_record(NAMES, "libxl")).kind != END:
            if record.kind in (CHECKPOINT_END, CHECKPOINT_STATE):
                raise cursor.error("checkpoints are of Remus or COLO; save the guest by itself", record.name)
            if record.kind not in NAMES and not record.optional:
                raise cursor.error(f"type {record.kind:#x} is not understood, and it is mandatory", record.name)
            if record.kind == LIBXC_CONTEXT and read:
                raise cursor.error("a second libxc stream", record.name)
            cursor.skip_header()
            if record.kind == LIBXC_CONTEXT:
                cursor.check_length(record, 0)
                self._libxc.read()
                read = True
                continue
            if record.kind in NAMES and record.length < _EMULATOR_HEADER_SIZE:
                raise cursor.bad_length(record, f"at least {_EMULATOR_HEADER_SIZE} are needed")
            cursor.skip_body(record)
        if not read:
            raise cursor.error("the stream ends without LIBXC_CONTEXT", record.name)
        cursor.skip_header()
        cursor.check_length(record, 0)
