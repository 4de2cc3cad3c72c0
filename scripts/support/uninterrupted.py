"""What must not be torn apart is not interrupted: Ctrl-C, and SIGTERM where it is handled, wait until it is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Usable as a decorator, too. Without it a Ctrl-C in the middle of a ``close`` leaves the rest of it undone.

    Signals are put off by handlers, not blocked: processes that are started inside would inherit the blocking.
    """
    # Python handles signals in its main thread only: elsewhere nothing is interrupted.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {}

    def put_off(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, put_off)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in dict.fromkeys(came):
            signal.raise_signal(again)
