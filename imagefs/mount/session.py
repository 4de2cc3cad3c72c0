"""How a mount gets at its image: the only place of the mount that knows more of it than an :class:`ImageView`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

from imagefs.cache.disk import DiskCache
from imagefs.cache.memory import MemoryCache
from imagefs.errors import MountError
from imagefs.fetch.opened import open_image
from imagefs.fetch.options import FetchOptions
from imagefs.fetch.sink import PageSink
from imagefs.fetch.view import ImageView
from imagefs.mount.options import MountOptions, default_cache
from imagefs.store.reader import Image

Session = Callable[[str, MountOptions], AbstractAsyncContextManager[ImageView]]
"""From ``STORE/NAME`` and options to an opened image, whose fetching ends with the context. Raises ImagefsError."""


def open_session(source: str, options: MountOptions) -> AbstractAsyncContextManager[ImageView]:
    """The real one: pages come from the store and are kept in the cache."""
    # Without a place to keep it, what the sweep brings would push out what was touched, and come again and again.
    prefetch = "ws" if options.prefetch == "all" and not options.use_cache else options.prefetch
    fetch = FetchOptions(prefetch=prefetch, timeout=options.timeout, connections=options.connections)
    return open_image(source, fetch, partial(_make_sink, options))


def _make_sink(options: MountOptions, image: Image) -> PageSink:
    size = image.metadata.geometry.size
    if not options.use_cache:
        return MemoryCache(size, image.manifest.window_size)
    directory = options.cache or default_cache(os.geteuid(), os.environ)
    try:
        return DiskCache(directory, image.digest, size)
    except OSError as error:
        reason = error.strerror or str(error)
        raise MountError(f"cache {directory}: {reason}; another place is cache=DIR, none at all nocache") from error
