"""``imagefs restore MOUNTPOINT --door pager --socket PATH`` and a VMM that behaves as Firecracker."""

from __future__ import annotations

import random
import signal
import stat
from pathlib import Path

import pytest
from support.huge_pages import huge_pages

from tests.restore.conftest import PAGES
from tests.restore.vmms import Command, Program, is_alive, kill, listening, wait_until


@pytest.mark.parametrize("options", [["regions=1"], ["regions=3", "kib"], ["split", "regions=2"]])
def test_guest(vmm: Program, mountpoint: Path, tmp_path: Path, options: list[str], rng: random.Random) -> None:
    socket = tmp_path / "socket"
    with listening(mountpoint, socket, tmp_path / "log") as command:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o600
        with vmm.running(socket, PAGES, rng.getrandbits(60), *options) as guest:
            wait_until(lambda: guest.touched() > 3000)
            assert "ok touched=" in guest.finish()
        assert command.wait() == 0, command.said()
    assert command.said() == ""
    assert list(tmp_path.glob("socket*")) == []


def test_huge_pages(vmm: Program, mountpoint: Path, tmp_path: Path, rng: random.Random) -> None:
    socket = tmp_path / "socket"
    with huge_pages(PAGES // 512 + 2), listening(mountpoint, socket, tmp_path / "log") as command:
        with vmm.running(socket, PAGES, rng.getrandbits(60), "huge", "regions=2") as guest:
            wait_until(lambda: guest.touched() > 3000)
            guest.finish()
        assert command.wait() == 0, command.said()


def test_vmm_is_killed(vmm: Program, mountpoint: Path, tmp_path: Path) -> None:
    """Then there is nothing left to do, also for the pager."""
    socket = tmp_path / "socket"
    with listening(mountpoint, socket, tmp_path / "log") as command:
        with vmm.running(socket, PAGES, 1) as guest:
            worker = command.worker()
            wait_until(lambda: guest.touched() > 10)
            guest.process.kill()
        assert command.wait() == 0, command.said()
        wait_until(lambda: not is_alive(worker))
    assert list(tmp_path.glob("socket*")) == []


def test_pager_that_cannot_go_on_stops_the_vmm(vmm: Program, mountpoint: Path, tmp_path: Path) -> None:
    """The image ends too early: no page is made up."""
    socket = tmp_path / "socket"
    whole = (mountpoint / "memory").read_bytes()
    (mountpoint / "memory").unlink()
    (mountpoint / "memory").write_bytes(whole)
    with listening(mountpoint, socket, tmp_path / "log") as command:
        with vmm.running(socket, PAGES, 1, "quiet") as guest:
            # The state begins with a mark once a pager serves.
            wait_until(lambda: any((tmp_path / "socket.state").read_bytes()[:8]) if command.worker() else False)
            with open(mountpoint / "memory", "r+b") as file:
                file.truncate(17)
            assert guest.process.stdin is not None
            guest.process.stdin.write("\n")
            guest.process.stdin.flush()
            assert guest.process.wait(60) == -signal.SIGKILL
        assert command.wait() == 1
    assert f"imagefs restore: process {guest.process.pid} was stopped: " in command.said()
    assert "memory: page " in command.said()


def test_supervisor_that_is_told_to_end(vmm: Program, mountpoint: Path, tmp_path: Path, rng: random.Random) -> None:
    """The guest waits; somebody takes over."""
    socket = tmp_path / "socket"
    with (
        listening(mountpoint, socket, tmp_path / "log") as command,
        vmm.running(socket, PAGES, rng.getrandbits(60)) as guest,
    ):
        worker = command.worker()
        wait_until(lambda: guest.touched() > 10)
        kill(command.process.pid, signal.SIGTERM)
        assert command.wait() == 128 + signal.SIGTERM
        wait_until(lambda: not is_alive(worker))
        with Command(mountpoint, "--reattach", "--socket", socket, log=tmp_path / "log2") as again:
            wait_until(lambda: guest.touched() > 3000)
            guest.finish()
            assert again.wait() == 0, again.said()
    assert list(tmp_path.glob("socket*")) == []
