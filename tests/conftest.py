"""What holds for every test: seeds are shown, no unexpected log line, no process or mount left behind."""

from __future__ import annotations

import logging
import os
import random
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

MARK = "IMAGEFS_TEST_RUN"
"""Environment variable that every process of a run inherits, daemons too: how leftovers are told from others'."""

SECONDS_TO_END = 10.0
"""What a process that was told to end may take at the close of a run."""

hypothesis.settings.register_profile("imagefs", derandomize=False, print_blob=True, deadline=None, max_examples=100)
hypothesis.settings.load_profile("imagefs")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(random.SystemRandom().getrandbits(32))


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.hypothesis_seed} (the same again: --hypothesis-seed={config.option.hypothesis_seed})"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers for a test that hypothesis does not drive, from the run's seed and the test's name."""
    return random.Random(f"{request.config.option.hypothesis_seed} {request.node.nodeid}")


class _Unexpected(logging.Handler):
    def __init__(self, patterns: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.patterns = patterns
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if not any(re.search(pattern, message) for pattern in self.patterns):
            self.lines.append(f"{record.levelname} {record.name}: {message}")


@pytest.fixture(autouse=True)
def expect_log(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """A warning or worse from an ``imagefs`` logger fails the test, unless a pattern allows it.

    Patterns (``re.search``) come from ``@pytest.mark.expect_log(...)``, or are appended to the fixture's list.
    """
    patterns = [str(pattern) for mark in request.node.iter_markers("expect_log") for pattern in mark.args]
    handler = _Unexpected(patterns)
    logger = logging.getLogger("imagefs")
    logger.addHandler(handler)
    try:
        yield patterns
    finally:
        logger.removeHandler(handler)
    if handler.lines:
        pytest.fail("unexpected in the log:\n" + "\n".join(handler.lines), pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end of the run no process that it started is alive, and no imagefs is mounted in its directories."""
    os.environ[MARK] = secrets.token_hex(16)
    mark = f"{MARK}={os.environ[MARK]}".encode()
    directory = tmp_path_factory.getbasetemp()
    yield
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := _processes(mark, directory) + _mounts(directory)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if left:
        pytest.fail("left behind by the tests:\n" + "\n".join(left), pytrace=False)


def _processes(mark: bytes, below: Path) -> list[str]:
    """Processes with the mark, or that say a directory of ours (nginx overwrites its environment), or our children."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            marked = mark in (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended, or is not ours to look at
        ours = marked or int(parent) == os.getpid() or f"{below}/" in command
        # Python's own helpers end with us.
        if ours and state != "Z" and "multiprocessing" not in command:
            found.append(f"process {entry.name}: {command}")
    return found


def _mounts(below: Path) -> list[str]:
    fields = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [f"mount {at}" for _, at, kind, *_ in fields if kind == "fuse.imagefs" and Path(at).is_relative_to(below)]
