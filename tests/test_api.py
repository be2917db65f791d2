"""The wire contract: what clients of the API rely on, asked over real sockets."""

from __future__ import annotations

import datetime
import json
import re
import socket
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from wire import NOWHERE, exchange, head, nothing_stored, refused, request_bytes, words

pytestmark = pytest.mark.usefixtures("answers_conform")

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00)")
ANY_JSON = [{"a": [1, None, {"b": True}]}, [], [1, "two"], "text", "", 0, -1.5, False, "é\u2028😀"]


def new_workstream(server, name: str = "a workstream", **fields) -> dict:
    """A workstream of its own."""
    return server.post("/api/workstreams", name=name, **fields)


def patch(server, path: str, **changes) -> dict:
    """The JSON of a PATCH that succeeds."""
    response = server.ask("PATCH", path, changes)
    assert response.status_code == 200, response.text
    return response.json()


def change(server, task: dict, **changes) -> dict:
    """A task after a change."""
    return patch(server, f"/api/tasks/{task['id']}", **changes)


def listed(server, path: str, **query) -> list[dict]:
    """The items of a list that is whole: its total is their number."""
    answer = server.get(path, **query)
    assert answer["total"] == len(answer["items"])
    return answer["items"]


def tasks_of(server, workstream_id: str, **query) -> list[str]:
    """The names of a workstream's tasks, as listed."""
    return [task["name"] for task in listed(server, "/api/tasks", workstream_id=workstream_id, **query)]


def messages(server, task: dict, **query) -> list[str]:
    """The messages of a task's updates, as listed."""
    query = {"task_id": task["id"]} | query
    return [update["message"] for update in server.get("/api/updates", **query)["items"]]


def instant(text: str) -> datetime.datetime:
    """A timestamp of the API as a moment."""
    assert MOMENT.fullmatch(text), text
    return datetime.datetime.fromisoformat(text)


# ------------------------------------------------------------------------------------------------------
# health, paths, methods
# ------------------------------------------------------------------------------------------------------


