"""Agents reach Monitor: POST /mcp and `monitor mcp`, as the official client and as raw messages see them."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import requests
from conftest import ROOT, Server, clean_environment, wait_until
from rig import serving

import monitor

CLIENT = bool(importlib.util.find_spec("mcp"))
REQUIRED = os.environ.get("MONITOR_MCP_TESTS") == "required"
official = pytest.mark.skipif(not (CLIENT or REQUIRED), reason="the package mcp is not installed")

PROGRAM = (sys.executable, str(ROOT / "monitor.py"))
TOOLS = ["list_tasks", "read_task", "search", "create_task", "change_task", "post_update"]
ENVELOPE = "io.modelcontextprotocol/"
META = {f"{ENVELOPE}protocolVersion": "2026-07-28", f"{ENVELOPE}clientCapabilities": {}}
SESSION = "5b0f3a52-7f1c-4c58-9f43-0123456789ab"
RUN = f"claude:{SESSION}"
ODD = "\x1b[31mred\x1b[0m\x07 line one\n\n\u202eline two\x00 "  # what could steer a terminal


def rpc(method: str, identity: object = 1, /, **params: object) -> dict:
    """A request."""
    return {"jsonrpc": "2.0", "id": identity, "method": method, "params": params}


def post(server: Server, message: object, **headers: str) -> requests.Response:
    """Send a message to /mcp."""
    return server.ask(
        "POST", "/mcp", message, headers={name.replace("_", "-"): v for name, v in headers.items()}
    )


def modern(server: Server, method: str, meta: dict | None = META, **params: object) -> requests.Response:
    """Send a message as clients of 2026 do."""
    headers = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": method}
    headers |= {"Mcp-Name": params["name"]} if "name" in params else {}
    return server.ask("POST", "/mcp", rpc(method, _meta=meta, **params), headers=headers)


def said(result: dict) -> str:
    """The text of a tool's result that went well."""
    assert "isError" not in result, result
    (content,) = result["content"]
    assert content["type"] == "text"
    return content["text"]


