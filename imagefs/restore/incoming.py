"""The value of QEMU's ``-incoming``: a shell command that writes the image's device state, ready to run.

A guest that was stopped before it was saved carries that in its state, and QEMU would leave it paused after it has
loaded it. Who restores a guest wants it to go on (or says ``-S``), so the state reaches QEMU with ``running`` in that
place. As in QEMU's migration/global_state.c, section SECTION_FULL, integers big-endian:

| bytes | field       | value                                                    |
|------:|-------------|----------------------------------------------------------|
|     1 | type        | 0x04                                                     |
|     4 | section id  |                                                          |
|    12 | name        | 11, ``globalstate``                                      |
|     4 | instance id | 0                                                        |
|     4 | version     | 1                                                        |
|     4 | size        | of the run state's name with its NUL; QEMU ignores it    |
|   100 | run state   | the name, padded with NUL (since 8.2 only 32 bytes of it)|
|     5 | footer      | 0x7e, section id                                         |
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import NamedTuple

from imagefs.errors import MountError

_SECTION = re.compile(
    rb"\x04(?P<id>.{4})\x0bglobalstate\x00{4}\x00\x00\x00\x01.{4}(?P<run_state>.{100})\x7e(?P=id)", re.DOTALL
)
_RUNNING = b"running\0"


class Incoming(NamedTuple):
    """``value`` is for ``-incoming``; ``runs`` tells whether QEMU starts the guest after it has loaded the state."""

    value: str
    runs: bool


def runnable(state: bytes) -> tuple[bytes, bool]:
    """The state with ``running`` in place of ``paused``, and whether QEMU runs the guest after it has loaded it."""
    start, runs = _run_state_to_change(state)
    if start is None:
        return state, runs
    return state[:start] + _RUNNING + state[start + len(_RUNNING) :], True


def _run_state_to_change(state: bytes) -> tuple[int | None, bool]:
    """Where ``running`` is to be put, and whether QEMU runs the guest if nothing is."""
    # The state holds pages too, of video memory: a guest can write there what looks like a section. Then there are
    # two, and neither is touched.
    sections = list(_SECTION.finditer(state))
    states = {found["run_state"].partition(b"\0")[0] for found in sections}
    if len(sections) != 1 or states != {b"paused"}:
        # Without the section QEMU runs the guest.
        return None, states <= {b"running"}
    return sections[0].start("run_state"), False


def incoming_of(path: Path) -> Incoming:
    """For the state file of a mounted image; MountError where it cannot be read."""
    try:
        state = path.read_bytes()
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error
    name = shlex.quote(str(path))
    start, runs = _run_state_to_change(state)
    if start is None:
        return Incoming(f"exec:cat {name}", runs)
    rest = start + len(_RUNNING) + 1  # tail counts from one
    return Incoming(f"exec:head -c {start} {name} && printf 'running\\000' && tail -c +{rest} {name}", True)
