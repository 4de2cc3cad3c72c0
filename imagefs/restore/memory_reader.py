"""Reads of a mount's ``memory`` that end with the right bytes or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from typing import Any

from imagefs.restore.mountpoint import METADATA, MountedImage

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between attempts, doubling. Pulled out of the air."""


def identity(image: MountedImage) -> str:
    """Of the image that is mounted; OSError where it cannot be read. No two suspended guests have the same."""
    digest = hashlib.sha256((image.mountpoint / METADATA).read_bytes())
    digest.update(image.state.read_bytes())
    return digest.hexdigest()


class MemoryReader:
    """For any number of threads. A read blocks until the pages have arrived.

    What fails is tried again, for ever: a server may come back, and an image may be mounted again at the same place
    after its daemon has died. That it is the same image is seen to.
    """

    def __init__(self, image: MountedImage) -> None:
        """OSError where nothing can be read."""
        self._image = image
        self._identity = identity(image)
        self._lock = threading.Lock()
        self._file, self._device = self._open()
        self._in_trouble = False

    def try_read(self, offset: int, length: int) -> bytes:
        """OSError where it fails or is short."""
        with self._lock:
            file = self._file
        data = os.pread(file, length, offset)
        if len(data) != length:
            raise OSError(f"{len(data)} bytes instead of {length}")
        return data

    def read(self, offset: int, length: int) -> bytes:
        """Does not return before it has the bytes."""
        pause = FIRST_PAUSE
        while True:
            try:
                data = self.try_read(offset, length)
            except OSError as error:
                self.complain(offset, error)
                threading.Event().wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.reopen()
                continue
            if self._in_trouble:
                self._in_trouble = False
                log.warning("%s can be read again", self._image.memory)
            return data

    def complain(self, offset: int, error: OSError) -> None:
        """One line, until things are well again."""
        if not self._in_trouble:
            self._in_trouble = True
            log.warning(
                "%s at %#x: %s; trying again, the guest waits", self._image.memory, offset, error.strerror or error
            )

    def reopen(self) -> None:
        """Look whether another mount is at the mountpoint by now. The former file stays open: a read may be in it."""
        try:
            if identity(self._image) != self._identity:
                log.error("%s: another image is mounted there now; the guest waits for its own", self._image.mountpoint)
                return
            file, device = self._open()
        except OSError:
            return
        with self._lock:
            if device == self._device:
                os.close(file)
            else:
                self._file, self._device = file, device

    def _open(self) -> tuple[int, int]:
        """The file, and its filesystem's number: a dead mount does not tell that any more."""
        file = os.open(self._image.memory, os.O_RDONLY | os.O_CLOEXEC)
        # Otherwise the kernel reads 128 KiB around a page that is wanted, and waits for all of it.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return file, os.fstat(file).st_dev


def mount_status(image: MountedImage, *keys: str) -> Any:
    """A value of the mount's status.json; None where it is not there."""
    try:
        found = json.loads(image.control("status.json").read_bytes())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found
