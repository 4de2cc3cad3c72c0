"""Signals that end a command, as exceptions: what was begun is undone on the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class EndedBySignal(SystemExit):
    """The exit status is what a shell reports of a process that the signal killed."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(self.status)
        self.name = signal.Signals(number).name


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """SIGTERM and SIGHUP, like SIGINT, unwind the stack. One that is ignored stays ignored (nohup)."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise EndedBySignal(number)

    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, handler in former.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, unwind)
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
