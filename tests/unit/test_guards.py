"""The guards of tests/conftest.py, in runs of their own: each fails what it is there to fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def run_tests(directory: Path, text: str, *args: str) -> tuple[int, str]:
    """Exit status and output of pytest over one file, under the guards and the project's configuration."""
    conftest = (TESTS / "conftest.py").read_text()
    assert "SECONDS_TO_END = 10.0\n" in conftest
    (directory / "conftest.py").write_text(conftest.replace("SECONDS_TO_END = 10.0\n", "SECONDS_TO_END = 0.5\n"))
    (directory / "pyproject.toml").write_text((TESTS.parent / "pyproject.toml").read_text())
    (directory / "test_inner.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={directory}/inner", *args]
    done = subprocess.run(
        [*command, "test_inner.py"], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout


LOGGING = """
import logging, pytest
log = logging.getLogger("imagefs.fetch")

def test_info(): log.info("all is well")
def test_warning(): log.warning("chunk 7 is gone")
def test_error(): log.error("chunk 7 is gone")

def test_allowed(expect_log):
    expect_log.append("chunk . is gone")
    log.error("chunk 7 is gone")

def test_another_allowed(expect_log):
    expect_log.append("link is down")
    log.error("chunk 7 is gone")

@pytest.mark.expect_log("link is down", "is g.ne")
def test_allowed_by_marker(): log.warning("it is gone")
"""


def test_log(tmp_path: Path) -> None:
    status, output = run_tests(tmp_path, LOGGING)
    failed = re.findall(r"^ERROR test_inner.py::(\w+) - Failed: unexpected in the log", output, re.MULTILINE)
    assert (status, failed) == (1, ["test_warning", "test_error", "test_another_allowed"])


def test_process_that_is_left(tmp_path: Path) -> None:
    """A daemon: no child of the run any more."""
    daemon = "import os, signal\nif os.fork(): os._exit(0)\nos.setsid()\nprint(os.getpid(), flush=True)\nsignal.pause()"
    text = (
        "import pathlib, subprocess, sys\n"
        "def test_it():\n"
        f"    with subprocess.Popen([sys.executable, '-c', {daemon!r}], stdout=subprocess.PIPE) as process:\n"
        "        pathlib.Path('daemon').write_bytes(process.stdout.readline())\n"
    )
    try:
        status, output = run_tests(tmp_path, text)
    finally:
        pid = int((tmp_path / "daemon").read_text())
        os.kill(pid, signal.SIGKILL)
    assert status == 1
    assert f"process {pid}: " in output
    assert output.rstrip().splitlines()[-1].strip("= ").startswith("1 passed, 1 error")


def test_seed_is_shown_and_taken(tmp_path: Path) -> None:
    text = "def test_it(rng):\n    assert rng.random() < 0\n"
    _, first = run_tests(tmp_path, text)
    seed = re.search(r"--hypothesis-seed=(\d+)", first)
    assert seed is not None
    _, again = run_tests(tmp_path, text, seed.group())
    drawn = re.compile(r"E +assert (0\.\d+) < 0")
    assert drawn.findall(first) == drawn.findall(again) != []
