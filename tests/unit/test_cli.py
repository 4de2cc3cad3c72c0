"""The commands that need neither mount nor network, as a user runs them."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from imagefs.cli import main
from imagefs.errors import UnsupportedInputError
from imagefs.image.capture import PageKind
from imagefs.image.geometry import PAGE_SIZE, Geometry, Region
from imagefs.image.native_files import NativeFile
from imagefs.image.vcpu import VcpuState
from imagefs.store.directory import DirectoryStore
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of

MEMORY = memory_of(300, 21)


@pytest.fixture
def image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (tmp_path / "vm.mem").write_bytes(MEMORY)
    target = str(tmp_path / "store" / "vm1")
    assert main(["split", "--format", "raw", str(tmp_path / "vm.mem"), target]) == 0
    assert "1.2 MiB of memory" in capsys.readouterr().out
    return target


def test_info_ls_verify(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", image]) == 0
    assert "raw" in capsys.readouterr().out
    assert main(["info", "--json", image]) == 0
    assert json.loads(capsys.readouterr().out)["memory_bytes"] == len(MEMORY)
    assert main(["ls", image]) == 0
    assert f"{len(MEMORY)} native" in capsys.readouterr().out
    assert main(["verify", image]) == 0
    assert "sound" in capsys.readouterr().out


def test_info_and_ls_of_several_native_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = (NativeFile("a/b", PAGE_SIZE), NativeFile("c", len(MEMORY) - PAGE_SIZE))
    with closing(DirectoryStore(tmp_path / "store", create=True)) as store:
        write_image(store, "vm1", replace(capture_of(MEMORY), native_files=files))
    image = str(tmp_path / "store" / "vm1")
    assert main(["info", image]) == 0
    assert "native files: 2 files, 1.2 MiB\n" in capsys.readouterr().out
    assert main(["ls", image]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if "native" in line] == [[str(f.size), f"native/{f.path}"] for f in files]
    assert main(["verify", image]) == 0


def test_info_of_restore_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(tmp_path / "store" / "vm1")
    for restore, lines in (
        ({}, ["restore:      not possible from this format: inspect only"]),
        ({"vmm": "qemu", "machine": "pc-q35-7.2"}, ["restore:      qemu, machine pc-q35-7.2"]),
        (
            {"vmm": "criu", "notes": ["one\x1b[2J", 2]},
            ["restore:      criu", "note:         one\N{REPLACEMENT CHARACTER}[2J", "note:         2"],
        ),
        ({"vmm": "criu", "notes": "text"}, ["restore:      criu"]),
    ):
        with closing(DirectoryStore(tmp_path / "store", create=True)) as store:
            write_image(store, "vm1", capture_of(MEMORY, restore=restore))
        assert main(["info", image]) == 0
        out = capsys.readouterr().out.splitlines()
        assert [line for line in out if line.startswith(("restore:", "note:"))] == lines


def test_a_capture_whose_native_files_do_not_add_up(tmp_path: Path) -> None:
    with closing(DirectoryStore(tmp_path / "store", create=True)) as store:
        for file in (NativeFile("a", 1), NativeFile("../a", len(MEMORY))):
            with pytest.raises(UnsupportedInputError, match="native files"):
                write_image(store, "vm1", replace(capture_of(MEMORY), native_files=(file,)))
        assert list(store.keys()) == []


def test_ls_pages_says_which_are_zero(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--pages", image]) == 0
    seen = {}
    for line in capsys.readouterr().out.splitlines():
        first, count, state = line.split()
        for pfn in range(int(first, 16), int(first, 16) + int(count)):
            seen[pfn] = state
    assert seen == {
        page: "data" if any(MEMORY[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) else "zero" for page in range(300)
    }


def test_ls_kind_lists_frames_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By guest frame, also behind a hole; a run of pages across it is two runs of frames."""
    geometry = Geometry((Region("low", 0, 40 * PAGE_SIZE, 0), Region("high", 4 << 30, 260 * PAGE_SIZE, 40 * PAGE_SIZE)))
    kinds = (PageKind(3, 2, "pt"), PageKind(38, 4, "pt"), PageKind(50, 1, "pml4"), PageKind(100, 9, "ktext"))
    capture = capture_of(MEMORY, geometry=geometry, essential=kinds, vcpus=(VcpuState(cr3=0x1000), VcpuState()))
    write_image(DirectoryStore(tmp_path / "s", create=True), "vm", capture)
    listed = {}
    for kind in ("pml5", "pml4", "pt", "ktext"):
        assert main(["ls", "--kind", kind, str(tmp_path / "s" / "vm")]) == 0
        listed[kind] = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert listed == {
        "pml5": [],
        "pml4": [["0x010000a", "1", "pml4"]],
        "pt": [["0x0000003", "2", "pt"], ["0x0000026", "2", "pt"], ["0x0100000", "2", "pt"]],
        "ktext": [["0x010003c", "9", "ktext"]],
    }
    assert main(["info", str(tmp_path / "s" / "vm")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"vCPUs: +2\n", said)
    assert re.search(r"page tables: +7 frames\n", said)
    assert re.search(r"kernel text: +36.0 KiB\n", said)


def test_verify_names_the_damage(image: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(image).parent
    for path in sorted((root / "objects").rglob("*")):
        if not path.is_file():
            continue
        original = path.read_bytes()
        for at in range(0, len(original), max(1, len(original) // 64)):
            damaged = bytearray(original)
            damaged[at] ^= 0x40
            path.write_bytes(damaged)
            assert main(["verify", "-q", image]) == 1, f"{path.name} at {at}"
            assert path.name in capsys.readouterr().err
        path.write_bytes(original)
    assert main(["verify", "-q", image]) == 0


def test_split_from_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(MEMORY)))
    target = str(tmp_path / "store" / "vm1")
    assert main(["split", "-q", "--format", "raw", "-", target]) == 0
    assert main(["verify", "-q", target]) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["split", "{tmp}/missing", "{tmp}/s/vm"], 2, "missing"),
        (["split", "{tmp}/short", "{tmp}/s/vm"], 1, "of no known format"),
        (["split", "{tmp}/short", "http://127.0.0.1:1/vm"], 1, "127.0.0.1"),
        (["split", "{tmp}/short", "{tmp}/s/objects"], 2, "objects"),
        (["info", "{tmp}/nowhere/vm"], 2, "no such directory"),
        (["info", "{tmp}/vm"], 1, "no such object"),
        (["info", "{tmp}/short"], 1, "is it an imagefs image?"),
        (["info", "{tmp}/long"], 1, "has 100000 bytes, no more than 4096 expected: is it an imagefs image?"),
        (["info", "{tmp}/json"], 1, "image name: imagefs: a non-negative integer is missing here"),
        (["info", "{tmp}/directory"], 2, "directory: this is a directory, not an image in a store"),
        (["info", "{tmp}/directory/"], 2, "directory/: this is a directory, not an image in a store"),
        (
            ["ls", "{tmp}/empty-store"],
            2,
            "empty-store: this is a store: name an image in it, such as {tmp}/empty-store/NAME",
        ),
        (["verify", "{tmp}/store"], 2, "store: this is a store: name an image in it, such as {tmp}/store/vm7"),
        (["info", "{tmp}/store/vm8"], 1, "vm8: no such object"),
        (["info", "{tmp}/store/objects"], 2, "'objects' is where the store keeps its objects"),
        (["info", "http://127.0.0.1/"], 2, "no image named"),
        (["split", "{tmp}/directory", "{tmp}/s/vm"], 1, "it is an empty directory; say which with --format"),
        (["split", "{tmp}/short", "{tmp}/short/vm"], 2, "not a directory"),
        (["info", "http://127.0.0.1:1/vm"], 1, "refused"),
    ],
)
def test_mistakes_get_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    (tmp_path / "short").write_bytes(b"not a VM")
    (tmp_path / "long").write_bytes(bytes(100_000))
    (tmp_path / "json").write_bytes(b"{}")
    (tmp_path / "directory").mkdir()
    for store in ("store", "empty-store"):
        (tmp_path / store / "objects").mkdir(parents=True)
    (tmp_path / "store" / "vm7").touch()
    assert main([word.format(tmp=tmp_path) for word in arguments]) == status
    error = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "s").exists()


def test_a_failed_split_leaves_an_existing_store_alone(image: str, tmp_path: Path) -> None:
    before = sorted(DirectoryStore(Path(image).parent).keys())
    (tmp_path / "bad").write_bytes(b"QEVM" + bytes(100))
    assert main(["split", "-q", str(tmp_path / "bad"), image]) == 1
    assert sorted(DirectoryStore(Path(image).parent).keys()) == before


@pytest.mark.parametrize("command", ["split", "info", "ls", "verify", "serve"])
def test_help_is_worth_reading(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8
