"""Servers that ignore, lie, stall or break off: each is told apart, and none is believed or waited for too long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from imagefs.errors import (
    AccessDeniedError,
    CorruptObjectError,
    MissingObjectError,
    StoreError,
    UnavailableError,
    is_worth_retrying,
)
from imagefs.store.http import HttpStore
from tests.store.scripted import Script, ScriptedServer, Visit

CORRUPT, MISSING, UNAVAILABLE = CorruptObjectError, MissingObjectError, UnavailableError

OK = "HTTP/1.1 200 OK\r\n"
PART = "HTTP/1.1 206 Partial Content\r\n"


@contextmanager
def served(
    script: Script, *, read_timeout: float = 5.0, slowest: int = 16 * 1024, connections: int = 1
) -> Iterator[tuple[HttpStore, ScriptedServer]]:
    """One connection, so that an answer that keeps its place in the pool blocks the next request for ever."""
    with (
        ScriptedServer(script) as server,
        closing(
            HttpStore(
                f"{server.url}/store",
                connect_timeout=read_timeout,
                read_timeout=read_timeout,
                slowest=slowest,
                connections=connections,
            )
        ) as store,
    ):
        yield store, server


COMPLETE = ("HTTP/1.1 204", "HTTP/1.1 304")

# What is asked: 10 bytes from byte 5 on, unless said otherwise. What comes, and what is made of it.
RANGE: list[tuple[str, str, type[StoreError], str]] = [
    ("Range ignored", f"{OK}Content-Length: 100\r\n\r\n" + "x" * 100, CORRUPT, "ignores Range"),
    ("Range ignored, no length", f"{OK}\r\n" + "x" * 100, CORRUPT, "ignores Range"),
    ("Range ignored, the length by chance", f"{OK}Content-Length: 10\r\n\r\n" + "x" * 10, CORRUPT, "ignores Range"),
    ("no Content-Range", f"{PART}Content-Length: 10\r\n\r\n" + "x" * 10, CORRUPT, "no valid Content-Range"),
    ("several ranges", f"{PART}Content-Type: multipart/byteranges; boundary=x\r\n\r\n", CORRUPT, "no valid Content-R"),
    ("garbage", f"{PART}Content-Range: bytes five-14/100\r\n\r\n", CORRUPT, "no valid Content-Range: 'bytes five-14"),
    ("another unit", f"{PART}Content-Range: pages 5-14/100\r\n\r\n", CORRUPT, "no valid Content-Range"),
    ("unsatisfied", f"{PART}Content-Range: bytes */100\r\n\r\n", CORRUPT, "no valid Content-Range"),
    ("another start", f"{PART}Content-Range: bytes 0-9/100\r\n\r\n" + "x" * 10, CORRUPT, "range 0-9 instead of 5-14"),
    ("longer", f"{PART}Content-Range: bytes 5-15/100\r\n\r\n" + "x" * 11, CORRUPT, "range 5-15 instead of 5-14"),
    ("shorter", f"{PART}Content-Range: bytes 5-13/100\r\n\r\n" + "x" * 9, CORRUPT, "range 5-13 instead of 5-14"),
    ("object too short", f"{PART}Content-Range: bytes 5-13/14\r\n\r\n" + "x" * 9, CORRUPT, "ends at byte 14"),
    (
        "too short a length",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Length: 9\r\n\r\n" + "x" * 9,
        CORRUPT,
        "Content-Length is 9 for a range of 10 bytes",
    ),
    (
        "too long a length",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Length: 11\r\n\r\n" + "x" * 11,
        CORRUPT,
        "Content-Length is 11 for a range of 10 bytes",
    ),
    (
        "length no number",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Length: -1\r\n\r\n" + "x" * 10,
        CORRUPT,
        "Content-Length is no number: '-1'",
    ),
    (
        "two lengths",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Length: 10\r\nContent-Length: 11\r\n\r\n" + "x" * 11,
        CORRUPT,
        "contradict each other",
    ),
    (
        "broken off",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Length: 10\r\n\r\n" + "x" * 9,
        UNAVAILABLE,
        "broke off in the middle",
    ),
    ("ends early", f"{PART}Content-Range: bytes 5-14/100\r\n\r\n" + "x" * 9, CORRUPT, "sent 9 of 10 bytes"),
    ("does not end", f"{PART}Content-Range: bytes 5-14/100\r\n\r\n" + "x" * 11, CORRUPT, "sent more than 10 bytes"),
    (
        "chunked, broken off",
        f"{PART}Content-Range: bytes 5-14/100\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nxxxxxxxx\r\n2\r\nx",
        UNAVAILABLE,
        "broke off in the middle",
    ),
    (
        "chunked, too long",
        f"{PART}Content-Range: bytes 5-14/100\r\nTransfer-Encoding: chunked\r\n\r\nb\r\nxxxxxxxxxxx\r\n0\r\n\r\n",
        CORRUPT,
        "sent more than 10 bytes",
    ),
    (
        "compressed",
        f"{PART}Content-Range: bytes 5-14/100\r\nContent-Encoding: gzip\r\nContent-Length: 10\r\n\r\n" + "x" * 10,
        CORRUPT,
        "encoded the answer as 'gzip' although told not to",
    ),
    ("416", "HTTP/1.1 416 No\r\nContent-Range: bytes */7\r\nContent-Length: 0\r\n\r\n", CORRUPT, "ends at byte 7"),
    ("416, no length", "HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n", CORRUPT, "does not hold the range from byte 5"),
    (
        "416, without cause",
        "HTTP/1.1 416 No\r\nContent-Range: bytes */100\r\nContent-Length: 0\r\n\r\n",
        CORRUPT,
        "refuses a range that it says to have",
    ),
    ("404", "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nno!", MISSING, r"no such object \(HTTP 404\)"),
    ("404, endless page", "HTTP/1.1 404 Not Found\r\nContent-Length: 99999999\r\n\r\nno!", MISSING, "HTTP 404"),
    ("410", "HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n", MISSING, r"no such object \(HTTP 410\)"),
    ("401", "HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", AccessDeniedError, r"access denied \(HTTP 401\)"),
    ("403", "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n", AccessDeniedError, r"access denied \(HTTP 403\)"),
    ("429", "HTTP/1.1 429 Slow down\r\nContent-Length: 0\r\n\r\n", UNAVAILABLE, "the server answered HTTP 429"),
    ("500", "HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", UNAVAILABLE, "the server answered HTTP 500"),
    ("503", "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", UNAVAILABLE, "the server answered HTTP 503"),
    ("204", "HTTP/1.1 204 Empty\r\n\r\n", UNAVAILABLE, "the server answered HTTP 204"),
    ("304", "HTTP/1.1 304 Same\r\n\r\n", UNAVAILABLE, "the server answered HTTP 304"),
    ("no HTTP", "220 mail.example ESMTP\r\n", UNAVAILABLE, "the answer is not HTTP"),
    ("binary", "\x00\x01\x02\r\n\r\n", UNAVAILABLE, "the answer is not HTTP"),
    ("status no number", "HTTP/1.1 abc Hm\r\n\r\n", UNAVAILABLE, "the answer is not HTTP"),
    ("endless header", f"{OK}X: " + "x" * 100_000, UNAVAILABLE, "the answer is not HTTP"),
    ("too many headers", OK + "X: x\r\n" * 1000, UNAVAILABLE, "the answer is not HTTP"),
    ("nothing", "", UNAVAILABLE, "closed the connection without an answer"),
    ("half a header", f"{PART}Content-Range: by", CORRUPT, "no valid Content-Range"),
    ("redirected to nowhere", "HTTP/1.1 302 Go\r\nContent-Length: 0\r\n\r\n", UNAVAILABLE, "to something that is no U"),
    ("redirected to a file", "HTTP/1.1 302 Go\r\nLocation: file:///etc/passwd\r\n\r\n", UNAVAILABLE, "that is no URL"),
    ("redirected to garbage", "HTTP/1.1 302 Go\r\nLocation: http://[\r\n\r\n", UNAVAILABLE, "that is no URL"),
]


@pytest.mark.parametrize(("answer", "error", "message"), [case[1:] for case in RANGE], ids=[case[0] for case in RANGE])
def test_range(answer: str, error: type[StoreError], message: str) -> None:
    """Each answer on a new connection and on one that was used, and good ones in between: what is wrong with one answer
    does not reach the next."""

    def script(visit: Visit) -> None:
        if visit.path == "/store/good":
            visit.answer("206 Partial Content", "Content-Range: bytes 5-14/100\r\n", b"0123456789")
        else:
            visit.send(answer)
            # After a complete answer the client may use the connection again: closing it would race with that.
            visit.keep = answer.startswith(COMPLETE) or answer.endswith(("Content-Length: 0\r\n\r\n", "\r\n\r\nno!"))

    with served(script) as (store, server):
        for _ in range(2):
            with pytest.raises(error, match=message) as caught:
                store.get("bad", 5, 10)
            assert type(caught.value) is error
            assert str(caught.value).startswith(f"{server.url}/store: bad: ")
            assert "\n" not in str(caught.value)
            assert "0x" not in str(caught.value), "no repr of an object"
            assert is_worth_retrying(caught.value) == (error is not MISSING)
            assert store.get("good", 5, 10) == b"0123456789"
        assert store.statistics().errors == (0 if error is MISSING else 2)
        assert store.statistics().bytes_received == 20
        # Asked once each, whichever way it was read.
        assert store.statistics().requests == 4


WHOLE: list[tuple[str, str, type[StoreError], str]] = [
    (
        "206 without Range",
        f"{PART}Content-Range: bytes 0-9/10\r\nContent-Length: 10\r\n\r\n",
        CORRUPT,
        "no range was as",
    ),
    ("416 without Range", "HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n", UNAVAILABLE, "the server answered HTTP 416"),
    ("beyond the limit", f"{OK}Content-Length: 101\r\n\r\n", CORRUPT, "has 101 bytes, no more than 100 expected"),
    ("does not say", f"{OK}\r\nabc", CORRUPT, "does not say how long the object is"),
    ("broken off", f"{OK}Content-Length: 100\r\n\r\nabc", UNAVAILABLE, "broke off in the middle"),
    (
        "chunked, broken off",
        f"{OK}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
        UNAVAILABLE,
        "broke off in the middle",
    ),
    ("chunked, no number", f"{OK}Transfer-Encoding: chunked\r\n\r\nabc!\r\nabc", UNAVAILABLE, "broke off in the mid"),
    (
        "chunked, too long",
        f"{OK}Transfer-Encoding: chunked\r\n\r\n65\r\n{'x' * 101}\r\n0\r\n\r\n",
        CORRUPT,
        "more than 100",
    ),
    ("encoded", f"{OK}Content-Encoding: br\r\nContent-Length: 3\r\n\r\nabc", CORRUPT, "encoded the answer as 'br'"),
]


@pytest.mark.parametrize(("answer", "error", "message"), [case[1:] for case in WHOLE], ids=[case[0] for case in WHOLE])
def test_whole(answer: str, error: type[StoreError], message: str) -> None:
    def script(visit: Visit) -> None:
        visit.send(answer)
        visit.keep = answer.endswith("Content-Length: 0\r\n\r\n")

    with served(script) as (store, _):
        for _ in range(2):
            with pytest.raises(error, match=message):
                store.get("bad", limit=100)


GOOD: list[tuple[str, str, tuple[int, int | None], bytes]] = [
    (
        "whole, chunked",
        f"{OK}Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
        (0, None),
        b"abcde",
    ),
    ("whole, HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\nabc", (0, None), b"abc"),
    ("whole, named identity", f"{OK}Content-Encoding: identity\r\nContent-Length: 3\r\n\r\nabc", (0, None), b"abc"),
    ("range is all of it, 200", f"{OK}Content-Length: 3\r\n\r\nabc", (0, 3), b"abc"),
    ("total unknown", f"{PART}Content-Range: bytes 2-4/*\r\n\r\nabc", (2, 3), b"abc"),
    ("open range", f"{PART}Content-Range: bytes 2-4/5\r\nContent-Length: 3\r\n\r\nabc", (2, None), b"abc"),
    ("rest is empty", "HTTP/1.1 416 No\r\nContent-Range: bytes */5\r\nContent-Length: 2\r\n\r\nno", (5, None), b""),
    (
        "range, chunked",
        f"{PART}Content-Range: bytes 2-4/9\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
        (2, 3),
        b"abc",
    ),
    ("after 100 Continue", f"HTTP/1.1 100 Continue\r\n\r\n{OK}Content-Length: 3\r\n\r\nabc", (0, None), b"abc"),
]


@pytest.mark.parametrize(("answer", "span", "data"), [case[1:] for case in GOOD], ids=[case[0] for case in GOOD])
def test_odd_but_right(answer: str, span: tuple[int, int | None], data: bytes) -> None:
    def script(visit: Visit) -> None:
        visit.send(answer)
        visit.keep = closes not in answer

    # HTTP/1.0 closes after each answer; so does a body whose length nobody says.
    closes = "HTTP/1.0" if "HTTP/1.0" in answer else "/*"
    with served(script) as (store, server):
        assert [store.get("x", *span) for _ in range(3)] == [data] * 3
        assert store.statistics().errors == 0
        # An answer that was read to its end gives its connection back.
        assert server.connections == store.statistics().connections == (3 if closes in answer else 1)


def test_what_is_asked() -> None:
    with served(lambda visit: visit.answer("404 Not Found")) as (store, server):
        for span in ((0, None), (5, 10), (7, None)):
            with pytest.raises(MissingObjectError):
                store.get("objects/ab/abcd", *span)
        assert not store.has("x")
        assert [head.split("\r\n")[0] for head in server.heads] == [
            *["GET /store/objects/ab/abcd HTTP/1.1"] * 3,
            "HEAD /store/x HTTP/1.1",
        ]
        headers = [head.lower().split("\r\n")[1:-2] for head in server.heads]
        assert all("accept-encoding: identity" in lines for lines in headers)
        ranges = [[line for line in lines if line.startswith("range:")] for lines in headers]
        assert ranges == [[], ["range: bytes=5-14"], ["range: bytes=7-"], []]
        assert store.get("x", 5, 0) == b""
        assert len(server.heads) == 4
        assert server.connections == 1


def test_size() -> None:
    def script(visit: Visit) -> None:
        visit.send({"/store/x": f"{OK}Content-Length: 12345678901\r\n\r\n", "/store/y": f"{OK}\r\n"}[visit.path])
        visit.keep = True

    with served(script) as (store, server):
        assert store.size("x") == 12345678901
        with pytest.raises(CorruptObjectError, match="does not say how long"):
            store.size("y")
        assert server.connections == 1


ENDLESS: list[tuple[str, str, tuple[int, int | None]]] = [
    ("Range ignored", f"{OK}Content-Length: 99999999999\r\n\r\n", (0, 65536)),
    ("too long a body", f"{PART}Content-Range: bytes 5-65540/99999999999\r\n\r\n", (5, 65536)),
    ("chunked", f"{OK}Transfer-Encoding: chunked\r\n\r\n{2**40:x}\r\n", (0, None)),
    ("error page", "HTTP/1.1 404 Not Found\r\n\r\n", (0, None)),
    ("redirect", "HTTP/1.1 302 Found\r\nLocation: /store/gone\r\n\r\n", (0, None)),
]


@pytest.mark.parametrize(("answer", "span"), [case[1:] for case in ENDLESS], ids=[case[0] for case in ENDLESS])
def test_endless_body_is_not_taken_in(answer: str, span: tuple[int, int | None]) -> None:
    """The sender gets rid of no more than what socket buffers hold, then finds the client gone."""
    stopped: list[bool] = []

    def script(visit: Visit) -> None:
        if visit.path == "/store/gone":
            visit.answer("404 Not Found")
            return
        visit.send(answer)
        try:
            for _ in range(1000):
                visit.send(bytes(1024 * 1024))
        except OSError:
            stopped.append(True)
            raise

    with served(script) as (store, server):
        with pytest.raises((CorruptObjectError, MissingObjectError)):
            store.get("x", *span, limit=65536)
        assert not store.has("gone")
    assert stopped == [True]
    assert server.bytes_sent < 50 * 1024 * 1024


def trickle(head: str) -> Script:
    def script(visit: Visit) -> None:
        visit.send(head)
        while True:
            visit.send("x")
            visit.pause(0.02)

    return script


STALLS: list[tuple[str, Script]] = [
    ("no answer", Visit.wait_for_client_to_go),
    ("trickling status", trickle("")),
    ("trickling header", trickle(f"{PART}X: ")),
    ("trickling body", trickle(f"{PART}Content-Range: bytes 5-65540/99999\r\nContent-Length: 65536\r\n\r\n")),
    ("trickling redirect", trickle("HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 16000\r\n\r\n")),
    ("trickling error page", trickle("HTTP/1.1 500 Oh\r\nContent-Length: 16000\r\n\r\n")),
]


@pytest.mark.parametrize("script", [case[1] for case in STALLS], ids=[case[0] for case in STALLS])
def test_stall_ends_by_the_deadline(script: Script) -> None:
    """Each byte comes well within the socket's time limit: only the request's own deadline can end this."""
    with (
        served(script, read_timeout=0.2, slowest=1024 * 1024) as (store, _),
        pytest.raises(UnavailableError, match="no answer in time"),
    ):
        store.get("x", 5, 65536)


def test_silence_in_the_body() -> None:
    def script(visit: Visit) -> None:
        visit.send(f"{PART}Content-Range: bytes 5-14/99999\r\nContent-Length: 10\r\n\r\nxxx")
        visit.wait_for_client_to_go()

    with served(script, read_timeout=0.2) as (store, _), pytest.raises(UnavailableError, match="no answer in time"):
        store.get("x", 5, 10)


def test_reset() -> None:
    """The server reads half of the request and closes: its kernel answers the rest with a reset."""

    def script(visit: Visit) -> None:
        visit.send(f"{PART}Content-Range: bytes 5-1000004/9999999\r\nContent-Length: 1000000\r\n\r\nxxx")

    with served(script) as (store, _), pytest.raises(UnavailableError, match=r"broke off|reset"):
        store.get("x", 5, 1_000_000)


@pytest.mark.parametrize("make", [lambda path: path + "x", lambda path: path], ids=["growing", "circle"])
def test_redirects_without_end(make: Callable[[str], str]) -> None:
    def script(visit: Visit) -> None:
        visit.answer("301 Moved", f"Location: {make(visit.path)}\r\n", b"moved")

    with served(script) as (store, server):
        with pytest.raises(UnavailableError, match="redirected more than 5 times"):
            store.get("x")
        assert server.connections == 1
        assert store.statistics().requests == len(server.heads) == 6
