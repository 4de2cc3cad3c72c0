"""JSON as it is stored: written in one canonical form, and read field by field with everything checked.

What is read may come from anywhere: a field that is missing, of another type or out of its range is a
CorruptObjectError that names it. Nothing else is ever raised here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn, TypeGuard

from imagefs.errors import CorruptObjectError

MAX_INTEGER = 2**63 - 1
_HEX = frozenset("0123456789abcdef")


def canonical_json(value: Any) -> bytes:
    """The one form in which a value is digested. ValueError for what JSON or UTF-8 cannot express."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


class Fields:
    """Checked access to the fields of a JSON object; ``what`` names it in messages."""

    def __init__(self, value: Any, what: str, key: str, origin: str) -> None:
        self.what, self.key, self.origin = what, key, origin
        if not isinstance(value, dict):
            raise CorruptObjectError(f"{what}: not a JSON object", key=key, origin=origin)
        self.value: dict[str, Any] = value

    @classmethod
    def parse(cls, data: bytes, what: str, key: str, origin: str) -> Fields:
        """An object out of its text: UTF-8, nothing that canonical JSON cannot express, in any order and spacing."""
        try:
            value = json.loads(data.decode(), parse_constant=_no_number)
            canonical_json(value)
        except (ValueError, RecursionError) as error:
            raise CorruptObjectError(
                f"{what}: this is not JSON: is it an imagefs image?", key=key, origin=origin
            ) from error
        return cls(value, what, key, origin)

    def bad(self, name: str, reason: object) -> CorruptObjectError:
        return CorruptObjectError(f"{self.what}: {name}: {reason}", key=self.key, origin=self.origin)

    def integer(self, name: str, limit: int = MAX_INTEGER) -> int:
        value = self.value.get(name)
        if not is_integer(value):
            raise self.bad(name, "a non-negative integer is missing here")
        if value > limit:
            raise self.bad(name, f"{value} is more than {limit}")
        return value

    def digest(self, name: str) -> bytes:
        value = self.value.get(name)
        if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
            raise self.bad(name, "64 lower-case hex digits are missing here")
        return bytes.fromhex(value)

    def text(self, name: str) -> str:
        value = self.value.get(name)
        if not isinstance(value, str):
            raise self.bad(name, "a string is missing here")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.value.get(name)
        if not isinstance(value, list):
            raise self.bad(name, "a list is missing here")
        return value

    def mapping(self, name: str) -> Fields:
        return Fields(self.value.get(name), f"{self.what}: {name}", self.key, self.origin)

    def mappings(self, name: str) -> Iterator[Fields]:
        """The objects of a list."""
        for number, value in enumerate(self.items(name)):
            yield Fields(value, f"{self.what}: {name}: number {number}", self.key, self.origin)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a JSON value is what the format calls an integer: 0 … 2**63 - 1."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
