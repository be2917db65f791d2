"""Backup, check, prune, retention and redact: on a running server, on a file at rest, and with tokens."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Server, clean_environment, wait_until
from rig import at_rest, bytes_of, changed, made_before, next_of, on, one_sentence, reading, serving

import monitor

TOKEN = "a-token"
CLEAN = {"ok": True, "problems": []}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A database with 3,000 updates of long ago, of some 2 KB each; to be copied."""
    path = tmp_path_factory.mktemp("old") / "monitor.db"
    made_before(path, 3000, 2000)
    return path


@pytest.fixture
def copy(old, tmp_path) -> Path:
    """A copy of it that may be spoilt."""
    return Path(shutil.copy(old, tmp_path / "monitor.db"))


@pytest.fixture
def small(tmp_path) -> Path:
    """A database with a few updates of long ago."""
    made_before(tmp_path / "monitor.db", 20)
    return tmp_path / "monitor.db"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server whose reads are open and which has a token."""
    with serving(
        Server, tmp_path_factory.mktemp("guarded") / "monitor.db", MONITOR_API_TOKENS=TOKEN
    ) as server:
        server.session.headers["Authorization"] = f"Bearer {TOKEN}"
        yield server


@contextlib.contextmanager
def opened(path: Path):
    """A database file, read as any other program would."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        yield db


def rows(path: Path, statement: str) -> list:
    """The rows of a statement."""
    with opened(path) as db:
        return db.execute(statement).fetchall()


def seqs(path: Path) -> list[int]:
    """The numbers of the updates in a database."""
    return [seq for (seq,) in rows(path, "SELECT seq FROM updates ORDER BY seq")]


# --- backup ----------------------------------------------------------------------------------------------


def test_a_backup_is_a_database_like_any_other(server, task, tmp_path):
    said = server.say(task, "kept twice")
    ran = on(server, "backup", str(tmp_path / "copy.db"))
    assert ran.status == 0
    assert ran.error == ""
    assert ran.json == {"backup": str(tmp_path / "copy.db"), "bytes": (tmp_path / "copy.db").stat().st_size}
    assert os.listdir(tmp_path) == ["copy.db"]
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    assert at_rest("check", "--db", str(tmp_path / "copy.db")).json == CLEAN
    with serving(Server, tmp_path / "copy.db") as restored:
        assert restored.get(f"/api/updates/{said['seq']}") == said
        assert restored.say(task, "goes on")["seq"] == said["seq"] + 1


def test_a_backup_of_a_file_at_rest(small, tmp_path):
    assert at_rest("backup", str(tmp_path / "one"), "--db", str(small)).status == 0
    assert at_rest("backup", str(tmp_path / "two"), MONITOR_DB=f"sqlite:{small}?mode=rwc").status == 0
    assert seqs(tmp_path / "one") == seqs(tmp_path / "two") == seqs(small)


def test_a_backup_never_overwrites_anything(server, tmp_path):
    target = tmp_path / "precious"
    target.write_text("words")
    ran = on(server, "backup", str(target))
    assert ran.status != 0
    assert one_sentence(ran.error)
    assert target.read_text() == "words"
    assert os.listdir(tmp_path) == ["precious"]


