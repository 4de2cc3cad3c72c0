"""``mount.imagefs``: called by hand, and by mount(8) for the file system type ``imagefs``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, NoReturn

from imagefs.cli.version import ShowVersion
from imagefs.errors import ImagefsError, UsageError
from imagefs.mount.daemon import mount_as_daemon, mount_in_foreground
from imagefs.mount.options import MountOptions, parse_options

if TYPE_CHECKING:
    from imagefs.mount.session import Session

# mount(8), "EXIT STATUS".
OK, USAGE, SYSTEM, INTERRUPTED, FAILED = 0, 1, 2, 8, 32

DESCRIPTION = """\
Mount the split memory image STORE/NAME at the directory MOUNTPOINT.

STORE is a directory, or the http or https URL of one. The command returns as soon
as the filesystem can be used; pages arrive as they are read, and in the background.
`umount MOUNTPOINT` ends it.
"""

OPTIONS = """\
options for -o, separated by commas:
  allow_other       let other users in; files stay readable by their owner only
  uid=N, gid=N      owner of all files (number or name); uid= implies allow_other
  cache=DIR         keep pages that have arrived in DIR
                    (default: /var/cache/imagefs, or $XDG_CACHE_HOME/imagefs)
  nocache           keep only the pages used last, and those in memory
  hard              a read waits for its page as long as it takes (default)
  soft              a read fails with EIO when its page has not come in time:
  timeo=SECONDS     after this long (default: 60)
  prefetch=all      fetch the whole image in the background (default)
  prefetch=ws       fetch the recorded working set, and otherwise only what is read
  prefetch=none     fetch only what is read
  connections=N     requests to the store at a time, at most (default: 16)
  readahead=KIB     how much the kernel reads ahead (default: 128; takes root)
  log=FILE          write a log to FILE
  noexec            as for every filesystem; so are ro, nosuid and nodev, always in force
Options that mount(8) tells helpers to ignore are ignored: x-*, _netdev, nofail, …

examples:
  mount.imagefs store/vm1 /mnt/vm1
  mount.imagefs http://host/store/vm1 /mnt/vm1 -o cache=/srv/cache,soft,timeo=20
  mount -t imagefs http://host/store/vm1 /mnt/vm1
  http://host/store/vm1  /mnt/vm1  imagefs  _netdev,nofail  0 0      (in /etc/fstab)

exit status: 0 mounted, 1 wrong usage, 2 system error, 8 interrupted, 32 not mounted
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mount.imagefs",
        usage="mount.imagefs STORE/NAME MOUNTPOINT [-f] [-o OPTION,…]",
        description=DESCRIPTION,
        epilog=OPTIONS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="STORE/NAME", help="the image: a path or a URL")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", help="a directory")
    parser.add_argument("-o", dest="options", metavar="OPTION,…", action="append", default=[], help="see below")
    parser.add_argument("-f", dest="foreground", action="store_true", help="stay in the foreground; log to stderr")
    parser.add_argument("-v", dest="verbose", action="store_true", help="with -f: say more")
    for flag in ("-n", "-s"):
        parser.add_argument(flag, dest="ignored", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-t", dest="type", metavar="TYPE", help=argparse.SUPPRESS)
    parser.add_argument("-N", dest="namespace", metavar="NAMESPACE", help=argparse.SUPPRESS)
    parser.add_argument("--version", action=ShowVersion)
    return parser


def main(argv: list[str] | None = None, *, session: Session | None = None) -> int:
    """Returns the exit status as mount(8) defines it. ``session`` opens images in another way than usual."""
    try:
        args = _parser().parse_args(argv)
        if args.namespace is not None:
            raise UsageError("-N is not supported: enter the namespace first (nsenter -m)")
        options = MountOptions()
        for text in args.options:
            options = parse_options(text, options)
        if args.foreground:
            mount_in_foreground(args.source, args.mountpoint, options, verbose=args.verbose, session=session)
        else:
            mount_as_daemon(args.source, args.mountpoint, options, session=session)
    except UsageError as error:
        return _fail(USAGE, f"{error}; see mount.imagefs --help")
    except ImagefsError as error:
        return _fail(FAILED, str(error))
    except OSError as error:
        return _fail(SYSTEM, error.strerror or str(error))
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "interrupted")
    return OK


def _fail(status: int, message: str) -> int:
    print(f"mount.imagefs: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
