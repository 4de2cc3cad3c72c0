"""The control files: status.json, arrivals, trace, present."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading

import pytest

from tests.mount.conftest import Mounter, environment, wait_until
from tests.mount.fakes import GEOMETRY, WINDOW_PAGES


def test_status(fake_mount: Mounter) -> None:
    mounted = fake_mount("soft,timeo=7")
    (mounted.path / "state").read_bytes()
    status = mounted.status()
    assert status["memory"]["pages"] == GEOMETRY.pages
    mount = status["mount"]
    assert mount["pid"] == mounted.pid
    assert mount["options"]["timeo"] == 7
    assert mount["requests"]["read"] >= 2
    assert mount["waiting"] == 0
    assert mount["uptime"] > 0
    # cp and cat read to the end of a file whose size is not known.
    assert '"waiting": 0' in mounted.run("cat", ".imagefs/status.json")


def test_each_open_of_status_is_a_snapshot(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    with open(mounted.path / ".imagefs/status.json", "rb", buffering=0) as first:
        begin = os.read(first.fileno(), 100)
        mounted.control.hold(3, 5)
        (mounted.path / "state").read_bytes()
        whole = os.pread(first.fileno(), 1 << 20, 0)
        assert whole.startswith(begin)
        assert b'"held": []' in whole
    assert mounted.status()["held"] == [3, 4, 5, 6, 7]


def test_waiting_reads_are_counted(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(2)
    reader = mounted.start("open('memory','rb').seek(2*65536); open('pages/0x00000/0x0000021','rb').read()")
    wait_until(lambda: mounted.waiting() == 1, "one read waits")
    wait_until(lambda: mounted.status()["mount"]["longest_stall"] > 0.1, "it counts as a stall")
    mounted.control.release(2)
    assert reader.wait(20) == 0
    mount = mounted.status()["mount"]
    assert (mount["waiting"], mount["waited"]) == (0, 1)
    assert mount["wait_p99"] >= mount["wait_p50"] > 0.1


def test_arrivals(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(1, 2)
    with open(mounted.path / ".imagefs/arrivals", "rb", buffering=0) as file:
        # What is here already, first: all but the windows that are held.
        here = parse(os.read(file.fileno(), 1 << 16))
        expected = set(range(GEOMETRY.pages)) - set(range(WINDOW_PAGES, 3 * WINDOW_PAGES))
        assert here == expected
        # A heartbeat while there is no news, so that a reader that was killed can end.
        assert os.read(file.fileno(), 1 << 16) == b"\n"
        timer = threading.Timer(0.2, mounted.control.release, (2, 1))
        timer.start()
        text = b"\n"
        while text == b"\n":
            text = os.read(file.fileno(), 1 << 16)
        timer.join()
        assert text == b"32 16\n"
        with pytest.raises(OSError, match=os.strerror(errno.ESPIPE)):
            file.seek(0)
        mounted.control.release(1)
        mounted.control.finish()
        # Everything once more at the end: another daemon may have filled a shared cache.
        assert parse(os.read(file.fileno(), 1 << 16)) == set(range(GEOMETRY.pages))
        assert os.read(file.fileno(), 1 << 16) == b""
    # Another reader starts from the beginning and ends by itself.
    assert parse(mounted.run("cat", ".imagefs/arrivals").encode()) == set(range(GEOMETRY.pages))


def test_arrivals_in_small_pieces(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    for window in range(0, 200, 2):
        mounted.control.hold(window)
    with open(mounted.path / ".imagefs/arrivals", "rb", buffering=0) as file:
        text = b""
        for size in (1, 2, 3, 7, 20, 64, 4096):
            text += os.read(file.fileno(), size)
    runs = [tuple(map(int, line.split())) for line in text.decode().splitlines()]
    assert runs[:3] == [(16, 16), (48, 16), (80, 16)]
    assert len(runs) == 100


def test_killed_reader_of_arrivals_ends(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    mounted.control.hold(1)
    reader = mounted.start("f = open('.imagefs/arrivals', 'rb', buffering=0)\nprint(1, flush=True)\nwhile 1: f.read(9)")
    assert reader.stdout is not None
    reader.stdout.readline()
    reader.send_signal(signal.SIGKILL)
    reader.wait(10)


def test_trace(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    path = mounted.path / ".imagefs/trace"
    subprocess.run(["sh", "-c", 'echo "0.5 3 1 pager" > "$0"; echo "0.6 9 2 pager" >> "$0"', path], check=True)
    with path.open("ab", buffering=0) as file:
        file.write(b"0.7 20 1 pa")
        file.write(b"ger\n0.8 30 4 pager")
    wait_until(lambda: mounted.control.trace().count("\n") == 4, "the last line is taken when the file is closed")
    assert path.read_text() == mounted.control.trace()
    assert [line.split()[1:] for line in path.read_text().splitlines()] == [
        ["3", "1", "pager"],
        ["9", "2", "pager"],
        ["20", "1", "pager"],
        ["30", "4", "pager"],
    ]


@pytest.mark.parametrize("text", [b"nonsense\n", b"0.1 99999999 1 pager\n", b"x" * 5000])
def test_bad_trace_is_refused(fake_mount: Mounter, text: bytes) -> None:
    mounted = fake_mount()
    descriptor = os.open(mounted.path / ".imagefs/trace", os.O_WRONLY)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.write(descriptor, text)
    # What comes after it is not spoilt by it.
    os.write(descriptor, b"0.5 3 1 pager\n")
    os.close(descriptor)
    assert mounted.control.trace().count("\n") == 1
    assert "write of a file in .imagefs" in mounted.log.read_text()


def test_present(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    path = mounted.path / ".imagefs/present"
    assert path.stat().st_size == GEOMETRY.pages // 8
    mounted.control.hold(1)
    assert path.read_bytes()[:6] == b"\xff\xff\0\0\xff\xff"
    mounted.control.release(1)
    assert path.read_bytes()[:6] == b"\xff" * 6
    assert subprocess.run(["cmp", "-n", "4", path, "/dev/zero"], capture_output=True, check=False).returncode == 1


def parse(text: bytes) -> set[int]:
    pages: set[int] = set()
    for line in text.decode().splitlines():
        first, count = map(int, line.split())
        pages |= set(range(first, first + count))
    return pages


def test_status_command(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    command = [sys.executable, "-m", "imagefs.cli", "status", str(mounted.path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{GEOMETRY.pages}" in done.stdout
