"""The promises of the database: durable, closed to others, one writer, quick and exact answers."""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, Server, clean_environment, wait_until

import monitor


def read_updates(m: monitor.Monitor, wanted: dict) -> tuple[list[str], int | None]:
    """One page of updates for a cleaned query, and the total."""
    return m.store.read(lambda q: q.updates(q.filter(wanted), wanted))


@contextlib.contextmanager
def opened(path: Path | str | None):
    """A Monitor in this process on a database file."""
    made = monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path)}))
    try:
        made.open()
        yield made
    finally:
        made.close()


def new_task(m: monitor.Monitor, name: str = "a task", workstream: str | None = None) -> dict:
    """A task, in a workstream of its own unless one is named."""
    workstream = workstream or json.loads(m.create(monitor.WORKSTREAM, {"name": "a workstream"}))["id"]
    return json.loads(m.create(monitor.TASK, {"workstream_id": workstream, "name": name}))


def say(m: monitor.Monitor, task: dict, message: str, **fields) -> dict:
    """An update."""
    fields = {"source": "manual", "task_id": task["id"], "message": message} | fields
    return json.loads(m.add_update(fields)[0])


def log_of(m: monitor.Monitor) -> list[tuple[int, str]]:
    """The log: number and JSON."""
    return [tuple(row) for row in m.store.read(lambda q: q.rows("SELECT seq, body FROM log ORDER BY seq"))]


def assert_without_gaps(m: monitor.Monitor) -> None:
    """The log is numbered 1, 2, 3 ... up to its head."""
    head = m.store.read(lambda q: q.head()["seq"])
    assert [seq for seq, _ in log_of(m)] == list(range(1, head + 1))


@pytest.fixture
def path(tmp_path) -> Path:
    """Where a database of its own goes."""
    return tmp_path / "monitor.db"


@pytest.fixture
def m(path):
    """A Monitor on a database of its own."""
    with opened(path) as made:
        yield made


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, without locks."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.endswith(".lock")}


