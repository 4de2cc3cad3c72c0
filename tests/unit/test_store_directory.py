"""The store in a directory: what it gives, what it refuses, what it leaves on the disk."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import AccessDeniedError, CorruptObjectError, MissingObjectError, UnavailableError, UsageError
from imagefs.store.base import Store
from imagefs.store.directory import DirectoryStore

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", create=True)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_round_trip(store: DirectoryStore) -> None:
    protocol: Store = store
    protocol.put("objects/ab/abcd", b"0123456789")
    protocol.put("vm1", bytearray(b"name"))
    protocol.put("empty", memoryview(b""))
    assert protocol.get("objects/ab/abcd") == b"0123456789"
    assert protocol.get("vm1") == b"name"
    assert protocol.get("empty") == b""
    assert [protocol.size(key) for key in ("objects/ab/abcd", "vm1", "empty")] == [10, 4, 0]
    assert protocol.has("vm1")
    assert not protocol.has("vm2")
    protocol.put("vm1", b"another")
    assert protocol.get("vm1") == b"another"
    protocol.close()


@given(data=st.binary(max_size=200), start=st.integers(0, 250), length=st.integers(0, 250) | st.none())
def test_ranges(data: bytes, start: int, length: int | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = DirectoryStore(directory)
        store.put("x", data)
        if length == 0 or (start <= len(data) and (length is None or start + length <= len(data))):
            assert store.get("x", start, length) == data[start : None if length is None else start + length]
        else:
            with pytest.raises(CorruptObjectError, match=f"x: ends at byte {len(data)}, wanted"):
                store.get("x", start, length)


def test_limit(store: DirectoryStore) -> None:
    store.put("x", bytes(100))
    assert len(store.get("x", limit=100)) == 100
    assert len(store.get("x", 1, limit=99)) == 99
    assert len(store.get("x", 0, 100, limit=1)) == 100
    with pytest.raises(CorruptObjectError, match="has 100 bytes, no more than 99 expected"):
        store.get("x", limit=99)
    with pytest.raises(ValueError, match="range"):
        store.get("x", -1)
    with pytest.raises(ValueError, match="range"):
        store.get("x", 0, -1)


def test_missing(store: DirectoryStore) -> None:
    store.put("vm1", b"x")
    store.put("objects/ab/abcd", b"x")
    for key in ("vm2", "objects/cd/x", "vm1/below-a-file", "objects", "objects/ab"):
        with pytest.raises(MissingObjectError) as caught:
            store.get(key)
        assert (caught.value.key, caught.value.origin) == (key, store.origin)
        with pytest.raises(MissingObjectError):
            store.size(key)
        assert not store.has(key)


def test_no_key(store: DirectoryStore) -> None:
    for call in (store.get, store.size, store.has, store.delete, lambda key: store.put(key, b"")):
        with pytest.raises(UsageError):
            call("../x")


def test_fifo_does_not_hang(store: DirectoryStore) -> None:
    os.mkfifo(store.root / "fifo")
    with pytest.raises(MissingObjectError):
        store.get("fifo")


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory; a store is"):
        DirectoryStore(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"")
    for create in (False, True):
        with pytest.raises(UsageError, match="not a directory"):
            DirectoryStore(tmp_path / "file", create=create)
        with pytest.raises((UsageError, MissingObjectError)):
            DirectoryStore(tmp_path / "file" / "below", create=create)


def test_file_in_the_way(store: DirectoryStore) -> None:
    store.put("vm1", b"x")
    with pytest.raises(UnavailableError, match="vm1/below: the object's directory vanished, or is no directory"):
        store.put("vm1/below", b"y")
    assert list((store.root / ".tmp").iterdir()) == []


def test_vanished_store_is_unavailable(store: DirectoryStore, tmp_path: Path) -> None:
    """A network filesystem may have been unmounted under us: that does not mean that the image is gone."""
    store.put("x", b"1")
    store.root.rename(tmp_path / "away")
    for call in (store.get, store.size, store.has, lambda key: store.put(key, b"")):
        with pytest.raises(UnavailableError, match="x: "):
            call("x")
    (tmp_path / "away").rename(store.root)
    assert store.get("x") == b"1"


def test_changed_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore("store", create=True)
    store.put("x", b"1")
    monkeypatch.chdir("/")
    assert store.get("x") == b"1"


def test_keys(store: DirectoryStore) -> None:
    assert list(store.keys()) == []
    names = ["a", "objects/ab/1", "objects/ab/2", "objects/cd/3", "z"]
    for name in reversed(names):
        store.put(name, b"")
    (store.root / ".hidden").write_bytes(b"")
    (store.root / "not a key").write_bytes(b"")
    assert list(store.keys()) == names
    assert list(store.keys("objects")) == list(store.keys("objects/")) == names[1:4]
    assert list(store.keys("objects/ab")) == names[1:3]
    assert list(store.keys("nothing")) == list(store.keys("a")) == []


def test_delete(store: DirectoryStore) -> None:
    store.put("objects/ab/1", b"")
    store.put("objects/cd/2", b"")
    store.delete("objects/ab/1")
    store.delete("objects/ab/1")
    store.delete("never/was")
    assert list(store.keys()) == ["objects/cd/2"]
    assert not (store.root / "objects/ab").exists()
    store.delete("objects/cd/2")
    assert [entry.name for entry in store.root.iterdir()] == [".tmp"]


def test_puts_and_deletes_at_once(store: DirectoryStore) -> None:
    """A delete takes away directories that a put has just made; the put must not notice."""
    errors: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for _ in range(100):
                store.put(f"objects/ab/{name}", name.encode())
                assert store.get(f"objects/ab/{name}") == name.encode()
                store.delete(f"objects/ab/{name}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert not (store.root / "objects").exists()


@pytest.fixture(params=[0o000, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    old = os.umask(request.param)
    yield
    os.umask(old)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(
    ("root", "directory", "file"),
    [(None, 0o700, 0o600), (0o700, 0o700, 0o600), (0o750, 0o750, 0o640), (0o755, 0o755, 0o644), (0o711, 0o700, 0o600)],
)
def test_modes(tmp_path: Path, root: int | None, directory: int, file: int) -> None:
    """Who may read what the root says; never the umask, and nobody else when nobody said so."""
    path = tmp_path / "store"
    if root is not None:
        path.mkdir()
        path.chmod(root)
    store = DirectoryStore(path, create=True)
    store.put("objects/ab/x", b"")
    store.put("vm1", b"")
    assert mode_of(path) == (root or 0o700)
    assert {mode_of(path / "objects"), mode_of(path / "objects/ab")} == {directory}
    assert {mode_of(path / "vm1"), mode_of(path / "objects/ab/x")} == {file}
    assert mode_of(path / ".tmp") == 0o700


def test_leftovers_are_removed_but_not_the_living(store: DirectoryStore) -> None:
    store.put("x", b"")
    temporary = store.root / ".tmp"
    (temporary / "1-dead").write_bytes(b"left by a crash")
    with open(temporary / "2-alive", "wb") as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        store.put("y", b"")
        assert len(list(temporary.iterdir())) == 2, "only the first put of an opened store looks"
        DirectoryStore(store.root).put("z", b"")
        assert [entry.name for entry in temporary.iterdir()] == ["2-alive"]
    assert list(store.keys()) == ["x", "y", "z"]


def test_permission() -> None:
    """As another user, since root may read everything."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        store = DirectoryStore(directory)
        store.put("x", b"secret")
        (Path(directory) / "x").chmod(0o600)
        os.seteuid(NOBODY)
        try:
            with pytest.raises(AccessDeniedError, match=f"^{directory}: x: permission denied$"):
                store.get("x")
            with pytest.raises(AccessDeniedError, match="y: permission denied"):
                store.put("y", b"")
        finally:
            os.seteuid(0)