def test_health_says_ok_and_nothing_else(server):
    response = server.ask("GET", "/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


NO_PATHS = words(
    """
    /nope /api /api/ /api/nope /api/tasks/ /api/workstreams/ /api/updates/ /health/ /API/tasks /api/task
    /api/updates/999999999 /api/updates/0 /api/updates/nope /api/updates/-1 /api/tasks/999999999
    /api/tasks/nope /api/workstreams/nope
    """
)
NO_PATHS += [f"/api/tasks/{NOWHERE}", f"/api/workstreams/{NOWHERE}"]


@pytest.mark.parametrize("path", NO_PATHS)
def test_an_unknown_path_is_not_found(server, path):
    refused(server.ask("GET", path), 404, "not_found")


@pytest.mark.parametrize("path", [path for path in NO_PATHS if re.match("/api/(tasks|workstreams)/.", path)])
def test_what_is_unknown_cannot_be_changed(server, path):
    with nothing_stored(server):
        refused(server.ask("PATCH", path, {"name": "new"}), 404, "not_found")


NO_METHODS = [
    ("POST", "/health"),
    ("PUT", "/api/workstreams"),
    ("DELETE", "/api/workstreams/1"),
    ("DELETE", "/api/tasks"),
    ("DELETE", "/api/tasks/1"),
    ("POST", "/api/tasks/1"),
    ("PATCH", "/api/tasks"),
    ("PATCH", "/api/updates/1"),
    ("DELETE", "/api/updates/1"),
    ("POST", "/api/stream"),
    ("TRACE", "/api/tasks"),
    ("BREW", "/api/tasks"),
]


@pytest.mark.parametrize(("method", "path"), NO_METHODS)
def test_a_path_says_which_methods_it_takes(server, method, path):
    with nothing_stored(server):
        response = server.ask(method, path, {})
        refused(response, 405, "method_not_allowed")
    assert method not in words(response.headers["Allow"].replace(",", " "))


def test_head_answers_as_get_does_without_a_body(server):
    response = server.ask("HEAD", "/api/tasks")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Type"].startswith("application/json")


@pytest.mark.parametrize(
    "path", words("/health /api/tasks /api/nope /dashboard /api/stream /api/stream?poll=1")
)
def test_the_answer_to_head_ends_with_its_headers(server, path):
    pipelined = request_bytes(server, "HEAD", path, Content_Length=None, Connection="keep-alive")
    pipelined += request_bytes(server, "GET", "/health")
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(pipelined)
        answers = b"".join(iter(lambda: connection.recv(65536), b""))
    _, _, after_head = answers.partition(b"\r\n\r\n")
    assert after_head == b"" or after_head.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("accept", ["text/html", "text/html,*/*;q=0.8", "image/png", "nonsense"])
def test_the_api_speaks_json_whatever_is_preferred(server, accept):
    refused(server.ask("GET", "/api/tasks/nope", headers={"Accept": accept}), 404, "not_found")
    assert server.ask("GET", "/api/tasks", headers={"Accept": accept}).json()["items"] is not None


# ------------------------------------------------------------------------------------------------------
# workstreams
# ------------------------------------------------------------------------------------------------------


def test_a_new_workstream_is_active_and_has_empty_metadata(server):
    made = new_workstream(server, "Größe 測試 😀")
    assert ID.fullmatch(made["id"])
    assert (made["name"], made["status"], made["metadata"]) == ("Größe 測試 😀", "active", {})
    assert instant(made["created_at"]) == instant(made["updated_at"])
    assert None not in made.values()


@pytest.mark.parametrize("metadata", ANY_JSON)
def test_metadata_is_any_json(server, metadata):
    workstream = new_workstream(server, metadata=metadata)
    assert workstream["metadata"] == metadata
    assert server.get(f"/api/workstreams/{workstream['id']}")["metadata"] == metadata
    task = server.post("/api/tasks", workstream_id=workstream["id"], name="a task", metadata=metadata)
    assert server.get(f"/api/tasks/{task['id']}")["metadata"] == metadata
    assert change(server, task, metadata={"b": 1})["metadata"] == {"b": 1}
    assert change(server, task, metadata=metadata)["metadata"] == metadata


def test_workstreams_are_listed_oldest_first_with_their_total(server):
    made = [new_workstream(server, name) for name in ("b", "a", "c")]
    assert listed(server, "/api/workstreams")[-3:] == made


def test_an_archived_workstream_is_listed_only_when_asked_for(server):
    kept, archived = new_workstream(server, "kept"), new_workstream(server, "archived")
    path = f"/api/workstreams/{archived['id']}"
    archived = patch(server, path, status="archived")
    assert archived["status"] == "archived"
    assert listed(server, "/api/workstreams")[-1] == kept
    assert listed(server, "/api/workstreams", include_archived="false")[-1] == kept
    assert listed(server, "/api/workstreams", include_archived="true")[-2:] == [kept, archived]
    assert server.get(path) == archived
    patch(server, path, status="active")
    assert [one["id"] for one in listed(server, "/api/workstreams")[-2:]] == [kept["id"], archived["id"]]


@pytest.mark.parametrize("changes", [{"name": "new"}, {"status": "archived"}, {"metadata": {"a": 1}}])
def test_a_change_of_a_workstream_changes_that_alone(server, changes):
    before = new_workstream(server)
    after = patch(server, f"/api/workstreams/{before['id']}", **changes)
    assert after == before | changes | {"updated_at": after["updated_at"]}
    assert instant(after["updated_at"]) > instant(before["updated_at"])
    assert server.get(f"/api/workstreams/{before['id']}") == after


# ------------------------------------------------------------------------------------------------------
# tasks
# ------------------------------------------------------------------------------------------------------


def test_a_new_task_is_active_and_leaves_out_what_it_does_not_have(server):
    workstream = new_workstream(server)
    made = server.post("/api/tasks", workstream_id=workstream["id"], name="a task")
    assert ID.fullmatch(made["id"])
    assert made["workstream_id"] == workstream["id"]
    assert (made["name"], made["status"], made["metadata"]) == ("a task", "active", {})
    assert instant(made["created_at"]) == instant(made["updated_at"])
    assert None not in made.values()
    optional = words("summary_text summary_updated_at summary_source hidden_at attention ci pull_requests")
    assert not made.keys() & set(optional)
    assert server.get(f"/api/tasks/{made['id']}") == made


def test_tasks_are_numbered_for_people(fresh):
    server = fresh()
    workstream = new_workstream(server)["id"]
    assert [server.new_task(workstream=workstream)["number"] for _ in range(3)] == [1, 2, 3]
    assert [task["number"] for task in listed(server, "/api/tasks")] == [1, 2, 3]


def test_tasks_are_listed_oldest_first(server):
    workstream = new_workstream(server)["id"]
    for name in ("b", "a", "c"):
        server.new_task(name, workstream)
    assert tasks_of(server, workstream) == ["b", "a", "c"]


def test_tasks_are_filtered_by_workstream_and_status(server):
    here, there = new_workstream(server)["id"], new_workstream(server)["id"]
    for status in ("active", "blocked", "done", "cancelled"):
        change(server, server.new_task(status, here), status=status)
    change(server, server.new_task("elsewhere", there), status="done")
    assert tasks_of(server, here) == ["active", "blocked", "done", "cancelled"]
    for status in ("active", "blocked", "done", "cancelled"):
        assert tasks_of(server, here, status=status) == [status]
    assert tasks_of(server, there, status="blocked") == []
    assert tasks_of(server, NOWHERE) == []


def test_a_hidden_task_is_listed_only_when_asked_for(server):
    task = server.new_task("hidden")
    hidden = change(server, task, hidden=True)
    assert instant(hidden["hidden_at"]) >= instant(task["created_at"])
    assert tasks_of(server, task["workstream_id"]) == []
    assert tasks_of(server, task["workstream_id"], include_hidden="false") == []
    assert tasks_of(server, task["workstream_id"], include_hidden="true") == ["hidden"]
    assert server.get(f"/api/tasks/{task['id']}") == hidden
    assert "hidden_at" not in change(server, task, hidden=False)
    assert tasks_of(server, task["workstream_id"]) == ["hidden"]


def test_tasks_of_an_archived_workstream_are_listed_only_when_asked_for(server):
    task = server.new_task("shelved")
    patch(server, f"/api/workstreams/{task['workstream_id']}", status="archived")
    assert task["id"] not in [one["id"] for one in listed(server, "/api/tasks")]
    assert task["id"] in [one["id"] for one in listed(server, "/api/tasks", include_archived="true")]
    assert tasks_of(server, task["workstream_id"], include_archived="true") == ["shelved"]
    assert server.get(f"/api/tasks/{task['id']}") == task


@pytest.mark.parametrize(
    "changes", [{"name": "new"}, {"status": "blocked"}, {"metadata": [1]}, {"name": "new", "status": "done"}]
)
def test_a_change_of_a_task_changes_that_alone(server, task, changes):
    after = change(server, task, **changes)
    assert after == task | changes | {"updated_at": after["updated_at"]}
    assert instant(after["updated_at"]) > instant(task["updated_at"])
    assert server.get(f"/api/tasks/{task['id']}") == after


def test_a_task_moves_to_another_workstream(server, task):
    there = new_workstream(server)["id"]
    assert change(server, task, workstream_id=there)["workstream_id"] == there
    assert tasks_of(server, task["workstream_id"]) == []
    assert tasks_of(server, there) == [task["name"]]


def test_a_task_stays_where_it_is_when_it_cannot_be_moved(server, task):
    with nothing_stored(server):
        refused(
            server.ask("PATCH", f"/api/tasks/{task['id']}", {"workstream_id": NOWHERE, "name": "new"}),
            404,
            "not_found",
        )
    assert server.get(f"/api/tasks/{task['id']}") == task


def test_a_summary_is_stamped_and_is_manual_unless_it_says_otherwise(server, task):
    first = change(server, task, summary_text="it goes on")
    assert (first["summary_text"], first["summary_source"]) == ("it goes on", "manual")
    assert instant(first["summary_updated_at"]) > instant(task["created_at"])
    second = change(server, task, summary_text="it is done", summary_source="agent")
    assert (second["summary_text"], second["summary_source"]) == ("it is done", "agent")
    assert instant(second["summary_updated_at"]) > instant(first["summary_updated_at"])
    third = change(server, task, summary_text="really")
    assert (third["summary_text"], third["summary_source"]) == ("really", "manual")


def test_another_change_leaves_the_summary_alone(server, task):
    written = change(server, task, summary_text="it goes on", summary_source="agent")
    renamed = change(server, task, name="new")
    for name in ("summary_text", "summary_source", "summary_updated_at"):
        assert renamed[name] == written[name]


def test_an_empty_summary_clears_it(server, task):
    change(server, task, summary_text="it goes on", summary_source="agent")
    cleared = change(server, task, summary_text="")
    assert "summary_text" not in cleared
    assert None not in cleared.values()
    assert "summary_text" not in server.get(f"/api/tasks/{task['id']}")


def test_a_body_without_changes_changes_nothing(server, task):
    with nothing_stored(server):
        assert change(server, task) == task
        assert change(server, task, unknown="field", id=NOWHERE, number=7) == task


def test_lists_of_tasks_and_workstreams_hold_all_of_them(server):
    before = len(listed(server, "/api/tasks")), len(listed(server, "/api/workstreams"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: server.new_task(f"task {number}"), range(210)))
    after = len(listed(server, "/api/tasks", limit=10)), len(listed(server, "/api/workstreams", limit=10))
    assert after == (before[0] + 210, before[1] + 210)


TASK_SEARCHES = [
    ("billing", ["billing service", "invoices"]),
    ("BILLING service", ["billing service"]),
    ("cafe", ["Café"]),
    ('"billing" OR (café', []),
    ("billing*", ["billing service", "invoices"]),
    ("name:billing", []),
    ("billing NOT service", []),
    ("***", []),
]


@pytest.mark.parametrize(("q", "found"), TASK_SEARCHES)
def test_tasks_are_searched_by_names_and_summaries(server, q, found):
    workstream = new_workstream(server)["id"]
    server.new_task("billing service", workstream)
    change(server, server.new_task("invoices", workstream), summary_text="waits for billing")
    server.new_task("Café", workstream)
    assert tasks_of(server, workstream, q=q) == found


def test_a_search_of_tasks_knows_their_names_and_summaries_of_now(server, task):
    def found(q: str) -> bool:
        return bool(tasks_of(server, task["workstream_id"], q=q))

    change(server, task, name="walrus", summary_text="penguin")
    assert (found("walrus"), found("penguin")) == (True, True)
    change(server, task, name="tortoise")
    assert (found("walrus"), found("tortoise"), found("penguin")) == (False, True, True)
    change(server, task, summary_text="")
    assert (found("tortoise"), found("penguin")) == (True, False)
    change(server, task, hidden=True)
    assert found("tortoise") is False
    everywhere = listed(server, "/api/tasks", q="tortoise", status="active", include_hidden="true")
    assert [one["id"] for one in everywhere] == [task["id"]]


# ------------------------------------------------------------------------------------------------------
# naming tasks and workstreams
# ------------------------------------------------------------------------------------------------------

TWIN_ONE, TWIN_TWO = "aaaa1111-0000-4000-8000-000000000001", "aaaa2222-0000-4000-8000-000000000002"
NUMBERED, LOOKALIKE = "bbbb1111-0000-4000-8000-000000000003", "4321cccc-0000-4000-8000-000000000004"


@pytest.fixture(scope="module")
def lookalikes(tmp_path_factory):
    """Tasks with known ids: two begin alike, and one begins with the number of another."""
    database = tmp_path_factory.mktemp("lookalikes") / "monitor.db"
    server = Server(database)
    tasks = [server.new_task(name) for name in ("twin one", "twin two", "number 4321", "id 4321")]
    server.stop()
    db = sqlite3.connect(database)
    with db:
        for task, identity in zip(tasks, (TWIN_ONE, TWIN_TWO, NUMBERED, LOOKALIKE), strict=True):
            db.execute("UPDATE tasks SET id = ? WHERE id = ?", (identity, task["id"]))
            db.execute("UPDATE workstreams SET id = ? WHERE id = ?", (identity, task["workstream_id"]))
        db.execute("UPDATE tasks SET number = 4321 WHERE id = ?", (NUMBERED,))
    db.close()
    server.start()
    for identity in (TWIN_ONE, TWIN_TWO, NUMBERED, LOOKALIKE):
        server.post("/api/updates/manual", task_id=identity, message=identity)
    yield server
    assert server.stop() == 0


NAMES = [
    (TWIN_ONE, TWIN_ONE),
    (TWIN_ONE.upper(), TWIN_ONE),
    (TWIN_ONE[:8], TWIN_ONE),
    (TWIN_TWO[:-1], TWIN_TWO),
    ("AAAA2", TWIN_TWO),
    ("bbbb", NUMBERED),
    ("1", TWIN_ONE),
    ("2", TWIN_TWO),
    ("4321", NUMBERED),
    ("4321c", LOOKALIKE),
]


@pytest.mark.parametrize(("name", "identity"), NAMES)
def test_a_task_goes_by_its_id_its_number_first_or_a_prefix(lookalikes, name, identity):
    assert lookalikes.get(f"/api/tasks/{name}")["id"] == identity
    assert patch(lookalikes, f"/api/tasks/{name}", metadata={"by": name})["id"] == identity
    found = lookalikes.get("/api/updates", task_id=name)["items"]
    assert [update["message"] for update in found] == [identity]


@pytest.mark.parametrize(
    ("name", "identity"), [(TWIN_ONE, TWIN_ONE), ("aaaa2", TWIN_TWO), ("bbbb", NUMBERED), ("4321", LOOKALIKE)]
)
def test_a_workstream_goes_by_its_id_or_a_prefix(lookalikes, name, identity):
    assert lookalikes.get(f"/api/workstreams/{name}")["id"] == identity
    assert patch(lookalikes, f"/api/workstreams/{name}", metadata={"by": name})["id"] == identity
    found = lookalikes.get("/api/updates", workstream_id=name)["items"]
    assert [update["message"] for update in found] == [identity]
    assert [task["id"] for task in listed(lookalikes, "/api/tasks", workstream_id=name)] == [identity]


@pytest.mark.parametrize("name", ["aaaa", "AAAA", TWIN_ONE[:4]])
def test_a_prefix_of_several_is_a_conflict(lookalikes, name):
    with nothing_stored(lookalikes):
        for kind in ("tasks", "workstreams"):
            refused(lookalikes.ask("GET", f"/api/{kind}/{name}"), 409, "conflict")
            refused(lookalikes.ask("PATCH", f"/api/{kind}/{name}", {"name": "new"}), 409, "conflict")
        refused(lookalikes.ask("GET", f"/api/updates?task_id={name}"), 409, "conflict")
        refused(lookalikes.ask("GET", f"/api/updates?workstream_id={name}"), 409, "conflict")
        refused(lookalikes.ask("GET", f"/api/tasks?workstream_id={name}"), 409, "conflict")
        refused(lookalikes.ask("GET", f"/api/stream?task_id={name}&poll=1"), 409, "conflict")


@pytest.mark.parametrize("name", ["bbb", "b", "7", "99999", "aaaa3", "cccc", f"{NUMBERED}00"])
def test_a_name_of_nothing_is_not_found(lookalikes, name):
    refused(lookalikes.ask("GET", f"/api/tasks/{name}"), 404, "not_found")


@pytest.mark.parametrize("name", ["7", "99999", "aaaa3", "cccc", NOWHERE])
def test_a_filter_that_names_nothing_matches_nothing(lookalikes, name):
    for query in (f"task_id={name}", f"workstream_id={name}"):
        assert lookalikes.get(f"/api/updates?{query}") == {"items": [], "total": 0}
    assert lookalikes.get(f"/api/tasks?workstream_id={name}") == {"items": [], "total": 0}


# ------------------------------------------------------------------------------------------------------
# writing updates
# ------------------------------------------------------------------------------------------------------


def test_a_manual_update_is_stored_as_it_was_sent(server, task):
    fields = {"message": "Größe 測試 😀\nline two", "level": "warn", "kind": "decision", "tags": ["b", "a"]}
    update = server.say(task, data={"a": [None]}, **fields)
    assert isinstance(update["seq"], int)
    assert ID.fullmatch(update["id"])
    assert instant(update["timestamp"]) > instant(task["created_at"])
    assert update == update | fields | {"task_id": task["id"], "source": "manual", "data": {"a": [None]}}
    assert server.get(f"/api/updates/{update['seq']}") == update
    assert server.get("/api/updates", task_id=task["id"]) == {"items": [update], "total": 1}


def test_a_plain_update_leaves_out_what_it_does_not_have(server, task):
    update = server.say(task, "just words")
    assert update["tags"] == []
    assert update.keys() == {"seq", "id", "task_id", "source", "timestamp", "message", "tags"}


@pytest.mark.parametrize("data", ANY_JSON)
def test_data_is_any_json(server, task, data):
    update = server.say(task, "with data", data=data)
    assert update["data"] == data
    assert server.get(f"/api/updates/{update['seq']}")["data"] == data


@pytest.mark.parametrize("name", ["level", "kind", "tags", "data"])
def test_null_is_as_good_as_nothing(server, task, name):
    assert server.say(task, "with null", **{name: None}).get(name, []) == []


@pytest.mark.parametrize("level", ["info", "warn", "error"])
def test_an_update_has_one_of_three_levels(server, task, level):
    assert server.say(task, "how it is", level=level)["level"] == level
    assert messages(server, task, level=level) == ["how it is"]


def test_an_update_may_name_its_own_source(server, task):
    fields = {"task_id": task["id"], "source": "my-script", "message": "hello", "kind": "build_result"}
    fields |= {"level": "info", "tags": ["a"], "data": [1]}
    update = server.post("/api/updates", **fields)
    assert update == update | fields
    assert server.get("/api/updates", source="my-script", task_id=task["id"])["items"] == [update]


CHOSEN = {"id": NOWHERE, "seq": 1, "timestamp": "2001-01-01T00:00:00Z", "created_at": "2001-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/updates/manual", {"message": "mine", "source": "forged"}),
        ("/api/updates/claude-hook", {"payload": {"hook_event_name": "Stop"}, "source": "forged"}),
        ("/api/updates/github-webhook", {"payload": {"zen": "Calm."}, "source": "forged"}),
        ("/api/updates", {"message": "mine", "source": "my-script"}),
    ],
)
def test_what_a_client_may_not_set_is_ignored(server, task, path, fields):
    newest = head(server)
    update = server.post(path, task_id=task["id"], **fields, **CHOSEN)
    assert update["seq"] > newest
    assert update["id"] != NOWHERE
    assert instant(update["timestamp"]) > instant(task["created_at"])
    assert update["source"] != "forged"


