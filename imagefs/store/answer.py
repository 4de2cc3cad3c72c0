"""An HTTP answer, taken at its word in nothing.

Status, Content-Range, Content-Length and the number of bytes that really come must agree with what was asked (RFC
9110, sections 14 and 15.3.7; RFC 9112, section 6), and no more than that is read into memory. Which bytes they are,
the digests of the image decide.

How answers are classed:

| answer                                                        | error                                      |
|---------------------------------------------------------------|--------------------------------------------|
| 404, 410                                                      | MissingObjectError                         |
| 401, 403                                                      | AccessDeniedError, an UnavailableError     |
| 416; object too short or too long; Content-Range not ours     | CorruptObjectError                         |
| 200 to a Range of part of an object (Range ignored)           | CorruptObjectError                         |
| body longer or shorter than announced, encoded though refused | CorruptObjectError                         |
| 408, 429, 5xx, any other status                               | UnavailableError                           |

A server that ignores Range is *corrupt* and not *unavailable*, because a hard mount waits for ever for what is
unavailable, and this server will not learn; corrupt answers are retried a few times only. Its body is not read:
taking in a whole pack for each chunk would look like a slow link and be a broken one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import requests

from imagefs.errors import AccessDeniedError, CorruptObjectError, MissingObjectError, UnavailableError
from imagefs.store.base import check_extent

_PIECE = 1024 * 1024
"""Bytes read at a time; chunks are smaller, so that their bytes are not copied to be joined."""

_DRAIN = 16 * 1024
"""Bytes of an error page that are read to keep its connection; a longer page costs a new connection."""

_MISSING = frozenset({404, 410})
_DENIED = frozenset({401, 403})

_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-(\d{1,19})|\*)/(\d{1,19}|\*)", re.ASCII)
_LENGTH = re.compile(r"\d{1,19}", re.ASCII)


class Answer:
    """The answer to one request for the object ``key``; its body is read on demand. Close it."""

    def __init__(self, response: requests.Response, *, key: str, origin: str) -> None:
        self._response = response
        self._key = key
        self._origin = origin

    @property
    def status(self) -> int:
        return self._response.status_code

    def header(self, name: str) -> str | None:
        """A header's value without the blanks around it; None where there is none."""
        value: str | None = self._response.headers.get(name)
        return None if value is None else value.strip()

    def close(self) -> None:
        """The connection can be used again if the body was read to its end; it is closed otherwise."""
        self._response.close()

    def check_status(self, ranged: bool) -> None:
        """Raise what the status means, unless it may bring bytes. 416 passes if ``ranged``: see range_length."""
        if self.status in (200, 206):
            encoding = (self.header("Content-Encoding") or "identity").lower()
            if encoding != "identity":
                raise self._corrupt(f"the server encoded the answer as {encoding[:20]!r} although told not to")
            return
        if self.status == 416 and ranged:
            return
        self.drain()
        if self.status in _MISSING:
            raise MissingObjectError(f"no such object (HTTP {self.status})", key=self._key, origin=self._origin)
        if self.status in _DENIED:
            reason = f"access denied (HTTP {self.status}): check the server's permissions and the URL's credentials"
            raise AccessDeniedError(reason, key=self._key, origin=self._origin)
        raise UnavailableError(f"the server answered HTTP {self.status}", key=self._key, origin=self._origin)

    def content_length(self) -> int | None:
        """Bytes as announced; None if the server does not say."""
        text = self.header("Content-Length")
        if text is None:
            return None
        if _LENGTH.fullmatch(text) is None:
            raise self._corrupt(f"Content-Length is no number: {text[:40]!r}")
        return int(text)

    def whole_length(self, limit: int) -> int | None:
        """Bytes of the body when no range was asked for; None if it comes in HTTP's chunks and does not say."""
        if self.status != 200:
            raise self._corrupt(f"the server answered HTTP {self.status} though no range was asked for")
        length = self.content_length()
        if length is not None:
            return check_extent(self._key, self._origin, length, 0, None, limit)
        if (self.header("Transfer-Encoding") or "").lower() != "chunked":
            # The body would end with the connection, however early that closes.
            raise self._corrupt("the server does not say how long the object is")
        return None

    def range_length(self, start: int, length: int | None, limit: int) -> int:
        """Bytes of the body when a range was asked for, after checking that it is this range."""
        announced = self.content_length()
        if self.status == 200:
            if start == 0 and length is not None and announced is not None and announced <= length:
                # The range is the whole object, or wanted to be more than that.
                return check_extent(self._key, self._origin, announced, start, length, limit)
            raise self._corrupt("the server ignores Range: it sends the whole object for a part of it")
        said = self.header("Content-Range") or ""
        match = _CONTENT_RANGE.fullmatch(said)
        total = int(match[3]) if match is not None and match[3] != "*" else None
        if self.status == 416:
            return self._refused_range(total, start, length, limit)
        if match is None or match[1] is None:
            raise self._corrupt(f"the answer to a range has no valid Content-Range: {said[:60]!r}")
        if total is not None:
            count = check_extent(self._key, self._origin, total, start, length, limit)
        elif length is not None:
            count = length
        else:
            raise self._corrupt("the server does not say how long the object is")
        wanted = (start, start + count - 1)
        if (int(match[1]), int(match[2])) != wanted:
            raise self._corrupt(f"the server sent the range {match[1]}-{match[2]} instead of {wanted[0]}-{wanted[1]}")
        if announced is not None and announced != count:
            raise self._corrupt(f"Content-Length is {announced} for a range of {count} bytes")
        return count

    def read(self, count: int | None, limit: int) -> bytes:
        """The body: ``count`` bytes, or up to ``limit`` if None."""
        pieces = list(self.pieces(count, limit, _PIECE))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self, count: int | None, limit: int, size: int) -> Iterator[bytes]:
        """The body in pieces of ``size`` bytes. Asks for one byte more than there may be, to see a body that is too
        long."""
        bound = (limit if count is None else count) + 1
        got = 0
        while got < bound:
            piece = self._response.raw.read(min(bound - got, size), decode_content=False)
            if not piece:
                break
            got += len(piece)
            if got == bound:
                raise self._corrupt(f"the server sent more than {bound - 1} bytes")
            yield piece
        if count is not None and got < count:
            raise self._corrupt(f"the server sent {got} of {count} bytes")

    def drain(self) -> None:
        """Read a short body that nobody wants, so that its connection can be used again."""
        if self._response.request.method == "HEAD":
            self._response.raw.read(1)  # nothing comes, but http.client wants to be asked
            return
        length = self.header("Content-Length")
        if length is not None and _LENGTH.fullmatch(length) is not None and int(length) <= _DRAIN:
            self._response.raw.read(_DRAIN, decode_content=False)

    def _refused_range(self, total: int | None, start: int, length: int | None, limit: int) -> int:
        """416 is right for the empty rest of an object from its end on; else the object is not as it should be."""
        self.drain()
        if total is None:
            raise self._corrupt(f"the object does not hold the range from byte {start} on (HTTP 416)")
        if check_extent(self._key, self._origin, total, start, length, limit):
            raise self._corrupt("the server refuses a range that it says to have (HTTP 416)")
        return 0

    def _corrupt(self, reason: str) -> CorruptObjectError:
        return CorruptObjectError(reason, key=self._key, origin=self._origin)
