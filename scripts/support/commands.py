"""Commands that only fail if something is wrong here."""

from __future__ import annotations

import subprocess
from pathlib import Path


class CommandFailedError(Exception):
    """Says which command, and what it said."""


def run(*command: str, cwd: Path | None = None) -> str:
    """What the command prints. It is in a session of its own: Ctrl-C in the terminal is for us."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, start_new_session=True)
    except FileNotFoundError as error:
        raise CommandFailedError(f"{command[0]} is not installed") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-400:]
        raise CommandFailedError(f"{' '.join(command)} failed with status {done.returncode}: {said}")
    return done.stdout
