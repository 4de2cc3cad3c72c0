"""The filesystem: kernel requests in, answers of an :class:`ImageView` out. One event loop; all content immutable.

A request is answered synchronously wherever what it asks for is here. Requests that must wait do so in tasks of their
own (pyfuse3's), so they hold up nobody else.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio

from imagefs.errors import CorruptObjectError
from imagefs.fetch.view import ImageView
from imagefs.image.geometry import PAGE_SIZE
from imagefs.image.streams import CONFIG_PREFIX
from imagefs.mount import tree
from imagefs.mount.attributes import Attributes
from imagefs.mount.counters import MountCounters
from imagefs.mount.failures import Failures
from imagefs.mount.files import ArrivalsFile, OpenFile, SnapshotFile, TraceFile
from imagefs.mount.native_file import NativeFile

FIRST_HANDLE = 1 << 60
"""Handles below are inode numbers: opens without a state of their own."""
XATTR_PREFIX = "user.imagefs."

P = ParamSpec("P")
T = TypeVar("T")


def _answer(
    handler: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Counts a request, and turns its error into an errno: pyfuse3 ends with any other exception."""
    kind = handler.__name__

    @wraps(handler)
    async def answer(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        self.counters.requests[kind] += 1
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            self.counters.errors[kind] += 1
            code = self._failures.errno_of(error, self._describe(kind, args))
        raise pyfuse3.FUSEError(code)

    return answer


class ImageFilesystem(pyfuse3.Operations):
    """What pyfuse3 calls. ``started`` is set when the kernel has begun to talk to it."""

    supports_dot_lookup = False

    def __init__(self, view: ImageView, options: Mapping[str, Any], *, uid: int, gid: int, now: float) -> None:
        """``options`` are shown in status.json; ``uid`` and ``gid`` own everything; ``now`` is every time stamp."""
        super().__init__()
        self.started = trio.Event()
        self.counters = MountCounters()
        self.tree = tree.Tree(
            view.geometry,
            [name.removeprefix(CONFIG_PREFIX) for name in view.streams if name.startswith(CONFIG_PREFIX)],
            view.native_files,
        )
        self._view = view
        self._options = options
        self._failures = Failures()
        self._native = NativeFile(view, self.counters.waiting)
        # What JSON escapes and UTF-8 cannot say, half a surrogate pair, is escaped again.
        text = json.dumps(view.document, indent=1, ensure_ascii=False)
        self._metadata = text.encode(errors="backslashreplace") + b"\n"
        self._attributes = Attributes(view, self.tree, len(self._metadata), uid=uid, gid=gid, now=now)
        self._open: dict[int, OpenFile] = {}
        self._next_handle = FIRST_HANDLE

    def __repr__(self) -> str:
        return f"<ImageFilesystem {self._view.name}: {self.counters!r}, {len(self._open)} open>"

    def init(self) -> None:
        self.started.set()

    def status(self) -> dict[str, Any]:
        """The content of status.json."""
        mount = {"pid": os.getpid(), "options": dict(self._options), **self.counters.statistics()}
        return {**self._view.status(), "mount": mount}

    # --- names and attributes

    @_answer
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        inode = self.tree.lookup(parent_inode, name)
        if inode is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes.entry(inode)

    @_answer
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._attributes.entry(inode)

    @_answer
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        # `echo … > trace` truncates first; a VMM may "set" its RAM file to the size that it has.
        harmless = inode == tree.TRACE or (inode == tree.MEMORY and attr.st_size == self._attributes.size(inode))
        if fields.update_mode or fields.update_uid or fields.update_gid or not (fields.update_size and harmless):
            raise pyfuse3.FUSEError(errno.EROFS)
        return self._attributes.entry(inode)

    @_answer
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if not self.tree.is_directory(inode):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return inode

    @_answer
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        frame: pyfuse3.EntryAttributes | None = None
        for name, inode, position in self.tree.list(fh, start_id):
            if not self.tree.is_frame(inode):
                attributes = self._attributes.entry(inode)
            elif frame is None:
                attributes = frame = self._attributes.entry(inode)
            else:
                # All frames look alike but for the number: 4096 of them are listed with one object.
                attributes = frame
                frame.st_ino = inode
            if not pyfuse3.readdir_reply(token, name, attributes, position):
                break

    @_answer
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        attributes = await self._xattrs(inode) if name.startswith(XATTR_PREFIX.encode()) else {}
        if name not in attributes:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return attributes[name]

    @_answer
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        return list(await self._xattrs(inode))

    @_answer
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = PAGE_SIZE
        data.f_blocks = self._view.geometry.pages
        data.f_files = self._view.geometry.pages
        data.f_namemax = tree.MAX_NAME
        return data

    # --- content

    @_answer
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        access = flags & os.O_ACCMODE
        if inode != tree.TRACE and (access != os.O_RDONLY or flags & os.O_TRUNC):
            # O_TRUNC comes with the open, not as a setattr of its own: the kernel takes the file for empty if we agree.
            if inode != tree.MEMORY or access != os.O_RDWR or flags & os.O_TRUNC:
                raise pyfuse3.FUSEError(errno.EROFS)
            # direct_io, because it makes the kernel refuse shared mappings and keep writes out of the page cache:
            # otherwise what someone writes would be seen by every guest that maps the same image, until the write
            # comes here to be refused. Private mappings go through the page cache as ever.
            return pyfuse3.FileInfo(fh=inode, direct_io=True, keep_cache=True)
        if inode in tree.MADE_UP:
            handle, self._next_handle = self._next_handle, self._next_handle + 1
            self._open[handle] = self._control_file(inode)
            return pyfuse3.FileInfo(fh=handle, direct_io=True, nonseekable=inode == tree.ARRIVALS)
        if inode == tree.PRESENT:
            return pyfuse3.FileInfo(fh=inode, direct_io=True, keep_cache=False)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_answer
    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh >= FIRST_HANDLE:
            data = await self._open[fh].read(off, size)
        elif fh in (tree.METADATA, tree.PRESENT):
            data = self._read_generated(fh, off, size)
        elif (native := self._attributes.native_span(fh)) is not None:
            start, end = native
            data = await self._native.read(start + off, max(0, min(size, end - start - off)))
        else:
            stream, start, end = self._attributes.span(fh)
            start += off
            wanted = min(size, end - start)
            if wanted <= 0:
                return b""
            here = self._view.read_present(stream, start, wanted)
            if here is None:
                with self.counters.waiting():
                    here = await self._view.read(stream, start, wanted)
            # The kernel takes a short answer for the end of the file, and would shrink it.
            if len(here) != wanted:
                raise CorruptObjectError(
                    f"{len(here)} bytes at {start:#x}, not {wanted}", key=stream, origin=self._view.name
                )
            data = here
        self.counters.bytes_read += len(data)
        return data

    @_answer
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh < FIRST_HANDLE:
            raise pyfuse3.FUSEError(errno.EROFS)
        self._open[fh].write(buf)
        return len(buf)

    @_answer
    async def release(self, fh: int) -> None:
        if fh >= FIRST_HANDLE:
            self._open.pop(fh).close()

    # flush, fsync, fsyncdir: inherited, ENOSYS. The kernel takes that for success and never asks again, so closing a
    # file costs no request.

    # --- everything that would change something

    async def _refuse(self, *args: Any) -> NoReturn:
        raise pyfuse3.FUSEError(errno.EROFS)

    _refused: Any = _refuse
    create = mknod = mkdir = unlink = rmdir = symlink = rename = link = setxattr = removexattr = _refused

    # --- helpers

    def _read_generated(self, fh: int, off: int, size: int) -> bytes:
        if fh == tree.METADATA:
            return self._metadata[off : off + size]
        return self._view.present_bitmap(off, max(0, min(size, self._attributes.size(fh) - off)))

    def _control_file(self, inode: int) -> OpenFile:
        if inode == tree.ARRIVALS:
            return ArrivalsFile(self._view.arrivals)
        if inode == tree.TRACE:
            return TraceFile(self._view.trace)
        return SnapshotFile(lambda: json.dumps(self.status(), indent=1).encode() + b"\n")

    async def _xattrs(self, inode: int) -> dict[bytes, bytes]:
        if not self.tree.is_frame(inode):
            return {}
        info = await self._view.page_info(self.tree.page_of(inode))
        values = {"state": info.state, "kind": info.kind, "digest": info.digest}
        return {(XATTR_PREFIX + key).encode(): value.encode() for key, value in values.items() if value is not None}

    def _describe(self, kind: str, args: Sequence[Any]) -> str:
        """What a request was about, for the log: never its bytes."""
        number = args[0]
        if number >= FIRST_HANDLE:
            return f"{kind} of a file in .imagefs"
        if self.tree.is_frame(number):
            return f"{kind} of page {self.tree.page_of(number)}"
        names = {tree.MEMORY: "memory", tree.STATE: "state", tree.NATIVE: "native"}
        if self.tree.native.has_file(number):
            return f"{kind} of a file in native"
        name = names.get(number) or self.tree.config_name(number) or f"inode {number}"
        if kind != "read":
            return f"{kind} of {name}"
        offset, size = args[1], args[2]
        page = f" (page {offset // PAGE_SIZE})" if number == tree.MEMORY else ""
        return f"{kind} of {size} bytes at {offset:#x} of {name}{page}"
