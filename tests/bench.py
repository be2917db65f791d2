"""How fast Monitor is here: `python tests/bench.py [NAME ...] [--quick] [--million]` prints a table.

Real servers on temporary databases, asked over real sockets by processes of their own. Beside them, where it
tells something, a bare Flask app under the very same WSGI server: one route that parses JSON and answers it.
Whatever is compared runs in turn, A B A B, and the medians count: machines are shared and noisy. One part,
`soak`, measures no speed: it kills the server under load and counts what was lost or doubled.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import resource
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

import bench_load
import click
from bench_load import Readers, Server, Times, apart, get, pace, post, serving, timed, update


class Scale(NamedTuple):
    """How much is measured."""

    seconds: float = 3  # a round
    rounds: int = 5
    samples: int = 300
    readers: int = 1000
    burst: int = 2000
    stored: int = 100_000
    posted: tuple[int, ...] = (20_000, 100_000)
    soak: float = 180  # seconds


QUICK = Scale(0.2, 1, 20, 50, 200, 2000, (200, 400), 20)


class Row(NamedTuple):
    """One line of the table."""

    what: str
    measured: Any
    beside: Any = "-"
    ratio: Any = "-"
    reach: str = "-"


Rows = Iterator[Row]


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


BENCHES: dict[str, Callable[[Scale], Rows]] = {}


def bench(function: Callable[[Scale], Rows]) -> Callable[[Scale], Rows]:
    """Put a function that yields rows on the list, under its name."""
    BENCHES[function.__name__.replace("_", "-")] = function
    return function


@bench
def writes(scale: Scale) -> Rows:
    """Acknowledged, fsynced updates beside a bare Flask route."""
    with serving() as server, serving(bare=True) as bare:
        mine, plain = update(server.new_task()), update("1", path="/")
        for count in (1, 16, 64):
            before, posted = server.commits(), 20 if count == 1 else 100
            server.load(mine, count, 60, posted)()
            share = (server.commits() - before) / posted
            yield Row(
                f"{count} connections: fsyncs per 100 updates", f"{100 * share:.0f}", 100, f"{share:.2f}"
            )
        for count in (1, 16, 64):
            loads = server.load(mine, count, scale.seconds), bare.load(plain, count, scale.seconds)
            times, base = in_turn(scale.rounds, *loads)
            share = 100 * times.rate / base.rate
            reach = verdict(share, 45, ">= {} %") if count == 16 else "-"
            texts = [f"{some.rate:,.0f}/s, {some}" for some in (times, base)]
            yield Row(f"{count} connections: updates acknowledged", *texts, f"{share:.0f} %", reach)


@bench
def latency(scale: Scale) -> Rows:
    """What one client and one reader wait for, beside what cannot be avoided: a request and an fsync.

    At the same rhythm, for a disk and a processor that rest between two requests answer later.
    """
    with serving() as server, serving(bare=True) as bare, tempfile.TemporaryDirectory() as folder:
        task, plain = server.new_task(), update("1", path="/")
        one = (server.load(update(task), 1, 60, scale.samples), bare.load(plain, 1, 60, scale.samples))
        sync = functools.partial(sync_times, folder, 0.001, scale.samples)
        yield from unavoidable(
            "an update, one connection", in_turn(scale.rounds * 2, *one, sync), 1.5, "<= {} x"
        )
        seconds = scale.samples / 40
        rested = (
            lambda: steady(server, task, 40, seconds, 1).delivery,
            lambda: apart(pace, bare.port, lambda: plain, 40, seconds)(),
            functools.partial(sync_times, folder, 1 / 40, scale.samples // 2),
        )
        what = "POST to a reader of the stream, 40 a second"
        yield from unavoidable(what, in_turn(scale.rounds, *rested), 2, "< {} ms")


def unavoidable(what: str, times: list[Times], limit: float, text: str) -> Rows:
    """The rows for our times beside those of a bare route and of the disk."""
    mine, base, disk = times
    ratio = mine.p50 / (base.p50 + disk.p50)
    yield Row(f"{what}: one fsync of 4 KiB at that rhythm", disk)
    beside = f"bare route {base.p50:.2f} + fsync {disk.p50:.2f} ms"
    yield Row(what, mine, beside, f"{ratio:.2f}", verdict(mine.p50 if "ms" in text else ratio, limit, text))


def sync_times(folder: str, pause: float, count: int) -> Times:
    """Write and sync 4 KiB at a time into a file that has its size already, as a write-ahead log has."""
    delays, begin = [], time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        os.pwrite(file.fileno(), bytes(4096 * 100), 0)
        os.fsync(file.fileno())
        for turn in range(count):
            time.sleep(pause)
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


def steady(
    server: Server, task: str, rate: float, seconds: float, readers: int, socket: bool = False
) -> Steady:
    """Post updates at a steady rate to some readers of the stream, asking for /health meanwhile."""
    before, begin = server.memory(), time.monotonic()
    following = Readers(server.port, readers, socket=socket)
    writer = apart(pace, server.port, functools.partial(bench_load.stamped, task), rate, seconds)
    health = (
        apart(pace, server.port, functools.partial(get, "/health"), 50, seconds)() if readers > 1 else None
    )
    posted = writer().count
    memory = (server.memory() - before) * 1e6 / 1024 / readers
    return Steady(timed(following.finish(posted * readers, 10)[2], begin), health, memory)


@bench
def readers(scale: Scale) -> Rows:
    """Many readers of a steady stream, and what the rest of the server feels of it."""
    for rate in (10, 50):
        with serving() as server:
            task = server.new_task()
            one = steady(server, task, rate, scale.seconds, 1).delivery
            idle = apart(pace, server.port, functools.partial(get, "/health"), 50, scale.seconds)()
            mine, health, memory = steady(server, task, rate, scale.seconds * 4, scale.readers)
        name = f"{scale.readers:,} readers, {rate} updates/s:"
        reach = f"{verdict(mine.p50, 15, 'p50 < {} ms')}; {verdict(mine.p99, 50, 'p99 < {} ms')}"
        reach = reach if rate == 50 else "-"
        yield Row(f"{name} delivery", mine, f"one reader {one}", f"{mine.p50 / one.p50:.1f}", reach)
        reach, ratio = verdict(health.p99, 50, "p99 < {} ms"), f"{health.p99 / idle.p99:.1f}"
        yield Row(f"{name} /health meanwhile", health, f"idle {idle}", ratio, reach)
        yield Row(f"{name} memory", f"{memory:.1f} KiB a reader", reach=verdict(memory, 25, "< {} KiB"))


@bench
def sockets(scale: Scale) -> Rows:
    """Half as many readers, over a WebSocket each, beside the same number of streams."""
    readers, beside = scale.readers // 2, []
    for over_socket in (False, True):
        with serving() as server:
            beside.append(steady(server, server.new_task(), 50, scale.seconds * 4, readers, over_socket))
    stream, mine = beside
    name, ratio = f"{readers:,} WebSockets, 50 updates/s:", mine.delivery.p50 / stream.delivery.p50
    yield Row(f"{name} delivery", mine.delivery, f"streams {stream.delivery}", f"{ratio:.1f}")
    memory = f"streams {stream.memory:.1f} KiB a reader"
    yield Row(
        f"{name} memory", f"{mine.memory:.1f} KiB a reader", memory, f"{mine.memory / stream.memory:.1f}"
    )


@bench
def burst(scale: Scale) -> Rows:
    """Updates posted as fast as they are taken, to many readers; then as many who come late."""
    with serving() as server:
        request, expected = update(server.new_task()), scale.burst * scale.readers
        following = Readers(server.port, scale.readers)
        start = server.load(request, 16, 60, scale.burst)().begin
        live, late_start = following.finish(expected), time.monotonic()
        late = Readers(server.port, scale.readers, "?after_seq=2").finish(expected)
    what = f"{scale.burst:,} updates at once to {scale.readers:,} readers"
    for name, got, begin in ((what, live, start), (f"{what} who connect and catch up", late, late_start)):
        rate, missing = got[0] / (got[1] - begin), expected - got[0]
        text = f"{rate:,.0f} deliveries/s" + (f", {missing:,} missing" if missing else "")
        yield Row(name, text, reach=verdict(rate, 500_000, "> {}/s"))


@bench
def idle_readers(scale: Scale) -> Rows:
    """What readers that have nothing to read cost the writers."""
    with serving() as server, serving() as crowded:
        Readers(crowded.port, scale.readers, f"?task_id={crowded.new_task()}")
        loads = [some.load(update(some.new_task()), 16, scale.seconds) for some in (server, crowded)]
        alone, beside = in_turn(scale.rounds, *loads)
    texts = [f"{some.rate:,.0f}/s, {some}" for some in (beside, alone)]
    slower = 100 - 100 * beside.rate / alone.rate
    reach = verdict(slower, 15, "<= {} % slower")
    what = f"16 writers beside {scale.readers:,} readers of another task"
    yield Row(what, texts[0], f"alone {texts[1]}", f"{-slower:+.0f} %", reach)


# ----- a database of some size -----

DAYS = 30
SHARES = {  # field: how many, of what, how often each
    "kind": (1, {"tool_use": 50, "file_change": 20, "test_result": 20, "ci_run": 9, "decision": 0.1}),
    "level": (1, {"info": 88, "warn": 8, "error": 4}),
    "source": (1, {f"claude:session-{n}": 3 for n in range(300)} | {"github:acme/shop": 60, "manual": 10}),
    "tags": (2, {f"area-{n}": 1 for n in range(40)} | {"Edit": 40, "Bash": 30, "tests": 10, "rollback": 0.1}),
    "message": (10, {f"word{n}": 1 / (n + 1) for n in range(2000)} | {"zebra": 0.0002}),
}
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
    "any of two tags": "tag=tests&tag=Bash",
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
    tables = {
        name: (most, [*table], [*itertools.accumulate(table.values())])
        for name, (most, table) in SHARES.items()
    }
    for number in range(count):
        picked = {
            name: pick.choices(names, cum_weights=sums, k=most)
            for name, (most, names, sums) in tables.items()
        }
        fields = {name: found[0] for name, found in picked.items()}
        fields |= {"tags": sorted(set(picked["tags"])), "message": " ".join(picked["message"])}
        if number % 3 == 0:
            fields["data"] = {"tool_name": fields["kind"], "tool_input": {"command": fields["message"]}}
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
    make = lambda *what: json.loads(served.create(*what))["id"]  # noqa: E731
    streams = [make(monitor.WORKSTREAM, {"name": f"workstream {number}"}) for number in range(20)]
    fields = [{"workstream_id": streams[n % 20], "name": f"task {n}"} for n in range(task_count(count))]
    ids = [make(monitor.TASK, some) for some in fields]
    tasks, updates = served.store.read(lambda q: [q.one(monitor.TASK, id) for id in ids]), made_updates(count)

    def add(t: monitor.Transaction) -> None:
        for task, some, moment in itertools.islice(updates, 1000):
            t.insert_update(tasks[task], some, moment)

    label = f"Making a database with {count:,} updates"
    with click.progressbar(range(0, count, 1000), label=label, file=sys.stderr) as steps:
        for _ in steps:
            served.store.write(add)
    served.close()


@bench
def queries(scale: Scale) -> Rows:
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
            loads = [
                server.load(get(path + more), 1, seconds, scale.samples) for more in ("", "&total=false")
            ]
            mine, page = in_turn(1, *loads)
            yield Row(
                f"{scale.stored:,} updates: {name}", mine, f"total=false {page}", f"{mine.p50 / page.p50:.1f}"
            )
        busy = meanwhile()
    reach = verdict(busy.p99, 50, "p99 < {} ms")
    yield Row("/health during these", busy, f"idle {idle}", f"{busy.p99 / idle.p99:.1f}", reach)


@bench
def pages(scale: Scale) -> Rows:
    """The first page of each page."""
    with serving(filled(scale.stored)) as server, serving(bare=True) as bare:
        for path in ("/dashboard", "/tasks/1", "/stream"):
            asked = ((server, path), (bare, "/"))
            loads = [some.load(get(what), 1, scale.seconds / 5, scale.samples) for some, what in asked]
            mine, base = in_turn(scale.rounds, *loads)
            yield Row(
                f"{scale.stored:,} updates: {path}", mine, f"bare GET {base}", f"{mine.p50 / base.p50:.1f}"
            )


@bench
def memory(scale: Scale) -> Rows:
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
def start(scale: Scale) -> Rows:
    """From a command line to the first answer, and to the end of a client command."""
    answers = [functools.partial(first_answer, *what) for what in (("/health", False), ("/", True))]
    mine, base = (times.p50 for times in in_turn(scale.rounds * 2, *answers))
    what, reach = "serve, start to first answer", verdict(mine, 800)
    yield Row(what, f"{mine:.0f} ms", f"bare {base:.0f} ms", f"{mine / base:.2f}", reach)
    commands = [
        ("-c", "import monitor; monitor.main()", "task", "list"),
        (str(bench_load.ROOT / "monitor.py"), "task", "list"),
    ]
    commands += [("-c", "import click, http.client"), ("-c", "pass")]
    with serving() as server, tempfile.TemporaryDirectory() as cache:
        settings = {"PYTHONPATH": str(bench_load.ROOT), "PYTHONPYCACHEPREFIX": cache}
        settings["MONITOR_SERVER"] = f"http://127.0.0.1:{server.port}"
        runs = [functools.partial(run_time, *command, **settings) for command in commands]
        in_turn(1, *runs)  # compiles
        *both, imports, python = (times.p50 for times in in_turn(scale.rounds * 4, *runs))
        yield from client_commands(scale, settings, imports)
    beside = f"import click, http.client {imports:.0f} ms; python alone {python:.0f} ms"
    reaches = (verdict(both[0] / imports, 1.8, "< {} x"), "-")
    for name, took, reach in zip(("installed", "python monitor.py"), both, reaches, strict=True):
        yield Row(f"monitor task list, {name}", f"{took:.0f} ms", beside, f"{took / imports:.2f}", reach)


CLIENT_COMMANDS = ("--help", "status --short", "log hello --task 1", "task show 1", "search hello", "config")


def client_commands(scale: Scale, settings: dict[str, str], imports: float) -> Rows:
    """Each command of the client, start to exit."""
    script = "import monitor; monitor.main()"
    make = ("-c", script, "workstream", "create", "w")
    made = subprocess.run(
        [sys.executable, *make], env=bench_load.environment(**settings), capture_output=True, check=True
    )
    workstream = json.loads(made.stdout)["id"]
    run_time("-c", script, "task", "create", "t", "--workstream", workstream, **settings)
    runs = [functools.partial(run_time, "-c", script, *each.split(), **settings) for each in CLIENT_COMMANDS]
    for words, times in zip(CLIENT_COMMANDS, in_turn(scale.rounds * 2, *runs), strict=True):
        reach = verdict(times.p50 / imports, 2.2, "< {} x")
        yield Row(f"monitor {words}", f"{times.p50:.0f} ms", "", f"{times.p50 / imports:.2f}", reach)


@bench
def packed(scale: Scale) -> Rows:
    """The one file, where there is only Python: its size, start and memory; and what `monitor run` adds."""
    with tempfile.TemporaryDirectory() as folder:
        source, file = str(bench_load.ROOT / "monitor.py"), f"{folder}/monitor.pyz"
        run_time(source, "pack", "--output", file)
        sizes = []

        def answer() -> Times:
            begin = time.monotonic()
            server = Server(Path(folder, "monitor.db"), ("-S", file))
            server.ask(get("/health"))
            took = timed([(time.monotonic() - begin) * 1000], begin)
            sizes.append(server.memory())
            server.stop()
            return took

        mine, base = in_turn(scale.rounds, answer, functools.partial(first_answer, "/health", False))
        what = f"monitor.pyz, {os.path.getsize(file) / 1e6:.1f} MB: serve, start to first answer"
        beside = f"monitor.py under gevent {base.p50:.0f} ms"
        yield Row(what, f"{mine.p50:.0f} ms", beside, f"{mine.p50 / base.p50:.2f}")
        yield Row("monitor.pyz: memory, idle", f"{statistics.median(sizes):.1f} MB")
        with serving() as server:
            settings = {"MONITOR_SERVER": f"http://127.0.0.1:{server.port}", "MONITOR_SPOOL": folder}
            commands = [(*program, "task", "list") for program in (("-S", file), (source,))]
            commands += [(source, "run", "--task", server.new_task(), "true"), (source, "--version")]
            runs = [functools.partial(run_time, *command, **settings) for command in commands]
            listed, checkout, ran, least = (times.p50 for times in in_turn(scale.rounds * 3, *runs))
        beside = f"python monitor.py {checkout:.0f} ms"
        yield Row("monitor.pyz task list", f"{listed:.0f} ms", beside, f"{listed / checkout:.2f}")
        beside = f"monitor --version {least:.0f} ms"
        yield Row("monitor run true", f"{ran:.0f} ms", beside, f"{ran / least:.2f}")


@bench
def hooks(scale: Scale) -> Rows:
    """What an agent's hook costs: the installed line of shell, with the server up, off and hanging."""
    payload = json.dumps({"hook_event_name": "PostToolUse", "session_id": "s", "tool_name": "Bash"}).encode()
    with serving() as server, serving(bare=True) as bare, tempfile.TemporaryDirectory() as home:
        settings = {"HOME": home, "MONITOR_SPOOL": home + "/spool"}
        shown = [sys.executable, str(bench_load.ROOT / "monitor.py"), "hooks", "install", "claude", "--print"]
        block = subprocess.run(shown, env=bench_load.environment(**settings), capture_output=True, check=True)
        line = json.loads(block.stdout)["hooks"]["Stop"][0]["hooks"][0]["command"]
        hanging = socket.create_server(("127.0.0.1", 0))
        ports = {"up": server.port, "off": 9, "hanging": hanging.getsockname()[1]}
        runs = [
            functools.partial(
                shell_time, line, payload, **settings, MONITOR_SERVER=f"http://127.0.0.1:{port}"
            )
            for port in ports.values()
        ]
        plain = f"curl -s -m 2 -o /dev/null --data-binary @- http://127.0.0.1:{bare.port}/"
        runs += [functools.partial(shell_time, command, payload) for command in (plain, "true")]
        *some, curl, true = (times.p50 for times in in_turn(scale.rounds * 10, runs[0], runs[1], *runs[3:]))
        slow = in_turn(2, runs[2])[0].p50
        beside = f"curl to a bare route {curl:.0f} ms, true {true:.1f} ms"
        for name, took in zip(ports, [*some, slow], strict=True):
            reach = verdict(took, 2500) if name == "hanging" else "-"
            yield Row(f"a hook, server {name}", f"{took:.0f} ms", beside, f"{took / curl:.1f}", reach)
        call = functools.partial(post, "/api/hooks/claude", hook_event_name="PostToolUse", session_id="s")
        call = functools.partial(call, cwd="/", tool_name="Bash", tool_input={"command": "ls"})
        numbers, manual = itertools.count(), update(server.new_task())
        sent = (lambda: call(tool_use_id=str(next(numbers))), lambda: manual)
        seconds = scale.samples / 100
        pair = [lambda make=make: apart(pace, server.port, make, 100, seconds)() for make in sent]
        mine, base = in_turn(scale.rounds, *pair)
        yield Row("POST of a hook, 100 a second", mine, f"manual update {base}", f"{mine.p50 / base.p50:.2f}")