def test_a_backup_that_cannot_be_written_says_so(server, tmp_path):
    ran = on(server, "backup", str(tmp_path / "missing" / "copy.db"))
    assert ran.status != 0
    assert one_sentence(ran.error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", [["backup", "TARGET"], ["check"], ["prune", "--older-than", "1d"]])
def test_without_a_server_and_a_file_a_command_says_so_and_makes_none(tmp_path, command):
    database = tmp_path / "nope.db"
    ran = at_rest(
        *(str(tmp_path / word) if word == "TARGET" else word for word in command), MONITOR_DB=str(database)
    )
    assert ran.status != 0
    assert one_sentence(ran.error)
    assert str(database) in ran.error
    assert os.listdir(tmp_path) == []


def test_a_backup_under_load_is_whole_and_holds_what_was_acknowledged_before_it(fresh, tmp_path):
    server, ended, said = fresh(), threading.Event(), []
    task = server.new_task()

    def write() -> None:
        while not ended.is_set():
            said.append(server.say(task, f"update {len(said)}", data="x" * 500, tags=["busy"])["seq"])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            wait_until(lambda number=number: len(said) > 40 * (number + 1))
            before = len(said)
            assert on(server, "backup", str(tmp_path / f"copy{number}")).status == 0
            held = seqs(tmp_path / f"copy{number}")
            assert held[:before] == said[:before]
            assert held == list(range(held[0], held[-1] + 1))
    finally:
        ended.set()
        writer.join()
    for number in range(3):
        assert at_rest("check", "--db", str(tmp_path / f"copy{number}")).json == CLEAN


# --- check -----------------------------------------------------------------------------------------------


def test_check_says_that_all_is_well(server, small):
    assert on(server, "check") == (0, json.dumps(CLEAN, indent=2) + "\n", "")
    assert at_rest("check", "--db", str(small)).json == CLEAN


BROKEN = {
    "an update's row in the log": "DELETE FROM log WHERE seq = 10",
    "an update's own row": "DELETE FROM updates WHERE seq = 10",
    "a tag's update": "INSERT INTO update_tags (tag, seq) VALUES ('lost', 999999)",
    "the counter": "UPDATE head SET seq = 5",
    "the search index": "INSERT INTO update_search (update_search, rowid, message)"
    " SELECT 'delete', seq, message FROM update_messages WHERE seq = 10",
    "a task's workstream": "UPDATE tasks SET workstream = 77",
}


@pytest.mark.parametrize("what", BROKEN)
def test_check_finds_what_must_not_be(small, what):
    with contextlib.closing(sqlite3.connect(small)) as db, db:
        assert db.execute(BROKEN[what]).rowcount >= 0
    ran = at_rest("check", "--db", str(small))
    assert ran.status == 1
    assert one_sentence(ran.error)
    assert ran.json["ok"] is False
    assert all(len(problem) > 15 for problem in ran.json["problems"])
    assert len(ran.json["problems"]) > 0


def test_check_finds_spoilt_pages(copy):
    whole = copy.read_bytes()
    copy.write_bytes(whole[:400_000] + os.urandom(8192) + whole[408_192:])
    ran = at_rest("check", "--db", str(copy))
    assert ran.status == 1
    assert one_sentence(ran.error)


# --- prune -----------------------------------------------------------------------------------------------


def prune(*options: str, database: Path) -> dict:
    """Prune a file at rest; returns what was printed."""
    ran = at_rest("prune", *options, "--db", str(database))
    assert ran.status == 0, ran.error
    return ran.json


def free_pages(path: Path) -> int:
    """How many pages of a database hold nothing."""
    return rows(path, "PRAGMA freelist_count")[0][0]


def test_prune_removes_what_is_old_and_gives_the_space_back(copy):
    size = copy.stat().st_size
    assert prune("--older-than", "30d", database=copy) == {"pruned": 3000, "left": 0}
    assert seqs(copy) == []
    assert rows(copy, "SELECT COUNT(*) FROM update_tags") == [(0,)]
    assert free_pages(copy) == 0
    assert copy.stat().st_size < size / 20
    assert at_rest("check", "--db", str(copy)).json == CLEAN


def test_prune_of_the_data_leaves_the_sentences(copy):
    size, numbers = copy.stat().st_size, seqs(copy)
    assert prune("--older-than", "30d", "--data-only", database=copy) == {"pruned": 3000, "left": 0}
    assert seqs(copy) == numbers
    assert rows(copy, "SELECT COUNT(*) FROM log WHERE body LIKE '%xxxx%'") == [(0,)]
    assert rows(copy, "SELECT COUNT(*) FROM log WHERE body LIKE '%old news 50_\"%'") == [(10,)]
    assert free_pages(copy) == 0
    assert copy.stat().st_size < size / 2
    assert at_rest("check", "--db", str(copy)).json == CLEAN
    assert prune("--older-than", "30d", "--data-only", database=copy) == {"pruned": 0, "left": 0}


def test_a_dry_run_only_counts(small):
    before = seqs(small)
    for options in ([], ["--data-only"]):
        assert prune("--older-than", "30d", "--dry-run", *options, database=small) == {
            "pruned": 0,
            "left": 20,
        }
    assert seqs(small) == before


def test_prune_leaves_what_is_younger(server, task):
    said = server.say(task, "just now", data={"a": 1})
    for options in ([], ["--data-only"]):
        assert on(server, "prune", "--older-than", "1h", *options).json == {"pruned": 0, "left": 0}
    assert server.get(f"/api/updates/{said['seq']}") == said


@pytest.mark.parametrize(
    "age", ["30", "d", "-1d", "1y", "1.5d", "", "30 d", "x", "\N{FULLWIDTH DIGIT NINE}d", "1d1h", "9999999d"]
)
def test_what_is_no_age_is_refused_in_a_sentence(server, age):
    ran = on(server, "prune", "--older-than", age)
    assert ran.status != 0
    assert ran.out == ""
    assert one_sentence(ran.error)


def test_prune_on_a_server_stalls_nobody_and_numbers_go_on(copy):
    """Also after all numbers were pruned, and after a restart."""
    with serving(Server, copy) as server:
        head = server.get("/health", full="1")["seq"]
        task, ended, waits = server.new_task(), threading.Event(), []

        def write() -> None:
            while not ended.is_set():
                begun = time.monotonic()
                server.say(task, "meanwhile")
                waits.append(time.monotonic() - begun)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            assert on(server, "prune", "--older-than", "30d").json == {"pruned": 3000, "left": 0}
        finally:
            ended.set()
            writer.join()
        assert len(waits) > 3
        assert max(waits) < 1
        assert (
            server.get("/api/updates", q="old")["total"]
            == server.get("/api/updates", tag="old")["total"]
            == 0
        )
        numbers = seqs(copy)
        assert numbers[0] == head + 3
        assert free_pages(copy) < 100, "the search index frees some of its own later"
        assert on(server, "prune", "--older-than", "0m").json["pruned"] == len(numbers)
        assert on(server, "check").json == CLEAN
        server.stop()
        server.start()
        assert server.say(task, "goes on")["seq"] == numbers[-1] + 1


def test_a_reader_whose_past_was_pruned_is_told_so_then_gets_what_is_left_then_what_comes(copy):
    with serving(Server, copy) as server:
        task = server.new_task()
        kept = server.say(task, "kept")
        while server.ask("POST", "/api/admin/prune", {"older_than": "30d"}).json()["left"]:
            pass  # each goes on for a second
        with reading(server, "?after_seq=1000") as events:
            (hello,), (reset,) = next_of(events, 1, "hello"), next_of(events, 1, "reset")
            assert hello["resumed"] is False
            assert reset["reason"] == "pruned"
            assert next_of(events, 2, "task_created", "update") == [
                server.get(f"/api/tasks/{task['id']}"),
                kept,
            ]
            live = server.say(task, "live")
            assert next_of(events, 1, "update") == [live]
        with reading(server, f"?poll=1&after_seq={kept['seq']}") as events:
            assert next_of(events, 9, "hello", "reset", "update") == [
                {"stream": hello["stream"], "seq": live["seq"], "resumed": True},
                live,
            ]
        with reading(server, f"?poll=1&after_seq={reset['seq']}") as events:
            assert next_of(events, 1, "hello")[0]["resumed"] is True
            assert next_of(events, 9, "reset", "update") == [kept, live]


def test_a_live_reader_does_not_notice_that_the_past_is_pruned(copy):
    with serving(Server, copy) as server:
        task = server.new_task()
        with reading(server) as events:
            next_of(events, 1, "hello")
            server.ask("POST", "/api/admin/prune", {"older_than": "30d"})
            said = [server.say(task, f"{number}") for number in range(5)]
            assert next_of(events, 5, "reset", "update") == said


# --- retention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "updates", "with_data"),
    [("", 3000, 3000), ("30d", 0, 0), ("data:30d", 3000, 0), ("90d, data:30d", 0, 0), ("99999d", 3000, 3000)],
)
def test_retention_is_off_unless_it_is_set_and_then_works_by_itself(copy, rules, updates, with_data):
    with serving(Server, copy, MONITOR_RETENTION=rules) as server:
        task = server.new_task()
        young = server.say(task, "young", data="kept")

        def left() -> list:
            return rows(copy, "SELECT COUNT(*), TOTAL(has_data) FROM updates")

        wait_until(lambda: left() == [(updates + 1, with_data + 1)])
        assert server.get(f"/api/updates/{young['seq']}") == young
        wait_until(lambda: free_pages(copy) == 0)


