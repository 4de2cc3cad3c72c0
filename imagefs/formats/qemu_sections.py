"""The outermost layer of a QEMU migration stream, wherever the stream is: its sections, in order.

As in QEMU's migration/savevm.c. All integers are big-endian.

| type | section       | contents                                                                                |
|------|---------------|-----------------------------------------------------------------------------------------|
|      | header        | magic ``QEVM``, version u32 = 3                                                         |
| 0x07 | CONFIGURATION | see qemu_configuration.py                                                               |
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagefs.errors import UnsupportedInputError
from imagefs.formats.base import Workspace
from imagefs.formats.qemu_cmos import ram_told
from imagefs.formats.qemu_configuration import (
    CONFIGURATION,
    IGNORE_SHARED,
    MAPPED_RAM,
    Configuration,
    read_configuration,
)
from imagefs.formats.qemu_cpu import find_vcpus
from imagefs.formats.qemu_devices import SECTION_FULL, Description, check_devices
from imagefs.formats.qemu_machine import Layout, memory_layout
from imagefs.formats.qemu_ram import RamReader
from imagefs.formats.qemu_state import SECTION_END, SECTION_FOOTER, SECTION_PART, StateWriter
from imagefs.formats.stream_cursor import StreamCursor
from imagefs.formats.stream_pages import MainMemory
from imagefs.image.capture import ByteSource, Capture
from imagefs.image.native import NativeTemplate, TemplateBuilder

MAGIC = b"QEVM"
VERSION = 3
RAM_VERSION = 4

EOF, SECTION_START, COMMAND = 0x00, 0x01, 0x08

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


@dataclass(frozen=True)
class Guest:
    """What a migration stream holds: memory as the native template wants it, and the rest."""

    memory: ByteSource
    exceptions: ByteSource
    superseded: ByteSource
    state: ByteSource
    configuration: Configuration
    layout: Layout
    blocks: Mapping[str, int]
    """All blocks' sizes in bytes, in the stream's order."""
    description: Description | None
    devices_at: int
    """Where in ``state`` the device sections begin."""

    def capture(
        self, source_format: str, source_version: str, native: NativeTemplate, config: Mapping[str, bytes] | None = None
    ) -> Capture:
        """As a capture of the file that the stream was in."""
        files = dict(config or {})
        vcpus = []
        if self.description is not None:
            files["qemu-vmdesc.json"] = self.description.text
            vcpus = find_vcpus(self.state, self.devices_at, json.loads(self.description.text))
        return Capture(
            source_format=source_format,
            source_version=source_version,
            geometry=self.layout.geometry,
            memory=self.memory,
            native=native,
            state=self.state,
            config=files,
            restore=self._restore(),
            vcpus=tuple(vcpus),
        )

    def _restore(self) -> dict[str, Any]:
        ram, plugged = self.layout.ram, self.layout.plugged
        restore: dict[str, Any] = {
            "vmm": "qemu",
            "machine": self.configuration.machine,
            "ram_block": ram[0],
            "ram_bytes": sum(self.blocks[name] for name in ram),
            "incoming": "plain",
            "other_blocks": {name: size for name, size in self.blocks.items() if name not in ram + plugged},
            "vmdesc": self.description is not None,
        }
        if len(ram + plugged) > 1:
            restore["ram_blocks"] = {name: self.blocks[name] for name in ram}
            restore["plugged_blocks"] = {name: self.blocks[name] for name in plugged}
        if self.description is not None and self.description.cpus:
            restore["cpus"] = self.description.cpus
        if self.configuration.uuid:
            restore["uuid"] = self.configuration.uuid.hex()
        if self.layout.notes:
            restore["notes"] = list(self.layout.notes)
        return restore


class StreamReader:
    """Reads the stream at a cursor to its end.

    Pages of guest memory go to what ``keep`` makes for so many pages, and their records to ``builder``, which knows
    where in the native file they are; ``memory_files`` are the RAM files of a stream saved with x-ignore-shared.
    """

    def __init__(
        self,
        cursor: StreamCursor,
        builder: TemplateBuilder,
        workspace: Workspace,
        keep: Callable[[int], MainMemory],
        memory_files: Sequence[Path] = (),
    ) -> None:
        self._cursor = cursor
        self._state = StateWriter(workspace.spool())
        self._ram = RamReader(cursor, builder, self._state, workspace, keep, memory_files)
        self._configuration = Configuration()
        self._ram_id: int | None = None
        self._ram_ended = False
        self._footers = True  # whether sections have footers; the first one tells
        self._devices_at = 0  # where in the state the device sections begin

    def read(self) -> Guest:
        """Raises UnsupportedInputError, and UsageError for memory files that are not wanted."""
        self._read_header()
        if self._cursor.peek_u8("section type") == CONFIGURATION:
            self._configuration = read_configuration(self._cursor, self._state)
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
        return Guest(
            memory,
            exceptions,
            superseded,
            self._state.spool,
            self._configuration,
            self._layout(),
            {name: block.size for name, block in self._ram.blocks.items()},
            description,
            self._devices_at,
        )

    def _layout(self) -> Layout:
        memory = self._ram.blocks.guest_memory
        sizes = {block.name: block.size for block in memory}
        places = {block.name: block.address for block in memory}
        try:
            return memory_layout(
                self._configuration.machine, sizes, places, ram_told(self._state.spool, self._devices_at)
            )
        except ValueError as error:
            raise UnsupportedInputError(str(error), field="RAM block table") from error

    def _read_header(self) -> None:
        cursor = self._cursor
        magic = cursor.take(4, "magic")
        if magic != MAGIC:
            raise cursor.error(f"{magic.hex()} is not {MAGIC.hex()} (QEVM)", "magic", back=4)
        version = cursor.u32("version")
        if version != VERSION:
            raise cursor.error(f"{version} is not {VERSION}, the only one that is understood", "version", back=4)
        self._state.raw(MAGIC + version.to_bytes(4, "big"))

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
        capabilities = self._configuration.capabilities
        self._ram.read_first(IGNORE_SHARED in capabilities, MAPPED_RAM in capabilities)
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
