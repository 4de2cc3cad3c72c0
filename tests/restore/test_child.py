"""The VMM that a restore starts: what it is given, and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from imagefs.errors import RestoreError
from imagefs.restore.child import PASSED_ON, started

PROGRAM = """
import os, signal, sys
for number in map(int, sys.argv[1:]):
    os.write(number, os.environ["WORD"].encode())
masked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
sys.exit(3 if not masked else 4)
"""


def test_descriptors_are_passed() -> None:
    """Those that are asked for, and those that whoever called us left open for it; no others."""
    asked, left, ours = os.pipe(), os.pipe(), os.pipe()
    try:
        os.set_inheritable(left[1], True)
        command = [sys.executable, "-c", PROGRAM, str(asked[1]), str(left[1])]
        with started(sys.executable, command, pass_fds=[asked[1]], environment={"WORD": "word"}) as vmm:
            assert vmm.wait() == 3
            assert vmm.wait() == 3
        assert (os.read(asked[0], 10), os.read(left[0], 10)) == (b"word", b"word")
        assert not os.get_inheritable(asked[1])
        with started(sys.executable, [*command[:3], str(ours[1])], environment={"WORD": "word"}) as vmm:
            assert vmm.wait() == 1
    finally:
        for fd in (*asked, *left, *ours):
            os.close(fd)


@pytest.mark.parametrize("number", PASSED_ON)
def test_signals_are_passed_on(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with started("/bin/sleep", ["sleep", "60"]) as vmm:
        signal.raise_signal(number)
        assert vmm.wait() == -number
    assert signal.getsignal(number) == before


def test_program_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match="No such file"), started(str(tmp_path / "none"), ["none"]):
        pass
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