def execute(path: Path, *statements: str) -> list:
    """Run statements on a database file as another program would; returns the rows of the last one."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return [db.execute(statement).fetchall() for statement in statements][-1]


# --- the file -------------------------------------------------------------------------------------------


def test_what_was_acknowledged_survives_power_loss(m):
    """WAL with a sync at every commit; space can be given back; references are checked."""
    wanted = {"journal_mode": "wal", "synchronous": 2, "auto_vacuum": 2, "foreign_keys": 1}
    found = m.store.write(lambda t: {name: t.rows(f"PRAGMA {name}")[0][0] for name in wanted})
    assert found == wanted


def test_readers_cannot_write(m):
    """One connection writes: SQLite could corrupt a file in which two do."""
    for statement in ("UPDATE head SET seq = 99", "CREATE TABLE more (x)", "PRAGMA user_version = 99"):
        with pytest.raises(monitor.Problem, match="readonly"):
            m.store.read(lambda q, statement=statement: q.rows(statement))
    assert m.store.read(lambda q: q.head()["seq"]) == 0


def modes(folder: Path) -> dict[str, int]:
    """The permissions of the files in a folder."""
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


@pytest.mark.parametrize("before", ["missing", "empty", "database"])
def test_nobody_else_can_read_the_file(path, before):
    """Also where it was there already, open to all."""
    if before == "database":
        with opened(path) as m:
            new_task(m)
    if before != "missing":
        path.touch()
        path.chmod(0o666)
    with opened(path) as m:
        new_task(m)
        assert set(modes(path.parent)) >= {"monitor.db", "monitor.db-wal"}
        assert set(modes(path.parent).values()) == {0o600}


@pytest.mark.parametrize("name", ["a b.db", "what?.db", "no#1.db", "100%25.db", "ünï.db", "a&mode=ro"])
def test_the_file_has_the_name_that_was_given(tmp_path, name):
    """However it looks inside a URI."""
    with opened(tmp_path / name) as m:
        new_task(m)
        assert (tmp_path / name).stat().st_size > 0
    assert set(contents(tmp_path)) == {name}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_database_in_memory_is_a_private_file_gone_at_exit(fresh, number):
    """With its folder."""
    server = fresh(database="sqlite::memory:")
    server.new_task()
    wait_until(lambda: "database" in server.output)
    file = Path(re.search(r"database +(/\S+)", server.output)[1])
    assert file.stat().st_size > 0
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert server.stop(number) == 0
    assert not file.parent.exists()


def test_closing_leaves_one_file_with_everything(path):
    """The write-ahead log is folded in."""
    with opened(path) as m:
        said = say(m, new_task(m), "the last word")
    assert set(contents(path.parent)) == {"monitor.db"}
    assert said["message"] in execute(path, "SELECT body FROM log ORDER BY seq DESC LIMIT 1")[0][0]


# --- one process, and only on a file of ours ------------------------------------------------------------


def test_a_second_process_is_refused_in_a_sentence(fresh, path):
    """The first one does not notice."""
    server = fresh(database=path)
    task = server.new_task()
    command = [*Server.command, "serve", "--bind", "127.0.0.1:0", "--db", str(path)]
    second = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=20)
    assert second.returncode != 0
    assert second.stdout == ""
    assert re.fullmatch(r"[^\n]*another Monitor is using [^\n]*monitor\.db[^\n]*\n", second.stderr)
    assert server.say(task, "still here")["seq"] == 3


def refused(path: Path) -> str:
    """The sentence that refuses a file; the file and its folder are as before."""
    before = contents(path.parent)
    with pytest.raises(monitor.Problem) as problem:
        monitor.Store(str(path))
    assert problem.value.code == "server_misconfigured"
    assert str(path) in problem.value.message
    assert contents(path.parent) == before
    return problem.value.message


def test_a_newer_database_is_left_as_it_is(path):
    """An older program would not keep its promises."""
    with opened(path) as m:
        new_task(m)
    execute(path, "PRAGMA user_version = 99")
    assert "newer Monitor" in refused(path)


def test_a_newer_database_that_was_not_closed_is_left_as_it_is(path, tmp_path):
    """Its version still stands in the write-ahead log alone."""
    with opened(path) as m:
        m.store.write(lambda t: t.rows("PRAGMA user_version = 99"))
        (tmp_path / "crashed").mkdir()
        for name in ("monitor.db", "monitor.db-wal"):
            shutil.copy(tmp_path / name, tmp_path / "crashed" / name)
    copy = tmp_path / "crashed" / "monitor.db"
    before = contents(copy.parent)
    with pytest.raises(monitor.Problem, match="newer Monitor"):
        monitor.Store(str(copy))
    after = contents(copy.parent)
    assert {name: after[name] for name in before} == before


NO_DATABASES = {
    "short": b"hello",
    "text": b"a,b\n" * 5000,
    "zeros": b"\0" * 4096,
    "header": b"SQLite format 3\0" + b"\xff" * 4080,
    "image": b"\x89PNG\r\n\x1a\n" * 600,
}


@pytest.mark.parametrize("text", NO_DATABASES.values(), ids=NO_DATABASES)
def test_a_file_that_is_no_database_is_left_as_it_is(path, text):
    """Somebody mistyped a name."""
    path.write_bytes(text)
    refused(path)


@pytest.mark.parametrize("stamp", ["application_id = 0", "application_id = 1", "user_version = 1"])
@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_another_programs_database_is_left_as_it_is(path, stamp, journal):
    """Whatever version it gives itself."""
    execute(path, f"PRAGMA journal_mode = {journal}", "CREATE TABLE head (theirs)", f"PRAGMA {stamp}")
    assert "not a Monitor database" in refused(path)


def test_a_folder_and_a_name_in_no_folder_are_refused(tmp_path):
    """In a sentence that names them."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "missing" / "monitor.db"):
        with pytest.raises(monitor.Problem, match=re.escape(str(path))) as problem:
            monitor.Store(str(path))
        assert problem.value.code == "server_misconfigured"


def test_a_refused_file_can_be_opened_once_it_is_right(path):
    """The lock is let go."""
    path.write_bytes(b"not yet")
    refused(path)
    path.write_bytes(b"")
    with opened(path) as m:
        new_task(m)


# --- migrations -----------------------------------------------------------------------------------------


@pytest.fixture
def old(path):
    """A database of this version with something in it, and its log."""
    with opened(path) as m:
        say(m, new_task(m), "kept")
        return log_of(m)


def set_version(monkeypatch, *steps: str) -> None:
    """Pretend to be a later program, with a migration a step."""
    first = monitor.SCHEMA_VERSION + 1
    monkeypatch.setattr(monitor, "MIGRATIONS", dict(enumerate(steps, first)))
    monkeypatch.setattr(monitor, "SCHEMA_VERSION", first + len(steps) - 1)


def test_an_older_database_is_copied_beside_itself_and_brought_up(path, old, monkeypatch):
    """The copy is the old one, complete and private."""
    version = monitor.SCHEMA_VERSION
    steps = ("CREATE TABLE one (x); INSERT INTO one VALUES (';')", "ALTER TABLE one ADD COLUMN y DEFAULT 2;")
    set_version(monkeypatch, *steps)
    with opened(path) as m:
        assert log_of(m) == old
        assert [tuple(row) for row in m.store.read(lambda q: q.rows("SELECT * FROM one"))] == [(";", 2)]
        assert say(m, new_task(m), "goes on")["seq"] == len(old) + 3
    (copy,) = (file for file in path.parent.iterdir() if ".backup" in file.name)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert execute(copy, "PRAGMA user_version") == [(version,)]
    assert execute(copy, "SELECT seq, body FROM log ORDER BY seq") == old
    with opened(path):
        assert len([file for file in path.parent.iterdir() if ".backup" in file.name]) == 1


