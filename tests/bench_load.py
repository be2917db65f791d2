"""The servers of bench.py, and the clients that load them: raw sockets in processes of their own, so that no
client library is what is measured.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import multiprocessing
import os
import random
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FORK = multiprocessing.get_context("fork")
READ_SIZE = 64 * 1024  # twice that costs three times as much a call
SENT_AT = re.compile(rb"sent at (\d{20})")
GREETING, UPDATE_EVENT = b"event: hello", b"\nevent: update\n"
SOCKET_GREETING, SOCKET_UPDATE = b'"event":"hello"', b'"event":"update"'
TAIL = 27  # one byte less than SENT_AT matches: what may begin in one piece and end in the next


class Times(NamedTuple):
    """What came of some requests, the times in milliseconds."""

    rate: float
    p50: float
    p99: float
    begin: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} ms, p99 {self.p99:.2f} ms"


def timed(delays: list[float], begin: float) -> Times:
    """The Times of requests that began at a monotonic time and end now."""
    delays = sorted(delays) or [float("nan")]
    p50, p99 = (delays[int(len(delays) * share)] for share in (0.5, 0.99))
    return Times(len(delays) / (time.monotonic() - begin), p50, p99, begin, len(delays))


# ----- servers -----


class Server:
    """A server process on a free port: Monitor on a database, or the bare Flask app."""

    def __init__(self, database: Path | None, program: tuple[str, ...] = (str(ROOT / "monitor.py"),)):
        monitor = [*program, "serve", "--bind", "127.0.0.1:0", "--db", str(database)]
        command = [
            sys.executable,
            *(monitor if database else [str(ROOT / "tests" / "bench.py"), "--bare-server"]),
        ]
        self.process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        self.database = database
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()

    def kill(self) -> None:
        """End it as a crash does: kill -9."""
        self.process.kill()
        self.process.wait(30)
        self.process.stdout.close()

    def memory(self) -> float:
        """Its resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024 / 1e6

    def ask(self, request: bytes) -> dict[str, Any]:
        """The JSON of one answer."""
        with connect(self.port) as line:
            line.sendall(request)
            return json.loads(take_answer(line))

    def new_task(self) -> str:
        """The id of a task of its own."""
        workstream = self.ask(post("/api/workstreams", name="bench"))
        return self.ask(post("/api/tasks", workstream_id=workstream["id"], name="bench"))["id"]

    def load(
        self, request: bytes, connections: int, seconds: float, most: int = 10**9
    ) -> Callable[[], Times]:
        """A measure: so many connections kept busy, until the time or the count is over."""
        return lambda: apart(load, self.port, request, connections, seconds, most)()

    def commits(self) -> int:
        """How many commits, each of one fsync, its log holds: the last frame of one has a size in it."""
        log = Path(f"{self.database}-wal").read_bytes()
        frame = 24 + int.from_bytes(log[8:12], "big")
        heads = [log[at : at + 16] for at in range(32, len(log), frame)]
        return sum(head[8:16] == log[16:24] and any(head[4:8]) for head in heads)


@contextlib.contextmanager
def serving(database: Path | None = None, bare: bool = False) -> Iterator[Server]:
    """A running server, on an empty database unless one is given."""
    with tempfile.TemporaryDirectory(prefix="monitor-bench-") as folder:
        server = Server(None if bare else database or Path(folder) / "monitor.db")
        try:
            yield server
        finally:
            server.stop()


