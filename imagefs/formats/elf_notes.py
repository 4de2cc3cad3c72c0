"""The notes of a machine's ELF core: registers of the vCPUs, and the kernel's vmcoreinfo.

A note is ``n_namesz`` u32, ``n_descsz`` u32, ``n_type`` u32, the name and the description, each padded to 4 bytes.

| name         | type | description                                                                                  |
|--------------|-----:|----------------------------------------------------------------------------------------------|
| ``CORE``     |    1 | NT_PRSTATUS, one a vCPU: of x86-64 ``struct elf_prstatus``, 336 bytes, with rip, cs, rsp     |
| ``QEMU``     |    0 | QEMUCPUState of target/i386/arch_dump.c, one a vCPU, 432 bytes or more: see below            |
| ``VMCOREINFO`` |  0 | text of the guest's kernel about itself                                                      |

QEMUCPUState, little-endian:

| offset | bytes   | field                                                                                         |
|-------:|--------:|-----------------------------------------------------------------------------------------------|
|      0 |       4 | version, 1                                                                                    |
|      4 |       4 | size                                                                                          |
|      8 |  16 × 8 | rax rbx rcx rdx rsi rdi rsp rbp r8 … r15                                                      |
|    136 |   2 × 8 | rip, rflags                                                                                   |
|    152 | 10 × 24 | cs ds es fs gs ss ldt tr gdt idt: selector, limit, flags, padding (u32 each), base u64        |
|    392 |   5 × 8 | cr0 … cr4                                                                                     |

There is no EFER; that of the first vCPU decides whether ``e_machine`` says x86-64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from imagefs.errors import UnsupportedInputError
from imagefs.image.vcpu import CR0_PG, CR4_PAE, VcpuState, mode_of

EM_386, EM_X86_64 = 3, 62
NT_PRSTATUS = 1

_HEADER = struct.Struct("<III")
_QEMU_SIZE = 432
_PRSTATUS_SIZE = 336
_QEMU_VERSION = 1
_CS_LONG = 1 << 21
MAX_VCPUS = 8192


@dataclass(frozen=True)
class Notes:
    vcpus: tuple[VcpuState, ...] = ()
    vmcoreinfo: bytes = b""


def parse_notes(data: bytes, machine: int, offset: int) -> Notes:
    """``data`` is a PT_NOTE segment at ``offset`` of the file. Notes of no known kind are passed over."""
    full: list[VcpuState] = []
    brief: list[VcpuState] = []
    vmcoreinfo = b""
    for at, name, kind, body in _notes(data, offset):
        if max(len(full), len(brief)) >= MAX_VCPUS:
            raise UnsupportedInputError(f"more than {MAX_VCPUS} vCPUs", field="notes", offset=offset + at)
        if name == b"QEMU" and kind == 0 and len(body) >= _QEMU_SIZE and machine in (EM_386, EM_X86_64):
            if int.from_bytes(body[:4], "little") == _QEMU_VERSION:
                full.append(_qemu_vcpu(body, machine))
        elif name == b"CORE" and kind == NT_PRSTATUS and len(body) == _PRSTATUS_SIZE and machine == EM_X86_64:
            rip, cs, _, rsp = struct.unpack_from("<QQQQ", body, 240)
            brief.append(VcpuState(rip=rip, cs=cs & 0xFFFF, rsp=rsp))
        elif name == b"VMCOREINFO":
            vmcoreinfo = body
    return Notes(tuple(full or brief), vmcoreinfo)


def _notes(data: bytes, offset: int) -> Iterator[tuple[int, bytes, int, bytes]]:
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise UnsupportedInputError(f"{len(data) - at} bytes are left over", field="notes", offset=offset + at)
        name_size, size, kind = _HEADER.unpack_from(data, at)
        name_at = at + _HEADER.size
        body_at = name_at + _padded(name_size)
        if body_at + size > len(data):
            reason = f"a note with {name_size:#x} bytes of name and {size:#x} more, {len(data) - name_at:#x} are left"
            raise UnsupportedInputError(reason, field="notes", offset=offset + at)
        yield at, data[name_at : name_at + name_size].rstrip(b"\0"), kind, data[body_at : body_at + size]
        at = body_at + _padded(size)


def _padded(size: int) -> int:
    return size + -size % 4


def _qemu_vcpu(body: bytes, machine: int) -> VcpuState:
    def u64(at: int) -> int:
        return int.from_bytes(body[at : at + 8], "little")

    selector, _, flags = struct.unpack_from("<III", body, 152)
    code_is_64_bit = bool(flags & _CS_LONG)
    cr0, cr4 = u64(392), u64(424)
    may_be_long = machine == EM_X86_64 and cr0 & CR0_PG and cr4 & CR4_PAE
    return VcpuState(
        cr0=cr0,
        cr3=u64(416),
        cr4=cr4,
        rip=u64(136),
        rsp=u64(56),
        cs=selector & 0xFFFF,
        gdt_base=u64(360),
        idt_base=u64(384),
        mode=mode_of(cr0, bool(may_be_long) or code_is_64_bit, code_is_64_bit),
    )