def test_a_new_task_or_workstream_chooses_its_own_id(server):
    chosen = CHOSEN | {
        "updated_at": "2001-01-01T00:00:00Z",
        "number": 7777,
        "status": "done",
        "hidden_at": "now",
    }
    workstream = new_workstream(server, **chosen)
    task = server.post("/api/tasks", workstream_id=workstream["id"], name="a task", **chosen)
    for made in (workstream, task):
        assert made["id"] != NOWHERE
        assert made["status"] == "active"
        assert not made["created_at"].startswith("2001")
        assert not made["updated_at"].startswith("2001")
    assert task["number"] != 7777
    assert "hidden_at" not in task


def test_update_numbers_rise_over_all_tasks(server):
    tasks = [server.new_task(), server.new_task()]
    seqs = [server.say(tasks[turn % 2], f"turn {turn}")["seq"] for turn in range(6)]
    assert seqs == sorted(set(seqs))


def test_a_number_of_another_event_is_no_update(server, task):
    newest = head(server)
    assert server.say(task, "one more")["seq"] == newest + 1
    refused(server.ask("GET", f"/api/updates/{newest}"), 404, "not_found")


# ------------------------------------------------------------------------------------------------------
# hooks and webhooks of a named task
# ------------------------------------------------------------------------------------------------------


