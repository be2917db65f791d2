"""Export and import: exact into an empty database, merged into any other, interrupted, repeated, refused."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path
from uuid import UUID

import pytest
from conftest import ROOT, Server, clean_environment, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rig import at_rest, in_terminal, made_before, next_of, on, one_sentence, reading, serving

import monitor

TOKEN = "a-token"
FOREVER = {"MONITOR_STUCK_AFTER": "9999d"}  # no run falls silent while it is looked at
PAGES = ("/api/workstreams?include_archived=true", "/api/tasks?include_hidden=true&include_archived=true")
PAGES += ("/api/sessions", "/api/links", "/api/updates?limit=200", "/api/updates?order=desc&limit=200")
PAGES += (
    "/api/updates?q=tests",
    "/api/updates?level=error",
    "/api/updates?tag=tests",
    "/api/tasks?q=checkout",
)
PAGES += (
    "/api/stream?after_seq=0&poll=1&format=ndjson",
    "/api/stream?after_seq=0&poll=1&level=error&format=ndjson",
)


@contextlib.contextmanager
def opened(path: Path, **named: str):
    """A Monitor on a file, in this process, that does nothing by itself."""
    config = monitor.Config.load({"MONITOR_DB": str(path), **named})
    made = monitor.Monitor(monitor.dataclasses.replace(config, tended=False))
    try:
        made.open()
        yield made
    finally:
        made.close()


def exported(made: monitor.Monitor, **wanted) -> bytes:
    """An export."""
    return b"".join(made.export(wanted))


def body(lines: bytes) -> bytes:
    """An export without its first line, which says when it was made."""
    return lines.partition(b"\n")[2]


def fill(made: monitor.Monitor) -> None:
    """Something of everything: the story of the demo, and what people do to such things afterwards."""
    deque(monitor.story(made, 1e9), 0)
    q = functools.partial(made.store.read, lambda q: q.tasks({"include_hidden": True}))
    first, second, third = (task["id"] for task in q()[:3])
    other = json.loads(
        made.create(monitor.WORKSTREAM, {"name": "Elsewhere", "metadata": {"a": [1, None, "é\u2028"]}})
    )
    made.change(
        monitor.TASK, first, {"workstream_id": other["id"], "name": "Renamed", "metadata": [1.5e300, -0.0]}
    )
    made.change(monitor.TASK, second, {"hidden": True, "summary_text": "It stands still"})
    made.change(monitor.WORKSTREAM, other["id"], {"status": "archived"})
    made.link(
        monitor.clean({"task_id": third, "link": "branch", "value": "wip", "repository": "a/b"}, monitor.LINK)
    )
    update = {
        "task_id": first,
        "source": "manual",
        "message": "kept once",
        "tags": ["x", "y"],
        "data": {"n": 2**60},
    }
    made.add_update(update, "the key", update)
    wiped = json.loads(made.add_update(update | {"message": "a mistake"})[0])
    made.redact_update(wiped["seq"])
    runs = made.store.read(lambda q: q.of_task("session_rows", {}))
    mover = next(run for run in runs if run["task_id"] != third)
    made.move_run({"source": mover["source"], "task_id": third, "updates": True})
    late = json.loads(made.create(monitor.TASK, {"workstream_id": other["id"], "name": "made after them"}))
    made.move_run({"source": mover["source"], "task_id": late["id"], "updates": True})


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    """A database with something of everything, of which the oldest updates were pruned."""
    path = tmp_path_factory.mktemp("rich") / "monitor.db"
    with opened(path) as made:
        fill(made)
        oldest = sorted(row["timestamp"] for row in map(json.loads, made.store.read(all_updates)))[5]
        assert made.prune(oldest, False)[0] == 5
        assert made.store.read(lambda q: [q.head()["pruned"]])[0] > 0
    return path


def all_updates(q: monitor.Queries) -> list[str]:
    """The newest updates, as JSON."""
    return q.updates(monitor.EVERYTHING, {"order": "desc", "limit": 200})[0]


def answers(server: Server) -> dict[str, bytes]:
    """What the API and the stream say, to the byte."""
    found = {path: server.ask("GET", path).content for path in PAGES}
    for task in json.loads(found[PAGES[1]])["items"]:
        for path in ("/api/tasks/{}", "/api/sessions?task_id={}", "/api/updates?task_id={}&limit=200"):
            found[path.format(task["number"])] = server.ask("GET", path.format(task["number"])).content
    for stream in json.loads(found[PAGES[0]])["items"]:
        path = f"/api/stream?after_seq=0&poll=1&workstream_id={stream['id']}"
        frames = server.ask("GET", path).content
        found[path] = b"\n\n".join(part for part in frames.split(b"\n\n") if not part.startswith(b"retry:"))
    return found


# --- exact -----------------------------------------------------------------------------------------------


def test_into_an_empty_database_everything_is_the_same_to_the_byte(rich, tmp_path):
    there, here = shutil.copy(rich, tmp_path / "there.db"), tmp_path / "here.db"
    told = at_rest("export", str(tmp_path / "one"), "--db", str(there)).json
    assert told == {"export": str(tmp_path / "one"), "bytes": (tmp_path / "one").stat().st_size}
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    assert at_rest("import", str(tmp_path / "one"), "--db", str(here)).json["exact"] is True
    assert here.stat().st_mode & 0o777 == 0o600
    assert at_rest("export", str(tmp_path / "two"), "--db", str(here)).status == 0
    assert body((tmp_path / "two").read_bytes()) == body((tmp_path / "one").read_bytes())
    assert at_rest("check", "--db", str(here)).json == {"ok": True, "problems": []}
    with serving(Server, there, **FOREVER) as source, serving(Server, here, **FOREVER) as copy:
        assert answers(copy) == answers(source)
        assert len(answers(copy)) > 30
        key = {"Idempotency-Key": "the key"}
        first = source.get("/api/updates", q="kept")["items"][0]
        sent = {"task_id": first["task_id"], "source": "manual", "message": "kept once", "tags": ["x", "y"]}
        again = [
            each.ask("POST", "/api/updates", sent | {"data": {"n": 2**60}}, headers=key)
            for each in (source, copy)
        ]
        assert [each.status_code for each in again] == [200, 200]
        assert again[0].content == again[1].content
        assert source.say({"id": "1"}, "goes on")["seq"] == copy.say({"id": "1"}, "goes on")["seq"]


def test_a_running_server_exports_and_imports_as_a_file_at_rest_does(rich, tmp_path):
    at_rest("export", str(tmp_path / "rest"), "--db", str(rich))
    source = shutil.copy(rich, tmp_path / "there.db")
    with (
        serving(Server, source, **FOREVER) as there,
        serving(Server, tmp_path / "here.db", **FOREVER) as here,
    ):
        assert on(there, "export", str(tmp_path / "served")).status == 0
        assert body((tmp_path / "served").read_bytes()) == body((tmp_path / "rest").read_bytes())
        assert on(here, "import", str(tmp_path / "served")).json["exact"] is True
        assert answers(here) == answers(there)


def test_the_lines_of_the_log_are_those_of_the_stream(server, tmp_path):
    server.say(server.new_task(), "told twice", data={"a": 1})
    on(server, "export", str(tmp_path / "all"))
    lines = [json.loads(line) for line in (tmp_path / "all").read_bytes().splitlines()]
    events = [{name: line[name] for name in ("event", "id", "data")} for line in lines if "id" in line]
    streamed = server.ask("GET", "/api/stream?after_seq=0&poll=1&format=ndjson").text.splitlines()
    assert events == [line for line in map(json.loads, streamed) if "id" in line]
    header = lines[0]["data"]
    assert lines[0]["event"] == "export" and lines[-1] == {"event": "end", "data": {}}
    assert (header["format"], header["version"], header["head"]) == (1, monitor.__version__, events[-1]["id"])
    assert monitor.FIELDS["since"].check(header["exported_at"], "time") == header["exported_at"]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
words = texts.filter(str.strip) | st.sampled_from(
    ["password=hunter22222", "ghp_" + "a" * 36, "\u2028\x7f\x1b[31m", "a\r\nb"]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
updates = st.fixed_dictionaries(
    {"message": words, "source": words},
    optional={
        "kind": words,
        "level": st.sampled_from(["info", "error"]),
        "tags": st.lists(words, max_size=3),
        "data": values,
    },
)
steps = st.lists(
    st.tuples(st.just("update"), updates)
    | st.tuples(st.just("task"), st.fixed_dictionaries({"name": words}, optional={"metadata": values}))
    | st.tuples(
        st.just("change"),
        st.fixed_dictionaries(
            {}, optional={"name": words, "summary_text": texts, "hidden": st.booleans(), "metadata": values}
        ),
    )
    | st.tuples(
        st.just("hook"), st.dictionaries(st.sampled_from(["prompt", "cwd", "session_id", "model"]), words)
    )
    | st.tuples(st.sampled_from(["redact", "prune"]), st.none()),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(steps=steps)
def test_whatever_was_stored_comes_back_exactly(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("odd")
    with opened(folder / "there.db") as there, opened(folder / "here.db") as here:
        stream = json.loads(there.create(monitor.WORKSTREAM, {"name": "w"}))["id"]
        task = json.loads(there.create(monitor.TASK, {"workstream_id": stream, "name": "t"}))["id"]
        seqs = []
        for does, what in steps:
            if does == "update":
                fields = monitor.clean({**what, "task_id": task}, monitor.NEW_UPDATE)
                seqs.append(json.loads(there.add_update(fields)[0])["seq"])
            elif does == "task":
                task = json.loads(there.create(monitor.TASK, {**what, "workstream_id": stream}))["id"]
            elif does == "change":
                there.change(monitor.TASK, task, what)
            elif does == "hook":
                there.take_hook(monitor.Hook("claude", {**what, "hook_event_name": "UserPromptSubmit"}))
            elif does == "redact" and seqs:
                there.redact_update(seqs.pop())
            elif does == "prune":
                there.prune(monitor.timestamp(), False)
                seqs.clear()
        lines = exported(there)
        assert here.take_export(lines, 2)["exact"] is True
        assert body(exported(here)) == body(lines)
        assert here.store.read(monitor.Queries.check) == []
        assert here.take_export(lines, 2) | {"known": 0} == {
            "updates": 0,
            "changes": 0,
            "known": 0,
            "exact": True,
        }
    shutil.rmtree(folder)


@pytest.mark.parametrize("odd", ["\0", "\ud800", "/a" * 200_000])
@pytest.mark.parametrize("name", ["cwd", "model", "agent_id", "tool_use_id", "tool_name", "session_id"])
def test_whatever_a_hook_says_of_its_run_can_be_stored_and_comes_back(tmp_path, name, odd):
    with opened(tmp_path / "there.db") as there, opened(tmp_path / "here.db") as here:
        facts = {"session_id": "a-run", "cwd": "/w/project", "agent_id": "", "tool_name": "Bash"}
        for event in ("UserPromptSubmit", "PermissionRequest"):
            payload = facts | {"hook_event_name": event, "prompt": "go on", "tool_input": {}}
            there.take_hook(monitor.Hook("claude", payload | {name: facts.get(name, "x") + odd}))
        runs = there.store.read(lambda q: q.sessions({}))
        assert runs and all(len(text) <= 4000 for run in runs for text in map(str, run.values()))
        assert here.take_export(exported(there), 2)["exact"] is True
        assert body(exported(here)) == body(exported(there))


def test_a_part_is_as_a_pruned_whole(rich, tmp_path):
    with opened(rich) as there:
        rows = [json.loads(line) for line in exported(there).splitlines()]
        middle = next(row for row in rows[len(rows) // 2 :] if row["event"] == "update")
    for name, since in (("seq", str(middle["id"] - 1)), ("time", middle["data"]["timestamp"])):
        assert at_rest("export", str(tmp_path / name), "--since", since, "--db", str(rich)).status == 0
        got = [json.loads(line) for line in (tmp_path / name).read_bytes().splitlines()]
        assert next(row["id"] for row in got if "id" in row) <= middle["id"]
        assert [row for row in got if "id" not in row][1:] == [row for row in rows if "id" not in row][1:]
    seqs = [json.loads(line).get("id") for line in (tmp_path / "seq").read_bytes().splitlines()]
    assert [seq for seq in seqs if seq] == [row["id"] for row in rows if row.get("id", 0) >= middle["id"]]
    assert at_rest("import", str(tmp_path / "seq"), "--db", str(tmp_path / "part.db")).json["exact"] is True
    with opened(tmp_path / "part.db") as part, opened(rich) as whole:
        tasks = [each.store.read(lambda q: q.tasks({})) for each in (part, whole)]
        assert len(tasks[0]) == len(tasks[1]) > 5
        for mine, theirs in zip(*tasks, strict=True):  # attention quotes an update that may be gone
            assert {**mine, "attention": 0} == {**theirs, "attention": 0}
        assert part.store.read(lambda q: q.head()["pruned"]) == middle["id"] - 1


@pytest.mark.parametrize("since", ["yesterday", "-1", "2026-13-01"])
def test_what_is_neither_number_nor_time_is_refused(server, tmp_path, since):
    ran = on(server, "export", str(tmp_path / "x"), f"--since={since}")
    assert ran.status == 1 and one_sentence(ran.error)
    assert os.listdir(tmp_path) == []


def test_an_empty_database_makes_an_empty_one(tmp_path):
    with opened(tmp_path / "a.db") as there, opened(tmp_path / "b.db") as here:
        assert here.take_export(exported(there), 2)["exact"] is True
        assert body(exported(here)) == body(exported(there))
        assert exported(there, after_seq=99).count(b"\n") == 2


# --- merged ----------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path):
    """A database with content of its own, open in this process."""
    made_before(tmp_path / "other.db", 5)
    with opened(tmp_path / "other.db") as made:
        yield made


def head_of(made: monitor.Monitor) -> int:
    """The newest number of a log."""
    return made.store.read(lambda q: q.head()["seq"])


def test_elsewhere_what_is_new_gets_new_numbers_and_what_is_there_stays(rich, other):
    before, stream = head_of(other), other.store.read(lambda q: q.head()["stream"])
    kept = body(exported(other)).splitlines()
    with opened(rich) as there:
        lines = exported(there)
        told = other.take_export(lines, 2)
        assert told["exact"] is False
        theirs = {row["id"]: row for row in map(json.loads, there.store.read(all_updates))}
        tasks = there.store.read(lambda q: q.tasks({"include_hidden": True, "include_archived": True}))
    assert other.store.read(lambda q: q.head()["stream"]) == stream
    ours = {row["id"]: row for row in map(json.loads, other.store.read(all_updates))}
    assert len(ours) == told["updates"] + 5 == len(theirs) + 5
    assert all({**ours[key], "seq": 0} == {**theirs[key], "seq": 0} for key in theirs)
    assert min(ours[key]["seq"] for key in theirs) > before
    got = {
        row["id"]: row
        for row in other.store.read(lambda q: q.tasks({"include_hidden": True, "include_archived": True}))
    }
    for task in tasks:
        mine = got[task["id"]]
        assert {**mine, "number": 0, "attention": 0} == {**task, "number": 0, "attention": 0}
        if "seq" in mine.get("attention", {}):
            said = mine["attention"].pop("seq"), task["attention"].pop("seq")
            assert other.store.read(lambda q, said=said: json.loads(q.update(said[0]))["id"]) in theirs
        assert mine.get("attention") == task.get("attention")
    assert [line for line in body(exported(other)).splitlines() if line in kept] == kept
    assert other.store.read(monitor.Queries.check) == []
    assert other.take_export(lines, 2) == {
        "updates": 0,
        "changes": 0,
        "known": lines.count(b"\n") - 1,
        "exact": False,
    }


def test_a_later_export_merges_in_and_the_newer_state_stays(tmp_path, other):
    with opened(tmp_path / "there.db") as there:
        stream = json.loads(there.create(monitor.WORKSTREAM, {"name": "theirs"}))["id"]
        tasks = [
            json.loads(there.create(monitor.TASK, {"workstream_id": stream, "name": name}))["id"]
            for name in "ab"
        ]
        said = json.loads(
            there.add_update({"task_id": tasks[0], "source": "s", "message": "a secret", "tags": []})[0]
        )
        other.take_export(exported(there), 2)
        there.change(monitor.TASK, tasks[0], {"status": "done", "summary_text": "over"})
        there.change(monitor.TASK, tasks[1], {"name": "older"})
        other.change(monitor.TASK, tasks[1], {"name": "newer"})
        there.redact_update(said["seq"])
        there.add_update({"task_id": tasks[1], "source": "s", "message": "more", "tags": []})
        before = head_of(other)
        assert other.take_export(exported(there), 2) | {"known": 0} == {
            "updates": 1,
            "changes": 2,
            "known": 0,
            "exact": False,
        }
    got = {task["id"]: task for task in other.store.read(lambda q: q.tasks({}))}
    assert (got[tasks[0]]["status"], got[tasks[0]]["summary_text"]) == ("done", "over")
    assert got[tasks[1]]["name"] == "newer"
    assert b"a secret" not in exported(other)
    events = [json.loads(line) for line in exported(other, after_seq=before).splitlines()]
    assert [line["event"] for line in events if "id" in line] == ["task_updated", "update_redacted", "update"]


@pytest.mark.parametrize("known", [True, False])
def test_a_merge_keeps_since_when_a_task_has_its_status(tmp_path, known):
    with opened(tmp_path / "there.db") as there, opened(tmp_path / "here.db") as here:
        here.create(monitor.WORKSTREAM, {"name": "not empty"})
        stream = json.loads(there.create(monitor.WORKSTREAM, {"name": "w"}))["id"]
        task = json.loads(there.create(monitor.TASK, {"workstream_id": stream, "name": "t"}))["id"]
        if known:
            here.take_export(exported(there), 2)
        done = json.loads(there.change(monitor.TASK, task, {"status": "done"}))["updated_at"]
        there.change(monitor.TASK, task, {"name": "renamed since"})
        here.take_export(exported(there), 2)
        since = lambda made: made.store.read(lambda q: q.news_of_tasks())[task]["since"]  # noqa: E731
        assert [since(there), since(here)] == [done, done]
        again = json.loads(here.change(monitor.TASK, task, {"status": "active"}))["updated_at"]
        assert since(here) == again


def test_a_copy_that_went_its_own_way_takes_what_is_new_under_new_numbers(rich, tmp_path):
    there_path, here_path = shutil.copy(rich, tmp_path / "there.db"), shutil.copy(rich, tmp_path / "here.db")
    with opened(there_path) as there, opened(here_path) as here:
        update = {"task_id": "1", "source": "s", "tags": []}
        mine = json.loads(here.add_update(update | {"message": "mine"})[0])
        yours = json.loads(there.add_update(update | {"message": "yours"})[0])
        assert mine["seq"] == yours["seq"]
        told = here.take_export(exported(there), 2)
        assert (told["updates"], told["changes"], told["exact"]) == (1, 0, False)
        assert json.loads(here.store.read(lambda q: q.update(mine["seq"]))) == mine
        assert json.loads(here.store.read(lambda q: q.update(mine["seq"] + 1))) == yours | {
            "seq": mine["seq"] + 1
        }
        assert here.take_export(exported(there), 2)["updates"] == 0


def test_what_was_pruned_here_does_not_come_back(tmp_path):
    made_before(tmp_path / "there.db", 20)
    with opened(tmp_path / "there.db") as there, opened(tmp_path / "here.db") as here:
        here.take_export(exported(there), 2)
        here.prune(monitor.timestamp(), False)
        head = head_of(here)
        assert here.take_export(exported(there), 2)["updates"] == 0
        assert head_of(here) == head


def test_what_looks_like_a_secret_is_masked_on_the_way_in(tmp_path):
    secret = "ghp_" + "b" * 36
    with opened(tmp_path / "a.db", MONITOR_REDACT="off") as there:
        stream = json.loads(there.create(monitor.WORKSTREAM, {"name": secret}))["id"]
        task = json.loads(
            there.create(monitor.TASK, {"workstream_id": stream, "name": "t", "metadata": {"password": "x"}})
        )
        there.add_update({"task_id": task["id"], "source": "s", "message": f"it is {secret}", "tags": []})
        lines = exported(there)
    assert lines.count(secret.encode()) == 3
    with opened(tmp_path / "b.db") as here, opened(tmp_path / "c.db", MONITOR_REDACT="off") as same:
        assert here.take_export(lines, 2)["exact"] is True
        assert secret.encode() not in exported(here)
        same.take_export(lines, 2)
        assert body(exported(same)) == body(lines)


# --- interrupted -----------------------------------------------------------------------------------------


def rows_of(path: Path) -> int:
    """How many rows the log in a file has by now."""
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db,
    ):
        return db.execute("SELECT COUNT(*) FROM log").fetchone()[0]
    return 0


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """An export of 8,000 updates: some eight requests."""
    folder = tmp_path_factory.mktemp("big")
    made_before(folder / "monitor.db", 8000, 600)
    assert at_rest("export", str(folder / "big"), "--db", str(folder / "monitor.db")).status == 0
    return folder / "big"


def start(*arguments: str, **named) -> subprocess.Popen:
    """A command as a process, where no server answers."""
    environment = clean_environment(MONITOR_SERVER="http://127.0.0.1:9")
    return subprocess.Popen([sys.executable, str(ROOT / "monitor.py"), *arguments], env=environment, **named)


def test_an_import_that_was_killed_goes_on_exactly_when_it_is_repeated(big, tmp_path):
    target = tmp_path / "here.db"
    for least in (1, 3000):
        running = start("import", str(big), "--db", str(target))
        wait_until(lambda least=least: rows_of(target) > least, 60)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    stored = rows_of(target)
    assert 3000 < stored < 8000, "it was killed in the middle"
    told = at_rest("import", str(big), "--db", str(target)).json
    assert told["exact"] is True
    assert told["updates"] == 8002 - stored
    at_rest("export", str(tmp_path / "again"), "--db", str(target))
    assert body((tmp_path / "again").read_bytes()) == body(big.read_bytes())


def test_one_that_writes_meanwhile_takes_numbers_and_the_rest_is_merged(big, tmp_path):
    lines = big.read_bytes().splitlines(keepends=True)
    with opened(tmp_path / "here.db") as here:
        assert here.take_export(b"".join(lines[:2000]), 2)["exact"] is True
        here.add_update({"task_id": "1", "source": "s", "message": "meanwhile", "tags": []})
        rest = lines[:1] + lines[1999:]
        assert here.take_export(b"".join(rest), 2000)["exact"] is False
        assert here.store.read(lambda q: q.updates(monitor.EVERYTHING, {})[1]) == 8001
        assert here.take_export(b"".join(lines), 2)["updates"] == 0
        assert here.store.read(monitor.Queries.check) == []


def test_a_line_that_is_wrong_is_named_and_what_came_before_stays(big, tmp_path):
    lines = big.read_bytes().splitlines(keepends=True)
    lines[6000] = lines[6000].replace(b'"source"', b'"sauce"')
    (tmp_path / "bad").write_bytes(b"".join(lines))
    ran = at_rest("import", str(tmp_path / "bad"), "--db", str(tmp_path / "here.db"))
    assert ran.status == 1 and ran.out == "" and one_sentence(ran.error)
    assert "line 6001:" in ran.error and "nothing from line " in ran.error
    first = int(ran.error.split("nothing from line ")[1].split()[0])
    assert rows_of(tmp_path / "here.db") == first - 4  # header, workstream and task are no rows of the log
    assert at_rest("import", str(big), "--db", str(tmp_path / "here.db")).json["exact"] is True


# --- refused ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[bytes]:
    """The lines of a small export."""
    path = tmp_path_factory.mktemp("small") / "monitor.db"
    made_before(path, 3)
    with opened(path) as made:
        return exported(made).splitlines(keepends=True)


UPDATE = 5  # the line of the first update
WRONG = {
    "no JSON": b"{nope\n",
    "no object": b"[]\n",
    "an unknown event": b'{"event":"drop_table","id":9,"data":{}}\n',
    "a table that is not exported": b'{"event":"ended_sessions","data":{"signature":"x","until":"x"}}\n',
    "an event without its number": b'{"event":"update","data":{}}\n',
    "NUL": lambda line: line.replace(b"old news 0", b"old\\u0000news"),
    "a lone surrogate": lambda line: line.replace(b"old news 0", b"old \\ud800 news"),
    "not UTF-8": lambda line: line.replace(b"old news 0", b"old \xff news"),
    "a number that is none": lambda line: line.replace(b'"x', b'{"x":1e999},"x', 1),
    "an unknown field": lambda line: line.replace(b'"source"', b'"extra":1,"source"'),
    "a missing field": lambda line: line.replace(b'"source":"old",', b""),
    "a wrong level": lambda line: line.replace(b'"kind"', b'"level":"loud","kind"'),
    "a message that is too long": lambda line: line.replace(b"old news 0", b"x" * 65537),
    "a time that does not sort": lambda line: line.replace(
        b"2020-01-31T09:30:00.000000Z", b"2020-01-31T09:30:00+01:00"
    ),
    "an id that is none": lambda line: line.replace(b'"task_id":"', b'"task_id":"x'),
    "a task that is not there": lambda line: line.replace(
        b'"task_id":"', b'"task_id":"00000000-0000-4000-8000-00000000000'
    ),
    "another number": lambda line: line.replace(b'"seq":3', b'"seq":4'),
    "a number too large": lambda line: line.replace(b'"id":3,', b'"id":9223372036854775807,').replace(
        b'"seq":3', b'"seq":9223372036854775807'
    ),
    "a workstream that is not there": lambda line: line.replace(b'"workstream":1', b'"workstream":77'),
    "no workstream": lambda line: line.replace(b',"workstream":1', b""),
    "too deep": lambda line: line.replace(b'"text"', b'"deep":' + b"[" * 80 + b"]" * 80 + b',"text"'),
    "a state of a run that is none": b'{"event":"sessions","data":{"agent":"x","id":"x","state":"happy"}}\n',
    "an unknown column": b'{"event":"folders","data":{"path":"x","workstream) VALUES (1); --":1}}\n',
    "a column that is none": b'{"event":"folders","data":{"path":{"a":1}}}\n',
    "a digest that is none": b'{"event":"idempotency_keys","data":{"key":"x","digest":"zz"}}\n',
    "a link to no task": b'{"event":"links","data":{"kind":"branch","value":"x","task":null}}\n',
    "no digest": b'{"event":"idempotency_keys","data":{"key":"x","digest":null,"created_at":null}}\n',
    "a second header": lambda line: b'{"event":"export","data":{}}\n',
}


@pytest.mark.parametrize("what", WRONG)
def test_what_an_export_cannot_hold_is_refused_with_its_line(lines, tmp_path, what):
    wrong = WRONG[what] if isinstance(WRONG[what], bytes) else WRONG[what](lines[UPDATE])
    assert wrong != lines[UPDATE]
    with opened(tmp_path / "here.db") as here, pytest.raises(monitor.Problem, match=r"^line 6: ") as told:
        here.take_export(b"".join([*lines[:UPDATE], wrong, *lines[UPDATE + 1 :]]), 2)
    assert told.value.status == 400 and len(told.value.message.splitlines()) == 1
    with opened(tmp_path / "here.db") as here:
        assert head_of(here) == 0
        assert here.store.read(lambda q: q.tasks({})) == []


def test_numbers_never_fall(lines, tmp_path):
    """A file that gives an update a number below the counter's."""
    moved = lines[UPDATE].replace(b'"id":3,', b'"id":1,', 1).replace(b'"seq":3', b'"seq":1')
    with opened(tmp_path / "here.db") as here:
        here.take_export(b"".join([*lines[:-1], moved, lines[-1]]), 2)
        assert head_of(here) == 5
        assert here.store.read(monitor.Queries.check) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no export"),
        (b"some text\n", "no export"),
        (b'{"event":"hello","data":{"stream":"x","seq":1}}\n', "no export"),
        (gzip.compress(b"anything", mtime=0), "gunzip"),
        (
            lambda lines: lines[0].replace(b'"format":1', b'"format":2') + b"".join(lines[1:]),
            "update Monitor",
        ),
        (lambda lines: b"".join(lines[:-1]), "not whole"),
        (lambda lines: b"".join(lines)[:-40], "not whole"),
    ],
)
def test_a_file_that_is_no_whole_export_is_refused_and_nothing_stored(lines, tmp_path, content, says):
    (tmp_path / "file").write_bytes(content if isinstance(content, bytes) else content(lines))
    ran = at_rest("import", str(tmp_path / "file"), "--db", str(tmp_path / "here.db"))
    assert ran.status == 1 and ran.out == "" and one_sentence(ran.error) and says in ran.error
    assert os.listdir(tmp_path) == ["file"]


