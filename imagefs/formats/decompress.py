"""Compressed streams as readers of what is in them: one pass, and never more in memory than a window.

gzip, bzip2, xz and zstd may consist of several members end to end, as their programs allow. For lzop's container there
is no library, so that is the program's work.
"""

from __future__ import annotations

import bz2
import lzma
import os
import select
import subprocess
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import zstandard

from imagefs.errors import UnsupportedInputError, UsageError

ReadInto = Callable[[memoryview], int]
"""Fills the beginning of a buffer; the number of bytes, 0 at the end."""

_PIECE_SIZE = 256 << 10
_OUTPUT_SIZE = 1 << 20
_XZ_MEMORY = 96 << 20
"""Bytes; ``xz -9`` needs 65 MiB."""
_ZSTD_WINDOW = 128 << 20
"""Bytes, as many as the program takes unasked; ``zstd -19`` has 8 MiB. Half of what splitting may take, so it is freed
before anything is written."""
_ZSTD_PIECE = 2 << 10

KINDS = ("gzip", "bzip2", "xz", "lzop", "zstd")


class Decompressed(ABC):
    """What a compressed stream holds.

    ``read_into`` of the compressed stream is asked for no more than is needed; ``position`` is where it is at. Raises
    UnsupportedInputError where it is damaged or ends too early.
    """

    def __init__(self, kind: str, source: ReadInto, position: Callable[[], int]) -> None:
        self._kind = kind
        self._source = source
        self._position = position

    @abstractmethod
    def read_into(self, buffer: memoryview) -> int:
        """Fills the beginning of ``buffer``; the number of bytes, 0 at the end of the stream."""

    def close(self) -> None:  # noqa: B027 - most have nothing to do
        """Nothing is read any more."""

    def _damaged(self, why: object) -> UnsupportedInputError:
        return UnsupportedInputError(
            f"not a whole {self._kind} stream ({why})", field="compressed stream", offset=self._position()
        )


def decompressed(kind: str, source: ReadInto, position: Callable[[], int]) -> Decompressed:
    """``kind`` is one of KINDS. To be closed."""
    if kind == "lzop":
        return _Lzop(kind, source, position)
    return _Members(kind, source, position)


class _Decompressor(Protocol):
    """As the standard library's for bzip2 and xz."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


class _Gzip:
    """zlib's decompressor for gzip, in that form."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inflate.eof

    @property
    def needs_input(self) -> bool:
        return not self._inflate.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inflate.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inflate.decompress(self._inflate.unconsumed_tail + data, max_length)


class _Zstd:
    """zstandard's decompressor, in that form. It knows no ``max_length``, so it gets little at a time: a block of a
    few bytes may become 128 KiB."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        self._data = b""
        self._fed = 0  # bytes of it
        self._out = b""

    @property
    def eof(self) -> bool:
        return self._frame.eof and not self._out

    @property
    def needs_input(self) -> bool:
        return self._fed == len(self._data) and not self._out

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + self._data[self._fed :]

    def decompress(self, data: bytes, max_length: int) -> bytes:
        if data:
            self._data, self._fed = self._data[self._fed :] + data, 0
        while not self._out and self._fed < len(self._data) and not self._frame.eof:
            piece = self._data[self._fed : self._fed + _ZSTD_PIECE]
            self._fed += len(piece)
            self._out = self._frame.decompress(piece)
        out, self._out = self._out[:max_length], self._out[max_length:]
        return out


def _xz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_DECOMPRESSORS: dict[str, Callable[[], _Decompressor]] = {
    "gzip": _Gzip,
    "bzip2": bz2.BZ2Decompressor,
    "xz": _xz,
    "zstd": _Zstd,
}


class _Members(Decompressed):
    def __init__(self, kind: str, source: ReadInto, position: Callable[[], int]) -> None:
        super().__init__(kind, source, position)
        self._member = _DECOMPRESSORS[kind]()
        self._piece = memoryview(bytearray(_PIECE_SIZE))

    def read_into(self, buffer: memoryview) -> int:
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data or self._more()
                if not data:
                    return 0
                self._member = _DECOMPRESSORS[self._kind]()
            elif self._member.needs_input:
                data = self._more()
                if not data:
                    raise self._damaged("it ends too early")
            try:
                out = self._member.decompress(data, min(len(buffer), _OUTPUT_SIZE))
            except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError, EOFError) as error:
                raise self._damaged(error) from error
            if out:
                buffer[: len(out)] = out
                return len(out)

    def close(self) -> None:
        """Free its window."""
        self._member = _DECOMPRESSORS[self._kind]()

    def _more(self) -> bytes:
        return bytes(self._piece[: self._source(self._piece)])


class _Lzop(Decompressed):
    """The program, fed and drained in turn by whoever reads."""

    def __init__(self, kind: str, source: ReadInto, position: Callable[[], int]) -> None:
        super().__init__(kind, source, position)
        self._piece = memoryview(bytearray(_PIECE_SIZE))
        self._rest = self._piece[:0]
        try:
            self._process = subprocess.Popen(
                ["lzop", "-dc"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise UsageError(f"lzop: {error.strerror}: the program unpacks this format, install it") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._into, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._into.fileno(), False)

    def read_into(self, buffer: memoryview) -> int:
        while True:
            feeding = [] if self._into.closed else [self._into]
            readable, writable, _ = select.select([self._out], feeding, [])
            if readable:
                data = os.read(self._out.fileno(), min(len(buffer), _OUTPUT_SIZE))
                buffer[: len(data)] = data
                if not data:
                    self._check_end()
                return len(data)
            if writable:
                self._feed()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._into, self._out):
            pipe.close()

    def _feed(self) -> None:
        if not self._rest:
            self._rest = self._piece[: self._source(self._piece)]
        try:
            if not self._rest:
                self._into.close()
                return
            self._rest = self._rest[os.write(self._into.fileno(), self._rest) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._into.close()

    def _check_end(self) -> None:
        status = self._process.wait()
        if status:
            raise self._damaged(f"lzop ended with status {status}")
        # Of what is behind the end lzop need not have asked for all.
        if self._rest or self._source(self._piece):
            raise self._damaged("something follows its end")