def claude(server, task: dict, **payload) -> dict:
    """The update that a Claude Code hook makes."""
    return server.post("/api/updates/claude-hook", task_id=task["id"], payload=payload)


def github(server, task: dict, event: str | None, **payload) -> dict:
    """The update that a GitHub webhook makes."""
    headers = {"headers": {"x-github-event": event}} if event else {}
    return server.post("/api/updates/github-webhook", task_id=task["id"], payload=payload, **headers)


def test_a_claude_hook_is_named_by_its_session_and_keeps_its_payload(server, task):
    payload = {
        "session_id": "s-1",
        "hook_event_name": "UserPromptSubmit",
        "prompt": "fix the build",
        "cwd": "/work",
    }
    update = claude(server, task, **payload)
    assert (update["source"], update["task_id"], update["data"]) == ("claude:s-1", task["id"], payload)


def test_a_claude_hook_without_a_session_is_of_an_unknown_one(server, task):
    assert claude(server, task, hook_event_name="Stop")["source"] == "claude:unknown"


def test_a_tool_use_is_tagged_with_its_tool(server, task):
    payload = {"tool_name": "Bash", "tool_input": {"command": "ls"}, "tool_response": {"stdout": "a.py"}}
    update = claude(server, task, hook_event_name="PostToolUse", **payload)
    assert (update["kind"], update["level"]) == ("tool_use", "info")
    assert "Bash" in update["tags"]


