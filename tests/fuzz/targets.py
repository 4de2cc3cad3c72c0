"""All that is fuzzed, by name."""

from __future__ import annotations

from itertools import chain

from tests.fuzz import images, parsers
from tests.fuzz.target import Target


def _planted(data: bytes) -> None:
    """A bug that no seed shows, behind three comparisons."""
    if len(data) > 3 and data[0] == 0x49 and data[1] == 0x46 and data[2] == 0x53:
        raise IndexError(f"planted, byte {data[3]}")


PLANTED = Target("planted", _planted, [b"IF"])
"""Shows that the fuzzer finds what is there. Only run by its name."""


def all_targets() -> dict[str, Target]:
    return {target.name: target for target in chain(images.targets(), parsers.targets())}
