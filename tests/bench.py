"""How fast Monitor is here: `python tests/bench.py [name ...] [--quick] [--million]` prints a Markdown table.

Real servers on temporary databases, asked over real sockets by processes of their own. Beside them, where it
tells something, a bare Flask app under the very same WSGI server: one route that parses JSON and answers it.
Whatever is compared runs in turn, A B A B, and the medians count: machines are shared and noisy.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import select
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FORK = multiprocessing.get_context("fork")
UPDATE_EVENT, SENT_AT = b"\nevent: update\n", re.compile(rb"sent at (\d{20})")
TAIL = 27  # one byte less than SENT_AT matches: what may begin in one piece and end in the next
READ_SIZE = 64 * 1024  # twice that costs three times as much a call


class Scale(NamedTuple):
    """How much is measured."""

    seconds: float  # a round
    rounds: int
    samples: int
    readers: int
    burst: int
    stored: int
    posted: tuple[int, ...]


FULL = Scale(3, 5, 300, 1000, 2000, 100_000, (20_000, 100_000))
QUICK = Scale(0.2, 1, 20, 50, 200, 2000, (200, 400))


class Times(NamedTuple):
    """What came of some requests, the times in milliseconds."""

    rate: float
    p50: float
    p99: float
    begin: float = 0.0
    count: int = 0

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f} ms, p99 {self.p99:.2f} ms"


class Row(NamedTuple):
    """One line of the table."""

    what: str
    measured: Any
    beside: Any = "-"
    ratio: Any = "-"
    reach: str = "-"


def timed(delays: list[float], begin: float) -> Times:
    """Times of requests that began at a monotonic time and end now."""
    delays = sorted(delays) or [float("nan")]
    p50, p99 = (delays[int(len(delays) * share)] for share in (0.5, 0.99))
    return Times(len(delays) / (time.monotonic() - begin), p50, p99, begin, len(delays))


def in_turn(rounds: int, *measures: Callable[[], Times]) -> list[Times]:
    """Take each measure once a round, A B A B; returns for each the medians over the rounds."""
    results = [[measure() for measure in measures] for _ in range(rounds)]
    return [
        Times(*map(statistics.median, zip(*column, strict=True))) for column in zip(*results, strict=True)
    ]


def verdict(value: float, limit: float, text: str = "< {} ms") -> str:
    """What is within reach, and whether it was: under a limit, or above one where the text says >."""
    met = value >= limit if ">" in text else value <= limit
    return f"{text.format(f'{limit:,g}')}: {'met' if met else '**missed**'}"


# ----- servers -----


class Server:
    """A server process on a free port: Monitor on a database, or the bare Flask app."""

    def __init__(self, database: Path | None):
        monitor = [str(ROOT / "monitor.py"), "serve", "--bind", "127.0.0.1:0", "--db", str(database)]
        command = [sys.executable, *(monitor if database else [__file__, "--bare-server"])]
        self.process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline().rpartition(":")[2])

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
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
        """A measure for in_turn: `load` in a process of its own."""
        return lambda: apart(load, self.port, request, connections, seconds, most)()


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
    size = int(re.search(rb"Content-Length: (\d+)", head)[1])
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
    """Readers of the stream, together in one process of their own; connected when this returns."""

    def __init__(self, port: int, count: int, query: str = ""):
        self._pipe, theirs = FORK.Pipe()
        FORK.Process(target=follow_streams, args=(theirs, port, count, query), daemon=True).start()
        theirs.close()
        self._pipe.recv()

    def finish(self, expected: int = 0, seconds: float = 60) -> tuple[int, float, list[float]]:
        """End them once they have got the expected updates, or time is over.

        Returns how many updates they got, when the last came, and the milliseconds that `stamped` ones took.
        """
        self._pipe.send((expected, time.monotonic() + seconds))
        return self._pipe.recv()


def follow_streams(pipe: Any, port: int, count: int, query: str) -> None:
    """The process of Readers: open the streams, say so, read until told to finish."""
    poll, lines = select.epoll(), {}
    for _ in range(count):
        line = connect(port)
        line.sendall(get("/api/stream" + query))
        lines[line.fileno()] = line
        poll.register(line.fileno(), select.EPOLLIN)
    greeted, got, last, delays, tails, until = 0, 0, 0.0, [], dict.fromkeys(lines, b""), None
    while until is None or (got < until[0] and time.monotonic() < until[1]):
        for number, _ in poll.poll(0.05):
            data = tails[number] + lines[number].recv(READ_SIZE)
            last = time.monotonic()
            tail = tails[number] = data[-TAIL:]
            got += data.count(UPDATE_EVENT) - tail.count(UPDATE_EVENT)
            if len(data) < 4096:  # what is longer is a burst, whose readers must do nothing but count
                delays += [last * 1000 - moment for moment in sent_times(data)]
            if greeted < count:
                greeted += b"event: hello" in data
                if greeted == count:
                    pipe.send("connected")
        until = pipe.recv() if pipe.poll() else until
    pipe.send((got, last, delays))


@functools.lru_cache(maxsize=64)
def sent_times(data: bytes) -> list[float]:
    """When the updates in a piece of a stream were sent; a thousand readers get the same piece."""
    return [int(found) / 1e6 for found in SENT_AT.findall(data)]


# ----- what is measured -----

BENCHES: dict[str, Callable[[Scale], Iterator[Row]]] = {}


def bench(function: Callable[[Scale], Iterator[Row]]) -> Callable[[Scale], Iterator[Row]]:
    """Put a function that yields rows on the list, under its name."""
    BENCHES[function.__name__.replace("_", "-")] = function
    return function


@bench
def writes(scale: Scale) -> Iterator[Row]:
    """Acknowledged, fsynced updates beside a bare Flask route."""
    with tempfile.TemporaryDirectory() as folder, serving(bare=True) as bare:
        with serving(Path(folder) / "monitor.db") as server:
            request, plain = update(server.new_task()), update("1", path="/")
            for count in (1, 16, 64):
                before, posted = commits(folder), 20 if count == 1 else 100
                server.load(request, count, 60, posted)()
                share = (commits(folder) - before) / posted
                yield Row(
                    f"{count} connections: fsyncs per 100 updates", f"{share:.0%}"[:-1], 100, f"{share:.2f}"
                )
            for count in (1, 16, 64):
                measures = [
                    server.load(request, count, scale.seconds),
                    bare.load(plain, count, scale.seconds),
                ]
                mine, base = in_turn(scale.rounds, *measures)
                ratio = mine.rate / base.rate
                reach = verdict(ratio * 100, 45, ">= {} %") if count == 16 else "-"
                texts = [f"{times.rate:,.0f}/s, {times}" for times in (mine, base)]
                yield Row(f"{count} connections: updates acknowledged", *texts, f"{ratio:.0%}", reach)


def commits(folder: str) -> int:
    """How many commits, each of one fsync, are in the write-ahead log: the last frame of one holds a size."""
    log = Path(folder, "monitor.db-wal").read_bytes()
    frame = 24 + int.from_bytes(log[8:12], "big")
    heads = [log[at : at + 16] for at in range(32, len(log), frame)]
    return sum(head[8:16] == log[16:24] and any(head[4:8]) for head in heads)


@bench
def lone_write(scale: Scale) -> Iterator[Row]:
    """What one client waits for, beside what cannot be avoided."""
    with serving() as server, serving(bare=True) as bare, tempfile.TemporaryDirectory() as folder:
        ours = server.load(update(server.new_task()), 1, 60, scale.samples)
        theirs = bare.load(update("1", path="/"), 1, 60, scale.samples)
        disk = functools.partial(sync_times, folder, scale.samples)
        mine, base, sync = in_turn(scale.rounds * 3, ours, theirs, disk)
    ratio = mine.p50 / (sync.p50 + base.p50)
    yield Row("one fsync of 4 KiB on this disk", sync)
    beside = f"fsync {sync.p50:.2f} + bare route {base.p50:.2f} ms"
    yield Row("an update, one connection", mine, beside, f"{ratio:.2f}", verdict(ratio, 1.5, "<= {} x"))


def sync_times(folder: str, count: int) -> Times:
    """Write and sync 4 KiB at a time into a file that has its size already, as a write-ahead log has."""
    delays, begin = [], time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096 * 100))
        os.fsync(file.fileno())
        for turn in range(count):
            start = time.monotonic()
            os.pwrite(file.fileno(), os.urandom(4096), turn % 100 * 4096)
            os.fdatasync(file.fileno())
            delays.append((time.monotonic() - start) * 1000)
    return timed(delays, begin)


class Steady(NamedTuple):
    """What came of a steady rate of updates: deliveries to readers, /health meanwhile, KiB a reader."""

    delivery: Times
    health: Times
    memory: float


def steady(server: Server, task: str, rate: float, seconds: float, readers: int) -> Steady:
    """Post updates at a steady rate to some readers of the stream, asking for /health meanwhile."""
    before, begin = server.memory(), time.monotonic()
    following = Readers(server.port, readers)
    writer = apart(pace, server.port, functools.partial(stamped, task), rate, seconds)
    health = apart(pace, server.port, functools.partial(get, "/health"), 50, seconds)()
    posted = writer().count
    memory = (server.memory() - before) * 1e6 / 1024 / readers
    return Steady(timed(following.finish(posted * readers, 10)[2], begin), health, memory)


@bench
def latency(scale: Scale) -> Iterator[Row]:
    """From POST to a reader of an idle server's stream."""
    seconds = scale.samples / 40
    with serving() as server, serving(bare=True) as bare:
        task, plain = server.new_task(), functools.partial(update, "1", path="/")
        ours = lambda: steady(server, task, 40, seconds, 1).delivery  # noqa: E731
        mine, base = in_turn(scale.rounds, ours, lambda: apart(pace, bare.port, plain, 40, seconds)())
    ratio, reach = f"{mine.p50 / base.p50:.1f}", verdict(mine.p50, 2)
    yield Row("POST to a reader of the stream, idle server", mine, f"bare POST {base}", ratio, reach)


