"""QEMU's option syntax."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.errors import RestoreError
from imagefs.restore.qemu_options import (
    WITHOUT_VALUE,
    Option,
    join_pieces,
    merged,
    object_properties,
    pairs,
    parse_arguments,
    parse_size,
    size_text,
    split_pieces,
    words_of,
)

# What may stand in an argument: commas and equals signs more often than chance would have it.
TEXT = st.text(alphabet=st.one_of(st.sampled_from(",=-m"), st.characters(exclude_characters="\0")), max_size=12)


@given(st.lists(TEXT.map(lambda text: f"key={text}"), min_size=1, max_size=6))
def test_pieces_survive_joining(pieces: list[str]) -> None:
    """With their keys. An empty piece, or one that begins with a comma, cannot be written in this syntax."""
    assert split_pieces(join_pieces(pieces)) == pieces


@given(TEXT)
def test_any_value_can_be_split(value: str) -> None:
    """An odd run of commas is the only text that does not come back: QEMU reads ``a,,,b`` as ``a,`` and ``b``."""
    pieces = split_pieces(value)
    assert split_pieces(join_pieces(pieces)) == pieces
    assert "".join(pieces).replace(",", "") == value.replace(",", "")


@pytest.mark.parametrize(
    ("value", "pieces"),
    [
        ("", [""]),
        ("pc", ["pc"]),
        ("pc,accel=tcg", ["pc", "accel=tcg"]),
        ("mem-path=/a,,b,share=on", ["mem-path=/a,b", "share=on"]),
        ("a,,,b", ["a,", "b"]),
        ("a,", ["a", ""]),
    ],
)
def test_pieces(value: str, pieces: list[str]) -> None:
    assert split_pieces(value) == pieces


@given(st.lists(st.one_of(st.sampled_from(["-S", "--snapshot", "disk.img", "-m", "-append"]), TEXT), max_size=8))
def test_words_stay_as_they_are(words: list[str]) -> None:
    try:
        options = parse_arguments(words)
    except RestoreError:
        assert words[-1].startswith("-")
    else:
        assert words_of(options) == words


def test_what_belongs_to_an_option_is_no_option() -> None:
    options = parse_arguments(["-append", "-machine q35", "-S", "--M", "pc", "-name", "-m", "disk.img"])
    assert options == [
        Option("append", "-machine q35", ("-append", "-machine q35")),
        Option("S", None, ("-S",)),
        Option("M", "pc", ("--M", "pc")),
        Option("name", "-m", ("-name", "-m")),
        Option(None, "disk.img", ("disk.img",)),
    ]


def test_option_that_lacks_its_value() -> None:
    with pytest.raises(RestoreError, match="-machine, which needs a value"):
        parse_arguments(["-S", "-machine"])


def test_options_that_matter_here_take_values() -> None:
    assert not WITHOUT_VALUE & {
        "m",
        "M",
        "machine",
        "object",
        "smp",
        "numa",
        "incoming",
        "loadvm",
        "mem-path",
        "device",
    }


def test_pairs() -> None:
    assert list(pairs("pc,accel=tcg,usb,nograph=", "type")) == [
        ("type", "pc"),
        ("accel", "tcg"),
        ("usb", "on"),
        ("nograph", ""),
    ]
    assert list(pairs("accel=tcg", "type")) == [("accel", "tcg")]


def test_last_value_counts() -> None:
    options = parse_arguments(["-M", "pc,accel=kvm", "-S", "-machine", "type=q35", "-m", "1G"])
    assert merged(options, ("machine", "M"), "type") == {"type": "q35", "accel": "kvm"}


def test_object_in_either_syntax() -> None:
    wanted = {"qom-type": "memory-backend-ram", "id": "ram", "share": "on"}
    assert object_properties("memory-backend-ram,id=ram,share=on") == wanted
    assert object_properties('{"qom-type": "memory-backend-ram", "id": "ram", "share": "on"}') == wanted
    with pytest.raises(RestoreError, match="not understood as JSON"):
        object_properties('{"qom-type": ')


@pytest.mark.parametrize(
    ("text", "unit", "size"),
    [
        ("512", "m", 512 << 20),
        ("512", "b", 512),
        ("512M", "b", 512 << 20),
        ("512m", "b", 512 << 20),
        ("1G", "m", 1 << 30),
        ("1.5G", "m", 3 << 29),
        ("0.25G", "m", 1 << 28),
        ("262144K", "m", 1 << 28),
        ("268435456B", "m", 1 << 28),
        ("0x10000000", "b", 1 << 28),
        ("0x200M", "b", 512 << 20),
        ("", "m", None),
        ("much", "m", None),
        ("-1", "m", None),
        ("1GB", "m", None),
        ("1e3", "m", None),
    ],
)
def test_sizes(text: str, unit: str, size: int | None) -> None:
    assert parse_size(text, unit) == size


@given(st.integers(min_value=1, max_value=1 << 50))
def test_size_is_written_exactly(size: int) -> None:
    assert parse_size(size_text(size), "m") == size
