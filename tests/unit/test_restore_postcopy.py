"""The messages of a postcopy migration, both ways, and what is decided on them; nothing here talks to a QEMU."""

from __future__ import annotations

import json
import re
import shlex
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import RestoreError
from imagefs.restore.incoming import runnable
from imagefs.restore.migration_stream import PageWriter, ask_for_bitmap, begin, resume, take_apart
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.page_ledger import PageLedger
from imagefs.restore.qemu_command import receiving_command
from imagefs.restore.qemu_machine import Machines
from imagefs.restore.qemu_options import parse_arguments
from imagefs.restore.return_path import PageRequest, Pong, ReceivedBitmap, ResumeAcknowledged, ReturnPath, Shut
from imagefs.restore.userfaultfd import userfaultfd_obstacle
from tests.unit.test_restore_incoming import section as global_state

PAGE = 4096
EOS = (16).to_bytes(8, "big")
MACHINES = Machines("qemu", frozenset({"pc-i440fx-7.2"}), {"pc": "pc-i440fx-7.2"})
IMAGE = RestoreImage(Path("/mnt/vm1"), "pc-i440fx-7.2", "ram", 512 << 20, 2)


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def record(block: str, offset: int, data: bytes) -> bytes:
    return struct.pack(">Q", offset | (8 if data else 2)) + name(block) + (data or b"\0")


HEAD = b"QEVM\0\0\0\3"
CONFIGURATION = b"\7\0\0\0\2pc" + b"\5" + name("configuration/uuid") + b"\0\0\0\1" + bytes(16)
TABLE = struct.pack(">Q", 0x7000 | 4) + name("pc.ram") + struct.pack(">Q", 0x4000) + name("vga") + b"\0" * 6 + b"\x30\0"
START = b"\1\0\0\0\2" + name("ram") + b"\0\0\0\0\0\0\0\4" + TABLE + EOS
PART = b"\2\0\0\0\2" + record("vga", 0, bytes(range(256)) * 16) + record("vga", PAGE, b"") + EOS
END = b"\3\0\0\0\2" + EOS
FOOTER = b"\x7e\0\0\0\2"
SWITCHOVER = b"\x08\0\x0b\0\0"
DEVICES = b"\4\0\0\0\3" + name("timer") + bytes(8) + b"contents \0\6\0\0\0\0{ of it" + b"\x7e\0\0\0\3"
JSON = b'{"page_size": 4096, "devices": []}'
DESCRIPTION = b"\0\6" + len(JSON).to_bytes(4, "big") + JSON


def state(footer: bytes = FOOTER, description: bytes = DESCRIPTION) -> bytes:
    ram = START + footer + PART + footer + SWITCHOVER + END + footer
    return HEAD + CONFIGURATION + ram + DEVICES + description


@pytest.mark.parametrize("footer", [FOOTER, b""])
@pytest.mark.parametrize("description", [DESCRIPTION, b"\0"])
def test_state_taken_apart_and_sent(footer: bytes, description: bytes) -> None:
    parts = take_apart(state(footer, description))
    assert parts.opening == HEAD + CONFIGURATION
    assert parts.start == START + footer + PART + footer
    assert (parts.commands, parts.devices) == (SWITCHOVER, DEVICES)
    assert (parts.section, parts.footers, parts.blocks) == (2, bool(footer), {"pc.ram": 0x4000, "vga": 0x3000})
    package = b"\x08\0\4\0\0" + DEVICES + b"\x08\0\2\0\4\0\0\0\2" + b"\x08\0\5\0\0"
    assert begin(parts, "pc.ram") == b"".join(
        (
            *(HEAD, CONFIGURATION, b"\x08\0\1\0\0", b"\x08\0\2\0\4\0\0\0\1"),
            b"\x08\0\3\0\x10" + bytes(6) + b"\x10\0" + bytes(6) + b"\x10\0",
            *(START, footer, PART, footer, SWITCHOVER),
            b"\x08\0\6\0\x19\0" + name("pc.ram") + b"\0" + bytes(14) + b"\x40\0",
            b"\x08\0\7\0\4" + len(package).to_bytes(4, "big"),
            package,
        )
    )
    with pytest.raises(RestoreError, match=r"no RAM block 'ram', only 'pc.ram', 'vga'"):
        begin(parts, "ram")