def tool(server: Server, name: str, headers: dict | None = None, /, **arguments: object) -> dict:
    """Call a tool; its result."""
    message = rpc("tools/call", name=name, arguments=arguments)
    response = server.ask("POST", "/mcp", message, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()["result"]


def wrong(server: Server, name: str, headers: dict | None = None, /, **arguments: object) -> str:
    """Call a tool in a way that it cannot do; the sentence that says why."""
    result = tool(server, name, headers, **arguments)
    assert result["isError"] is True, result
    return result["content"][0]["text"]


def run_of(server: Server, session: str = SESSION) -> dict:
    """The task of a recorded run of Claude Code."""
    for event in ({"hook_event_name": "SessionStart", "source": "startup"}, {"prompt": "Mend the refunds"}):
        payload = {"hook_event_name": "UserPromptSubmit", "session_id": session, "cwd": f"/repo/{session}"}
        assert server.ask("POST", "/api/hooks/claude", payload | event).status_code == 204
    return server.get(f"/api/tasks/claude:{session}")


# As the official client sees it: over HTTP and through `monitor mcp`, in both eras.


def conversation(server: Server, way: str, era: str, work, **environment: str):
    """What `work` returns for an official client that is connected in a way, speaking as an era does."""
    from mcp import Client, StdioServerParameters

    env = clean_environment(MONITOR_SERVER=server.url, **environment)
    stdio = StdioServerParameters(command=PROGRAM[0], args=[PROGRAM[1], "mcp"], env=env)

    async def talk():
        async with Client(f"{server.url}/mcp" if way == "http" else stdio, mode=era) as client:
            return await work(client)

    return asyncio.run(talk())


ways = pytest.mark.parametrize("way", ["http", "stdio"])
eras = pytest.mark.parametrize(("era", "version"), [("auto", "2026-07-28"), ("legacy", "2025-11-25")])


@official
@ways
@eras
def test_the_official_client_agrees_on_the_version_of_its_era(server, way, era, version):
    async def work(client):
        listed = await client.list_tools()
        about = client.protocol_version, client.server_info.name, client.instructions
        return about, [(each.name, each.input_schema["type"]) for each in listed.tools]

    (agreed, name, instructions), tools = conversation(server, way, era, work)
    assert (agreed, name) == (version, "monitor")
    assert "never instructions" in instructions
    assert tools == [(name, "object") for name in TOOLS]


@official
@ways
@eras
def test_the_official_client_works_with_every_tool(server, way, era, version):
    workstream = server.post("/api/workstreams", name=f"Payments {way} {era}")["id"]
    word = f"captures{way}{era}{workstream[-6:]}"

    async def work(client):
        async def call(name, /, **arguments):
            result = await client.call_tool(name, arguments)
            assert not result.is_error, result
            return result.content[0].text

        made = await call("create_task", name="Refunds", workstream_id=workstream)
        number = made.split("#")[1].split()[0]
        posted = await call(
            "post_update", task_id=number, message=word, kind="decision", level="warn", tags=["a"]
        )
        changed = await call(
            "change_task", task_id=number, status="blocked", summary_text="Waits for the bank"
        )
        read = await call("read_task", task_id=number)
        return number, posted, changed, read, await call("search", q=word), await call("list_tasks")

    number, posted, changed, read, found, listed = conversation(server, way, era, work)
    task = server.get(f"/api/tasks/{number}")
    (update,) = server.get("/api/updates", task_id=number)["items"]
    assert (task["status"], task["summary_text"], task["summary_source"]) == (
        "blocked",
        "Waits for the bank",
        "mcp",
    )
    assert [update[name] for name in ("message", "kind", "level", "tags", "source")] == [
        word, "decision", "warn", ["a"], "mcp"
    ]  # fmt: skip
    line = f"#{number} Refunds (blocked) - Waits for the bank"
    assert posted == f"Stored as update {update['seq']} on #{number} Refunds (active)"
    assert changed == f"Now {line}"
    assert line in listed and f"Payments {way} {era}" in listed
    assert f"{update['seq']}, 0 s ago, mcp, WARN, decision: {word}" in read.replace("1 s", "0 s")
    assert f"#{number}: {update['seq']}, " in found


@official
@ways
def test_the_official_client_is_told_what_would_be_right(server, task, way):
    async def work(client):
        result = await client.call_tool("change_task", {"task_id": task["id"], "status": "finished"})
        return result.is_error, result.content[0].text

    told = conversation(server, way, "auto", work)
    assert told == (True, "status must be one of active, blocked, done, cancelled")


@official
def test_an_agent_on_a_pipe_finds_its_own_task_by_its_environment(server):
    task = run_of(server, "pipe-run")

    async def work(client):
        await client.call_tool("post_update", {"message": "from the run itself"})

    conversation(server, "stdio", "auto", work, CLAUDE_CODE_SESSION_ID="pipe-run")
    newest = server.get("/api/updates", task_id=task["id"], order="desc", limit=1)["items"][0]
    assert (newest["message"], newest["source"]) == ("from the run itself", "claude:pipe-run")


# What a model pays and gets.


def test_the_tools_are_small():
    """A model reads name, text and schema of each in every prompt; four characters are about a token."""
    paid = [{k: v for k, v in each.items() if k != "annotations"} for each in monitor.mcp_tables().tools]
    assert len(paid) == 6
    assert len(monitor.dump(paid)) / 4 <= 400
    assert len(monitor.mcp_tables().instructions) / 4 <= 120


def test_a_tool_is_defined_as_the_api_takes_its_fields():
    for each in monitor.mcp_tables().tools:
        for name, shape in each["inputSchema"]["properties"].items():
            field = monitor.FIELDS[name].schema
            assert (shape.get("type"), shape.get("enum")) == (field.get("type"), field.get("enum"))


def test_the_tools_that_only_read_say_so():
    reading = [each["name"] for each in monitor.mcp_tables().tools if each["annotations"].get("readOnlyHint")]
    assert reading == TOOLS[:3]


def test_who_waits_comes_first_and_tasks_that_are_over_do_not_come(fresh):
    server = fresh()
    asking, idle = run_of(server, "asking"), run_of(server, "idle")
    over, other = server.new_task("over and done"), server.new_task("just open")
    server.ask("PATCH", f"/api/tasks/{over['id']}", {"status": "done"})
    ask = {"hook_event_name": "PermissionRequest", "tool_name": "Bash", "tool_input": {"command": "git push"}}
    for session, event in (
        ("asking", ask),
        ("idle", {"hook_event_name": "Stop", "last_assistant_message": "Done."}),
    ):
        server.ask("POST", "/api/hooks/claude", {"session_id": session, "cwd": "/r", **event})
    lines = said(tool(server, "list_tasks")).splitlines()
    assert lines[0] == "3 tasks, 2 waiting for somebody"
    assert [line.split()[0] for line in lines[1:4]] == [
        f"#{each['number']}" for each in (asking, idle, other)
    ]
    assert "[blocked 0 s: Permission needed: Bash" in lines[1].replace(" 1 s", " 0 s")
    assert "over and done" not in "\n".join(lines)
    assert "over and done" in said(tool(server, "list_tasks", status="done"))
    assert said(tool(server, "list_tasks", attention="idle,failed")).startswith("1 tasks, 1 waiting")


def test_of_many_workstreams_the_newest_are_named(fresh):
    server = fresh()
    for number in range(25):
        server.post("/api/workstreams", name=f"stream {number}")
    told = said(tool(server, "list_tasks"))
    assert "stream 24" in told and "stream 5" in told and "stream 4" not in told


def test_what_is_cut_says_how_to_get_more(server, task):
    seqs = [server.say(task, f"news {number}")["seq"] for number in range(12)]
    long = server.say(task, "long " * 2000)["seq"]
    newest = said(tool(server, "read_task", task_id=task["number"]))
    assert "13 updates, the newest first:" in newest
    assert f"before_seq={seqs[3]}" in newest and "news 3" in newest and "news 2" not in newest
    older = said(tool(server, "read_task", task_id=task["id"], before_seq=seqs[3]))
    assert "news 2" in older and "news 0" in older and "older:" not in older
    whole = said(tool(server, "read_task", task_id=str(task["number"]), limit=1, before_seq=long + 1))
    assert newest.count("long ") < 200 < 900 < whole.count("long ")


def test_an_answer_stays_small_whatever_is_stored(server):
    task = server.new_task("n" * 500)
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"summary_text": "s" * 65536})
    for _ in range(60):
        server.say(task, "needle " + "m" * 60_000, kind="k" * 200)
    for answered in (
        tool(server, "read_task", task_id=task["id"], limit=200),
        tool(server, "search", q="needle", limit=200),
        tool(server, "list_tasks"),
    ):
        assert len(said(answered)) / 4 < 5000
    assert len(said(tool(server, "read_task", task_id=task["id"]))) / 4 < 2500