def test_a_missing_file_and_a_missing_server_are_said_in_a_sentence(tmp_path, lines):
    (tmp_path / "file").write_bytes(b"".join(lines))
    for ran in (
        at_rest("import", str(tmp_path / "nope"), "--db", str(tmp_path / "here.db")),
        at_rest("import", str(tmp_path / "file"), MONITOR_DB=str(tmp_path / "nope.db")),
        at_rest("export", str(tmp_path / "out"), MONITOR_DB=str(tmp_path / "nope.db")),
        at_rest("export", str(tmp_path / "file"), MONITOR_DB=str(tmp_path / "nope.db")),
        at_rest("export", str(tmp_path / "no" / "out"), "--db", str(tmp_path / "file")),
    ):
        assert ran.status == 1 and ran.out == "" and one_sentence(ran.error)
    assert sorted(os.listdir(tmp_path)) == ["file", "file.lock"]
    assert (tmp_path / "file").read_bytes() == b"".join(lines)


# --- who may ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_without_a_token_nobody_exports_or_imports(fresh, tmp_path, lines, mode):
    server = fresh(MONITOR_API_TOKENS=TOKEN, MONITOR_AUTH_MODE=mode)
    (tmp_path / "file").write_bytes(b"".join(lines))
    for arguments in (["export", str(tmp_path / "out")], ["import", str(tmp_path / "file")]):
        ran = on(server, *arguments)
        assert ran.status == 4 and ran.out == "" and one_sentence(ran.error)
        assert on(server, *arguments, MONITOR_TOKEN=TOKEN).status == 0
    assert (tmp_path / "out").read_bytes().endswith(monitor.END_LINE)