def environment(**settings: str) -> dict[str, str]:
    """This process's environment without Monitor's and Python's settings, plus the given ones."""
    ours = ("MONITOR_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | settings


def serve_bare() -> None:
    """The baseline: Flask under Monitor's own server, with routes that do nothing but JSON."""
    import monitor

    server = monitor.gevent_server if monitor.use_gevent() else monitor.thread_server
    import flask

    app = flask.Flask("bare", static_folder=None)
    app.add_url_rule("/", "read", lambda: {"status": "ok"})
    app.add_url_rule("/", "write", lambda: ({"fields": len(flask.request.get_json())}, 201), methods=["POST"])
    listener = monitor.listen("127.0.0.1", 0)
    print(f"bare at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server(listener, app, False)[0]()


# ----- clients, each in a process of its own -----


def apart(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """Start a function in a process of its own; returns the function that waits for its result."""
    mine, theirs = FORK.Pipe()
    FORK.Process(target=lambda: theirs.send(function(*arguments)), daemon=True).start()
    theirs.close()
    return mine.recv


def connect(port: int) -> socket.socket:
    """A connection to a server of ours."""
    line = socket.create_connection(("127.0.0.1", port), 30)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


def get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def open_stream(query: str) -> bytes:
    """The request for a stream."""
    return get("/api/stream" + query)


def open_socket(query: str) -> bytes:
    """The handshake of a WebSocket with its first message: to subscribe to all."""
    head = "GET /api/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    head += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    message = json.dumps({"op": "subscribe", "sub": "s"}).encode()
    return head.encode() + bytes([0x81, 0x80 | len(message), 0, 0, 0, 0]) + message


def post(path: str, **body: Any) -> bytes:
    """A POST request with a JSON body."""
    content = json.dumps(body)
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode()


def update(task: str, message: str = "Ran 218 tests in 14 s: all passed", path: str = "") -> bytes:
    """A request for an update such as agents make."""
    fields = {"kind": "test_result", "level": "info", "tags": ["tests", "pytest"]}
    return post(path or "/api/updates/manual", task_id=task, message=message, **fields)


def stamped(task: str) -> bytes:
    """A request for an update that tells when it was sent, on the clock that all processes share."""
    return update(task, f"sent at {time.monotonic_ns():020d}")


def take_answer(line: socket.socket) -> bytes:
    """The body of the next answer; RuntimeError unless it is a success."""
    data = line.recv(READ_SIZE)
    while data and b"\r\n\r\n" not in data:
        data += line.recv(READ_SIZE)
    head, _, body = data.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 20"):
        raise RuntimeError(data[:500])
    found = re.search(rb"Content-Length: (\d+)", head)  # a 204 has none
    size = int(found[1]) if found else 0
    while len(body) < size:
        body += line.recv(READ_SIZE)
    return body


def load(port: int, request: bytes, connections: int, seconds: float, most: int) -> Times:
    """Keep connections busy, each with one request after the other, until the time or the count is over."""
    lines = {line.fileno(): line for line in (connect(port) for _ in range(connections))}
    poll, delays, begin = select.epoll(), [], time.monotonic()
    sent = dict.fromkeys(lines, begin)
    for number, line in lines.items():
        poll.register(number, select.EPOLLIN)
        line.sendall(request)
    while sent:
        for number, _ in poll.poll(30):
            take_answer(lines[number])
            now = time.monotonic()
            delays.append((now - sent.pop(number)) * 1000)
            if now - begin < seconds and len(delays) + len(sent) < most:
                sent[number] = now
                lines[number].sendall(request)
    return timed(delays, begin)


def pace(port: int, make: Callable[[], bytes], rate: float, seconds: float) -> Times:
    """Ask at a steady rate over one connection."""
    delays, begin = [], time.monotonic()
    with connect(port) as line:
        for turn in range(int(rate * seconds)):
            time.sleep(max(0.0, begin + turn / rate - time.monotonic()))
            asked = time.monotonic()
            line.sendall(make())
            take_answer(line)
            delays.append((time.monotonic() - asked) * 1000)
    return timed(delays, begin)


class Readers:
    """Readers of the stream, or of a WebSocket each, together in one process of their own; connected when
    this returns."""

    def __init__(self, port: int, count: int, query: str = "", socket: bool = False):
        self._pipe, theirs = FORK.Pipe()
        way = (
            (open_socket, SOCKET_GREETING, SOCKET_UPDATE) if socket else (open_stream, GREETING, UPDATE_EVENT)
        )
        FORK.Process(target=follow_streams, args=(theirs, port, count, query, *way), daemon=True).start()
        theirs.close()
        self._pipe.recv()

    def finish(self, expected: int, seconds: float = 60) -> tuple[int, float, list[float]]:
        """End them once they have got the expected updates, or time is over.

        Returns how many updates they got, when the last came, and the milliseconds that `stamped` ones took.
        """
        self._pipe.send((expected, time.monotonic() + seconds))
        return self._pipe.recv()


def follow_streams(
    pipe: Any, port: int, count: int, query: str, opening: Callable, greeting: bytes, event: bytes
) -> None:
    """The process of Readers: open the streams, say so, read until told to finish."""
    poll, lines = select.epoll(), {}
    for _ in range(count):
        line = connect(port)
        line.sendall(opening(query))
        lines[line.fileno()] = line
        poll.register(line.fileno(), select.EPOLLIN)
    greeted, got, last, delays, tails, until = 0, 0, 0.0, [], dict.fromkeys(lines, b""), None
    while until is None or (got < until[0] and time.monotonic() < until[1]):
        for number, _ in poll.poll(0.05):
            data = tails[number] + lines[number].recv(READ_SIZE)
            last = time.monotonic()
            tail = tails[number] = data[-TAIL:]
            got += data.count(event) - tail.count(event)
            if len(data) < 4096:  # what is longer is a burst, whose readers must do nothing but count
                delays += [last * 1000 - moment for moment in sent_times(data)]
            if greeted < count:
                greeted += greeting in data
                if greeted == count:
                    pipe.send("connected")
        until = pipe.recv() if pipe.poll() else until
    pipe.send((got, last, delays))


@functools.lru_cache(maxsize=64)
def sent_times(data: bytes) -> list[float]:
    """When the updates in a piece of a stream were sent; a thousand readers get the same piece."""
    return [int(found) / 1e6 for found in SENT_AT.findall(data)]


# ----- the clients of a soak: they outlive the server -----

STUCK_SECONDS = 60  # a client that waits longer ends the soak


class Shared(NamedTuple):
    """What the processes of a soak tell each other."""

    port: Any  # the server's; 0 while there is none, for the kernel may connect a client to its own free port
    posted: Any  # how many updates were acknowledged
    stop: Any  # an event: writers end
    goal: Any  # readers end at this seq; 0 while it is not known

    @classmethod
    def new(cls) -> Shared:
        """Before anything has begun."""
        return cls(FORK.Value("i", 0), FORK.Value("q", 0), FORK.Event(), FORK.Value("q", 0))

    def connect(self) -> socket.socket:
        """A connection to the server of this moment, or to the next one."""
        deadline = time.monotonic() + STUCK_SECONDS
        while not self.port.value:
            if time.monotonic() > deadline:
                raise RuntimeError("no server came back")
            time.sleep(0.02)
        return connect(self.port.value)


class Line(http.client.HTTPConnection):
    """A connection that opens itself, whenever it is used, to the server of that moment or the next one."""

    def __init__(self, shared: Shared):
        super().__init__("127.0.0.1")
        self.connect = lambda: setattr(self, "sock", shared.connect())


class Written:
    """What a writer knows of its updates."""

    def __init__(self):
        self.acknowledged: dict[str, int] = {}  # key: seq
        self.given_up = self.retries = self.changed = 0


def write_through(shared: Shared, name: str, tasks: list[str]) -> Written:
    """Post updates in bursts until told to stop, each under a key of its own. A few are given up on the way:
    they may be stored, once. A few are sent again after their answer, which must be the same."""
    written, line, pick = Written(), Line(shared), random.Random(name)
    for number in itertools.count():
        key, way = f"{name}, {number}", pick.choices(("once", "again", "given up"), (96, 2, 2))[0]
        fields = {"task_id": pick.choice(tasks), "message": key, "tags": pick.sample("abcd", 2)}
        fields["level"] = pick.choices(("info", "error"), (9, 1))[0]
        fields["data"] = "x" * int(16_000 * pick.random() ** 2)
        if way == "given up":
            with contextlib.suppress(OSError, http.client.HTTPException):
                send(line, key, fields)
            line.close()
            written.given_up += 1
        else:
            written.acknowledged[key] = persist(line, key, fields, written)
        if way == "again":
            written.changed += persist(line, key, fields, written) != written.acknowledged[key]
        with shared.posted.get_lock():
            shared.posted.value += way != "given up"
        if shared.stop.wait(pick.choices((0, 0.01, 0.5), (50, 50, 1))[0]):
            return written


def send(line: Line, key: str, fields: dict[str, Any]) -> None:
    """Send an update under its key."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    line.request("POST", "/api/updates/manual", json.dumps(fields), headers)


def persist(line: Line, key: str, fields: dict[str, Any], written: Written) -> int:
    """Send an update, again and again, until it is acknowledged; returns its seq."""
    deadline = time.monotonic() + STUCK_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            send(line, key, fields)
            answer = line.getresponse()
            body = json.loads(answer.read())
            if answer.status in (200, 201):
                return body["seq"]
            if answer.status != 503:
                raise RuntimeError(f"{key} was answered {answer.status}: {body}")
        written.retries += 1
        line.close()
        time.sleep(0.05)
    raise RuntimeError(f"{key} was not acknowledged in {STUCK_SECONDS} s")


class Seen(NamedTuple):
    """What a reader of a soak got: (seq, message) of each update as it came; and how it fared."""

    updates: list[tuple[int, str]]
    connections: int
    resets: int


def read_through(shared: Shared, query: str, pause: float) -> Seen:
    """Follow the stream from its beginning to the goal, over many connections that each go on where the one
    before broke off. A slow reader pauses after every event until the goal is known."""
    updates, cursor, connections, resets, moved = [], 0, 0, 0, time.monotonic()
    while not 0 < shared.goal.value <= cursor and time.monotonic() < moved + STUCK_SECONDS:
        leave = time.monotonic() + random.uniform(0, 10)
        connections += 1
        with contextlib.suppress(OSError), shared.connect() as line:
            for seq, event, data in events(line, query, cursor):
                if seq:
                    cursor, moved = seq, time.monotonic()
                resets += event == "reset"
                updates += [(seq, data["message"])] if event == "update" else []
                time.sleep(0 if shared.goal.value else pause)
                if 0 < shared.goal.value <= cursor or time.monotonic() > leave:
                    break
        time.sleep(random.uniform(0, 0.5))
    return Seen(updates, connections, resets)


def events(line: socket.socket, query: str, cursor: int) -> Iterator[tuple[int, str, Any]]:
    """The whole events of a stream after a cursor, until it ends: id (0 for none), name, data. Nothing, twice
    a second, is an event without a name."""
    head = f"GET /api/stream?{query} HTTP/1.0\r\nHost: 127.0.0.1\r\nLast-Event-ID: {cursor}\r\n\r\n"
    line.sendall(head.encode())
    line.settimeout(0.5)
    data, rest = b"-", b""
    while data:
        try:
            data = line.recv(READ_SIZE)
        except TimeoutError:
            yield 0, "", None
        else:
            *blocks, rest = (rest + data).split(b"\n\n")
            for block in blocks:
                fields = dict(text.partition(": ")[::2] for text in block.decode().split("\n"))
                if "event" in fields:
                    yield int(fields.get("id", 0)), fields["event"], json.loads(fields["data"])
