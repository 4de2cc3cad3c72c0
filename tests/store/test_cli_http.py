"""Commands on images behind an HTTP server that has not, will not, or cannot: one line that says what and where."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imagefs.cli import main
from imagefs.store.directory import DirectoryStore
from imagefs.store.serve import StoreServer
from imagefs.store.writer import write_image
from tests.unit.captures import capture_of, memory_of


class Refusing(BaseHTTPRequestHandler):
    """``/404/…`` is answered with 404, and so on."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(int(self.path.split("/")[1]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("command", ["info", "ls", "verify"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "no such object (HTTP 404)"),
        (403, "access denied (HTTP 403): check the server's permissions and the URL's credentials"),
        (401, "access denied (HTTP 401)"),
        (301, "redirected to something that is no URL"),
        (500, "the server answered HTTP 500"),
    ],
)
def test_refusals(refusing: str, capsys: pytest.CaptureFixture[str], command: str, status: int, message: str) -> None:
    assert main([command, f"{refusing}/{status}/vm1"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"imagefs {command}: {refusing}/{status}: vm1: ")
    assert message in err
    assert err.count("\n") == 1


def test_credentials_are_not_shown(refusing: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = refusing.replace("//", "//alice:secret@")
    assert main(["info", f"{url}/403/vm1"]) == 1
    assert "secret" not in capsys.readouterr().err


def test_a_store_instead_of_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(tmp_path / "store", create=True)
    write_image(store, "vm1", capture_of(memory_of(20, 1)))
    (tmp_path / "index.html").write_text("<html>\n")
    with StoreServer(tmp_path, ("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            for name in ("store", "store/", "nothing/vm1", "store/vm2", "index.html"):
                assert main(["info", f"{server.url}/{name}"]) == 1
                err = capsys.readouterr().err
                assert err.startswith(f"imagefs info: {server.url}"), name
                assert err.count("\n") == 1, name
            assert main(["info", f"{server.url}/store/vm1"]) == 0
        finally:
            server.shutdown()
            thread.join()
