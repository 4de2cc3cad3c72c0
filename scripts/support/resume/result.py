"""What a run has measured: as JSON, as tables in Markdown, and beside the goals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from support.bench.figures import Figure
from support.link import Measurement
from support.resume.links import Network
from support.resume.measure import Resume
from support.resume.ways import Way

FIRST = "first correct GET"
DEMAND, PLAIN, SET, CACHED, DOWNLOAD = "demand", "imagefs", "recorded", "cached", "download"
"""Names of the ways that goals are about."""
GOAL_LINK = "100M"
"""The link of the goals for a recorded set."""


@dataclass(frozen=True)
class Result:
    """One run."""

    conditions: Mapping[str, Any]
    """The guest, its data, this host."""
    sizes: Mapping[str, int]
    """Bytes of what was resumed, in each form; ``set`` is the published working set, ``metadata`` what a mount
    fetches."""
    counts: Sequence[int]
    """Numbers of GETs at which time and bytes were taken."""
    limit: float
    links: Sequence[Network]
    checks: Mapping[str, Measurement]
    """By the link's name: what its simulation really did."""
    ways: Sequence[Way]
    peers: Sequence[str]
    """Names of those ways that are other programs showing a remote file."""
    resumes: Sequence[Resume]

    def document(self) -> dict[str, Any]:
        return {
            "conditions": dict(self.conditions),
            "sizes": dict(self.sizes),
            "limit_seconds": self.limit,
            "links": [
                {**asdict(link), "label": link.label, "simulated": asdict(check) if check else None}
                for link in self.links
                for check in [self.checks.get(link.name)]
            ],
            "ways": [{"name": way.name, "label": way.label} for way in self.ways],
            "resumes": [asdict(resume) for resume in self.resumes],
        }

    def of(self, link: str, way: str) -> Resume | None:
        return next((each for each in self.resumes if (each.link, each.way) == (link, way)), None)

    # ---- tables ----

    def tables(self) -> str:
        """One for each link, and one that checks the links."""
        parts = [table for link in self.links if (table := self._table(link))]
        if self.checks:
            parts.append(self._check_table())
        return "\n\n".join(parts) + "\n"

    def _table(self, link: Network) -> str:
        head, rule = ["way to resume"], ["---"]
        for gets in self.counts:
            head += [f"{_times(gets)}, s", "MB"] if link.mbit else [f"{_times(gets)}, s"]
            head += ["p50, ms", "p99, ms"] if gets > 1 else []
        rule += ["---:"] * (len(head) - 1)
        rows = []
        for way in self.ways:
            if (resume := self.of(link.name, way.name)) is not None:
                rows.append([way.label.replace("|", "\\|"), *self._cells(resume, bool(link.mbit))])
        lines = [f"**{link.label}**", "", *("| " + " | ".join(row) + " |" for row in (head, rule, *rows))]
        return "\n".join(lines) if rows else ""

    def _cells(self, resume: Resume, linked: bool) -> Iterator[str]:
        for gets in self.counts:
            reached = resume.at(gets)
            yield f"{reached.seconds:.2f}" if reached else f"> {resume.limit:.0f}"
            if linked:
                yield f"{reached.bytes_down / 1e6:.1f}" if reached and reached.bytes_down is not None else ""
            if gets > 1:
                yield f"{reached.p50_ms:.1f}" if reached and reached.p50_ms is not None else ""
                yield f"{reached.p99_ms:.1f}" if reached and reached.p99_ms is not None else ""

    def _check_table(self) -> str:
        lines = [
            "**The simulated links, checked by a plain transfer**",
            "",
            "| link | Mbit/s | round trip, ms | first answer of a new connection, ms | of one processor |",
            "|---|---:|---:|---:|---:|",
        ]
        for link in self.links:
            if check := self.checks.get(link.name):
                lines.append(
                    f"| {link.label} | {check.mbit:.1f} | {check.rtt_ms:.2f} | {check.first_answer_ms:.1f} "
                    f"| {100 * check.link_cpu:.0f} % |"
                )
        return "\n".join(lines)

    # ---- goals ----

    def goals(self) -> Iterator[Figure]:
        """Those for which this run has figures."""
        yield from self._recorded_goals()
        for link in self.links:
            what = link.label
            first, demand = self._first(link.name, PLAIN), self._first(link.name, DEMAND)
            if first is None:
                continue
            name = f"{FIRST}, {first[1]}"
            if (peer := self._best_peer(link.name)) is not None:
                yield Figure(name, first[0], "s", peer[1], peer[0], 1 / 2, "lower", what)
            if demand is not None:
                yield Figure(name, first[0], "s", demand[1], demand[0], 1.0, "lower", what)

    def _recorded_goals(self) -> Iterator[Figure]:
        link = next((link for link in self.links if link.name == GOAL_LINK), None)
        resume = self.of(GOAL_LINK, SET)
        if link is None or link.mbit is None or link.rtt_ms is None or resume is None or resume.opened_seconds is None:
            return
        took = self._first(GOAL_LINK, SET)
        assert took is not None
        what, name = link.label, f"{FIRST}, {took[1]}"
        working_set = self.sizes["set"] + self.sizes["metadata"]
        cached = self.of(GOAL_LINK, CACHED)
        if cached is not None and cached.opened_seconds is not None and (floor := cached.at(1)) is not None:
            transfer = working_set * 8 / (link.mbit * 1e6) + 3 * link.rtt_ms / 1e3
            bound = "transfer of the working set, 3 round trips, and a resume from a full cache"
            # Both from `imagefs restore` on, and then both from the mount on.
            for since, mine, theirs in (
                ("restore", resume.opened_seconds, cached.opened_seconds),
                ("mount", 0.0, 0.0),
            ):
                lasted, allowed = took[0] - mine, transfer + floor.seconds - theirs
                yield Figure(f"{name}, from `{since}`", lasted, "s", bound, allowed, 1.25, "lower", what)
        if (download := self._first(GOAL_LINK, DOWNLOAD)) is not None:
            yield Figure(name, took[0], "s", download[1], download[0], 1 / 20, "lower", what)
        if (peer := self._best_peer(GOAL_LINK)) is not None:
            yield Figure(name, took[0], "s", peer[1], peer[0], 1 / 4, "lower", what)
        reached = resume.at(1)
        if reached is not None and reached.bytes_down is not None:
            bound = "the working set and the metadata"
            yield Figure(
                f"bytes before the {name}", reached.bytes_down, "bytes", bound, working_set, 1.15, "lower", what
            )

    def _first(self, link: str, way: str) -> tuple[float, str] | None:
        """Seconds to the first GET, and what they are called; where the limit came first, the limit."""
        resume = self.of(link, way)
        if resume is None:
            return None
        label = next(each.label for each in self.ways if each.name == way)
        reached = resume.at(1)
        return (reached.seconds, label) if reached else (self.limit, f"{label}, which took longer")

    def _best_peer(self, link: str) -> tuple[float, str] | None:
        found = [first for name in self.peers if (first := self._first(link, name)) is not None]
        return min(found) if found else None


def _times(gets: int) -> str:
    return "first GET" if gets == 1 else f"{gets:,} GETs"
