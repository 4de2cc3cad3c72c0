"""The C drivers of native/, compiled with sanitizers: no access out of bounds, nothing undefined, no data race."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread"]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize("part", ["pages", "regions", "chunks"])
def test_driver(part: str, sanitizer: str, tmp_path: Path, rng: random.Random) -> None:
    program = tmp_path / part
    sources = [NATIVE / f"test_{part}.c", NATIVE / f"{part}.c"]
    if part == "chunks":
        # Without a sanitizer, with which its vectors take a minute to compile; its bounds are those of its callers.
        digests = tmp_path / "blake3.o"
        subprocess.run(["gcc", "-std=c11", "-O1", "-c", NATIVE / "blake3.c", "-o", digests], check=True)
        sources += [NATIVE / "pages.c", digests]
    flags = [*STRICT, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *sources, "-o", program, *(["-lzstd"] if part == "chunks" else [])], check=True)
    seed = str(rng.getrandbits(64))
    run = subprocess.run([program, seed], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{part}: all true\n", ""), f"seed {seed}"
