"""Mounts that end while something is under way: at once, whatever the network does, and nobody is left behind."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.link import Link
from support.nginx import Nginx

from imagefs.mount import kernel
from tests.faults.images import RealImage, check_same
from tests.faults.mounts import Mounter, Reader, RealMount, process_state
from tests.mount.conftest import abort, wait_until

GONE = {str(errno.EIO), str(errno.ENOTCONN), str(errno.ECONNABORTED)}


@pytest.fixture
def link(server: Nginx) -> Iterator[Link]:
    """Slow enough for everything to be under way."""
    with Link(server.address, mbit=16, rtt_ms=10) as link:
        yield link


@pytest.mark.parametrize("options", [(), ("-l",), ("-f",)])
def test_umount_while_the_sweep_runs(image: RealImage, link: Link, mount: Mounter, options: tuple[str, ...]) -> None:
    mounted = mount(f"{link.url}/vm1", "prefetch=all")
    wait_until(lambda: len(mounted.present()) > image.pages // 4, "the sweep is at work")
    assert not mounted.status()["memory"]["complete"]
    mounted.unmount(*options)
    assert os.listdir(mounted.path) == []
    # The store is at nobody's mercy: what is there works for the next.
    again = mount(f"{link.url}/vm1", "prefetch=none")
    check_same(again.read_page(900), image.page(900), "page", 900)


def start_blocked(image: RealImage, link: Link, mounted: RealMount) -> list[Reader]:
    """Readers of all kinds behind a link that is cut, every one of them waiting in the kernel."""
    # Windows that are here are no use for this, and with prefetch=none only what is read is.
    check_same(mounted.read_page(1), image.page(1), "before", 1)
    link.cut("hang")
    # Each in windows of its own: the kernel may ask for neighbouring pages with one request.
    readers = [mounted.start_reader(image, range(first, first + 200, 16), threads=3) for first in (100, 400, 700)]
    commands = ("sha256sum memory", "cat native", "cat pages/0x00000/0x0000300")
    readers += [mounted.start("sh", "-c", f"exec {command} >/dev/null") for command in commands]
    # The last may still be on its way to its first page.
    wait_until(lambda: mounted.waiting() >= 3 * 3 + len(commands) - 1, "all of them wait")
    assert all(reader.process.poll() is None for reader in readers)
    return readers


def check_ended(readers: list[Reader]) -> None:
    """Each with an error, and none of them with wrong bytes; nobody hangs in the kernel."""
    for reader in readers[:3]:
        result = reader.result(timeout=20)
        assert result["wrong"] == []
        assert result["errors"].keys() <= GONE
        assert sum(result["errors"].values()) > 0
    for reader in readers[3:]:
        reader.process.communicate(timeout=20)
        assert reader.process.returncode != 0
    assert {reader.state for reader in readers} == {"X"}


def by_sigterm(mounted: RealMount) -> None:
    os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_until_gone()


def by_forced_umount(mounted: RealMount) -> None:
    # The mount is busy, so umount may complain; the connection is cut all the same, and the daemon detaches it.
    subprocess.run(["umount", "-f", str(mounted.path)], capture_output=True, timeout=20, check=False)
    mounted.wait_until_gone()


def by_sigkill(mounted: RealMount) -> None:
    mounted.kill()


def by_abort(mounted: RealMount) -> None:
    found = kernel.topmost(str(mounted.path))
    assert found is not None
    abort(found)
    mounted.wait_until_gone()


@pytest.mark.parametrize("options", ["prefetch=none", "soft,nocache"])
@pytest.mark.parametrize("end", [by_sigterm, by_forced_umount, by_sigkill, by_abort])
def test_end_with_readers_behind_a_cut_link(
    image: RealImage, link: Link, mount: Mounter, end: Callable[[RealMount], None], options: str
) -> None:
    mounted = mount(f"{link.url}/vm1", options)
    readers = start_blocked(image, link, mounted)
    end(mounted)
    check_ended(readers)
    assert os.listdir(mounted.path) == []


def test_busy_mount_is_not_unmounted(image: RealImage, link: Link, mount: Mounter) -> None:
    """Plain umount says so; umount -l takes the name away, and readers get what they wait for."""
    mounted = mount(f"{link.url}/vm1", "prefetch=none")
    check_same(mounted.read_page(1), image.page(1), "before", 1)
    link.cut("hang")
    reader = mounted.start_reader(image, range(100, 400), threads=4)
    mounted.wait_until_waiting(4)
    done = subprocess.run(["umount", str(mounted.path)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode != 0
    assert "busy" in done.stderr
    subprocess.run(["umount", "-l", str(mounted.path)], check=True, timeout=20)
    assert not mounted.is_mounted()
    assert mounted.is_alive()
    assert reader.process.poll() is None
    link.mend()
    # Its threads have opened the file by now, so all of it is served.
    assert reader.result() == {"right": 300, "wrong": [], "errors": {}}
    mounted.wait_until_gone()


def test_killed_reader_is_gone_with_the_mount(image: RealImage, link: Link, mount: Mounter) -> None:
    """The kernel keeps a killed process until its read is answered: the end of the mount answers it."""
    mounted = mount(f"{link.url}/vm1", "prefetch=none")
    link.cut("hang")
    reader = mounted.start_reader(image, [500])
    mounted.wait_until_waiting()
    reader.process.kill()
    os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_until_gone()
    wait_until(lambda: reader.state in "ZX", "the reader is gone")


def test_mount_of_a_server_that_is_away(link: Link, mount: Mounter, tmp_path: Path) -> None:
    """It says so instead of waiting."""
    link.cut("reset")
    with mount.start(f"{link.url}/vm1", tmp_path / "away") as process:
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (32, "")
    assert re.fullmatch(rf"mount.imagefs: {link.url}: vm1: [a-z ]+\n", err)
    assert kernel.topmost(str(tmp_path / "away")) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_mount_of_a_server_that_says_nothing_is_interrupted(
    mount: Mounter, tmp_path: Path, number: signal.Signals
) -> None:
    """The daemon goes with its command, in the middle of its first request."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        with mount.start(f"http://127.0.0.1:{listener.getsockname()[1]}/vm1", tmp_path / "mnt") as process:
            connection, _ = listener.accept()
            with connection:
                daemons = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                process.send_signal(number)
                process.communicate(timeout=20)
                assert process.returncode == (8 if number == signal.SIGINT else -number)
                (daemon,) = map(int, daemons)
                wait_until(lambda: process_state(daemon) in "ZX", "the daemon ends")
    assert kernel.topmost(str(tmp_path / "mnt")) is None