def test_a_tool_failure_says_what_went_wrong(server, task):
    payload = {"tool_name": "Bash", "error": "no such file: x.py"}
    update = claude(server, task, hook_event_name="PostToolUseFailure", **payload)
    assert (update["kind"], update["level"]) == ("tool_failure", "error")
    assert "no such file: x.py" in update["message"]
    assert "Bash" in update["tags"]


def test_an_unknown_event_is_named_in_the_message(server, task):
    assert "MoonRise" in claude(server, task, hook_event_name="MoonRise")["message"]


CLAUDE_EVENTS = words(
    """
    PreToolUse PostToolUse PostToolUseFailure Notification UserPromptSubmit Stop SubagentStart SubagentStop
    MoonRise SessionStart SessionEnd PreCompact PermissionRequest MessageDisplay FileChanged CwdChanged
    """
)


@pytest.mark.parametrize("event", CLAUDE_EVENTS)
def test_every_claude_event_is_stored(server, task, event):
    update = claude(server, task, hook_event_name=event, session_id="s-1", tool_name="Bash", tool_input={})
    assert server.get("/api/updates", task_id=task["id"])["items"] == [update]
    assert update["message"]


REPOSITORY = {"full_name": "octo/app", "html_url": "https://github.com/octo/app", "size": 987654}
RUN = {"name": "CI", "run_number": 7, "status": "completed", "conclusion": "failure", "head_branch": "main"}


@pytest.mark.parametrize(
    ("event", "kind", "payload"),
    [
        ("workflow_run", "ci_run", {"action": "completed", "workflow_run": RUN}),
        ("workflow_job", "ci_job", {"action": "completed", "workflow_job": RUN}),
    ],
)
def test_a_github_run_is_of_its_repository_and_tagged_with_event_and_action(
    server, task, event, kind, payload
):
    update = github(server, task, event, repository=REPOSITORY, sender={"login": "mona"}, **payload)
    assert (update["source"], update["kind"], update["level"]) == ("github:octo/app", kind, "error")
    assert {event, "completed"} <= set(update["tags"])


def test_a_github_update_keeps_a_curated_subset(server, task):
    update = github(server, task, "workflow_run", action="completed", workflow_run=RUN, repository=REPOSITORY)
    assert update["data"]
    assert "987654" not in json.dumps(update["data"])


@pytest.mark.parametrize("event", ["issues", "star", "moon_rise", None])
def test_any_other_github_event_has_its_own_kind_or_is_an_external_update(server, task, event):
    update = github(server, task, event, action="opened", repository=REPOSITORY)
    assert update["source"] == "github:octo/app"
    assert update["kind"]
    assert update["message"]
    if event == "moon_rise":
        assert update["kind"] in ("moon_rise", "external_update")


def test_a_github_webhook_without_a_repository_is_of_an_unknown_one(server, task):
    assert github(server, task, "push", ref="refs/heads/main")["source"] == "github:unknown/unknown"


def test_header_names_of_a_webhook_decide_whatever_the_payload_looks_like(server, task):
    assert "issues" in github(server, task, "issues", action="opened", workflow_run=RUN)["tags"]


# ------------------------------------------------------------------------------------------------------
# reading updates
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thread(server) -> dict:
    """A task with 205 updates: n = 0 .. 204."""
    task = server.new_task()
    for n in range(205):
        server.say(task, f"n = {n}")
    return task


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 50), (1, 1), (7, 7), (200, 200), (201, 200), (10**9, 200), (0, 1), (-5, 1)]
)
def test_a_page_holds_50_updates_or_as_many_as_asked_for_up_to_200(server, thread, limit, expected):
    query = {} if limit is None else {"limit": limit}
    answer = server.get("/api/updates", task_id=thread["id"], **query)
    assert [update["message"] for update in answer["items"]] == [f"n = {n}" for n in range(expected)]
    assert answer["total"] == 205


def test_the_newest_come_first_when_asked_for(server, thread):
    assert messages(server, thread, order="desc", limit=3) == ["n = 204", "n = 203", "n = 202"]
    assert messages(server, thread, order="asc", limit=2) == ["n = 0", "n = 1"]
    assert server.get("/api/updates", task_id=thread["id"], order="desc", limit=1)["total"] == 205


def test_the_total_may_be_left_out(server, thread):
    answer = server.get("/api/updates", task_id=thread["id"], total="false", limit=1)
    assert answer.keys() == {"items"}
    assert len(answer["items"]) == 1
    assert server.get("/api/updates", task_id=thread["id"], total="true", limit=1)["total"] == 205


def pages(server, task: dict, cursor: str, **query) -> list[str]:
    """The messages of a task, page by page, each asked for from where the one before ended."""
    found: list[str] = []
    for _ in range(9):  # two more than it takes
        items = server.get("/api/updates", task_id=task["id"], limit=30, **query)["items"]
        found += [update["message"] for update in items]
        query |= {cursor: items[-1]["seq"]} if items else {}
    return found


def test_pages_forwards_hold_every_update_once(server, thread):
    assert pages(server, thread, "after_seq", after_seq=0) == [f"n = {n}" for n in range(205)]


def test_pages_backwards_hold_every_update_once(server, thread):
    assert pages(server, thread, "before_seq", order="desc") == [f"n = {n}" for n in reversed(range(205))]


