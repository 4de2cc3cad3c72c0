"""``imagefs`` as a process: signals in the middle of a split, outputs that close, mistakes on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import imagefs
from imagefs.cli import COMMANDS
from imagefs.store.directory import DirectoryStore
from tests.unit.captures import memory_of

SECONDS = 60.0
MEMORY = memory_of(700, 71)
IMAGEFS = [sys.executable, "-m", "imagefs.cli"]


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    settings: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([*IMAGEFS, *arguments], text=True, timeout=SECONDS, check=False, **settings)  # type: ignore[call-overload,no-any-return]


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and "Traceback" not in text


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "vm.mem").write_bytes(MEMORY)
    done = run("split", "-q", "--format", "raw", str(tmp_path / "vm.mem"), str(tmp_path / "store" / "vm1"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return tmp_path / "store" / "vm1"


def snapshot(root: Path) -> dict[str, bytes]:
    store = DirectoryStore(root)
    return {key: store.get(key) for key in store.keys()}  # noqa: SIM118 - a store is no mapping


@contextmanager
def split_in_the_middle(target: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A split that has read megabytes of a pipe on which nothing more comes."""
    # Where the tests run in the background of a shell SIGINT is ignored, which children inherit.
    command = ["env", "--default-signal=INT", *IMAGEFS, "split", "-q", "--format", "raw", "-", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            # A pipe holds 64 KiB: when the last of this is in it, the split has read the rest.
            process.stdin.write(MEMORY)
            process.stdin.flush()
            yield process
        finally:
            process.kill()


SIGNALS = [
    (signal.SIGINT, 130, "interrupted"),
    (signal.SIGTERM, 143, "ended by SIGTERM"),
    (signal.SIGHUP, 129, "ended by SIGHUP"),
]


@pytest.mark.parametrize(("number", "status", "message"), SIGNALS, ids=[each[0].name for each in SIGNALS])
def test_signals_during_a_split(image: Path, number: signal.Signals, status: int, message: str) -> None:
    """The store is what it was: the old image under its name, a store that was not there is not."""
    before = snapshot(image.parent)
    new = image.parent.parent / "deep" / "new" / "vm"
    for target in (image, image.parent / "vm2", new):
        with split_in_the_middle(target) as process:
            process.send_signal(number)
            out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out.decode(), err.decode()) == (status, "", f"imagefs split: {message}\n")
        assert snapshot(image.parent) == before
        assert list((image.parent / ".tmp").iterdir()) == []
        assert not new.parent.parent.exists()
    assert run("verify", str(image)).returncode == 0


def test_a_signal_that_is_ignored(image: Path) -> None:
    """nohup imagefs split …"""
    command = ["nohup", *IMAGEFS, "split", "-q", "--format", "raw", "-", str(image.parent / "vm2")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            process.stdin.write(MEMORY)
            process.stdin.flush()
            process.send_signal(signal.SIGHUP)
            process.communicate(MEMORY, timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert run("verify", "-q", str(image.parent / "vm2")).returncode == 0


def test_two_splits_into_a_new_store_and_one_is_interrupted(tmp_path: Path) -> None:
    """The one that fails had made the store; the other one's image is in it and stays."""
    (tmp_path / "vm.mem").write_bytes(MEMORY)
    store = tmp_path / "store"
    with split_in_the_middle(store / "a") as first:
        assert run("split", "-q", "--format", "raw", str(tmp_path / "vm.mem"), str(store / "b")).returncode == 0
        before = snapshot(store)
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=SECONDS)
        assert first.returncode == 130
    assert snapshot(store) == before
    assert run("verify", "-q", str(store / "b")).returncode == 0
    with split_in_the_middle(store / "c") as first, split_in_the_middle(store / "d") as second:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=SECONDS)
        assert second.stdin is not None
        second.stdin.close()
        assert second.wait(SECONDS) == 0
    assert run("verify", "-q", str(store / "d")).returncode == 0


@pytest.mark.parametrize(
    "arguments", [["ls", "--pages"], ["info"], ["--help"], ["split", "--help"], ["ls"]], ids=" ".join
)
def test_whoever_reads_the_output_has_seen_enough(image: Path, arguments: list[str]) -> None:
    """imagefs ls --pages store/vm1 | head -1: also where all of the output is in the buffer still."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(*arguments, *([str(image)] if "--help" not in arguments else []), stdout=writing)
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 141


def test_head(image: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m imagefs.cli ls --pages {image} | head -1"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.stderr == ""
    assert one_line(done.stdout)


def test_output_that_cannot_be_written(image: Path) -> None:
    with open("/dev/full", "w") as full:
        done = run("info", str(image), stdout=full)
    assert (done.returncode, done.stderr) == (1, "imagefs info: no space left on device\n")


def test_closed_outputs_and_inputs(image: Path) -> None:
    """Without any of the three: nothing to say it to, and nothing to say."""
    script = f"exec {sys.executable} -m imagefs.cli $* <&- >&- 2>&-"
    for arguments, status in (
        (["info", str(image)], 0),
        (["info", str(image) + "x"], 1),
        (["split", "--format", "raw", "-", str(image)], 2),
        (["nonsense"], 2),
    ):
        done = subprocess.run(["bash", "-c", script, "bash", *arguments], timeout=SECONDS, check=False)
        assert done.returncode == status, arguments


MISTAKES = [
    ([], "imagefs: the following arguments are required: COMMAND (usage: imagefs "),
    (["nonsense"], "imagefs: argument COMMAND: invalid choice: 'nonsense' (choose from "),
    (["--nonsense"], "imagefs: the following arguments are required: COMMAND (usage: "),
    (["split"], "imagefs split: the following arguments are required: SOURCE, STORE/NAME (usage: imagefs split "),
    (["split", "a", "b", "c"], "imagefs: unrecognized arguments: c (usage: "),
    (["split", "--format", "none", "a", "b"], "imagefs split: argument --format: invalid choice: 'none' (choose from "),
    (["suspend", "b"], "imagefs suspend: the following arguments are required: --qmp (usage: "),
    (["ls", "--kind", "none", "b"], "imagefs ls: argument --kind: invalid choice: 'none' (choose from "),
    *(([name], f"imagefs {name}: the following arguments are required: ") for name in COMMANDS if name != "split"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(each[0]) or "nothing" for each in MISTAKES])
def test_mistakes_on_the_command_line(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert one_line(done.stderr)
    assert "--help)\n" in done.stderr


def test_where_nothing_is_installed(tmp_path: Path) -> None:
    """A checkout without the package's metadata, and without any other package: help and version need none."""
    (tmp_path / "imagefs").symlink_to(Path(imagefs.__path__[0]))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for arguments, said in ((["--help"], "verify"), (["--version"], "imagefs (not installed)\n")):
        done = subprocess.run(
            [sys.executable, "-S", "-m", "imagefs.cli", *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert said in done.stdout