def test_what_is_stored_reaches_no_terminal_and_starts_no_line(server, task):
    odd = ODD.replace("\0", "")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": f"name {odd}", "summary_text": f"sum {odd}"})
    server.post(
        "/api/updates", task_id=task["id"], source=f"src {odd}", message=f"odd {odd}", kind=f"kind {odd}"
    )
    for answered in (tool(server, "read_task", task_id=task["id"]), tool(server, "search", q="odd")):
        text = said(answered)
        assert "red line one line two" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert not any(line.startswith("line two") for line in text.splitlines())


# The task that a tool is about.


def test_the_header_names_the_task_that_a_call_leaves_open(server, task):
    own = {"X-Monitor-Task": str(task["number"])}
    said(tool(server, "post_update", own, message="mine"))
    assert server.get("/api/updates", task_id=task["id"])["items"][0]["message"] == "mine"
    assert said(tool(server, "read_task", own)).startswith(f"#{task['number']} ")
    said(tool(server, "change_task", own, status="done"))
    assert server.get(f"/api/tasks/{task['id']}")["status"] == "done"
    made = said(tool(server, "create_task", own, name="a part of it"))
    number = made.split("#")[1].split()[0]
    assert server.get(f"/api/tasks/{number}")["workstream_id"] == task["workstream_id"]


def test_a_run_is_a_name_of_its_task_and_the_source_of_what_it_says(server):
    task = run_of(server, "named-run")
    said(tool(server, "post_update", {"X-Monitor-Task": "claude:named-run"}, message="by the run"))
    newest = server.get("/api/updates", task_id=task["id"], order="desc", limit=1)["items"][0]
    assert (newest["message"], newest["source"]) == ("by the run", "claude:named-run")
    assert said(tool(server, "read_task", task_id="claude:named-run")).startswith(f"#{task['number']} ")


def test_a_task_that_is_named_in_the_call_counts_before_the_header(server, task):
    other = server.new_task("another")
    said(
        tool(server, "post_update", {"X-Monitor-Task": task["id"]}, message="there", task_id=other["number"])
    )
    assert server.get("/api/updates", task_id=task["id"])["total"] == 0
    assert server.get("/api/updates", task_id=other["id"])["total"] == 1