def test_both_cursors_frame_what_lies_between_them(server, thread):
    seqs = [update["seq"] for update in server.get("/api/updates", task_id=thread["id"], limit=10)["items"]]
    answer = server.get("/api/updates", task_id=thread["id"], after_seq=seqs[2], before_seq=seqs[5])
    assert [update["message"] for update in answer["items"]] == ["n = 3", "n = 4"]
    assert answer["total"] == 2


def test_nothing_comes_after_the_newest(server, thread):
    for seq in (head(server), 10**12, 2**63 - 1, 10**25):
        assert server.get("/api/updates", task_id=thread["id"], after_seq=seq) == {"items": [], "total": 0}


def test_without_a_filter_the_updates_of_all_tasks_come(server):
    newest = head(server)
    said = [server.say(server.new_task(), "one of many") for _ in range(3)]
    assert server.get("/api/updates", after_seq=newest)["items"] == said


@pytest.fixture(scope="module")
def mixed(server) -> dict:
    """A task with updates of several sources, kinds, levels and tags."""
    task = server.new_task()
    table = """
        one    ci      ci_run    info   a,b
        two    ci      ci_job    error  b
        three  manual  ci_run    error  c
        four   manual  decision  info   a,c,d
        five   other   decision  warn   -
    """
    for line in table.strip().splitlines():
        message, source, kind, level, tags = words(line)
        fields = {"source": source, "kind": kind, "level": level, "tags": tags.strip("-").split(",")}
        fields["tags"] = [tag for tag in fields["tags"] if tag]
        server.post("/api/updates", task_id=task["id"], message=message, **fields)
    server.say(task, "six")
    return task


FILTERS = [
    ({}, "one two three four five six"),
    ({"source": "ci"}, "one two"),
    ({"source": "manual"}, "three four six"),
    ({"kind": "ci_run"}, "one three"),
    ({"level": "error"}, "two three"),
    ({"tag": "a"}, "one four"),
    ({"tag": ["a", "b"]}, "one two four"),
    ({"tag": ["b", "c", "d"]}, "one two three four"),
    ({"tag": ["a", "a"]}, "one four"),
    ({"tag": ["a", "nope"]}, "one four"),
    ({"source": "ci", "level": "error"}, "two"),
    ({"kind": "ci_run", "tag": "c"}, "three"),
    ({"source": "manual", "kind": "decision", "level": "info", "tag": ["c", "d"]}, "four"),
    ({"source": "ci", "kind": "decision"}, ""),
    ({"source": "CI"}, ""),
    ({"source": "c"}, ""),
    ({"source": "nope"}, ""),
    ({"kind": "nope"}, ""),
    ({"tag": "nope"}, ""),
    ({"tag": "a,b"}, ""),
    ({"tag": "A"}, ""),
    ({"task_id": NOWHERE}, ""),
    ({"workstream_id": NOWHERE}, ""),
]


@pytest.mark.parametrize(("filters", "expected"), FILTERS, ids=str)
def test_filters_narrow_each_other_and_tags_widen(server, mixed, filters, expected):
    expected = words(expected)
    for place in ({"task_id": mixed["id"]}, {"workstream_id": mixed["workstream_id"]}):
        answer = server.get("/api/updates", **place | filters)
        assert [update["message"] for update in answer["items"]] == expected
        assert answer["total"] == len(expected)
        answer = server.get("/api/updates", order="desc", limit=2, **place | filters)
        assert [update["message"] for update in answer["items"]] == expected[::-1][:2]
        assert answer["total"] == len(expected)


def test_tags_of_all_tasks_are_found_once_each(server):
    tasks, tag = [server.new_task(), server.new_task()], f"tag-{head(server)}"
    said = [server.say(task, "tagged", tags=[tag, f"{tag}-too"]) for task in tasks]
    server.say(tasks[0], "not tagged")
    answer = server.get("/api/updates", tag=[tag, f"{tag}-too"])
    assert answer == {"items": said, "total": 2}


def test_a_workstream_holds_the_updates_of_all_its_tasks(server):
    workstream = new_workstream(server)["id"]
    for name in ("one", "two"):
        server.say(server.new_task(name, workstream), name)
    server.say(server.new_task(), "elsewhere")
    answer = server.get("/api/updates", workstream_id=workstream)
    assert [update["message"] for update in answer["items"]] == ["one", "two"]


def test_updates_of_hidden_tasks_and_archived_workstreams_stay_readable(server, task):
    server.say(task, "said")
    change(server, task, hidden=True)
    patch(server, f"/api/workstreams/{task['workstream_id']}", status="archived")
    assert messages(server, task) == ["said"]
    server.say(task, "said later")
    assert messages(server, task) == ["said", "said later"]


AWAY = datetime.timezone(datetime.timedelta(hours=5, minutes=30))


@pytest.mark.parametrize("write", [
    lambda moment: moment.isoformat(),
    lambda moment: moment.isoformat().replace("+00:00", "Z"),
    lambda moment: moment.astimezone(AWAY).isoformat(),
], ids=["+00:00", "Z", "+05:30"])  # fmt: skip
def test_since_and_until_frame_a_time(server, task, write):
    times = [instant(server.say(task, message)["timestamp"]) for message in ("one", "two", "three")]
    assert times[0] < times[1] < times[2]
    between = [write(times[0] + (times[1] - times[0]) / 2), write(times[1] + (times[2] - times[1]) / 2)]
    assert messages(server, task, since=between[0]) == ["two", "three"]
    assert messages(server, task, until=between[1]) == ["one", "two"]
    assert messages(server, task, since=between[0], until=between[1]) == ["two"]
    assert messages(server, task, since=between[1], until=between[0]) == []
    assert server.get("/api/updates", task_id=task["id"], since=between[0], limit=1)["total"] == 2


# ------------------------------------------------------------------------------------------------------
# searching updates
# ------------------------------------------------------------------------------------------------------

