"""``imagefs translate`` and ``hexdump`` on what a mount shows: a directory with its files does as well."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imagefs.cli import main
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.vcpu import VcpuState, describe_vcpu
from tests.unit.tables import ABOVE, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE, Mapper, Ram, paging

PROGRAM = 0x40_0000
KERNEL = 0xFFFF_8880_0000_0000


class Shown:
    """What is mounted at ``path``: a guest with two vCPUs in different programs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ram = ram = Ram(64, 32)
        rng = random.Random(5)
        ram.data[10 * PAGE_SIZE : 12 * PAGE_SIZE] = rng.randbytes(2 * PAGE_SIZE)
        ram.data[40 * PAGE_SIZE : 41 * PAGE_SIZE] = b"Linux version 6.1.0 " * 204 + bytes(16)
        self.first, self.second = Mapper(ram, 4, range(1, 6)), Mapper(ram, 4, range(20, 30))
        self.first.map(PROGRAM, ram.address(40) | PRESENT | USER | 0x20)
        self.first.map(PROGRAM + PAGE_SIZE, ram.address(10) | PRESENT | USER | NO_EXECUTE | WRITABLE | 0x60)
        self.second.map(PROGRAM, ram.address(11) | PRESENT | USER)
        self.second.map(KERNEL, 0 | PRESENT | 0x100 | LARGE, large_at=2)
        self.vcpus = [paging(4, self.first.root), paging(4, self.second.root)]
        path.mkdir()
        (path / "memory").write_bytes(ram.data)
        self.describe(*self.vcpus)

    def describe(self, *vcpus: VcpuState) -> None:
        document: dict[str, Any] = {
            "source": {"format": "test", "version": "1"},
            "page_size": PAGE_SIZE,
            "memory_bytes": len(self.ram.data),
            "state_bytes": 0,
            "native_bytes": 0,
            "regions": [
                {"name": r.name, "guest_address": r.guest_address, "size": r.size, "offset": r.offset}
                for r in self.ram.geometry.regions
            ],
            "config": [],
            "restore": {},
            "vcpus": [describe_vcpu(vcpu) for vcpu in vcpus],
            "page_tables": [],
        }
        (self.path / "metadata.json").write_text(json.dumps(document))


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path / "mnt")


class Run:
    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
        self.status = main([str(argument) for argument in arguments])
        self.out, self.err = capsys.readouterr()


