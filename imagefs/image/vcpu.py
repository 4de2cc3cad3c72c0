"""What is known of a virtual CPU of the guest: the registers that say where its page tables and its code are.

Every format has some of them, none has all, so each is optional; the rest of the device state is the VMM's affair.
In the metadata document a vCPU is an object of those that are known, by the names below, each a string of ``0x`` and
hexadecimal digits: registers have 64 bits, JSON's integers here have 63.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from imagefs.image.fields import Fields

Mode = Literal["real", "protected", "compatibility", "long"]
"""Intel SDM, volume 3A, section 2.2: ``long`` is 64-bit mode, ``compatibility`` 32-bit code of a 64-bit system."""

CR0_PE, CR0_PG = 1 << 0, 1 << 31
CR4_PSE, CR4_PAE, CR4_LA57 = 1 << 4, 1 << 5, 1 << 12
EFER_LMA = 1 << 10

REGISTERS = ("cr0", "cr3", "cr4", "efer", "rip", "rsp", "cs", "gdt_base", "idt_base")
_HEX = re.compile(r"0x(0|[1-9a-f][0-9a-f]{0,15})", re.ASCII)


@dataclass(frozen=True, slots=True)
class VcpuState:
    """Registers of one vCPU as the guest sees them: addresses are guest-virtual, but for CR3, which is guest-physical.

    None for what the format does not tell.
    """

    cr0: int | None = None
    cr3: int | None = None
    cr4: int | None = None
    efer: int | None = None
    rip: int | None = None
    rsp: int | None = None
    cs: int | None = None
    """The selector."""
    gdt_base: int | None = None
    idt_base: int | None = None
    mode: Mode | None = None
    """What the code segment and EFER say; for formats without EFER it decides whether the page tables are 64-bit."""

    @property
    def levels(self) -> int:
        """Of page tables, 2 to 5; 0 while paging is off, or where too little is known to tell.

        What a format does not tell is taken to be as in a running 64-bit guest with four levels.
        """
        if self.cr3 is None or self.mode == "real" or (self.cr0 is not None and not self.cr0 & CR0_PG):
            return 0
        if self.cr4 is not None and not self.cr4 & CR4_PAE:
            return 2
        if not (self.mode != "protected" if self.efer is None else self.efer & EFER_LMA):
            return 3 if self.cr4 is not None else 0
        return 5 if (self.cr4 or 0) & CR4_LA57 else 4


def mode_of(cr0: int, long_active: bool, code_is_64_bit: bool) -> Mode:
    """Out of CR0, EFER.LMA and the L flag of the code segment's descriptor."""
    if not cr0 & CR0_PE:
        return "real"
    if not long_active:
        return "protected"
    return "long" if code_is_64_bit else "compatibility"


def describe_vcpu(vcpu: VcpuState) -> dict[str, str]:
    """As in the document."""
    known = {name: value for name in REGISTERS if (value := getattr(vcpu, name)) is not None}
    return {name: f"{value:#x}" for name, value in known.items()} | ({"mode": vcpu.mode} if vcpu.mode else {})


def parse_vcpus(document: Fields) -> Iterator[VcpuState]:
    """The vCPUs of a document; none where an older writer left the field out. CorruptObjectError for a bad value."""
    if "vcpus" not in document.value:
        return
    for fields in document.mappings("vcpus"):
        values = {name: _register(fields, name) for name in REGISTERS if name in fields.value}
        yield VcpuState(**values, mode=_mode(fields) if "mode" in fields.value else None)


def _register(fields: Fields, name: str) -> int:
    text = fields.text(name)
    if _HEX.fullmatch(text) is None:
        raise fields.bad(name, "not 0x and up to 16 lower-case hex digits")
    return int(text, 16)


def _mode(fields: Fields) -> Mode:
    text = fields.text("mode")
    for known in get_args(Mode):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise fields.bad("mode", f"not one of {', '.join(get_args(Mode))}")
