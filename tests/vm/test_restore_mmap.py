"""``imagefs restore`` by the mmap door: the guest goes on where it stopped, with its memory as it was."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.link import Link
from support.mounts import mounted
from support.vm import PATIENCE, QEMU, Vm

from imagefs.restore.qemu_machine import list_machines
from imagefs.restore.qemu_options import WITHOUT_VALUE
from tests.vm.conftest import SLOW_MBIT
from tests.vm.restoring import SavedVm, Stored, check_that_it_goes_on, checked, restored, suspend


def resumed(saved: SavedVm, imagefs: Sequence[str], *extra: str) -> Vm:
    """The same machine by the same command line, behind ``imagefs restore``."""
    options = {**saved.options, "extra": (*saved.options.get("extra", ()), *extra)}
    return Vm(saved.guest, prefix=[*imagefs, "restore", str(saved.directory), "--door", "mmap", "--"], **options)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(vm: Vm, saved: SavedVm, writes: int = 0) -> None:
    nonce, count = vm.ping()
    assert nonce == saved.nonce
    assert saved.count <= count < saved.count + 600, "it did not go on counting where it stopped"
    assert vm.ask("check") == f"ok pages={saved.guest.fill_mib << 8} writes={writes} nonce={nonce}"


@pytest.mark.parametrize("name", ["pc", "q35"])
def test_guest_goes_on(name: str, imagefs: list[str], request: pytest.FixtureRequest) -> None:
    """Twice from one image, each writing to its memory: nothing of that reaches the mount."""
    saved: SavedVm = request.getfixturevalue(name)
    before = digest(saved.directory / "memory")
    for _ in range(2):
        with resumed(saved, imagefs) as vm:
            vm.wait_running()
            check(vm, saved)
            assert vm.ask("vcpus") == str(saved.options.get("smp", 1))
            assert vm.ask("write 2000 5").startswith("ok")
            check(vm, saved, writes=2000)
    assert digest(saved.directory / "memory") == before


def test_guest_runs_while_its_pages_come(saved: Stored, link: Link, imagefs: list[str], tmp_path: Path) -> None:
    """Over a slow link; then suspended again, which reads all of it."""
    mountpoint = tmp_path / "mnt"
    with (
        mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"),
        restored(saved, imagefs, mountpoint, door="mmap") as vm,
    ):
        vm.wait_running()
        check_that_it_goes_on(vm, saved)
        status = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
        assert not status["memory"]["complete"], "the link was not slow enough to show anything"
        link.set(mbit=4 * SLOW_MBIT)
        assert vm.ask("check") == checked(saved)
        assert vm.ask("write 500 3").startswith("ok")
        assert vm.ask("check") == checked(saved, writes=500)
        suspend(imagefs, vm, tmp_path / "store" / "vm2")
    verified = subprocess.run(
        [*imagefs, "verify", f"{tmp_path}/store/vm2"], capture_output=True, check=False, timeout=60
    )
    assert verified.returncode == 0, verified.stderr


def test_the_next_guest_finds_pages_in_the_kernel(saved: Stored, imagefs: list[str], tmp_path: Path) -> None:
    """What one guest has read stays in the kernel's cache, also while another one maps the image anew."""
    mountpoint = tmp_path / "mnt"

    def read() -> int:
        status = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
        return int(status["mount"]["bytes_read"])

    with mounted(str(saved.store / "vm1"), mountpoint, f"cache={tmp_path}/cache"):
        seen = [read()]
        for _ in range(2):
            with restored(saved, imagefs, mountpoint, door="mmap") as vm:
                vm.wait_running()
                assert vm.ask("check") == checked(saved)
            seen.append(read())
    first, second = seen[1] - seen[0], seen[2] - seen[1]
    assert first > saved.guest.fill_mib << 20
    assert second < first / 4


