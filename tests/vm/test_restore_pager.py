"""``imagefs restore --door pager``: the guest runs while its pages come, whoever is killed; then QEMU is alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from support.guest import build_guest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx
from support.vm import PATIENCE, QEMU, Vm

from imagefs.pager import PagerStatistics, state_statistics
from imagefs.restore.shim import STATE_NAME
from tests.vm.conftest import FILL_MIB, RTT_MS, SLOW_MBIT
from tests.vm.restoring import (
    EXIT_DEVICE,
    MEMORY_MIB,
    SavedVm,
    Stored,
    check_that_it_goes_on,
    checked,
    children,
    kill,
    stored,
    suspend,
    wait_until,
)
from tests.vm.restoring import restored as restored_by

KILLS = 12
BALLOON = ("-device", "virtio-balloon-pci,id=balloon")

restored = partial(restored_by, door="pager")


def pager(vm: Vm) -> int | None:
    return next((pid for pid, is_qemu in children(vm).items() if not is_qemu), None)


def qemu(vm: Vm) -> int:
    return next(pid for pid, is_qemu in children(vm).items() if is_qemu)


def counted(vm: Vm) -> PagerStatistics:
    """From the state that QEMU keeps."""
    for entry in Path(f"/proc/{qemu(vm)}/fd").iterdir():
        if str(entry.readlink()).startswith(f"/memfd:{STATE_NAME}"):
            with entry.open("rb") as state:
                found = state_statistics(state.fileno())
                assert found is not None
                return found
    raise AssertionError("QEMU has no state")


def bytes_read(process: int) -> int:
    found = re.search(r"rchar: (\d+)", Path(f"/proc/{process}/io").read_text())
    assert found is not None
    return int(found[1])


def has_read(process: int, size: int) -> bool:
    try:
        return bytes_read(process) > size
    except FileNotFoundError:
        return True


@pytest.fixture(scope="session")
def ballooned(imagefs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """Two vCPUs, RAM in a shared file, a balloon."""
    guest = build_guest(fill_mib=FILL_MIB, kind="mixed", seed=7, modules=["virtio_pci", "virtio_balloon"])
    store = tmp_path_factory.mktemp("balloon")
    return stored(guest, imagefs, store, smp=2, backend="file", extra=(*EXIT_DEVICE, *BALLOON))


def test_guest_runs_while_its_pages_come(saved: Stored, link: Link, imagefs: list[str], tmp_path: Path) -> None:
    """Over a slow link; then without the mount; then suspended again."""
    mountpoint = tmp_path / "mnt"
    with mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"), restored(saved, imagefs, mountpoint) as vm:
        vm.wait_running()
        check_that_it_goes_on(vm, saved)
        assert pager(vm) is not None
        link.set(mbit=4 * SLOW_MBIT)
        assert vm.ask("check") == checked(saved)
        trace = (mountpoint / ".imagefs" / "trace").read_text()
        link.set(mbit=10_000.0)
        wait_until(lambda: pager(vm) is None, vm)
        subprocess.run(["umount", str(mountpoint)], check=True, timeout=60)
        assert vm.ask("write 500 3").startswith("ok")
        assert vm.ask("check") == checked(saved, writes=500)
        suspend(imagefs, vm, tmp_path / "store" / "vm2")
    touches = re.findall(r"(?m)^\d+\.\d+ (\d+) 1 pager$", trace)
    assert 100 < len(touches) == len(set(touches))
    verified = subprocess.run(
        [*imagefs, "verify", f"{tmp_path}/store/vm2"], capture_output=True, check=False, timeout=60
    )
    assert verified.returncode == 0, verified.stderr


def test_balloon(ballooned: Stored, imagefs: list[str], tmp_path: Path) -> None:
    """It takes pages that have not come, gives them back, and takes them again after all has."""
    mountpoint = tmp_path / "mnt"
    with (
        Nginx(ballooned.store) as nginx,
        Link(nginx.address, mbit=SLOW_MBIT, rtt_ms=RTT_MS) as link,
        mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"),
        restored(ballooned, imagefs, mountpoint) as vm,
    ):
        vm.wait_running()
        check_that_it_goes_on(vm, ballooned)
        inflate(vm, 150)
        assert pager(vm) is not None, "the link was not slow enough to show anything"
        assert counted(vm).removed_pages > (20 << 8)
        inflate(vm, MEMORY_MIB)
        vm.send("check")
        inflate(vm, 150)
        assert vm.expect("^check (.*)$")[1] == checked(ballooned)
        link.set(mbit=10_000.0)
        wait_until(lambda: pager(vm) is None, vm)
        inflate(vm, MEMORY_MIB)
        assert vm.ask("write 500 3").startswith("ok")
        inflate(vm, 140)
        assert vm.ask("check") == checked(ballooned, writes=500)
        assert "discard" not in vm.said()


def inflate(vm: Vm, mib: int) -> None:
    """Leave the guest so much, and wait until it is so."""
    vm.qmp.execute("balloon", {"value": mib << 20})
    wait_until(lambda: abs(vm.qmp.execute("query-balloon")["actual"] - (mib << 20)) < 1 << 20, vm)


def test_pager_is_killed_again_and_again(two: Stored, imagefs: list[str], tmp_path: Path) -> None:
    """While the guest checks its memory. Then the command is killed, too, and somebody says --reattach."""
    mountpoint = tmp_path / "mnt"
    with (
        Nginx(two.store) as nginx,
        Link(nginx.address, mbit=SLOW_MBIT, rtt_ms=RTT_MS) as link,
        mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"),
        restored(two, imagefs, mountpoint) as vm,
    ):
        vm.wait_running()
        check_that_it_goes_on(vm, two)
        vm.send("check")
        process = qemu(vm)
        killed: list[int] = []
        while len(killed) < KILLS:
            wait_until(lambda: pager(vm) not in (None, *killed), vm)
            found = pager(vm)
            assert found is not None
            # Kill some as they begin, some at work.
            if len(killed) % 2:
                wait_until(partial(has_read, found, 2 << 20), vm)
            kill(found)
            killed.append(found)
        said = (vm.directory / "stderr").read_text()
        assert said.count("the pager was killed (SIGKILL), a new one goes on") >= KILLS - 1
        wait_until(lambda: pager(vm) not in (None, *killed), vm)
        last = pager(vm)
        assert last is not None
        vm.process.kill()
        assert vm.process.wait(PATIENCE) == -signal.SIGKILL
        # The pager goes on without it, and then it does not.
        kill(last)
        with reattached(imagefs, mountpoint, process) as command:
            refused = subprocess.run(
                [*imagefs, "restore", str(mountpoint), "--reattach", "--pid", str(process)],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert refused.returncode == 1
            assert refused.stderr == f"imagefs restore: process {command.pid} serves this VMM already\n"
            link.set(mbit=10_000.0)
            assert vm.expect("^check (.*)$")[1] == checked(two)
            assert vm.status == "running"
            # It has all of its memory.
            assert command.wait(PATIENCE) == 0
        assert vm.ask("check") == checked(two)
        vm.qmp.execute("quit")
        vm.qmp.wait_closed()


@contextmanager
def reattached(imagefs: Sequence[str], mountpoint: Path, process: int) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([*imagefs, "restore", str(mountpoint), "--reattach", "--pid", str(process)]) as command:
        try:
            wait_until_has_child(command.pid)
            yield command
        finally:
            command.kill()


def wait_until_has_child(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not Path(f"/proc/{pid}/task/{pid}/children").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_daemon_of_the_mount_is_killed(one: Stored, imagefs: list[str], tmp_path: Path) -> None:
    """The guest waits until the image is mounted again."""
    mountpoint = tmp_path / "mnt"
    with Nginx(one.store) as nginx, Link(nginx.address, mbit=SLOW_MBIT, rtt_ms=RTT_MS) as link:
        options = f"cache={tmp_path}/cache"
        with mounted(f"{link.url}/vm1", mountpoint, options), restored(one, imagefs, mountpoint) as vm:
            vm.wait_running()
            check_that_it_goes_on(vm, one)
            vm.send("check")
            status = json.loads((mountpoint / ".imagefs" / "status.json").read_text())
            kill(status["mount"]["pid"])
            wait_until(lambda: "trying again, the guest waits" in vm.said(), vm)
            subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=60)
            with mounted(f"{link.url}/vm1", mountpoint, options):
                link.set(mbit=10_000.0)
                assert vm.expect("^check (.*)$")[1] == checked(one)
                wait_until(lambda: pager(vm) is None, vm)


def test_exit_status_and_signals_are_qemus(pc: SavedVm, imagefs: list[str]) -> None:
    """From a directory that is no mount: nothing arrives, so the pager stays."""
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        check_that_it_goes_on(vm, pc)
        assert vm.ask("check") == checked(pc)
        vm.send("exit 21")
        assert vm.wait() == 43
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        vm.process.send_signal(signal.SIGTERM)
        assert vm.wait() == 0
        assert "terminating on signal 15" in vm.said()
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        kill(qemu(vm))
        assert vm.wait() == -signal.SIGKILL


def test_qemu_that_does_not_start(pc: SavedVm, imagefs: list[str]) -> None:
    """It says why, and its status is ours."""
    command = [*imagefs, "restore", str(pc.directory), "--door", "pager", "--", QEMU]
    command += ["-display", "none", "-device", "nonesuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"qemu\S*: .*'nonesuch' is not a valid device model name\n", done.stderr), done.stderr


def test_what_is_refused(pc: SavedVm, imagefs: list[str]) -> None:
    command = [*imagefs, "restore", str(pc.directory), "--door", "pager", "--", QEMU, "-daemonize"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("imagefs restore: -daemonize: leave it out, ")


def test_printed_command(pc: SavedVm, imagefs: list[str], tmp_path: Path) -> None:
    """Run by hand, it connects to a pager that was started by hand."""
    socket = tmp_path / "socket"
    options = ["restore", str(pc.directory), "--door", "pager", "--socket", str(socket)]
    vm = Vm(pc.guest, **pc.options)
    printed = subprocess.run(
        [*imagefs, *options, "--print", "--", *vm.command], capture_output=True, text=True, check=True, timeout=60
    )
    assert printed.stderr.startswith("imagefs: first start its pager: imagefs restore ")
    with subprocess.Popen([*imagefs, *options]) as command:
        try:
            wait_until(socket.is_socket, vm)
            vm.command = ["sh", "-c", printed.stdout]
            with vm:
                vm.wait_running()
                check_that_it_goes_on(vm, pc)
                assert vm.ask("check") == checked(pc)
            assert command.wait(60) == 0
        finally:
            command.kill()
