"""A real nginx on a free loopback port, serving one directory.

It runs as a single process of the user who starts it (``master_process off``), so that stores of mode 0700 can be
served, and so that one SIGKILL kills all of it: a killed nginx master leaves its worker, and the port, behind.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from support.uninterrupted import uninterrupted

_START_ATTEMPTS = 5
"""Another process may take the free port between our finding it and nginx binding it."""

_CONFIG = """
daemon off;
master_process off;
worker_processes 1;
pid "{work}/pid";
error_log "{work}/error.log" notice;
events {{ worker_connections 512; }}
http {{
    log_format requests escape=json '{{"method":"$request_method","path":"$uri","range":"$http_range",'
        '"status":$status,"bytes":$body_bytes_sent,"connection":$connection}}';
    access_log "{work}/access.log" requests;
    client_body_temp_path "{work}/body";
    proxy_temp_path "{work}/proxy";
    fastcgi_temp_path "{work}/fastcgi";
    uwsgi_temp_path "{work}/uwsgi";
    scgi_temp_path "{work}/scgi";
    types {{}}
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_timeout 75s;
    keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port};
        root "{root}";
        {server_config}
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the access log."""

    method: str
    path: str
    range: str
    """As sent, ``bytes=0-99``; empty without one."""
    status: int
    bytes: int
    """Of the body."""
    connection: int
    """nginx's serial number of the TCP connection."""


class Nginx:
    """nginx serving ``root``; a context manager that starts and ends it.

    ``server_config`` is put into its ``server`` block. :meth:`stop` and :meth:`start` keep the port.
    """

    def __init__(self, root: str | Path, server_config: str = "") -> None:
        self._root = Path(root).resolve()
        if any(c in str(self._root) for c in '"$\\\n'):
            raise ValueError(f"nginx cannot be given the path {str(self._root)!r}")
        self._server_config = server_config
        self._work = Path(tempfile.mkdtemp(prefix="imagefs-nginx-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        """0 until the first start."""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def root(self) -> Path:
        return self._root

    @property
    def url(self) -> str:
        """Of the served directory, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    def start(self, timeout: float = 10.0) -> None:
        """Start it and wait until it accepts connections; RuntimeError with nginx's own words if it does not."""
        if self._process is not None:
            raise RuntimeError("nginx runs already")
        attempts = 1 if self.port else _START_ATTEMPTS
        for attempt in range(attempts):
            port = self.port or _free_port()
            try:
                self._start(port, timeout)
            except RuntimeError as error:
                if "Address already in use" not in str(error) or attempt == attempts - 1:
                    raise
            else:
                self.port = port
                return

    def stop(self) -> None:
        """End it at once: requests under way are cut off, new connections are refused."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self._end(signal.SIGKILL)

    @uninterrupted()
    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._work, ignore_errors=True)

    def requests(self) -> list[Request]:
        """All requests that have ended so far, in that order. nginx logs one after its answer was sent."""
        try:
            lines = (self._work / "access.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [Request(**json.loads(line)) for line in lines if line.endswith("}")]

    def wait_for_requests(self, enough: Callable[[list[Request]], bool], timeout: float = 10.0) -> list[Request]:
        """The log as soon as ``enough`` says so; TimeoutError if it never does."""
        deadline = time.monotonic() + timeout
        while True:
            logged = self.requests()
            if enough(logged):
                return logged
            if time.monotonic() > deadline:
                raise TimeoutError(f"nginx logged {len(logged)} requests, not what was waited for")
            time.sleep(0.005)

    def _start(self, port: int, timeout: float) -> None:
        config = self._work / "nginx.conf"
        config.write_text(
            _CONFIG.format(work=self._work, root=self._root, port=port, server_config=self._server_config)
        )
        with uninterrupted():
            # A session of its own: Ctrl-C in the terminal goes to us, and we end it.
            process = subprocess.Popen(
                ["nginx", "-e", str(self._work / "error.log"), "-p", str(self._work), "-c", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._process = process
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            try:
                # Its pid file is written after it has bound: who else answers on the port is not it.
                if (self._work / "pid").read_text().strip() == str(process.pid):
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    return
            except (OSError, ValueError):
                pass
            time.sleep(0.005)
        self.kill()
        words = (self._work / "error.log").read_text().strip() if (self._work / "error.log").exists() else ""
        raise RuntimeError(f"nginx did not start on port {port}: {words}")

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        (self._work / "pid").unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
