"""``scripts/fuzz [TARGET …]``: a line for each target; what was found, with how to see it again, and exit status 1."""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.targets import PLANTED, all_targets

FOUND = Path("build/fuzz")
"""Where inputs that showed something are kept."""
AT_ONCE = 2
SECONDS_FOR_ONE = 25
"""Longer is a hang. An input takes some milliseconds, but the machine may be busy."""
MEMORY_MIB = 400
"""Of the interpreter and the instrumentation about 100, of splitting at most 200."""
_END = 40


@dataclass(frozen=True)
class Outcome:
    name: str
    seconds: float
    output: str
    status: int
    artifact: Path | None

    @property
    def text(self) -> str:
        runs = re.search(r"number_of_executed_units: *(\d+)", self.output)
        coverage = re.findall(r"cov: (\d+)", self.output)
        line = f"fuzz: {self.name}: {runs[1] if runs else '?'} inputs in {self.seconds:.0f} s"
        line += f", {coverage[-1]} edges" if coverage else ""
        if not self.status:
            return line
        end = "\n".join(f"    {line}" for line in self.output.splitlines()[-_END:])
        again = f"\n    again: scripts/fuzz --input {self.artifact} {self.name}" if self.artifact else ""
        return f"{end}\n{line}: FOUND SOMETHING{again}"


def fuzz(name: str, seed: int, seconds: float, given: Path | None) -> Outcome:
    """One target for so many seconds, or with the input that is given."""
    FOUND.mkdir(parents=True, exist_ok=True)
    prefix = FOUND / f"{name}-"
    before = set(FOUND.glob(f"{name}-*"))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="imagefs-fuzz-", dir="/dev/shm") as work:
        seeds, scratch = Path(work) / "seeds", Path(work) / "scratch"
        seeds.mkdir()
        scratch.mkdir()
        arguments = [f"-timeout={SECONDS_FOR_ONE}", f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={prefix}"]
        if given is None:
            arguments += [f"-seed={seed}", "-print_final_stats=1", str(seeds)]
        else:
            arguments.append(str(given))
        done = subprocess.run(
            [sys.executable, "-m", "tests.fuzz.child", name, str(seeds), str(begun + seconds), *arguments],
            env={**os.environ, "TMPDIR": str(scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    new = sorted(set(FOUND.glob(f"{name}-*")) - before)
    return Outcome(name, time.monotonic() - begun, done.stdout, done.returncode, new[0] if new else given)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__, allow_abbrev=False)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all; see --list")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--seconds", type=float, default=120, help="for all of them together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(31), help="of the fuzzer")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run one target on this file alone")
    args = parser.parse_args()
    known = list(all_targets())
    if args.list:
        print("\n".join(known))
        return 0
    names = args.targets or known
    if unknown := set(names) - {*known, PLANTED.name}:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; see --list")
    if args.input and len(names) != 1:
        parser.error("--input goes with one target")
    each = max(2.0, args.seconds * min(AT_ONCE, len(names)) / len(names))
    print(f"fuzz: {len(names)} targets for {each:.0f} s each, {AT_ONCE} at once; --seed {args.seed}", flush=True)
    found = 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(lambda name: fuzz(name, args.seed, each, args.input), names):
            print(outcome.text, flush=True)
            found += bool(outcome.status)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