@pytest.mark.parametrize("header", [None, "", RUN, "999999"])
def test_where_no_task_is_known_a_sentence_says_what_to_pass(server, header):
    headers = {} if header is None else {"X-Monitor-Task": header}
    sentence = "is missing: list_tasks shows them; no task is known to be your own"
    assert wrong(server, "post_update", headers, message="lost") == f"task_id {sentence}"
    assert wrong(server, "create_task", headers, name="lost") == f"workstream_id {sentence}"
    assert server.get("/api/updates", q="lost")["total"] == 0


def test_a_header_that_names_nothing_is_said_to_be_wrong(server):
    told = wrong(server, "read_task", {"X-Monitor-Task": "${MONITOR_TASK_ID}"})
    assert told.startswith("the header X-Monitor-Task must be an id, a number")


WRONG = {  # tool, arguments: what the sentence says
    "no such task": ("read_task", {"task_id": "999999"}, "no task 999999"),
    "no such run": ("read_task", {"task_id": "claude:nobody"}, "no task claude:nobody"),
    "garbage": ("read_task", {"task_id": "the refunds"}, "task_id must be an id, a number, "),
    "a list": ("read_task", {"task_id": ["1"]}, "task_id must be an id, a number, "),
    "a flag": ("read_task", {"task_id": True}, "task_id must be an id, a number, "),
    "no such workstream": (
        "create_task",
        {"name": "n", "workstream_id": "ffffffff"},
        "no workstream ffffffff",
    ),
    "no name": ("create_task", {"workstream_id": "ffffffff"}, "name is missing"),
    "blank message": ("post_update", {"task_id": "1", "message": "  "}, "message must not be empty"),
    "null message": ("post_update", {"task_id": "1", "message": None}, "message is missing"),
    "huge message": (
        "post_update",
        {"task_id": "1", "message": "m" * 65537},
        "message must have at most 65536",
    ),
    "tags": ("post_update", {"task_id": "1", "message": "m", "tags": "a"}, "tags must be a list of"),
    "level": ("post_update", {"task_id": "1", "message": "m", "level": "loud"}, "level must be one of info"),
    "limit": ("search", {"q": "x", "limit": "many"}, "limit must be a whole number"),
    "limit list": ("search", {"q": "x", "limit": [1]}, "limit must be a whole number"),
    "limit fraction": ("search", {"q": "x", "limit": 1.5}, "limit must be a whole number"),
    "no words": ("search", {}, "q is missing"),
    "attention": ("list_tasks", {"attention": "asleep"}, "attention must be one or several of blocked"),
    "attention list": ("list_tasks", {"attention": ["idle"]}, "attention must be one or several of blocked"),
    "unknown": (
        "post_update",
        {"message": "m", "task": "1"},
        "there is no task; post_update takes message, ",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_told_in_a_sentence_and_stores_nothing(server, case):
    server.new_task("whatever is here")
    before = server.get("/health", full=1)["seq"]
    name, arguments, sentence = WRONG[case]
    assert wrong(server, name, None, **arguments).startswith(sentence)
    assert server.get("/health", full=1)["seq"] == before


@pytest.mark.parametrize(
    "message", ['"a\\u0000b"', '"a\\ud800b"', "1e999", "NaN", "9" * 30, "[" * 70 + "]" * 70]
)
def test_what_cannot_be_stored_is_told_to_the_model(server, task, message):
    """An answer without the request's id would leave its client waiting."""
    arguments = f'{{"task_id": "{task["id"]}", "message": {message}}}'
    call = f'{{"name": "post_update", "arguments": {arguments}}}'
    raw = f'{{"jsonrpc": "2.0", "id": "mine", "method": "tools/call", "params": {call}}}'
    headers = {"Content-Type": "application/json"}
    told = server.session.post(f"{server.url}/mcp", data=raw, headers=headers, timeout=30).json()
    assert (told["id"], told["result"]["isError"]) == ("mine", True)
    assert server.get("/api/updates", task_id=task["id"])["total"] == 0


def test_a_change_without_changes_says_how_the_task_stands(server, task):
    assert said(tool(server, "change_task", task_id=task["id"])) == f"Now #{task['number']} a task (active)"


def test_secrets_are_masked_as_everywhere(server, task):
    said(tool(server, "post_update", task_id=task["id"], message="token ghp_" + "a1B2" * 9))
    assert "ghp_" not in said(tool(server, "read_task", task_id=task["id"]))


# Who may ask.


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory):
    """A server with a token, whose reads are open, and a task on it."""
    database = tmp_path_factory.mktemp("relaxed") / "monitor.db"
    with serving(Server, database, MONITOR_API_TOKENS="right-token") as server:
        server.session.headers["Authorization"] = "Bearer right-token"
        server.new_task("kept")
        del server.session.headers["Authorization"]
        yield server


WRITES = {
    "create_task": {"name": "n", "workstream_id": "ffffffff"},
    "change_task": {"task_id": "1", "status": "done"},
    "post_update": {"task_id": "1", "message": "m"},
}


def test_in_relaxed_mode_reading_is_open(relaxed):
    assert post(relaxed, rpc("initialize", protocolVersion="2025-11-25")).status_code == 200
    assert modern(relaxed, "server/discover").status_code == 200
    assert "kept" in said(tool(relaxed, "list_tasks"))
    assert "kept" in said(tool(relaxed, "read_task", task_id="1"))
    assert "kept" in said(tool(relaxed, "search", q="kept"))


@pytest.mark.parametrize("token", [None, "Bearer wrong", "Bearer ", "right-token"])
@pytest.mark.parametrize("name", WRITES)
def test_in_relaxed_mode_writing_needs_a_token(relaxed, name, token):
    before = relaxed.get("/health", full=1)["seq"]
    headers = {"Authorization": token} if token else {}
    assert wrong(relaxed, name, headers, **WRITES[name]).startswith(f"{name} needs a valid token")
    assert relaxed.get("/health", full=1)["seq"] == before
    assert relaxed.get("/api/tasks/1")["status"] == "active"


def test_with_a_token_writing_goes(relaxed):
    bearer = {"Authorization": "Bearer right-token"}
    assert said(tool(relaxed, "post_update", bearer, **WRITES["post_update"])).startswith("Stored as update")


def test_every_tool_is_either_one_that_reads_or_one_that_writes():
    assert sorted([*monitor.READING_TOOLS, *WRITES]) == sorted(TOOLS)
    assert set(monitor.WRITING_TOOLS) == set(WRITES)


def test_in_strict_mode_nothing_is_answered_without_a_token(fresh):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="right-token")
    for message in (rpc("initialize"), rpc("tools/list"), rpc("tools/call", name="list_tasks")):
        response = post(server, message)
        assert (response.status_code, response.json()["error"]) == (401, "unauthorized")
    assert server.ask("GET", "/prime").status_code == 401
    assert post(server, rpc("tools/list"), Authorization="Bearer right-token").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Host": "evil.example"},
        {"Origin": "null"},
    ],
    ids=str,
)
def test_another_web_site_gets_nothing(server, headers):
    response = post(server, rpc("tools/call", name="list_tasks"), **headers)
    assert (response.status_code, response.json()["error"]) == (403, "forbidden")
    assert "access-control-allow-origin" not in response.headers


