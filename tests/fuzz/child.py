"""One target under libFuzzer: ``python -m tests.fuzz.child TARGET SEEDS END LIBFUZZER-ARGUMENTS…``.

Writes the target's seeds into the directory SEEDS, which is the corpus. END is when to end, in seconds of the monotonic
clock: the start takes some seconds of a target's time, and on a busy machine more.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import atheris

# What is instrumented tells the fuzzer whether an input got any further than those before it.
with atheris.instrument_imports(include=["imagefs", "tests.fuzz"]):
    from tests.fuzz.targets import PLANTED, all_targets


def main() -> None:
    name, seeds, end, *arguments = sys.argv[1:]
    logging.getLogger("imagefs").setLevel(logging.CRITICAL)
    target = {**all_targets(), PLANTED.name: PLANTED}[name]
    for number, seed in enumerate(target.seeds):
        Path(seeds, f"seed-{number}").write_bytes(seed)
    seconds = max(1, round(float(end) - time.monotonic()))
    atheris.Setup([f"fuzz {name}", f"-max_total_time={seconds}", *arguments], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