def post(server: Server, content: bytes, **headers: str):
    """Send a part of an export as it is."""
    kind = {"Content-Type": "application/x-ndjson"}
    return server.session.post(server.url + "/api/admin/import", content, headers=kind | headers, timeout=30)


def test_other_sites_and_other_media_types_are_refused(fresh, lines):
    server, content = fresh(), b"".join(lines)
    assert post(server, content, Origin="https://evil.example").status_code == 403
    assert post(server, content, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert server.ask("GET", "/api/admin/export", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert post(server, content, **{"Content-Type": "text/plain"}).status_code == 415
    assert post(server, content, **{"Content-Type": "application/x-www-form-urlencoded"}).status_code == 415
    assert post(server, b"x" * (25 * 1024 * 1024 + 1)).status_code == 413
    assert server.get("/health", full="1")["seq"] == 0
    assert post(server, content).json() == {"updates": 3, "changes": 4, "known": 1, "exact": True}


# --- as a command ----------------------------------------------------------------------------------------


def test_through_a_pipe(rich, tmp_path):
    source, target = shutil.copy(rich, tmp_path / "a.db"), tmp_path / "b.db"
    reader = start("export", "-", "--db", str(source), stdout=subprocess.PIPE)
    writer = start("import", "-", "--db", str(target), stdin=reader.stdout, stdout=subprocess.PIPE)
    reader.stdout.close()
    assert json.loads(writer.communicate()[0])["exact"] is True
    assert (reader.wait(), writer.returncode) == (0, 0)
    with opened(source) as there, opened(target) as here:
        assert body(exported(here)) == body(exported(there))


def test_a_pipe_that_ends_early_says_that_what_it_had_is_stored(lines, tmp_path):
    writer = start(
        "import", "-", "--db", str(tmp_path / "b.db"), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    error = writer.communicate(b"".join(lines[:-1]))[1].decode()
    assert writer.returncode == 1 and one_sentence(error) and "what it has was stored" in error
    assert rows_of(tmp_path / "b.db") == 5


def test_nobody_reads_the_rest(big, tmp_path):
    reader = start(
        "export", "-", "--db", str(big.parent / "monitor.db"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    reader.stdout.read(1000)
    reader.stdout.close()
    assert reader.stderr.read() == b""
    reader.stderr.close()
    assert reader.wait() == 1


def test_a_server_that_dies_leaves_no_half_file(big, tmp_path):
    """Stopped by a proxy in between that passes on only the beginning."""
    with serving(Server, big.parent / "monitor.db", **FOREVER) as server:
        slow = start("export", str(tmp_path / "out"), "--server", server.url, stderr=subprocess.PIPE)
        wait_until(lambda: os.listdir(tmp_path) or slow.poll() is not None)
        server.kill()
        error = slow.communicate()[1].decode()
        if slow.returncode == 0:
            pytest.skip("the export was faster than the kill")
        assert one_sentence(error)
        assert os.listdir(tmp_path) == []


def test_progress_is_shown_on_a_terminal_only(big, tmp_path):
    import pty

    leader, follower = pty.openpty()
    running = start(
        "import", str(big), "--db", str(tmp_path / "b.db"), stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 65536):
            shown += chunk
    assert json.loads(running.communicate()[0])["updates"] == 8000
    os.close(leader)
    assert b"Import" in shown and b"100%" in shown
    quiet = at_rest("--quiet", "export", str(tmp_path / "x"), "--db", str(tmp_path / "b.db"))
    assert quiet == (0, "", "")


def test_readers_of_a_server_see_the_events_of_an_import(rich, tmp_path):
    """Also with the gaps that pruning left: each once, in order; then what is said next."""
    at_rest("export", str(tmp_path / "file"), "--db", str(rich))
    logged = [json.loads(line) for line in (tmp_path / "file").read_bytes().splitlines()]
    logged = [line for line in logged if "id" in line]
    with serving(Server, tmp_path / "here.db", **FOREVER) as server:
        with reading(server) as events:
            next_of(events, 1, "hello")
            assert on(server, "import", str(tmp_path / "file")).json["exact"] is True
            said = server.say({"id": "1"}, "and on it goes")
            got = []
            for kind, data, seq in events:
                if kind not in ("hello", "reset", "checkpoint"):
                    got.append((kind, int(seq), data))
                if data == said:
                    break
        assert got[:-1] == [(line["event"], line["id"], line["data"]) for line in logged]
        assert got[-1] == ("update", said["seq"], said)


def test_others_write_while_an_export_and_an_import_run(big, tmp_path):
    with serving(Server, tmp_path / "here.db", **FOREVER) as server:
        task, ended, said = server.new_task(), threading.Event(), []

        def write() -> None:
            while not ended.is_set():
                said.append(server.say(task, f"meanwhile {len(said)}")["seq"])

        writer = threading.Thread(target=write)
        writer.start()
        try:
            wait_until(lambda: len(said) > 5)
            assert on(server, "import", str(big)).json["updates"] == 8000
            before = len(said)
            assert on(server, "export", str(tmp_path / "out")).status == 0
        finally:
            ended.set()
            writer.join()
        rows = [json.loads(line) for line in (tmp_path / "out").read_bytes().splitlines()]
        seqs = [row["id"] for row in rows if "id" in row]
        assert seqs == list(range(1, rows[0]["data"]["head"] + 1)), "one snapshot"
        assert set(said[:before]) <= set(seqs)
        assert on(server, "check").json["ok"] is True


def peak(*arguments: str) -> int:
    """Run a command; the most memory that it took, in bytes."""
    running = start(*arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0
    return usage.ru_maxrss * 1024


def written(path: Path, count: int) -> Path:
    """An export with updates of 20 KB each."""
    first, second = (f"00000000-0000-4000-8000-00000000000{number}" for number in (1, 2))
    moment = "2020-01-31T09:30:00.000000Z"
    row = {
        "id": first,
        "name": "w",
        "status": "active",
        "created_at": moment,
        "updated_at": moment,
        "metadata": {},
    }
    header = {
        "format": 1,
        "version": "0.1.0",
        "stream": first,
        "head": count,
        "pruned": 0,
        "exported_at": moment,
    }
    said = {
        "task_id": second,
        "source": "s",
        "timestamp": moment,
        "message": "m",
        "tags": [],
        "data": "x" * 20_000,
    }
    with path.open("wb") as file:
        file.write(monitor.encode_line("export", header))
        file.write(monitor.encode_line("workstreams", row | {"number": 1}))
        file.write(monitor.encode_line("tasks", row | {"number": 1, "id": second, "workstream": first}))
        for seq in range(1, count + 1):
            line = {"event": "update", "id": seq, "data": {"seq": seq, "id": str(UUID(int=seq)), **said}}
            file.write(monitor.dump(line | {"task": 1, "workstream": 1}).encode() + b"\n")
        file.write(monitor.END_LINE)
    return path


def test_memory_does_not_grow_with_the_log(tmp_path):
    """Client and server are one process here; held as a whole, in whatever form, the log would show."""
    taken = {}
    for count in (300, 3000):
        file, target, copy = (tmp_path / f"{name}{count}" for name in ("file", "here", "copy"))
        taken[count] = peak("import", str(written(file, count)), "--db", str(target))
        taken[count] = max(taken[count], peak("export", str(copy), "--db", str(target)))
        events = [
            [line for line in path.read_bytes().splitlines() if b'"update"' in line[:20]]
            for path in (file, copy)
        ]
        assert len(events[0]) == count and events[0] == events[1]
    assert file.stat().st_size > 60_000_000
    assert taken[3000] < taken[300] + 25_000_000


# --- on a terminal ---------------------------------------------------------------------------------------


def test_a_bar_is_full_in_the_end_and_what_follows_stands_below_it(fresh, tmp_path):
    server = fresh()
    server.say(server.new_task(), "kept")
    for words in (("export", str(tmp_path / "kept.ndjson")), ("import", str(tmp_path / "kept.ndjson"))):
        told = in_terminal(*words, MONITOR_SERVER=server.url)
        bar, *lines = told.out.split("\n")
        assert told.status == 0 and "100%" in bar.rpartition("\r")[2] and lines[0].startswith(words[0])