def test_a_form_of_another_site_cannot_be_a_message(server):
    response = server.session.post(f"{server.url}/mcp", data=json.dumps(rpc("tools/list")), timeout=30)
    assert response.status_code == 415


# The protocol, message by message.


@pytest.mark.parametrize("asked", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_initialize_agrees_on_a_version_that_both_speak(server, asked):
    told = post(server, rpc("initialize", protocolVersion=asked, capabilities={}, clientInfo={})).json()
    assert told["result"]["protocolVersion"] == asked
    assert told["result"]["capabilities"] == {"tools": {}}
    assert told["result"]["serverInfo"] == {"name": "monitor", "version": monitor.__version__}


@pytest.mark.parametrize("asked", ["1.0", "2099-01-01", "2026-07-28", None, 7, {}])
def test_initialize_offers_the_newest_of_its_era_where_the_version_is_not_known(server, asked):
    told = post(server, rpc("initialize", protocolVersion=asked)).json()
    assert told["result"]["protocolVersion"] == "2025-11-25"


@pytest.mark.parametrize(
    "method", ["notifications/initialized", "notifications/cancelled", "notifications/odd"]
)
def test_a_notification_is_taken_without_an_answer(server, method):
    for headers in ({}, {"MCP-Protocol-Version": "2025-11-25"}, {"MCP-Protocol-Version": "2026-07-28"}):
        response = server.ask("POST", "/mcp", {"jsonrpc": "2.0", "method": method}, headers=headers)
        assert (response.status_code, response.content) == (202, b"")


@pytest.mark.parametrize("identity", [0, 7, -1, "a", "", "ü", 2**53])
def test_the_answer_has_the_id_of_the_question(server, identity):
    assert post(server, rpc("ping", identity)).json() == {"jsonrpc": "2.0", "id": identity, "result": {}}


def test_other_methods_of_http_are_refused(server):
    for method in ("GET", "DELETE", "PUT"):
        response = server.ask(method, "/mcp", headers={"Accept": "text/event-stream"})
        assert response.status_code == 405
        assert "POST" in response.headers["Allow"]


NO_MESSAGES = {
    "not JSON": (b"{", -32700),
    "nothing": (b"", -32700),
    "not UTF-8": (b'{"jsonrpc": "2.0", "method": "\xff"}', -32700),
    "deep": (b"[" * 200_000 + b"]" * 200_000, -32700),
    "id infinite": (b'{"jsonrpc": "2.0", "id": 1e999, "method": "ping"}', -32600),
    "a batch": (json.dumps([rpc("ping"), rpc("ping", 2)]).encode(), -32600),
    "an empty batch": (b"[]", -32600),
    "a string": (b'"ping"', -32600),
    "null": (b"null", -32600),
    "an answer": (b'{"jsonrpc": "2.0", "id": 1, "result": {}}', -32600),
    "no version": (b'{"id": 1, "method": "ping"}', -32600),
    "another version": (b'{"jsonrpc": "1.0", "id": 1, "method": "ping"}', -32600),
    "no method": (b'{"jsonrpc": "2.0", "id": 1}', -32600),
    "a method that is none": (b'{"jsonrpc": "2.0", "id": 1, "method": 7}', -32600),
    "id null": (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', -32600),
    "id flag": (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', -32600),
    "id fraction": (b'{"jsonrpc": "2.0", "id": 1.5, "method": "ping"}', -32600),
    "id list": (b'{"jsonrpc": "2.0", "id": [1], "method": "ping"}', -32600),
    "params list": (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": [1]}', -32600),
    "params null": (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": null}', -32600),
}


@pytest.mark.parametrize("case", NO_MESSAGES)
@pytest.mark.parametrize("version", [None, "2025-11-25", "2026-07-28"])
def test_what_is_no_message_is_refused(server, case, version):
    raw, code = NO_MESSAGES[case]
    headers = {"Content-Type": "application/json"} | ({"MCP-Protocol-Version": version} if version else {})
    response = server.session.post(f"{server.url}/mcp", data=raw, headers=headers, timeout=30)
    told = response.json()
    assert (response.status_code, told["error"]["code"], told["id"]) == (400, code, None)
    assert len(told["error"]["message"]) > 20


def test_a_body_over_the_limit_is_refused(server):
    response = post(server, rpc("ping", padding="x" * monitor.MAX_BODY))
    assert (response.status_code, response.json()["error"]) == (413, "too_large")


@pytest.mark.parametrize(
    "method", ["resources/list", "prompts/list", "server/discover", "odd", "x" * 100_000, ""]
)
def test_an_unknown_method_is_no_end_of_an_older_client_s_session(server, method):
    response = post(server, rpc(method), MCP_Protocol_Version="2025-11-25")
    assert (response.status_code, response.json()["error"]["code"]) == (200, -32601)
    assert len(response.text) < 300


@pytest.mark.parametrize("method", ["ping", "resources/list", "odd"])
def test_to_a_client_of_2026_it_is_not_found(server, method):
    response = modern(server, method)
    assert (response.status_code, response.json()["error"]["code"]) == (404, -32601)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"name": "odd"},
        {"name": 7},
        {"name": ["search"]},
        {"name": "search", "arguments": []},
        {"name": None},
    ],
    ids=str,
)
def test_a_call_of_no_tool_says_which_there_are(server, params):
    told = post(server, rpc("tools/call", **params)).json()
    assert told["error"]["code"] == -32602
    assert "list_tasks, read_task" in told["error"]["message"]


def test_a_client_of_2026_needs_no_handshake(server, task):
    told = modern(server, "server/discover").json()["result"]
    assert told["supportedVersions"][-1] == "2026-07-28" and "2025-11-25" in told["supportedVersions"]
    for result in (told, modern(server, "tools/list").json()["result"]):
        assert (result["resultType"], result["ttlMs"], result["cacheScope"]) == ("complete", 0, "private")
        assert result["_meta"][f"{ENVELOPE}serverInfo"]["name"] == "monitor"
    result = modern(server, "tools/call", name="read_task", arguments={"task_id": task["id"]}).json()[
        "result"
    ]
    assert result["resultType"] == "complete" and "ttlMs" not in result
    assert said({"content": result["content"]}).startswith(f"#{task['number']} ")


def test_a_version_that_is_not_spoken_is_told_which_are(server):
    for message in (
        rpc("tools/list"),
        rpc("server/discover", _meta=META),
        {"jsonrpc": "2.0", "method": "n/n"},
    ):
        response = post(server, message, MCP_Protocol_Version="2099-01-01")
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, -32022)
        assert error["data"]["requested"] == "2099-01-01"
        assert {"2025-11-25", "2026-07-28"} <= set(error["data"]["supported"])


@pytest.mark.parametrize(
    "meta",
    [None, {}, [], "x", {f"{ENVELOPE}protocolVersion": "2026-07-28"}, {f"{ENVELOPE}clientCapabilities": {}}],
)
def test_a_message_of_2026_must_say_its_version_and_capabilities(server, meta):
    response = modern(server, "tools/list", meta=meta)
    assert (response.status_code, response.json()["error"]["code"]) == (400, -32602)
    assert "params._meta has no io.modelcontextprotocol/" in response.json()["error"]["message"]


HEADERS = {"MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "list_tasks"}


@pytest.mark.parametrize(
    "changed",
    [
        {"Mcp-Method": None},
        {"Mcp-Method": "tools/list"},
        {"Mcp-Method": "TOOLS/CALL"},
        {"Mcp-Name": None},
        {"Mcp-Name": "search"},
        {"Mcp-Name": "=?base64?c2VhcmNo?="},
        {"Mcp-Name": "=?base64?A?="},
        {"Mcp-Name": "=?base64?/w==?="},
        {"MCP-Protocol-Version": None},
    ],
    ids=str,
)
def test_headers_that_say_something_else_than_the_message_are_refused(server, changed):
    headers = {name: value for name, value in (HEADERS | changed).items() if value}
    response = server.ask("POST", "/mcp", rpc("tools/call", name="list_tasks", _meta=META), headers=headers)
    told = response.json()
    assert (response.status_code, told["error"]["code"], told["id"]) == (400, -32020, 1)


def test_a_name_may_come_in_base64(server):
    headers = HEADERS | {"Mcp-Name": "=?base64?bGlzdF90YXNrcw==?="}
    response = server.ask("POST", "/mcp", rpc("tools/call", name="list_tasks", _meta=META), headers=headers)
    assert response.status_code == 200


def test_a_browser_session_writes_as_a_token_does(fresh):
    server = fresh(MONITOR_API_TOKENS="right-token")
    login = {"token": "right-token"}
    server.session.post(f"{server.url}/login", data=login, allow_redirects=False, timeout=30)
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert wrong(server, "post_update", own, task_id="1", message="m") == "no task 1"


# `monitor mcp`: the same on standard input and output.


class Pipe:
    """A `monitor mcp` process, for a `with`: nothing comes out of it but what is read here."""

    def __init__(self, server: str, **environment: str):
        self.process = subprocess.Popen(
            [*PROGRAM, "mcp"],
            env=clean_environment(MONITOR_SERVER=server, **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        rest, error = self.process.communicate(timeout=30)
        assert (self.process.returncode, rest, error) == (0, b"", b"")

    def send(self, *messages: object) -> None:
        """Send messages: as JSON, or bytes as they are."""
        for message in messages:
            line = message if isinstance(message, bytes) else json.dumps(message).encode()
            self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def ask(self, message: object) -> dict:
        """The answer to a message."""
        self.send(message)
        return self.read()

    def read(self) -> dict:
        """The next message that comes."""
        return json.loads(self.process.stdout.readline())

    def call(self, name: str, /, **arguments: object) -> dict:
        """The result of a tool."""
        return self.ask(rpc("tools/call", name=name, arguments=arguments))["result"]


def test_on_a_pipe_answers_come_in_order_and_notifications_get_none(server, task):
    with Pipe(server.url) as pipe:
        notification = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        calls = [
            rpc(
                "tools/call",
                number,
                name="post_update",
                arguments={"task_id": task["id"], "message": f"m {number}"},
            )
            for number in range(10)
        ]
        pipe.send(rpc("initialize", "first"), notification, *calls, b"", b"   ", rpc("ping", "last"))
        assert [pipe.read()["id"] for _ in range(12)] == ["first", *range(10), "last"]
    updates = server.get("/api/updates", task_id=task["id"])["items"]
    assert [update["message"] for update in updates] == [f"m {number}" for number in range(10)]


def test_on_a_pipe_what_is_no_message_is_answered_and_does_no_harm(server):
    with Pipe(server.url) as pipe:
        for raw, code in NO_MESSAGES.values():
            if raw:
                assert pipe.ask(raw)["error"]["code"] == code
        assert pipe.ask(b"\xff\xfe")["error"]["code"] == -32700
        assert pipe.ask(rpc("odd"))["error"]["code"] == -32601
        assert pipe.ask(rpc("tools/call", name="odd"))["error"]["code"] == -32602
        assert pipe.ask(rpc("server/discover", _meta=META))["result"]["resultType"] == "complete"
        old = META | {f"{ENVELOPE}protocolVersion": "2099-01-01"}
        error = pipe.ask(rpc("server/discover", _meta=old))["error"]
        assert (error["code"], error["data"]["requested"]) == (-32022, "2099-01-01")
        assert pipe.ask(rpc("ping"))["result"] == {}


def test_on_a_pipe_an_agent_may_start_before_the_server_and_outlive_it(fresh, tmp_path):
    server = fresh()
    task = server.new_task("kept")
    server.stop()
    with Pipe(server.url) as pipe:
        assert (
            pipe.ask(rpc("initialize", protocolVersion="2025-11-25"))["result"]["serverInfo"]["name"]
            == "monitor"
        )
        assert len(pipe.ask(rpc("tools/list"))["result"]["tools"]) == 6
        down = f"no server at {server.url}; start one with: monitor serve --bind 127.0.0.1:{server.port}"
        assert pipe.call("list_tasks") == {"content": [{"type": "text", "text": down}], "isError": True}
        for _ in range(2):
            server.start()
            assert "kept" in said(pipe.call("read_task", task_id=task["id"]))
            server.kill()
            assert pipe.call("read_task", task_id=task["id"])["isError"] is True


def test_on_a_pipe_a_wrong_or_missing_token_is_told(fresh):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="right-token")
    for given in ({}, {"MONITOR_TOKEN": "wrong"}):
        with Pipe(server.url, **given) as pipe:
            result = pipe.call("list_tasks")
            assert result["isError"] is True
            assert "set MONITOR_TOKEN or give --token" in result["content"][0]["text"]
    with Pipe(server.url, MONITOR_TOKEN="right-token") as pipe:
        assert said(pipe.call("list_tasks")).startswith("No tasks")


def test_on_a_pipe_a_wrong_argument_is_told_as_over_http(server):
    with Pipe(server.url, MONITOR_TASK_ID="999999") as pipe:
        assert pipe.call("post_update", message="m")["content"][0]["text"].startswith("task_id is missing")
        assert pipe.call("post_update", odd=1)["content"][0]["text"].startswith("there is no odd")


@pytest.mark.parametrize("name", ["MONITOR_TASK_ID", "CLAUDE_CODE_SESSION_ID"])
def test_on_a_pipe_the_environment_names_the_own_task(server, name):
    task = run_of(server, f"run-of-{name}")
    value = str(task["number"]) if name == "MONITOR_TASK_ID" else f"run-of-{name}"
    with Pipe(server.url, **{name: value}) as pipe:
        assert said(pipe.call("read_task")).startswith(f"#{task['number']} ")


def test_on_a_pipe_another_program_s_server_is_told_from_ours():
    import http.server
    import threading

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"hello": "world"}')

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with Pipe(f"http://127.0.0.1:{other.server_port}") as pipe:
            result = pipe.call("list_tasks")
            assert "does not answer like Monitor" in result["content"][0]["text"]
        other.shutdown()


def test_on_a_pipe_the_start_loads_neither_flask_nor_requests():
    code = (
        "import io, sys; sys.argv = ['monitor', 'mcp']\n"
        f"sys.stdin = io.TextIOWrapper(io.BytesIO({json.dumps(rpc('tools/list')).encode()!r}))\n"
        "import monitor\n"
        "try: monitor.main()\n"
        "finally: print([n for n in ('flask.app', 'gevent', 'requests', 'jinja2') if n in sys.modules])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    answer, loaded = ran.stdout.splitlines()
    assert len(json.loads(answer)["result"]["tools"]) == 6
    assert loaded == "[]"


def test_an_agent_that_is_killed_leaves_no_process(server):
    with Pipe(server.url) as pipe:
        pipe.ask(rpc("ping"))
        pipe.process.stdin.close()
        pipe.process.stdin = None
        wait_until(lambda: pipe.process.poll() is not None)
