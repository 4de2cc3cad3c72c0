"""A QEMU that maps the mount's ``memory``, with the preloaded shim in it: what the doors mmap and pager share."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from imagefs.restore.door import Request, find_program
from imagefs.restore.incoming import incoming_of
from imagefs.restore.qemu_command import restore_command
from imagefs.restore.qemu_machine import list_machines
from imagefs.restore.shim import MEMORY, preload_path

log = logging.getLogger(__name__)


class MappingQemu(NamedTuple):
    """What is to be started."""

    program: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    """What QEMU's environment gets besides ours."""

    def for_shell(self, more: Mapping[str, str] | None = None) -> str:
        variables = {**self.environment, **(more or {})}
        words = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
        return " ".join([*words, shlex.join(self.arguments)])


def mapping_qemu(request: Request, *, is_paged: bool = False) -> MappingQemu:
    """Says in the log what the user may want to know. UsageError, RestoreError and MountError as
    :func:`restore_command` and :func:`incoming_of`."""
    image = request.image
    program = find_program(request)
    incoming = incoming_of(image.state)
    command = restore_command(request.command, image, incoming.value, lambda: list_machines(program), is_paged=is_paged)
    for note in command.notes:
        log.info("%s", note)
    if not incoming.runs:
        log.warning("%s: the guest was saved in a state that it stays in: 'cont' lets it go on", image.mountpoint)
    return MappingQemu(program, command.arguments, _environment(image.memory, os.environ))


def mapping_obstacle(request: Request) -> str | None:
    """Why QEMU cannot have the image's memory for itself; None if it can."""
    if not os.access(request.image.memory, os.R_OK):
        return f"{request.image.memory} cannot be read by this user"
    if any("vhost-user" in word for word in request.command):
        return "a vhost-user device needs memory that QEMU shares with another process"
    return None


def shim_obstacle() -> str | None:
    """Why the shim cannot be loaded into a VMM; None if it can."""
    shim = str(preload_path())
    if set(shim) & set(" :"):
        return f"{shim}: ld.so takes no path with a space or colon"
    return None


def _environment(memory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What QEMU's environment gets for the shim."""
    if obstacle := shim_obstacle():
        log.warning("%s, so the guest fetches more than it touches", obstacle)
        return {}
    preload = " ".join(filter(None, [str(preload_path()), environment.get("LD_PRELOAD")]))
    return {"LD_PRELOAD": preload, MEMORY: str(memory)}
