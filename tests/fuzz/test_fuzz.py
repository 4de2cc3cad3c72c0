"""The fuzzer finds what is there, and says how to see it again; every target takes its own seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.target import Target
from tests.fuzz.targets import all_targets

ROOT = Path(__file__).resolve().parents[2]


def fuzz(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")])},
        capture_output=True,
        text=True,
        timeout=110,
    )


# Damage may be worth a warning, and some seeds are damaged.
@pytest.mark.expect_log("")
@pytest.mark.parametrize("target", all_targets().values(), ids=lambda target: target.name)
def test_seeds(target: Target) -> None:
    assert target.seeds or target.name in ("raw",)
    for seed in target.seeds:
        target.run(seed)
        for cut in (0, 1, len(seed) // 2, len(seed) - 1):
            target.run(seed[:cut])


def test_a_planted_bug_is_found(tmp_path: Path) -> None:
    done = fuzz("--seconds", "60", "planted", directory=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "IndexError: planted, byte " in done.stdout
    again = done.stdout.partition("again: scripts/fuzz ")[2].split()
    assert (tmp_path / again[1]).read_bytes()[:3] == b"IFS"
    done = fuzz(*again, directory=tmp_path)
    assert done.returncode == 1
    assert "IndexError: planted, byte " in done.stdout


def test_nothing_is_found_in_a_sound_target(tmp_path: Path) -> None:
    done = fuzz("--seconds", "4", "--seed", "7", "name", directory=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, line = done.stdout.splitlines()
    assert first == "fuzz: 1 targets for 4 s each, 2 at once; --seed 7"
    assert line.startswith("fuzz: name: ")


def test_mistakes(tmp_path: Path) -> None:
    done = fuzz("nothing-of-the-kind", directory=tmp_path)
    assert done.returncode == 2
    assert "no such target: nothing-of-the-kind" in done.stderr
