"""Every error that imagefs raises on purpose, under one root.

An error carries *what* and *where* (object key, chunk, page, file offset, field) in its message, so that
the one line shown to a user is enough to act on. ``errno`` values exist only in :mod:`imagefs.mount`, exit
statuses only in :mod:`imagefs.cli`.
"""

from __future__ import annotations


class ImagefsError(Exception):
    """Root of all errors that are not programming mistakes; ``str()`` is one line for the user."""


class UsageError(ImagefsError):
    """The caller asked for something that makes no sense (an unknown option, a name that is no name)."""


class UnsupportedInputError(ImagefsError):
    """A source file is truncated, damaged or of a kind that is not understood.

    ``offset`` is the byte offset in the source at which ``field`` was read, or None where no single place is
    to blame.
    """

    def __init__(self, reason: str, *, field: str | None = None, offset: int | None = None) -> None:
        self.reason = reason
        self.field = field
        self.offset = offset
        where = "" if offset is None else f" at offset {offset:#x}"
        what = "" if field is None else f"{field}: "
        super().__init__(f"{what}{reason}{where}")


class StoreError(ImagefsError):
    """Root of what can go wrong with an object of a store; ``key`` and ``origin`` say which and where."""

    def __init__(self, reason: str, *, key: str, origin: str) -> None:
        self.reason = reason
        self.key = key
        self.origin = origin
        super().__init__(f"{origin}: {key}: {reason}")


class MissingObjectError(StoreError):
    """The store answered, and it does not have the object."""


class CorruptObjectError(StoreError):
    """Bytes came, but not the right ones: digest, length, framing or format is wrong."""


class UnavailableError(StoreError):
    """The store did not answer, or not in time, or with an error of its own; later it may."""


class AccessDeniedError(UnavailableError):
    """The store refuses to show the object: HTTP 401 or 403, or a file's permissions.

    It is not *missing* (the store did not say so, and treating it as missing would fail a running guest for a
    slip of an administrator), but nobody should wait for it silently: the same request fails until somebody
    changes a permission or a credential. A command that only starts reports it at once; a ``hard`` mount, which
    waits for anything that is unavailable, goes on by itself when access is restored.
    """


class ReadOnlyStoreError(StoreError):
    """The store cannot be written to (a plain HTTP server)."""


class NoSpaceError(ImagefsError):
    """The local disk is full."""


class TimedOutError(ImagefsError):
    """A ``soft`` mount waited for a page as long as it was told to."""


class MountError(ImagefsError):
    """The filesystem could not be mounted, or what is mounted there is not an imagefs."""


class NotMappedError(ImagefsError):
    """No memory is at an address of the guest: its page tables end before, or it has no RAM there."""


class RestoreError(ImagefsError):
    """The VMM's command line does not fit the image, or the VMM refused."""


def is_worth_retrying(error: BaseException) -> bool:
    """Whether the same request may succeed later without anyone changing the image.

    Corrupt bytes are included: a proxy or a torn transfer may be to blame, so they are fetched anew a bounded
    number of times. A missing object is not: the store answered.
    """
    return isinstance(error, UnavailableError | CorruptObjectError)