def test_a_database_of_version_1_gets_what_came_later(path):
    """The same schema as a fresh one; a task that is over has been so since it was last changed."""
    schema = "SELECT type, name, sql FROM sqlite_schema ORDER BY 1, 2"
    with opened(path) as m:
        task = new_task(m)
        done = json.loads(m.change(monitor.TASK, task["id"], {"status": "done"}))
    fresh = execute(path, schema)
    away = ["VIEW task_changes", "INDEX log_of_tasks", "TRIGGER task_status_changed"]
    older = [f"DROP {thing}" for thing in away]
    execute(path, *older, "ALTER TABLE tasks DROP COLUMN status_since", "PRAGMA user_version = 1")
    with opened(path) as m:
        assert m.store.read(lambda q: q.news_of_tasks())[task["id"]]["since"] == done["updated_at"]
        assert [row["old_status"] for row in m.store.read(lambda q: q.changes(1, 0, 10**9))] == ["active"]
        again = json.loads(m.change(monitor.TASK, task["id"], {"status": "active"}))
        assert m.store.read(lambda q: q.news_of_tasks())[task["id"]]["since"] == again["updated_at"]
    assert execute(path, schema) == fresh
    assert execute(path, "PRAGMA user_version") == [(monitor.SCHEMA_VERSION,)]


@pytest.mark.parametrize("good_steps", [0, 1])
def test_a_failed_migration_leaves_the_old_database(path, old, monkeypatch, good_steps):
    """All of it, and free: the program of before still works on it."""
    monkeypatch.setattr(monitor, "BUSY_SECONDS", 0.1)
    with monkeypatch.context() as patched:
        good = ["CREATE TABLE good (x)"] * good_steps
        set_version(patched, *good, "CREATE TABLE half (x); INSERT INTO no_such_table VALUES (1)")
        with pytest.raises(monitor.Problem, match="no_such_table"):
            monitor.Store(str(path))
    with opened(path) as m:
        assert log_of(m) == old
        say(m, new_task(m), "goes on")
    assert execute(path, "SELECT name FROM sqlite_schema WHERE name IN ('half', 'good')") == []


# --- one writer -----------------------------------------------------------------------------------------


def together(store: monitor.Store, operations: list) -> list:
    """Run operations that wait for the writer at the same time; returns their results and errors in order."""
    begun, free = threading.Event(), threading.Event()

    def hold(t: monitor.Transaction) -> bool:
        begun.set()
        return free.wait(10)

    def attempt(operation):
        try:
            return store.write(operation)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(operations) + 1) as pool:
        blocker = pool.submit(store.write, hold)
        assert begun.wait(5)
        outcomes = []
        for number, operation in enumerate(operations):
            outcomes.append(pool.submit(attempt, operation))
            wait_until(lambda number=number: len(store._waiting) == number + 1)
        free.set()
        assert blocker.result() is True
        return [outcome.result() for outcome in outcomes]


def test_writers_that_wait_at_the_same_time_share_one_transaction(m):
    """One sync for all of them; they run in the order in which they came."""
    statements: list[str] = []
    m.store.write(lambda t: t.db.set_trace_callback(statements.append))
    assert together(m.store, [lambda t, number=number: number for number in range(40)]) == list(range(40))
    m.store.write(lambda t: t.db.set_trace_callback(None))
    # The tracing one, the one that the forty waited for, they, and none more.
    assert [statement for statement in statements if statement.startswith("COMMIT")] == ["COMMIT"] * 3


def test_many_writers_need_few_transactions(m):
    """Without any help from outside."""
    task, statements = new_task(m), []
    m.store.write(lambda t: t.db.set_trace_callback(statements.append))
    with ThreadPoolExecutor(16) as pool:
        said = list(pool.map(lambda number: say(m, task, f"number {number}"), range(320)))
    m.store.write(lambda t: t.db.set_trace_callback(None))
    assert len({update["seq"] for update in said}) == 320
    assert len([statement for statement in statements if statement.startswith("COMMIT")]) < 160
    assert_without_gaps(m)


def write_and_fail(t: monitor.Transaction, task: dict, error: Exception | str) -> None:
    """Half an operation, and then an error of ours or of SQLite's."""
    t.insert_update(
        t.one(monitor.TASK, task["id"]), {"source": "manual", "message": "half", "tags": ["half"]}, moment(0)
    )
    t.db.execute("UPDATE tasks SET name = 'half'")
    if isinstance(error, Exception):
        raise error
    t.db.execute(error)


