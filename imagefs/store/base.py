"""What a store is: objects by key, read by range, from many threads at once.

A *key* is a relative path of plain ASCII components, so that it means the same as a file's path, as part of a
URL and in an object store. Nothing that came over the network is joined to a path before :func:`check_key`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Protocol

from imagefs.errors import CorruptObjectError, UsageError

DEFAULT_LIMIT = 64 * 1024 * 1024
"""Bytes that a whole-object get takes into memory at most: twice a full pack. Pulled out of the air."""

MAX_KEY_LENGTH = 1024
"""Characters; what S3 allows. A component has at most 255, what a file name may have."""

OBJECTS = "objects"
"""The directory of a store that holds content-addressed objects; no image can have this name."""

READ_ONLY = "an HTTP server cannot be written to; write into the directory that it serves"

WORKING_SETS = "working-sets"
"""The directory of a store that holds a working set for some of its images; no image can have this name."""

RESERVED = {OBJECTS: "its objects", WORKING_SETS: "working sets"}
"""Names that no image can have, and what the store keeps there."""

_COMPONENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://", re.ASCII)
_CREDENTIALS = re.compile(rf"^({_SCHEME.pattern})[^/?#]*@", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{32,128}", re.ASCII)


class Store(Protocol):
    """Where images live. All methods may be called from several threads at once; none retries.

    Every method raises :class:`~imagefs.errors.StoreError` subclasses only (and
    :class:`~imagefs.errors.NoSpaceError` for writes), and :class:`~imagefs.errors.UsageError` for a key that is
    no key.
    """

    @property
    def origin(self) -> str:
        """A path or a URL for messages and logs; never holds a password."""

    def get(self, key: str, start: int = 0, length: int | None = None, limit: int = DEFAULT_LIMIT) -> bytes:
        """``length`` bytes of the object from byte ``start`` on; from there to its end if ``length`` is None.

        Exact: an object that is too short is a :class:`~imagefs.errors.CorruptObjectError`, as is one of more
        than ``limit`` bytes where ``length`` is None. A length of zero gives ``b""`` without looking.
        """

    def stream(self, key: str, start: int = 0, limit: int = DEFAULT_LIMIT) -> Iterator[bytes]:
        """The object from byte ``start`` to its end, in pieces as they come, none of them empty.

        The request is made with the first ``next``. An object with more than ``limit`` bytes from there on is a
        :class:`~imagefs.errors.CorruptObjectError`. The time that the caller takes between pieces counts for nothing.
        Close the generator to end early.
        """

    def size(self, key: str) -> int:
        """Bytes of the object; :class:`~imagefs.errors.MissingObjectError` if there is none."""

    def has(self, key: str) -> bool:
        """Whether the object exists."""

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Write the object whole, in place of what had its key: atomic, durable on return, idempotent."""

    def delete(self, key: str) -> None:
        """Remove the object; it is no error if there is none."""

    def close(self) -> None:
        """Let go of connections and files; requests under way in other threads may fail."""


def check_key(key: str) -> str:
    """``key`` itself if it is one, else UsageError.

    Components of ``[A-Za-z0-9._-]`` joined by ``/``; none is empty, begins with a dot or holds two in a row, so
    that no key climbs out of a store or names one of its temporary files.
    """
    if not key or len(key) > MAX_KEY_LENGTH or ".." in key:
        raise UsageError(f"{key[:80]!r} is not the key of an object in a store")
    for component in key.split("/"):
        if _COMPONENT.fullmatch(component) is None:
            raise UsageError(f"{key[:80]!r} is not the key of an object in a store")
    return key


def check_span(start: int, length: int | None) -> None:
    """ValueError for a range that no caller can mean."""
    if start < 0 or (length is not None and length < 0):
        raise ValueError(f"a range of {length} bytes from byte {start}")


def check_extent(key: str, origin: str, size: int, start: int, length: int | None, limit: int) -> int:
    """How many bytes ``get(key, start, length, limit)`` returns of an object of ``size`` bytes.

    Raises CorruptObjectError where the object does not hold them, or holds more than ``limit``.
    """
    if start > size or (length is not None and start + length > size):
        wanted = f"{length} bytes" if length is not None else "the bytes"
        raise CorruptObjectError(f"ends at byte {size}, wanted {wanted} from byte {start} on", key=key, origin=origin)
    if length is not None:
        return length
    if size - start > limit:
        raise CorruptObjectError(f"has {size - start} bytes, no more than {limit} expected", key=key, origin=origin)
    return size - start


def object_key(digest_hex: str) -> str:
    """The key of a content-addressed object: ``objects/ab/abcdef…``, so that no directory grows too long."""
    if _DIGEST.fullmatch(digest_hex) is None:
        raise UsageError(f"{digest_hex[:80]!r} is not a digest in lower-case hexadecimal")
    return f"{OBJECTS}/{digest_hex[:2]}/{digest_hex}"


def working_set_key(manifest: bytes) -> str:
    """The key of the working set of the image with this manifest."""
    return f"{WORKING_SETS}/{manifest.hex()}"


def is_url(location: str) -> bool:
    """Whether a store's location is a URL of some scheme rather than a path."""
    return _SCHEME.match(location) is not None


def without_credentials(location: str) -> str:
    """A store's location without ``user:password@``, for messages and logs; a path stays as it is."""
    return _CREDENTIALS.sub(r"\1", location)
