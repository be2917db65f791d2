"""What the tests of limits, faults and administration share: odd servers, commands run here, old logs."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import requests
from conftest import ROOT, Server, clean_environment

import monitor

LONG_AGO = "2020-01-31T09:30:00.000000Z"


def with_changes(statements: str) -> tuple[str, ...]:
    """The command of a server whose module is changed by `statements` before it starts."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import monitor\n{statements}\nmonitor.main()"
    return sys.executable, "-c", code


def changed(statements: str) -> type[Server]:
    """A Server with such changes."""
    return type("Changed", (Server,), {"command": with_changes(statements)})


@contextlib.contextmanager
def serving(kind: type[Server], database: Path | str, *options: str, **settings: str):
    """A server for a `with`; at its end it stops cleanly and has left no trace of a fault."""
    running = kind(database, *options, **settings)
    try:
        yield running
        status = 0 if running.process.poll() is not None else running.stop()
        assert status == 0, f"ended with {status}: {running.output}"
        assert "Traceback" not in running.output
    finally:
        if running.process.poll() is None:
            running.kill()
        running.session.close()


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    error: str

    @property
    def json(self):
        """The JSON that it printed, and nothing else."""
        return json.loads(self.out)


def command(*arguments: str, **settings: str) -> Ran:
    """Run `monitor ARGUMENTS` in this process, with these settings and no others."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("MONITOR_")}
    out, error, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, kept | settings, clear=True))
        stack.enter_context(mock.patch.object(sys, "argv", ["monitor", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(error))
        try:
            monitor.main()
        except SystemExit as end:
            status = end.code or 0
    return Ran(status, out.getvalue(), error.getvalue())


def on(server: Server, *arguments: str, **settings: str) -> Ran:
    """Run a command against a running server."""
    return command(*arguments, MONITOR_SERVER=server.url, **settings)


def at_rest(*arguments: str, **settings: str) -> Ran:
    """Run a command where no server answers."""
    return command(*arguments, **({"MONITOR_SERVER": "http://127.0.0.1:9"} | settings))


def one_sentence(text: str) -> bool:
    """Whether a text is one line for a person, and no trace of a fault."""
    lines = text.splitlines()
    return len(lines) == 1 and lines[0].startswith("monitor: ") and len(lines[0]) > 15


class Browser:
    """A browser as the server sees it: it keeps cookies, asks for pages and posts forms."""

    def __init__(self, server: Server):
        self.server, self.session = server, requests.Session()
        self.session.trust_env = False
        self.session.headers["Accept"] = "text/html"

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.session.close()

    def ask(self, method: str, path: str, **options) -> requests.Response:
        """One request; a redirect is an answer like any other."""
        address = self.server.url + path
        return self.session.request(method, address, allow_redirects=False, timeout=30, **options)

    def get(self, path: str, **options) -> requests.Response:
        """Ask for a page."""
        return self.ask("GET", path, **options)

    def submit(self, path: str, headers: dict[str, str] | None = None, **fields: str) -> requests.Response:
        """Post a form, as one of our pages does."""
        ours = {"Origin": self.server.url, "Sec-Fetch-Site": "same-origin"}
        return self.ask("POST", path, data=fields, headers=ours | (headers or {}))


@contextlib.contextmanager
def reading(server: Server, query: str = "", **headers: str):
    """The events of a stream, one after the other, for a `with`."""
    with server.follow(query, **headers) as follower, contextlib.closing(iter(follower)) as events:
        yield events


def next_of(events, count: int, *kinds: str) -> list[dict]:
    """The data of the next `count` events of some kinds; fewer when the stream ends."""
    found = []
    for kind, data, _ in events:
        if kind in kinds:
            found.append(data)
        if len(found) == count:
            break
    return found


def made_before(path: Path, count: int, size: int = 100, moment: str = LONG_AGO) -> dict:
    """Make a database with updates of long ago, in transactions of many; returns its task."""
    made = monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path), "MONITOR_REDACT": "off"}))
    workstream = json.loads(made.create(monitor.WORKSTREAM, {"name": "a workstream"}))
    task = json.loads(made.create(monitor.TASK, {"workstream_id": workstream["id"], "name": "a task"}))
    fields = {"source": "old", "kind": "old_kind", "tags": ["old"], "data": {"text": "x" * size}}

    def insert(t: monitor.Transaction) -> None:
        row = t.one(monitor.TASK, task["id"])
        for number in range(count):
            t.insert_update(row, fields | {"message": f"old news {number}"}, moment)

    made.store.write(insert)
    made.close()
    return task


def bytes_of(folder: Path) -> bytes:
    """All that the files of a folder hold."""
    return b"".join(file.read_bytes() for file in folder.iterdir() if file.is_file())


def in_terminal(*arguments: str, columns: int = 80, folder=None, **settings: str) -> Ran:
    """Run `monitor ARGUMENTS` as a process whose outputs are a terminal of that width, seen as one text."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "monitor.py"), *arguments],
        env=clean_environment(**({"TERM": "xterm-256color", "COLUMNS": ""} | settings)),
        cwd=folder,
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = b""
    with open(leader, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # EIO: nobody is left
        while part := terminal.read(65536):
            shown += part
    return Ran(process.wait(30), shown.decode().replace("\r\n", "\n"), "")


def columns_of(line: str) -> int:
    """How many columns of a terminal a line takes, without its colours."""
    width = 0
    for character in re.sub(r"\x1b\[[0-9;]*m", "", line):
        wide = unicodedata.east_asian_width(character) in "WF"
        width += 0 if unicodedata.combining(character) else 2 if wide else 1
    return width
