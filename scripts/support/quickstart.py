"""``scripts/quickstart``: a real guest goes on, on this side of a slow link, before its memory has arrived.

Everything is real but the link: QEMU, Debian's kernel, nginx, FUSE. The guest fills memory with a pattern that it can
check; it is suspended, split and served; then it is resumed twice over the same link: from the mount, and the plain
way, by downloading the whole (compressed) save first. What is measured is what a user feels: the time until the guest
answers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from rich.console import Console
from rich.table import Table

from support.commands import CommandFailedError, run
from support.debian import GuestError
from support.guest import Guest, build_guest
from support.link import Link
from support.mounts import MountFailedError, mounted, unmount
from support.nginx import Nginx
from support.uninterrupted import uninterrupted
from support.vm import Vm, VmError

IMAGE = "vm1"
PATIENCE = 900.0
"""Seconds: upper bound for the slowest step on the slowest link that makes sense."""


@dataclass(frozen=True)
class Options:
    mbit: float = 100.0
    rtt_ms: float = 40.0
    memory_mib: int = 768
    fill_mib: int = 512
    kind: str = "mixed"
    mount_options: str = ""
    plain: bool = True


@dataclass(frozen=True)
class Resume:
    """One way to resume. Seconds from its first command; bytes that had crossed the link by then."""

    answer_seconds: float
    answer_bytes: int
    checked_seconds: float
    checked_bytes: int


@dataclass(frozen=True)
class Result:
    options: Options
    stored_bytes: int
    plain_bytes: int
    imagefs: Resume
    plain: Resume | None


class Closable(Protocol):
    def close(self) -> None:
        """Idempotent."""


Started = TypeVar("Started", bound=Closable)


class Quickstart:
    """The steps, in order; ``say`` is told what is going on."""

    def __init__(self, options: Options, work: Path, console: Console) -> None:
        self.options = options
        self.work = work
        self.store = work / "store"
        self._console = console
        self._started: list[Closable] = []

    def close(self) -> None:
        """Whatever was started ends, if it has not ended yet: Ctrl-C may come between a ``with`` and its close."""
        for started in reversed(self._started):
            started.close()
        unmount(self.work / "mnt")

    def run(self) -> Result:
        with self._step("building the test guest (Debian's cloud kernel and an initramfs)"):
            guest = build_guest(fill_mib=self.options.fill_mib, kind=self.options.kind)
        nonce, count = self._suspend(guest)
        with self._step("writing the plain save that the other way downloads"):
            plain = self._plain_save()
        stored = sum(p.stat().st_size for p in (self.store / "objects").rglob("*") if p.is_file())
        link = f"{self.options.mbit:g} Mbit/s, {self.options.rtt_ms:g} ms"
        with self._closing(lambda: Nginx(self.work)) as nginx:
            with self._step(f"resuming from the mount, over a link of {link}"):
                lazy = self._resume_mounted(guest, nginx, nonce, count)
            eager = None
            if self.options.plain:
                with self._step("the plain way: downloading everything over the same link, then resuming"):
                    eager = self._resume_plain(guest, nginx, plain, nonce, count)
        return Result(self.options, stored, plain.stat().st_size, lazy, eager)

    def _vm(self, guest: Guest, **more: object) -> Vm:
        return self._closing(lambda: Vm(guest, memory_mib=self.options.memory_mib, **more))  # type: ignore[arg-type]

    def _link(self, nginx: Nginx) -> Link:
        return self._closing(lambda: Link(nginx.address, self.options.mbit, self.options.rtt_ms))

    def _closing(self, make: Callable[[], Started]) -> Started:
        with uninterrupted():
            started = make()
            self._started.append(started)
        return started

    def _suspend(self, guest: Guest) -> tuple[str, int]:
        with ExitStack() as stack:
            with self._step(f"booting it; it fills {self.options.fill_mib} MiB with a pattern that it can check"):
                vm = stack.enter_context(self._vm(guest))
                vm.expect("FILLED", PATIENCE)
                nonce, count = vm.ping()
            with self._step("suspending it into a store"):
                run("imagefs", "suspend", "--qmp", str(vm.qmp_socket), str(self.store / IMAGE))
        return nonce, count

    def _plain_save(self) -> Path:
        plain = self.work / "vm1.save.zst"
        with mounted(str(self.store / IMAGE), self.work / "mnt", "nocache"):
            run("zstd", "-3", "-T2", "-q", str(self.work / "mnt" / "native"), "-o", str(plain))
        return plain

    def _resume_mounted(self, guest: Guest, nginx: Nginx, nonce: str, count: int) -> Resume:
        with self._link(nginx) as link:
            begun = time.monotonic()
            mountpoint = self.work / "mnt"
            options = f"cache={self.work / 'cache'}"
            if self.options.mount_options:
                options += f",{self.options.mount_options}"
            with mounted(f"{link.url}/store/{IMAGE}", mountpoint, options):
                vm = self._vm(guest, prefix=["imagefs", "restore", str(mountpoint), "--"])
                return self._await(vm, link, begun, nonce, count)

    def _resume_plain(self, guest: Guest, nginx: Nginx, plain: Path, nonce: str, count: int) -> Resume:
        with self._link(nginx) as link:
            begun = time.monotonic()
            command = f"curl -sSf {link.url}/{plain.name} | zstd -dc"
            vm = self._vm(guest, extra=["-incoming", f"exec:{command}"])
            return self._await(vm, link, begun, nonce, count)

    def _await(self, vm: Vm, link: Link, begun: float, nonce: str, count: int) -> Resume:
        with vm:
            # Not before: what is typed while QEMU loads the state is lost.
            vm.go_on(PATIENCE)
            seen, later = vm.ping(PATIENCE)
            answer_seconds, answer_bytes = time.monotonic() - begun, link.counters().bytes_down
            if seen != nonce or later < count:
                raise VmError(f"this is another guest: nonce {seen}, count {later}; it was {nonce}, {count}")
            answer = vm.ask("check", PATIENCE)
            if not answer.startswith("ok "):
                raise VmError(f"the guest's memory is not what it was: {answer}")
            return Resume(answer_seconds, answer_bytes, time.monotonic() - begun, link.counters().bytes_down)

    @contextmanager
    def _step(self, text: str) -> Iterator[None]:
        begun = time.monotonic()
        with self._console.status(f"{text} …"):
            yield
        self._console.print(f"[green]✓[/] {text} [dim]({time.monotonic() - begun:.1f} s)[/]", highlight=False)


def table(result: Result) -> Table:
    """What a user wants to know, beside each other."""
    out = Table(title=f"Resume over {result.options.mbit:g} Mbit/s, {result.options.rtt_ms:g} ms round trip")
    out.add_column("")
    out.add_column("imagefs", justify="right")
    out.add_column("download, then restore", justify="right")
    lazy, eager = result.imagefs, result.plain

    def row(label: str, mine: str, theirs: str) -> None:
        out.add_row(label, mine, theirs if eager is not None else "not tried")

    mib = 2**20
    row("size of RAM", f"{result.options.memory_mib} MiB", f"{result.options.memory_mib} MiB")
    row("bytes stored", f"{result.stored_bytes / mib:.1f} MiB", f"{result.plain_bytes / mib:.1f} MiB")
    share = 100 * lazy.answer_bytes / result.stored_bytes
    eager_bytes = 0 if eager is None else eager.answer_bytes
    row(
        "over the link at the first answer",
        f"{lazy.answer_bytes / mib:.1f} MiB ({share:.1f} %)",
        f"{eager_bytes / mib:.1f} MiB",
    )
    row("seconds to the first answer", f"{lazy.answer_seconds:.1f}", f"{eager.answer_seconds:.1f}" if eager else "")
    row(
        "seconds until all memory is checked",
        f"{lazy.checked_seconds:.1f}",
        f"{eager.checked_seconds:.1f}" if eager else "",
    )
    return out


def measure(options: Options, console: Console, directory: Path | None = None) -> Result:
    """Run all of it in a temporary directory, which is gone afterwards, whatever happens."""
    with uninterrupted():
        work = Path(tempfile.mkdtemp(prefix="imagefs-quickstart-", dir=directory))
    quickstart = Quickstart(options, work, console)
    try:
        return quickstart.run()
    finally:
        with uninterrupted():
            quickstart.close()
            # A mount that were still there must not be descended into.
            if not os.path.ismount(work / "mnt"):
                shutil.rmtree(work, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__.split("\n\n")[0])
    parser.add_argument("--mbit", type=float, default=100.0, help="bandwidth of the link, Mbit/s (default: 100)")
    parser.add_argument("--rtt", type=float, default=40.0, help="round trip of the link, ms (default: 40)")
    parser.add_argument("--memory", type=int, default=768, metavar="MIB", help="the guest's RAM (default: 768)")
    parser.add_argument("--fill", type=int, default=512, metavar="MIB", help="of it filled and checked (default: 512)")
    parser.add_argument("--options", default="", metavar="OPTS", help="more options for mount.imagefs -o")
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out the plain way, which takes long on slow links"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = Options(args.mbit, args.rtt, args.memory, args.fill, "mixed", args.options, not args.no_plain)
    try:
        result = measure(options, console)
    except (VmError, GuestError, CommandFailedError, MountFailedError) as error:
        console.print(f"quickstart: {error}", style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("quickstart: interrupted; everything is cleaned up")
        return 130
    if args.json:
        print(json.dumps(asdict(result)))
    else:
        Console().print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