@bench
def readers(scale: Scale) -> Iterator[Row]:
    """Many readers of a steady stream, and what the rest of the server feels of it."""
    for rate in (10, 50):
        with serving() as server:
            task = server.new_task()
            one = steady(server, task, rate, scale.seconds, 1)
            many = steady(server, task, rate, scale.seconds * 4, scale.readers)
        name, (mine, health, memory) = f"{scale.readers:,} readers, {rate} updates/s", many
        reach = f"{verdict(mine.p50, 15, 'p50 < {} ms')}; {verdict(mine.p99, 50, 'p99 < {} ms')}"
        ratio = f"{mine.p50 / one.delivery.p50:.1f}"
        yield Row(
            f"{name}: delivery", mine, f"one reader {one.delivery}", ratio, reach if rate == 50 else "-"
        )
        ratio, reach = f"{health.p99 / one.health.p99:.1f}", verdict(health.p99, 50, "p99 < {} ms")
        yield Row(f"{name}: /health meanwhile", health, f"one reader {one.health}", ratio, reach)
        yield Row(f"{name}: memory", f"{memory:.1f} KiB a reader", reach=verdict(memory, 25, "< {} KiB"))


@bench
def burst(scale: Scale) -> Iterator[Row]:
    """Updates posted as fast as they are taken, to many readers; then as many that come late."""
    with serving() as server:
        request, expected = update(server.new_task()), scale.burst * scale.readers
        following = Readers(server.port, scale.readers)
        start = server.load(request, 16, 60, scale.burst)().begin
        live, late_start = following.finish(expected), time.monotonic()
        late = Readers(server.port, scale.readers, "?after_seq=2").finish(expected)
    what = f"{scale.burst:,} updates at once to {scale.readers:,} readers"
    for name, got, begin in ((what, live, start), (what + " who connect and catch up", late, late_start)):
        rate, missing = got[0] / (got[1] - begin), expected - got[0]
        text = f"{rate:,.0f} deliveries/s" + (f", {missing:,} missing" if missing else "")
        yield Row(name, text, reach=verdict(rate, 500_000, "> {}/s"))