def shell_time(command: str, payload: bytes, **settings: str) -> Times:
    """The time from start to exit of a shell's command line, as an agent runs it."""
    begin = time.monotonic()
    environment = bench_load.environment(**settings)
    subprocess.run(["/bin/sh", "-c", command], input=payload, env=environment, check=False)
    return timed([(time.monotonic() - begin) * 1000], begin)


def first_answer(path: str, bare: bool) -> Times:
    """The time from starting a server to its first answer."""
    begin = time.monotonic()
    with serving(bare=bare) as server:
        server.ask(get(path))
        return timed([(time.monotonic() - begin) * 1000], begin)


def run_time(*arguments: str, **settings: str) -> Times:
    """The time from start to exit of a Python process."""
    begin, command = time.monotonic(), [sys.executable, *arguments]
    subprocess.run(command, env=bench_load.environment(**settings), check=True, stdout=subprocess.DEVNULL)
    return timed([(time.monotonic() - begin) * 1000], begin)


# ----- a soak: nothing acknowledged is lost or doubled, whatever becomes of the server -----

BROKEN = "**broken**"
TASKS, WRITERS = 4, 4
WARM = 3000  # updates of 5 KB, after which a server has all its buffers: the largest, of streams, holds 8 MiB
LEAK = 10  # MB that it may gain from then on
WATCHERS = (  # query of a stream, seconds that its reader takes for an event, what it must get
    ("", 0, "TRUE"),
    ("", 0, "TRUE"),
    ("", 0.02, "TRUE"),
    ("level=error", 0, "level = 'error'"),
    ("task_id=2", 0, "task = 2"),
    ("task_id=3&tag=a", 0.05, "task = 3 AND seq IN (SELECT seq FROM update_tags WHERE tag = 'a')"),
    ("source=nobody", 0, "FALSE"),
)


