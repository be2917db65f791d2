"""When the disk, the file or the clock fails: an honest 503, nothing half done, and it goes on by itself."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import Server, clean_environment, wait_until
from rig import (
    Browser,
    at_rest,
    bytes_of,
    changed,
    made_before,
    next_of,
    one_sentence,
    reading,
    serving,
    with_changes,
)
from wire import refused

import monitor

QUICK = changed("monitor.BUSY_SECONDS = 0.3")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server that waits only shortly for a lock, for faults that it recovers from."""
    with serving(QUICK, tmp_path_factory.mktemp("shared") / "monitor.db") as server:
        yield server


@pytest.fixture
def quick(tmp_path):
    """Such a server with a file of its own, for a test that spoils it."""
    with serving(QUICK, tmp_path / "monitor.db") as server:
        yield server


@contextlib.contextmanager
def another_process(database: Path, statements: str):
    """Another program that has run some SQL on a database and now holds what it got."""
    code = (
        "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "[db.execute(line).fetchall() for line in sys.argv[2].split(';')]; print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(database), statements],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        try:
            yield
        finally:
            holder.stdin.write("\n")
            holder.stdin.close()


def attempt(server: Server, task: dict, message: str, **fields):
    """Try to store an update: the response, whatever it is."""
    return server.ask("POST", "/api/updates/manual", {"task_id": task["id"], "message": message} | fields)


def unavailable(response) -> bool:
    """Assert that a response says, in a sentence, to come back later."""
    refused(response, 503, "unavailable")
    assert int(response.headers["Retry-After"]) > 0
    assert "nothing was stored" in response.json()["message"]
    return True


def alive(server: Server) -> None:
    """Assert that a server answers at once that it is there."""
    begun = time.monotonic()
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert time.monotonic() - begun < 2


def stored(server: Server, task: dict) -> list[str]:
    """The messages of a task's thread."""
    return [
        update["message"] for update in server.get("/api/updates", task_id=task["id"], limit=200)["items"]
    ]


def recovered(server: Server, task: dict, message: str = "after"):
    """Wait until writing works again; returns what was stored."""
    response = wait_until(lambda: (got := attempt(server, task, message)).status_code == 201 and got)
    return response.json()


# --- locked ----------------------------------------------------------------------------------------------


def test_a_database_that_is_locked_for_long_is_said_to_be(shared):
    task = shared.new_task()
    shared.say(task, "before")
    with reading(shared) as events:
        next_of(events, 1, "hello")
        with another_process(shared.database, "BEGIN IMMEDIATE"):
            assert unavailable(attempt(shared, task, "during"))
            alive(shared)
            assert stored(shared, task) == ["before"]
            report = shared.get("/health", full="1")
            assert "locked" in report["writer"]
            assert report["status"] != "ok"
        after = recovered(shared, task)
        assert next_of(events, 1, "update") == [after]
    assert stored(shared, task) == ["before", "after"]
    assert shared.get("/health", full="1")["writer"] == "ok"


def test_while_it_waits_for_a_lock_nobody_else_waits(tmp_path):
    """The database is not touched by the thread that serves."""
    with serving(Server, tmp_path / "monitor.db") as server:
        task = server.new_task()
        with another_process(server.database, "BEGIN IMMEDIATE"):
            begun, waiting = time.monotonic(), Browser(server)
            with waiting, contextlib.suppress(OSError):
                waiting.session.post(
                    f"{server.url}/api/updates/manual",
                    json={"task_id": task["id"], "message": "x"},
                    timeout=0.3,
                )
            alive(server)
            assert stored(server, task) == []
            assert time.monotonic() - begun < 2
        recovered(server, task)


def test_a_lock_that_is_let_go_in_time_is_not_noticed(shared):
    task = shared.new_task()
    with another_process(shared.database, "BEGIN IMMEDIATE"):
        pass
    assert attempt(shared, task, "patient").status_code == 201


def test_other_programs_may_read_meanwhile(shared):
    task = shared.new_task()
    with another_process(shared.database, "BEGIN; SELECT * FROM log"):
        assert attempt(shared, task, "read on").status_code == 201


