"""``imagefs status``: what is shown of a status, and of a directory that has none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imagefs.cli.status import rows
from imagefs.errors import MountError
from imagefs.mount.counters import MountCounters
from imagefs.mount.options import MountOptions
from imagefs.mount.status import read_status


def sample(**mount: Any) -> dict[str, Any]:
    counters = MountCounters()
    counters.requests["read"] = 7
    return {
        "source": "http://host/store/vm1",
        "memory": {"pages": 65536, "page_size": 4096, "complete": False},
        "cache": {"kind": "disk", "path": "/c", "pages_present": 16384, "full": True},
        "fetch": {
            "requests": 10,
            "background_requests": 4,
            "payload_bytes": 3 << 20,
            "outages": 2,
            "corrupt": 0,
            "missing": 1,
            "store_answers": False,
            "round_trip_seconds": 0.04,
            "hedged_requests": 3,
            "bytes_per_second": 12e6,
            "queued": {"touch": 0, "sweep": 128},
            "in_flight": [request(i) for i in range(7)],
        },
        "mount": {"pid": 77, "options": MountOptions(soft=True, timeo=5).as_json(), **counters.statistics(), **mount},
    }


def test_a_working_set_is_shown() -> None:
    found = {"state": "streaming", "pages": 100, "pages_landed": 40, "bytes": 4 << 20, "bytes_received": 1 << 20}
    shown = dict(rows("/mnt/vm1", {**sample(), "working_set": {**found, "local_pages": 7}}))
    assert shown["recorded"] == "streaming: 40 of 100 pages, 1.0 MiB of 4.0 MiB; 7 pages recorded on this host"
    assert "recorded" not in dict(rows("/mnt/vm1", {**sample(), "working_set": {"state": "none", "local_pages": 0}}))


def request(number: int) -> dict[str, Any]:
    touch = number == 0
    return {
        "what": f"memory window {number}",
        "chunks": number + 1,
        "bytes": 26 << 10,
        "why": "touch" if touch else "sweep",
        "waiting": 2 if touch else 0,
        "again": touch,
        "seconds": 0.041,
    }


def test_rows() -> None:
    waits = {"waited": 5, "wait_p50": 0.045, "wait_p99": 1.5, "longest_stall": 2.0, "waiting": 3, "uptime": 3720.0}
    shown = dict(rows("/mnt/vm1", sample(**waits, errors={"read": 4})))
    assert shown["mounted"] == "at /mnt/vm1 for 1 h 2 min, soft, 5 s; daemon is process 77"
    assert shown["pages"] == "16384 of 65536 are here (25 % of 256 MiB)"
    assert shown["cache"] == "disk /c, full"
    assert shown["fetched"] == "3.0 MiB in 6 requests on demand, 4 in the background"
    assert (
        shown["store"]
        == "does not answer; trying again; 2 outages; 1 missing; 3 asked twice; 40 ms round trip; 11.4 MiB/s"
    )
    assert shown["in flight"].startswith(
        "7 (memory window 0, 26.0 KiB: touch, 2 waiting, asked twice, 41 ms; memory window 1 and 1 more, 26.0 KiB: sw"
    )
    assert shown["in flight"].endswith("; …); queued: 128 sweep")
    assert shown["reads"] == ("7, 0 bytes; 5 had to wait: p50 45 ms, p99 1.5 s, longest 2 s; 3 waiting now")
    assert shown["failed"] == "4 read; see the log"


def test_parts_that_are_not_there_are_left_out() -> None:
    status = sample()
    status["memory"]["complete"] = True
    del status["fetch"], status["cache"]
    shown = dict(rows("/mnt", status))
    assert list(shown) == ["image", "mounted", "pages", "reads"]
    assert shown["pages"] == "all 65536 are here (256 MiB)"


def test_read_status(tmp_path: Path) -> None:
    control = tmp_path / ".imagefs"
    for content, reason in (
        (None, "not an imagefs mount"),
        ("{", "is not JSON"),
        ("[]", "no mount"),
        ("{}", "no mount"),
    ):
        if content is not None:
            control.mkdir(exist_ok=True)
            (control / "status.json").write_text(content)
        with pytest.raises(MountError, match=reason):
            read_status(tmp_path)
    (control / "status.json").write_text(json.dumps(sample()))
    assert read_status(str(tmp_path))["mount"]["pid"] == 77
    with pytest.raises(MountError, match="not an imagefs mount"):
        read_status(control / "status.json")