@bench
def idle_readers(scale: Scale) -> Iterator[Row]:
    """What readers that have nothing to read cost the writers."""
    with serving() as server, serving() as crowded:
        Readers(crowded.port, scale.readers, f"?task_id={crowded.new_task()}")
        measures = [
            running.load(update(running.new_task()), 16, scale.seconds) for running in (server, crowded)
        ]
        alone, beside = in_turn(scale.rounds, *measures)
    slower, texts = (
        1 - beside.rate / alone.rate,
        [f"{times.rate:,.0f}/s, {times}" for times in (beside, alone)],
    )
    reach = verdict(slower * 100, 15, "<= {} % slower")
    what = f"16 writers beside {scale.readers:,} readers of another task"
    yield Row(what, texts[0], f"alone {texts[1]}", f"{-slower:+.0%}", reach)


# ----- a database of some size -----

KINDS = {
    "tool_use": 50,
    "file_change": 20,
    "test_result": 10,
    "ci_job": 10,
    "ci_run": 5,
    "error": 1,
    "decision": 0.1,
}
TAGS = {f"area-{number}": 1 for number in range(40)} | {
    "Bash": 30,
    "Edit": 40,
    "tests": 10,
    "ci": 10,
    "rollback": 0.1,
}
LEVELS = {"info": 88, "warn": 8, "error": 4}
SOURCES = {f"claude:session-{number}": 3 for number in range(300)} | {"github:acme/shop": 60, "manual": 10}
WORDS = {f"word{number}": 1 / (number + 1) for number in range(2000)} | {"zebra": 0.0002}
DAYS = 30
QUESTIONS = {  # {names} are filled in
    "oldest page": "",
    "newest page": "order=desc",
    "a busy task": "task_id=1",
    "a quiet task": "task_id={quiet}",
    "a workstream": "workstream_id={workstream}",
    "a rare source": "source=manual",
    "a kind, half of all": "kind=tool_use",
    "a rare kind": "kind=decision",
    "level error": "level=error",
    "a frequent tag": "tag=Edit",
    "a rare tag": "tag=rollback",
    "any of two tags": "tag=tests&tag=ci",
    "the last day": "since={day}",
    "the last half": "since={half}",
    "a busy task and a kind": "task_id=1&kind=test_result",
    "search, most frequent word": "q=word0",
    "search, rare word": "q=zebra",
    "search, no such word": "q=unheard",
    "search, two words": "q=word3+word40",
    "search in a task": "q=word0&task_id=1",
}


