"""Errors into errno values and log lines. The only place that decides what a failed system call answers."""

from __future__ import annotations

import errno
import logging

from cachetools import TTLCache

from imagefs.errors import ImagefsError, UsageError

log = logging.getLogger(__name__)

REPEAT_AFTER = 60.0
"""Seconds in which the same line is logged once: a guest that reads a damaged page does so again and again."""
REMEMBERED = 256


class Failures:
    """Decides what the caller gets, and logs why."""

    def __init__(self) -> None:
        self._said: TTLCache[str, None] = TTLCache(REMEMBERED, REPEAT_AFTER)

    def errno_of(self, error: Exception, what: str) -> int:
        """What the caller of a system call gets for ``error``; ``what`` says what was asked for, in the log.

        EIO for everything that is about pages, also when a soft mount's time is up, as design.md promises. EINVAL is
        for text written into a control file.
        """
        if not isinstance(error, ImagefsError):
            log.error("%s: internal error: %s: %s", what, type(error).__name__, error, exc_info=error)
            return errno.EIO
        # Key and origin are in the message, as for every ImagefsError.
        line = f"{what}: {error}"
        if line not in self._said:
            self._said[line] = None
            log.warning("%s", line)
        return errno.EINVAL if isinstance(error, UsageError) else errno.EIO
