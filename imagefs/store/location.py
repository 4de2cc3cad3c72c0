"""``STORE/NAME``: how users name an image, alike for a path and for the URL of the same directory served."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from imagefs.errors import ReadOnlyStoreError, UsageError
from imagefs.store.base import READ_ONLY, RESERVED, Store, check_key, is_url, without_credentials
from imagefs.store.directory import DirectoryStore


@dataclass(frozen=True, slots=True)
class Location:
    """An image in a store. ``store_location`` is a path or a URL as the user gave it, credentials included."""

    store_location: str
    name: str

    def __str__(self) -> str:
        """For messages: without credentials."""
        separator = "" if self.store_location.endswith("/") else "/"
        return f"{without_credentials(self.store_location)}{separator}{self.name}"

    def __repr__(self) -> str:
        return f"Location({str(self)!r})"


def parse_location(text: str) -> Location:
    """``STORE/NAME`` taken apart; UsageError with what is wrong with it.

    The name is the last component; a name alone is in the store of the current directory (``vm1`` is ``./vm1``).
    Slashes at the end don't matter.
    """
    stripped = text.rstrip("/")
    if is_url(text):
        _check_url(text)
        head, _, name = stripped.rpartition("/")
        if head.endswith("/") and not urlsplit(head).netloc:
            raise UsageError(f"{without_credentials(text)}: no image named; use {without_credentials(stripped)}/NAME")
        store = head.rstrip("/")
    else:
        head, slash, name = stripped.rpartition("/")
        store = head.rstrip("/") or ("/" if slash else ".")
    return Location(store, _check_name(name, text))


def open_store(location: Location | str, write: bool = False, *, connections: int = 16) -> Store:
    """The store of a location, or at a path or URL. With ``write``, a directory that is missing is created.

    ``connections`` bounds the open connections to a server. Raises UsageError where there is no such directory,
    ReadOnlyStoreError when asked to write to a server. A server is not contacted yet.
    """
    store_location = location.store_location if isinstance(location, Location) else location
    if not is_url(store_location):
        return DirectoryStore(store_location, create=write)
    _check_url(store_location)
    if write:
        raise ReadOnlyStoreError(
            READ_ONLY,
            key=location.name if isinstance(location, Location) else ".",
            origin=without_credentials(store_location),
        )
    # Here, because importing requests takes longer than most commands on a directory.
    from imagefs.store.http import HttpStore

    return HttpStore(store_location, connections=connections)


def _check_url(text: str) -> None:
    shown = without_credentials(text)
    try:
        parts = urlsplit(text)
        host = parts.hostname
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{shown}: not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise UsageError(f"{shown}: a store is a path or an http or https URL, not {parts.scheme}://")
    if not host:
        raise UsageError(f"{shown}: the URL has no host")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise UsageError(f"{shown}: a store's URL has no query (?…) and no fragment (#…)")


def _check_name(name: str, text: str) -> str:
    where = without_credentials(text)
    if not name:
        raise UsageError(f"{where!r}: no image named; use STORE/NAME")
    try:
        check_key(name)
    except UsageError:
        message = f"{where}: {name!r} cannot be an image's name: letters, digits, '.', '_' and '-', no dot in front"
        raise UsageError(message) from None
    if name in RESERVED:
        raise UsageError(f"{where}: {name!r} is where the store keeps {RESERVED[name]}, not an image's name")
    return name