def test_memory_is_mapped_without_huge_pages(pc: SavedVm, imagefs: list[str]) -> None:
    """The shim's doing: random access (rr), no huge pages (hg), though QEMU asks for them."""
    with resumed(pc, imagefs) as vm:
        vm.wait_running()
        maps = Path(f"/proc/{vm.process.pid}/smaps").read_text()
    (flags,) = re.findall(rf"{pc.directory}/memory\n(?:.*\n)*?VmFlags: (.*)\n", maps)
    assert "rr" in flags.split()
    assert "hg" not in flags.split()


def test_guest_without_its_machine_options(q35: SavedVm, imagefs: list[str]) -> None:
    """What the command line leaves out, the image knows: -machine, -m, -smp."""
    vm = resumed(q35, imagefs)
    for option in ("-machine", "-m", "-smp"):
        at = vm.command.index(option)
        del vm.command[at : at + 2]
    with vm:
        vm.wait_running()
        check(vm, q35)


def test_guest_that_is_to_wait(pc: SavedVm, imagefs: list[str]) -> None:
    with resumed(pc, imagefs, "-S") as vm:
        deadline = time.monotonic() + PATIENCE
        while (status := vm.status) == "inmigrate" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert status == "paused"
        vm.qmp.execute("cont")
        vm.wait_running()
        check(vm, pc)


@pytest.mark.parametrize(("number", "status"), [(0, 1), (21, 43)])
def test_exit_status_is_qemus(pc: SavedVm, imagefs: list[str], number: int, status: int) -> None:
    with resumed(pc, imagefs) as vm:
        vm.wait_running()
        vm.ping()
        vm.send(f"exit {number}")
        assert vm.wait() == status


def test_signals_are_qemus(pc: SavedVm, imagefs: list[str]) -> None:
    with resumed(pc, imagefs) as vm:
        vm.wait_running()
        vm.process.send_signal(signal.SIGTERM)
        assert vm.wait() == 0
        assert "terminating on signal 15" in vm.said()
    with resumed(pc, imagefs) as vm:
        vm.wait_running()
        vm.process.kill()
        assert vm.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-machine", "q35", "-m", "192M"], r"saved on machine pc-i440fx-\S+, the command line says q35"),
        (["-machine", "microvm"], "the command line says microvm"),
        (["-m", "1G"], "-m 1G: that is 1,073,741,824 bytes of RAM, the image has 201,326,592: give 192M"),
        (["-smp", "3"], "-smp 3: the image has 1 CPUs"),
        (["-incoming", "defer"], "-incoming defer: leave it out"),
    ],
)
def test_what_cannot_match_is_refused(pc: SavedVm, imagefs: list[str], arguments: list[str], says: str) -> None:
    command = [*imagefs, "restore", str(pc.directory), "--", QEMU, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(rf"imagefs restore: .*{says}.*\n", done.stderr), done.stderr


def test_program_that_is_no_qemu(pc: SavedVm, imagefs: list[str]) -> None:
    command = [*imagefs, "restore", str(pc.directory), "--", "false", "-M", "pc-i440fx-2.12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "false -machine help failed, is it a QEMU?" in done.stderr


def test_what_this_qemu_lists() -> None:
    machines = list_machines(QEMU)
    assert {"pc", "q35"} <= set(machines.aliases)
    assert set(machines.aliases.values()) <= machines.types


def test_options_without_a_value_are_known() -> None:
    """Of this QEMU: those whose help goes from the name straight to the description."""
    text = subprocess.run([QEMU, "-help"], capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"^--?([\w-]+)(?:\t|  |$)", text, re.MULTILINE)) - {"dtb"}  # "-dtb    file"
    assert len(flags) > 15
    assert flags <= WITHOUT_VALUE
    # "-h or -help", "-async-teardown enable …": one space in front of what is no value.
    valued = set(re.findall(r"^-([\w-]+) \S", text, re.MULTILINE)) - {"h", "async-teardown"}
    assert not WITHOUT_VALUE & valued
