"""A running QEMU is captured, goes on if it is told to, and goes on if anything fails."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.guest import Guest
from support.vm import PATIENCE, Backend, Vm

from imagefs.errors import RestoreError
from imagefs.formats import open_capture
from imagefs.restore.qmp import QmpError
from imagefs.restore.suspend import Afterwards, suspended

MEMORY_MIB = 192
STATE_AT_MOST = 4 << 20
"""Bytes of a stream without the guest's pages."""

OWN_PARAMETERS = {"max-bandwidth": 1 << 20}
OWN_CAPABILITIES = {"xbzrle": True, "auto-converge": True, "pause-before-switchover": True}
"""What a user may have set, for migrations of their own, and what a plain stream must not have."""


@pytest.fixture(params=["file", "default", "memfd"])
def vm(request: pytest.FixtureRequest, guest: Guest) -> Iterator[Vm]:
    """With the user's own migration settings."""
    with start(guest, request.param) as vm:
        yield vm


def start(guest: Guest, backend: Backend) -> Vm:
    return Vm(guest, memory_mib=MEMORY_MIB, backend=backend)


def set_up(vm: Vm) -> tuple[str, int]:
    """Make the user's settings; the guest's nonce and count once its pattern is there."""
    states = [{"capability": name, "state": state} for name, state in OWN_CAPABILITIES.items()]
    vm.qmp.execute("migrate-set-capabilities", {"capabilities": states})
    vm.qmp.execute("migrate-set-parameters", OWN_PARAMETERS)
    vm.expect("FILLED")
    return vm.ping()


def settings(vm: Vm) -> tuple[dict[str, bool], Any]:
    capabilities = {each["capability"]: each["state"] for each in vm.qmp.execute("query-migrate-capabilities")}
    return capabilities, vm.qmp.execute("query-migrate-parameters")


def check_that_it_goes_on(vm: Vm, nonce: str, count: int) -> None:
    assert vm.status == "running"
    now = vm.ping()
    assert now[0] == nonce
    assert now[1] >= count
    # It is not only the monitor that says so.
    deadline = time.monotonic() + PATIENCE
    while vm.ping()[1] == now[1]:
        assert time.monotonic() < deadline, "it answers, and does not count"
    assert f"writes=0 nonce={nonce}" in vm.ask("check")


def test_suspend_again_and_again(vm: Vm, tmp_path: Path) -> None:
    """Resumed, left paused, from there once more, ended: each time the capture is whole."""
    nonce, count = set_up(vm)
    before = settings(vm)
    sizes = []
    for afterwards in (Afterwards.RESUME, Afterwards.STAY, Afterwards.STAY, Afterwards.QUIT):
        with (
            suspended(vm.qmp_socket, afterwards) as source,
            open_capture(source.stream, spool_dir=tmp_path, memory_files=source.memory_files) as capture,
        ):
            assert capture.geometry.size == MEMORY_MIB << 20
            assert capture.restore["machine"].startswith("pc-i440fx-")
            sizes.append(capture.native.size)
            assert source.ran == (len(sizes) <= 2)
            # With the pages in the stream, its end lets the guest go on.
            goes_on = afterwards is Afterwards.RESUME and not source.memory_files
            assert vm.status == ("running" if goes_on else "postmigrate")
            pages_apart = bool(source.memory_files)
        if afterwards is Afterwards.QUIT:
            break
        assert settings(vm) == before
        if afterwards is Afterwards.RESUME:
            check_that_it_goes_on(vm, nonce, count)
        else:
            assert vm.status == "postmigrate"
    assert vm.wait() == 0
    assert pages_apart == ("share=on" in " ".join(vm.command) and "file" in " ".join(vm.command))
    assert all((size < STATE_AT_MOST) == pages_apart for size in sizes)


def fill_the_disk(vm: Vm, afterwards: Afterwards, length: int) -> None:
    """A consumer that fails after so many bytes; -1 for all."""
    with suspended(vm.qmp_socket, afterwards) as source:
        source.stream.read(length)
        raise OSError("the disk is full")


def consume(vm: Vm, meanwhile: Callable[[], object]) -> None:
    """A consumer that reads all, while something happens."""
    with suspended(vm.qmp_socket) as source:
        source.stream.read(4096)
        meanwhile()
        while source.stream.read(1 << 20):
            pass


def test_consumer_fails(vm: Vm) -> None:
    """In the middle of the stream, then after its end: each time the guest goes on as if nothing had happened."""
    nonce, count = set_up(vm)
    before = settings(vm)
    for afterwards, length in itertools.product((Afterwards.STAY, Afterwards.RESUME), (4096, -1)):
        with pytest.raises(OSError, match="disk is full"):
            fill_the_disk(vm, afterwards, length)
        assert settings(vm) == before
        check_that_it_goes_on(vm, nonce, count)


