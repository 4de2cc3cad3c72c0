"""Opening an image in a store for the commands that read it whole or in part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from imagefs.errors import MissingObjectError, UsageError
from imagefs.image.chunks import Codec
from imagefs.store.base import OBJECTS
from imagefs.store.directory import DirectoryStore
from imagefs.store.location import open_store, parse_location
from imagefs.store.reader import ImageReader, load_image


@contextmanager
def image_reader(location: str) -> Iterator[ImageReader]:
    """The image at ``STORE/NAME``, verified as far as it has been read. Raises StoreError, UsageError."""
    where = parse_location(location)
    codec = Codec()
    with closing(open_store(where)) as store:
        try:
            image = load_image(store, where.name, codec)
        except MissingObjectError:
            if isinstance(store, DirectoryStore):
                _check_is_no_store(location, store.root / where.name)
            raise
        yield ImageReader(store, image, codec)


def _check_is_no_store(location: str, path: Path) -> None:
    """UsageError where a directory was given, perhaps a store without a name in it."""
    if path.is_dir():
        files = (name for name in sorted(os.listdir(path)) if (path / name).is_file() and not name.startswith("."))
        example = next(files, "NAME") if (path / OBJECTS).is_dir() else None
        what = "a store: name an image in it" if example is not None else "a directory, not an image in a store"
        hint = f", such as {location.rstrip('/')}/{example}" if example is not None else ""
        raise UsageError(f"{location}: this is {what}{hint}")