SAID = [
    "Deployment of the billing service failed",
    "billing and shipping are done",
    "an open café in München",
    "部署 失败",
    "edited src/app.py and tests/test_app.py",
    "message NEAR the end (see notes)",
    "it's a half-done job: don't ask",
]
SEARCHES = [  # what is searched for, and the places in SAID of what is found, newest first
    ("billing", [1, 0]),
    ("BILLING", [1, 0]),
    ("billing failed", [0]),
    ("failed billing", [0]),
    ("billing nothing", []),
    ("nothing", []),
    ('"billing', [1, 0]),
    ('billing"', [1, 0]),
    ('"billing failed"', [0]),
    ('bill"ing', []),
    ("billing*", [1, 0]),
    ("bill*", []),
    ("*", []),
    ("^shipping", [1]),
    ("billing AND shipping", [1]),
    ("billing AND failed", []),
    ("billing OR café", []),
    ("billing NOT shipping", []),
    ("billing -shipping", [1]),
    ("-billing", [1, 0]),
    ("+billing", [1, 0]),
    ("NEAR(billing failed)", []),
    ("NEAR(billing, failed, 5)", []),
    ("near", [5]),
    ("NEAR", [5]),
    ("(billing)", [1, 0]),
    ("((billing", [1, 0]),
    ("message:billing", []),
    ("message : billing", []),
    ("{message}:billing", []),
    ("rowid:1", []),
    ("update_search", []),
    ("cafe", [2]),
    ("CAFÉ", [2]),
    ("cafe\u0301", [2]),
    ("munchen", [2]),
    ("部署", [3]),
    ("失败 部署", [3]),
    ("部署失败", []),
    ("app.py", [4]),
    ("src/app.py", [4]),
    ("test_app", [4]),
    ("(see notes)", [5]),
    ("half-done", [6]),
    ("don't", [6]),
    ("job:", [6]),
    ("'; DROP TABLE log; --", []),
    ('"', []),
    ('""', []),
    ("'", []),
    ("()", []),
    ("-", []),
    (":", []),
    ("\\", []),
    ("%", []),
    ("_", []),
    ("!?.,;", []),
    ("🎉", []),
    ("\ufffd", []),
]


@pytest.fixture(scope="module")
def searched(server) -> dict:
    """A task whose updates say what is in SAID."""
    task = server.new_task()
    for message in SAID:
        server.say(task, message)
    return task


@pytest.mark.parametrize(("q", "expected"), SEARCHES)
def test_a_search_takes_plain_words_and_answers_newest_first(server, searched, q, expected):
    answer = server.get("/api/updates", task_id=searched["id"], q=q)
    assert [update["message"] for update in answer["items"]] == [SAID[place] for place in expected]
    assert answer["total"] == len(expected)


NOISE = st.characters(exclude_characters="\0", exclude_categories=["Cs"]) | st.sampled_from('"*()^:-{}+ ')


@settings(max_examples=40, deadline=None)
@given(st.text(NOISE, max_size=20))
def test_any_text_can_be_searched_for(server, q):
    answer = server.get("/api/updates", q=q)
    assert answer["total"] >= len(answer["items"])


def test_a_search_goes_together_with_the_other_filters(server, searched):
    everywhere = server.get("/api/updates", q="billing", workstream_id=searched["workstream_id"])
    assert everywhere["total"] == 2
    newest = everywhere["items"][0]["seq"]
    found = server.get("/api/updates", q="billing", task_id=searched["id"], before_seq=newest)
    assert [update["message"] for update in found["items"]] == [SAID[0]]
    found = server.get("/api/updates", q="billing", task_id=searched["id"], limit=1)
    assert ([update["message"] for update in found["items"]], found["total"]) == ([SAID[1]], 2)
    assert messages(server, searched, q="billing", order="asc") == [SAID[0], SAID[1]]
    for name, value in {"level": "error", "source": "nope", "kind": "nope", "tag": "nope"}.items():
        assert messages(server, searched, q="billing", **{name: value}) == []
    assert server.get("/api/updates", q="billing", task_id=searched["id"], total="false").keys() == {"items"}


def test_an_update_is_found_as_soon_as_it_is_stored(server, task):
    for n in range(3):
        server.say(task, f"quokka {n}")
        assert len(messages(server, task, q="quokka")) == n + 1


def test_an_empty_search_is_answered(server, searched):
    for q in ("", " "):
        assert isinstance(server.get("/api/updates", task_id=searched["id"], q=q)["items"], list)
        assert isinstance(server.get("/api/tasks", q=q)["items"], list)


# ------------------------------------------------------------------------------------------------------
# idempotency keys
# ------------------------------------------------------------------------------------------------------

KEYED = {
    "/api/updates": {"source": "my-script", "message": "once"},
    "/api/updates/manual": {"message": "once", "data": {"b": 1, "a": [2]}},
    "/api/updates/claude-hook": {"payload": {"hook_event_name": "Stop", "session_id": "s-1"}},
    "/api/updates/github-webhook": {"payload": {"zen": "Calm."}, "headers": {"x-github-event": "ping"}},
}


def keyed(server, task: dict, key: str, path: str = "/api/updates/manual", **fields):
    """The response to an update that is sent with a key."""
    body = {"task_id": task["id"]} | (fields or KEYED[path])
    return server.ask("POST", path, body, headers={"Idempotency-Key": key.encode("latin-1")})


def count(server, task: dict) -> int:
    """How many updates a task has."""
    return server.get("/api/updates", task_id=task["id"], limit=1)["total"]


@pytest.mark.parametrize("path", KEYED)
def test_a_key_sent_twice_stores_once_and_answers_with_the_first_update(server, task, path):
    key = f"twice {path} {task['id']}"
    first = keyed(server, task, key, path)
    assert first.status_code == 201
    with nothing_stored(server):
        for _ in range(2):
            again = keyed(server, task, key, path)
            assert (again.status_code, again.json()) == (200, first.json())
    assert count(server, task) == 1


@pytest.mark.parametrize("path", KEYED)
def test_a_key_with_another_body_is_a_conflict(server, task, path):
    key = f"other {path} {task['id']}"
    keyed(server, task, key, path)
    other = server.new_task()
    with nothing_stored(server):
        refused(keyed(server, other, key, path), 409, "conflict")


def test_keys_are_one_name_space_over_all_endpoints(server, task):
    key = f"shared {task['id']}"
    assert keyed(server, task, key).status_code == 201
    with nothing_stored(server):
        refused(keyed(server, task, key, "/api/updates/claude-hook"), 409, "conflict")
        refused(keyed(server, task, key, "/api/updates", message="once", source="other"), 409, "conflict")


