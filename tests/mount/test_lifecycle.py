"""Mounts begin and end as mount(8) and umount(8) expect."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from imagefs.mount import kernel
from tests.mount.conftest import Mounter, environment, wait_until
from tests.mount.fakes import STATE_BYTES

NOBODY = 65534


def mount_imagefs(tmp_path: Path, *args: str, source: str = "fake") -> subprocess.CompletedProcess[str]:
    """``mount.imagefs`` with the scripted image, on ``tmp_path/mnt``."""
    (tmp_path / "mnt").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.mount.fakes", str(tmp_path / "control"), str(tmp_path / source)]
    return subprocess.run(
        [*command, str(tmp_path / "mnt"), *args],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    """A process that does not outlive its block, however that is left."""
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def unmounted(tmp_path: Path) -> Iterator[None]:
    yield
    while (left := kernel.topmost(str(tmp_path / "mnt"))) is not None:
        kernel.detach(left)


def test_umount(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    assert (mounted.path / "state").read_bytes() == STATE_BYTES
    subprocess.run(["umount", mounted.path], check=True, timeout=20)
    mounted.wait_until_gone()
    log = mounted.log.read_text()
    assert ": mounted on " in log
    assert ": unmounted" in log
    assert "WARNING" not in log
    assert stat.filemode(mounted.log.stat().st_mode) == "-rw-------"


def test_lazy_umount_serves_open_files_to_the_end(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    with open(mounted.path / "state", "rb") as file:
        subprocess.run(["umount", "-l", mounted.path], check=True, timeout=20)
        assert os.listdir(mounted.path) == []
        assert file.read() == STATE_BYTES
        assert mounted.is_alive()
    mounted.wait_until_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_unmount(fake_mount: Mounter, number: signal.Signals) -> None:
    mounted = fake_mount()
    os.kill(mounted.pid, number)
    mounted.wait_until_gone()
    assert os.listdir(mounted.path) == []


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_image_that_does_not_close(fake_mount: Mounter, how: str) -> None:
    """It must not keep the daemon."""
    mounted = fake_mount(name="stuck")
    if how == "umount":
        subprocess.run(["umount", mounted.path], check=True, timeout=20)
    else:
        os.kill(mounted.pid, signal.SIGTERM)
    mounted.wait_until_gone()


def test_sigterm_while_busy(fake_mount: Mounter) -> None:
    mounted = fake_mount()
    with open(mounted.path / "state", "rb", buffering=0) as file:
        file.read(10)
        os.kill(mounted.pid, signal.SIGTERM)
        mounted.wait_until_gone()
        with pytest.raises(OSError, match="not connected"):
            os.pread(file.fileno(), 1, len(STATE_BYTES) - 1)


def test_what_mount_and_findmnt_show(fake_mount: Mounter, tmp_path: Path) -> None:
    mounted = fake_mount("ro,noexec", name="a,b c\\d\N{LATIN SMALL LETTER E WITH ACUTE}/vm1")
    command = ["findmnt", "-J", "-o", "FSTYPE,SOURCE,OPTIONS", "--mountpoint", str(mounted.path)]
    shown = json.loads(subprocess.check_output(command))["filesystems"][0]
    assert (shown["fstype"], shown["source"]) == ("fuse.imagefs", f"{tmp_path}/a,b c\\d%C3%A9/vm1")
    # `ro` is taken for granted; the kernel is told rw, because a VMM has to be able to open memory O_RDWR.
    options = set(shown["options"].split(","))
    assert {"rw", "nosuid", "nodev", "noexec", "default_permissions"} <= options
    assert "allow_other" not in options


def test_daemon_holds_nothing_of_its_caller(tmp_path: Path) -> None:
    """Its output is at its end when the command is, its directory can be unmounted, and it has its own session."""
    receiver, sender = os.pipe()
    os.set_inheritable(sender, True)
    done = mount_imagefs(tmp_path, "-o", f"nocache,log={tmp_path}/log")
    os.close(sender)
    assert os.read(receiver, 1) == b""
    os.close(receiver)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int(subprocess.check_output(["grep", "-Po", '"pid": \\K[0-9]+', tmp_path / "mnt/.imagefs/status.json"]))
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2)} == {f"{tmp_path}/log"}
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert "Max core file size        0 " in Path(f"/proc/{pid}/limits").read_text()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("missing", "store: missing: no such object"),
        ("broken", "internal error: RuntimeError: a mistake in a program"),
        ("killed", "the daemon was killed by SIGKILL"),
    ],
)
@pytest.mark.parametrize("flags", [(), ("-f",)])
def test_start_that_fails(tmp_path: Path, source: str, reason: str, flags: tuple[str, ...]) -> None:
    if flags and source == "killed":
        flags = ()
    done = mount_imagefs(tmp_path, "-o", "nocache", *flags, source=source)
    assert done.returncode == 32
    assert done.stderr.splitlines()[-1] == f"mount.imagefs: {reason}"
    assert "Traceback" not in done.stderr
    assert kernel.topmost(str(tmp_path / "mnt")) is None


def test_fuse_is_missing(tmp_path: Path) -> None:
    """libfuse's reason is part of the one line."""
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && exec "$@"'
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-m", "tests.mount.fakes", f"{tmp_path}/control", f"{tmp_path}/fake", f"{tmp_path}/mnt"]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *command, "-o", "nocache"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 32
    assert done.stderr.startswith(f"mount.imagefs: {tmp_path}/mnt: cannot be mounted on: fuse: device not found")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("colour=blue", "colour=blue"),
        ("ro,frobnicate", "frobnicate"),
        ("timeo=soon", "timeo=soon"),
        ("log=/nonexistent/log", "/nonexistent/log: no such file or directory"),
    ],
)
def test_wrong_options(tmp_path: Path, options: str, named: str) -> None:
    done = mount_imagefs(tmp_path, "-o", options)
    assert done.returncode == 1
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_arguments(tmp_path: Path) -> None:
    for args in ((), ("--frobnicate",), ("-N", "/proc/1/ns/mnt")):
        done = mount_imagefs(tmp_path, *(args or ("x", "y", "z")))
        assert done.returncode == 1, args
        assert done.stderr.startswith("mount.imagefs: ")
        assert done.stderr.count("\n") == 1


