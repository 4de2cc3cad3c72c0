"""Xen streams that must be refused, with the field and where it is. For any damage: test_formats_hostile.py."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.geometry import PAGE_SIZE
from tests.unit.xen_streams import (
    SHARED_INFO,
    STATIC_DATA,
    XTAB,
    context_entry,
    hvm_context,
    hvm_params,
    hvm_stream,
    hvm_vcpu,
    libvirt,
    libxc,
    libxl,
    p2m_frames,
    page_data,
    page_of,
    pages,
    pv_info,
    pv_stream,
    pv_vcpu,
    record,
    tsc_info,
    xl,
)

PAGES = page_data(pages(0, 2))
CONTEXT = hvm_context([hvm_vcpu(None)])


def refusal(data: bytes, directory: Path) -> UnsupportedInputError:
    """The error that a stream is refused with, alike from a file and from a pipe; nothing is left of it."""
    errors = []
    path = directory / "save"
    path.write_bytes(data)
    for source in (path, io.BytesIO(data)):
        with pytest.raises(UnsupportedInputError) as caught, open_capture(source, spool_dir=directory, format="xen"):
            pass
        errors.append(caught.value)
    assert str(errors[0]) == str(errors[1])
    assert "\n" not in str(errors[0])
    assert list(directory.iterdir()) == [path]
    return errors[0]


@pytest.fixture
def refused(tmp_path: Path) -> Callable[[bytes], UnsupportedInputError]:
    return lambda data: refusal(data, tmp_path)


V2 = {"domain": 2, "version": 2}
HVM = {"domain": 2}
PV = {"domain": 1}


@pytest.mark.parametrize(
    ("data", "field", "reason"),
    [
        (b"Xen saved domain, xl Format\n \0 \r" + bytes(16), "magic", "not of xl, libvirt"),
        (libvirt(libxl(hvm_stream(PAGES)), version=1), "libvirt version", "1 is not 2"),
        (libvirt(libxl(hvm_stream(PAGES)), xml=b""), "length of libvirt XML", "0x0 bytes"),
        (libvirt(libxl(hvm_stream(PAGES)), xml=bytes(2 << 20)), "length of libvirt XML", "0x200000 bytes"),
        (libvirt(hvm_stream(PAGES)), "libxl ident", "LibxlFmt"),
        (xl(b"", order=0x04030201), "xl byte order", "0x04030201"),
        (xl(b"", flags=1), "xl mandatory flags", "convert-legacy-stream"),
        (xl(b"", flags=7), "xl mandatory flags", "0x7"),
        (xl(b"x" * 16), "libxl ident", "LibxlFmt"),
        (libxl(b"", version=1), "libxl version", "1 is not 2"),
        (libxl(b"", options=1), "libxl options", "big-endian"),
        (libxl(hvm_stream(PAGES), record(4)), "libxl CHECKPOINT_END", "Remus"),
        (libxl(hvm_stream(PAGES), record(5, bytes(4))), "libxl CHECKPOINT_STATE", "Remus"),
        (libxl(hvm_stream(PAGES), record(6)), "libxl 0x6", "mandatory"),
        (libxl(hvm_stream(PAGES), record(1) + hvm_stream(PAGES)), "libxl LIBXC_CONTEXT", "a second"),
        (libxl(hvm_stream(PAGES), record(3, bytes(4))), "length of libxl EMULATOR_CONTEXT", "0x4 bytes"),
        (libxl(b"\x01" + hvm_stream(PAGES)[1:]), "libxc marker", "before 4.6"),
        (struct.pack(">8sII", b"LibxlFmt", 2, 0) + record(0), "libxl END", "without LIBXC_CONTEXT"),
        (libxc(STATIC_DATA + PAGES + CONTEXT, domain=2, version=4), "libxc version", "4 is neither"),
        (libxc(STATIC_DATA + PAGES + CONTEXT, domain=2, options=1), "libxc options", "big-endian"),
        (libxc(STATIC_DATA + PAGES + CONTEXT, domain=3), "libxc domain type", "3 is neither"),
        (libxc(STATIC_DATA + PAGES + CONTEXT, domain=2, shift=16), "libxc page shift", "16"),
        (libxc(STATIC_DATA + PAGES + CONTEXT + record(14), **HVM), "libxc CHECKPOINT", "Remus or COLO"),
        (libxc(STATIC_DATA + PAGES + record(15, bytes(8)), **HVM), "libxc CHECKPOINT_DIRTY_PFN_LIST", "Remus"),
        (libxc(STATIC_DATA + record(0x13), **HVM), "libxc 0x13", "mandatory"),
        (libxc(STATIC_DATA + pv_info(8, 4), **HVM), "libxc X86_PV_INFO", "HVM or PVH"),
        (libxc(STATIC_DATA + CONTEXT, **PV), "libxc HVM_CONTEXT", "of a PV guest"),
        (libxc(PAGES, **HVM), "libxc PAGE_DATA", "STATIC_DATA_END"),
        (libxc(STATIC_DATA + PAGES, **HVM), "libxc END", "without HVM_CONTEXT"),
        (libxc(CONTEXT, **V2), "libxc END", "without PAGE_DATA"),
        (libxc(CONTEXT + page_data(pages(0, 2, XTAB)), **V2), "libxc PAGE_DATA", "no page"),
        (libxc(hvm_context([]), **V2), "libxc HVM_CONTEXT", "no vCPU"),
        (libxc(hvm_context([bytes(999)]), **V2), "libxc HVM_CONTEXT", "999 bytes of a vCPU"),
        (libxc(record(9, context_entry(2, 0, hvm_vcpu(None))), **V2), "libxc HVM_CONTEXT", "without an END"),
        (libxc(record(9, struct.pack("<HHI", 5, 0, 9)), **V2), "libxc HVM_CONTEXT", "longer than the rest"),
        (libxc(record(10, struct.pack("<IIQQ", 2, 0, 0, 0)), **V2), "libxc HVM_PARAMS", "2 parameters"),
        (libxc(hvm_params([(1, 1)] * 1025), **V2), "length of libxc HVM_PARAMS", "1024"),
        (libxc(record(9, bytes(3 << 20)), **V2), "length of libxc HVM_CONTEXT", "0x300000 bytes"),
        (libxc(pv_info(8, 3), **PV), "libxc X86_PV_INFO", "3 levels"),
        (libxc(pv_info(8, 4) + PAGES, **PV), "libxc PAGE_DATA", "P2M_FRAMES has to come"),
        (libxc(STATIC_DATA + p2m_frames(5, 8), **PV), "libxc X86_PV_P2M_FRAMES", "PV_INFO has to come"),
        (libxc(STATIC_DATA + pv_vcpu(0, 8, 0), **PV), "libxc X86_PV_VCPU_BASIC", "PV_INFO has to come"),
        (libxc(pv_info(8, 4) + STATIC_DATA + record(3, struct.pack("<II", 5, 4)), **PV), "libxc X86_PV_P2M_FRAMES",
         "0x5 to 0x4"),
        (libxc(pv_info(8, 4) + STATIC_DATA + record(3, struct.pack("<II", 0, 2**32 - 1)), **PV),
         "libxc X86_PV_P2M_FRAMES", "0xffffffff"),
        (libxc(pv_info(8, 4) + STATIC_DATA + record(3, struct.pack("<II", 0, 512)), **PV),
         "length of libxc X86_PV_P2M_FRAMES", "0x18 are needed"),
        (libxc(pv_info(4, 3) + STATIC_DATA + pv_vcpu(0, 8, 0), **PV), "length of libxc X86_PV_VCPU_BASIC", "32 bits"),
        (libxc(pv_info(8, 4) + STATIC_DATA + pv_vcpu(8192, 8, 0), **PV), "libxc X86_PV_VCPU_BASIC", "vCPU 8192"),
        (libxc(pv_info(8, 4) + STATIC_DATA + p2m_frames(9, 8) + PAGES, **PV), "libxc END", "X86_PV_VCPU_BASIC"),
        (pv_stream(page_data(pages(9, 2)), last=9), "entry of libxc PAGE_DATA", "0xa is not below 0xa"),
        (hvm_stream(page_data([(1 << 31, 0, page_of(0))])), "entry of libxc PAGE_DATA", "0x80000000 is not below"),
        (hvm_stream(page_data([(5, 0, page_of(0)), (3, 5, page_of(1))])), "entry of libxc PAGE_DATA", "type 0x5"),
        (hvm_stream(record(1, bytes(8))), "length of libxc PAGE_DATA", "0x8 bytes"),
        (hvm_stream(record(1, bytes(16))), "count of libxc PAGE_DATA", "0 entries"),
        (hvm_stream(record(1, struct.pack("<II", 2, 0) + bytes(8))), "count of libxc PAGE_DATA", "2 entries"),
        (hvm_stream(record(1, struct.pack("<II", 1, 0) + bytes(8 + PAGE_SIZE - 1))), "length of libxc PAGE_DATA",
         "0x1010 are needed"),
        (hvm_stream(record(1, struct.pack("<II", 1 << 18, 0) + bytes(8 << 18))), "count of libxc PAGE_DATA", "131072"),
        (hvm_stream(PAGES + record(7, bytes(5))), "libxc SHARED_INFO", "HVM or PVH"),
        (pv_stream(PAGES + record(7, bytes(5)), last=9), "length of libxc SHARED_INFO", "0x1000"),
        (hvm_stream(PAGES) + b"x", "end", "more follows"),
    ],
)  # fmt: skip
def test_refused(data: bytes, field: str, reason: str, refused: Callable[[bytes], UnsupportedInputError]) -> None:
    error = refused(data)
    assert error.field == field
    assert reason in str(error)
    if "no page" not in reason:
        assert error.offset is not None


def test_offsets(refused: Callable[[bytes], UnsupportedInputError]) -> None:
    """They are those of the field, not of where reading had come to."""
    data = hvm_stream(page_data([(5, 0, page_of(0)), (7, 0, page_of(0)), (8, 6, page_of(1))]))
    at = data.index(struct.pack("<Q", 6 << 60 | 8))
    assert refused(data).offset == at
    data = hvm_stream(PAGES)
    at = data.index(CONTEXT[:8])
    changed = data[: at + 4] + struct.pack("<I", 5 << 20) + data[at + 8 :]
    assert refused(changed).offset == at + 4


def test_optional_records_are_kept(tmp_path: Path) -> None:
    extra = record(0x80000001, b"whatever")
    data = libxl(libxc(extra + STATIC_DATA + PAGES + extra + tsc_info() + CONTEXT, domain=2), extra)
    with open_capture(io.BytesIO(data), spool_dir=tmp_path) as capture:
        assert bytes(capture.state.read_at(0, capture.state.size)).count(extra) == 3


def test_no_memory_file(tmp_path: Path) -> None:
    path = tmp_path / "save"
    path.write_bytes(hvm_stream(PAGES))
    with pytest.raises(UsageError, match="--memory"), open_capture(path, spool_dir=tmp_path, memory_files=[path]):
        pass


def test_shared_info_belongs_to_pv(tmp_path: Path) -> None:
    with open_capture(io.BytesIO(pv_stream(PAGES, last=9)), spool_dir=tmp_path) as capture:
        assert SHARED_INFO in bytes(capture.state.read_at(0, capture.state.size))