def test_translate(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    above = ABOVE + 8 * PAGE_SIZE
    for arguments, text in {
        (f"{PROGRAM + 0x123:#x}",): f"{above + 0x123:#x} 4KiB r-x user accessed",
        (str(PROGRAM + PAGE_SIZE),): "0xa000 4KiB rw- user accessed dirty",
        ("--cpu", "1", f"{PROGRAM:#x}"): "0xb000 4KiB r-x user",
        ("--cr3", f"{shown.second.root | 0x801:#x}", f"{KERNEL + 0x1234:#x}"): "0x1234 2MiB r-x supervisor global",
    }.items():
        run = Run(capsys, "translate", shown.path, *arguments)
        assert (run.status, run.out, run.err) == (0, text + "\n", "")


def test_translate_shows_the_way(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "translate", "-v", shown.path, f"{PROGRAM:#x}")
    assert run.out.splitlines() == [
        "pml4[0] at 0x1000: 0x0000000000002007",
        "pdpt[0] at 0x2000: 0x0000000000003007",
        "pd[2] at 0x3010: 0x0000000000004007",
        "pt[0] at 0x4000: 0x0000000100008025",
        "0x100008000 4KiB r-x user accessed",
    ]


def test_translate_says_where_it_ends(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "translate", "-v", shown.path, f"{PROGRAM + 0x20_0000:#x}")
    assert run.status == 1
    assert run.out.splitlines()[-1] == "pd[3] at 0x3018: 0x0000000000000000"
    assert run.err == "imagefs translate: 0x600000: not present: pd[3] at 0x3018: 0x0000000000000000\n"


def test_guests_of_which_less_is_known(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    shown.describe()
    run = Run(capsys, "translate", shown.path, f"{PROGRAM:#x}")
    assert (run.status, run.out) == (2, "")
    assert "say it with --cr3" in run.err
    run = Run(capsys, "translate", shown.path, "--cr3", hex(shown.first.root), f"{PROGRAM:#x}")
    assert run.out == "0x100008000 4KiB r-x user accessed\n"
    shown.describe(VcpuState(mode="real"))
    run = Run(capsys, "translate", shown.path, "0x7c00")
    assert run.out == "0x7c00: paging is off\n"


def hexdump(path: Path, offset: int, length: int) -> list[str]:
    """By the program of that name."""
    command = ["hexdump", "-C", "-s", str(offset), "-n", str(length), str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize(
    ("address", "length"),
    [(0xA000, 0x2000), (0xA123, 333), (0xBFF0, 32), (0x0, 0x6000), (0x1000, 5), (0xA000, 1), (0, 0), (0x1F000, 0x1000)],
)
def test_hexdump_is_that_of_hexdump(
    shown: Shown, capsys: pytest.CaptureFixture[str], address: int, length: int
) -> None:
    run = Run(capsys, "hexdump", shown.path, "--phys", f"{address:#x}", f"{length:#x}")
    assert (run.status, run.err) == (0, "")
    assert run.out.splitlines() == hexdump(shown.path / "memory", address, length)


def test_hexdump_of_virtual_memory(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pages that are side by side there, and far apart in memory."""
    (shown.path / "pages").write_bytes(
        shown.ram.data[40 * PAGE_SIZE : 41 * PAGE_SIZE] + shown.ram.data[10 * PAGE_SIZE : 11 * PAGE_SIZE]
    )
    run = Run(capsys, "hexdump", shown.path, "--virt", f"{PROGRAM + 0xF00:#x}", "512")
    assert [line[8:] for line in run.out.splitlines()] == [
        line[8:] for line in hexdump(shown.path / "pages", 0xF00, 512)
    ]
    assert run.out.startswith("00400f00  ")
    run = Run(capsys, "hexdump", shown.path, "--virt", "--cpu", "1", f"{KERNEL + 0xB000:#x}", "16")
    assert run.out.splitlines()[0][16:] == hexdump(shown.path / "memory", 0xB000, 16)[0][8:]
    assert run.out.startswith("ffff88800000b000  ")


def test_hexdump_shows_what_it_can(shown: Shown, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(capsys, "hexdump", shown.path, "--virt", f"{PROGRAM + 0x1FF0:#x}", "64")
    assert run.status == 1
    assert len(run.out.splitlines()) == 1
    assert run.err.startswith("imagefs hexdump: 0x402000: not present: pt[2]")
    run = Run(capsys, "hexdump", shown.path, "--phys", "0x1fff0", "64")
    assert run.status == 1
    assert len(run.out.splitlines()) == 1
    assert run.err == "imagefs hexdump: guest-physical 0x20000 is not in the guest's RAM\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["translate", "{mnt}", "--cpu", "2", "0"], 2, "--cpu 2: the guest has 2 vCPUs, counted from 0"),
        (["translate", "{tmp}", "0"], 1, "no imagefs is mounted there"),
        (["hexdump", "--phys", "{tmp}/absent", "0"], 1, "no such directory"),
        (["hexdump", "--phys", "{tmp}/broken", "0"], 1, "metadata.json: document: this is not JSON"),
        (["hexdump", "--phys", "{tmp}/half", "0"], 1, "half/memory: No such file or directory"),
    ],
)
def test_mistakes(
    shown: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    for name in ("broken", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "metadata.json").write_text("{")
    (tmp_path / "half" / "metadata.json").write_bytes((shown.path / "metadata.json").read_bytes())
    run = Run(capsys, *(word.format(mnt=shown.path, tmp=tmp_path) for word in arguments))
    assert (run.status, run.out) == (status, "")
    assert message in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize("address", ["-1", "0x10000000000000000", "main", "1.5", ""])
def test_addresses_that_are_none(shown: Shown, capsys: pytest.CaptureFixture[str], address: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["hexdump", str(shown.path), "--phys", "--", address])
    assert leaving.value.code == 2
    assert "invalid number value" in capsys.readouterr().err
