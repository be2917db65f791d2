"""Raw hooks: every run finds its task, the task says who waits, nothing is stored twice or lost."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from conftest import ROOT, Server, clean_environment, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Browser

import monitor

pytestmark = pytest.mark.usefixtures("answers_conform")

PAYLOADS = ROOT / "tests" / "payloads"
FILES = [(agent, path) for agent in monitor.AGENTS for path in sorted((PAYLOADS / agent).glob("*.json"))]
RUNS = {  # what attention the task shows after each event of a recorded run
    "claude/agent": "- - - - - - - - - - - - idle -",
    "claude/chain1": "- - - - idle -",
    "claude/tools": " ".join(["-"] * 31 + ["idle", "-"]),
    "claude/tui_perm_default": "- - - - blocked blocked - - - idle - - blocked blocked -",
    "codex/tools": "- - - - - - - idle -",
    "gemini/tools": " ".join(["-"] * 36 + ["idle", "-"]),
}


def payloads_of(run: str, session: str | None = None) -> list[dict]:
    """The payloads of a recorded run, as that of another session where one is named."""
    agent, _, name = run.partition("/")
    lines = (PAYLOADS / agent / "sequences" / f"{name}.jsonl").read_text().splitlines()
    found = [json.loads(line)["payload"] for line in lines]
    return [payload | ({"session_id": session} if session else {}) for payload in found]


class Run:
    """A run of an agent: its events go to a server as its hooks would send them."""

    def __init__(self, server: Server, cwd: str | None = None, agent: str = "claude", **headers: str):
        self.server, self.agent, self.headers = server, agent, headers
        identity = str(uuid.uuid4())
        self.facts = {"session_id": identity, "cwd": f"/work/{identity}/project" if cwd is None else cwd}

    def __call__(self, event: str, **fields) -> None:
        body = self.facts | {"hook_event_name": event} | fields
        path, body = f"/api/hooks/{self.agent}", json.dumps(body)
        answer = self.server.ask("POST", path, data=body, headers=self.headers)
        assert (answer.status_code, answer.content) == (204, b""), answer.text

    @property
    def source(self) -> str:
        return f"{self.agent}:{self.facts['session_id']}"

    @property
    def session(self) -> dict:
        """The run as the server knows it."""
        return next(s for s in self.server.get("/api/sessions")["items"] if s["source"] == self.source)

    @property
    def task(self) -> dict:
        return self.server.get(f"/api/tasks/{self.session['task_id']}")

    @property
    def attention(self) -> str:
        return self.task.get("attention", {}).get("state", "-")

    @property
    def said(self) -> list[str]:
        """The messages of its updates, oldest first."""
        found = self.server.get("/api/updates", source=self.source, limit=200)["items"]
        return [update["message"] for update in found]


def names(server: Server) -> list[str]:
    return [task["name"] for task in server.get("/api/tasks")["items"]]


# --- ingest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_every_payload_is_taken_without_a_word(server, agent, path):
    case = json.loads(path.read_text())
    payload, event = (case["payload"], case.get("event")) if "expect" in case else (case, None)
    query = {"event": event} if event else {}
    answer = server.ask("POST", f"/api/hooks/{agent}", data=json.dumps(payload), params=query)
    assert (answer.status_code, answer.content) == (204, b"")


def test_an_update_says_what_the_agent_did(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="Add a health endpoint")
    run("PostToolUse", tool_name="Bash", tool_use_id="t1", tool_input={"command": "ls -l"}, tool_response={})
    run("SomethingNew", note="from the future")
    assert run.said == ["Prompt: Add a health endpoint", "Ran: ls -l", "Hook event SomethingNew"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("claude", b"{", 400),
        ("claude", b"", 400),
        ("spooled", b"agent: nobody\n\n{}", 400),
        ("nobody", b"{}", 404),
        ("claude", b"[]", 204),
        ("claude", b"null", 204),
        ("claude", b'"text"', 204),
        ("claude", b"1e999", 204),
        ("claude", b"[" * 300 + b"]" * 300, 204),
    ],
)
def test_only_what_is_not_json_or_nobodys_is_refused(server, path, body, status):
    answer = server.session.post(f"{server.url}/api/hooks/{path}", data=body, timeout=10)
    assert answer.status_code == status


def test_hooks_are_authorised_as_other_writes_are(fresh):
    server = fresh(MONITOR_API_TOKENS="a-token")
    assert server.ask("POST", "/api/hooks/claude", {}).status_code == 401
    assert (
        server.ask("POST", "/api/hooks/claude", {}, headers={"Authorization": "Bearer "}).status_code == 401
    )
    told = server.ask("POST", "/api/hooks/claude", {}, headers={"Authorization": "Bearer a-token"})
    assert told.status_code == 204


def test_what_could_not_be_stored_is_replaced_not_refused(server):
    run = Run(server)
    odd = {"a": "nul \0 in it", "b": "\ud800 alone", "c": 10**30, "d\0": float("inf"), "e": [[[]]] * 3}
    run("Notification", notification_type="other", message="hello", odd=odd)
    data = run.server.get("/api/updates", source=run.source)["items"][0]["data"]
    kept = {"a": "nul \ufffd in it", "b": "\ufffd alone", "c": str(10**30), "d\ufffd": "inf", "e": [[[]]] * 3}
    assert data["odd"] == kept


def test_long_texts_are_cut_with_the_cut_marked_and_secrets_across_it_masked(server):
    run = Run(server)
    secret = "ghp_" + "a1B2" * 9
    text = "x" * 3980 + " " + secret + " " + "y" * 200_000
    run("PostToolUse", tool_name="Read", tool_input={}, tool_response="")
    run("PostToolUse", tool_name="Bash", tool_input={"command": "cat big"}, tool_response={"stdout": text})
    data = run.server.get("/api/updates", source=run.source)["items"][0]["data"]
    stdout = data["tool_response"]["stdout"]
    assert re.search(r"… \[\d{3},\d{3} more characters cut\]$", stdout) and len(stdout) < 4100
    assert "ghp_" not in json.dumps(data) and "[masked]" in stdout


def test_the_data_of_a_huge_payload_is_bounded(server):
    run = Run(server)
    run("Weird", wide={str(n): "word " * 1000 for n in range(3000)})
    run("Weird", deep=json.loads('{"a":' * 200 + "1" + "}" * 200))
    run("Weird", both={str(n): {str(m): ["w" * 50] * 50 for m in range(60)} for n in range(60)})
    found = run.server.get("/api/updates", source=run.source)["items"]
    assert len(found) == 3 and all(len(json.dumps(update["data"])) < 70_000 for update in found)


# --- twice -----------------------------------------------------------------------------------------------


def test_the_same_hook_from_two_places_is_stored_once(server):
    run = Run(server)
    call = {"tool_name": "Bash", "tool_use_id": "toolu_1", "tool_input": {"command": "ls"}}
    for event, fields in (
        ("UserPromptSubmit", {"prompt": "go"}),
        ("PreToolUse", call),
        ("PostToolUse", call | {"tool_response": {"stdout": ""}, "duration_ms": 7}),
        ("PostToolUse", call | {"tool_response": {"stdout": ""}, "duration_ms": 8}),
        ("Stop", {"last_assistant_message": "done"}),
    ):
        run(event, **fields)
        run(event, **fields)
    assert run.said == ["Prompt: go", "Ran: ls", "done"]


def test_the_same_words_later_are_another_event(fresh, tmp_path):
    server, run = fresh(), "s1"
    for minute in (1, 2):
        moment = f"2026-01-01T10:{minute:02}:00Z"
        payload = {"hook_event_name": "UserPromptSubmit", "session_id": run, "prompt": "continue"}
        body = f"agent: claude\nevent: \ntask: \ntime: {moment}\nkey: k{minute}\n\n{json.dumps(payload)}"
        for _ in range(2):
            assert server.ask("POST", "/api/hooks/spooled", data=body.encode()).status_code == 204
    found = server.get("/api/updates", source="claude:s1")["items"]
    assert [update["data"]["occurred_at"] for update in found] == [
        "2026-01-01T10:01:00.000000Z",
        "2026-01-01T10:02:00.000000Z",
    ]


def test_a_key_is_heeded_and_shared_with_updates(fresh, task):
    server = fresh()
    run = Run(server, **{"Idempotency-Key": "k-1"})
    run("UserPromptSubmit", prompt="first")
    run("UserPromptSubmit", prompt="first")
    assert run.said == ["Prompt: first"]
    other = server.ask("POST", "/api/hooks/claude", {"a": 1}, headers={"Idempotency-Key": "k-1"})
    assert other.status_code == 409
    body = {"task_id": run.task["id"], "message": "by hand"}
    assert (
        server.ask("POST", "/api/updates/manual", body, headers={"Idempotency-Key": "k-1"}).status_code == 409
    )


# --- routing ---------------------------------------------------------------------------------------------


def test_a_new_run_makes_a_task_titled_from_its_first_prompt(fresh):
    run = Run(fresh(), "/somewhere/calc")
    run("SessionStart", source="startup")
    assert run.task["name"] == "Claude Code in calc"
    run("UserPromptSubmit", prompt="Make the parser\nfaster, with password=hunter22")
    run("UserPromptSubmit", prompt="and smaller")
    assert run.task["name"] == "Make the parser"
    workstream = run.server.get(f"/api/workstreams/{run.task['workstream_id']}")
    assert workstream["name"] == "calc"


def test_a_title_holds_no_secret_and_a_name_given_by_a_person_stays(fresh):
    server = fresh()
    run, other = Run(server), Run(server)
    run("UserPromptSubmit", prompt="log in with password=hunter22")
    assert "hunter22" not in json.dumps(server.get("/api/tasks"))
    other("SessionStart", source="startup")
    server.ask("PATCH", f"/api/tasks/{other.task['id']}", {"name": "Mine"})
    other("UserPromptSubmit", prompt="something")
    assert other.task["name"] == "Mine"


def test_a_run_opened_and_closed_again_leaves_no_task_in_sight(fresh):
    server = fresh()
    run = Run(server)
    run("SessionStart", source="startup")
    run("SessionEnd", reason="prompt_input_exit")
    assert names(server) == [] and "hidden_at" in run.task
    server.ask("POST", "/api/hooks/claude", {"hook_event_name": "SessionEnd", "session_id": "never-seen"})
    server.ask("POST", "/api/hooks/claude", {"hook_event_name": "Stop"})
    assert server.get("/api/tasks", include_hidden="true")["total"] == 2 and names(server) == []


def test_the_named_task_comes_first_whatever_names_it(fresh):
    server = fresh()
    tasks = [server.new_task(f"task {n}") for n in range(3)]
    by_query, by_header = Run(server), Run(server, **{"X-Monitor-Task": tasks[1]["id"][:8]})
    by_header("UserPromptSubmit", prompt="by header")
    body = by_query.facts | {"hook_event_name": "UserPromptSubmit", "prompt": "by query"}
    path = f"/api/hooks/claude?task_id={tasks[2]['number']}"
    assert server.ask("POST", path, body, headers={"X-Monitor-Task": "1"}).status_code == 204
    assert (by_header.task, by_query.task) == (
        server.get(f"/api/tasks/{tasks[1]['id']}"),
        server.get(f"/api/tasks/{tasks[2]['id']}"),
    )
    assert names(server) == ["task 0", "task 1", "task 2"]


@pytest.mark.parametrize("named", ["", "no-such-task", "99999", "[]", "x" * 3000])
def test_a_name_that_names_nothing_counts_as_none(server, named):
    run = Run(server, **{"X-Monitor-Task": named})
    run("UserPromptSubmit", prompt="go on")
    assert run.task["name"] == "go on"


def test_a_run_stays_with_its_task_wherever_it_goes(fresh):
    server = fresh()
    run = Run(server, "/a/one")
    run("UserPromptSubmit", prompt="begin")
    run("CwdChanged", cwd="/b/two", new_cwd="/b/two")
    run("Stop", cwd="/b/two")
    assert names(server) == ["begin"] and len(run.said) == 3


def test_parallel_runs_in_one_folder_never_mix(fresh):
    server = fresh()
    folder = f"/work/{uuid.uuid4()}"
    runs = [Run(server, folder) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for step in ("one", "two", "three"):
            list(
                pool.map(lambda run, step=step: run("UserPromptSubmit", prompt=f"{step} {run.source}"), runs)
            )
    assert len({run.task["id"] for run in runs}) == 8
    for run in runs:
        assert [said.split()[1] for said in run.said] == ["one", "two", "three"]
    assert server.get("/api/workstreams")["total"] == 1


@pytest.mark.parametrize(
    ("reason", "source", "folder", "agent", "same"),
    [
        ("clear", "clear", "/work/project", "claude", True),
        ("other", "fork", "/work/project", "claude", True),
        ("clear", "startup", "/work/project", "claude", False),
        ("clear", "clear", "/work/other", "claude", False),
        ("clear", "clear", "/work/project", "codex", False),
    ],
)
def test_a_cleared_or_forked_run_goes_on_with_its_task(server, reason, source, folder, agent, same):
    run, following = Run(server, "/work/project"), Run(server, folder, agent)
    run("UserPromptSubmit", prompt="begin")
    run("SessionEnd", reason=reason)
    following("SessionStart", source=source)
    following("UserPromptSubmit", prompt="next")
    assert (run.task["id"] == following.task["id"]) is same


def test_a_cleared_run_is_continued_once(server):
    folder = f"/work/{uuid.uuid4()}"
    runs = [Run(server, folder) for _ in range(2)]
    for run in runs:
        run("UserPromptSubmit", prompt="begin")
        run("SessionEnd", reason="clear")
    following = [Run(server, folder) for _ in range(3)]
    for run in following:
        run("SessionStart", source="clear")
    assert [run.task["id"] for run in following[:2]] == [run.task["id"] for run in runs]
    assert following[2].task["id"] not in [run.task["id"] for run in runs]


def repository(folder: Path, branch: str = "main") -> Path:
    """A repository as Git lays it out, with an origin."""
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "HEAD").write_text(f"ref: refs/heads/{branch}\n")
    (folder / ".git" / "config").write_text(
        '[core]\n\tbare = false\n[remote "origin"]\n\turl = git@github.com:acme/calc.git\n'
    )
    return folder


def worktree(main: Path, folder: Path, branch: str) -> Path:
    """A worktree of a repository."""
    git = main / ".git" / "worktrees" / folder.name
    git.mkdir(parents=True)
    (git / "HEAD").write_text(f"ref: refs/heads/{branch}\n")
    (git / "commondir").write_text("../..\n")
    folder.mkdir(parents=True)
    (folder / ".git").write_text(f"gitdir: {git}\n")
    return folder


def test_worktrees_belong_to_their_repository(fresh, tmp_path):
    server = fresh()
    main = repository(tmp_path / "calc")
    tree = worktree(main, tmp_path / "elsewhere" / "feature", "feature/x")
    inside = worktree(main, main / ".claude" / "worktrees" / "probe", "probe")
    (main / "src").mkdir()
    runs = [Run(server, str(folder)) for folder in (main, main / "src", tree, inside)]
    for run in runs:
        run("UserPromptSubmit", prompt=f"in {run.facts['cwd']}")
    assert [run.session["branch"] for run in runs] == ["main", "main", "feature/x", "probe"]
    assert {run.session["project"] for run in runs} == {str(main)}
    assert {run.session["repository"] for run in runs} == {"acme/calc"}
    assert [item["name"] for item in server.get("/api/workstreams")["items"]] == ["calc"]


def test_a_branch_made_in_the_run_is_known_at_the_end_of_its_turn(fresh, tmp_path):
    run = Run(fresh(), str(repository(tmp_path / "calc")))
    run("UserPromptSubmit", prompt="go")
    (tmp_path / "calc" / ".git" / "HEAD").write_text("ref: refs/heads/fix-1\n")
    run("Stop", last_assistant_message="done")
    assert run.session["branch"] == "fix-1"


def test_folders_of_one_name_get_workstreams_of_their_own_and_a_free_one_is_taken_up(fresh):
    server = fresh()
    given = server.post("/api/workstreams", name="calc")
    runs = [Run(server, folder) for folder in ("/a/calc", "/b/calc", "/a/calc", "/far/.claude/worktrees/x")]
    for run in runs:
        run("UserPromptSubmit", prompt=f"in {run.source}")
    ids = [run.task["workstream_id"] for run in runs]
    assert ids[0] == ids[2] == given["id"] and len(set(ids)) == 3
    assert server.get(f"/api/workstreams/{ids[3]}")["name"] == "far"


@pytest.mark.parametrize(
    "odd", ["/", "", "relative", "\0", "/proc/self/fd", "C:\\code\\calc", "/a/" + "x" * 9000]
)
def test_an_odd_folder_is_no_trouble(server, odd):
    run = Run(server, odd)
    run("UserPromptSubmit", prompt="go")
    assert run.task["name"] == "go"


def test_a_pipe_in_the_place_of_a_file_holds_nobody(server, tmp_path):
    folder = tmp_path / "trap"
    (folder / ".git").mkdir(parents=True)
    os.mkfifo(folder / ".git" / "HEAD")
    run = Run(server, str(folder))
    run("UserPromptSubmit", prompt="go")
    assert "branch" not in run.session


def test_a_run_finds_the_task_that_its_branch_or_folder_is_bound_to(fresh, tmp_path):
    server = fresh()
    tasks = {kind: server.new_task(kind) for kind in ("branch", "folder", "over")}
    here = repository(tmp_path / "calc", "fix-7")

    def bind(kind: str, value: str, task: dict, **fields) -> None:
        server.post("/api/links", link=kind, value=value, task_id=task["id"], **fields)

    bind("folder", str(tmp_path), tasks["folder"])
    first = Run(server, str(here))
    first("UserPromptSubmit", prompt="in the folder")
    bind("branch", "fix-7", tasks["branch"], repository="acme/calc")
    second = Run(server, str(here))
    second("UserPromptSubmit", prompt="on the branch")
    bind("branch", "fix-7", tasks["over"], repository="acme/calc")
    server.ask("PATCH", f"/api/tasks/{tasks['over']['id']}", {"status": "done"})
    third = Run(server, str(here))
    third("UserPromptSubmit", prompt="that is over")
    assert [run.task["name"] for run in (first, second, third)] == ["folder", "branch", "folder"]
    assert server.get("/api/links", task_id=tasks["folder"]["id"])["total"] == 1
    unbind = {"link": "folder", "value": str(tmp_path)}
    assert server.ask("POST", "/api/links/remove", unbind).json() == {"removed": 1}
    fourth = Run(server, str(here))
    fourth("UserPromptSubmit", prompt="nothing is bound")
    assert fourth.task["name"] == "nothing is bound"


# --- moving ----------------------------------------------------------------------------------------------


def test_a_person_moves_a_run_and_its_environment_does_not_bring_it_back(fresh):
    server = fresh()
    old, new, third = (server.new_task(name) for name in ("old", "new", "third"))
    run = Run(server, **{"X-Monitor-Task": str(old["number"])})
    run("UserPromptSubmit", prompt="one")
    moved = server.ask("POST", "/api/sessions/move", {"source": run.source, "task_id": new["id"]})
    assert moved.json()["id"] == new["id"]
    run("UserPromptSubmit", prompt="two")
    assert run.task["name"] == "new"
    assert [server.get("/api/updates", task_id=task["id"])["total"] for task in (old, new)] == [1, 1]
    run.headers["X-Monitor-Task"] = str(third["number"])
    run("UserPromptSubmit", prompt="three")
    assert run.task["name"] == "third"


def test_updates_move_with_their_run_and_the_log_says_which(fresh):
    server = fresh()
    new = server.new_task("new")
    run, beside = Run(server), Run(server)
    run("UserPromptSubmit", prompt="mine, a needle")
    run("Stop", last_assistant_message="idle now")
    old = run.task
    server.ask("POST", "/api/sessions/move", {"source": beside.source, "task_id": new["id"]})
    by_hand = server.say(old, "stays here")
    with server.follow(f"?task_id={new['id']}") as follower, server.follow(f"?task_id={old['id']}") as left:
        body = {"source": run.source, "task_id": new["id"], "updates": True}
        assert server.ask("POST", "/api/sessions/move", body).status_code == 200
        moved = follower.take(1, "updates_moved")[0]
        assert left.take(1, "task_updated")[0]["id"] == old["id"]
    updates = server.get("/api/updates", task_id=new["id"])["items"]
    assert moved == {
        "from": old["id"],
        "to": new["id"],
        "source": run.source,
        "seqs": [update["seq"] for update in updates],
    }
    assert [update["task_id"] for update in updates] == [new["id"]] * 2
    assert server.get("/api/updates", task_id=old["id"])["items"] == [by_hand]
    assert server.get("/api/updates", q="needle")["items"][0]["task_id"] == new["id"]
    assert server.get(f"/api/tasks/{new['id']}")["attention"]["state"] == "idle"
    assert "attention" not in server.get(f"/api/tasks/{old['id']}")
    assert server.ask("GET", "/api/admin/check").json() == {"problems": []}


@pytest.mark.parametrize(("updates", "left"), [("true", 0), ("false", 1)])
def test_the_page_of_a_task_shows_its_runs_and_moves_them(server, updates, left):
    run, new = Run(server), server.new_task("new")
    run("UserPromptSubmit", prompt="wrong place")
    old = run.task
    with Browser(server) as browser:
        page = browser.get(f"/tasks/{old['id']}").text
        assert "Agents' runs" in page and run.facts["cwd"] in page
        fields = {"source": run.source, "task_id": str(new["number"]), "updates": updates}
        answer = browser.submit(f"/tasks/{old['id']}/runs", **fields)
        assert (answer.status_code, answer.headers["Location"]) == (303, f"/tasks/{new['id']}")
        assert "Agents' runs" not in browser.get(f"/tasks/{old['id']}").text
    assert server.get("/api/updates", task_id=old["id"])["total"] == left and run.task["name"] == "new"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"source": "claude:nobody"}, 404),
        ({"task_id": "no-task"}, 400),
        ({"task_id": "777"}, 404),
        ({"updates": 1}, 400),
    ],
)
def test_a_move_that_makes_no_sense_changes_nothing(server, change, status):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    body = {"source": run.source, "task_id": server.new_task()["id"]} | change
    assert server.ask("POST", "/api/sessions/move", body).status_code == status
    assert run.task["name"] == "go"


# --- attention -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_recorded_run_shows_the_right_attention_after_each_event(fresh, name):
    server, seen = fresh(), []
    for payload in payloads_of(name):
        server.ask("POST", f"/api/hooks/{name.partition('/')[0]}", payload)
        tasks = server.get("/api/tasks")["items"]
        seen.append(tasks[0].get("attention", {}).get("state", "-"))
    assert seen == RUNS[name].split()
    assert server.get("/api/tasks")["total"] == 1


def test_recorded_runs_in_parallel_show_what_each_shows_alone(fresh):
    server = fresh()
    runs = {f"{name}#{n}": payloads_of(name, f"{name}#{n}") for name in RUNS for n in range(3)}

    def play(name: str) -> list[str]:
        agent, seen = name.partition("/")[0], []
        for payload in runs[name]:
            answer = requests.post(f"{server.url}/api/hooks/{agent}", json=payload, timeout=30)
            assert answer.status_code == 204
            run = Run(server, agent=agent)
            run.facts["session_id"] = name
            seen.append(run.attention)
        return seen

    with ThreadPoolExecutor(len(runs)) as pool:
        shown = dict(zip(runs, pool.map(play, runs), strict=True))
    assert shown == {name: RUNS[name.partition("#")[0]].split() for name in runs}
    sessions = server.get("/api/sessions")["items"]
    assert len({session["task_id"] for session in sessions}) == len(runs)
    for session in sessions:
        found = server.get("/api/updates", task_id=session["task_id"], limit=200)
        assert {update["source"] for update in found["items"]} == {session["source"]}


def test_attention_says_what_was_asked_by_whom_since_when(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="deploy")
    with server.follow(f"?task_id={run.task['id']}") as follower:
        run("PermissionRequest", tool_name="Bash", tool_input={"command": "git push"})
        update, told = follower.take(2, "update", "task_updated")
    assert told == run.task
    assert told["attention"] == {
        "state": "blocked",
        "message": "Permission needed: Bash: git push",
        "since": update["timestamp"],
        "seq": update["seq"],
        "source": run.source,
    }


def test_the_late_notification_folds_into_what_it_is_about(server):
    run = Run(server)
    question = {"questions": [{"question": "Which?", "options": [{"label": "A"}, {"label": "B"}]}]}
    run("PreToolUse", tool_name="AskUserQuestion", tool_use_id="q1", tool_input=question)
    run("PermissionRequest", tool_name="AskUserQuestion", tool_input=question)
    first = run.task["attention"]
    run("Notification", notification_type="permission_prompt", message="Claude needs your permission")
    run("Notification", notification_type="idle_prompt", message="Claude is waiting for your input")
    assert run.task["attention"] == first
    run(
        "PostToolUse",
        tool_name="AskUserQuestion",
        tool_use_id="q1",
        tool_input=question,
        tool_response={"answers": {"Which?": "A"}},
    )
    assert run.attention == "-"
    assert run.said == ["Question: Which? (A / B)", "Waiting for your next prompt", "Answered: Which? -> A"]


@pytest.mark.parametrize(
    ("event", "fields", "after"),
    [
        ("UserPromptSubmit", {"prompt": "next"}, "-"),
        ("PreToolUse", {"tool_name": "Read", "tool_use_id": "r"}, "-"),
        ("PreToolUse", {"tool_name": "Bash", "tool_use_id": "b"}, "blocked"),
        ("PostToolUse", {"tool_name": "Bash", "tool_use_id": "b"}, "-"),
        ("PostToolUseFailure", {"tool_name": "Bash", "tool_use_id": "b", "error": "Exit code 1"}, "-"),
        ("PostToolBatch", {"tool_calls": []}, "-"),
        ("ElicitationResult", {"mcp_server_name": "m", "action": "accept"}, "-"),
        ("Stop", {}, "idle"),
        ("StopFailure", {"error": "rate_limit"}, "blocked"),
        ("SessionEnd", {"reason": "other"}, "-"),
        ("PostToolUse", {"tool_name": "Bash", "tool_use_id": "b", "agent_id": "sub"}, "blocked"),
        ("UserPromptSubmit", {"prompt": "sub", "agent_id": "sub"}, "blocked"),
        ("SubagentStop", {"agent_id": "sub", "agent_type": "x"}, "blocked"),
        ("Notification", {"notification_type": "idle_prompt"}, "blocked"),
        ("CwdChanged", {"new_cwd": "/b"}, "blocked"),
    ],
)
def test_what_clears_a_question_and_what_does_not(server, event, fields, after):
    run = Run(server)
    run("PermissionRequest", tool_name="Bash", tool_input={"command": "git push"})
    run(event, **fields)
    assert run.attention == after


def test_what_a_subagent_asks_waits_until_it_goes_on(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    for sub in ("a", "b"):
        run("PermissionRequest", tool_name="Bash", tool_input={"command": f"touch {sub}"}, agent_id=sub)
    assert run.task["attention"]["message"] == "Permission needed: Bash: touch a"
    run("PostToolUse", tool_name="Bash", tool_use_id="a1", agent_id="a")
    assert run.task["attention"]["message"] == "Permission needed: Bash: touch b"
    run("PostToolUse", tool_name="Read", tool_use_id="m1")
    assert run.attention == "blocked"
    run("SubagentStop", agent_id="b", agent_type="x")
    assert run.attention == "-"


def test_several_runs_of_one_task_show_the_most_urgent(server):
    task = server.new_task()
    runs = [Run(server, **{"X-Monitor-Task": task["id"]}) for _ in range(2)]
    runs[0]("Stop", last_assistant_message="finished")
    assert runs[0].attention == "idle"
    runs[1]("PermissionRequest", tool_name="Bash", tool_input={"command": "ls"})
    assert runs[0].attention == "blocked"
    runs[1]("Stop")
    runs[0]("SessionEnd", reason="other")
    assert runs[1].task["attention"]["source"] == runs[1].source


def test_tasks_are_filtered_by_attention_and_one_that_is_over_shows_only_who_waits(fresh):
    server = fresh()
    idle, blocked, working = (Run(server, f"/{name}") for name in ("idle", "blocked", "working"))
    for run in (idle, blocked, working):
        run("UserPromptSubmit", prompt=run.facts["cwd"][1:])
    idle("Stop")
    blocked("PermissionRequest", tool_name="Bash", tool_input={"command": "ls"})

    def found(wanted: str) -> list[str]:
        return [task["name"] for task in server.get("/api/tasks", attention=wanted)["items"]]

    assert (found("blocked"), found("idle, blocked"), found("stuck")) == (
        ["blocked"],
        ["idle", "blocked"],
        [],
    )
    assert server.ask("GET", "/api/tasks?attention=sleepy").status_code == 400
    for run in (idle, blocked):
        server.ask("PATCH", f"/api/tasks/{run.task['id']}", {"status": "done"})
    assert (idle.attention, blocked.attention) == ("-", "blocked")


# --- what waited while Monitor was off -------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Spool:
    """The folder into which hooks put what found no server."""

    def __init__(self, base: Path, port: int, host: str = "127.0.0.1"):
        self.base, self.count = base, 0
        self.folder = base / f"http___{host}_{port}"
        self.folder.mkdir(parents=True)

    def put(
        self, event: str, moment: datetime.datetime, task: str = "", session: str = "s1", **fields
    ) -> Path:
        self.count += 1
        payload = {"hook_event_name": event, "session_id": session, "cwd": "/work/project"} | fields
        stamp = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        head = f"agent: claude\nevent: \ntask: {task}\ntime: {stamp}\nkey: key-{session}-{self.count}\n\n"
        file = self.folder / f"{uuid.uuid4()}.hook"
        file.write_text(head + json.dumps(payload) + "\n")
        os.utime(file, ns=(self.count * 1000,) * 2)
        return file

    @property
    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("*.hook"))


NOW = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
MINUTE = datetime.timedelta(minutes=1)


def test_hooks_from_before_the_start_are_taken_in_in_order_with_their_time(tmp_path):
    port = free_port()
    spool = Spool(tmp_path / "spool", port)
    for number in range(30):
        spool.put("UserPromptSubmit", NOW - (60 - number) * MINUTE, prompt=f"prompt {number}")
    (spool.folder / ".half-written").write_text("agent: cl")
    bad = spool.put("Stop", NOW)
    bad.write_text("no head at all")
    server = Server(tmp_path / "m.db", port=port, MONITOR_SPOOL=str(spool.base))
    try:
        wait_until(lambda: spool.left == [])
        updates = server.get("/api/updates", source="claude:s1")["items"]
        assert [u["message"] for u in updates] == [f"Prompt: prompt {n}" for n in range(30)]
        assert updates[0]["data"]["occurred_at"] == monitor.timestamp(NOW - 60 * MINUTE)
        assert server.get("/api/sessions")["items"][0]["seen_at"] == monitor.timestamp(NOW - 31 * MINUTE)
        again = spool.put("UserPromptSubmit", NOW, prompt="while it runs")
        wait_until(lambda: spool.left == [])
        again.write_text("agent: claude\nevent: \ntask: \ntime: \nkey: key-s1-1\n\n{}")
        wait_until(lambda: spool.left == [])
        assert server.get("/api/updates", source="claude:s1")["total"] == 31
        assert (spool.folder / ".half-written").exists()
    finally:
        assert server.stop() == 0


def test_a_run_silent_in_the_middle_of_work_is_stuck_but_none_that_waits(tmp_path):
    port = free_port()
    spool = Spool(tmp_path / "spool", port, "localhost")
    for session, event in (("works", "PostToolUse"), ("idles", "Stop"), ("asks", "PermissionRequest")):
        spool.put("UserPromptSubmit", NOW - 20 * MINUTE, session=session, prompt=session)
        fields = {"tool_name": "Bash", "tool_input": {"command": "ls"}}
        spool.put(event, NOW - 16 * MINUTE, session=session, **fields)
    spool.put("SessionStart", NOW - 30 * MINUTE, session="opened", source="startup")
    spool.put("UserPromptSubmit", NOW - 5 * MINUTE, session="young", prompt="young")
    server = Server(tmp_path / "m.db", port=port, MONITOR_SPOOL=str(spool.base))
    try:
        wait_until(lambda: server.get("/api/tasks", attention="stuck")["total"] == 1)
        tasks = {task["name"]: task.get("attention", {}) for task in server.get("/api/tasks")["items"]}
        states = {name: found.get("state") for name, found in tasks.items()}
        assert states == {
            "works": "stuck",
            "idles": "idle",
            "asks": "blocked",
            "young": None,
            "Claude Code in project": None,
        }
        since = monitor.timestamp(NOW - 16 * MINUTE)
        assert (tasks["works"]["since"], tasks["works"]["message"]) == (since, "Silent since: Ran: ls")
        run = Run(server)
        run.facts["session_id"] = "works"
        run("SubagentStart", agent_id="sub", agent_type="x")
        assert run.attention == "-"
    finally:
        assert server.stop() == 0


def test_what_is_delivered_late_does_not_turn_the_state_back(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    run("Stop")
    payload = json.dumps(
        run.facts | {"hook_event_name": "PostToolUse", "tool_name": "Bash", "tool_use_id": "t"}
    )
    head = "agent: claude\nevent: \ntask: \ntime: 2026-01-01T10:00:00Z\n\n"
    assert server.ask("POST", "/api/hooks/spooled", data=(head + payload).encode()).status_code == 204
    assert run.attention == "idle" and run.session["state"] == "idle"


def test_a_spooled_hook_may_say_that_it_is_of_any_time(server):
    for year in ("0001-01-01", "9999-12-31"):
        body = f"agent: claude\nkey: of-{year}\ntime: {year}T00:00:00Z\n\n{{}}"
        assert server.ask("POST", "/api/hooks/spooled", data=body.encode()).status_code == 204


def test_a_spooled_hook_waits_while_the_database_cannot_be_used(tmp_path):
    port = free_port()
    spool = Spool(tmp_path / "spool", port)
    database = tmp_path / "m.db"
    server = Server(database, port=port, MONITOR_SPOOL=str(spool.base))
    try:
        os.rename(database, tmp_path / "away.db")
        spool.put("UserPromptSubmit", NOW, prompt="patience")
        time.sleep(2.5)
        assert len(spool.left) == 1
        os.rename(tmp_path / "away.db", database)
        wait_until(lambda: spool.left == [])
        assert server.get("/api/updates")["items"][0]["message"] == "Prompt: patience"
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("spool", ["off", ""])
def test_no_folder_is_no_trouble(fresh, tmp_path, spool):
    server = fresh(MONITOR_SPOOL=spool, XDG_STATE_HOME=str(tmp_path / "none"))
    Run(server)("UserPromptSubmit", prompt="go")
    assert names(server) == ["go"] and not (tmp_path / "none").exists()


def test_the_demo_takes_nothing_from_the_spool(tmp_path):
    port = free_port()
    spool = Spool(tmp_path / "spool", port)
    spool.put("UserPromptSubmit", NOW, prompt="real work")
    command = [sys.executable, str(ROOT / "monitor.py"), "demo", "--bind", f"127.0.0.1:{port}"]
    environment = clean_environment(MONITOR_SPOOL=str(spool.base))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as demo:
        try:
            for line in demo.stdout:
                if b"demo " in line:
                    break
            found = requests.get(f"http://127.0.0.1:{port}/api/tasks", timeout=10).json()
            assert found["total"] == 12
            assert {task.get("attention", {}).get("state") for task in found["items"]} >= {"blocked", "idle"}
            time.sleep(2.5)  # longer than a server leaves a spool alone
            address = f"http://127.0.0.1:{port}/api/hooks/spooled"
            sent = next(spool.folder.glob("*.hook")).read_bytes()
            assert requests.post(address, sent, timeout=10).status_code == 503
        finally:
            demo.terminate()
    assert len(spool.left) == 1


# --- out of order ----------------------------------------------------------------------------------------


def late(run: Run, seconds: float, event: str, **fields) -> None:
    """An event of some time ago that comes only now, as the spool sends it."""
    moment = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    payload = json.dumps(run.facts | {"hook_event_name": event} | fields)
    head = f"agent: {run.agent}\ntime: {moment:%Y-%m-%dT%H:%M:%SZ}\nkey: {uuid.uuid4()}\n\n"
    assert run.server.ask("POST", "/api/hooks/spooled", data=(head + payload).encode()).status_code == 204


ASK = {"tool_name": "Bash", "tool_input": {"command": "git push"}}


def test_a_question_spooled_within_the_second_of_the_event_before_counts(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    late(run, 0, "PermissionRequest", **ASK)
    assert run.attention == "blocked"


def test_a_run_that_is_over_waits_for_nobody_whatever_comes_late(server):
    over, unseen = Run(server), Run(server)
    over("UserPromptSubmit", prompt="go")
    over("SessionEnd", reason="other")
    late(over, 30, "PermissionRequest", agent_id="sub", **ASK)
    unseen("SessionEnd", reason="other")
    for event, fields in (
        ("SessionStart", {}),
        ("UserPromptSubmit", {"prompt": "hi"}),
        ("PermissionRequest", ASK),
    ):
        late(unseen, 30, event, **fields)
    assert (over.attention, unseen.attention) == ("-", "-")
    assert "hidden_at" not in unseen.task and unseen.task["name"] == "hi"
    assert unseen.said[0] == "Session ended (other)"


def test_what_comes_late_answers_no_question_that_is_open_now(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    run("PermissionRequest", agent_id="sub", **ASK)
    late(run, 100, "UserPromptSubmit", prompt="before")
    assert run.attention == "blocked"


def test_a_question_counts_though_a_subagent_was_heard_after_it(server):
    run = Run(server)
    late(run, 60, "UserPromptSubmit", prompt="go")
    run("PostToolUse", tool_name="Bash", tool_use_id="s", agent_id="sub")
    late(run, 20, "PermissionRequest", **ASK)
    assert run.attention == "blocked"


def test_the_notification_of_what_a_subagent_asks_folds_too(server):
    run = Run(server)
    run("UserPromptSubmit", prompt="go")
    run("PermissionRequest", agent_id="sub", **ASK)
    run("Notification", notification_type="permission_prompt", message="Claude needs your permission")
    run("PostToolUse", tool_name="Bash", tool_use_id="s", agent_id="sub")
    assert run.attention == "-" and len(run.said) == 3


def test_the_same_question_again_after_an_answer_is_another_one(server):
    run = Run(server)
    for _ in range(2):
        run("PermissionRequest", **ASK)
        run("PermissionRequest", **ASK)
        assert run.attention == "blocked"
        run("PostToolUseFailure", tool_name="Bash", tool_use_id=str(uuid.uuid4()), error="refused")
    assert run.said.count("Permission needed: Bash: git push") == 2


def test_a_late_notification_keeps_the_words_that_were_asked(server):
    run = Run(server)
    late(run, 60, "PermissionRequest", **ASK)
    asked = run.task["attention"]
    run("Notification", notification_type="permission_prompt", message="Claude needs your permission")
    assert run.task["attention"] == asked and asked["message"] == "Permission needed: Bash: git push"


def test_a_clear_is_followed_after_a_change_of_folder_and_beside_one_who_quits(server):
    quits, clears = Run(server, "/e"), Run(server, "/e")
    for run in (quits, clears):
        run("UserPromptSubmit", prompt=run.source)
        run("CwdChanged", cwd="/e/sub", new_cwd="/e/sub")
    quits("SessionEnd", cwd="/e/sub", reason="prompt_input_exit")
    clears("SessionEnd", cwd="/e/sub", reason="clear")
    following = Run(server, "/e/sub")
    following("SessionStart", source="clear")
    assert following.task["id"] == clears.task["id"]


def test_a_run_named_anew_takes_its_subagents_along_and_both_tasks_say_so(fresh):
    server = fresh()
    tasks = [server.new_task(name) for name in ("one", "two")]
    run = Run(server, **{"X-Monitor-Task": tasks[0]["id"]})
    run("PermissionRequest", agent_id="sub", **ASK)
    run.headers["X-Monitor-Task"] = tasks[1]["id"]
    with server.follow() as follower:
        run("SubagentStart", agent_id="other", agent_type="x")
        told = follower.take(2, "task_updated")
    assert [(task["name"], "attention" in task) for task in told] == [("one", False), ("two", True)]


def test_a_folder_is_bound_by_its_absolute_path_and_holds_its_repository(server, tmp_path):
    task, main = server.new_task("bound"), repository(tmp_path / "calc")
    bound = {"link": "folder", "task_id": task["id"]}
    assert server.ask("POST", "/api/links", bound | {"value": "src"}).status_code == 400
    server.post("/api/links", **bound, value=f"{main}/")
    run = Run(server, str(worktree(main, tmp_path / "elsewhere" / "tree", "x")))
    run("UserPromptSubmit", prompt="go")
    assert run.task["id"] == task["id"]


def test_what_cannot_be_read_in_the_spool_holds_up_nobody(tmp_path):
    port = free_port()
    spool = Spool(tmp_path / "spool", port)
    (spool.folder / "aaa.hook").mkdir()
    server = Server(tmp_path / "m.db", port=port, MONITOR_SPOOL=str(spool.base))
    try:
        spool.put("UserPromptSubmit", NOW, prompt="behind it")
        wait_until(lambda: server.get("/api/updates")["total"] == 1)
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("length", range(60, 130, 7))
def test_no_part_of_a_secret_stands_where_a_message_is_cut(server, length):
    run = Run(server)
    secret = "npm_" + "a1B2" * 9
    run("PostToolUse", tool_name="Bash", tool_input={"command": f"{'x' * length} {secret} {'y' * 200}"})
    assert "npm_a1" not in json.dumps(server.get("/api/updates", source=run.source))
    body = {"task_id": run.task["id"], "payload": {"hook_event_name": "PostToolUse", "tool_name": "Bash"}}
    body["payload"]["tool_input"] = {"command": f"{'x' * length} {secret} {'y' * 200}"}
    assert "npm_a1" not in server.ask("POST", "/api/updates/claude-hook", body).text


# --- what is kept of a payload ---------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=5)
    ),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.integers(1, 20_000), st.integers(0, 40))
def test_whatever_comes_is_kept_bounded_and_can_be_stored(value, length, depth):
    value = {"text": "é" * length, "value": value, "list": [value] * (length % 300)}
    for _ in range(depth):
        value = [value]
    text = monitor.dump(monitor.kept_data(value))
    assert len(text) <= monitor.KEPT_BYTES
    monitor.parse_json(text.encode())


# --- a run names its task --------------------------------------------------------------------------------


def test_a_run_stands_for_its_task_wherever_one_is_named(server):
    run = Run(server, cwd=f"/work/{uuid.uuid4()}")
    run("UserPromptSubmit", prompt="Tidy the imports")
    task = run.task
    assert server.get(f"/api/tasks/{run.source}")["id"] == task["id"]
    assert (
        server.post("/api/updates/manual", task_id=run.source, message="from within")["task_id"] == task["id"]
    )
    messages = [update["message"] for update in server.get("/api/updates", task_id=run.source)["items"]]
    assert messages == ["Prompt: Tidy the imports", "from within"]
    other = Run(server, **{"X-Monitor-Task": run.source})
    other("UserPromptSubmit", prompt="Help with it")
    assert other.task["id"] == task["id"]


@pytest.mark.parametrize("name", ["claude:nobody", "nobody:1234", "claude:"])
def test_a_run_that_is_not_known_names_nothing(server, name):
    answer = server.ask("GET", f"/api/tasks/{name}")
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
