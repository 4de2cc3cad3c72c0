"""What is fuzzed: a function that takes bytes, and valid input to begin with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).resolve().parents[1] / "corpus"


@dataclass(frozen=True)
class Target:
    name: str
    run: Callable[[bytes], None]
    """Returns for whatever input: an error of errors.py is what bad input gets, so it is caught in here. Any other
    exception is a finding, and so is a hang, or more memory than the fuzzer allows."""
    seeds: Sequence[bytes]
