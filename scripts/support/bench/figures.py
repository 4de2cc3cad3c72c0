"""One measured figure, as a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, what it was compared to in the same run, and whether it reaches its goal."""

    name: str
    value: float
    unit: str
    yardstick: str
    """What ``yardstick_value`` is: another program's figure for the same work, or a fixed bound."""
    yardstick_value: float
    goal: float
    """What the ratio of value to yardstick must at least, or at most, be."""
    better: Literal["higher", "lower"]
    conditions: str = ""

    @property
    def ratio(self) -> float:
        return self.value / self.yardstick_value if self.yardstick_value else float("inf")

    @property
    def reached(self) -> bool:
        return self.ratio >= self.goal if self.better == "higher" else self.ratio <= self.goal

    def line(self) -> str:
        return json.dumps({**asdict(self), "ratio": round(self.ratio, 4), "reached": self.reached})


Benchmark = Callable[[Path], Iterator[Figure]]
"""Takes a directory to work in, which is removed afterwards."""
