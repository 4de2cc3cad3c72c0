"""From a command's process to a daemon's: fork first, everything else in the child.

Nothing here starts a thread or imports what does before the fork. The parent returns when the filesystem can be used,
and raises MountError with the child's reason when it never will.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn, TextIO

from imagefs.errors import ImagefsError, MountError, UsageError
from imagefs.mount.options import MountOptions
from imagefs.store.location import parse_location

if TYPE_CHECKING:
    from imagefs.mount.session import Session

log = logging.getLogger(__name__)

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
USABLE = b"usable"
_PR_SET_PDEATHSIG = 1


def absolute_source(source: str) -> str:
    """``STORE/NAME`` as it will still be understood after chdir. UsageError if it is none."""
    where = parse_location(source)
    if "://" in where.store_location:
        return source
    return os.path.abspath(source)


def check_mountpoint(path: str) -> str:
    """The directory's absolute path without symbolic links; MountError says what is wrong with it."""
    try:
        os.listdir(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            reason = f"the daemon of an earlier mount is gone; first: umount -l {path}"
        else:
            reason = (error.strerror or str(error)).lower()
        raise MountError(f"{path}: {reason}") from None
    return os.path.realpath(path)


def mount_in_foreground(
    source: str, mountpoint: str, options: MountOptions, *, verbose: bool = False, session: Session | None = None
) -> None:
    """Return when unmounted, or after SIGTERM or SIGINT. Log lines go to stderr, or to ``options.log``."""
    source, mountpoint = absolute_source(source), check_mountpoint(mountpoint)
    log_file = _open_log(options)
    os.umask(0o077)
    _no_core_dumps()
    _start_logging(log_file, verbose)
    try:
        _serve(source, mountpoint, options, session, lambda: None)
    except Exception as error:
        raise MountError(_reason(error)) from error


def mount_as_daemon(source: str, mountpoint: str, options: MountOptions, *, session: Session | None = None) -> None:
    """Return in the parent when the filesystem can be used; the child never returns. OSError if there is no fork."""
    source, mountpoint = absolute_source(source), check_mountpoint(mountpoint)
    log_file = _open_log(options)
    receiver, sender = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        _be_daemon(parent, sender, log_file, lambda ready: _serve(source, mountpoint, options, session, ready))
    os.close(sender)
    with os.fdopen(receiver, "rb") as pipe:
        answer = pipe.read()
    if answer != USABLE:
        _, status = os.waitpid(child, 0)
        raise MountError(answer.decode(errors="replace") or _how_it_ended(status))


def _serve(
    source: str, mountpoint: str, options: MountOptions, session: Session | None, ready: Callable[[], None]
) -> None:
    # Here, in the daemon's own process: all this takes a third of a second to import, and starts threads.
    import trio

    from imagefs.mount import serve

    if session is None:
        from imagefs.mount.session import open_session

        session = open_session
    trio.run(serve.run, source, mountpoint, options, session, ready)


def _be_daemon(
    parent: int, sender: int, log_file: TextIO | None, serve: Callable[[Callable[[], None]], None]
) -> NoReturn:
    status = 1
    usable = False

    def ready() -> None:
        nonlocal usable
        # Before the parent knows: who waits for the end of its output is not to wait for ours.
        _leave_terminal(log_file)
        _end_with_parent(0)
        os.write(sender, USABLE)
        os.close(sender)
        usable = True

    try:
        os.setsid()
        _end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            raise MountError("interrupted")
        os.chdir("/")
        os.umask(0o077)
        _no_core_dumps()
        _close_others({0, 1, 2, sender, *([log_file.fileno()] if log_file else [])})
        _start_logging(log_file, False, detached=True)
        serve(ready)
        status = 0
    except BaseException as error:
        reason = _reason(error)
        if usable:
            log.error("the mount has ended: %s", reason)
        else:
            os.write(sender, reason.encode(errors="backslashreplace"))
    finally:
        logging.shutdown()
        # Threads that the image has abandoned are still in their requests; nothing is to wait for them.
        os._exit(status)


def _reason(error: BaseException) -> str:
    """One line for the user. What is nobody's fault but ours goes with its traceback into the log, too."""
    for leaf in _leaves(error):
        if isinstance(leaf, ImagefsError):
            return str(leaf)
        if isinstance(leaf, KeyboardInterrupt):
            return "interrupted"
    for leaf in _leaves(error):
        if isinstance(leaf, OSError):
            where = f"{leaf.filename}: " if leaf.filename is not None else ""
            return f"{where}{leaf.strerror or leaf}"
    log.error("internal error", exc_info=error)
    leaf = next(_leaves(error))
    return f"internal error: {type(leaf).__name__}: {leaf}"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in groups of groups; nurseries wrap what their tasks raise."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def _how_it_ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the daemon was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return "interrupted" if os.WEXITSTATUS(status) == 0 else "the daemon ended without a reason"


def _open_log(options: MountOptions) -> TextIO | None:
    if options.log is None:
        return None
    path = os.path.abspath(options.log)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"log={path}: {(error.strerror or str(error)).lower()}") from None
    return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


class _OneLine(logging.Formatter):
    """For terminals: tracebacks are for log files."""

    def formatException(self, ei: object) -> str:  # noqa: N802
        return ""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip("\n")


def _start_logging(log_file: TextIO | None, verbose: bool, *, detached: bool = False) -> None:
    handler: logging.Handler
    if log_file is not None:
        handler = logging.StreamHandler(log_file)
        handler.setFormatter(logging.Formatter(LINE))
    elif detached:
        handler = logging.NullHandler()
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_OneLine("mount.imagefs: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pyfuse3").addFilter(_someone_waited)
    if log_file is not None or verbose:
        logging.getLogger("imagefs").setLevel(logging.INFO)


def _someone_waited(record: logging.LogRecord) -> bool:
    """Nobody waits for the answer to a release, and at the end of a mount the kernel has forgotten it (ENOENT)."""
    text = record.getMessage()
    return not (text.startswith("fuse_release()") and text.endswith(os.strerror(errno.ENOENT)))


def _leave_terminal(log_file: TextIO | None) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for descriptor in (1, 2):
        os.dup2(null if log_file is None else log_file.fileno(), descriptor)
    os.close(null)


def _close_others(kept: set[int]) -> None:
    """Descriptors that whoever started us has left open: a lock, a pipe that someone reads to its end."""
    for entry in os.listdir("/proc/self/fd"):
        if int(entry) not in kept:
            try:
                os.close(int(entry))
            except OSError:
                continue  # the one through which the directory was read


def _no_core_dumps() -> None:
    """Guest memory passes through here, and is not to be left in files for others."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_parent(number: int) -> None:
    """Which signal to get when the process that waits for us ends before we are usable; 0 for none."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
