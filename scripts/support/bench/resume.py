"""A Redis resumed over links, from ``imagefs restore`` to 10,000 correct GETs, beside what people would use instead.

The work is in :mod:`support.resume`; this is its command line, and its order.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.bench.figures import Figure
from support.nginx import Nginx
from support.resume import site as sites
from support.resume.links import LINKS, Network
from support.resume.measure import Resume, measure
from support.resume.peers import FLAT, PEERS
from support.resume.redis import RECORD, DataSet
from support.resume.result import CACHED, DEMAND, DOWNLOAD, PLAIN, SET, Result
from support.resume.site import Site
from support.resume.ways import Download, Imagefs, Way
from support.vm import QEMU

FIGURES = Path(__file__).resolve().parents[3] / "docs" / "figures"
RECORDING_SEED = "recorded"
"""Of the GET that the recording makes: another record than those that are measured."""

_OURS = (
    Imagefs(CACHED, "imagefs, full local cache", warm=True),
    Imagefs(SET, "imagefs, recorded set", store="recorded"),
    Imagefs(f"{SET}-mmap", "imagefs, recorded set, door mmap", store="recorded", door="mmap"),
    Imagefs(PLAIN, "imagefs, first resume"),
    Imagefs(f"{PLAIN}-mmap", "imagefs, first resume, door mmap", door="mmap"),
    Imagefs(DEMAND, "imagefs, demand only", options="prefetch=none"),
)
WAYS: Mapping[str, Way] = {way.name: way for way in (FLAT, *_OURS, *PEERS, Download(DOWNLOAD))}


@dataclass(frozen=True)
class Options:
    links: Sequence[str]
    ways: Sequence[str]
    records: int
    memory_mib: int
    counts: Sequence[int]
    limit: float
    figures: Path | None
    """Where the result is written."""


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of resume")
    group.add_argument("--links", metavar="LINK,…", help=f"only over these: {', '.join(LINKS)}")
    group.add_argument("--ways", metavar="WAY,…", help=f"only in these ways: {', '.join(WAYS)}")
    group.add_argument("--quick", action="store_true", help="a small guest with a small data set, 1000 GETs at most")
    group.add_argument(
        "--limit", type=float, default=45.0, metavar="SECONDS", help="of each measurement (default: %(default)g)"
    )
    group.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="write resume.json, .md, .png and .svg there (default: docs/figures; nowhere of a part)",
    )


def options_of(args: argparse.Namespace) -> Options:
    """ValueError names what is unknown."""
    whole = not (args.links or args.ways or args.quick)
    return Options(
        links=_chosen(args.links, LINKS, "--links"),
        ways=_chosen(args.ways, WAYS, "--ways"),
        records=20_000 if args.quick else 500_000,
        memory_mib=256 if args.quick else 1024,
        counts=(1, 100, 1000) if args.quick else (1, 100, 10_000),
        limit=args.limit,
        figures=args.figures or (FIGURES if whole else None),
    )


def _chosen(text: str | None, known: Mapping[str, object], option: str) -> list[str]:
    names = text.split(",") if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: {', '.join(unknown)} unknown; known are {', '.join(known)}")
    return [name for name in known if name in names]


def run(work: Path, options: Options) -> Iterator[Figure]:
    """The goals, once everything is measured and written."""
    result = _run(work, options)
    print(result.tables(), file=sys.stderr)
    if options.figures is not None:
        options.figures.mkdir(parents=True, exist_ok=True)
        (options.figures / "resume.json").write_text(json.dumps(result.document(), indent=1) + "\n")
        (options.figures / "resume.md").write_text(result.tables())
        # Late: importing it takes longer than most benchmarks' first figure.
        from support.resume.plot import draw

        draw(result, options.figures)
    yield from result.goals()


def _run(work: Path, options: Options) -> Result:
    root, scratch, cache = work / "site", work / "scratch", work / "cache"
    root.mkdir()
    scratch.mkdir()
    site = sites.prepare(root, DataSet(options.records), options.memory_mib, _step)
    ways = [WAYS[name] for name in options.ways]
    sizes = _make_forms(site, scratch, cache, ways)
    links = [LINKS[name] for name in options.links]
    with _step("checking the simulated links by a plain transfer"):
        checks = {link.name: check for link in links if (check := link.check()) is not None}
    resumes = []
    with Nginx(root, "autoindex on;") as nginx:
        for link in links:
            for way in ways:
                if way.suits(link.mbit is not None):
                    resumes.append(_measure(way, link, nginx, site, work, cache, options))
    return Result(
        conditions=_conditions(site),
        sizes=sizes,
        counts=options.counts,
        limit=options.limit,
        links=links,
        checks=checks,
        ways=ways,
        peers=[peer.name for peer in PEERS],
        resumes=resumes,
    )


def _measure(way: Way, link: Network, nginx: Nginx, site: Site, work: Path, cache: Path, options: Options) -> Resume:
    with tempfile.TemporaryDirectory(prefix="resume-", dir=work) as own:
        resume = measure(way, link, nginx, site, Path(own), cache, options.counts, options.limit)
    reached = ", ".join(f"{each.gets} GETs {each.seconds:.2f} s" for each in resume.milestones)
    rest = f" {resume.gets} GETs within the limit of {resume.limit:g} s" if resume.limit else ""
    print(f"  {link.label}; {way.label}: {reached}{rest}", file=sys.stderr)
    return resume


def _make_forms(site: Site, work: Path, cache: Path, ways: Sequence[Way]) -> dict[str, int]:
    """Make what the ways need, and return the bytes of each form."""
    wanted = {form for way in ways for form in way.forms}
    made: dict[str, int] = {}

    def make(form: str, text: str, how: Callable[[], object]) -> None:
        if form in wanted:
            with _step(text):
                how()

    def record() -> None:
        made["set"] = sites.make_recorded(site, work, RECORDING_SEED)

    make("save", "writing the plain save that is downloaded", lambda: sites.make_save(site, work))
    make("flat", "writing the flat memory file that other programs show", lambda: sites.make_flat(site, work))
    make("casync", "cutting it into chunks for casync", lambda: sites.make_casync(site, work))
    make("cache", "filling a cache with the whole image", lambda: sites.fill_cache(site, work, cache))
    make("recorded", "recording a working set: one resume, one GET", record)
    return {**site.sizes(), **made}


def _conditions(site: Site) -> dict[str, object]:
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return {
        "records": site.data.count,
        "record_bytes": RECORD,
        "guest_memory_mib": site.memory_mib,
        "processors": os.cpu_count(),
        "kernel": platform.release(),
        "qemu": version,
        "guest_runs_under": "TCG",
        "load_average": os.getloadavg()[0],
    }


@contextmanager
def _step(text: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"  {text} ({time.monotonic() - begun:.1f} s)", file=sys.stderr)
