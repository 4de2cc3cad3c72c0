"""Keys of objects, and what of a location may be shown."""

from __future__ import annotations

import re
import string
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import UsageError
from imagefs.store.base import MAX_KEY_LENGTH, check_key, is_url, object_key, without_credentials

first = st.sampled_from(string.ascii_letters + string.digits + "_-")
rest = st.text(string.ascii_letters + string.digits + "._-", max_size=20).filter(lambda text: ".." not in text)
components = st.tuples(first, rest).map("".join).filter(lambda text: ".." not in text)
keys = st.lists(components, min_size=1, max_size=5).map("/".join)


@given(keys)
def test_keys_are_taken(key: str) -> None:
    assert check_key(key) == key


@given(
    st.text(max_size=40) | st.lists(st.sampled_from(["..", ".", "", "a", "a.b", "\n", "ä", "\0", " "])).map("/".join)
)
def test_what_is_taken_stays_below_the_root(text: str) -> None:
    try:
        check_key(text)
    except UsageError:
        return
    path = PurePosixPath("/root") / text
    assert str(path) == f"/root/{text}"
    assert all(part and not part.startswith(".") for part in text.split("/"))
    assert re.fullmatch(r"[A-Za-z0-9._/-]+", text)


NO_KEYS = ["", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/..", ".tmp/x", "a/.b", "a..b", "a\n", "a b", "a%2fb"]
NO_KEYS += ["a?b", "a#b", "a:b", "a\\b", "ä", "٣", "a" * 256, "a/" * (MAX_KEY_LENGTH // 2) + "a"]


@pytest.mark.parametrize("key", NO_KEYS)
def test_other_text_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="is not the key"):
        check_key(key)


def test_object_key() -> None:
    digest = "ab" + "0" * 62
    assert object_key(digest) == f"objects/ab/{digest}"
    for wrong in ("", "ab", "AB" + "0" * 62, "../" + "0" * 61, digest + "\n", "g" * 64):
        with pytest.raises(UsageError, match="digest"):
            object_key(wrong)


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("http://user:pass@host:80/a@b/c", "http://host:80/a@b/c"),
        ("https://user@host/x", "https://host/x"),
        ("HTTP://u:p@w@host/x", "HTTP://host/x"),
        ("http://host/x@y", "http://host/x@y"),
        ("http://u:p@[broken", "http://[broken"),
        ("dir/a:b@c", "dir/a:b@c"),
        ("//a@b/c", "//a@b/c"),
    ],
)
def test_credentials_are_not_shown(location: str, shown: str) -> None:
    assert without_credentials(location) == shown
    assert is_url(location) == (location[:4].lower() == "http")
