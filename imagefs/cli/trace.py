"""``imagefs trace save|show|remove``."""

from __future__ import annotations

import argparse
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagefs.cache.disk import WORKING_SET
from imagefs.cli.opening import image_reader
from imagefs.cli.terminal import size_text
from imagefs.errors import CorruptObjectError, MissingObjectError, MountError, UsageError
from imagefs.fetch.recording import parse_trace, working_set_of
from imagefs.image.chunks import Codec
from imagefs.image.workingset import WorkingSet, from_text, merge
from imagefs.mount.status import read_status
from imagefs.store.base import is_url, working_set_key
from imagefs.store.directory import DirectoryStore
from imagefs.store.reader import ImageReader
from imagefs.store.workingset import find_header, publish, read_set

DESCRIPTION = """\
Working sets: which pages a resumed guest touches first, in order. Each mount records them; a set
that is stored beside the image is what the next mount of it fetches first, with one request.

    imagefs trace save /mnt/vm1 store/vm1   publish what the mount at /mnt/vm1 has recorded
    imagefs trace show store/vm1            what is published
    imagefs trace remove store/vm1          do without it

save merges what is published already, what earlier mounts on this host have recorded, and what this
mount has. Without STORE/NAME it goes to where the mount's image is from; a server cannot be written
to, so then the directory that it serves must be named.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.usage = (
        "imagefs trace save MOUNTPOINT [STORE/NAME] [--new] [-q]\n"
        "       imagefs trace show STORE/NAME [--pages]\n"
        "       imagefs trace remove STORE/NAME"
    )
    parser.add_argument("action", metavar="ACTION", choices=list(ACTIONS), help="save, show or remove")
    parser.add_argument("place", metavar="MOUNTPOINT|STORE/NAME", help="where the image is mounted; the image")
    parser.add_argument("image", metavar="STORE/NAME", nargs="?", help="with save: the image, in a directory")
    parser.add_argument(
        "--new", action="store_true", help="with save: only this mount's recording, without what was there before"
    )
    parser.add_argument(
        "--pages", action="store_true", help="with show: list the pages in order, and how many recordings have each"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="with save: print nothing but errors")


def run(args: argparse.Namespace) -> int:
    if args.action != "save" and args.image is not None:
        raise UsageError(f"trace {args.action} takes one image: imagefs trace {args.action} STORE/NAME")
    return ACTIONS[args.action](args)


def _save(args: argparse.Namespace) -> int:
    status = read_status(args.place)
    target = args.image or status["source"]
    if args.image is None and is_url(target):
        raise UsageError(
            f"{target} is on a server, which cannot be written to; name the directory that it serves: "
            f"imagefs trace save {args.place} STORE/NAME"
        )
    touches = parse_trace(_read_trace(Path(args.place)))
    codec = Codec()
    with image_reader(target) as reader:
        _writable(reader, target)
        if reader.image.digest.hex() != status["image"]:
            raise UsageError(
                f"{target} is the image {reader.image.digest.hex()}, at {args.place} is {status['image']}: "
                "a working set is of one image only"
            )
        before = [] if args.new else [_published(reader, codec), _local(status, reader)]
        merged = merge([*before, working_set_of(touches, reader.image.manifest.chunk_pages)])
        if not len(merged):
            raise UsageError(f"{args.place}: nothing has been recorded: restore a guest from it first")
        written = publish(reader, merged, codec)
    if not args.quiet:
        print(f"{target}: working set of {written.pages} pages, {size_text(written.size)}")
    return 0


def _show(args: argparse.Namespace) -> int:
    with image_reader(args.place) as reader:
        header = find_header(reader.store, reader.image)
        if header is None:
            raise MissingObjectError(
                "no working set is published", key=working_set_key(reader.image.digest), origin=reader.store.origin
            )
        found = read_set(reader.store, reader.image, Codec())
    if args.pages:
        for page, recordings in found.items():
            print(f"{page} {recordings}")
    else:
        print(f"{args.place}: working set of {header.pages} pages, {size_text(header.size)}")
    return 0


def _remove(args: argparse.Namespace) -> int:
    with image_reader(args.place) as reader:
        _writable(reader, args.place).delete(working_set_key(reader.image.digest))
    return 0


def _writable(reader: ImageReader, image: str) -> DirectoryStore:
    if not isinstance(reader.store, DirectoryStore):
        raise UsageError(f"{image} is on a server, which cannot be written to; name the directory that it serves")
    return reader.store


def _read_trace(mountpoint: Path) -> bytes:
    try:
        return (mountpoint / ".imagefs" / "trace").read_bytes()
    except OSError as error:
        gone = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        reason = "the daemon is gone" if gone else (error.strerror or str(error)).lower()
        raise MountError(f"{mountpoint}: {reason}") from None


def _published(reader: ImageReader, codec: Codec) -> WorkingSet:
    """What is there already; nothing if that is damaged, since it is about to be replaced."""
    try:
        return read_set(reader.store, reader.image, codec)
    except (MissingObjectError, CorruptObjectError):
        return WorkingSet()


def _local(status: Mapping[str, Any], reader: ImageReader) -> WorkingSet:
    """What earlier mounts have left in the cache, if this user may read it."""
    path = status.get("cache", {}).get("path")
    if path is None:
        return WorkingSet()
    try:
        text = (Path(path) / WORKING_SET).read_bytes()
        return from_text(text, reader.image.metadata.geometry.pages)
    except (OSError, ValueError):
        return WorkingSet()


ACTIONS = {"save": _save, "show": _show, "remove": _remove}
