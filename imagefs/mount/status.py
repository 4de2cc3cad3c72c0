"""Reading a mount's status.json, for programs outside of the daemon."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from imagefs.errors import MountError

STATUS_FILE = ".imagefs/status.json"


def read_status(mountpoint: str | Path) -> dict[str, Any]:
    """The content of ``.imagefs/status.json``; MountError where no imagefs is mounted, or its daemon is gone."""
    try:
        text = Path(mountpoint, STATUS_FILE).read_text()
        content = json.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise MountError(f"{mountpoint}: not an imagefs mount") from None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            raise MountError(f"{mountpoint}: the daemon is gone; umount -l {mountpoint}, then mount it again") from None
        raise MountError(f"{mountpoint}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:
        raise MountError(f"{mountpoint}: not an imagefs mount: {STATUS_FILE} is not JSON") from None
    if not isinstance(content, dict) or "mount" not in content:
        raise MountError(f"{mountpoint}: not an imagefs mount: {STATUS_FILE} has no mount section")
    return content
