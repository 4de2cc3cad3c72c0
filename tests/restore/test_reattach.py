"""Who may take over, and what is refused with which words; the mount's trouble, and what becomes of the VMM."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx

from imagefs.cli import main
from imagefs.errors import RestoreError, UsageError
from imagefs.restore.reattach import find_by_pid, find_by_socket
from imagefs.restore.shared_state import Record, SharedState
from imagefs.restore.shim import STATE_NAME
from tests.restore.conftest import PAGES
from tests.restore.vmms import IMAGEFS, Command, Program, kill, listening, wait_until


def restore(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*IMAGEFS, "restore", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )


def test_two_supervisors(vmm: Program, mountpoint: Path, tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with listening(mountpoint, socket, tmp_path / "log") as command, vmm.running(socket, PAGES, 1) as guest:
        command.worker()
        wait_until(lambda: guest.touched() > 10)
        done = restore(mountpoint, "--reattach", "--socket", socket)
        assert (done.returncode, done.stderr) == (
            1,
            f"imagefs restore: process {command.process.pid} serves this VMM already\n",
        )
        # Nor is the place free for another one.
        done = restore(mountpoint, "--door", "pager", "--socket", socket)
        assert done.returncode == 2
        assert "take over with --reattach" in done.stderr
        assert "ok" in guest.finish()


def test_another_image(vmm: Program, mountpoint: Path, tmp_path: Path) -> None:
    """Is not put into a guest; the right one is, afterwards."""
    socket = tmp_path / "socket"
    with listening(mountpoint, socket, tmp_path / "log") as command, vmm.running(socket, PAGES, 1) as guest:
        command.worker()
        wait_until(lambda: guest.touched() > 10)
        kill(command.process.pid)
        command.process.wait()
        text = (mountpoint / "metadata.json").read_text()
        (mountpoint / "metadata.json").write_text(json.dumps({"restore": {}, "another": 1}))
        done = restore(mountpoint, "--reattach", "--socket", socket)
        assert done.returncode == 1
        assert f"this is not the image that process {guest.process.pid} was resumed from" in done.stderr
        (mountpoint / "metadata.json").write_text(text)
        with Command(mountpoint, "--reattach", "--socket", socket, log=tmp_path / "log2") as again:
            assert "ok" in guest.finish()
            assert again.wait() == 0


def test_vmm_that_has_ended(vmm: Program, mountpoint: Path, tmp_path: Path) -> None:
    """Nothing is left to do, and nothing stays behind."""
    socket = tmp_path / "socket"
    with listening(mountpoint, socket, tmp_path / "log") as command:
        with vmm.running(socket, PAGES, 1) as guest:
            worker = command.worker()
            wait_until(lambda: guest.touched() > 10)
            kill(command.process.pid)
            kill(worker)
            command.process.wait()
        done = restore(mountpoint, "--reattach", "--socket", socket)
    assert done.returncode == 1
    assert f"process {guest.process.pid}, which was served through {socket}, has ended" in done.stderr
    assert not socket.with_name("socket.state").exists()


def test_what_cannot_be_taken_over(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    with pytest.raises(UsageError, match=r"socket\.state: No such file"):
        find_by_socket(socket)
    with SharedState.beside(socket, 16):
        with pytest.raises(UsageError, match="is there: a VMM that was served"):
            SharedState.beside(socket, 16)
        with pytest.raises(RestoreError, match=r"does not say which VMM .* would show it old content"):
            find_by_socket(socket)
    with pytest.raises(UsageError, match="No such process"):
        find_by_pid(2**22 - 1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(RestoreError, match=rf"process {process.pid} holds no pager's state: what the guest gave"):
            find_by_pid(process.pid)
        process.communicate()


def test_vmm_without_its_userfaultfd(tmp_path: Path) -> None:
    with SharedState.begun(os.memfd_create(STATE_NAME), 16) as state:
        state.write(Record("image", 16, 1, 1, None))
        command = [sys.executable, "-c", "input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[state.fd]) as process:
            with pytest.raises(RestoreError, match=r"has no userfaultfd any more: .* Stop it at once"):
                find_by_pid(process.pid)
            process.communicate()


def test_locks_go_with_their_process() -> None:
    with SharedState.begun(os.memfd_create("test"), 16) as state:
        assert state.paging_process() is None
        child = os.fork()
        if not child:
            state.begin_supervising()
            state.begin_paging()
            signal.pause()
        try:
            wait_until(lambda: state.paging_process() == child)
            with pytest.raises(RestoreError, match=f"process {child} serves this VMM already"):
                state.begin_supervising()
        finally:
            kill(child)
            os.waitpid(child, 0)
        assert state.paging_process() is None
        state.begin_supervising()


@pytest.fixture
def link(memory: Path, tmp_path: Path) -> Iterator[Link]:
    assert main(["split", "-q", "--format", "raw", str(memory), str(tmp_path / "store" / "vm")]) == 0
    with Nginx(tmp_path / "store") as nginx, Link(nginx.address, mbit=20.0, rtt_ms=1.0) as link:
        yield link


def test_store_that_goes_on_a_soft_mount(vmm: Program, link: Link, tmp_path: Path) -> None:
    """Who wants an end gets it: the VMM is stopped, and told why."""
    socket = tmp_path / "socket"
    with (
        mounted(f"{link.url}/vm", tmp_path / "mnt", f"cache={tmp_path}/cache,prefetch=none,soft,timeo=1") as mountpoint,
        listening(mountpoint, socket, tmp_path / "log") as command,
        vmm.running(socket, PAGES, 1) as guest,
    ):
        wait_until(lambda: guest.touched() > 10)
        link.cut()
        assert guest.process.wait(60) == -signal.SIGKILL
        assert command.wait() == 1
        link.mend()
        (line,) = command.said().splitlines()
        assert line.startswith(f"imagefs restore: process {guest.process.pid} was stopped: {mountpoint}/memory: page ")
        assert line.endswith("it cannot be read: Input/output error")


def test_daemon_that_is_killed(vmm: Program, link: Link, tmp_path: Path, rng: random.Random) -> None:
    """The guest waits, until the image is mounted again at the same place."""
    socket = tmp_path / "socket"
    options = f"cache={tmp_path}/cache,prefetch=none"
    with (
        mounted(f"{link.url}/vm", tmp_path / "mnt", options) as mountpoint,
        listening(mountpoint, socket, tmp_path / "log") as command,
        vmm.running(socket, PAGES, rng.getrandbits(60)) as guest,
    ):
        wait_until(lambda: guest.touched() > 10)
        kill(json.loads((mountpoint / ".imagefs" / "status.json").read_text())["mount"]["pid"])
        wait_until(lambda: "trying again, the guest waits" in command.said())
        subprocess.run(["umount", "-l", str(mountpoint)], check=True, timeout=60)
        with mounted(f"{link.url}/vm", tmp_path / "mnt", options):
            link.set(mbit=10_000.0)
            wait_until(lambda: guest.touched() > 3000)
            assert "ok" in guest.finish()
            assert command.wait() == 0
    assert command.said().count("trying again") == 1
