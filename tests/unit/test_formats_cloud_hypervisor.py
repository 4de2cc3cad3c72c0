"""Cloud Hypervisor snapshots, of all versions that write their ranges differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.geometry import PAGE_SIZE, Region
from imagefs.image.native_files import spans
from imagefs.image.native_reader import NativeReader
from tests.unit.samples_cloud_hypervisor import MEMORY, data_v28, data_v29, data_v39, files, state


def write(directory: Path, content: dict[str, bytes]) -> Path:
    directory.mkdir(exist_ok=True)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.mark.parametrize("data", [data_v28, data_v29, data_v39])
def test_snapshot(tmp_path: Path, data: Callable[[], Any]) -> None:
    content = {**files(data()), "notes.txt": b"mine\n"}
    with open_capture(write(tmp_path / "s", content), spool_dir=tmp_path) as capture:
        assert capture.source_format == "cloud-hypervisor"
        assert capture.geometry.regions == (
            Region("ram-0", 0, 3 * PAGE_SIZE, 0),
            Region("ram-1", 1 << 32, PAGE_SIZE, 3 * PAGE_SIZE),
        )
        assert capture.memory.read_at(0, 1 << 20) == MEMORY
        assert capture.state.read_at(0, 1 << 20) == content["state.json"]
        assert capture.config == {"config.json": content["config.json"]}
        assert capture.restore == {"vmm": "cloud-hypervisor"}
        native = NativeReader(capture.native, capture.memory).read_at(0, 1 << 20)
        assert {path: native[start:end] for path, start, end in spans(capture.native_files)} == content


def with_state(value: Any) -> dict[str, bytes]:
    return {**files(data_v39()), "state.json": value if isinstance(value, bytes) else json.dumps(value).encode()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_state(b'{"snapshots": '), r"state\.json: no JSON: Expecting value at offset 0xe"),
        (with_state(b"[" * 100_000), r"state\.json: no JSON that can be read"),
        (with_state([]), r"state\.json: snapshots: there is none"),
        (with_state({"snapshots": {}}), r"snapshots: memory-manager: there is none"),
        (with_state(state(None)), r"snapshot_data: neither text nor a list of bytes at offset 0x"),
        (with_state(state([1, 2, 300])), r"not a list of bytes"),
        (with_state(state([3, 0, 0, 0, 0, 0, 0, 0, 1])), r"3 ranges in 9 bytes"),
        (with_state(state({"state": "{"})), r"no JSON in it"),
        (with_state(state({"state": "{}"})), r"snapshot_data: memory_ranges: there is none"),
        (with_state(state(data_v39([]))), r"no ranges: the memory is in a file of its own"),
        (with_state(state(data_v39([(0, 5000)]))), r"memory_ranges: 0: length: 0x1388 is not made of whole pages"),
        (with_state(state(data_v39([(1, 4096)]))), r"memory_ranges: 0: gpa: 0x1 is not made of whole pages"),
        (with_state(state(data_v39([(0, 1 << 60)]))), r"0: length: no number of up to 52 bits"),
        (with_state(state(data_v39([(0, -4096)]))), r"0: length: no number of up to 52 bits"),
        (with_state(state(data_v39([(0, 0)]))), r"0: length: 0x0 bytes from 0x0 on"),
        (with_state(state(data_v39([(0, 8192), (4096, 8192)]))), r"'ram-0' and 'ram-1' overlap"),
        (with_state(state(data_v39([(n << 12, 4096) for n in range(4097)]))), r"4,097 are too many"),
        (
            with_state(state(data_v39([(0, 8192)]))),
            r"memory-ranges: it has 16,384 bytes, the ranges in state.json have 8,192",
        ),
        ({**files(data_v39()), "config.json": b"{"}, r"config\.json: no JSON"),
    ],
)
def test_refused(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    source = write(tmp_path / "s", content)
    with pytest.raises(UnsupportedInputError, match=message) as caught, open_capture(source, spool_dir=tmp_path):
        pass
    assert caught.value.offset is not None


def test_which_directory(tmp_path: Path) -> None:
    source = write(tmp_path / "s", files(data_v39()))
    with (
        pytest.raises(UsageError, match="the memory is in the snapshot's file memory-ranges"),
        open_capture(source, spool_dir=tmp_path, memory_files=[source / "memory-ranges"]),
    ):
        pass
    with (
        pytest.raises(UsageError, match="a Cloud Hypervisor snapshot is a directory"),
        open_capture(source / "state.json", spool_dir=tmp_path, format="cloud-hypervisor"),
    ):
        pass
    (source / "memory-ranges").unlink()
    with (
        pytest.raises(UnsupportedInputError, match=r"it is a directory with 'config.json', 'state.json'; say which"),
        open_capture(source, spool_dir=tmp_path),
    ):
        pass
    with (
        pytest.raises(UnsupportedInputError, match=r"memory-ranges: .* has no such file"),
        open_capture(source, spool_dir=tmp_path, format="cloud-hypervisor"),
    ):
        pass
    (source / "memory-ranges").symlink_to("/etc/passwd")
    with pytest.raises(UsageError, match="is a symbolic link"), open_capture(source, spool_dir=tmp_path):
        pass