def test_work_on_a_file_at_rest_applies_no_retention(copy):
    assert at_rest("check", "--db", str(copy), MONITOR_RETENTION="1d").json == CLEAN
    assert len(seqs(copy)) == 3000


# --- redact ----------------------------------------------------------------------------------------------

SECRET, WORD = "horsebatterystaple", "marmalade"


def holds(folder: Path, database: Path) -> list[str]:
    """Where in a database's files, and in its search index, a part of the secret is found."""
    found = [name for name in (SECRET, SECRET[5:], WORD, WORD[3:]) if name.encode() in bytes_of(folder)]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.execute("ATTACH ? AS kept", (f"{database}",))
        db.execute("CREATE VIRTUAL TABLE temp.terms USING fts5vocab (kept, update_search, row)")
        terms = [term for (term,) in db.execute("SELECT term FROM temp.terms")]
    return found + [term for term in terms if term in (SECRET, WORD)]


def reveal(server: Server, task: dict) -> dict:
    """Say something that should not have been said, among other things."""
    for number in range(30):
        server.say(task, f"before {number}", data=f"filler {number}" * 50)
    revealed = server.say(
        task, f"it is {SECRET} {WORD}", data={"deep": [{SECRET: WORD}]}, tags=["kept"], kind="k"
    )
    for number in range(30):
        server.say(task, f"behind {number}", data=f"filler {number}" * 50)
    return revealed


