"""The preload shim as it was installed, and with sanitizers in it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from imagefs.restore.shim import preload_path

SOURCES = [
    Path(__file__).resolve().parents[2] / "native" / f"{part}.c"
    for part in ("preload", "preload_pager", "regions", "userfault")
]
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread", "-fvisibility=hidden"]


@pytest.fixture(scope="session", params=["installed", "address,undefined", "thread"])
def shim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that loads it. What a sanitizer finds ends the process, or halts it: to report a race it may map
    memory, through the shim."""
    if request.param == "installed":
        return {"LD_PRELOAD": str(preload_path())}
    library = tmp_path_factory.mktemp("shim") / "preload.so"
    flags = [*STRICT, "-fPIC", "-shared", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *flags, *SOURCES, "-o", library], check=True)
    # First of all that is loaded, or it refuses to work.
    runtime = f"lib{'asan' if request.param.startswith('address') else 'tsan'}.so"
    found = subprocess.run(["gcc", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True).stdout
    # Python itself ends without freeing all.
    return {
        "LD_PRELOAD": f"{found.strip()} {library}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