def test_failures_of_qemu(guest: Guest) -> None:
    with start(guest, "default") as vm:
        nonce, count = set_up(vm)
        before = settings(vm)
        # Someone else cancels: the stream does not just end, it fails.
        with pytest.raises(RestoreError, match="saving the guest has cancelled"):
            consume(vm, lambda: vm.qmp.execute("migrate_cancel"))
        assert settings(vm) == before
        check_that_it_goes_on(vm, nonce, count)
        # A guest that was paused before stays so.
        vm.qmp.execute("stop")
        with pytest.raises(OSError, match="disk is full"):
            fill_the_disk(vm, Afterwards.STAY, 4096)
        assert vm.status != "running"
        vm.qmp.execute("cont")
        check_that_it_goes_on(vm, nonce, count)


@pytest.mark.expect_log("the guest could not be resumed", "could not be cancelled", "could not be set back")
def test_qemu_that_dies(guest: Guest) -> None:
    with start(guest, "default") as vm:
        vm.expect("FILLED")
        with pytest.raises(RestoreError, match="closed the connection"):
            consume(vm, vm.process.kill)


def test_guest_that_cannot_be_saved(guest: Guest) -> None:
    """QEMU's own reason reaches the user, and the guest goes on."""
    with Vm(guest, memory_mib=MEMORY_MIB, extra=("-device", "qemu-xhci", "-device", "usb-uas")) as vm:
        nonce, count = set_up(vm)
        with pytest.raises(QmpError, match=r"QEMU refused migrate: .*usb-uas"), suspended(vm.qmp_socket):
            pass
        check_that_it_goes_on(vm, nonce, count)


def test_guest_that_has_not_arrived(guest: Guest) -> None:
    with (
        Vm(guest, memory_mib=MEMORY_MIB, extra=("-incoming", "defer")) as vm,
        pytest.raises(RestoreError, match="in state 'inmigrate', in which it cannot be suspended"),
        suspended(vm.qmp_socket),
    ):
        pass


def test_file_that_is_no_longer_the_guests(guest: Guest, tmp_path: Path) -> None:
    """Another file of the same size at the same path is not taken for the guest's memory."""
    with start(guest, "file") as vm:
        vm.expect("FILLED")
        vm.ram_file.unlink()
        with open(vm.ram_file, "wb") as file:
            file.truncate(MEMORY_MIB << 20)
        with suspended(vm.qmp_socket, Afterwards.QUIT) as source:
            assert not source.memory_files
            with open_capture(source.stream, spool_dir=tmp_path) as capture:
                assert capture.native.size > STATE_AT_MOST


SUSPENDER = """
import sys
import time
from imagefs.cli.suspend import signals_as_exceptions
from imagefs.restore.suspend import suspended
with signals_as_exceptions(), suspended(sys.argv[1]) as source:
    source.stream.read(4096)
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_command_that_is_told_to_end(guest: Guest) -> None:
    with start(guest, "default") as vm:
        nonce, count = set_up(vm)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            command = [sys.executable, "-c", SUSPENDER, str(vm.qmp_socket)]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "holding\n"
                assert vm.status != "running"
                process.send_signal(number)
                process.communicate(timeout=60)
            assert process.returncode == (-number if number == signal.SIGINT else 128 + number)
            check_that_it_goes_on(vm, nonce, count)


def test_command(guest: Guest, imagefs: list[str], tmp_path: Path) -> None:
    """``imagefs suspend``: a store that cannot be written changes nothing; then an image, then one more and the end."""
    store = tmp_path / "store"
    store.write_bytes(b"in the way")
    with start(guest, "file") as vm:
        nonce, count = set_up(vm)
        command = [*imagefs, "suspend", "--qmp", str(vm.qmp_socket)]

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*command, *words], capture_output=True, text=True, check=False, timeout=110)

        failed = run("--quiet", f"{store}/vm1")
        assert failed.returncode in (1, 2)
        assert failed.stderr.startswith("imagefs suspend: ")
        assert failed.stderr.count("\n") == 1
        check_that_it_goes_on(vm, nonce, count)
        store.unlink()
        done = run("--resume", "--quiet", f"{store}/vm1")
        assert (done.returncode, done.stderr) == (0, "")
        check_that_it_goes_on(vm, nonce, count)
        assert run("--quit", "--quiet", f"{store}/vm2").returncode == 0
        assert vm.wait() == 0
        gone = run(f"{store}/vm3")
        assert gone.returncode == 2
        assert "no QEMU listens there" in gone.stderr
    for name in ("vm1", "vm2"):
        verified = subprocess.run(
            [*imagefs, "verify", f"{store}/{name}"], capture_output=True, check=False, timeout=110
        )
        assert verified.returncode == 0, verified.stderr
