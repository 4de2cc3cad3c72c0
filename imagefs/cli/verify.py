"""``imagefs verify STORE/NAME``."""

from __future__ import annotations

import argparse
import sys
from itertools import chain

from imagefs.cli.opening import image_reader
from imagefs.cli.terminal import progress_bar, size_text
from imagefs.image.chunks import Codec
from imagefs.store.verify import Verifier
from imagefs.store.workingset import set_damage

DESCRIPTION = """\
Read everything that an image consists of and check it against its digests. Each thing that is
damaged is named on a line of its own, with the page frames that it holds and where it is stored.
The exit status is 0 if the image is sound and 1 if it is not.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("image", metavar="STORE/NAME", help="a path or an http(s) URL")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but damage")


def run(args: argparse.Namespace) -> int:
    found = 0
    with image_reader(args.image) as reader, progress_bar("verifying", quiet=args.quiet) as progress:
        verifier = Verifier(reader.store, reader.image, Codec(), progress)
        damage = chain(verifier.damage(), set_damage(reader.store, reader.image, Codec()))
        for line in damage:
            found += 1
            print(line, file=sys.stderr)
        stored = reader.image.manifest.stored_bytes
    if found:
        print(f"imagefs verify: {args.image}: {found} things are damaged", file=sys.stderr)
        return 1
    if not args.quiet:
        counts = f"{verifier.chunks} chunks, {verifier.blocks} index blocks, {verifier.packs} packs"
        print(f"{args.image}: sound: {counts}, {size_text(stored)}")
    return 0