def test_truncated_states_are_refused() -> None:
    whole = state()
    without_description = len(whole) - len(DESCRIPTION) + 1
    for length in range(len(whole)):
        if length == without_description:
            continue
        with pytest.raises(RestoreError, match="the image's state: "):
            take_apart(whole[:length])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"QEVM", b"QEVX", "not a QEMU migration stream"),
        (name("configuration/uuid"), name("configuration/uuix"), "'configuration/uuix' is not understood"),
        (name("ram") + bytes(4), name("rom") + bytes(4), "begins before RAM's"),
        (record("vga", PAGE, b""), record("vgb", PAGE, b""), "block that is not in the table"),
        (struct.pack(">Q", PAGE | 2), struct.pack(">Q", PAGE | 0x42), "RAM record 0x1042 is not understood"),
        (END, b"\3\0\0\0\7" + EOS, "section 0x7 of type 0x3 is not understood"),
        (START + FOOTER, b"", "section 0x2 of type 0x2 is not understood"),
    ],
)
def test_states_that_are_not_understood(old: bytes, new: bytes, says: str) -> None:
    assert old in state()
    with pytest.raises(RestoreError, match=says):
        take_apart(state().replace(old, new))


def test_package_that_is_too_large() -> None:
    parts = replace(take_apart(state()), devices=bytes(1 << 24))
    with pytest.raises(RestoreError, match="QEMU takes 16,777,216 for postcopy"):
        begin(parts, "pc.ram")


def test_pages() -> None:
    writer = PageWriter("pc.ram", 2, True)
    data = b"x" * PAGE
    assert writer.pages([(3, data), (1, memoryview(bytes(PAGE)))]) == (
        b"\2\0\0\0\2" + record("pc.ram", 3 * PAGE, data) + record("pc.ram", PAGE, b"") + EOS + FOOTER
    )
    assert writer.end == END + FOOTER + b"\0"
    assert PageWriter("pc.ram", 2, False).end == END + b"\0"
    assert ask_for_bitmap("pc.ram") == b"\x08\0\x0a\0\7" + name("pc.ram")
    assert resume() == b"\x08\0\x09\0\0"


# ---- the way back ----

BITMAP = b"\xff\0\0\0\0\0\0\x80"
SAID = b"".join(
    (
        b"\0\2\0\4\0\0\0\1",
        b"\0\3\0\x13" + struct.pack(">QI", 0x3000, 0x1000) + name("pc.ram"),
        b"\0\4\0\x0c" + struct.pack(">QI", 0x5000, 0x2000),
        b"\0\7\0\0",
        b"\0\5\0\7" + name("pc.ram") + (8).to_bytes(8, "big") + BITMAP + bytes.fromhex("0123456789abcdef"),
        b"\0\6\0\4\0\0\0\1",
        b"\0\1\0\4\0\0\0\0",
    )
)
HEARD = [
    Pong(1),
    PageRequest("pc.ram", 0x3000, 0x1000),
    PageRequest("pc.ram", 0x5000, 0x2000),
    ReceivedBitmap("pc.ram", BITMAP),
    ResumeAcknowledged(),
    Shut(0),
]


@given(st.lists(st.integers(1, 40), min_size=1))
def test_return_path_in_pieces(sizes: list[int]) -> None:
    path = ReturnPath()
    heard: list[object] = []
    at = 0
    for number in range(len(SAID)):
        size = sizes[number % len(sizes)]
        heard += path.feed(SAID[at : at + size])
        at += size
    assert heard == HEARD


@pytest.mark.parametrize(
    "said",
    [
        b"\0\x63\0\0",
        b"\0\1\0\2\0\0",
        b"\0\4\0\x0c" + bytes(12),  # of which block?
        b"\0\3\0\x0c" + bytes(12),
        b"\0\3\0\x0e" + bytes(12) + b"\x05a",
        b"\0\5\0\0",
        b"\0\5\0\7" + name("pc.ram") + b"\xff" * 8,
        b"\0\5\0\7" + name("pc.ram") + (8).to_bytes(8, "big") + BITMAP + bytes(8),
    ],
)
def test_what_no_qemu_says(said: bytes) -> None:
    with pytest.raises(RestoreError, match="return path: message"):
        list(ReturnPath().feed(said))


# ---- which pages are sent ----


