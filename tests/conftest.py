"""Real servers for the tests: each is a process of its own, asked over real sockets."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FOLDER = tempfile.TemporaryDirectory(prefix="monitor-tests-")  # never the developer's own settings and state
os.environ |= {name: f"{FOLDER.name}/{name}" for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME")}


def clean_environment(**settings: str) -> dict[str, str]:
    """This process's environment without Monitor's settings, plus the given ones."""
    ours = ("MONITOR_", "CLAUDE", "CODEX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    # Never the developer's own hooks that wait for a server.
    return kept | {"PYTHONUNBUFFERED": "1", "COVERAGE_PROCESS_START": "", "MONITOR_SPOOL": "off"} | settings


# Started in the background of a script we ignore Ctrl-C, and so would all that we start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Server:
    """A `monitor serve` process on a free port, and a client for it."""

    # MONITOR_COMMAND tests a Monitor that is built already, as a black box: "python3 -S monitor.pyz".
    command = tuple(shlex.split(os.environ.get("MONITOR_COMMAND", "")))
    command = command or (sys.executable, str(ROOT / "monitor.py"))

    def __init__(self, database: Path | str, *options: str, port: int = 0, **settings: str):
        self.database, self.options, self.settings, self.port = database, options, settings, port
        self.output = ""
        self.session = requests.Session()
        self.session.trust_env = False
        self.start()

    def start(self) -> None:
        """Start it, or start it again on the same port and database."""
        arguments = ["serve", "--bind", f"127.0.0.1:{self.port}", "--db", str(self.database), *self.options]
        self.process = subprocess.Popen(
            [*self.command, *arguments],
            env=clean_environment(**self.settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first = self.process.stdout.readline()
        if " at http" not in first:
            raise RuntimeError(first + self.process.stdout.read())
        self.url = first.split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.output = first
        self.reader = threading.Thread(target=self._keep_output, args=(self.process.stdout,), daemon=True)
        self.reader.start()
        wait_until(lambda: socket.create_connection(("127.0.0.1", self.port), 1).close() is None)

    def _keep_output(self, stream) -> None:
        with stream:
            for line in stream:
                self.output += line

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self.reader.join()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop it with a signal; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(10)
        self.reader.join()
        self.session.close()
        return status

    def ask(self, method: str, path: str, body=None, **options) -> requests.Response:
        """Make a request; `body` is sent as JSON."""
        return self.session.request(method, self.url + path, json=body, timeout=30, **options)

    def get(self, path: str, **query) -> dict:
        """The JSON of a GET that succeeds."""
        response = self.ask("GET", path, params=query)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, **body) -> dict:
        """The JSON of a POST that creates."""
        response = self.ask("POST", path, body)
        assert response.status_code == 201, response.text
        return response.json()

    def new_task(self, name: str = "a task", workstream: str | None = None) -> dict:
        """A task, in a workstream of its own unless one is named."""
        workstream = workstream or self.post("/api/workstreams", name="a workstream")["id"]
        return self.post("/api/tasks", workstream_id=workstream, name=name)

    def say(self, task: dict, message: str, **fields) -> dict:
        """A manual update."""
        return self.post("/api/updates/manual", task_id=task["id"], message=message, **fields)

    def follow(self, query: str = "", **headers: str):
        """A reader of the stream, to be used in a `with`: see `Follower`."""
        return Follower(self, query, headers)


class Follower:
    """A plain SSE reader written from the standard: yields (event, data, id) as they come."""

    def __init__(self, server: Server, query: str = "", headers: dict[str, str] | None = None):
        self.session = requests.Session()
        self.session.trust_env = False
        address = f"{server.url}/api/stream{query}"
        self.response = self.session.get(address, headers=headers or {}, stream=True, timeout=30)
        self.last_id: str | None = None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.response.close()
        self.session.close()

    def __iter__(self):
        event, data, buffer = "message", [], b""
        for chunk in self.response.raw.stream(65536, decode_content=False):
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                field, _, value = line.decode().partition(":")
                value = value.removeprefix(" ")
                if not line and data:
                    yield event, json.loads("\n".join(data)), self.last_id
                if not line:
                    event, data = "message", []
                elif field == "event":
                    event = value
                elif field == "data":
                    data.append(value)
                elif field == "id":
                    self.last_id = value

    def take(self, count: int, *events: str) -> list[dict]:
        """The data of the next `count` events, of the named kinds where kinds are named."""
        found = []
        for event, data, _ in self:
            if not events or event in events:
                found.append(data)
            if len(found) == count:
                return found
        return found


def wait_until(condition, seconds: float = 10.0):
    """Wait for a condition to hold; returns what it returned. AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            value = condition()
            if value:
                return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for the tests that only add to it."""
    running = Server(tmp_path_factory.mktemp("server") / "monitor.db")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.output


@pytest.fixture
def fresh(tmp_path):
    """Makes servers with a database of their own: fresh(), fresh("--option", MONITOR_SETTING="value")."""
    started: list[Server] = []

    def start(*options: str, database: Path | str | None = None, **settings: str) -> Server:
        started.append(Server(database or tmp_path / "monitor.db", *options, **settings))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.stop()
        assert "Traceback" not in running.output


@pytest.fixture
def task(server):
    """A task of its own on the shared server."""
    return server.new_task()


@pytest.fixture
def answers_conform(monkeypatch):
    """Every answer that the test gets is one that the OpenAPI document tells of."""
    from contract import complaints

    ask = Server.ask

    def judged(server: Server, method: str, path: str, body=None, **options) -> requests.Response:
        response = ask(server, method, path, body, **options)
        if method not in ("HEAD", "OPTIONS") and not options.get("stream"):
            found = complaints(method, path, response)
            assert found == [], f"{method} {path}, {response.status_code}: {response.text[:500]}"
        return response

    monkeypatch.setattr(Server, "ask", judged)
