"""The vCPUs' registers as Xen keeps them: for HVM and PVH guests, and for PV guests.

*HVM_CONTEXT* is a list of entries (xen/include/public/hvm/save.h and arch-x86/hvm/save.h), little-endian:

| bytes | field    | meaning                                                        |
|------:|----------|----------------------------------------------------------------|
|     2 | typecode | 0 END, 1 HEADER, 2 CPU, 3 PIC, 4 IOAPIC, …                     |
|     2 | instance | of a vCPU: its number                                          |
|     4 | length   | bytes of the body                                              |
|     … | body     | CPU: struct hvm_hw_cpu, whose fields are at fixed offsets      |

PVH guests have neither PIC nor IOAPIC: this is what tells the two apart in the stream.

*X86_PV_VCPU_BASIC* has struct vcpu_guest_context (arch-x86/xen.h, xen-x86_64.h, xen-x86_32.h), 5168 bytes for guests of
64 bits and 2800 for those of 32. Whoever saved has put a frame number of the guest into its CR3, in place of the
machine's; for 32-bit guests the number's upper 12 bits are the lowest of the register.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.formats.xen_stream import Record, XenCursor
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.vcpu import CR4_PAE, EFER_LMA, VcpuState, mode_of

_ENTRY = struct.Struct("<HHI")
_END, _CPU, _PIC, _IOAPIC = 0, 2, 3, 4
_U64, _U32, _U16 = struct.Struct("<Q"), struct.Struct("<I"), struct.Struct("<H")
_CPU_SIZE = 1000
"""Bytes of hvm_hw_cpu up to EFER; all versions of it have these."""
_CODE_64_BIT = 1 << 9
"""L in Xen's form of a segment's attributes."""

_CONTEXT_SIZE = {8: 5168, 4: 2800}


@dataclass(frozen=True)
class HvmContext:
    vcpus: tuple[VcpuState, ...]
    emulated: bool
    """Whether the machine has a PC's interrupt controllers: HVM, not PVH."""


def parse_hvm_context(cursor: XenCursor, record: Record, data: bytes) -> HvmContext:
    """``data`` is the record's body, which the cursor has passed."""
    vcpus: dict[int, VcpuState] = {}
    emulated = False
    for at, kind, instance, length in _entries(cursor, record, data):
        if kind == _CPU:
            if length < _CPU_SIZE:
                raise _bad(cursor, record, f"{length} bytes of a vCPU, {_CPU_SIZE} are needed", at)
            vcpus[instance] = _hvm_vcpu(data[at + _ENTRY.size : at + _ENTRY.size + length])
        emulated |= kind in (_PIC, _IOAPIC)
    if not vcpus:
        raise _bad(cursor, record, "no vCPU is in it", 0)
    return HvmContext(tuple(vcpus[number] for number in sorted(vcpus)), emulated)


def parse_pv_vcpu(cursor: XenCursor, record: Record, data: bytes, width: int) -> VcpuState:
    """``data`` is the body without the vCPU's number; ``width`` is 8 or 4 bytes."""
    if len(data) != _CONTEXT_SIZE[width]:
        raise cursor.bad_length(record, f"{_CONTEXT_SIZE[width] + 8:#x} are needed for guests of {width * 8} bits")
    if width == 8:
        return VcpuState(
            cr0=_at(_U64, data, 4984),
            cr3=_at(_U64, data, 5008) & -PAGE_SIZE,
            rip=_at(_U64, data, 648),
            cs=_at(_U16, data, 656),
            rsp=_at(_U64, data, 672),
            mode="long",
        )
    folded = _at(_U32, data, 2728)
    return VcpuState(
        cr0=_at(_U32, data, 2716),
        cr3=(folded >> 12 | (folded & 0xFFF) << 20) * PAGE_SIZE,
        cr4=_at(_U32, data, 2732) | CR4_PAE,  # PV guests of 32 bits have three levels, whatever they believe
        rip=_at(_U32, data, 548),
        cs=_at(_U16, data, 552),
        rsp=_at(_U32, data, 560),
        mode="protected",
    )


def _entries(cursor: XenCursor, record: Record, data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """``(offset in data, typecode, instance, length)`` up to END."""
    at = 0
    while True:
        if len(data) - at < _ENTRY.size:
            raise _bad(cursor, record, "it ends without an END entry", at)
        kind, instance, length = _ENTRY.unpack_from(data, at)
        if length > len(data) - at - _ENTRY.size:
            raise _bad(cursor, record, f"entry {kind} of {length:#x} bytes is longer than the rest", at)
        if kind == _END:
            return
        yield at, kind, instance, length
        at += _ENTRY.size + length


def _bad(cursor: XenCursor, record: Record, reason: str, at: int) -> Exception:
    return cursor.error(reason, record.name, cursor.position - record.offset - 8 - at)


def _hvm_vcpu(data: bytes) -> VcpuState:
    cr0, efer = _at(_U64, data, 656), _at(_U64, data, 992)
    return VcpuState(
        cr0=cr0,
        cr3=_at(_U64, data, 672),
        cr4=_at(_U64, data, 680),
        efer=efer,
        rip=_at(_U64, data, 640),
        rsp=_at(_U64, data, 568),
        cs=_at(_U32, data, 736) & 0xFFFF,
        gdt_base=_at(_U64, data, 880),
        idt_base=_at(_U64, data, 872),
        mode=mode_of(cr0, bool(efer & EFER_LMA), bool(_at(_U32, data, 888) & _CODE_64_BIT)),
    )


def _at(layout: struct.Struct, data: bytes, offset: int) -> int:
    value: int = layout.unpack_from(data, offset)[0]
    return value
