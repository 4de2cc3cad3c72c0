"""What a store is believed to have, and what it has: a catalogue that lies, is lost, or cannot be used."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from imagefs.errors import AccessDeniedError, UnavailableError
from imagefs.image.chunks import Codec
from imagefs.image.packs import FOOTER_SIZE
from imagefs.store import catalogue
from imagefs.store.catalogue import FILE_NAME, Catalogue
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import ImageReader, load_image
from imagefs.store.verify import Verifier
from imagefs.store.writer import Written, write_image
from tests.unit.captures import capture_of, memory_of

MEMORY = memory_of(300, 61, 0.2)
CHANGED = b"changed!" + MEMORY[8:]


def split(root: Path, name: str, memory: bytes) -> Written:
    return write_image(DirectoryStore(root, create=True), name, capture_of(memory))


def check(root: Path, name: str, memory: bytes) -> None:
    store = DirectoryStore(root)
    image = load_image(store, name, Codec())
    assert ImageReader(store, image, Codec()).source("memory").read_at(0, len(memory)) == memory
    assert list(Verifier(store, image, Codec()).damage()) == []


def packs(root: Path) -> list[Path]:
    """The largest first: that of the chunks."""
    found = [path for path in (root / "objects").rglob("*") if path.is_file() and path.read_bytes()[-8:] == b"1KCAPSFI"]
    return sorted(found, key=lambda path: -path.stat().st_size)


@pytest.mark.parametrize("lost", [True, False], ids=["lost catalogue", "copied store"])
def test_packs_that_are_not_known_are_taken_in(tmp_path: Path, lost: bool) -> None:
    root = tmp_path / "s"
    split(root, "one", MEMORY)
    if lost:
        (root / FILE_NAME).unlink()
    else:
        other = tmp_path / "t"
        split(other, "other", memory_of(10, 1))
        for path in root.rglob("objects/*/*"):
            (other / path.relative_to(root)).parent.mkdir(exist_ok=True)
            (other / path.relative_to(root)).write_bytes(path.read_bytes())
        root = other
    second = split(root, "two", CHANGED)
    assert second.new_bytes < second.stored_bytes / 5
    check(root, "two", CHANGED)


@pytest.mark.parametrize("where", ["payload", "table", "footer", "cut"])
def test_a_damaged_pack_is_not_taken_in(tmp_path: Path, expect_log: list[str], where: str) -> None:
    """Its table can be whole where a payload is not; no new image may begin with that."""
    root = tmp_path / "s"
    split(root, "one", MEMORY)
    pack = packs(root)[0]
    data = bytearray(pack.read_bytes())
    at = {"payload": 100, "table": len(data) - FOOTER_SIZE - 50, "footer": len(data) - 1, "cut": 0}[where]
    data[at] ^= 4
    pack.write_bytes(data[1000:] if where == "cut" else data)
    (root / FILE_NAME).unlink()
    expect_log.append(f"{pack.name}: digest is not the object's name; nothing new will refer to it")
    second = split(root, "two", CHANGED)
    assert second.new_bytes > second.stored_bytes / 2
    check(root, "two", CHANGED)


def test_a_damaged_pack_is_written_anew(tmp_path: Path, expect_log: list[str]) -> None:
    """By a split of the same data, which makes the same pack: its image is whole, and so is the old one again."""
    root = tmp_path / "s"
    split(root, "one", MEMORY)
    for pack in packs(root):
        pack.write_bytes(pack.read_bytes()[:-100])
    (root / FILE_NAME).unlink()
    expect_log += ["nothing new will refer to it", "was damaged; written anew"]
    split(root, "two", MEMORY)
    check(root, "two", MEMORY)
    check(root, "one", MEMORY)


def test_packs_that_were_deleted_are_not_referred_to(tmp_path: Path) -> None:
    root = tmp_path / "s"
    split(root, "one", MEMORY)
    for pack in packs(root):
        pack.unlink()
    split(root, "two", CHANGED)
    check(root, "two", CHANGED)


def test_a_catalogue_of_former_days(tmp_path: Path) -> None:
    root = tmp_path / "s"
    split(root, "one", MEMORY)
    (root / FILE_NAME).unlink()
    with sqlite3.connect(root / FILE_NAME) as db:
        db.execute("CREATE TABLE objects (id INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE)")
    db.close()
    assert split(root, "two", MEMORY).new_bytes == 0


def test_a_damaged_catalogue_while_others_may_use_it(tmp_path: Path) -> None:
    """Only who is alone makes it anew."""
    store = DirectoryStore(tmp_path, create=True)
    (tmp_path / FILE_NAME).write_bytes(b"no database, this is" * 100)
    with pytest.raises(UnavailableError, match="delete it when no split is running, the next one makes it anew"):
        Catalogue(store, None)
    Catalogue(store, frozenset()).close()
    Catalogue(store, None).close()


def test_a_catalogue_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(AccessDeniedError, match=f"{FILE_NAME}: cannot be used: unable to open database file"):
        Catalogue(DirectoryStore(tmp_path), frozenset())


def test_a_large_split_is_published_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PUBLISHED_AT_ONCE", 3)
    split(tmp_path, "one", MEMORY)
    second = split(tmp_path, "two", CHANGED)
    assert second.new_bytes < second.stored_bytes / 5
    check(tmp_path, "two", CHANGED)