class Lives:
    """The servers of a soak, one after the other on the same file."""

    def __init__(self, database: Path):
        self.database, self.shared, self.statuses = database, bench_load.Shared.new(), []
        self.start()

    def start(self) -> None:
        """Start the next one."""
        self.server = Server(self.database)
        self.shared.port.value = self.server.port

    def end(self, kill: bool) -> None:
        """End this one; its exit status is -9 after a kill, 0 after a stop, and a fault otherwise."""
        self.shared.port.value = 0
        (self.server.kill if kill else self.server.stop)()
        self.statuses.append(self.server.process.returncode)

    def go_on(self, seconds: float) -> None:
        """Let the clients work for a while."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            count = self.shared.posted.value
            tell(f"soak: server {len(self.statuses) + 1}, {count:,} updates acknowledged ...")
            time.sleep(min(left, 0.2))

    def health(self) -> dict[str, Any]:
        """What this one says of itself."""
        return self.server.ask(get("/health?full=1"))


class Played(NamedTuple):
    """What a soak leaves besides its database."""

    statuses: list[int]  # with which the servers ended
    written: list[bench_load.Written]
    seen: list[bench_load.Seen]
    warm: float  # MB of the last server at work
    cold: float  # and when all clients are gone
    streams: int  # that it still counted then


def play(database: Path, seconds: float) -> Played:
    """Keep writers and readers at work while servers come and go. The last lives two fifths of the time."""
    lives, begin = Lives(database), time.monotonic()
    shared = lives.shared
    try:
        tasks = [lives.server.new_task() for _ in range(TASKS)]
        writers = [apart(bench_load.write_through, shared, f"writer {n}", tasks) for n in range(WRITERS)]
        readers = [apart(bench_load.read_through, shared, query, pause) for query, pause, _ in WATCHERS]
        while time.monotonic() < begin + seconds * 0.6:
            lives.go_on(random.uniform(0, seconds / 15))
            lives.end(kill=random.random() < 0.8)
            lives.start()
        begun = shared.posted.value
        lives.go_on(seconds * 0.2)
        while shared.posted.value < begun + WARM and time.monotonic() < begin + seconds + 60:
            lives.go_on(1)
        warm = lives.server.memory()
        lives.go_on(seconds * 0.2)
        shared.stop.set()
        written = [finish() for finish in writers]
        lives.go_on(1)  # what was given up may be on its way
        shared.goal.value = lives.health()["seq"]
        seen = [finish() for finish in readers]
        while (streams := lives.health()["streams"]) and time.monotonic() < begin + seconds + 60:
            lives.go_on(1)  # a stream without events is found dead by its second sign of life
        cold = lives.server.memory()
        lives.end(kill=False)
    finally:
        lives.server.process.kill()  # after a fault; one that has ended feels nothing
    return Played(lives.statuses, written, seen, warm, cold, streams)


def promise(*failures: Any) -> str:
    """What became of a promise that any of these would break."""
    return BROKEN if any(failures) else "kept"


@bench
def soak(scale: Scale) -> Rows:
    """Clients that never give up, and a server that is killed now and then."""
    with tempfile.TemporaryDirectory(prefix="monitor-bench-") as folder:
        database = Path(folder) / "monitor.db"
        played = play(database, scale.soak)
        ends = collections.Counter(played.statuses)
        odd = len(played.statuses) - ends[-9] - ends[0]
        text = f"{ends[-9]} ended by kill -9, {ends[0]} stopped, {odd} ended otherwise"
        yield Row(f"soak, {scale.soak:.0f} s: servers on one file", text, reach=promise(odd))
        with contextlib.closing(sqlite3.connect(database)) as db:
            yield from written_rows(db, played.written)
            yield from seen_rows(db, played.seen)
            (found,) = db.execute("PRAGMA integrity_check").fetchone()
        command = [sys.executable, str(bench_load.ROOT / "monitor.py"), "check", "--db", str(database)]
        checked = subprocess.run(command, env=bench_load.environment(), capture_output=True, check=False)
    name, text = "soak: integrity_check; exit status of monitor check", f"{found}; {checked.returncode}"
    yield Row(name, text, reach=promise(found != "ok", checked.returncode))
    gain, text = played.cold - played.warm, f"{played.cold:.1f} MB, {played.streams} streams"
    reach = promise(gain > LEAK, played.streams)
    beside = f"at work {played.warm:.1f} MB"
    yield Row("soak: memory, all clients gone", text, beside, f"{gain:+.1f} MB", reach)


def written_rows(db: sqlite3.Connection, written: list[bench_load.Written]) -> Rows:
    """What became of the updates of the writers, whose message is their key."""
    stored = db.execute("SELECT message, seq FROM update_messages").fetchall()
    acknowledged = {pair for writer in written for pair in writer.acknowledged.items()}
    lost, twice = len(acknowledged - {*stored}), len(stored) - len({key for key, _ in stored})
    retries, given_up = (sum(getattr(some, name) for some in written) for name in ("retries", "given_up"))
    text = f"{len(acknowledged):,}, {lost} lost"
    yield Row("soak: updates acknowledged", text, f"{retries} retries", reach=promise(lost))
    text = f"{len(stored):,}, {twice} twice"
    yield Row("soak: updates stored", text, f"{given_up} given up", reach=promise(twice))
    keys = db.execute("SELECT key, seq FROM idempotency_keys").fetchall()
    others, changed = len({*keys} ^ {*stored}), sum(writer.changed for writer in written)
    text = f"{len(keys):,}, {others} of another update, {changed} answered in two ways"
    yield Row("soak: Idempotency-Keys", text, reach=promise(others, changed))


def seen_rows(db: sqlite3.Connection, seen: list[bench_load.Seen]) -> Rows:
    """What each reader got of what it had to get."""
    for (query, pause, clause), reader in zip(WATCHERS, seen, strict=True):
        sql = f"SELECT seq, message FROM updates JOIN update_messages USING (seq) WHERE {clause}"
        due, got = {*db.execute(sql)}, {*reader.updates}
        twice = len(reader.updates) - len(got)
        falls = sum(one >= other for (one, _), (other, _) in itertools.pairwise(reader.updates))
        text = f"{len(due & got):,} of {len(due):,}, {len(got - due)} others, {twice} twice, {falls} late"
        beside = f"{reader.connections} connections, {reader.resets} resets"
        name = f"soak: {'slow ' if pause else ''}reader of {query or 'everything'}"
        yield Row(name, text, beside, reach=promise(due ^ got, twice, falls, reader.resets))


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
@click.option("--minutes", type=float, help="How long the soak is; 3 by default.")
@click.option("--bare-server", is_flag=True, hidden=True)
def main(
    names: tuple[str, ...], quick: bool, million: bool, minutes: float | None, bare_server: bool
) -> None:
    """Measure Monitor on this machine; without names everything. Fails when the soak breaks a promise."""
    if bare_server:
        return bench_load.serve_bare()
    if unknown := set(names) - BENCHES.keys():
        raise click.UsageError(f"no bench {', '.join(unknown)}; there are: {', '.join(BENCHES)}")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = ({"stored": 1_000_000} if million else {}) | ({"soak": minutes * 60} if minutes else {})
    scale, broken = (QUICK if quick else Scale())._replace(**wanted), False
    click.echo(f"{machine()}{' (quick: too short to judge by)' if quick else ''}\n")
    click.echo("| what | measured | beside it (baseline) | ratio | reach |\n|---|---|---|---|---|")
    for name in names or BENCHES:
        tell(f"{name} ...")
        for row in BENCHES[name](scale):
            tell("")
            click.echo(f"| {' | '.join(map(str, row))} |")
            broken |= row.reach == BROKEN
            tell(f"{name} ...")
    tell("")
    sys.exit(broken)


if __name__ == "__main__":
    main()