def test_a_redacted_update_leaves_its_number_and_a_mark_and_nothing_else(fresh, tmp_path):
    server = fresh()
    task = server.new_task()
    revealed = reveal(server, task)
    assert len(holds(tmp_path, tmp_path / "monitor.db")) == 6
    with reading(server) as live:
        next_of(live, 1, "hello")
        ran = on(server, "update", "redact", str(revealed["seq"]))
        assert ran.status == 0
        redacted = ran.json
        assert next_of(live, 1, "update_redacted") == [redacted]
    assert holds(tmp_path, tmp_path / "monitor.db") == []
    assert {name: redacted[name] for name in ("seq", "id", "task_id", "timestamp")} == {
        name: revealed[name] for name in ("seq", "id", "task_id", "timestamp")
    }
    assert "data" not in redacted
    assert redacted["message"]
    assert server.get(f"/api/updates/{revealed['seq']}") == redacted
    assert server.get("/api/updates", q=SECRET)["total"] == server.get("/api/updates", q=WORD)["total"] == 0
    assert server.get("/api/updates", q="behind")["total"] == 30
    for path in ("/api/stream?poll=1&after_seq=0", f"/tasks/{task['id']}", "/dashboard", "/stream"):
        assert SECRET not in server.ask("GET", path).text
    assert on(server, "check").json == CLEAN
    assert on(server, "backup", str(tmp_path / "copy")).status == 0
    server.stop()
    assert holds(tmp_path, tmp_path / "monitor.db") == []


def test_an_update_is_redacted_in_a_file_at_rest(fresh, tmp_path):
    server = fresh()
    revealed = reveal(server, server.new_task())
    server.stop()
    ran = at_rest("update", "redact", str(revealed["seq"]), "--db", str(tmp_path / "monitor.db"))
    assert ran.status == 0, ran.error
    assert ran.json["seq"] == revealed["seq"]
    assert holds(tmp_path, tmp_path / "monitor.db") == []
    assert at_rest("check", "--db", str(tmp_path / "monitor.db")).json == CLEAN


def test_the_secret_goes_also_when_another_program_reads_meanwhile(tmp_path):
    """It keeps the write-ahead log from being emptied for as long as it reads."""
    with serving(changed("monitor.BUSY_SECONDS = 0.2"), tmp_path / "monitor.db") as server:
        task = server.new_task()
        revealed = reveal(server, task)
        with opened(tmp_path / "monitor.db") as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM log").fetchall()
            assert on(server, "update", "redact", str(revealed["seq"])).status == 0
            assert server.get("/api/updates", q=SECRET)["total"] == 0
        server.say(task, "later")
        wait_until(lambda: holds(tmp_path, tmp_path / "monitor.db") == [], 5)


def test_redacting_twice_is_as_good_as_once(server, task):
    said = server.say(task, SECRET)
    answers = [on(server, "update", "redact", str(said["seq"])).json for _ in range(2)]
    assert answers[0]["message"] == answers[1]["message"]
    assert on(server, "check").json == CLEAN


def test_what_is_no_update_cannot_be_redacted(server, task):
    head = server.get("/health", full="1")["seq"]
    for number in (head + 100, 1, 0):
        ran = on(server, "update", "redact", str(number))
        assert ran.status == 3
        assert one_sentence(ran.error)
    assert on(server, "update", "redact", "x").status == 2
    assert server.ask("POST", "/api/updates/-1/redact").status_code == 404
    assert server.get("/health", full="1")["seq"] == head