FAILURES = {
    "not_found": monitor.Problem("not_found", "no such thing"),
    "bug": ValueError("a bug"),
    "constraint": "UPDATE tasks SET status = 'nonsense'",
    "syntax": "SELEC",
}


def test_an_operation_that_fails_undoes_itself_alone(m):
    """Those before and after it in the same transaction are stored, without a gap in the numbers."""
    task = new_task(m, "the name")
    operations = []
    for number, failure in enumerate(FAILURES.values()):
        fields = {"source": "manual", "message": f"number {number}"}
        operations.append(
            lambda t, fields=fields: t.insert_update(t.one(monitor.TASK, task["id"]), fields, moment(0))
        )
        operations.append(lambda t, failure=failure: write_and_fail(t, task, failure))
    outcomes = together(m.store, operations)
    assert [json.loads(outcome)["message"] for outcome in outcomes[::2]] == [f"number {n}" for n in range(4)]
    assert outcomes[1] is FAILURES["not_found"]
    assert outcomes[3] is FAILURES["bug"]
    assert [outcome.code for outcome in outcomes[5::2]] == ["unavailable"] * 2
    assert_without_gaps(m)
    assert len(log_of(m)) == 6
    assert m.store.read(lambda q: q.one(monitor.TASK, task["id"])["name"]) == "the name"
    assert read_updates(m, {"q": "half"}) == read_updates(m, {"tag": ["half"]}) == ([], 0)
    assert_search_is_sound(m)


def test_what_failed_is_not_told_to_readers(m):
    """Only what is on disk is."""
    task = new_task(m)
    with pytest.raises(ValueError, match="a bug"):
        m.store.write(lambda t: write_and_fail(t, task, ValueError("a bug")))
    said = say(m, task, "good")
    assert [json.loads(frame.body) for frame in m.broadcaster.after(2)] == [said]


@contextlib.contextmanager
def write_lock(path: Path):
    """Another program that has begun to write."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def test_a_locked_database_is_said_and_nothing_is_stored(path, monkeypatch):
    """Readers go on meanwhile, and writers as soon as it is free."""
    monkeypatch.setattr(monitor, "BUSY_SECONDS", 0.1)
    with opened(path) as m:
        task = new_task(m)
        with write_lock(path):
            begun = time.monotonic()
            with ThreadPoolExecutor(4) as pool:
                writes = [pool.submit(say, m, task, "too early") for _ in range(4)]
                assert len(log_of(m)) == 2
                errors = [write.exception() for write in writes]
            assert [error.code for error in errors] == ["unavailable"] * 4
            assert time.monotonic() - begun < 2
            assert len(log_of(m)) == 2
        assert say(m, task, "now")["seq"] == 3
        assert_without_gaps(m)


def test_a_server_whose_database_is_locked_goes_on_answering(fresh, path):
    """The writer waits; nobody else does."""
    server = fresh(database=path)
    task = server.new_task()
    with ThreadPoolExecutor(1) as pool:
        with write_lock(path), Session(server) as session:
            write = pool.submit(session.say, task, "patient")
            for _ in range(5):
                assert server.ask("GET", "/health").status_code == 200
                assert server.get("/api/updates")["total"] == 0
            assert not write.done(), "the lock was held for all of it"
        assert write.result(10)["seq"] == 3


class Session(Server):
    """One more client of a running server, with a connection of its own."""

    def __init__(self, server: Server):
        self.url, self.session = server.url, type(server.session)()
        self.session.trust_env = False

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


def test_a_closed_store_stores_nothing_more(path):
    """And says so."""
    with opened(path) as m:
        task = new_task(m)
    with pytest.raises(monitor.Problem) as problem:
        say(m, task, "too late")
    assert problem.value.code == "unavailable"
    assert execute(path, "SELECT seq FROM head") == [(2,)]


def test_closing_waits_for_what_was_begun(path):
    """A write that waits when the server goes is stored."""
    begun, free = threading.Event(), threading.Event()

    def hold(t: monitor.Transaction) -> None:
        begun.set()
        free.wait(10)

    m = monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path)}))
    task = new_task(m)
    with ThreadPoolExecutor(3) as pool:
        pool.submit(m.store.write, hold)
        assert begun.wait(5)
        waiting = pool.submit(say, m, task, "in time")
        wait_until(lambda: len(m.store._waiting) == 1)
        closing = pool.submit(m.close)
        wait_until(lambda: m.store._closed)
        free.set()
        closing.result(5)
        assert waiting.result(5)["seq"] == 3
    assert execute(path, "SELECT seq FROM head") == [(3,)]


CLOSED_IN_USE = """
import sys
if sys.argv[2] == "gevent":
    from gevent import monkey
    monkey.patch_all()
import random, threading, time
import monitor

def use(store):
    try:
        while True:
            store.free_pages()
            time.sleep(0.0005)
    except monitor.Problem:
        pass