# --- full ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(server: Server, room: int):
    """Let no file of a server grow beyond its write-ahead log's size and some more bytes."""
    pid, limit = server.process.pid, resource.RLIMIT_FSIZE
    soft, hard = resource.prlimit(pid, limit)
    log = Path(f"{server.database}-wal")
    size = log.stat().st_size if log.exists() else 0
    resource.prlimit(pid, limit, (size + room, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, limit, (soft, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="sets a limit of another process")
@pytest.mark.parametrize("room", [0, 5_000, 40_000, 100_000])
def test_on_a_full_disk_what_was_acknowledged_is_stored_and_nothing_else(shared, room):
    task = shared.new_task()
    with reading(shared) as events:
        with full_disk(shared, room):
            answers = {
                f"{room}.{n}": attempt(shared, task, f"{room}.{n}", data="x" * 3000) for n in range(30)
            }
            kept = [message for message, answer in answers.items() if answer.status_code == 201]
            assert all(answer.status_code == 201 or unavailable(answer) for answer in answers.values())
            assert len(kept) < 30
            alive(shared)
            assert stored(shared, task) == kept
        last = recovered(shared, task)
        assert [update["message"] for update in next_of(events, len(kept) + 1, "update")] == [*kept, "after"]
    assert stored(shared, task) == [*kept, "after"]
    assert shared.get(f"/api/updates/{last['seq']}") == last
    assert shared.ask("GET", "/api/admin/check").json() == {"problems": []}


# --- gone and replaced -----------------------------------------------------------------------------------


def test_a_file_that_is_moved_away_and_put_back_has_lost_nothing(shared):
    task, database = shared.new_task(), Path(shared.database)
    shared.say(task, "before")
    away = database.with_name("away")
    with reading(shared) as events:
        next_of(events, 1, "hello")
        database.rename(away)
        assert all(unavailable(attempt(shared, task, "during")) for _ in range(2))
        alive(shared)
        assert not database.exists(), "a new one would hide that everything is gone"
        away.rename(database)
        after = recovered(shared, task)
        assert next_of(events, 1, "update") == [after]
    assert stored(shared, task) == ["before", "after"]
    assert after["seq"] == shared.get("/health", full="1")["seq"]


IN_ITS_PLACE = {
    "text": lambda path, backup: path.write_text("no database, only words\n" * 400),
    "zeros": lambda path, backup: path.write_bytes(bytes(40_000)),
    "nothing yet": lambda path, backup: path.touch(),
    "a folder": lambda path, backup: path.mkdir(),
    "another program's": lambda path, backup: sql(path, "CREATE TABLE theirs (x)"),
    "half a backup": lambda path, backup: path.write_bytes(backup.read_bytes()[:60_000]),
    "a backup": lambda path, backup: shutil.copy(backup, path),
    "another of ours": lambda path, backup: made_before(path, 5),
    "a newer Monitor's": lambda path, backup: (
        shutil.copy(backup, path),
        sql(path, "PRAGMA user_version = 99"),
    ),
}


def sql(path: Path, statement: str) -> None:
    """Run a statement on a file that no server uses."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


@pytest.mark.parametrize("thing", IN_ITS_PLACE)
def test_what_was_put_in_its_place_is_left_alone_and_the_old_one_is_welcome_back(shared, tmp_path, thing):
    """Half of a backup stands there while `cp` restores it."""
    task, database, away = shared.new_task(), Path(shared.database), tmp_path / "away"
    for number in range(20):
        shared.say(task, f"before {number}", data="x" * 2000)
    with contextlib.ExitStack() as stack:
        source, backup = (
            stack.enter_context(contextlib.closing(sqlite3.connect(path)))
            for path in (database, tmp_path / "backup")
        )
        source.backup(backup)
    IN_ITS_PLACE[thing](tmp_path / "other", tmp_path / "backup")
    before = content(tmp_path / "other")
    database.rename(away)
    (tmp_path / "other").rename(database)
    assert all(unavailable(attempt(shared, task, "during")) for _ in range(2))
    alive(shared)
    assert content(database) == before
    database.rename(tmp_path / "other")
    away.rename(database)
    recovered(shared, task)
    assert stored(shared, task) == [*(f"before {number}" for number in range(20)), "after"]
    assert shared.ask("GET", "/api/admin/check").json() == {"problems": []}


def content(path: Path) -> bytes | None:
    """The bytes of a file; None for a folder."""
    return None if path.is_dir() else path.read_bytes()


def test_a_restored_backup_waits_for_a_restart_and_is_then_served(quick, tmp_path):
    """Until then nothing of the one is mixed with the other, nor after it."""
    task, database, backup = quick.new_task(), Path(quick.database), tmp_path / "backup"
    quick.say(task, "in the backup")
    assert at_rest("backup", str(backup), MONITOR_SERVER=quick.url).status == 0
    late = [quick.say(task, f"later {number}", data="x" * 500)["seq"] for number in range(40)]
    whole = backup.read_bytes()
    backup.rename(database)
    answer = attempt(quick, task, "during")
    assert unavailable(answer)
    assert "restart" in answer.json()["message"]
    assert at_rest("check", MONITOR_SERVER=quick.url).status in (0, 1)
    quick.stop()
    assert database.read_bytes() == whole
    quick.start()
    assert stored(quick, task) == ["in the backup"]
    assert attempt(quick, task, "after").json()["seq"] == late[0]
    with reading(quick, "?poll=1", **{"Last-Event-ID": str(late[-1])}) as events:
        assert next_of(events, 1, "reset")[0]["reason"] == "ahead"
    assert quick.ask("GET", "/api/admin/check").json() == {"problems": []}


def test_who_reads_while_another_file_is_in_its_place_never_reads_that_one(quick, tmp_path):
    """Many at once, slow ones among them: more than have read before and left their connections."""
    task, database = quick.new_task(), Path(quick.database)
    quick.say(task, "ours")
    quick.stop()
    quick.start()
    made_before(tmp_path / "other", 500, 1000)
    database.rename(tmp_path / "away")
    (tmp_path / "other").rename(database)
    paths = ["/api/admin/check", "/api/updates?limit=200", "/api/updates?q=old&limit=200", "/stream"] * 20
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda path: look(quick, path), paths))
        assert quick.process.poll() is None
        (tmp_path / "away").rename(database)
        recovered(quick, task)
        answers += pool.map(lambda path: look(quick, path), paths)
    assert all("old news" not in answer for answer in answers)
    assert stored(quick, task) == ["ours", "after"]


def look(server: Server, path: str) -> str:
    """What a client of its own gets."""
    with Browser(server) as browser:
        return browser.get(path).text


def test_a_stopped_server_leaves_the_lock_and_one_file(tmp_path):
    with serving(Server, tmp_path / "monitor.db") as server:
        server.say(server.new_task(), "x")
        server.stop()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["monitor.db", "monitor.db.lock"]


def test_a_browser_gets_a_page_that_says_so(tmp_path):
    """Also one that has logged in, though its session is in the same database."""
    given = {"MONITOR_DB": str(tmp_path / "monitor.db"), "MONITOR_API_TOKENS": "a-token"}
    app = monitor.create_app(monitor.Config.load(given))
    served, client = app.extensions["monitor"], app.test_client()
    try:
        assert client.post("/login", data={"token": "a-token"}).status_code == 303
        assert client.get("/dashboard", headers={"Accept": "text/html"}).status_code == 200

        def broken(query):
            raise monitor.unavailable(sqlite3.OperationalError("disk I/O error"))

        served.store.read = served.store.read_here = broken
        for path in ("/dashboard", "/stream", "/tasks/1"):
            page = client.get(path, headers={"Accept": "text/html"})
            assert page.status_code == 503
            assert page.headers["Retry-After"]
            assert "disk I/O error" in page.text
        assert client.get("/health").status_code == 200
    finally:
        served.close()


# --- health ----------------------------------------------------------------------------------------------


def test_health_can_be_asked_how_it_is(shared):
    with reading(shared) as events:
        next_of(events, 1, "hello")
        report = shared.get("/health", full="1")
    assert report["status"] == report["writer"] == "ok"
    assert Path(report["database"]) == Path(shared.database)
    assert report["streams"] == 1
    assert report["seq"] == shared.say(shared.new_task(), "x")["seq"] - 3
    assert report["version"] == monitor.__version__
    assert report["sqlite_version"] == sqlite3.sqlite_version


# --- files that it refuses to start on -------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good database."""
    path = tmp_path_factory.mktemp("whole") / "monitor.db"
    made_before(path, 400, 500)
    return path.read_bytes()


def spoilt(whole: bytes, start: int, end: int) -> bytes:
    """A database with some bytes overwritten."""
    return whole[:start] + b"\xff" * (end - start) + whole[end:]


REFUSED = {
    "text": lambda whole: b"no database, only words\n" * 400,
    "a few bytes": lambda whole: b"hi",
    "zeros": lambda whole: bytes(8192),
    "half of it": lambda whole: whole[: len(whole) // 2],
    "its first page alone": lambda whole: whole[:4096],
    "a spoilt header": lambda whole: spoilt(whole, 16, 100),
    "a spoilt schema": lambda whole: spoilt(whole, 100, 4096),
    "all spoilt but the first page": lambda whole: spoilt(whole, 4096, len(whole)),
    "a newer schema": lambda whole: whole[:60] + (99).to_bytes(4, "big") + whole[64:],
    "another program's": lambda whole: whole[:68] + bytes(4) + whole[72:],
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_it_cannot_serve_is_refused_in_a_sentence_and_not_touched(tmp_path, whole, case):
    """`serve` and what works on a file at rest open it in the same way."""
    path = tmp_path / "monitor.db"
    path.write_bytes(REFUSED[case](whole))
    path.chmod(0o640)
    before = path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns
    ran = at_rest("check", "--db", str(path))
    assert ran.status != 0
    assert ran.out == ""
    assert one_sentence(ran.error)
    assert str(path) in ran.error
    assert (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("case", ["all spoilt but the first page", "a newer schema"])
def test_a_server_does_not_start_on_it(tmp_path, whole, case):
    path = tmp_path / "monitor.db"
    path.write_bytes(REFUSED[case](whole))
    command = [*Server.command, "serve", "--bind", "127.0.0.1:0", "--db", str(path)]
    ended = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=10)
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert one_sentence(ended.stderr)
    assert path.read_bytes() == REFUSED[case](whole)


def test_what_says_newer_says_what_to_do(tmp_path, whole):
    path = tmp_path / "monitor.db"
    path.write_bytes(REFUSED["a newer schema"](whole))
    error = at_rest("check", "--db", str(path)).error
    assert "newer" in error
    assert "99" in error
    assert "update" in error


def test_a_file_is_served_by_one_process_only(shared):
    ran = at_rest("check", "--db", str(shared.database))
    assert ran.status != 0
    assert one_sentence(ran.error)
    assert "another" in ran.error


def test_an_address_that_is_taken_is_said_to_be(shared, tmp_path):
    command = [*Server.command, "serve", "--bind", f"127.0.0.1:{shared.port}", "--db", str(tmp_path / "x.db")]
    ended = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=10)
    assert ended.returncode != 0
    assert one_sentence(ended.stderr)
    assert str(shared.port) in ended.stderr


def test_a_place_that_holds_no_files_is_said_to_be_none(tmp_path):
    ended = subprocess.run(
        [*Server.command, "serve", "--bind", "127.0.0.1:0", "--db", str(tmp_path / "missing" / "monitor.db")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert ended.returncode != 0
    assert one_sentence(ended.stderr)


def test_the_files_are_nobody_elses(shared):
    folder = Path(shared.database).parent
    assert {file.stat().st_mode & 0o077 for file in folder.iterdir()} == {0}
    assert b"SQLite format 3" in bytes_of(folder)


# --- the clock -------------------------------------------------------------------------------------------

BACKWARDS = """
import datetime, itertools
right, calls = monitor.timestamp, itertools.count()
def back(moment=None):
    moment = moment or datetime.datetime.now(datetime.UTC)
    return right(moment - datetime.timedelta(hours=next(calls)))
monitor.timestamp = back
monitor.time = type("Clock", (), {"__getattr__": lambda self, name: getattr(time, name)})()
import time
monitor.time.time_ns = lambda: time.time_ns() - 3_600_000_000_000 * next(calls)
"""


def test_a_clock_that_goes_back_changes_no_order(tmp_path):
    """Each look at it shows an hour earlier than the last."""
    with serving(changed(BACKWARDS), tmp_path / "monitor.db") as server:
        task = server.new_task()
        with reading(server) as events:
            said = [server.say(task, f"{number}") for number in range(20)]
            assert next_of(events, 20, "update") == said
        seqs = [update["seq"] for update in said]
        assert seqs == sorted(seqs)
        times = [update["timestamp"] for update in said]
        assert times == sorted(times, reverse=True)
        assert [update["seq"] for update in server.get("/api/updates")["items"]] == seqs
        newest = server.get("/api/updates", order="desc", limit=5)["items"]
        assert [update["seq"] for update in newest] == seqs[:-6:-1]
        assert [update["seq"] for update in server.get("/api/updates", before_seq=seqs[5])["items"]] == seqs[
            :5
        ]
        key = {"Idempotency-Key": "once"}
        body = {"task_id": task["id"], "message": "once"}
        answers = [server.ask("POST", "/api/updates/manual", body, headers=key) for _ in range(2)]
        assert answers[0].json() == answers[1].json()
        with Browser(server) as browser:
            assert (
                browser.get("/dashboard").status_code
                == browser.get(f"/tasks/{task['id']}").status_code
                == 200
            )
        assert server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "done"}).status_code == 200
        server.ask("POST", "/api/admin/prune", {"older_than": "1h"})
        assert server.say(task, "last")["seq"] == seqs[-1] + 3
        assert server.ask("GET", "/api/admin/check").json() == {"problems": []}


def test_the_odd_servers_of_these_tests_start_as_the_real_one():
    """Else they would test something else."""
    assert with_changes("")[0] == Server.command[0]
    assert os.path.basename(Server.command[1]) == "monitor.py"