@given(st.integers(1, 300), st.data())
def test_every_page_once(pages: int, data: st.DataObject) -> None:
    received = data.draw(st.sets(st.integers(0, pages - 1)))
    bitmap = bytearray((pages + 63) // 64 * 8)
    for page in received:
        bitmap[page // 8] |= 1 << page % 8
    ledger = PageLedger(pages, bytes(bitmap))
    content = [number.to_bytes(4, "big") * 1024 for number in range(pages)]
    sent = set(received)
    assert ledger.missing == pages - len(sent)
    for _ in range(5):
        first = data.draw(st.integers(0, pages - 1))
        end = data.draw(st.integers(first, pages))
        missing = set(range(first, end)) - sent
        assert ledger.missing_in(first, end) == len(missing)
        taken = dict(ledger.take(first, b"".join(content[first:end])))
        assert set(taken) == missing
        assert all(piece == content[number] for number, piece in taken.items())
        sent |= missing
        assert ledger.missing == pages - len(sent)
        assert ledger.next_missing(first) == min(set(range(first, pages)) - sent, default=pages)
        assert all(ledger.is_sent(page) == (page in sent) for page in range(pages))


def test_large_bitmap() -> None:
    pages = (1 << 17) + 5
    ledger = PageLedger(pages, b"\xff" * (1 << 14) + b"\x0f" + bytes(7))
    assert (ledger.missing, ledger.next_missing(0)) == (1, pages - 1)


# ---- the rest ----


def test_run_state() -> None:
    before, after = b"before", b"after"
    assert runnable(before + global_state(b"paused") + after) == (
        before + global_state(b"paused").replace(b"paused\0", b"running") + after,
        True,
    )
    for kept, runs in ((global_state(b"running"), True), (global_state(b"io-error"), False), (b"", True)):
        assert runnable(kept) == (kept, runs)


def receiving(line: str, *, stopped: bool = False) -> dict[str, str | None]:
    command = receiving_command(shlex.split(line), IMAGE, lambda: MACHINES, stopped=stopped)
    return {option.name or "": option.value for option in parse_arguments(command.arguments[1:])}


RAM = "memory-backend-ram,id=ram,size=512M"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("qemu", RAM),
        ("qemu -object memory-backend-ram,id=mem,size=512M,prealloc=on -M pc,memory-backend=mem", f"{RAM},prealloc=on"),
        (
            "qemu -object memory-backend-memfd,id=ram,size=512M,share=on",
            "memory-backend-memfd,id=ram,size=512M,share=on",
        ),
        (
            "qemu -object memory-backend-file,id=ram,size=512M,mem-path=/x,share=on,prealloc=on,host-nodes.0=1",
            "memory-backend-memfd,id=ram,size=512M,share=on,host-nodes.0=1",
        ),
        ("qemu -object memory-backend-file,id=ram,size=512M,mem-path=/x,merge=off", f"{RAM},merge=off"),
        ("qemu -mem-path /x -mem-prealloc", RAM),
    ],
)
def test_ram_that_can_be_filled_later(line: str, wanted: str) -> None:
    found = receiving(line)
    assert found["object"] == wanted
    assert found["machine"] == "pc-i440fx-7.2,memory-backend=ram"
    assert found["incoming"] == "defer"
    assert not {"mem-path", "mem-prealloc", "S"} & set(found)


def test_ram_in_json() -> None:
    given = {"qom-type": "memory-backend-file", "id": "mem", "size": 512 << 20, "mem-path": "/x", "share": True}
    found = receiving(shlex.join(["qemu", "-object", json.dumps(given), "-M", "pc,memory-backend=mem"]))
    wanted = {"qom-type": "memory-backend-memfd", "id": "ram", "size": 512 << 20, "share": True}
    assert json.loads(found["object"] or "") == wanted


@pytest.mark.parametrize(
    ("line", "monitor", "serial"),
    [
        ("qemu", "vc", None),
        ("qemu -nographic", None, "mon:stdio"),
        ("qemu -nographic -serial null", "stdio", "null"),
        ("qemu -nographic -nodefaults", None, None),
        ("qemu -nographic -qmp unix:x", None, None),
        ("qemu -nographic -monitor tcp::1", "tcp::1", None),
    ],
)
def test_monitor_that_qemu_has_by_itself(line: str, monitor: str | None, serial: str | None) -> None:
    found = receiving(line)
    assert (found.get("monitor"), found.get("serial")) == (monitor, serial)


def test_stopped_and_refused() -> None:
    assert "S" in receiving("qemu", stopped=True)
    assert "sandbox" in receiving("qemu -sandbox on,spawn=deny")
    for option in ("-daemonize", "-preconfig", "-incoming defer", "-loadvm x"):
        with pytest.raises(RestoreError, match="leave it out"):
            receiving(f"qemu {option}")


@pytest.mark.parametrize(
    ("sysctl", "capabilities", "device", "says"),
    [
        ("1", 0, False, None),
        ("0", 1 << 19, False, None),
        ("0", 0, True, None),
        ("0", 1 << 18, False, "sysctl vm.unprivileged_userfaultfd=1.* CAP_SYS_PTRACE .* /dev/userfaultfd"),
        (None, 1 << 19, False, "no userfaultfd"),
    ],
)
def test_permission(tmp_path: Path, sysctl: str | None, capabilities: int, device: bool, says: str | None) -> None:
    for directory in ("proc/sys/vm", "proc/self", "dev"):
        (tmp_path / directory).mkdir(parents=True)
    if sysctl is not None:
        (tmp_path / "proc/sys/vm/unprivileged_userfaultfd").write_text(f"{sysctl}\n")
    (tmp_path / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    if device:
        (tmp_path / "dev/userfaultfd").touch()
    obstacle = userfaultfd_obstacle(tmp_path)
    if says is None:
        assert obstacle is None
    else:
        assert obstacle is not None
        assert re.search(says, obstacle)
