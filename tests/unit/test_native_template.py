"""The native template: what a builder emits puts the file together again, and stays small where it can."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import imagefs.image.native as native
from imagefs.image.capture import BytesSource
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.native import BARE, ENTRY_SIZE, LITERAL, PAGES, Entry, NativeTemplate, TemplateBuilder
from imagefs.image.native_reader import NativeReader
from tests.unit.captures import memory_of

PAGE_COUNT = 12
MEMORY = memory_of(PAGE_COUNT, seed=5, zero_share=0.2)
EMPTY = BytesSource(b"")

Step = tuple[str, bytes, int, int, int]
"""``(kind, literal or prefix, page, count, stride)``."""


class Built:
    def __init__(self, steps: list[Step]) -> None:
        self.entries, self.literals, self.expected = bytearray(), bytearray(), bytearray()
        builder = TemplateBuilder(self.entries.extend, self.literals.extend)
        for kind, text, page, count, stride in steps:
            if kind == "literal":
                builder.literal(text)
                self.expected += text
                continue
            for index in range(count):
                counter = (int.from_bytes(text[:8], "big") + index * stride) % 2**64 if stride else 0
                self.expected += (counter.to_bytes(8, "big") + text[8:]) if stride else text
                if kind == "pages":
                    self.expected += MEMORY[(page + index) * PAGE_SIZE : (page + index + 1) * PAGE_SIZE]
            if kind == "pages":
                at = builder.size
                assert builder.pages(page, count, text, stride) == at + len(text)
            else:
                builder.bare(count, text, stride)
            assert builder.size == len(self.expected)
        builder.finish()
        self.size = builder.size

    def reader(self) -> NativeReader:
        template = NativeTemplate(
            self.size, BytesSource(bytes(self.entries)), BytesSource(bytes(self.literals)), EMPTY, EMPTY
        )
        return NativeReader(template, BytesSource(MEMORY))

    def parsed(self) -> list[Entry]:
        return [Entry.unpack(bytes(self.entries), at) for at in range(0, len(self.entries), ENTRY_SIZE)]


def prefixes() -> st.SearchStrategy[bytes]:
    """Counters near each other, so that runs meet what does and what does not go on with them."""
    return st.builds(
        lambda base, step, rest: ((base + step * 8) % 2**64).to_bytes(8, "big") + rest,
        st.sampled_from([0, 4096, 2**64 - 16]),
        st.integers(0, 3),
        st.sampled_from([b"", b"x"]),
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("literal"), st.binary(max_size=6), st.just(0), st.just(1), st.just(0)),
        st.tuples(
            st.sampled_from(["pages", "bare"]),
            st.one_of(prefixes(), prefixes(), st.sampled_from([b"", b"abc"])),
            st.integers(0, PAGE_COUNT - 4),
            st.integers(1, 4),
            st.sampled_from([0, 0, 8, 16]),
        ).filter(lambda step: len(step[1]) >= 8 or (not step[4] and (step[0] == "pages" or step[1] != b""))),
    ),
    max_size=12,
)


@given(STEPS)
@example([("bare", bytes(8), 0, 1, 0), ("bare", bytes(7) + b"\x08", 0, 1, 0), ("bare", bytes(7) + b"\x10", 0, 2, 8)])
def test_put_together_again(steps: list[Step]) -> None:
    built = Built(steps)
    reader = built.reader()
    assert reader.read_at(0, reader.size) == built.expected
    entries = built.parsed()
    assert [entry.native_offset for entry in entries] == [0, *(entry.end for entry in entries[:-1])][: len(entries)]


@given(STEPS, st.data())
def test_any_range(steps: list[Step], data: st.DataObject) -> None:
    built = Built(steps)
    offset = data.draw(st.integers(0, built.size + 1))
    length = data.draw(st.integers(0, 2 * PAGE_SIZE))
    assert built.reader().read_at(offset, length) == built.expected[offset : offset + length]


def test_runs_are_joined() -> None:
    """A page at a time or all at once: the same single entry."""
    singly = Built([("pages", (4096 * page | 0x28).to_bytes(8, "big"), page, 1, 0) for page in range(PAGE_COUNT)])
    at_once = Built([("pages", (0x28).to_bytes(8, "big"), 0, PAGE_COUNT, 4096)])
    assert singly.entries == at_once.entries
    assert singly.parsed() == [Entry(0, 0, 0, PAGE_COUNT, 8, 4096, PAGES)]
    assert Built([("literal", b"ab", 0, 1, 0), ("literal", b"c", 0, 1, 0)]).parsed() == [
        Entry(0, 0, 0, 1, 3, 0, LITERAL)
    ]


@pytest.mark.parametrize(
    "second",
    [
        ("pages", (0x1028).to_bytes(8, "big"), 5, 1, 4096),  # another page
        ("pages", (0x1008).to_bytes(8, "big"), 1, 1, 4096),  # other flags
        ("pages", (0x2028).to_bytes(8, "big"), 1, 1, 4096),  # a page left out
        ("bare", (0x1028).to_bytes(8, "big"), 0, 1, 4096),
        ("pages", (0x1028).to_bytes(8, "big") + b"x", 1, 1, 4096),
    ],
)
def test_what_does_not_go_on_is_not_joined(second: Step) -> None:
    first: Step = ("pages", (0x28).to_bytes(8, "big"), 0, 1, 4096)
    built = Built([first, second])
    assert len(built.parsed()) == 2
    assert built.reader().read_at(0, built.size) == built.expected


def test_limits_of_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts and lengths that a field cannot hold are spread over several entries."""
    monkeypatch.setattr(native, "MAX_COUNT", 3)
    monkeypatch.setattr(native, "MAX_LITERAL", 5)
    steps: list[Step] = [
        ("pages", bytes(8), 0, 10, 8),
        ("bare", bytes(8), 0, 7, 8),
        ("literal", b"0123456789abc", 0, 1, 0),
        ("literal", b"de", 0, 1, 0),
    ]
    built = Built(steps)
    assert [entry.count for entry in built.parsed()] == [3, 3, 3, 1, 3, 3, 1, 1, 1, 1]
    assert built.reader().read_at(0, built.size) == built.expected


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry(0, 0, 0, 1, 4, 0, 3), "bad entry"),
        (Entry(0, 0, 0, 0, 4, 0, LITERAL), "bad entry"),
        (Entry(0, 0, 0, 1, 0, 0, LITERAL), "bad entry"),
        (Entry(0, 0, 0, 5, 0, 0, BARE), "bad entry"),
        (Entry(0, 0, 0, 2, 4, 0, LITERAL), "repeated literal"),
        (Entry(0, 0, 0, 2, 4, 8, PAGES), "stride without a counter"),
    ],
)
def test_entries_that_no_writer_produces(entry: Entry, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Entry.unpack(entry.pack())


@given(
    st.builds(
        Entry,
        *[st.integers(0, 2**64 - 1)] * 3,
        st.integers(1, 2**32 - 1),
        st.integers(8, native.MAX_PREFIX),
        st.integers(0, 2**32 - 1),
        st.sampled_from([PAGES, BARE]),
    )
)
def test_pack_and_unpack(entry: Entry) -> None:
    assert Entry.unpack(b"xx" + entry.pack(), 2) == entry
