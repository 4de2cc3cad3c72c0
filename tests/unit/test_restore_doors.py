"""The choice of a door, the command line of ``imagefs restore``, and what the mmap door starts."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from imagefs.cli import restore as cli
from imagefs.errors import RestoreError, UsageError
from imagefs.restore.door import Request
from imagefs.restore.doors import choose_door, door_names
from imagefs.restore.mountpoint import RestoreImage
from imagefs.restore.shim import preload_path

PROGRAM = """#!{python}
import json, os, signal, sys
if sys.argv[1:] == ["-machine", "help"]:
    print("Supported machines are:\\npc  PC (alias of pc-i440fx-7.2)\\npc-i440fx-7.2  PC (default)")
else:
    names = ("LD_PRELOAD", "IMAGEFS_MEMORY")
    print(json.dumps([os.getpid(), sys.argv, [os.environ.get(name) for name in names]]), flush=True)
    sys.exit(77)
"""


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "mnt"
    directory.mkdir()
    restore = {"vmm": "qemu", "machine": "pc-i440fx-7.2", "ram_block": "ram", "ram_bytes": 4096, "cpus": 1}
    (directory / "metadata.json").write_text(json.dumps({"restore": restore}))
    (directory / "memory").write_bytes(bytes(4096))
    (directory / "state").write_bytes(b"")
    return directory


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A VMM that says how it was started."""
    path = tmp_path / "qemu"
    path.write_text(PROGRAM.format(python=sys.executable))
    path.chmod(0o755)
    return path


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.configure(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    "words",
    [
        ["/mnt", "--", "qemu", "-m", "1G", "--print"],
        ["/mnt", "--door", "mmap", "--", "qemu", "-m", "1G", "--print"],
        ["--door", "mmap", "/mnt", "--", "qemu", "-m", "1G", "--print"],
        ["/mnt", "qemu", "-m", "1G", "--print"],
    ],
)
def test_everything_after_the_mountpoint_is_qemus(words: list[str]) -> None:
    args = parse(*words)
    assert (args.mountpoint, args.print_only) == (Path("/mnt"), False)
    assert args.door == ("mmap" if "--door" in words else "auto")
    assert args.vmm[-4:] == ["qemu", "-m", "1G", "--print"]


@pytest.mark.parametrize("words", [[], ["/mnt"], ["/mnt", "--"], ["/mnt", "--door", "trap", "--", "qemu"]])
def test_command_lines_that_make_no_sense(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    assert "usage: imagefs restore MOUNTPOINT" in capsys.readouterr().err


def test_doors(mountpoint: Path) -> None:
    assert door_names() == ["auto", "pager", "mmap", "postcopy"]
    request = Request(RestoreImage(mountpoint, "pc", "ram", 4096, 1), ["qemu"])
    assert choose_door("auto", request) is choose_door("pager", request)
    with pytest.raises(UsageError, match="--door trap: unknown; known are auto, pager, mmap, postcopy"):
        choose_door("trap", request)


@pytest.mark.parametrize("preload", [None, "/lib/other.so"])
def test_vmm_takes_the_process_over(mountpoint: Path, program: Path, preload: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if preload:
        environment["LD_PRELOAD"] = preload
    command = [
        sys.executable,
        "-m",
        "imagefs.cli",
        "restore",
        str(mountpoint),
        "--door",
        "mmap",
        "--",
        str(program),
        "-S",
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=60)
    pid, arguments, (found_preload, memory) = json.loads(out)
    assert process.returncode == 77, err
    assert pid == process.pid
    assert arguments[1:4] == ["-machine", "pc-i440fx-7.2,memory-backend=ram", "-S"]
    assert arguments[-1] == f"exec:cat {mountpoint}/state"
    assert found_preload == " ".join(filter(None, [str(preload_path()), preload]))
    assert memory == f"{mountpoint}/memory"


def test_print(mountpoint: Path, program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed, a shell runs."""
    assert cli.run(parse(str(mountpoint), "--print", "--door", "mmap", "--", str(program), "-name", "a 'b' $c")) == 0
    printed = capsys.readouterr().out
    done = subprocess.run(["sh", "-c", printed], capture_output=True, check=False, timeout=60)
    assert done.returncode == 77, done.stderr
    _, arguments, (preload, memory) = json.loads(done.stdout)
    assert arguments == [word for word in shlex.split(printed) if "LD_PRELOAD" not in word and "MEMORY=" not in word]
    assert "a 'b' $c" in arguments
    assert (preload, memory) == (str(preload_path()), f"{mountpoint}/memory")


def test_program_that_is_missing(mountpoint: Path) -> None:
    with pytest.raises(UsageError, match="no-such-qemu: no such program"):
        cli.run(parse(str(mountpoint), "--", "no-such-qemu"))


def test_auto_says_why(mountpoint: Path, program: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "imagefs"):
        choose_door("auto", Request(RestoreImage(mountpoint, "pc", "ram", 4096, 1), [str(program)]))
    assert caplog.messages == [
        "door pager: a process of imagefs brings the pages of QEMU's memory, and can be killed without harm",
        "it is tried before mmap, postcopy, which --door takes by name",
    ]


def test_memory_that_is_shared(mountpoint: Path, program: Path) -> None:
    command = [str(program), "-device", "vhost-user-blk-pci,chardev=c"]
    request = Request(RestoreImage(mountpoint, "pc", "ram", 4096, 1), command)
    assert choose_door("auto", request) is choose_door("postcopy", request)
    with pytest.raises(RestoreError, match="door pager: a vhost-user device"):
        choose_door("pager", request)


def without_userfaultfd(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as root that may do nothing, where userfaultfd is for the privileged only."""
    (tmp_path / "sysctl").write_text("0\n")
    (tmp_path / "device").touch(0o000)
    os.chown(tmp_path / "device", 65534, 65534)
    script = f"""
        mount --bind {tmp_path}/sysctl /proc/sys/vm/unprivileged_userfaultfd
        [ ! -e /dev/userfaultfd ] || mount --bind {tmp_path}/device /dev/userfaultfd
        exec setpriv --bounding-set=-all --inh-caps=-all {shlex.join(command)}
    """
    return subprocess.run(
        ["unshare", "-m", "sh", "-ec", script], capture_output=True, text=True, check=False, timeout=60
    )


def test_auto_where_userfaultfd_is_not_permitted(mountpoint: Path, program: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "imagefs.cli", "-v", "restore", str(mountpoint), "--print"]
    done = without_userfaultfd(tmp_path, *command, "--", str(program))
    assert done.returncode == 0, done.stderr
    assert "IMAGEFS_PAGER" not in done.stdout
    chosen = done.stderr.splitlines()[0]
    assert chosen.startswith("imagefs: door mmap: ")
    reason = chosen.partition("; not pager: ")[2]
    assert all(name in reason for name in ("vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE", "/dev/userfaultfd"))
    done = without_userfaultfd(tmp_path, *command, "--door", "pager", "--", str(program))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"door pager: {reason}" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--socket", "/s", "--door", "mmap"],
        ["--socket", "/s", "--print"],
        ["--reattach"],
        ["--reattach", "--pid", "1", "--socket", "/s"],
        ["--reattach", "--pid", "1", "--", "qemu"],
        ["--pid", "1", "--", "qemu"],
        ["--recover", "--qmp", "/s", "--reattach"],
    ],
)
def test_options_that_do_not_go_together(mountpoint: Path, words: list[str]) -> None:
    with pytest.raises(UsageError):
        cli.run(parse(str(mountpoint), *words))
