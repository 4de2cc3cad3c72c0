"""``-o`` of mount.imagefs, and what the kernel is told."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import UsageError
from imagefs.mount.options import IGNORED, MountOptions, default_cache, parse_options
from imagefs.mount.serve import fuse_options


def test_defaults() -> None:
    options = parse_options("")
    assert options == MountOptions()
    assert options.timeout is None
    assert not options.others_may_enter
    # What mount(8) passes when nothing was said.
    assert parse_options("rw") == options


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("allow_other", "allow_other", True),
        ("uid=1000", "uid", 1000),
        ("uid=root", "uid", 0),
        ("gid=0", "gid", 0),
        ("cache=/srv/a", "cache", Path("/srv/a")),
        ("nocache", "use_cache", False),
        ("nocache,cache=/srv/a", "use_cache", True),
        ("cache=/srv/a,nocache", "cache", None),
        ("soft", "timeout", 60.0),
        ("soft,timeo=2.5", "timeout", 2.5),
        ("soft,timeo=5,hard", "timeout", None),
        ("timeo=5", "timeout", None),
        ("prefetch=none", "prefetch", "none"),
        ("prefetch=all", "prefetch", "all"),
        ("connections=3", "connections", 3),
        ("readahead=0", "readahead", 0),
        ("log=/var/log/x", "log", Path("/var/log/x")),
        ("noexec", "noexec", True),
        ("uid=5", "others_may_enter", True),
        (",,ro,,", "soft", False),
    ],
)
def test_each(text: str, field: str, value: object) -> None:
    assert getattr(parse_options(text), field) == value


def test_later_options_win_over_earlier_lists() -> None:
    assert parse_options("hard", parse_options("soft,timeo=3,connections=2")) == MountOptions(timeo=3, connections=2)


@pytest.mark.parametrize(
    "word", [*sorted(IGNORED), "x-systemd.automount", "X-mount.mkdir=0700", "comment=mine", "user=x"]
)
def test_ignored(word: str) -> None:
    assert parse_options(word) == MountOptions()


@pytest.mark.parametrize(
    "text",
    [
        *("colour=blue", "frobnicate", "uid", "uid=", "uid=-1", "uid=4294967295", "uid=no such user", "gid=x y"),
        *("timeo=0", "timeo=-1", "timeo=nan", "timeo=inf", "timeo=soon", "prefetch=some", "connections=0"),
        *("connections=65", "readahead=-1", "readahead=99999", "cache", "cache=", "log", "remount", "soft=1", "ro=1"),
        *("allow_other=1", "nocache=x", "NOCACHE"),
    ],
)
def test_wrong_ones_are_named(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options("ro," + text)
    assert text.partition("=")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_options(text)


def test_default_cache() -> None:
    assert default_cache(0, {"XDG_CACHE_HOME": "/x"}) == Path("/var/cache/imagefs")
    assert default_cache(1, {"XDG_CACHE_HOME": "/x", "HOME": "/h"}) == Path("/x/imagefs")
    assert default_cache(1, {"XDG_CACHE_HOME": "x", "HOME": "/h"}) == Path("/h/.cache/imagefs")
    assert default_cache(1, {"HOME": "/h"}) == Path("/h/.cache/imagefs")


def test_what_the_kernel_is_told() -> None:
    told = fuse_options("https://user:secret@host/store/vm1", MountOptions())
    assert told == {"default_permissions", "fsname=https://host/store/vm1", "subtype=imagefs", "nosuid", "nodev"}
    told = fuse_options("/a,b\\c", MountOptions(uid=5, noexec=True))
    assert told >= {"fsname=/a\\,b\\\\c", "allow_other", "noexec"}


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_any_source_is_ascii_for_libfuse(source: str) -> None:
    for option in fuse_options(os.path.abspath(source), MountOptions()):
        option.encode("ascii")
        assert "\n" not in option
