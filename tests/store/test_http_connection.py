"""What surrounds a request: names, certificates, proxies, credentials, redirects between hosts."""

from __future__ import annotations

import base64
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from imagefs.errors import MissingObjectError, UnavailableError, UsageError
from imagefs.store.http import HttpStore
from tests.store.scripted import ScriptedServer, Visit

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def yes(visit: Visit) -> None:
    visit.answer(body=b"data")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed, for 127.0.0.1; certificate and key in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]
    names = ["-subj", "/CN=imagefs test", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-days", "2", *new_key, *names, "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("a") as file:
        file.write(Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(yes) as running:
        yield running


def test_https(tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(yes, tls) as server:
        with closing(HttpStore(server.url)) as store, pytest.raises(UnavailableError) as caught:
            store.get("x")
        assert str(caught.value) == f"{server.url}: x: TLS: self-signed certificate"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        with closing(HttpStore(server.url)) as store:
            assert [store.get("x") for _ in range(3)] == [b"data"] * 3
            assert store.statistics().connections == 1
        other_name = server.url.replace("127.0.0.1", "localhost")
        with closing(HttpStore(other_name)) as store, pytest.raises(UnavailableError, match=r"x: TLS: .*match"):
            store.get("x")


def test_trickle_over_tls(tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(visit: Visit) -> None:
        visit.send("HTTP/1.1 200 OK\r\nX: ")
        while True:
            visit.send("x")
            visit.pause(0.02)

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with (
        ScriptedServer(script, tls) as server,
        closing(HttpStore(server.url, connect_timeout=0.2, read_timeout=0.2)) as store,
        pytest.raises(UnavailableError, match="no answer in time"),
    ):
        store.get("x")


def test_no_tls_where_tls_is_asked_for(server: ScriptedServer) -> None:
    """The server waits for the end of a request that never comes in a form that it knows."""
    with (
        closing(HttpStore(server.url.replace("http:", "https:"), connect_timeout=0.2)) as store,
        pytest.raises(UnavailableError, match=r"x: (TLS|no answer|no connection)"),
    ):
        store.get("x")


def test_refused_and_unknown_host() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with closing(HttpStore(f"http://127.0.0.1:{port}")) as store, pytest.raises(UnavailableError) as caught:
        store.get("x")
    assert str(caught.value) == f"http://127.0.0.1:{port}: x: connection refused"
    with closing(HttpStore("http://no-such-host.invalid")) as store, pytest.raises(UnavailableError) as caught:
        store.get("x")
    assert "name cannot be resolved" in str(caught.value)


def test_connect_that_nobody_answers() -> None:
    """A full backlog: the kernel drops further SYNs, as a firewall would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        try:
            for sock in waiting:
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            port = listener.getsockname()[1]
            with (
                closing(HttpStore(f"http://127.0.0.1:{port}", connect_timeout=0.2, read_timeout=30)) as store,
                pytest.raises(UnavailableError, match="no connection in time"),
            ):
                store.get("x")
        finally:
            for sock in waiting:
                sock.close()


def test_loopback_needs_no_proxy(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for host in ("127.0.0.1", "localhost"):
        with closing(HttpStore(f"http://{host}:{server.port}")) as store:
            assert store.get("x") == b"data"


def test_proxy(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    with closing(HttpStore("http://store.invalid/images")) as store:
        assert [store.get("x") for _ in range(2)] == [b"data"] * 2
        assert store.statistics().connections == 1
    assert server.heads[0].startswith("GET http://store.invalid/images/x HTTP/1.1\r\n")
    monkeypatch.setenv("no_proxy", "store.invalid")
    with (
        closing(HttpStore("http://store.invalid/images")) as store,
        pytest.raises(UnavailableError, match="name cannot be resolved"),
    ):
        store.get("x")
    assert len(server.heads) == 2


def test_dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:hidden@127.0.0.1:1")
    with closing(HttpStore("http://store.invalid")) as store, pytest.raises(UnavailableError) as caught:
        store.get("x")
    assert str(caught.value) == "http://store.invalid: x: proxy: connection refused"


def basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def seen_credentials(server: ScriptedServer) -> list[str]:
    """Authorization of each request; empty where there was none."""
    lines = [
        [line for line in head.split("\r\n") if line.lower().startswith("authorization:")] for head in server.heads
    ]
    return [found[0].partition(":")[2].strip() if found else "" for found in lines]


def test_credentials_go_to_their_host_only(server: ScriptedServer) -> None:
    def elsewhere(visit: Visit) -> None:
        visit.answer("307 Elsewhere", f"Location: http://u:p@localhost:{server.port}{visit.path}\r\n")

    with ScriptedServer(elsewhere) as first:
        url = first.url.replace("http://", "http://me:top%20secret@")
        with closing(HttpStore(url)) as store:
            assert store.get("x") == b"data"
            assert store.origin == first.url
            assert "secret" not in repr(store)
        assert seen_credentials(first) == [basic("me:top secret")]
        assert seen_credentials(server) == [""]


def test_credentials_stay_on_their_host(server: ScriptedServer) -> None:
    def script(visit: Visit) -> None:
        if visit.path == "/x":
            visit.answer("301 Moved", "Location: /y\r\n")
        else:
            visit.answer("404 Not Found")

    with ScriptedServer(script) as running:
        url = running.url.replace("http://", "http://me:secret@")
        with closing(HttpStore(url)) as store, pytest.raises(MissingObjectError) as caught:
            store.get("x")
        assert "secret" not in str(caught.value)
        assert seen_credentials(running) == [basic("me:secret")] * 2


def test_netrc(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    with closing(HttpStore(server.url)) as store:
        store.get("x")
        (tmp_path / "netrc").unlink()
        store.get("x")
    assert seen_credentials(server) == [basic("me:secret")] * 2


def test_redirect_between_http_and_https(
    tls: ssl.SSLContext, certificate: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up, but not down."""

    def script(visit: Visit) -> None:
        if visit.path == "/up":
            visit.answer(body=b"data")
        else:
            visit.answer("302 Go", f"Location: {server.url}/x\r\n")

    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with ScriptedServer(script, tls) as secure:
        with closing(HttpStore(secure.url)) as store, pytest.raises(UnavailableError, match="https to http: refused"):
            store.get("down")
        assert server.heads == []
        with (
            ScriptedServer(lambda visit: visit.answer("302 Go", f"Location: {secure.url}/up\r\n")) as plain,
            closing(HttpStore(plain.url)) as store,
        ):
            assert store.get("anything") == b"data"


@pytest.mark.parametrize("url", ["ftp://host/x", "/path", "http://", "http://host/?q", "http://host/#f"])
def test_no_store(url: str) -> None:
    with pytest.raises(UsageError, match="not the URL of a store"):
        HttpStore(url)


def test_own_names_only(server: ScriptedServer) -> None:
    with closing(HttpStore(server.url)) as store:
        for call in (store.get, store.size, store.has, store.delete):
            with pytest.raises(UsageError):
                call("../x")
    assert server.heads == []