def task_count(count: int) -> int:
    """How many tasks a database of that many updates has."""
    return min(1000, max(50, count // 200))


def made_updates(count: int) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(index of its task, its fields, its time) of a realistic mix of updates, the same every time."""
    pick, start = random.Random(1), datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=DAYS)
    shares = (KINDS, TAGS, LEVELS, SOURCES, WORDS)
    tables = [(list(table), list(itertools.accumulate(table.values()))) for table in shares]
    for number in range(count):
        counts = (1, 2, 1, 1, 10)
        picked = [
            pick.choices(names, cum_weights=sums, k=k)
            for (names, sums), k in zip(tables, counts, strict=True)
        ]
        (kind,), tags, (level,), (source,), words = picked
        fields = {
            "kind": kind,
            "tags": sorted(set(tags)),
            "level": level,
            "source": source,
            "message": " ".join(words),
        }
        if number % 3 == 0:
            fields["data"] = {"tool_name": tags[0], "tool_input": {"command": fields["message"]}}
        moment = start + datetime.timedelta(days=DAYS) * (number / count)
        yield int(task_count(count) * pick.random() ** 3), fields, moment.isoformat()[:26] + "Z"


@functools.cache
def filled(count: int) -> Path:
    """A database with that many updates, made once a run."""
    folder = tempfile.mkdtemp(prefix="monitor-bench-")
    atexit.register(shutil.rmtree, folder)
    apart(fill, Path(folder) / "monitor.db", count)()
    return Path(folder) / "monitor.db"


def fill(path: Path, count: int) -> None:
    """Make a database with that many updates, in process, a thousand a transaction."""
    import monitor

    served = monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path)}))
    streams = [
        json.loads(served.create(monitor.WORKSTREAM, {"name": f"workstream {number}"}))
        for number in range(20)
    ]
    for number in range(task_count(count)):
        served.create(monitor.TASK, {"workstream_id": streams[number % 20]["id"], "name": f"task {number}"})
    tasks = served.store.read(
        lambda q: [q.one(monitor.TASK, str(number + 1)) for number in range(task_count(count))]
    )
    updates = made_updates(count)

    def add(t: monitor.Transaction) -> None:
        for task, fields, moment in itertools.islice(updates, 1000):
            t.insert_update(tasks[task], fields, moment)

    label = f"Making a database with {count:,} updates"
    with click.progressbar(range(0, count, 1000), label=label, file=sys.stderr) as steps:
        for _ in steps:
            served.store.write(add)
    served.close()


@bench
def queries(scale: Scale) -> Iterator[Row]:
    """Lists, filters and searches in a database of some size, with the exact total and without."""
    now, seconds = datetime.datetime.now(datetime.UTC), scale.seconds / 10
    ago = {name: now - datetime.timedelta(days=days) for name, days in (("day", 1), ("half", DAYS / 2))}
    names = {name: quote(moment.isoformat()) for name, moment in ago.items()} | {
        "quiet": task_count(scale.stored)
    }
    with serving(filled(scale.stored)) as server:
        names["workstream"] = server.ask(get("/api/workstreams"))["items"][0]["id"]
        probe = functools.partial(apart, pace, server.port, functools.partial(get, "/health"), 50)
        idle, meanwhile = probe(scale.seconds)(), probe(len(QUESTIONS) * seconds * 2)
        for name, question in QUESTIONS.items():
            path = f"/api/updates?{question.format(**names)}"
            asked = [
                server.load(get(path + more), 1, seconds, scale.samples) for more in ("", "&total=false")
            ]
            mine, page = in_turn(1, *asked)
            yield Row(
                f"{scale.stored:,} updates: {name}", mine, f"total=false {page}", f"{mine.p50 / page.p50:.1f}"
            )
        busy = meanwhile()
    reach = verdict(busy.p99, 50, "p99 < {} ms")
    yield Row("/health during these", busy, f"idle {idle}", f"{busy.p99 / idle.p99:.1f}", reach)


@bench
def pages(scale: Scale) -> Iterator[Row]:
    """The first page of each page."""
    with serving(filled(scale.stored)) as server, serving(bare=True) as bare:
        for path in ("/dashboard", "/tasks/1", "/stream"):
            asked = ((server, path), (bare, "/"))
            measures = [
                running.load(get(path), 1, scale.seconds / 5, scale.samples) for running, path in asked
            ]
            mine, base = in_turn(scale.rounds, *measures)
            yield Row(
                f"{scale.stored:,} updates: {path}", mine, f"bare GET {base}", f"{mine.p50 / base.p50:.1f}"
            )


@bench
def memory(scale: Scale) -> Iterator[Row]:
    """The resident memory of a server, idle and after many updates."""
    with serving() as server, serving(bare=True) as bare:
        server.ask(get("/health"))
        bare.ask(get("/"))
        mine, base = server.memory(), bare.memory()
        reach = verdict(mine, 60, "< {} MB")
        yield Row("memory, idle", f"{mine:.1f} MB", f"bare {base:.1f} MB", f"{mine / base:.2f}", reach)
        request, done = update(server.new_task()), 0
        for goal in scale.posted:
            server.load(request, 16, 600, goal - done)()
            mine, done = server.memory(), goal
            yield Row(f"memory after {goal:,} updates", f"{mine:.1f} MB", reach=verdict(mine, 80, "< {} MB"))


@bench
def start(scale: Scale) -> Iterator[Row]:
    """From a command line to the first answer, and to the end of a client command."""
    answers = [functools.partial(first_answer, *what) for what in (("/health", False), ("/", True))]
    mine, base = (times.p50 for times in in_turn(scale.rounds * 2, *answers))
    what, reach = "serve, start to first answer", verdict(mine, 800)
    yield Row(what, f"{mine:.0f} ms", f"bare {base:.0f} ms", f"{mine / base:.2f}", reach)
    installed, script = ("-c", "import monitor; monitor.main()"), (str(ROOT / "monitor.py"),)
    commands = [(*program, "task", "list") for program in (installed, script)]
    commands += [("-c", "import click, requests"), ("-c", "pass")]
    with serving() as server, tempfile.TemporaryDirectory() as cache:
        settings = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": cache}
        settings["MONITOR_SERVER"] = f"http://127.0.0.1:{server.port}"
        runs = [functools.partial(run_time, *command, **settings) for command in commands]
        in_turn(1, *runs)  # compiles
        *both, imports, python = (times.p50 for times in in_turn(scale.rounds * 4, *runs))
    beside = f"import click, requests {imports:.0f} ms; python alone {python:.0f} ms"
    for name, took in zip(("installed", "python monitor.py"), both, strict=True):
        ratio = took / imports
        reach = verdict(ratio, 1.3, "< {} x") if name == "installed" else "-"
        yield Row(f"monitor task list, {name}", f"{took:.0f} ms", beside, f"{ratio:.2f}", reach)


def first_answer(path: str, bare: bool) -> Times:
    """The time from starting a server to its first answer."""
    begin = time.monotonic()
    with serving(bare=bare) as server:
        server.ask(get(path))
        return timed([(time.monotonic() - begin) * 1000], begin)


def run_time(*arguments: str, **settings: str) -> Times:
    """The time from start to exit of a Python process."""
    begin = time.monotonic()
    subprocess.run(
        [sys.executable, *arguments], env=environment(**settings), check=True, stdout=subprocess.DEVNULL
    )
    return timed([(time.monotonic() - begin) * 1000], begin)


# ----- the program -----


def machine() -> str:
    """What this was measured on."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = f"Python {platform.python_version()}, gevent {importlib.metadata.version('gevent')}"
    name = f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}"
    return f"{name}; {versions}, SQLite {sqlite3.sqlite_version}"


def tell(text: str) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Everything small: tries the program, measures little.")
@click.option("--million", is_flag=True, help="Queries and pages at 1,000,000 updates instead of 100,000.")
@click.option("--bare-server", is_flag=True, hidden=True)
def main(names: tuple[str, ...], quick: bool, million: bool, bare_server: bool) -> None:
    """Measure Monitor on this machine; without names everything."""
    if bare_server:
        return serve_bare()
    if unknown := set(names) - BENCHES.keys():
        raise click.UsageError(f"no bench {', '.join(unknown)}; there are: {', '.join(BENCHES)}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    scale = (QUICK if quick else FULL)._replace(**{"stored": 1_000_000} if million else {})
    click.echo(f"{machine()}{' (quick: too short to judge by)' if quick else ''}\n")
    click.echo("| what | measured | beside it (baseline) | ratio | reach |\n|---|---|---|---|---|")
    for name in names or BENCHES:
        tell(f"{name} ...")
        for row in BENCHES[name](scale):
            tell("")
            click.echo(f"| {' | '.join(map(str, row))} |")
            tell(f"{name} ...")
    tell("")


if __name__ == "__main__":
    main()