for number in range(40):
    store = monitor.Store(f"{sys.argv[1]}/{number}.db")
    users = [threading.Thread(target=use, args=(store,)) for _ in range(2)]
    for user in users:
        user.start()
    time.sleep(random.random() * 0.01)
    store.close()
    for user in users:
        user.join()
"""


@pytest.mark.parametrize("concurrency", ["threads", "gevent"])
def test_closing_while_pages_are_freed_is_no_crash(tmp_path, concurrency):
    """A connection closed in one thread while another one used it was a segmentation fault."""
    command = [sys.executable, "-c", CLOSED_IN_USE, str(tmp_path), concurrency]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (0, "")


# --- lists of updates -----------------------------------------------------------------------------------

WORDS = ("build", "failed", "deploy", "Café", "ÜBER", "tests", "green", "retry")
SOURCES, KINDS = ("manual", "claude:1", "github:a/b"), ("decision", "error", "note")
LEVELS, TAGS = ("info", "warn", "error"), ("red", "blue", "green", "Red")
BEGUN = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def moment(minutes: int) -> str:
    """A time some minutes after the first update, as clients write it."""
    return monitor.timestamp(BEGUN + datetime.timedelta(minutes=minutes))


def random_update(chance: random.Random, tasks: list[dict]) -> dict:
    """The fields of an update: each is missing now and then."""
    fields = {
        "kind": chance.choice(KINDS),
        "level": chance.choice(LEVELS),
        "tags": chance.sample(TAGS, chance.randint(1, 3)),
        "data": {"number": chance.random()},
    }
    fields = {name: value for name, value in fields.items() if chance.random() < 0.7}
    fields |= {"task_id": chance.choice(tasks)["id"], "source": chance.choice(SOURCES)}
    return fields | {"message": " ".join(chance.sample(WORDS, chance.randint(1, 4)))}


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    """A Monitor with random updates, some of whose tasks have moved; the updates, and where tasks are now."""
    chance = random.Random(11)
    with opened(tmp_path_factory.mktemp("updates") / "monitor.db") as m:
        workstreams = [json.loads(m.create(monitor.WORKSTREAM, {"name": name}))["id"] for name in "abc"]
        tasks = [new_task(m, "a task", chance.choice(workstreams)) for _ in range(5)]
        made = []
        for number in range(300):
            # Out of order now and then: a replay sets its own time.
            when = moment(number - chance.choice((0, 0, 0, 25)))
            made.append(json.loads(m.add_update(random_update(chance, tasks), moment=when)[0]))
        moves = [(task["id"], {"workstream_id": chance.choice(workstreams)}) for task in tasks]
        tasks = [json.loads(m.change(monitor.TASK, task, changes)) for task, changes in moves]
        yield m, made, tasks


def random_query(chance: random.Random, tasks: list[dict]) -> dict:
    """A query as it stands in an address: any combination of conditions, most of them absent."""
    task = chance.choice(tasks)
    wanted = {
        "task_id": chance.choice((task["id"], str(task["number"]), task["id"][:13], "99999")),
        "workstream_id": chance.choice((task["workstream_id"], "00000000")),
        "source": chance.choice((*SOURCES, "no such")),
        "kind": chance.choice((*KINDS, "no such")),
        "level": chance.choice(LEVELS),
        "tag": chance.sample((*TAGS, "no such"), chance.randint(1, 3)),
        "q": " ".join(chance.sample((*WORDS, "cafe", "über", "TESTS", "absent"), chance.choice((1, 1, 2)))),
        "after_seq": str(chance.randint(0, 320)),
        "before_seq": str(chance.randint(0, 320)),
        "since": moment(chance.randint(-10, 310)),
        "until": moment(chance.randint(-10, 310)),
    }
    wanted = {name: value for name, value in wanted.items() if chance.random() < 0.2}
    page = {"order": chance.choice(("asc", "desc")), "limit": str(chance.choice((1, 7, 200, 5000)))}
    return wanted | {name: value for name, value in page.items() if chance.random() < 0.5}


def plain(text: str) -> set[str]:
    """The words of a text without case and accents."""
    letters = unicodedata.normalize("NFD", text.lower())
    return set("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def names(reference: str, task: dict) -> bool:
    """Whether a number, an id or its beginning means a task."""
    return str(task["number"]) == reference or (len(reference) > 5 and task["id"].startswith(reference))


# What each condition means: whether an update, of a task, meets the value.
MEANINGS = {
    "task_id": lambda value, update, task: names(value, task),
    "workstream_id": lambda value, update, task: task["workstream_id"].startswith(value),
    "source": lambda value, update, task: update["source"] == value,
    "kind": lambda value, update, task: update.get("kind") == value,
    "level": lambda value, update, task: update.get("level") == value,
    "tag": lambda value, update, task: bool(set(value) & set(update["tags"])),
    "q": lambda value, update, task: plain(value) <= plain(update["message"]),
    "after_seq": lambda value, update, task: update["seq"] > int(value),
    "before_seq": lambda value, update, task: update["seq"] < int(value),
    "since": lambda value, update, task: update["timestamp"] >= value,
    "until": lambda value, update, task: update["timestamp"] < value,
}


def matching(query: dict, made: list[dict], tasks: list[dict]) -> list[dict]:
    """The updates that meet all conditions of a query, in rising seq."""
    task_of = {task["id"]: task for task in tasks}
    conditions = [(MEANINGS[name], value) for name, value in query.items() if name in MEANINGS]
    return [
        update
        for update in made
        if all(meaning(value, update, task_of[update["task_id"]]) for meaning, value in conditions)
    ]


def test_every_combination_of_filters_finds_what_it_says(updates):
    """The page and the total, against the plain meaning of the words, six hundred times."""
    m, made, tasks = updates
    chance, found_some = random.Random(13), 0
    for _ in range(600):
        query = random_query(chance, tasks)
        bodies, total = read_updates(m, monitor.clean(query, monitor.UPDATE_QUERY))
        expected = matching(query, made, tasks)
        descending = query.get("order", "desc" if "q" in query else "asc") == "desc"
        page = (expected[::-1] if descending else expected)[: min(int(query.get("limit", 50)), 200)]
        assert [json.loads(body) for body in bodies] == page, query
        assert total == len(expected), query
        found_some += bool(expected)
    assert found_some > 200


def test_walking_page_by_page_meets_every_update_once(updates):
    """In both directions, with a filter."""
    m, made, _ = updates
    expected = [update for update in made if {"red", "blue"} & set(update["tags"])]
    for order, name in (("asc", "after_seq"), ("desc", "before_seq")):
        found, place = [], {}
        while True:
            page, _ = read_updates(m, {"tag": ["red", "blue"], "order": order, "limit": 17} | place)
            if not page:
                break
            found += [json.loads(body) for body in page]
            place = {name: found[-1]["seq"]}
        assert sorted(found, key=lambda update: update["seq"]) == expected
        assert [update["seq"] for update in found] == sorted(
            (update["seq"] for update in expected), reverse=order == "desc"
        )


def test_a_page_without_its_total_has_none(updates):
    """Counting costs."""
    m, made, _ = updates
    bodies, total = read_updates(m, {"total": False, "limit": 3})
    assert [json.loads(body) for body in bodies] == made[:3]
    assert total is None


SYNTAX = (
    '"build',
    "build*",
    "-build",
    "build OR deploy",
    "message:build",
    "NEAR(build)",
    "(",
    "a\"b'c",
    "***",
    "💥",
)


@pytest.mark.parametrize("q", SYNTAX)
def test_a_search_is_plain_words(updates, q):
    """Nothing in it is the engine's syntax, and nothing in it is an error: around words it is passed over."""
    m, made, _ = updates
    with_word = re.fullmatch(r"[^a-z]build[^a-z]?|build[^a-z]", q)
    expected = [update["seq"] for update in made if with_word and "build" in update["message"]]
    bodies, total = read_updates(m, {"q": q, "order": "asc", "limit": 200})
    assert [json.loads(body)["seq"] for body in bodies] == expected
    assert total == len(expected)