def test_every_part_of_a_body_counts_for_its_key(server, task):
    key = f"parts {task['id']}"
    body = {"message": "once", "level": "info", "kind": "decision", "tags": ["a", "b"], "data": {"a": 1}}
    other = {"message": "twice", "level": "warn", "kind": "error", "tags": ["a"], "data": {"a": 2}}
    assert keyed(server, task, key, **body).status_code == 201
    for name in body:
        refused(keyed(server, task, key, **body | {name: other[name]}), 409, "conflict")
    assert keyed(server, task, key, **body).status_code == 200


def test_a_payload_counts_whole_for_its_key_although_a_subset_is_kept(server, task):
    key, path = f"subset {task['id']}", "/api/updates/github-webhook"
    fields = {"headers": {"x-github-event": "push"}, "payload": {"ref": "refs/heads/main", "size": 1}}
    assert keyed(server, task, key, path, **fields).status_code == 201
    fields["payload"]["size"] = 2
    refused(keyed(server, task, key, path, **fields), 409, "conflict")


def test_what_is_masked_counts_for_its_key(server, task):
    key = f"masked {task['id']}"
    assert keyed(server, task, key, message=f"Authorization: Bearer {'a' * 40}").status_code == 201
    assert keyed(server, task, key, message=f"Authorization: Bearer {'a' * 40}").status_code == 200
    refused(keyed(server, task, key, message=f"Authorization: Bearer {'b' * 40}"), 409, "conflict")


def test_other_keys_and_no_keys_store_again(server, task):
    for key in ("one", "two", "Two", "two."):
        assert keyed(server, task, f"{key}{task['id']}", message="again").status_code == 201
    for _ in range(2):
        server.say(task, "again")
    assert count(server, task) == 6


def test_duplicates_sent_at_the_same_time_are_stored_once(server, task):
    key = f"parallel {task['id']}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: keyed(server, task, key), range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]
    assert len({answer.text for answer in answers}) == 1
    assert count(server, task) == 1


def test_of_different_bodies_sent_at_the_same_time_one_wins(server, task):
    key = f"race {task['id']}"
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: keyed(server, task, key, message=f"runner {n}"), range(8)))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 7
    assert count(server, task) == 1


def test_a_refused_request_does_not_use_its_key_up(server, task):
    key = f"refused {task['id']}"
    refused(keyed(server, task, key, message=""), 400, "invalid_input")
    refused(keyed(server, {"id": NOWHERE}, key), 404, "not_found")
    assert keyed(server, task, key).status_code == 201


def test_a_key_outlives_the_server(fresh):
    server = fresh()
    task = server.new_task()
    first = keyed(server, task, "durable")
    server.stop()
    server.start()
    again = keyed(server, task, "durable")
    assert (again.status_code, again.json()) == (200, first.json())


@pytest.mark.parametrize("key", ["k", "x" * 200, "with blanks and !\"#$%&'()*+,-./:;<=>?@[]^_`{|}~", "0"])
def test_a_key_has_1_to_200_printable_characters(server, task, key):
    assert keyed(server, task, key).status_code == 201


NO_KEYS = ["x" * 201, "x" * 5000, "a\tb", "a\x01b", "a\x1b[31mb", "a\x7fb", "a\x80b"]


@pytest.mark.parametrize("key", NO_KEYS, ids=lambda key: repr(key[:8]))
def test_what_is_no_key_is_refused(server, task, key):
    with nothing_stored(server):
        for path in KEYED:
            refused(keyed(server, task, key, path), 400, "invalid_input")


def test_an_empty_key_is_refused(server, task):
    body = json.dumps({"task_id": task["id"], "message": "once"}).encode()
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/api/updates/manual", body, Idempotency_Key="")
        refused(exchange(server, raw), 400, "invalid_input")


def test_a_key_is_looked_at_only_where_updates_are_made(server):
    key = {"Idempotency-Key": "workstream"}
    first, second = (server.ask("POST", "/api/workstreams", {"name": "x"}, headers=key) for _ in range(2))
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["id"] != second.json()["id"]


# ------------------------------------------------------------------------------------------------------
# the stream, as far as part of the request and answer contract
# ------------------------------------------------------------------------------------------------------


def events(server, after: int, query: str = "", **headers: str) -> list[tuple[str, dict]]:
    """What the stream holds after an event, without the frame around it: (event, data)."""
    path = f"/api/stream?poll=1&format=ndjson&after_seq={after}{query}"
    response = server.ask("GET", path, headers=headers)
    assert response.status_code == 200, response.text
    lines = [json.loads(line) for line in response.text.splitlines()]
    return [(line["event"], line["data"]) for line in lines if line["event"] not in ("hello", "checkpoint")]


def test_the_stream_holds_every_change_in_order(server):
    before = head(server)
    workstream = new_workstream(server)
    task = server.new_task(workstream=workstream["id"])
    update = server.say(task, "hello")
    changed = change(server, task, status="done")
    archived = patch(server, f"/api/workstreams/{workstream['id']}", status="archived")
    assert events(server, before) == [
        ("workstream_created", workstream),
        ("task_created", task),
        ("update", update),
        ("task_updated", changed),
        ("workstream_updated", archived),
    ]


def test_the_stream_is_filtered_as_updates_are(server):
    before = head(server)
    task, other = server.new_task("a task"), server.new_task("another")
    update = server.say(task, "hello", kind="decision", level="warn", tags=["a"])
    server.say(other, "bye")
    assert events(server, before, f"&task_id={task['id']}") == [("task_created", task), ("update", update)]
    for query in ("source=manual", "kind=decision", "level=warn", "tag=a", "tag=nope&tag=a"):
        assert events(server, before, f"&task_id={task['number']}&{query}") == [("update", update)]
    for query in ("source=nope", "kind=nope", "level=error", "tag=nope"):
        assert events(server, before, f"&task_id={task['id']}&{query}") == []
    of_workstream = events(server, before, f"&workstream_id={task['workstream_id']}")
    assert of_workstream[-2:] == [("task_created", task), ("update", update)]
    assert other not in [data for _, data in of_workstream]


def test_the_header_of_a_reconnect_wins_over_the_query(server, task):
    first, second = server.say(task, "first"), server.say(task, "second")
    found = events(server, first["seq"] - 1, f"&task_id={task['id']}", **{"Last-Event-ID": str(first["seq"])})
    assert found == [("update", second)]
