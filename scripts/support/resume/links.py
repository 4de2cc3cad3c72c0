"""What is between the store and the resuming host: simulated links (:mod:`support.shaper`), or nothing but a disk."""

from __future__ import annotations

from dataclasses import dataclass

from support.link import Measurement, measure

_CHECK_SECONDS = 2.0
_CHECK_BYTES = 500_000_000
"""How long a plain transfer lasts that checks a simulated link, and how much it moves at most."""


@dataclass(frozen=True, slots=True)
class Network:
    """``mbit`` megabits of payload per second and a round trip of ``rtt_ms``; None where there is no network."""

    name: str
    mbit: float | None = None
    rtt_ms: float | None = None

    @property
    def label(self) -> str:
        if self.mbit is None:
            return "local disk"
        rate = f"{self.mbit / 1000:g} Gbit/s" if self.mbit >= 1000 else f"{self.mbit:g} Mbit/s"
        return f"{rate}, {self.rtt_ms:g} ms"

    def check(self) -> Measurement | None:
        """What the simulation of this link really does, by a plain transfer over it."""
        if self.mbit is None or self.rtt_ms is None:
            return None
        return measure(self.mbit, self.rtt_ms, int(min(_CHECK_BYTES, self.mbit * 1e6 / 8 * _CHECK_SECONDS)))


LINKS = {
    link.name: link
    for link in (
        Network("10M", 10, 150),
        Network("100M", 100, 40),
        Network("1G", 1000, 10),
        Network("10G", 10_000, 0.2),
        Network("local"),
    )
}
