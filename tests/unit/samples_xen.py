"""Samples of Xen streams: each kind of guest, each outermost layer."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from tests.unit.samples import Length, Sample
from tests.unit.xen_streams import (
    L1TAB,
    L4TAB,
    XALLOC,
    XTAB,
    hvm_stream,
    libvirt,
    libxl,
    page_data,
    page_of,
    pages,
    pv_stream,
    record,
    xl,
)

_PAGE_DATA = 1
_LIBXC_HEADERS = 40


def _lengths(data: bytes) -> Iterator[Length]:
    """Of all records, and what else in the headers is one."""
    at = 0
    if data.startswith(b"Xen"):
        yield Length("optional length", 44, 4, "little", refused=(1, 3, 4))
        yield Length("length of the configuration", 48, 4, "little", refused=(1 << 19,))
        at = 48 + int.from_bytes(data[44:48], "little")
    if data.startswith(b"libvirt"):
        yield Length("length of the XML", 20, 4, "little", refused=(0, 1 << 19))
        at = 64 + int.from_bytes(data[20:24], "little")
    if data[at:].startswith(b"LibxlFmt"):
        at += 16
    else:
        at += _LIBXC_HEADERS
    number = 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        number += 1
        yield Length(f"length of record {number} of type {kind:#x}", at + 4, 4, "little", refused=(length + 8,))
        if kind == _PAGE_DATA and length:
            yield Length(f"count of record {number}", at + 8, 4, "little", refused=(0,))
        at += 8 + length + -length % 8
        if kind == _PAGE_DATA and not length:  # libxl's LIBXC_CONTEXT
            at += _LIBXC_HEADERS


def _sample(name: str, data: bytes) -> Sample:
    return Sample.of_file(name, "xen", data, tuple(_lengths(data)))


_PAGES = page_data(pages(0, 2)) + page_data(pages(1, 1) + pages(9, 1, XTAB) + pages(7, 1, XALLOC))
_EMULATOR = record(3, struct.pack("<II", 2, 0) + b"device state")

SAMPLES = [
    _sample("xen-hvm", xl(libxl(hvm_stream(_PAGES, emulated=True), _EMULATOR))),
    _sample("xen-pvh-libxc", hvm_stream(_PAGES)),
    _sample(
        "xen-pv",
        libxl(pv_stream(page_data([*pages(0, 2), (2, L4TAB, page_of(2)), (3, L1TAB, page_of(3))]), last=600, root=2)),
    ),
    _sample("xen-libvirt", libvirt(libxl(hvm_stream(page_data(pages(0, 1)))))),
    _sample("xen-pv-32", pv_stream(page_data(pages(0, 2)), last=9, width=4)),
]
