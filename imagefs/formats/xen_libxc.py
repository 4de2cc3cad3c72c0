"""The libxc stream: the memory and the hypervisor's state of a Xen guest, versions 2 and 3.

As in docs/specs/libxc-migration-stream.pandoc of Xen; records as in xen_stream.py.

| bytes | field      | meaning (image header, big-endian)                                        |
|------:|------------|---------------------------------------------------------------------------|
|     8 | marker     | all bits set                                                              |
|     4 | id         | ``XENF``                                                                  |
|     4 | version    | 2 up to Xen 4.13, 3 since 4.14                                            |
|     2 | options    | bit 0: big-endian                                                         |
|     6 | reserved   |                                                                           |
|       |            | (domain header, little-endian)                                            |
|     4 | type       | 1 x86 PV, 2 x86 HVM or PVH                                                |
|     2 | page_shift | 12                                                                        |
|     2 | reserved   |                                                                           |
|   4+4 | xen        | major and minor version of the Xen that saved                             |

| type | record                                | body                                                                  |
|-----:|---------------------------------------|-----------------------------------------------------------------------|
| 0x00 | END                                   | empty; the last one                                                   |
| 0x01 | PAGE_DATA                             | see xen_pages.py                                                      |
| 0x02 | X86_PV_INFO                           | guest width u8 (bytes), page-table levels u8: 8 and 4, or 4 and 3     |
| 0x03 | X86_PV_P2M_FRAMES                     | first u32 and last u32 frame number, then the frames with its P2M     |
|      |                                       | table, u64 each                                                       |
| 0x04 | X86_PV_VCPU_BASIC                     | vCPU u32, reserved u32, registers: see xen_cpu.py                     |
| 0x05 | X86_PV_VCPU_EXTENDED, 0x06 …_XSAVE,   | the same with more of its state, opaque                               |
|      | 0x0c …_MSRS                           |                                                                       |
| 0x07 | SHARED_INFO                           | one page                                                              |
| 0x08 | X86_TSC_INFO                          | mode u32, kHz u32, nanoseconds u64, incarnation u32, reserved u32     |
| 0x09 | HVM_CONTEXT                           | see xen_cpu.py                                                        |
| 0x0a | HVM_PARAMS                            | count u32, reserved u32, then index u64 and value u64 of each         |
| 0x0b | TOOLSTACK                             | opaque, not used any more                                             |
| 0x0d | VERIFY                                | empty: after it pages come again, for debugging                       |
| 0x0e | CHECKPOINT, 0x0f …_DIRTY_PFN_LIST     | of Remus and COLO: refused, ``xl restore`` takes no such file either  |
| 0x10 | STATIC_DATA_END                       | empty; before pages and registers, since version 3                    |
| 0x11 | X86_CPUID_POLICY, 0x12 X86_MSR_POLICY | opaque                                                                |
"""

from __future__ import annotations

import struct
from typing import Any

from imagefs.formats.base import Input, Workspace
from imagefs.formats.xen_cpu import HvmContext, parse_hvm_context, parse_pv_vcpu
from imagefs.formats.xen_pages import MAX_PFN, PageReader, Pages
from imagefs.formats.xen_stream import MAX_LENGTH, Record, XenCursor
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import TemplateBuilder
from imagefs.image.vcpu import VcpuState

MARKER = b"\xff" * 8 + b"XENF"
VERSIONS = (2, 3)

PV, HVM = 1, 2
END, PAGE_DATA, PV_INFO, P2M_FRAMES, VCPU_BASIC = range(5)
SHARED_INFO, TSC_INFO, HVM_CONTEXT, HVM_PARAMS = 0x07, 0x08, 0x09, 0x0A
VERIFY, CHECKPOINT, DIRTY_PFN_LIST, STATIC_DATA_END = 0x0D, 0x0E, 0x0F, 0x10
NAMES = {
    END: "END",
    PAGE_DATA: "PAGE_DATA",
    PV_INFO: "X86_PV_INFO",
    P2M_FRAMES: "X86_PV_P2M_FRAMES",
    VCPU_BASIC: "X86_PV_VCPU_BASIC",
    0x05: "X86_PV_VCPU_EXTENDED",
    0x06: "X86_PV_VCPU_XSAVE",
    SHARED_INFO: "SHARED_INFO",
    TSC_INFO: "X86_TSC_INFO",
    HVM_CONTEXT: "HVM_CONTEXT",
    HVM_PARAMS: "HVM_PARAMS",
    0x0B: "TOOLSTACK",
    0x0C: "X86_PV_VCPU_MSRS",
    VERIFY: "VERIFY",
    CHECKPOINT: "CHECKPOINT",
    DIRTY_PFN_LIST: "CHECKPOINT_DIRTY_PFN_LIST",
    STATIC_DATA_END: "STATIC_DATA_END",
    0x11: "X86_CPUID_POLICY",
    0x12: "X86_MSR_POLICY",
}
_OF_PV = (PV_INFO, P2M_FRAMES, VCPU_BASIC, 0x05, 0x06, 0x0C, SHARED_INFO)
_OF_HVM = (HVM_CONTEXT, HVM_PARAMS)
_LENGTHS = {END: 0, PV_INFO: 8, SHARED_INFO: PAGE_SIZE, TSC_INFO: 24, VERIFY: 0, STATIC_DATA_END: 0}

