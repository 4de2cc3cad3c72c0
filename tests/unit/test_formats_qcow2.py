"""Snapshots with a VM's state in qcow2 images, made with qemu-img and qemu-io: small clusters, any stream as state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from imagefs.errors import UnsupportedInputError, UsageError
from imagefs.formats import open_capture
from imagefs.image.native_reader import NativeReader
from tests.unit.samples_qcow2 import CLUSTER, STREAM, Image, tool
from tests.unit.streams import Built, Record, build, page_of
from tests.unit.test_formats_qemu import content


@pytest.fixture
def image(tmp_path: Path) -> Image:
    found = Image(tmp_path / "disk.qcow2")
    found.create()
    return found


def check(image: Path, built: Built, directory: Path, snapshot: str | None = None, piped: bool = False) -> None:
    with open(image, "rb") as stream:
        source = stream if piped else image
        with open_capture(source, spool_dir=directory, snapshot=snapshot) as capture:
            assert capture.source_format == "qcow2"
            assert content(capture.memory) == built.memory
            assert content(capture.state) == built.state
            assert content(NativeReader(capture.native, capture.memory)) == image.read_bytes()
            assert snapshot is None or f'"name": "{snapshot}"'.encode() in capture.config["snapshot.json"]


@pytest.mark.parametrize("piped", [False, True])
def test_only_snapshot(piped: bool, image: Image, tmp_path: Path) -> None:
    """Its clusters are neither in one piece nor in the stream's order."""
    image.save("one", STREAM.data)
    check(image.path, STREAM, tmp_path, piped=piped)


def test_one_of_several(image: Image, tmp_path: Path) -> None:
    other = build([[Record("page", "pc.ram", page, page_of(20 + page)) for page in range(8)], []])
    image.save("one", STREAM.data)
    image.save("two", other.data, "write -P 5 0 4k")
    check(image.path, STREAM, tmp_path, "one")
    check(image.path, other, tmp_path, "two")
    with pytest.raises(UsageError, match=r"--snapshot \('one', 'two'\)"), open_capture(image.path, spool_dir=tmp_path):
        pass
    with (
        pytest.raises(UsageError, match="'one', 'two'"),
        open_capture(image.path, spool_dir=tmp_path, snapshot="three"),
    ):
        pass


@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on", "compat=0.10,cluster_size=1k"]
)
def test_other_layouts(options: str, tmp_path: Path) -> None:
    image = Image(tmp_path / "disk.qcow2")
    image.create(options)
    image.save("one", STREAM.data)
    check(image.path, STREAM, tmp_path)


def test_stream_with_superseded_pages(image: Image, tmp_path: Path) -> None:
    built = build([[Record("page", "pc.ram", 1, page_of(seed)) for seed in range(3)], []])
    image.save("one", built.data)
    check(image.path, built, tmp_path)


def refusal(path: Path, directory: Path) -> UnsupportedInputError:
    with pytest.raises(UnsupportedInputError) as caught, open_capture(path, spool_dir=directory):
        pass
    return caught.value


def test_disk_without_a_state(image: Image, tmp_path: Path) -> None:
    assert "no snapshot with the state of a VM" in str(refusal(image.path, tmp_path))
    tool("qemu-img", "snapshot", "-c", "disk", str(image.path))
    assert "no snapshot with the state of a VM" in str(refusal(image.path, tmp_path))


def damages() -> list[tuple[str, Callable[[bytes], bytes]]]:
    return [
        ("cut", lambda data: data[: len(data) // 2]),
        ("header only", lambda data: data[:104]),
        ("magic only", lambda data: data[:4]),
        ("clusters of 2^63", lambda data: data[:20] + b"\0\0\0\x3f" + data[24:]),
        ("L1 table elsewhere", lambda data: data[:40] + b"\x7f" + bytes(7) + data[48:]),
        ("snapshots without end", lambda data: data[:60] + b"\xff\xff\xff\xff" + data[64:]),
        ("snapshots elsewhere", lambda data: data[:64] + b"\x7f" + bytes(7) + data[72:]),
        ("state of another kind", lambda data: data.replace(b"QEVM", b"QEVN")),
    ]


@pytest.mark.parametrize(("what", "damage"), damages(), ids=[what for what, _ in damages()])
def test_damaged(what: str, damage: Callable[[bytes], bytes], image: Image, tmp_path: Path) -> None:
    image.save("one", STREAM.data)
    image.path.write_bytes(damage(image.path.read_bytes()))
    error = refusal(image.path, tmp_path)
    assert error.field
    assert error.offset is not None
    assert "\n" not in str(error)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 1 << 63, len(STREAM.data) + 5 * CLUSTER, len(STREAM.data) - 10])
def test_wrong_size_of_the_state(size: int, image: Image, tmp_path: Path) -> None:
    image.save("one", STREAM.data)
    data = image.path.read_bytes()
    image.path.write_bytes(data.replace(len(STREAM.data).to_bytes(8, "big"), size.to_bytes(8, "big")))
    assert refusal(image.path, tmp_path).field


def test_what_is_not_wanted(image: Image, tmp_path: Path) -> None:
    image.save("one", STREAM.data)
    with (
        pytest.raises(UsageError, match="--memory"),
        open_capture(image.path, spool_dir=tmp_path, memory_files=[image.path]),
    ):
        pass
    plain = tmp_path / "plain"
    plain.write_bytes(STREAM.data)
    with (
        pytest.raises(UsageError, match=r"--snapshot one: .* has no snapshots"),
        open_capture(plain, spool_dir=tmp_path, snapshot="one"),
    ):
        pass


def test_without_qemu_img(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="qemu-img is not installed"), open_capture(image.path, spool_dir=tmp_path):
        pass
