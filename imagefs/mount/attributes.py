"""What stat(2) says of each entry of the mount, and which range of which stream a file shows."""

from __future__ import annotations

import errno
import stat

import pyfuse3

from imagefs.fetch.view import ImageView
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.streams import CONFIG_PREFIX, MEMORY, STATE
from imagefs.mount import tree
from imagefs.mount.tree import Tree

FOREVER = 86400.0
"""Seconds for which the kernel may believe names and attributes: an image never changes."""
BLOCK = 512
"""Unit of st_blocks."""

DIRECTORY_MODE = stat.S_IFDIR | 0o500
FILE_MODE = stat.S_IFREG | 0o400
WRITABLE_MODE = stat.S_IFREG | 0o600
"""``memory``, so that a VMM that does not run as root may open it O_RDWR, as QEMU's ``share=off`` does: with
default_permissions it is the kernel that compares the open with the mode. What is then written is refused with EROFS.
And ``.imagefs/trace``, which takes lines."""


class Attributes:
    """Answers from geometry and stream sizes alone; nothing is fetched or kept for it."""

    def __init__(self, view: ImageView, names: Tree, metadata_size: int, *, uid: int, gid: int, now: float) -> None:
        """``metadata_size`` is that of metadata.json in bytes; ``uid`` and ``gid`` own everything, ``now`` is every
        time stamp in seconds."""
        self._view = view
        self._tree = names
        self._metadata_size = metadata_size
        self._owner = (uid, gid)
        self._now = int(now) * 10**9

    def entry(self, inode: int) -> pyfuse3.EntryAttributes:
        """FUSEError ENOENT for an inode number that names nothing."""
        if not self._tree.exists(inode):
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_uid, entry.st_gid = self._owner
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._now
        entry.st_blksize = PAGE_SIZE
        # One link for directories, too: "not counted" for find(1), which otherwise concludes that there are no
        # directories below.
        entry.st_nlink = 1
        entry.entry_timeout = FOREVER
        entry.attr_timeout = 0 if inode in tree.MADE_UP else FOREVER
        if self._tree.is_directory(inode):
            entry.st_mode = DIRECTORY_MODE
        else:
            entry.st_mode = WRITABLE_MODE if inode in (tree.MEMORY, tree.TRACE) else FILE_MODE
            entry.st_size = self.size(inode)
            # No holes are announced, though zero pages take nothing: cp and tar would ask for them page by page.
            entry.st_blocks = -(-entry.st_size // BLOCK)
        return entry

    def size(self, inode: int) -> int:
        """Bytes of a file."""
        match inode:
            case tree.METADATA:
                return self._metadata_size
            case tree.PRESENT:
                return -(-self._view.geometry.pages // 8)
            case tree.STATUS | tree.ARRIVALS | tree.TRACE:
                return 0
        if (native := self.native_span(inode)) is not None:
            return native[1] - native[0]
        _, start, end = self.span(inode)
        return end - start

    def native_span(self, inode: int) -> tuple[int, int] | None:
        """The range of the native stream that a file shows, start and end; None for one that shows none of it."""
        if inode == tree.NATIVE:
            return 0, self._view.native_size
        return self._tree.native.span(inode) if self._tree.native.has_file(inode) else None

    def span(self, inode: int) -> tuple[str, int, int]:
        """The range of a stream that a file shows: name, start, end. KeyError for a file that shows none."""
        if inode == tree.MEMORY:
            return MEMORY, 0, self._view.geometry.size
        if self._tree.is_frame(inode):
            start = self._tree.page_of(inode) * PAGE_SIZE
            return MEMORY, start, start + PAGE_SIZE
        if inode == tree.STATE:
            return STATE, 0, self._view.streams.get(STATE, 0)
        name = self._tree.config_name(inode)
        if name is None:
            raise KeyError(inode)
        return CONFIG_PREFIX + name, 0, self._view.streams[CONFIG_PREFIX + name]
