"""The pager with real userfaultfds: a VMM in its own process checks every byte (``native/test_vmm.c``), in builds
with sanitizers; a failed check, a wrong byte, a data race or a leak ends the driver with a status.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from support.huge_pages import huge_pages

NATIVE = Path(__file__).resolve().parents[2] / "native"
SOURCES = [NATIVE / "test_pager.c", NATIVE / "test_vmm.c", NATIVE / "pages.c", *sorted(NATIVE.glob("pager*.c"))]
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread"]


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("pager") / "driver"
    flags = [*STRICT, f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *SOURCES, "-o", program], check=True)
    return program


@pytest.mark.parametrize("scenario", ["touches", "events", "failing", "gone", "complete", "forked", "kills"])
def test_driver(driver: Path, scenario: str, rng: random.Random) -> None:
    drive(driver, scenario, rng)


@pytest.mark.parametrize("scenario", ["huge", "huge-kills"])
def test_huge_pages(driver: Path, scenario: str, rng: random.Random) -> None:
    """Half of the memory on hugetlbfs."""
    with huge_pages(8):
        drive(driver, scenario, rng)


def drive(driver: Path, scenario: str, rng: random.Random) -> None:
    seed = str(rng.getrandbits(63))
    run = subprocess.run([driver, seed, scenario], capture_output=True, text=True, timeout=110, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "pager: all true\n", ""), f"seed {seed}"
