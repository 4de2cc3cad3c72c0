"""Doors for VMMs: each a client of the mountpoint (or of a VMM's monitor), none reaches past it.

``imagefs restore`` looks at a mountpoint (:mod:`~imagefs.restore.mountpoint`), and a *door* brings the guest's memory
from there to the VMM. Doors are small modules in the registry of :mod:`~imagefs.restore.doors`. For QEMU they share
:mod:`~imagefs.restore.qemu_command`, which makes the user's command line fit the image.

The way in, a running QEMU to suspend, is :mod:`~imagefs.restore.suspend`. Nothing here knows stores or fetching.

For programs that want the memory itself there is :func:`map_memory`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imagefs.restore.memory_map import LazyMemory, map_memory

__all__ = ["LazyMemory", "map_memory"]


def __getattr__(name: str) -> Any:
    # Whoever restores a guest does not wait for the import of what only programs use.
    if name in __all__:
        from imagefs.restore import memory_map

        return getattr(memory_map, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
