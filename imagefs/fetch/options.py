"""What a user can choose about fetching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Defaults are those of ``mount.imagefs``."""

    prefetch: Literal["none", "ws", "all"] = "all"
    """``none``: only what is read is fetched; ``ws``: and the recorded working set, before it is read; ``all``: and
    what lies beside a touch, and the rest of the image in the background."""
    timeout: float | None = None
    """Seconds until a read fails (``soft,timeo=``); None waits as long as it takes (``hard``)."""
    connections: int = 16
    """Requests in flight at most. Half of them, four at most, are kept for what someone waits for."""
