"""STORE/NAME taken apart, for paths and URLs alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagefs.errors import ReadOnlyStoreError, UsageError
from imagefs.store.directory import DirectoryStore
from imagefs.store.http import HttpStore
from imagefs.store.location import Location, open_store, parse_location


@pytest.mark.parametrize(
    ("text", "store", "name"),
    [
        ("store/vm1", "store", "vm1"),
        ("vm1", ".", "vm1"),
        ("./vm1", ".", "vm1"),
        ("/vm1", "/", "vm1"),
        ("/srv/images/vm1/", "/srv/images", "vm1"),
        ("../a//vm-1.old", "../a", "vm-1.old"),
        ("objects/vm1", "objects", "vm1"),
        ("dir with blanks/ä/vm1", "dir with blanks/ä", "vm1"),
        ("http://host/vm1", "http://host", "vm1"),
        ("http://127.0.0.1:8080/vm1", "http://127.0.0.1:8080", "vm1"),
        ("https://host/store//vm1//", "https://host/store", "vm1"),
        ("http://[::1]:8080/a/vm1", "http://[::1]:8080/a", "vm1"),
        ("https://me:secret@host/store/vm1", "https://me:secret@host/store", "vm1"),
    ],
)
def test_parts(text: str, store: str, name: str) -> None:
    assert parse_location(text) == Location(store, name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no image named"),
        ("/", "no image named"),
        ("///", "no image named"),
        (".", "cannot be an image's name"),
        ("store/..", "cannot be an image's name"),
        ("store/.hidden", "cannot be an image's name"),
        ("store/my vm", "cannot be an image's name"),
        ("store/objects", "keeps its objects"),
        ("objects/", "keeps its objects"),
        ("http://host", "no image named; use http://host/NAME"),
        ("http://host/", "no image named; use http://host/NAME"),
        ("http://", "has no host"),
        ("http:///vm1", "has no host"),
        ("http://host:99999/vm1", "not a URL"),
        ("http://[::1/vm1", "not a URL"),
        ("http://host/objects", "keeps its objects"),
        ("http://host/a%20b", "cannot be an image's name"),
        ("http://host/vm1?token=1", "no query"),
        ("http://host/vm1?", "no query"),
        ("http://host/vm1#x", "no query"),
        ("ftp://host/vm1", "http or https URL, not ftp://"),
        ("file:///store/vm1", "http or https URL, not file://"),
    ],
)
def test_complaints(text: str, complaint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_passwords_are_shown_nowhere() -> None:
    location = parse_location("https://me:secret@host/store/vm1")
    assert str(location) == "https://host/store/vm1"
    for text in ("https://me:secret@host/store/vm1?x", "https://me:secret@host/", "https://me:secret@host/my vm"):
        with pytest.raises(UsageError) as caught:
            parse_location(text)
        assert "secret" not in str(caught.value)
    store = open_store(location)
    assert store.origin == "https://host/store"
    assert "secret" not in str(location) + repr(location) + repr(store)
    store.close()


def test_open(tmp_path: Path) -> None:
    location = parse_location(f"{tmp_path}/store/vm1")
    with pytest.raises(UsageError, match="no such directory"):
        open_store(location)
    store = open_store(location, write=True)
    assert isinstance(store, DirectoryStore)
    assert (tmp_path / "store").is_dir()
    assert open_store(str(tmp_path / "store")).origin == store.origin
    http = open_store("http://host/store")
    assert isinstance(http, HttpStore)
    http.close()
    with pytest.raises(ReadOnlyStoreError, match="http://host/store: vm1: an HTTP server cannot be written to"):
        open_store(parse_location("http://u:p@host/store/vm1"), write=True)
