"""One mount from beginning to end, under trio: opened, mounted, served, taken away.

Tasks: pyfuse3's workers (one per request in flight), ``signals`` (none: handlers cancel), ``severed`` (ends the mount
with its connection), ``tuning`` (ends when the mount is usable), and those of the image, which outlive the mount proper
by the time it takes to close the image.

The order at the end matters. The connection is closed first: that is what releases readers that wait, whatever the
network does. Then the mount is detached, and then the image is closed.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import quote

import pyfuse3
import trio

from imagefs.errors import MountError
from imagefs.fetch.view import ImageView
from imagefs.mount import kernel
from imagefs.mount.fs import ImageFilesystem
from imagefs.mount.kernel import Mount
from imagefs.mount.options import MountOptions, default_cache
from imagefs.mount.session import Session
from imagefs.store.base import without_credentials

log = logging.getLogger(__name__)

MAX_TASKS = 4096
"""Requests that may wait at a time. A task that waits costs some kilobytes; at pyfuse3's default of 99 the hundredth
blocked reader stops the mount for all."""
CLOSING_TIME = 10.0
"""Seconds in which the image must be closed once the mount is gone, or the process is killed; pulled out of the air."""
PULSE = 0.25
"""Seconds. pyfuse3 reads a blocking descriptor. If the one request that made it readable is withdrawn in between,
because its process was killed, that read blocks the event loop and with it everybody. A signal interrupts it."""

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def run(source: str, mountpoint: str, options: MountOptions, session: Session, ready: Callable[[], None]) -> None:
    """Serve until unmounted or told to end by a signal; call ``ready`` when the filesystem can be used.

    ``mountpoint`` is absolute and without symbolic links. To be called in the main thread of a process that does
    nothing else: signal handlers stay. Raises ImagefsError (in groups) where it cannot begin.
    """
    with trio.CancelScope() as scope, _signals(scope):
        if options.use_cache and options.cache is None:
            options = replace(options, cache=default_cache(os.geteuid(), os.environ))
        async with session(source, options) as view:
            try:
                await _serve(view, source, mountpoint, options, ready)
            finally:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.setitimer(signal.ITIMER_REAL, CLOSING_TIME)
        signal.setitimer(signal.ITIMER_REAL, 0)
    if scope.cancelled_caught:
        log.info("%s: ended by a signal", mountpoint)


async def _serve(
    view: ImageView, source: str, mountpoint: str, options: MountOptions, ready: Callable[[], None]
) -> None:
    filesystem = ImageFilesystem(
        view,
        options.as_json(),
        uid=os.geteuid() if options.uid is None else options.uid,
        gid=os.getegid() if options.gid is None else options.gid,
        now=time.time(),
    )
    with _mounted(filesystem, source, mountpoint, options) as (mount, descriptor):
        async with trio.open_nursery() as nursery:

            async def end_when_severed() -> None:
                await kernel.wait_until_severed(descriptor)
                log.info("%s: unmounted", mountpoint)
                nursery.cancel_scope.cancel()

            async def tune() -> None:
                await filesystem.started.wait()
                # From here on the kernel has its answer to INIT, which sets what is changed now.
                kernel.allow_many_reads(mount)
                if options.readahead is not None:
                    kernel.set_readahead(mount, options.readahead)
                log.info("%s: mounted on %s", view.name, mountpoint)
                ready()

            nursery.start_soon(end_when_severed, name="severed")
            nursery.start_soon(tune, name="tuning")
            # Returns only when no request is under way any more, so it is mostly one of the others that ends it.
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()


@contextmanager
def _mounted(
    filesystem: ImageFilesystem, source: str, mountpoint: str, options: MountOptions
) -> Iterator[tuple[Mount, int]]:
    """The mount, and the descriptor of /dev/fuse behind it."""
    before = kernel.fuse_descriptors()
    with _stderr_kept() as said:
        try:
            pyfuse3.init(filesystem, mountpoint, fuse_options(source, options))
        except RuntimeError:
            failed = True
        else:
            failed = False
    if failed:
        raise MountError(f"{mountpoint}: cannot be mounted on: {said() or 'is FUSE there (/dev/fuse)?'}")
    mount = None
    try:
        mount = kernel.topmost(mountpoint)
        opened = kernel.fuse_descriptors() - before
        if mount is None or mount.filesystem_type != kernel.FILESYSTEM_TYPE or len(opened) != 1:
            raise MountError(f"{mountpoint}: mounted, but not to be found again")
        yield mount, opened.pop()
    finally:
        # Not by libfuse: it unmounts whatever is at that path by now, and nothing after an abort.
        pyfuse3.close(unmount=False)
        if mount is not None:
            kernel.detach(mount)


def fuse_options(source: str, options: MountOptions) -> set[str]:
    # pyfuse3 wants ASCII; libfuse takes a comma for the end of the option unless it is escaped.
    shown = quote(without_credentials(source), safe=" !\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", errors="surrogateescape")
    escaped = re.sub(r"([\\,])", r"\\\1", shown)
    chosen = {
        "default_permissions",
        f"fsname={escaped}",
        "subtype=imagefs",
        "nosuid",
        "nodev",
    }
    if options.others_may_enter:
        chosen.add("allow_other")
    if options.noexec:
        chosen.add("noexec")
    return chosen


@contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """What libfuse and its helper write to descriptor 2 meanwhile, as one line: the reason why a mount failed."""
    with tempfile.TemporaryFile() as kept:
        stderr = os.dup(2)
        os.dup2(kept.fileno(), 2)

        def said() -> str:
            return "; ".join(text.decode(errors="replace").splitlines())

        text = b""
        try:
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            kept.seek(0)
            text = kept.read()


@contextmanager
def _signals(scope: trio.CancelScope) -> Iterator[None]:
    """The first ending signal cancels, further ones change nothing; the pulse goes on until the end.

    The handlers are left in place: what is sent while the process is about to end must not kill it half-way.
    """
    token = trio.lowlevel.current_trio_token()

    def end(number: int, frame: object) -> None:
        try:
            token.run_sync_soon(scope.cancel, idempotent=True)
        except trio.RunFinishedError:
            return

    for number in ENDING_SIGNALS:
        signal.signal(number, end)
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, PULSE, PULSE)
    yield