def test_a_page_of_large_updates_ends_early_but_never_empty(m, monkeypatch):
    """So that an answer has an end; the next page begins where it stopped."""
    task = new_task(m)
    said = [say(m, task, f"number {number}", data="x" * 1000) for number in range(5)]
    for limit, count in ((1, 1), (3000, 2), (100_000, 5)):
        monkeypatch.setattr(monitor, "PAGE_BYTES", limit)
        bodies, total = read_updates(m, {})
        assert [json.loads(body) for body in bodies] == said[:count]
        assert total == 5


# Conditions, and the index that must find their updates.
PLANS = {
    "task_id=1": "updates_by_task",
    "source=manual": "updates_by_source",
    "kind=error": "updates_by_kind",
    "level=error": "updates_by_level",
    "workstream_id={workstream}": "updates_by_task",
    "tag=red": "SEARCH update_tags USING PRIMARY KEY (tag=?",
    "tag=red tag=blue": "SEARCH update_tags USING PRIMARY KEY (tag=?",
    "q=build": "update_search VIRTUAL TABLE",
    "after_seq=200": "INTEGER PRIMARY KEY (rowid>?",
    "before_seq=200": "INTEGER PRIMARY KEY (rowid<?",
    "task_id=1 kind=error level=error source=manual": "updates_by_task",
    "task_id=1 tag=red": "updates_by_task",
    "tag=red kind=error level=error": "SEARCH update_tags USING PRIMARY KEY (tag=?",
    "q=build kind=error tag=red": "update_search VIRTUAL TABLE",
    "kind=error level=error workstream_id={workstream}": "updates_by_level",
    "source=manual before_seq=200": "updates_by_source",
    "tag=red after_seq=200": "SEARCH update_tags USING PRIMARY KEY (tag=? AND seq>?",
}


