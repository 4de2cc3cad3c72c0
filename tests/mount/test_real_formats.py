"""One image of every format, split by the command and mounted: ``native`` is what was split, to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagefs.formats import format_names, open_capture
from imagefs.image.native_files import spans
from imagefs.image.native_reader import NativeReader
from tests.faults.images import check_same
from tests.faults.mounts import Mounter
from tests.mount.conftest import environment
from tests.unit.samples import Sample, all_samples

FIRST = {sample.format: sample for sample in reversed(all_samples())}


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    with Mounter(tmp_path) as mounter:
        yield mounter


def test_every_format_has_a_sample() -> None:
    assert set(FIRST) == set(format_names())


@pytest.mark.parametrize("sample", FIRST.values(), ids=FIRST.keys())
def test_native_is_what_was_split(tmp_path: Path, mount: Mounter, sample: Sample) -> None:
    (tmp_path / "files").mkdir()
    source, memory_files = sample.write(tmp_path / "files")
    command = [sys.executable, "-m", "imagefs.cli", "split", "--quiet", str(source), str(tmp_path / "store/image")]
    command += [word for path in memory_files for word in ("--memory", str(path))]
    command += ["--format", "raw"] if sample.format == "raw" else []
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    mounted = mount(str(tmp_path / "store/image"), "nocache")
    with open_capture(source, spool_dir=tmp_path, format=sample.format, memory_files=memory_files) as capture:
        memory = bytes(capture.memory.read_at(0, capture.memory.size))
        files = {path: (start, end) for path, start, end in spans(capture.native_files)}
        expected = bytes(NativeReader(capture.native, capture.memory).read_at(0, capture.native.size))
    if not files:
        assert mounted.run("cmp", "native", str(source)) == ""
    elif source.is_dir():
        assert mounted.run("diff", "-r", "native", str(source)) == ""
    else:
        for name, (start, end) in files.items():
            assert (mounted.path / "native" / name).read_bytes() == expected[start:end]
        mounted.run("cp", "-r", "native", str(tmp_path / "copied"))
        assert mounted.run("diff", "-r", "native", str(tmp_path / "copied")) == ""
        for path in (source, *memory_files):
            mounted.run("cmp", f"native/{path.name}", str(path))
    check_same((mounted.path / "memory").read_bytes(), memory, "memory")
    assert json.loads((mounted.path / "metadata.json").read_text())["source"]["format"] == sample.format
