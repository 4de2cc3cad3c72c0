"""The state as QEMU gets it: the bytes that the shell command writes."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from imagefs.errors import MountError
from imagefs.restore.incoming import Incoming, incoming_of


def section(name: bytes, number: int = 9, footer: int = 9) -> bytes:
    head = b"\x04" + number.to_bytes(4, "big") + b"\x0bglobalstate" + (0).to_bytes(4, "big") + (1).to_bytes(4, "big")
    state = (len(name) + 1).to_bytes(4, "big") + name.ljust(100, b"\0")
    return head + state + b"\x7e" + footer.to_bytes(4, "big")


def output(incoming: Incoming) -> bytes:
    """As QEMU runs it."""
    assert incoming.value.startswith("exec:")
    return subprocess.run(["/bin/sh", "-c", incoming.value[5:]], capture_output=True, check=True).stdout


def test_paused_guest_goes_on(tmp_path: Path, rng: random.Random) -> None:
    before, after = rng.randbytes(70_000), rng.randbytes(3000)
    path = tmp_path / "sta te's"
    path.write_bytes(before + section(b"paused") + after)
    incoming = incoming_of(path)
    assert incoming.runs
    # QEMU ignores the size, which stays.
    wanted = section(b"running").replace(b"\0\0\0\x08running", b"\0\0\0\x07running")
    assert output(incoming) == before + wanted + after


@pytest.mark.parametrize(
    ("state", "runs"),
    [
        (b"", True),
        (b"globalstate", True),
        (section(b"running"), True),
        (section(b"postmigrate"), False),
        (section(b"io-error"), False),
        # Video memory may hold what the guest wrote there, so that two sections are seen.
        (section(b"paused") + bytes(5000) + section(b"paused"), False),
        (section(b"running") + section(b"paused"), False),
        (section(b"paused", footer=8), True),
        (section(b"paused")[:-5], True),
    ],
)
def test_state_that_is_left_alone(tmp_path: Path, state: bytes, runs: bool) -> None:
    path = tmp_path / "state"
    path.write_bytes(state)
    incoming = incoming_of(path)
    assert incoming.runs == runs
    assert output(incoming) == state


def test_state_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="state: No such file"):
        incoming_of(tmp_path / "state")