def test_wrong_mountpoint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, reason in (("nowhere", "no such file or directory"), ("file", "not a directory")):
        command = [sys.executable, "-m", "imagefs.cli.mount", f"{tmp_path}/fake", f"{tmp_path}/{name}"]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (32, f"mount.imagefs: {tmp_path}/{name}: {reason}\n")


def test_mount_whose_daemon_is_gone(fake_mount: Mounter, tmp_path: Path) -> None:
    mounted = fake_mount()
    os.kill(mounted.pid, signal.SIGKILL)
    wait_until(lambda: not mounted.is_alive(), "it is dead")
    command = [sys.executable, "-m", "imagefs.cli.mount", f"{tmp_path}/fake", str(mounted.path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 32
    assert f"umount -l {mounted.path}" in done.stderr
    command = [sys.executable, "-m", "imagefs.cli", "status", str(mounted.path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "the daemon is gone" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_before_it_is_usable(tmp_path: Path, number: signal.Signals) -> None:
    """Whoever waits for the mount is gone: so is the daemon, and nothing is mounted."""
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-m", "tests.mount.fakes", f"{tmp_path}/control", f"{tmp_path}/endless"]
    with ended(subprocess.Popen([*command, f"{tmp_path}/mnt", "-o", "nocache"], env=environment())) as process:
        pid_file = tmp_path / "control.pid"
        wait_until(lambda: pid_file.exists() and pid_file.read_text(), "the daemon has begun")
        process.send_signal(number)
        assert process.wait(20) == (8 if number == signal.SIGINT else -number)
    daemon = Path(f"/proc/{pid_file.read_text()}/stat")
    wait_until(lambda: not daemon.exists() or ") Z " in daemon.read_text(), "the daemon ends")
    assert kernel.topmost(str(tmp_path / "mnt")) is None


def test_foreground(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    command = [sys.executable, "-m", "tests.mount.fakes", f"{tmp_path}/control", f"{tmp_path}/fake", f"{tmp_path}/mnt"]
    flags = ["-f", "-v", "-o", "nocache"]
    with ended(subprocess.Popen([*command, *flags], env=environment(), stderr=subprocess.PIPE, text=True)) as process:
        wait_until(lambda: kernel.topmost(str(tmp_path / "mnt")), "it is mounted")
        assert (tmp_path / "mnt/state").read_bytes() == STATE_BYTES
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read().splitlines() == [
            f"mount.imagefs: {tmp_path}/fake: mounted on {tmp_path}/mnt",
            f"mount.imagefs: {tmp_path}/mnt: ended by a signal",
        ]
    assert kernel.topmost(str(tmp_path / "mnt")) is None


def read_as(user: int, path: Path) -> bool:
    """Whether a user can read a file."""
    done = subprocess.run(["head", "-c1", path], user=user, group=user, capture_output=True, check=False)
    return done.returncode == 0


def test_owner_and_others(fake_mount: Mounter, tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    private = fake_mount().path
    owned = fake_mount(f"uid={NOBODY},gid={NOBODY}").path
    allowed = fake_mount("allow_other").path
    assert (owned / "memory").stat().st_uid == (owned / "pages").stat().st_gid == NOBODY
    assert read_as(NOBODY, owned / "memory")
    assert read_as(NOBODY, owned / "pages/0x00000/0x0000001")
    assert not read_as(1234, owned / "memory")
    assert not read_as(NOBODY, private / "memory")
    # Let in, but not the owner: the kernel compares the modes.
    assert not read_as(NOBODY, allowed / "memory")
    # A VMM that is not root opens memory for writing.
    command = [sys.executable, "-c", f"import os; os.open({str(owned / 'memory')!r}, os.O_RDWR)"]
    subprocess.run(command, user=NOBODY, group=NOBODY, cwd="/", check=True)


def test_readahead(fake_mount: Mounter) -> None:
    mounted = fake_mount("readahead=512")
    device = os.stat(mounted.path).st_dev
    assert Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text() == "512\n"
