"""What a QEMU command line needs so that the guest can be sent to it: RAM that can be filled later, and a monitor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from imagefs.restore.qemu_options import Option, as_option, join_pieces, object_properties, size_text, split_pieces

_FILE, _SHARED, _PRIVATE = "memory-backend-file", "memory-backend-memfd", "memory-backend-ram"
_OF_FILES = frozenset(
    ("mem-path", "discard-data", "align", "pmem", "readonly", "rom", "offset", "prealloc", "prealloc-threads")
)
_MONITORS = frozenset(("mon", "monitor", "qmp", "qmp-pretty", "nodefaults"))


def anonymous_backend(given: str | None, name: str, size: int) -> Option:
    """The ``-object`` that holds guest RAM, under the id ``name``: the ``given`` one, if it is no file. A file becomes
    memory that is shared if the file was: other processes (vhost-user) may rely on that."""
    if given is None:
        return as_option("object", join_pieces([_PRIVATE, f"id={name}", f"size={size_text(size)}"]))
    properties = object_properties(given)
    shared = properties.get("share") in (True, "on", "yes", "true", "y")
    of_file = properties["qom-type"] == _FILE
    kind = (_SHARED if shared else _PRIVATE) if of_file else str(properties["qom-type"])
    left_out = {"id", "qom-type", *(_OF_FILES if of_file else ())}
    if given.startswith("{"):
        kept = {key: value for key, value in properties.items() if key not in left_out}
        return as_option("object", json.dumps({"qom-type": kind, "id": name, "size": size, **kept}))
    pieces = [piece for piece in split_pieces(given)[1:] if piece.partition("=")[0] not in left_out | {"size"}]
    return as_option("object", join_pieces([kind, f"id={name}", f"size={size_text(size)}", *pieces]))


def default_monitor(options: Sequence[Option]) -> Iterable[Option]:
    """The monitor that QEMU makes by itself, and no longer does once it is given one (QEMU's softmmu/vl.c)."""
    names = {option.name for option in options}
    if names & _MONITORS:
        return
    if "nographic" not in names:
        yield as_option("monitor", "vc")
    elif "serial" in names:
        yield as_option("monitor", "stdio")
    else:
        yield as_option("serial", "mon:stdio")
