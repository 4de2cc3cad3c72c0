"""``scripts/quickstart`` as a user runs it, small: its figures, and what is left when it ends in whichever way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 180.0
SMALL = ["--memory", "192", "--fill", "64", "--mbit", "400", "--rtt", "10", "--json"]
STEPS = ["booting it", "suspending it", "writing the plain save", "resuming from the mount", "the plain way"]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Everything temporary in a directory of the test's, so that what is left can be seen."""
    (tmp_path / "tmp").mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    scripts = f"{ROOT / 'scripts'}:{ROOT}"
    yield {**os.environ, "PATH": path, "PYTHONPATH": scripts, "TMPDIR": str(tmp_path / "tmp"), "COLUMNS": "120"}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert processes_about(str(tmp_path)) == []


def start(environment: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "support.quickstart", *SMALL, *more]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )


def processes_about(text: str) -> list[str]:
    """Command lines that name ``text``, of processes that are not about to go."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and path.name != str(os.getpid()):
            found.append(command)
    return found


@pytest.mark.timeout(300)
def test_a_guest_answers_before_its_memory_has_arrived(environment: dict[str, str]) -> None:
    with start(environment) as process:
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert 0 < result["imagefs"]["answer_bytes"] < result["plain"]["answer_bytes"]
    assert result["imagefs"]["checked_bytes"] >= result["imagefs"]["answer_bytes"]
    assert all(step in err for step in STEPS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("step", "how"), [*((step, signal.SIGINT) for step in STEPS), (STEPS[3], signal.SIGTERM)])
def test_ctrl_c_leaves_nothing(environment: dict[str, str], step: str, how: signal.Signals) -> None:
    """Interrupted right after the step before ``step`` was reported, that is: during ``step``."""
    before = {"booting it": "building", **dict(zip(STEPS[1:], STEPS, strict=False))}[step]
    with start(environment) as process:
        try:
            assert process.stderr is not None
            seen = ""
            while before not in seen:
                line = process.stderr.readline()
                assert line, f"ended before: {seen}"
                seen += line
            process.send_signal(how)
            _, err = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err


@pytest.mark.timeout(300)
def test_a_failure_leaves_nothing_and_says_why(environment: dict[str, str]) -> None:
    with start(environment, "--options", "nonsense") as process:
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "unknown option: nonsense" in " ".join(err.split())
    assert "Traceback" not in err