def plans(m: monitor.Monitor, query: dict) -> list[list[str]]:
    """How SQLite goes about the statements that answer a query: the steps of each."""

    def explain(q: monitor.Queries) -> list[list[str]]:
        statements: list[str] = []
        chosen = q.filter(query)
        q.db.set_trace_callback(statements.append)
        q.updates(chosen, query)
        q.db.set_trace_callback(None)
        own = [text for text in statements if text.startswith(("SELECT body", "SELECT COUNT"))]
        return [[row["detail"] for row in q.rows(f"EXPLAIN QUERY PLAN {statement}")] for statement in own]

    return m.store.read(explain)


@pytest.mark.parametrize("conditions", PLANS)
def test_no_list_looks_at_all_updates(updates, conditions):
    """Page and count both use the index of the most telling condition."""
    m, _, tasks = updates
    raw: dict = {}
    for name, _, value in (part.partition("=") for part in conditions.split()):
        value = value.format(workstream=tasks[0]["workstream_id"])
        raw[name] = [*raw.get(name, []), value] if name == "tag" else value
    page, count = plans(m, monitor.clean(raw, monitor.UPDATE_QUERY))
    for steps in (page, count):
        assert any(PLANS[conditions] in step for step in steps), steps
        scans = [step for step in steps if re.match("SCAN (updates|log|update_tags|tasks)", step)]
        assert scans == []


ONE_EACH = {
    "task_id": "1",
    "source": "manual",
    "kind": "error",
    "level": "error",
    "tag": ["red"],
    "q": "build",
}


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_page_is_read_in_order_instead_of_sorted(updates, name):
    """A page of fifty must not cost a sort of everything that matches."""
    m, _, _ = updates
    page, _ = plans(m, {name: ONE_EACH[name], "order": "desc"})
    # The last step puts the page itself in order.
    assert [step for step in page[:-1] if "B-TREE" in step] == []


def test_a_filtered_stream_does_not_look_at_all_updates(updates):
    """A reader that catches up looks only at what is tagged."""
    m, _, _ = updates

    def explain(q: monitor.Queries) -> list[str]:
        statements: list[str] = []
        q.db.set_trace_callback(statements.append)
        q.events(100, monitor.Filter(tags=("red",)), 200)
        q.db.set_trace_callback(None)
        return [row["detail"] for row in q.rows(f"EXPLAIN QUERY PLAN {statements[0]}")]

    steps = m.store.read(explain)
    assert any("update_tags USING PRIMARY KEY (tag=? AND seq>? AND seq<?)" in step for step in steps), steps
    assert [step for step in steps if re.match("SCAN (log|updates|update_tags)", step)] == []


# --- search, constraints, keys --------------------------------------------------------------------------


def search(m: monitor.Monitor, words: str) -> list[str]:
    """The names of the tasks that a search finds."""
    return [task["name"] for task in m.store.read(lambda q: q.tasks({"q": words}))]


def assert_search_is_sound(m: monitor.Monitor) -> None:
    """Both indexes hold exactly what the tables hold."""
    for table in ("task_search", "update_search"):
        m.store.write(
            lambda t, table=table: t.db.execute(
                f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)"
            ).close()
        )


def test_search_follows_every_change_of_a_task(m):
    """What is no longer there is no longer found."""
    task = new_task(m, "first name")
    other = new_task(m, "other")
    for changes in (
        {"name": "second name", "summary_text": "all about whales"},
        {"status": "done"},
        {"summary_text": "all about dolphins", "metadata": {"whales": 1}},
        {"name": "third"},
        {"summary_text": "all about dolphins"},
        {"hidden": True},
        {"hidden": False, "workstream_id": other["workstream_id"]},
    ):
        m.change(monitor.TASK, task["id"], changes)
        assert_search_is_sound(m)
    assert search(m, "dolphins") == search(m, "THIRD") == ["third"]
    assert [search(m, word) for word in ("whales", "second", "first")] == [[], [], []]
    m.change(monitor.TASK, task["id"], {"summary_text": ""})
    assert search(m, "dolphins") == []
    assert_search_is_sound(m)


def test_search_holds_what_updates_say(updates):
    """Index and log agree, and the whole file is sound."""
    m, _, _ = updates
    assert_search_is_sound(m)
    assert [row[0] for row in m.store.read(lambda q: q.rows("PRAGMA integrity_check"))] == ["ok"]
    assert m.store.read(lambda q: q.rows("PRAGMA foreign_key_check")) == []


