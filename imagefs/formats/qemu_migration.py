"""QEMU migration streams: what ``migrate exec:`` and ``migrate file:`` write, of stopped and of live guests.

The outermost layer, as in QEMU's migration/savevm.c. All integers are big-endian.

| type | section       | contents                                                                                |
|------|---------------|-----------------------------------------------------------------------------------------|
|      | header        | magic ``QEVM``, version u32 = 3                                                         |
| 0x07 | CONFIGURATION | machine type: length u32, ASCII; then subsections: 0x05, name (length byte, ASCII),     |
|      |               | version u32, and for ``configuration/capabilities`` a u32 and so many names,            |
|      |               | ``…/target-page-bits`` a u32, ``…/uuid`` 16 bytes                                       |
| 0x01 | SECTION_START | id u32, name, instance u32, version u32; then the contents, for RAM see qemu_ram.py     |
| 0x02 | SECTION_PART  | id u32, contents                                                                        |
| 0x03 | SECTION_END   | id u32, contents                                                                        |
| 0x7e | footer        | id u32, after each section but for machine types up to 2.3                              |
| 0x08 | COMMAND       | command u16, length u16, data                                                           |
| 0x04 | SECTION_FULL  | device state: see qemu_devices.py. From the first one on the stream is kept as it is    |
| 0x00 | EOF           | end of the sections                                                                     |

RAM is the only iterable section that is understood. A background snapshot has no SECTION_END.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imagefs.errors import UsageError
from imagefs.formats.base import Input, NativeRecorder, Workspace
from imagefs.formats.qemu_cpu import find_vcpus
from imagefs.formats.qemu_devices import SECTION_FULL, Description, check_devices
from imagefs.formats.qemu_machine import memory_layout
from imagefs.formats.qemu_ram import RamReader
from imagefs.formats.qemu_state import SECTION_END, SECTION_FOOTER, SECTION_PART, StateWriter
from imagefs.formats.qemu_stream import StreamCursor
from imagefs.image.capture import Capture
from imagefs.image.vcpu import VcpuState

MAGIC = b"QEVM"
VERSION = 3
RAM_VERSION = 4
TARGET_PAGE_BITS = 12

EOF, SECTION_START = 0x00, 0x01
SUBSECTION, CONFIGURATION, COMMAND = 0x05, 0x07, 0x08

IGNORE_SHARED = "x-ignore-shared"
_REFUSED_CAPABILITIES = {
    "mapped-ram": "a mapped-ram file has its pages at fixed offsets: a format of its own, not supported yet",
}

_COMMAND_PING = 2
_DROPPED_COMMANDS = {1: 0, _COMMAND_PING: 4}
"""OPEN_RETURN_PATH and PING, with their lengths: a destination that reads a file has no way back."""
_KEPT_COMMANDS = {11: 0}
"""SWITCHOVER_START, since QEMU 10.0."""
_REFUSED_COMMANDS = {
    3: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "PACKAGED",
    8: "ENABLE_COLO",
    9: "POSTCOPY_RESUME",
    10: "RECV_BITMAP",
}

_MAX_MACHINE_NAME = 255
_MAX_CAPABILITIES = 256


@dataclass
class _Configuration:
    machine: str = ""
    capabilities: list[str] = field(default_factory=list)
    uuid: bytes = b""


class QemuMigration:
    """The format ``qemu-migration``."""

    name = "qemu-migration"

    def matches(self, source: Input) -> bool:
        return source.head.startswith(MAGIC)

    def read(self, source: Input, workspace: Workspace, memory_files: Sequence[Path]) -> Capture:
        if len(memory_files) > 1:
            raise UsageError(f"--memory {memory_files[1]}: the stream has one RAM file at most")
        return _StreamReader(source, workspace, next(iter(memory_files), None)).read()


FORMAT = QemuMigration()


class _StreamReader:
    def __init__(self, source: Input, workspace: Workspace, memory_file: Path | None) -> None:
        self._native = NativeRecorder(workspace)
        self._cursor = StreamCursor(source.read_into, self._native.builder.literal)
        self._state = StateWriter(workspace.spool())
        self._ram = RamReader(self._cursor, self._native.builder, self._state, source, workspace, memory_file)
        self._configuration = _Configuration()
        self._ram_id: int | None = None
        self._ram_ended = False
        self._footers = True  # whether sections have footers; the first one tells
        self._devices_at = 0  # where in the state the device sections begin

    def read(self) -> Capture:
        self._read_header()
        if self._cursor.peek_u8("section type") == CONFIGURATION:
            self._read_configuration()
        while (kind := self._cursor.peek_u8("section type")) not in (SECTION_FULL, EOF):
            if kind == SECTION_START:
                self._read_start()
            elif kind in (SECTION_PART, SECTION_END):
                self._read_part(kind)
            elif kind == COMMAND:
                self._read_command()
            else:
                raise self._cursor.error(f"{kind:#04x} is no known type", "section type")
        description = self._read_devices()
        memory, exceptions, superseded = self._ram.finish()
        native = self._native.finish(exceptions, superseded)
        geometry, notes = memory_layout(self._configuration.machine, self._ram.main.size)
        vcpus: list[VcpuState] = []
        if description is not None:
            vcpus = find_vcpus(self._state.spool, self._devices_at, json.loads(description.text))
        return Capture(
            source_format=FORMAT.name,
            source_version=str(VERSION),
            geometry=geometry,
            memory=memory,
            native=native,
            state=self._state.spool,
            config={"qemu-vmdesc.json": description.text} if description else {},
            restore=self._restore(description, notes),
            vcpus=tuple(vcpus),
        )

    def _restore(self, description: Description | None, notes: list[str]) -> dict[str, Any]:
        main = self._ram.main
        restore: dict[str, Any] = {
            "vmm": "qemu",
            "machine": self._configuration.machine,
            "ram_block": main.name,
            "ram_bytes": main.size,
            "incoming": "plain",
            "other_blocks": {block.name: block.size for block in self._ram.blocks.values() if block is not main},
            "vmdesc": description is not None,
        }
        if description is not None and description.cpus:
            restore["cpus"] = description.cpus
        if self._configuration.uuid:
            restore["uuid"] = self._configuration.uuid.hex()
        if notes:
            restore["notes"] = notes
        return restore

    def _read_header(self) -> None:
        cursor = self._cursor
        magic = cursor.take(4, "magic")
        if magic != MAGIC:
            raise cursor.error(f"{magic.hex()} is not {MAGIC.hex()} (QEVM)", "magic", back=4)
        version = cursor.u32("version")
        if version != VERSION:
            raise cursor.error(f"{version} is not {VERSION}, the only one that is understood", "version", back=4)
        self._state.raw(MAGIC + version.to_bytes(4, "big"))

    def _read_configuration(self) -> None:
        cursor = self._cursor
        cursor.u8("section type")
        length = cursor.u32("length of machine type")
        if length > _MAX_MACHINE_NAME:
            raise cursor.error(f"{length} bytes", "length of machine type", back=4)
        machine = self._configuration.machine = cursor.text(length, "machine type")
        self._state.raw(bytes([CONFIGURATION]) + length.to_bytes(4, "big") + machine.encode("ascii"))
        while cursor.peek_u8("section type") == SUBSECTION:
            self._read_subsection()

    def _read_subsection(self) -> None:
        cursor = self._cursor
        at = cursor.position
        cursor.u8("section type")
        name = cursor.string("configuration subsection")
        version = cursor.u32(f"version of {name}")
        header = bytes([SUBSECTION, len(name)]) + name.encode("ascii") + version.to_bytes(4, "big")
        back = cursor.position - at
        if version != 1:
            raise cursor.error(f"version {version} of {name!r} is not understood", "configuration subsection", back)
        if name == "configuration/capabilities":
            self._read_capabilities()  # and not into the state: they would bind the destination to the same form
        elif name == "configuration/target-page-bits":
            bits = cursor.u32("target page bits")
            if bits != TARGET_PAGE_BITS:
                raise cursor.error(
                    f"{bits}: only guests with pages of {1 << TARGET_PAGE_BITS} bytes are supported",
                    "target page bits",
                    back=4,
                )
            self._state.raw(header + bits.to_bytes(4, "big"))
        elif name == "configuration/uuid":
            self._configuration.uuid = cursor.take(16, "uuid")
            self._state.raw(header + self._configuration.uuid)
        else:
            raise cursor.error(f"{name!r} is not understood", "configuration subsection", back)

    def _read_capabilities(self) -> None:
        cursor = self._cursor
        count = cursor.u32("number of capabilities")
        if count > _MAX_CAPABILITIES:
            raise cursor.error(f"{count} are too many", "number of capabilities", back=4)
        for _ in range(count):
            name = cursor.string("capability")
            if name != IGNORE_SHARED:
                reason = _REFUSED_CAPABILITIES.get(name, f"{name!r} is not understood")
                raise cursor.error(reason, "capability", back=len(name))
            self._configuration.capabilities.append(name)

    def _read_start(self) -> None:
        cursor = self._cursor
        at = cursor.position
        cursor.u8("section type")
        section = cursor.u32("section id")
        name = cursor.string("section name")
        back = len(name)
        if name != "ram":
            raise cursor.error(f"iterable section {name!r} is not understood, only 'ram' is", "section name", back)
        if self._ram_id is not None:
            raise cursor.error("a second section 'ram'", "section name", back)
        instance = cursor.u32("section instance")
        version = cursor.u32("section version")
        if version != RAM_VERSION:
            raise cursor.error(f"{version} of 'ram' is not {RAM_VERSION}", "section version", back=4)
        self._ram_id = section
        header = bytes([SECTION_START]) + section.to_bytes(4, "big") + bytes([len(name)]) + name.encode("ascii")
        header += instance.to_bytes(4, "big") + version.to_bytes(4, "big")
        assert cursor.position == at + len(header)
        self._state.start_ram(section, header)
        self._ram.read_first(IGNORE_SHARED in self._configuration.capabilities)
        self._footers = cursor.peek_u8("section footer") == SECTION_FOOTER
        self._read_footer(section)
        self._state.close_start(self._footers)

    def _read_part(self, kind: int) -> None:
        cursor = self._cursor
        cursor.u8("section type")
        section = cursor.u32("section id")
        if section != self._ram_id:
            raise cursor.error(f"{section:#x} was not started", "section id", back=4)
        if self._ram_ended:
            raise cursor.error("more of 'ram' after its end", "section type", back=5)
        self._ram.read_records()
        self._read_footer(section)
        if kind == SECTION_END:
            self._finish_ram()

    def _finish_ram(self) -> None:
        self._ram_ended = True
        self._state.finish_ram()

    def _read_footer(self, section: int) -> None:
        if not self._footers:
            return
        cursor = self._cursor
        mark = cursor.u8("section footer")
        if mark != SECTION_FOOTER:
            raise cursor.error(f"{mark:#04x} is not {SECTION_FOOTER:#04x}", "section footer", back=1)
        found = cursor.u32("section id in footer")
        if found != section:
            raise cursor.error(f"{found:#x} is not the section's {section:#x}", "section id in footer", back=4)

    def _read_command(self) -> None:
        cursor = self._cursor
        cursor.u8("section type")
        command = cursor.u16("command")
        if command in _REFUSED_COMMANDS:
            raise cursor.error(
                f"{_REFUSED_COMMANDS[command]}: pages of a postcopy or COLO migration come on demand, the stream alone"
                " is no image of the guest",
                "command",
                back=2,
            )
        wanted = (_DROPPED_COMMANDS | _KEPT_COMMANDS).get(command)
        if wanted is None:
            raise cursor.error(f"{command} is not understood", "command", back=2)
        length = cursor.u16("length of command")
        if length != wanted:
            raise cursor.error(f"{length} is not {wanted}", "length of command", back=2)
        data = cursor.take(length, "command data")
        if command in _KEPT_COMMANDS:
            encoded = bytes([COMMAND]) + command.to_bytes(2, "big") + length.to_bytes(2, "big") + data
            if self._ram_id is None or self._ram_ended:
                self._state.raw(encoded)
            else:
                self._state.command(encoded)

    def _read_devices(self) -> Description | None:
        cursor = self._cursor
        if self._ram_id is None:
            if cursor.peek_u8("section type") == EOF:
                raise cursor.error("the stream ends without a section 'ram'", "section type")
            cursor.skip(5)
            name = cursor.string("section name")
            raise cursor.error(
                f"device {name!r} (virtio-mem?) is saved before RAM, which is not supported", "section name", len(name)
            )
        if not self._ram_ended:
            self._finish_ram()
        at = self._devices_at = self._state.spool.size
        offset = cursor.position
        while cursor.reach(1):
            count = cursor.available
            self._state.raw(cursor.buffer[cursor.start : cursor.start + count])
            cursor.skip(count)
        cursor.flush()
        self._state.spool.flush()
        return check_devices(self._state.spool, at, offset)