_IMAGE_HEADER = struct.Struct(">8s4sIHHI")
_DOMAIN_HEADER = struct.Struct("<IHHII")
_P2M = struct.Struct("<II")
_TSC = struct.Struct("<IIQII")
_PARAM = struct.Struct("<QQ")
_PAIR = struct.Struct("<II")
_LEVELS = {8: 4, 4: 3}
_MAX_PARAMS = 1024
_MAX_VCPUS = 8192

PARAMS = {
    0: "callback_irq",
    1: "store_pfn",
    5: "ioreq_pfn",
    6: "bufioreq_pfn",
    12: "ident_pt",
    15: "vm86_tss",
    17: "console_pfn",
    27: "paging_ring_pfn",
    28: "monitor_ring_pfn",
    29: "sharing_ring_pfn",
    32: "ioreq_server_pfn",
    33: "nr_ioreq_server_pages",
    34: "vm_generation_id_addr",
    37: "vm86_tss_sized",
}
"""HVM_PARAM_* of xen/include/public/hvm/params.h that say where something lies in the guest's memory."""


class LibxcReader:
    """Reads one libxc stream, from its image header up to and including END."""

    def __init__(self, cursor: XenCursor, builder: TemplateBuilder, source: Input, workspace: Workspace) -> None:
        self._cursor = cursor
        self._pages = PageReader(cursor, builder, source, workspace)
        self._pages_at: int | None = None
        self._domain = 0
        self._static_ended = False
        self._width = 0
        self._end_of_pfns = MAX_PFN
        self._p2m_frames = False
        self._pv_vcpus: dict[int, VcpuState] = {}
        self._context: HvmContext | None = None
        self._tsc: dict[str, int] = {}
        self._params: dict[str, str] = {}
        self.version = 0
        self.xen = ""

    @property
    def is_hvm(self) -> bool:
        """HVM or PVH, which libxc does not tell apart."""
        return self._domain == HVM

    @property
    def tsc_khz(self) -> int:
        """0 if it is not known."""
        return self._tsc.get("khz", 0)

    @property
    def vcpus(self) -> tuple[VcpuState, ...]:
        if self._context is not None:
            return self._context.vcpus
        return tuple(self._pv_vcpus[number] for number in sorted(self._pv_vcpus))

    def read(self) -> None:
        self._read_headers()
        while (record := self._cursor.peek_record(NAMES, "libxc")).kind != END:
            self._check_record(record)
            if record.kind == PAGE_DATA:
                self._read_pages(record)
            else:
                self._cursor.skip_header()
                self._read_record(record)
        self._cursor.skip_header()
        self._cursor.check_length(record, 0)
        self._check_complete(record)

    def finish(self) -> Pages:
        return self._pages.finish()

    def describe(self) -> dict[str, Any]:
        """What a restore needs to know. Values of 64 bits are strings of hexadecimal digits."""
        known: dict[str, Any] = {
            "vmm": "xen",
            "kind": "pv" if self._domain == PV else "hvm" if self._context and self._context.emulated else "pvh",
            "xen": self.xen,
            "libxc_version": self.version,
            "cpus": len(self.vcpus),
            "pages_at": self._pages_at,
        }
        if self._tsc:
            known["tsc"] = self._tsc
        if self._params:
            known["hvm_params"] = self._params
        if self._domain == PV:
            known |= {"guest_width": self._width, "end_of_pfns": self._end_of_pfns}
        return known

    def _read_headers(self) -> None:
        cursor = self._cursor
        marker, name, version, options, _, _ = _IMAGE_HEADER.unpack(cursor.take(_IMAGE_HEADER.size, "libxc header"))
        if marker + name != MARKER:
            reason = f"{(marker + name).hex()} is not {MARKER.hex()}: not libxc's stream, or that of Xen before 4.6"
            raise cursor.error(reason, "libxc marker", _IMAGE_HEADER.size)
        if version not in VERSIONS:
            raise cursor.error(f"{version} is neither 2 nor 3", "libxc version", 12)
        if options & 1:
            raise cursor.error("the stream is big-endian, x86's is not", "libxc options", 8)
        self.version = version
        self._static_ended = version < 3
        domain, page_shift, _, major, minor = cursor.unpack(_DOMAIN_HEADER, "libxc domain header")
        if domain not in (PV, HVM):
            raise cursor.error(f"{domain} is neither x86 PV (1) nor x86 HVM (2)", "libxc domain type", 16)
        if 1 << page_shift != PAGE_SIZE:
            raise cursor.error(f"{page_shift} is not 12", "libxc page shift", 12)
        self._domain = domain
        self.xen = f"{major}.{minor}"

    def _check_record(self, record: Record) -> None:
        cursor = self._cursor
        if record.length > MAX_LENGTH:
            raise cursor.error(f"{record.length:#x} bytes, over {MAX_LENGTH:#x}", f"length of {record.name}", back=-4)
        reason = ""
        if record.kind in (CHECKPOINT, DIRTY_PFN_LIST):
            reason = "checkpoints are of Remus or COLO: what follows is a later state of the guest. Save it by itself"
        elif record.kind not in NAMES and not record.optional:
            reason = f"type {record.kind:#x} is not understood, and it is mandatory"
        elif record.kind in (_OF_HVM if self._domain == PV else _OF_PV):
            reason = f"not in the stream of {'a PV' if self._domain == PV else 'an HVM or PVH'} guest"
        elif record.kind in (P2M_FRAMES, VCPU_BASIC) and not self._width:
            reason = "X86_PV_INFO has to come before it"
        elif record.kind == PAGE_DATA and self._domain == PV and not self._p2m_frames:
            reason = "X86_PV_P2M_FRAMES has to come before it"
        elif record.kind in (PAGE_DATA, P2M_FRAMES, VCPU_BASIC, HVM_CONTEXT) and not self._static_ended:
            reason = "STATIC_DATA_END has to come before it"
        if reason:
            raise cursor.error(reason, record.name)

    def _read_pages(self, record: Record) -> None:
        cursor = self._cursor
        if self._pages_at is None:
            self._pages_at = cursor.kept
        with cursor.unkept():
            cursor.skip_header()
            self._pages.read(record, self._end_of_pfns)
            cursor.skip_padding(record)

    def _read_record(self, record: Record) -> None:
        """A record whose header was passed."""
        cursor = self._cursor
        wanted = _LENGTHS.get(record.kind)
        if wanted is not None:
            cursor.check_length(record, wanted)
        if record.kind == P2M_FRAMES:
            self._read_p2m_frames(record)
        elif record.kind == VCPU_BASIC:
            self._read_pv_vcpu(record)
        elif record.kind == HVM_CONTEXT:
            self._context = parse_hvm_context(cursor, record, cursor.body(record))
        elif record.kind == HVM_PARAMS:
            self._read_params(record)
        elif record.kind == PV_INFO:
            width, levels = cursor.body(record)[:2]
            if _LEVELS.get(width) != levels:
                raise cursor.error(f"{levels} levels of page tables and {width} bytes of width", record.name, back=8)
            self._width = width
        elif record.kind == TSC_INFO:
            mode, khz, nanoseconds, incarnation, _ = _TSC.unpack(cursor.body(record))
            self._tsc = {"mode": mode, "khz": khz, "nsec": nanoseconds % 2**63, "incarnation": incarnation}
        else:
            self._static_ended |= record.kind == STATIC_DATA_END
            cursor.skip_body(record)

    def _read_p2m_frames(self, record: Record) -> None:
        cursor = self._cursor
        if record.length < _P2M.size:
            raise cursor.bad_length(record, f"at least {_P2M.size} are needed")
        first, last = cursor.unpack(_P2M, record.name)
        if first > last or last >= MAX_PFN:
            raise cursor.error(f"frames {first:#x} to {last:#x}, of {MAX_PFN:#x} at most", record.name, _P2M.size)
        entries = PAGE_SIZE // self._width
        cursor.check_length(record, _P2M.size + (last // entries - first // entries + 1) * 8)
        cursor.skip_body(record, _P2M.size)
        self._p2m_frames = True
        self._end_of_pfns = last + 1

    def _read_pv_vcpu(self, record: Record) -> None:
        data = self._cursor.body(record)
        if len(data) < _PAIR.size:
            raise self._cursor.bad_length(record, f"at least {_PAIR.size} are needed")
        number, _ = _PAIR.unpack_from(data)
        if number >= _MAX_VCPUS:
            raise self._cursor.error(f"vCPU {number}, of {_MAX_VCPUS} at most", record.name, back=len(data))
        self._pv_vcpus[number] = parse_pv_vcpu(self._cursor, record, data[_PAIR.size :], self._width)

    def _read_params(self, record: Record) -> None:
        data = self._cursor.body(record)
        if len(data) < _PAIR.size or len(data) > _PAIR.size + _MAX_PARAMS * _PARAM.size:
            raise self._cursor.bad_length(record, f"1 to {_MAX_PARAMS} parameters are understood")
        count, _ = _PAIR.unpack_from(data)
        if len(data) != _PAIR.size + count * _PARAM.size:
            raise self._cursor.error(f"{count} parameters in {len(data):#x} bytes", record.name, back=len(data))
        for index, value in _PARAM.iter_unpack(data[_PAIR.size :]):
            self._params[PARAMS.get(index, f"param_{index}")] = f"{value:#x}"

    def _check_complete(self, end: Record) -> None:
        missing = ""
        if self._domain == PV and not self._pv_vcpus:
            missing = "X86_PV_VCPU_BASIC"
        elif self._domain == HVM and self._context is None:
            missing = "HVM_CONTEXT"
        elif self._pages_at is None:
            missing = "PAGE_DATA"
        if missing:
            raise self._cursor.error(f"the stream ends without {missing}", end.name, back=8)
