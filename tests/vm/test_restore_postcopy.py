"""``imagefs restore --door postcopy``: the guest runs while its pages come, whoever is killed; then QEMU is alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx
from support.vm import PATIENCE, QEMU, Vm

from tests.vm.conftest import RTT_MS, SLOW_MBIT
from tests.vm.restoring import (
    SavedVm,
    Stored,
    check_that_it_goes_on,
    checked,
    children,
    kill,
    suspend,
    wait_until,
)
from tests.vm.restoring import restored as restored_by

KILLS = 12
WORK_BYTES = 256 << 10


restored = partial(restored_by, door="postcopy")


def migration(vm: Vm) -> str:
    return str(vm.qmp.execute("query-migrate").get("status"))


def source(vm: Vm) -> int | None:
    return next((pid for pid, qemu in children(vm).items() if not qemu), None)


def test_guest_runs_while_its_pages_come(saved: Stored, link: Link, imagefs: list[str], tmp_path: Path) -> None:
    """Over a slow link; then without the mount; then suspended again."""
    mountpoint = tmp_path / "mnt"
    with mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"):
        vm = restored(saved, imagefs, mountpoint)
        with vm:
            vm.wait_running()
            check_that_it_goes_on(vm, saved)
            assert migration(vm) == "postcopy-active", "the link was not slow enough to show anything"
            link.set(mbit=4 * SLOW_MBIT)
            assert vm.ask("check") == checked(saved)
            link.set(mbit=10_000.0)
            wait_until(lambda: migration(vm) == "completed", vm)
            wait_until(lambda: source(vm) is None, vm)
            trace = (mountpoint / ".imagefs" / "trace").read_text()
            subprocess.run(["umount", str(mountpoint)], check=True, timeout=60)
            assert vm.ask("write 500 3").startswith("ok")
            assert vm.ask("check") == checked(saved, writes=500)
            wait_until(lambda: not any(capabilities(vm).values()), vm)
            suspend(imagefs, vm, tmp_path / "store" / "vm2")
    touches = re.findall(r"(?m)^\d+\.\d+ (\d+) 1 postcopy$", trace)
    assert 100 < len(touches) == len(set(touches))
    verified = subprocess.run(
        [*imagefs, "verify", f"{tmp_path}/store/vm2"], capture_output=True, check=False, timeout=60
    )
    assert verified.returncode == 0, verified.stderr


def capabilities(vm: Vm) -> dict[str, bool]:
    return {each["capability"]: each["state"] for each in vm.qmp.execute("query-migrate-capabilities")}


def test_source_is_killed_again_and_again(saved: Stored, link: Link, imagefs: list[str], tmp_path: Path) -> None:
    """While the guest checks its memory: it waits, and never sees a wrong byte."""
    mountpoint = tmp_path / "mnt"
    with (
        mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"),
        restored(saved, imagefs, mountpoint) as vm,
    ):
        vm.wait_running()
        check_that_it_goes_on(vm, saved)
        vm.send("check")
        killed: list[int] = []
        while len(killed) < KILLS:
            wait_until(lambda: source(vm) not in (None, *killed), vm)
            process = source(vm)
            assert process is not None
            # Kill some as they begin, some at work.
            if len(killed) % 2:
                wait_until(partial(has_worked, process, bytes_read(process)), vm)
            kill(process)
            killed.append(process)
        assert vm.status == "running"
        link.set(mbit=10_000.0)
        assert vm.expect("^check (.*)$")[1] == checked(saved)
        check_that_it_goes_on(vm, saved)
        wait_until(lambda: migration(vm) == "completed", vm)
        said = (vm.directory / "stderr").read_text()  # what vm.said() gives is cut
        assert said.count("the page source ended (signal 9), a new one goes on") == KILLS
        assert vm.ask("check") == checked(saved)


def bytes_read(process: int) -> int:
    found = re.search(r"rchar: (\d+)", Path(f"/proc/{process}/io").read_text())
    assert found is not None
    return int(found[1])


def has_worked(process: int, before: int) -> bool:
    return bytes_read(process) > before + WORK_BYTES


def test_everyone_but_qemu_is_killed(one: Stored, imagefs: list[str], tmp_path: Path) -> None:
    """The supervising process, too: then somebody says --recover."""
    mountpoint = tmp_path / "mnt"
    with (
        Nginx(one.store) as nginx,
        Link(nginx.address, mbit=SLOW_MBIT, rtt_ms=RTT_MS) as link,
        mounted(f"{link.url}/vm1", mountpoint, f"cache={tmp_path}/cache"),
        restored(one, imagefs, mountpoint) as vm,
    ):
        vm.wait_running()
        check_that_it_goes_on(vm, one)
        process = source(vm)
        assert process is not None
        vm.process.kill()
        assert vm.process.wait(PATIENCE) == -signal.SIGKILL
        # The source goes on without it.
        assert vm.ask("touch 100 3").startswith("ok")
        assert migration(vm) == "postcopy-active"
        kill(process)
        wait_until(lambda: migration(vm) == "postcopy-paused", vm)
        link.set(mbit=10_000.0)
        command = [*imagefs, "restore", str(mountpoint), "--recover", "--qmp", str(vm.qmp_socket)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
        assert (done.returncode, done.stderr) == (0, "")
        assert migration(vm) == "completed"
        assert vm.ask("check") == checked(one)
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
        assert again.returncode == 1
        assert re.fullmatch(r"imagefs restore: .*\n", again.stderr), again.stderr
        vm.qmp.execute("quit")
        vm.qmp.wait_closed()


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
            assert migration(vm) == "postcopy-active"
            with mounted(f"{link.url}/vm1", mountpoint, options):
                link.set(mbit=10_000.0)
                assert vm.expect("^check (.*)$")[1] == checked(one)
                wait_until(lambda: migration(vm) == "completed", vm)


@pytest.mark.parametrize(("number", "status"), [(0, 1), (21, 43)])
def test_exit_status_is_qemus(pc: SavedVm, imagefs: list[str], number: int, status: int) -> None:
    """Of a guest whose RAM was a file."""
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        check_that_it_goes_on(vm, pc)
        assert vm.ask("check") == checked(pc)
        vm.send(f"exit {number}")
        assert vm.wait() == status


def test_signals_are_qemus(pc: SavedVm, imagefs: list[str]) -> None:
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        vm.process.send_signal(signal.SIGTERM)
        assert vm.wait() == 0
        assert "terminating on signal 15" in vm.said()
    with restored(pc, imagefs, pc.directory) as vm:
        vm.wait_running()
        qemu = next(pid for pid, is_qemu in children(vm).items() if is_qemu)
        kill(qemu)
        assert vm.wait() == -signal.SIGKILL


def test_guest_that_is_to_wait(pc: SavedVm, imagefs: list[str]) -> None:
    with restored(pc, imagefs, pc.directory, "-S") as vm:
        wait_until(lambda: vm.status != "inmigrate", vm)
        assert vm.status == "paused"
        wait_until(lambda: migration(vm) == "completed", vm)
        assert vm.status == "paused"
        vm.qmp.execute("cont")
        vm.wait_running()
        check_that_it_goes_on(vm, pc)


def test_qemu_that_does_not_start(pc: SavedVm, imagefs: list[str]) -> None:
    """It says why, and its status is ours."""
    command = [*imagefs, "restore", str(pc.directory), "--door", "postcopy", "--", QEMU]
    command += ["-display", "none", "-device", "nonesuch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"qemu\S*: .*'nonesuch' is not a valid device model name\n", done.stderr), done.stderr


def test_state_that_qemu_does_not_take(pc: SavedVm, imagefs: list[str], tmp_path: Path) -> None:
    """Without a device that the image has. QEMU says so, and its status is ours.

    Which is 1, unless QEMU 7.2 runs into its own exit(): a thread that listens for pages goes on with a channel that is
    being freed (qio_channel_set_blocking), and it ends by SIGSEGV after it has said why. So a script writes down what
    it was.
    """
    script, ended = tmp_path / "qemu", tmp_path / "status"
    script.write_text(f'#!/bin/sh\n{QEMU} "$@"\nstatus=$?\necho $status >{ended}\nexit $status\n')
    script.chmod(0o755)
    command = [*imagefs, "restore", str(pc.directory), "--door", "postcopy", "--", str(script), "-display", "none"]
    done = subprocess.run(
        [*command, "-machine", "pc,hpet=off"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == int(ended.read_text()) != 0
    assert "Traceback" not in done.stderr
    assert re.search(r"qemu\S*: .*hpet", done.stderr), done.stderr


def test_what_is_refused(pc: SavedVm, imagefs: list[str]) -> None:
    command = [*imagefs, "restore", str(pc.directory), "--door", "postcopy", "--", QEMU, "-daemonize"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("imagefs restore: -daemonize: leave it out, ")


def test_choice_is_explained(pc: SavedVm, imagefs: list[str]) -> None:
    command = [*imagefs, "-v", "restore", str(pc.directory), "--print", "--", QEMU]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert "door pager: " in done.stderr
    assert "it is tried before mmap, postcopy" in done.stderr
    assert json.loads((pc.directory / "metadata.json").read_text())["restore"]["vmm"] == "qemu"