def test_an_update_that_was_redacted_can_be_sent_again_with_its_key(server, task):
    body, key = {"task_id": task["id"], "message": SECRET}, {"Idempotency-Key": f"key {task['id']}"}
    said = server.ask("POST", "/api/updates/manual", body, headers=key).json()
    redacted = on(server, "update", "redact", str(said["seq"])).json
    again = server.ask("POST", "/api/updates/manual", body, headers=key)
    assert (again.status_code, again.json()) == (200, redacted)


# --- tokens ----------------------------------------------------------------------------------------------

COMMANDS = [["backup", "TARGET"], ["check"], ["prune", "--older-than", "9d"], ["update", "redact", "SEQ"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_where_a_token_is_set_an_administrator_needs_it(guarded, tmp_path, command):
    """Also where reads are open to all."""
    said = guarded.say(guarded.new_task(), "x")
    real = {"TARGET": str(tmp_path / "copy"), "SEQ": str(said["seq"])}
    command = [real.get(word, word) for word in command]
    for settings in ({}, {"MONITOR_TOKEN": "wrong"}):
        ran = on(guarded, *command, **settings)
        assert ran.status == 4
        assert ran.out == ""
        assert one_sentence(ran.error)
        assert "token" in ran.error
    assert os.listdir(tmp_path) == []
    assert guarded.get(f"/api/updates/{said['seq']}") == said
    assert on(guarded, *command, MONITOR_TOKEN=TOKEN).status == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/admin/backup"),
        ("GET", "/api/admin/check"),
        ("POST", "/api/admin/prune"),
        ("POST", "/api/updates/1/redact"),
    ],
)
def test_no_administrators_address_is_open(guarded, method, path):
    open_to_all = guarded.ask("GET", "/api/tasks", headers={"Authorization": ""})
    assert open_to_all.status_code == 200
    response = guarded.ask(method, path, {} if method == "POST" else None, headers={"Authorization": ""})
    assert response.status_code == 401


@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_a_file_at_rest_needs_no_token(small, mode):
    settings = {"MONITOR_AUTH_MODE": mode, "MONITOR_API_TOKENS": TOKEN}
    assert at_rest("check", "--db", str(small), **settings).json == CLEAN
    assert at_rest("check", MONITOR_DB=str(small), MONITOR_TOKEN="any", **settings).json == CLEAN


# --- what is printed -------------------------------------------------------------------------------------

LONG = [["backup", "TARGET"], ["check"], ["prune", "--older-than", "30d"]]


def typed(*arguments: str) -> str:
    """What a command prints on standard error when that is a terminal."""
    ours, theirs = pty.openpty()
    try:
        ran = subprocess.Popen(
            [sys.executable, Server.command[1], *arguments],
            env=clean_environment(MONITOR_SERVER="http://127.0.0.1:9", TERM="xterm"),
            stdout=subprocess.PIPE,
            stderr=theirs,
        )
        os.close(theirs)
        with ran:
            out = ran.stdout.read()
        assert ran.returncode == 0
        assert not out or json.loads(out)
        seen = b""
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while chunk := os.read(ours, 65536):
                seen += chunk
        return seen.decode()
    finally:
        os.close(ours)


@pytest.mark.parametrize("command", LONG, ids=lambda words: words[0])
def test_progress_is_shown_on_a_terminal_only(small, tmp_path, command):
    command = [str(tmp_path / "copy") if word == "TARGET" else word for word in command]
    assert "100%" in re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", typed(*command, "--db", str(small)))
    (tmp_path / "copy").unlink(missing_ok=True)
    ran = at_rest(*command, "--db", str(small))
    assert ran.status == 0
    assert ran.error == ""


def test_quiet_commands_print_nothing_even_on_a_terminal(small):
    assert typed("--quiet", "check", "--db", str(small)) == ""
    assert at_rest("prune", "--older-than", "1d", "--quiet", "--db", str(small)) == (0, "", "")


def test_ages_are_days_hours_and_minutes():
    found = [monitor.parse_age(age).total_seconds() for age in ("2d", "12h", "45m", "0m")]
    assert found == [172800, 43200, 2700, 0]


def test_a_server_that_was_named_is_not_replaced_by_the_file_here(tmp_path, monkeypatch):
    made_before(tmp_path / "monitor.db", 3)
    monkeypatch.chdir(tmp_path)
    assert at_rest("check").status == 0
    ran = at_rest("check", "--server", "http://127.0.0.1:9")
    assert (ran.status, ran.out, "no server at http://127.0.0.1:9" in ran.error) == (5, "", True)
