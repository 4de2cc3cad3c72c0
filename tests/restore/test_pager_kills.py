"""The pager, and who keeps it alive, are killed again and again under a VMM that checks every byte of its memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.link import Link
from support.mounts import mounted
from support.nginx import Nginx

from imagefs.cli import main
from imagefs.pager import PagerStatistics
from imagefs.restore.shared_state import SharedState
from tests.restore.vmms import Command, Program, is_alive, kill, listening, wait_until

PAGES = 16384
MBIT, RTT_MS = 4.0, 5.0
KILLS = 60
OF_THE_SUPERVISOR = 6


@pytest.fixture(scope="module")
def slow_mount(vmm: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Link]]:
    """64 MiB over a slow link."""
    directory = tmp_path_factory.mktemp("slow")
    vmm.make_image(directory / "raw", PAGES)
    assert main(["split", "-q", "--format", "raw", str(directory / "raw"), str(directory / "store" / "vm")]) == 0
    with (
        Nginx(directory / "store") as nginx,
        Link(nginx.address, mbit=MBIT, rtt_ms=RTT_MS) as link,
        mounted(f"{link.url}/vm", directory / "mnt", f"cache={directory}/cache,prefetch=none"),
    ):
        yield directory / "mnt", link


def counted(socket: Path) -> PagerStatistics | None:
    with SharedState.found_beside(socket) as state:
        return state.statistics()


def served(socket: Path) -> int:
    """Touches."""
    found = counted(socket)
    return found.faults if found else 0


def removed(socket: Path) -> int:
    """Pages that the VMM has given back."""
    found = counted(socket)
    return found.removed_pages if found else 0


def has_served(socket: Path, touches: int) -> bool:
    return served(socket) > touches


def test_kills(vmm: Program, slow_mount: tuple[Path, Link], tmp_path: Path, rng: random.Random) -> None:
    mountpoint, link = slow_mount
    socket, log = tmp_path / "socket", tmp_path / "log"
    killed: list[int] = []
    with listening(mountpoint, socket, log) as command:
        with vmm.running(socket, PAGES, rng.getrandbits(60), "regions=3") as guest:
            while len(killed) < KILLS or not removed(socket):
                worker = command.worker(*killed)
                if rng.random() < 0.7:
                    # At work; the others as they begin.
                    wait_until(partial(has_served, socket, served(socket) + rng.randrange(6)))
                if len(killed) % (KILLS // OF_THE_SUPERVISOR) == 5:
                    # Everyone, or all but the pager.
                    kill(command.process.pid)
                    if rng.random() < 0.5:
                        kill(worker)
                    command.process.wait()
                    command.__exit__()
                    command = Command(mountpoint, "--reattach", "--socket", socket, log=log)
                    command.worker()
                    assert not is_alive(worker)
                else:
                    kill(worker)
                killed.append(worker)
            assert guest.process.poll() is None
            statistics = counted(socket)
            assert statistics is not None
            assert statistics.takeovers > KILLS // 2
            # It was loaded on demand all the while.
            assert statistics.copied_pages < PAGES * 6 // 7
            link.set(mbit=10_000.0)
            assert "ok touched=" in guest.finish()
        assert command.wait() == 0, command.said()
        command.__exit__()
    assert list(tmp_path.glob("socket*")) == []
    assert "Traceback" not in log.read_text()
