"""The vCPUs' registers out of the device state of a QEMU migration stream.

Device sections do not say how long they are; the stream's own description does, field by field, in the order of the
sections. As migration/savevm.c and migration/vmstate.c of QEMU write them, all integers big-endian:

| bytes | field              | meaning                                                                      |
|------:|--------------------|------------------------------------------------------------------------------|
|     1 | section type       | 0x04 SECTION_FULL                                                            |
|     4 | section id         |                                                                              |
|     1 | length, then name  | ``name`` of the device in the description                                    |
|     4 | instance           | ``instance_id``                                                              |
|     4 | version            | ``version``, where the description has one                                   |
|     … | fields             | ``fields`` in order: ``size`` bytes each, ``array_len`` times if it is given |
|     … | subsections        | ``subsections`` in order: 0x05, name as above, version u32, then as here     |
|     5 | footer             | 0x7e, section id; not for machine types up to 2.3                            |

``size`` of a struct covers all that is in it. Section ``cpu`` of an x86 guest (target/i386/machine.c) has the fields
in ``_REGISTERS``, ``env.efer`` in qemu-system-x86_64 only. An array whose elements differ in their description is
several fields of one name, each with its ``index``.

This finds hints, so it never refuses a stream: it gives what it found before the first thing that does not fit.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from imagefs.formats.qemu_devices import SECTION_FULL
from imagefs.formats.qemu_state import SECTION_FOOTER
from imagefs.image.capture import ByteSource
from imagefs.image.vcpu import EFER_LMA, VcpuState, mode_of

log = logging.getLogger(__name__)

_CPU = "cpu"
_REGISTERS = {
    "cr0": ("env.cr[0]", 0, None),
    "cr3": ("env.cr[3]", 0, None),
    "cr4": ("env.cr[4]", 0, None),
    "efer": ("env.efer", 0, None),
    "rip": ("env.eip", 0, None),
    "rsp": ("env.regs", 4, None),
    "cs": ("env.segs", 1, "selector"),
    "cs_flags": ("env.segs", 1, "flags"),
    "gdt_base": ("env.gdt", 0, "base"),
    "idt_base": ("env.idt", 0, "base"),
}
"""Where each is: field, element of the array, member of the structure."""
_REGISTER_SIZES = (4, 8)
_CS_LONG = 1 << 21
"""The L flag of a descriptor, as in its second word, which is what QEMU keeps as ``flags``."""

_OPENING = struct.Struct(">BIB")
_NUMBERS = struct.Struct(">II")
_FOOTER = struct.Struct(">BI")
_SUBSECTION_HEADER_SIZE = 6
"""Type, length of the name, version; the name comes on top."""


def find_vcpus(state: ByteSource, start: int, description: Mapping[str, Any]) -> list[VcpuState]:
    """Registers of each vCPU, in the order of the stream; empty for guests that are not x86.

    The device sections begin at ``start`` of ``state``; ``description`` is the stream's JSON, parsed. Raises nothing
    for what is in them.
    """
    found = []
    try:
        for at, device in _devices(state, start, description["devices"]):
            if device["name"] == _CPU and (vcpu := _vcpu(state, at, device["fields"])) is not None:
                found.append(vcpu)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.info("vCPUs after the first %d are not looked at: %s: %s", len(found), type(error).__name__, error)
    return found


def _devices(
    state: ByteSource, start: int, devices: list[Mapping[str, Any]]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Where the fields of each device begin, up to the last vCPU. ValueError where a section is not as described."""
    last = max((number for number, device in enumerate(devices) if device["name"] == _CPU), default=-1)
    at = start
    for device in devices[: last + 1]:
        name = device["name"].encode()
        kind, section, length = _OPENING.unpack(_read(state, at, _OPENING.size))
        at += _OPENING.size
        found = _read(state, at, len(name))
        at += len(name)
        instance, version = _NUMBERS.unpack(_read(state, at, _NUMBERS.size))
        at += _NUMBERS.size
        expected = (SECTION_FULL, len(name), name, device["instance_id"], device.get("version", version))
        if (kind, length, found, instance, version) != expected:
            raise ValueError(f"no section {device['name']!r} before {at:#x} of the state")
        begin = at
        at += _size(device)
        # A section without a footer is followed by SECTION_FULL or EOF.
        mark = _read(state, at, 1)[0]
        if mark == SECTION_FOOTER:
            if _FOOTER.unpack(_read(state, at, _FOOTER.size)) != (SECTION_FOOTER, section):
                raise ValueError(f"section {device['name']!r} has another one's footer at {at:#x} of the state")
            at += _FOOTER.size
        yield begin, device


def _vcpu(state: ByteSource, at: int, fields: list[Mapping[str, Any]]) -> VcpuState | None:
    """None for a vCPU without control registers."""
    values: dict[str, int] = {}
    for field in fields:
        for register, (name, index, member) in _REGISTERS.items():
            first = field.get("index", 0)
            if field["name"] == name and 0 <= index - first < field.get("array_len", 1):
                place = _place(field, at + (index - first) * field["size"], member)
                if place is not None:
                    values[register] = int.from_bytes(_read(state, *place), "big")
        at += _field_size(field)
    if not values.keys() >= {"cr0", "cr3", "cr4"}:
        return None
    code_is_64_bit = bool(values.pop("cs_flags", 0) & _CS_LONG)
    mode = mode_of(values["cr0"], bool(values.get("efer", 0) & EFER_LMA), code_is_64_bit)
    return VcpuState(**values, mode=mode)


def _place(field: Mapping[str, Any], at: int, member: str | None) -> tuple[int, int] | None:
    """Where the field, or a member of it, is, and how many bytes; None where it is no register."""
    if member is None:
        return (at, field["size"]) if field["size"] in _REGISTER_SIZES else None
    for inner in field["struct"]["fields"]:
        if inner["name"] == member:
            return _place(inner, at, None)
        at += _field_size(inner)
    return None


def _size(section: Mapping[str, Any]) -> int:
    """Bytes of a device's or a subsection's fields and subsections."""
    size = sum(map(_field_size, section["fields"]))
    for subsection in section.get("subsections", ()):
        size += _SUBSECTION_HEADER_SIZE + len(subsection["vmsd_name"].encode()) + _size(subsection)
    return size


def _field_size(field: Mapping[str, Any]) -> int:
    size, count = field["size"], field.get("array_len", 1)
    if not isinstance(size, int) or not isinstance(count, int) or size < 0 or count < 0:
        raise ValueError(f"field {field['name']!r} is described as {count!r} times {size!r} bytes")
    return size * count


def _read(state: ByteSource, at: int, count: int) -> bytes:
    if at + count > state.size:
        raise ValueError(f"the state ends at {state.size:#x}, before {at + count:#x}")
    return bytes(state.read_at(at, count))
