"""``scripts/bench resume`` as it is run for the figures in README, but small: its files, and what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 280.0
WAYS = ("imagefs", "download")


@pytest.mark.timeout(300)
def test_two_ways_over_one_link(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-m", "support.bench", "resume", "--quick", "--links", "1G", "--ways", ",".join(WAYS)]
    command += ["--work", str(tmp_path / "work"), "--figures", str(tmp_path / "figures"), "--limit", "120"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "work").iterdir()) == []

    result = json.loads((tmp_path / "figures" / "resume.json").read_text())
    resumes = {resume["way"]: resume["milestones"] for resume in result["resumes"]}
    assert set(resumes) == set(WAYS)
    for way, milestones in resumes.items():
        assert [each["gets"] for each in milestones] == [1, 100, 1000], done.stderr
        seconds = [each["seconds"] for each in milestones]
        assert 0 < seconds[0] <= seconds[1] <= seconds[2], way
        assert milestones[1]["p50_ms"] <= milestones[1]["p99_ms"]
    # One transfers what the guest touches, the other everything.
    assert 0 < resumes["imagefs"][0]["bytes_down"] < resumes["download"][0]["bytes_down"]
    assert resumes["download"][0]["bytes_down"] >= result["sizes"]["save"]
    assert result["links"][0]["simulated"]["mbit"] <= 1010

    assert "| imagefs, first resume |" in (tmp_path / "figures" / "resume.md").read_text()
    assert (tmp_path / "figures" / "resume.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "figures" / "resume.svg").read_text()


def test_what_is_unknown_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "support.bench", "resume", "--ways", "imagefs,carrier-pigeon"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    assert "carrier-pigeon unknown; known are" in done.stderr
