"""``scripts/bench [NAME ...]``: figures as JSON lines on stdout; progress and a summary on stderr."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from support.bench import resume
from support.bench.figures import Benchmark
from support.commands import CommandFailedError
from support.debian import GuestError
from support.mounts import MountFailedError
from support.resume.redis import WrongAnswerError
from support.vm import VmError

BENCHMARKS = {
    "split": "splitting throughput and bytes stored, beside zstd",
    "formats": "splitting formats of several files or ranges, beside zstd; memory taken",
    "streams": "splitting what QEMU and libvirt write, beside zstd; its memory",
    "mount": "round trips and bytes until memory can be read, for 1 TiB",
    "listing": "listing page files",
    "sweep": "the daemon's memory while 4 GiB are swept",
    "link": "how full the background keeps a link, and what a touch waits for meanwhile",
    "fill": "how fast a whole image arrives over loopback, and how many bytes that takes",
    "fault": "a random fault over loopback, beside nbdkit and nbdfuse",
    "pager": "faults and installing ahead, beside a bare handler and bare ioctls",
    "local": "resuming from the local disk, beside QEMU with the flat file and with the whole stream; its memory",
    "workingset": "a resume with a recorded working set, beside what the link and the host need at least",
    "quickstart": "bytes and seconds until a guest answers over a link, beside download and restore",
    "resume": "a Redis resumed over five links, beside download and restore and other programs' mounts (25 minutes)",
}
DEFAULT = tuple(name for name in BENCHMARKS if name != "resume")
"""Not what takes as long as all others together, and writes the figures that are shown in README."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__, allow_abbrev=False)
    names = "; ".join(f"{name}: {what}" for name, what in BENCHMARKS.items())
    parser.add_argument(
        "names", nargs="*", metavar="NAME", choices=[*BENCHMARKS, []], help=f"{names} (default: all but resume)"
    )
    parser.add_argument("--work", type=Path, default=Path("/var/tmp"), help="where to work (default: %(default)s)")
    resume.add_options(parser)
    args = parser.parse_args()
    try:
        options = resume.options_of(args)
    except ValueError as error:
        parser.error(str(error))
    runs: dict[str, Benchmark] = {"resume": lambda work: resume.run(work, options)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        missed = sum(_run(name, runs.get(name), args.work) for name in args.names or DEFAULT)
    except KeyboardInterrupt:
        print("bench: interrupted; everything is cleaned up", file=sys.stderr)
        return 130
    except (CommandFailedError, GuestError, MountFailedError, VmError, WrongAnswerError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 1 if missed else 0


def _run(name: str, run: Benchmark | None, directory: Path) -> int:
    """Print the figures of a benchmark; returns how many miss their goals."""
    run = run or import_module(f"support.bench.{name}").run
    print(f"bench {name}: {BENCHMARKS[name]}", file=sys.stderr)
    begun = time.monotonic()
    missed = 0
    with tempfile.TemporaryDirectory(prefix="imagefs-bench-", dir=directory) as work:
        for figure in run(Path(work)):
            print(figure.line(), flush=True)
            verdict = "reached" if figure.reached else "MISSED"
            sign = ">=" if figure.better == "higher" else "<="
            print(
                f"  {figure.name}: {figure.value:.4g} {figure.unit}, {figure.ratio:.3f} x {figure.yardstick} "
                f"(goal {sign} {figure.goal}): {verdict}",
                file=sys.stderr,
            )
            missed += not figure.reached
    print(f"  {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return missed


if __name__ == "__main__":
    sys.exit(main())