NONSENSE = (
    "UPDATE workstreams SET status = 'done'",
    "UPDATE workstreams SET name = NULL",
    "UPDATE tasks SET status = 'archived'",
    "UPDATE tasks SET name = NULL",
    "UPDATE tasks SET workstream = 99",
    "UPDATE tasks SET workstream = 'x'",
    "UPDATE updates SET level = 'fatal'",
    "UPDATE updates SET task = 99",
    "UPDATE updates SET source = NULL",
    "UPDATE updates SET id = 'text'",
    "UPDATE log SET event = 'nonsense'",
    "UPDATE log SET body = NULL",
    "UPDATE log SET workstream = 99",
    "DELETE FROM log",
    "DELETE FROM workstreams",
    "UPDATE head SET seq = 'x'",
    "INSERT INTO head (only_row, stream, seq, secret) VALUES (2, 'x', 1, x'00')",
    "INSERT INTO update_tags (tag, seq) VALUES ('red', 3)",
    "UPDATE updates SET has_data = 2",
    "INSERT INTO updates SELECT 1, id, task, source, kind, level, timestamp, has_data FROM updates",
    "INSERT INTO workstreams (id, name, created_at, updated_at) SELECT id, '', '', '' FROM workstreams",
)


@pytest.mark.parametrize("statement", NONSENSE)
def test_the_schema_refuses_what_makes_no_sense(m, statement):
    """Whatever the program above it does."""
    say(m, new_task(m), "here", tags=["red"], level="warn")

    def attempt(t: monitor.Transaction) -> Exception | None:
        try:
            t.db.execute(statement)
        except sqlite3.Error as error:
            return error

    assert isinstance(m.store.write(attempt), sqlite3.IntegrityError)
    assert_without_gaps(m)


def age_keys(m: monitor.Monitor, **age: float) -> None:
    """Let all idempotency keys be as old as that."""
    then = monitor.timestamp(datetime.datetime.now(datetime.UTC) - datetime.timedelta(**age))
    m.store.write(lambda t: t.db.execute("UPDATE idempotency_keys SET created_at = ?", (then,)).close())


def send(m: monitor.Monitor, key: str, fields: dict) -> tuple[str, bool]:
    """An update that was sent with an idempotency key; its JSON, and whether it is new."""
    return m.add_update(fields, key, sent=fields)


def test_a_key_is_good_for_seven_days(m):
    """Then it may be used again, and takes no room."""
    fields = {"task_id": new_task(m)["id"], "source": "manual", "message": "once"}
    first, new = send(m, "key", fields)
    assert new
    age_keys(m, days=6, hours=23)
    assert send(m, "key", fields) == (first, False)
    age_keys(m, days=7, seconds=1)
    second, new = send(m, "key", fields | {"message": "again"})
    assert new
    assert json.loads(second)["seq"] == json.loads(first)["seq"] + 1
    age_keys(m, days=8)
    send(m, "another key", fields)
    keys = m.store.read(lambda q: q.rows("SELECT key FROM idempotency_keys"))
    assert [row["key"] for row in keys] == ["another key"]


def test_a_key_with_another_body_is_a_conflict(m):
    """Nothing is stored."""
    fields = {"task_id": new_task(m)["id"], "source": "manual", "message": "once"}
    send(m, "key", fields)
    with pytest.raises(monitor.Problem) as problem:
        send(m, "key", fields | {"message": "otherwise"})
    assert problem.value.code == "conflict"
    assert len(log_of(m)) == 3


def test_one_key_sent_by_many_at_once_stores_one_update(m):
    """All of them get that one."""
    fields = {"task_id": new_task(m)["id"], "source": "manual", "message": "once"}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: send(m, "key", fields), range(36)))
    assert len({body for body, _ in answers}) == 1
    assert [new for _, new in answers].count(True) == 1
    assert len(log_of(m)) == 3


def test_pruning_an_update_does_not_look_at_the_tags_of_all(m):
    """Writers wait for a batch of it: what it costs must not grow with the log."""
    task = new_task(m)
    fields = {"source": "manual", "message": "old", "tags": ["red", "blue", "green"]}

    def operation(t: monitor.Transaction) -> None:
        row = t.one(monitor.TASK, task["id"])
        for _ in range(1500):
            t.insert_update(row, fields, moment(0))
        t.insert_update(row, fields, moment(-9))

    m.store.write(operation)
    thousands: list[int] = []

    def prune(t: monitor.Transaction) -> int:
        t.db.set_progress_handler(lambda: thousands.append(1) and None, 1000)
        try:
            return t.prune(moment(-5), False)
        finally:
            t.db.set_progress_handler(None, 0)

    assert m.store.write(prune) == 1
    assert len(thousands) < 10
    assert_search_is_sound(m)
