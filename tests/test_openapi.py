"""The OpenAPI document: it has all that there is, and the server does what it says. /docs shows all of it."""

from __future__ import annotations

import faulthandler
import html
import importlib.util
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys

import jsonschema
import pytest
from conftest import ROOT
from contract import Validator, complaints, document, failures
from hypothesis import given
from hypothesis import strategies as st
from test_pages import BROWSER, Page
from wire import Reply, exchange, refused, request_bytes, words

import monitor
from monitor import FIELDS, STATUS_OF, Problem, QueryText, Route

ABOUT = json.loads(monitor.asset("templates", "openapi.json"))
ROUTES = {f"{route[0]} {route[1]}": Route(*route) for route in monitor.ROUTES}
DOCUMENT = document()
OPERATIONS = [
    (path, method, does) for path, methods in DOCUMENT["paths"].items() for method, does in methods.items()
]
SOURCE = (ROOT / "monitor.py").read_text()
SQL = (ROOT / "schema.sql").read_text()
REQUIRED = os.environ.get("MONITOR_SCHEMA_TESTS") == "required"
# Pages, and what they are made of, are for people; /prime and /llms.txt are for models. The messages of /mcp
# are described by its own protocol (tools/list), those of the socket have no place in OpenAPI. What is not
# here must be described.
PAGES = words(
    """
    / /login /logout /dashboard /docs /stream /needs /palette /workstreams /workstreams/<reference> /tasks
    /static/<name> /prime /llms.txt /mcp /api/ws
    /tasks/<reference> /tasks/<page:reference> /tasks/<reference>/updates /tasks/<reference>/runs
    /tasks/<reference>/links
    """
)


def operation_of(key: str) -> dict:
    """The operation of a route, by its row's key."""
    method, rule = key.split()
    path = re.sub("<([a-z]+:)?([a-z]+)>", r"{\2}", rule).replace("{reference}", "{id}")
    return DOCUMENT["paths"][path][method.lower()]


# ------------------------------------------------------------------------------------------------------
# nothing is missing
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key, route in ROUTES.items() if route.rule not in PAGES])
def test_every_route_is_described(key):
    assert key in ABOUT["routes"], (
        f"{key} is not described. Add a row to `routes` in templates/openapi.json, as OpenAPI has it: tags, "
        "summary, responses and, where it has them, parameters (headers), requestBody (one that is no JSON "
        "object of fields). The tables that check its body and query go into its row of ROUTES, fourth and "
        "fifth; its handler is given what they have checked, as posted and wanted. A page for people goes "
        "into PAGES, here."
    )


def test_nothing_is_described_that_is_not_there():
    assert set(ABOUT["routes"]) - set(ROUTES) == set()
    assert len(OPERATIONS) == len(ABOUT["routes"])


@pytest.mark.parametrize("key", ABOUT["routes"])
def test_a_route_tells_of_all_its_fields(key):
    route, operation = ROUTES[key], operation_of(key)
    placed = {(each["in"], each["name"]) for each in operation["parameters"] if "in" in each}
    in_path = {("path", name) for name in re.findall(r"{(\w+)}", str(DOCUMENT["paths"].keys()))}
    assert {each for each in placed if each[0] == "query"} == {("query", name) for name in route.query or {}}
    assert {each for each in placed if each[0] == "path"} <= in_path
    assert len([each for each in placed if each[0] == "path"]) == route.rule.count("<")
    takes = operation.get("requestBody", {}).get("content", {})
    if route.body is not None:
        schema = takes["application/json"]["schema"]
        assert set(schema["properties"]) == set(route.body)
        assert schema["required"] == [name for name, field in route.body.items() if field.required]
    elif route.method != "GET" and not takes:
        assert key == "POST /api/updates/<seq:seq>/redact", f"{key}: what body does it take?"


def test_a_field_of_body_or_query_is_read_only_where_the_tables_check_it():
    """A handler gets `posted` and `wanted`. What it reads by itself would be missing here."""
    web = SOURCE[SOURCE.index("# web: ") :]
    assert re.findall(r".*request\.args.*", web) == [
        "    args = flask.request.args",
        '    ("GET", "/login", lambda: page("login.html", next=local_path(flask.request.args.get("next")))),',
    ]
    assert len(re.findall(r"json_body\(", web)) == 2, "its definition, and respond()"


def test_every_header_that_is_read_is_described():
    known = {"Accept", "Authorization", "Content-Type", "MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"}
    read = set(re.findall(r'headers\.get\("([A-Za-z0-9-]+)"', SOURCE[SOURCE.index("# guard: ") :]))
    read |= set(re.findall(r'"(X-[A-Za-z0-9-]+)"', SOURCE[SOURCE.index("# web: ") :]))
    told = set(DOCUMENT["components"]["parameters"])
    sent = {"X-Accel-Buffering", "X-Content-Type-Options"}
    assert {
        name for name in read if not name.startswith(("Content-", "MONITOR", "Sec-WebSocket-"))
    } - known - sent == told
    used = [each["$ref"] for *_, does in OPERATIONS for each in does["parameters"] if "$ref" in each]
    assert {reference.split("/")[-1] for reference in used} == told


def test_every_error_is_described():
    assert set(ABOUT["errors"]) == set(STATUS_OF)
    assert DOCUMENT["components"]["schemas"]["Error"]["properties"]["error"]["enum"] == list(STATUS_OF)
    told = {}
    for name, response in DOCUMENT["components"]["responses"].items():
        for code in response["content"]["application/json"]["schema"]["properties"]["error"]["enum"]:
            told[code] = int(name.removeprefix("Problem"))
    assert told == STATUS_OF


def test_the_names_of_operations_are_their_own():
    names = [does["operationId"] for _, _, does in OPERATIONS]
    assert len(set(names)) == len(names)
    assert {does["tags"][0] for _, _, does in OPERATIONS} == {tag["name"] for tag in DOCUMENT["tags"]}


def test_every_reference_leads_somewhere():
    for reference in re.findall(r'"\$ref": ?"#/([^"]+)"', json.dumps(DOCUMENT)):
        found = DOCUMENT
        for step in reference.split("/"):
            found = found[step]


def test_every_schema_is_one():
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_where_a_token_is_needed_depends_on_the_settings():
    def closed(**settings: str) -> set[str]:
        config = monitor.Config.load({"MONITOR_DB": "sqlite::memory:"} | settings)
        found = document(config)["paths"].items()
        return {
            f"{method} {path}"
            for path, each in found
            for method, does in each.items()
            if {} not in does["security"]
        }

    every = {f"{method} {path}" for path, method, _ in OPERATIONS}
    writes = {each for each in every if not each.startswith("get ") or "/admin/" in each}
    assert closed() == set()
    assert closed(MONITOR_API_TOKENS="tok") == writes
    assert closed(MONITOR_API_TOKENS="tok", MONITOR_AUTH_MODE="strict") == every - {"get /health"}
    signed = closed(MONITOR_API_TOKENS="tok", MONITOR_GITHUB_SECRET="s")
    assert signed == writes - {"post /api/webhooks/github"}


# ------------------------------------------------------------------------------------------------------
# objects: as the database and the code have them
# ------------------------------------------------------------------------------------------------------


def properties(name: str) -> dict:
    """The fields of an object that the server answers with."""
    return DOCUMENT["components"]["schemas"][name]["properties"]


@pytest.mark.parametrize(("name", "kind"), [("Workstream", monitor.WORKSTREAM), ("Task", monitor.TASK)])
def test_a_workstream_and_a_task_have_the_fields_that_are_read_from_their_rows(name, kind):
    assert set(properties(name)) == set(kind.columns)
    assert properties(name)["status"]["enum"] == kind.changes["status"].schema["enum"]


@pytest.mark.parametrize(("name", "view"), [("Session", "session_rows"), ("Link", "link_rows")])
def test_a_session_and_a_link_have_the_fields_of_their_views(name, view):
    db = sqlite3.connect(":memory:")
    db.executescript(SQL)
    columns = {column[0] for column in db.execute(f"SELECT * FROM {view}").description}
    db.close()
    assert set(properties(name)) == columns - {"task"}


def words_of(table: str, column: str) -> list[str]:
    """What a CHECK in schema.sql allows."""
    body = re.search(rf"CREATE TABLE {table} \((.*?)^\)", SQL, re.M | re.S)[1]
    return re.findall(r"'(\w+)'", re.search(rf"CHECK \({column} IN \(([^)]*)\)", body)[1])


@pytest.mark.parametrize(
    ("name", "field", "table", "column"),
    [
        ("Session", "state", "sessions", "state"),
        ("Link", "link", "links", "kind"),
        ("PullRequest", "state", "pull_requests", "state"),
        ("Ci", "state", "checks", "state"),
        ("Update", "level", "updates", "level"),
    ],
)
def test_the_words_of_a_field_are_those_of_its_column(name, field, table, column):
    assert sorted(properties(name)[field]["enum"]) == sorted(words_of(table, column))


def test_every_event_of_the_log_is_described():
    own = {"hello", "reset", "checkpoint", "tick"}
    assert set(properties("Events")) == own | set(words_of("log", "event"))


# ------------------------------------------------------------------------------------------------------
# fields: the schema takes what the reader takes, and nothing else
# ------------------------------------------------------------------------------------------------------

ODD_TEXTS = [
    *[
        "",
        " ",
        "\t\n",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x1c",
        "\x85",
        "\ufeff",
        "\u200b",
        "a",
        " a ",
        "a\n",
        "\n",
    ],
    *[
        "a\0",
        "\0",
        "12",
        "12\n",
        "0",
        "1" * 18,
        "1" * 19,
        "abcd",
        "ABCD",
        "abc",
        "----",
        "-1",
        "a-b",
        "é",
        "\uff11\uff12",
    ],
    *[
        "claude:x",
        "claude:",
        "claude:a/b",
        "claude:a b",
        "Claude:x",
        "codex:~",
        "nope:x",
        "claude:" + "x" * 201,
    ],
    *[
        "active",
        "archived",
        "blocked",
        "info",
        "Info",
        "tick",
        "asc",
        "30d",
        " 30d ",
        "30",
        "d",
        "99999h",
        "100000m",
    ],
    *[
        "x" * 200,
        "x" * 201,
        "x" * 500,
        "x" * 501,
        "x" * 1000,
        "x" * 1001,
        "x" * 65536,
        "x" * 65537,
        "😀" * 500,
    ],
    *["true", "false", "branch", "pr", "sse", "ndjson", "null", "00000000-0000-4000-8000-000000000000"],
]
ODD = [
    *ODD_TEXTS,
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63 - 1,
    1.5,
    [],
    ["a"],
    ["a", "a"],
    [""],
    [1],
    [None],
    ["a\0"],
]
ODD += [["x"] * 100, ["x"] * 101, ["x" * 201], [" "], {}, {"a": 1}, {"a": None}]
VALUES = st.recursive(
    st.sampled_from([*ODD_TEXTS, None, True]) | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
IN_BODIES = {
    f"{name}{'!' * field.required}": (name, field)
    for route in ROUTES.values()
    for name, field in (route.body or {}).items()
}


def takes(field, name: str, value) -> bool:
    """Whether clean() takes a value; what no JSON may hold has been refused before it comes there."""
    try:
        body = monitor.parse_json(monitor.dump({name: value}).encode())
        checked = monitor.clean(body, {name: field})
        if name == "older_than":
            monitor.parse_age(checked[name])
    except Problem:
        return False
    return True


def agree(name: str, field, value) -> None:
    """Assert that schema and reader think the same of a value."""
    schema = monitor.body_schema({name: field})
    schema.pop("anyOf", None)  # of a link: by both its fields, below
    body = {name: value}
    valid = failures(schema, body) == []
    assert valid == takes(field, name, value), f"{name}: {value!r}; the schema says {valid}"


@pytest.mark.parametrize("key", IN_BODIES)
def test_the_schema_of_a_field_takes_what_its_reader_takes(key):
    for value in ODD:
        agree(*IN_BODIES[key], value)


@given(st.sampled_from(list(IN_BODIES)), VALUES)
def test_schema_and_reader_agree_on_any_value(key, value):
    agree(*IN_BODIES[key], value)


LINK_VALUES = words(
    """
    / /work/ C:\\work C:/x work ./x main feature/x refs/heads/x 12 #12 0 012 12x 12/34 12#x 12?x acme/shop#12
    acme/shop/pull/12 acme/shop@12 https://github.com/acme/shop/pull/12 https://github.com/acme/shop/pull/12/files
    https://x/12 acme/shop acme/shop.git https://github.com/acme/shop.git https://github.com/acme/shop/ shop
    a/b/c
    acme/shop#0 1234567890123456789 123456789012345678
    """
)
LINK_VALUES += ["a" * 40, "A" * 40, "acme/shop@" + "a" * 40, "a" * 39, "g" * 40, "ä/ö", " ", "a b"]


@pytest.mark.parametrize("link", FIELDS["link"].schema["enum"])
def test_the_schema_of_a_link_takes_what_link_name_takes(link):
    schema = operation_of("POST /api/links/remove")["requestBody"]["content"]["application/json"]["schema"]
    for value in LINK_VALUES:
        body = {"link": link, "value": value}
        try:
            monitor.link_name(monitor.clean(body, monitor.LINK_NAME))
            taken = True
        except Problem:
            taken = False
        assert (failures(schema, body) == []) == taken, body


IN_QUERIES = {name: field for route in ROUTES.values() for name, field in (route.query or {}).items()}
TIMES = ["2026-01-31T09:30:00Z", "2026-01-31T09:30:00.123456+02:00", "9999-12-31T23:59:59.999999Z"]
TIMES += ["0001-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "2026-01-31t09:30:00z"]
GOOD_IN_QUERIES = {
    "boolean": ["true", "false"],
    "integer": ["0", "1", "200", "10000000000"],
    "date-time": TIMES,
}


@pytest.mark.parametrize("name", IN_QUERIES)
def test_a_parameter_takes_what_its_schema_takes(name):
    field = IN_QUERIES[name]
    schema = monitor.parameter("query", name, field)["schema"]
    kind = schema.get("format") or schema.get("type")
    good = GOOD_IN_QUERIES.get(kind) or schema.get("enum") or []
    good = ["blocked", "blocked,failed"] if field.kind == "words" else good
    good = [*good] + [text for text in ODD_TEXTS if kind == "string" and Validator(schema).is_valid(text)]
    assert good or kind == "array"
    for text in good:
        field.check(QueryText(text), name)


@pytest.mark.parametrize(
    "name", [name for name, field in IN_QUERIES.items() if field.kind in ("text", "choice", "reference")]
)
def test_a_parameter_takes_nothing_else(name):
    field = IN_QUERIES[name]
    schema = monitor.parameter("query", name, field)["schema"]
    for text in ODD_TEXTS:
        if not Validator(schema).is_valid(text):
            with pytest.raises(Problem):
                field.check(QueryText(text), name)


def test_the_idempotency_key_is_what_the_document_says(server, task):
    schema = DOCUMENT["components"]["parameters"]["Idempotency-Key"]["schema"]
    for key in ("!", "~", "~" * 200, "~" * 201, "\x7f", "é", "a\tb", "\x80"):
        body = {"task_id": task["id"], "message": "m"}
        answer = server.ask(
            "POST", "/api/updates/manual", body, headers={"Idempotency-Key": key.encode("latin-1")}
        )
        assert (answer.status_code < 400) == Validator(schema).is_valid(key), repr(key)


# ------------------------------------------------------------------------------------------------------
# a server's answers
# ------------------------------------------------------------------------------------------------------


def test_a_server_serves_the_document(server):
    served = server.get("/openapi.json")
    served["components"]["securitySchemes"]["cookie"]["name"] = "monitor_session_3000"
    assert served == document()


def test_every_event_of_a_stream_conforms(server, task, answers_conform):
    server.say(task, "an update", level="error", tags=["a"], data={"b": [1]})
    session = {"session_id": "schema-run", "cwd": "/nowhere/shop", "prompt": "Fix it"}
    for event in ("UserPromptSubmit", "PermissionRequest"):
        hook = session | {"hook_event_name": event, "tool_name": "Bash", "tool_input": {"command": "ls"}}
        assert server.ask("POST", "/api/hooks/claude", hook).status_code == 204
    move = {"source": "claude:schema-run", "task_id": task["id"], "updates": True}
    assert server.ask("POST", "/api/sessions/move", move).json()["attention"]["state"] == "blocked"
    seq = server.say(task, "a secret")["seq"]
    server.ask("POST", f"/api/updates/{seq}/redact")
    server.ask("POST", "/api/links", {"link": "repo", "value": "nowhere/shop", "task_id": task["id"]})
    assert server.get("/api/links")["items"] and server.get("/api/sessions")["items"]
    for path in (
        "after_seq=0",
        "after_seq=99999999",
        "task_id=" + task["id"] + "&after_seq=0",
        "view=tick&after_seq=0",
    ):
        text = server.ask("GET", f"/api/stream?poll=1&format=ndjson&{path}").text
        assert text
    server.ask("GET", f"/tasks/{task['id']}.json")
    server.ask("GET", "/stream.ndjson")
    server.ask("GET", "/health?full=1")
    server.ask("GET", "/api/admin/check")
    server.ask("POST", "/api/admin/prune", {"older_than": "90d", "dry_run": True})


def test_an_answer_that_is_not_described_is_noticed():
    def odd(status: int, value=None, media: str = "application/json") -> Reply:
        return Reply(status, {"Content-Type": media}, json.dumps(value).encode())

    item = {"id": 1}
    found = " ".join(complaints("GET", "/api/tasks", odd(200, {"items": [item], "total": 1, "extra": 1})))
    assert "extra" in found and "required" in found and "not of type" in found
    assert complaints("GET", "/api/tasks", odd(418))
    assert complaints("GET", "/api/tasks", odd(200, {"items": [], "total": 0}, "text/html"))
    assert complaints("GET", "/api/tasks/1", odd(404, {"error": "conflict", "message": "a code of 409"}))
    assert complaints("GET", "/api/nope", odd(200, {}))
    assert complaints("POST", "/api/hooks/claude", odd(204, {}))
    assert complaints("GET", "/api/tasks", odd(200, {"items": [], "total": 0})) == []


# ------------------------------------------------------------------------------------------------------
# /docs
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs(server) -> Page:
    """The page."""
    return Page(server.ask("GET", "/docs", headers=BROWSER).text)


def test_the_page_shows_every_operation_whole(docs):
    shown = {part["id"]: part.text for part in docs.all("div") if part["id"]}
    for path, method, does in OPERATIONS:
        text = shown[does["operationId"]]
        names = [each["name"] for each in does["parameters"] if "name" in each]
        for takes in does.get("requestBody", {}).get("content", {}).values():
            names += takes["schema"].get("properties", {})
        missing = [part for part in [*names, *does["responses"]] if part not in text]
        assert missing == [], f"{method} {path}"
        assert f"{method.upper()} {path} {does['summary']}" in docs.main


def test_the_page_shows_every_error_and_object(docs):
    told = [*STATUS_OF, *DOCUMENT["components"]["schemas"]]
    assert [name for name in told if name not in docs.main] == []


def test_every_link_in_the_page_leads_somewhere(docs):
    ids = {element["id"] for element in docs.all()}
    inside = [link["href"][1:] for link in docs.all("a") if link["href"].startswith("#")]
    assert [name for name in inside if name not in ids] == []


def test_the_page_asks_no_other_host(docs):
    asked = [one["src"] or one["href"] for one in docs.all("script", "link", "img")]
    assert [address for address in asked if not address.startswith("/static/")] == []


def test_every_page_leads_to_it(server):
    (footer,) = Page(server.ask("GET", "/dashboard", headers=BROWSER).text).all("footer")
    assert [link["href"] for link in footer.all("a")] == ["/docs"]


def examples(text: str) -> list[str]:
    """The commands of the page."""
    return [
        html.unescape(each) for each in re.findall(r'<pre tabindex="0"><code>(.*?)</code></pre>', text, re.S)
    ]


def test_every_example_of_the_page_works(fresh, tmp_path):
    """With a shell and curl, on a server that has what they name."""
    if not shutil.which("curl") or not shutil.which("bash"):
        pytest.skip("curl or bash is not installed")
    server = fresh()
    prepare(server)
    commands = examples(server.ask("GET", "/docs", headers=BROWSER).text)
    assert len(commands) == len(OPERATIONS)
    workstream = server.get("/api/workstreams")["items"][0]["id"]
    for command in commands:
        command = command.replace("8c1f", workstream).replace("api/stream?", "api/stream?poll=1&")
        command = command.replace("curl -s", "curl -s -w '\\n%{http_code}'", 1)
        ran = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=30
        )
        assert ran.stdout.splitlines()[-1].startswith("2"), f"{command}\n{ran.stdout}{ran.stderr}"
    assert shlex.split(commands[0])[0] == "curl" and (tmp_path / "monitor.db").stat().st_size > 10_000


def prepare(server) -> None:
    """What the examples name: task 12, and update 42."""
    first = server.new_task()
    for _ in range(11):
        server.new_task(workstream=first["workstream_id"])
    while server.say(first, "an update")["seq"] < 42:
        pass


# ------------------------------------------------------------------------------------------------------
# what schemathesis found, and what it does not reach
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/health", "/api/tasks", "/api/hooks/claude", "/nope", "/dashboard", "/docs"]
)
def test_a_query_that_is_no_utf_8_is_refused(server, path):
    for method in ("GET", "POST"):
        asked = exchange(server, request_bytes(server, method, path + "?\xff=\xfe"))
        refused(asked, 400, "invalid_input")
    page = exchange(server, request_bytes(server, "GET", path + "?q=\xff", Accept="text/html"))
    assert page.status == 400
    assert exchange(server, request_bytes(server, "GET", "/api/tasks?q=\xc3\xa9")).status == 200


@pytest.mark.parametrize("name", ["manual", "claude-hook", "github-webhook"])
def test_a_name_is_not_taken_for_a_number(server, name):
    path = f"/api/updates/{name}"
    asked = server.ask("GET", path)
    refused(asked, 405, "method_not_allowed")
    for answer in (asked, server.ask("OPTIONS", path)):
        assert set(answer.headers["Allow"].split(", ")) == {"OPTIONS", "POST"}


@pytest.mark.parametrize("path", ["/tasks/1.json", "/tasks/1.md"])
def test_a_file_is_only_read(server, path):
    allowed = server.ask("OPTIONS", path).headers["Allow"]
    assert set(words(allowed.replace(",", " "))) == {"GET", "HEAD", "OPTIONS"}
    refused(server.ask("POST", path, {}), 405, "method_not_allowed")


@pytest.mark.parametrize("seq", ["9" * 18, "9" * 19, "9" * 5000, "0", "-1", "1.0", "\u0661", "0x1", "1e1"])
def test_a_number_that_no_update_has_is_not_found(server, seq):
    refused(server.ask("GET", f"/api/updates/{seq}"), 404, "not_found")
    refused(server.ask("POST", f"/api/updates/{seq}/redact"), 404, "not_found")


@pytest.mark.parametrize("since", ["0001-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "2016-12-31t23:59:59z"])
def test_every_time_of_rfc_3339_is_one(server, task, since):
    said = server.say(task, "later")
    assert server.get("/api/updates", task_id=task["id"], since=since)["items"] == [said]
    refused(server.ask("GET", "/api/updates?since=2016-12-31T23:60:00Z"), 400, "invalid_input", "since")


@pytest.mark.parametrize("query", ["poll=yes", "poll=", "format=xml", "format=", "view=all"])
def test_a_stream_refuses_what_it_does_not_know(server, query):
    refused(server.ask("GET", f"/api/stream?{query}&poll=1"), 400, "invalid_input", query.partition("=")[0])


def test_a_webhook_for_a_task_that_cannot_be_is_not_found(server):
    for named in ("CsTe'{A?9", "999999", "a:b:c", "\xe9"):
        headers = {"X-Monitor-Task": named.encode("latin-1"), "X-GitHub-Event": "push"}
        refused(server.ask("POST", "/api/webhooks/github", {}, headers=headers), 404, "not_found")
    refused(server.ask("POST", "/api/webhooks/github?task_id=a?9", {}), 400, "invalid_input", "task_id")


# ------------------------------------------------------------------------------------------------------
# schemathesis
# ------------------------------------------------------------------------------------------------------


STRICT = {"MONITOR_AUTH_MODE": "strict", "MONITOR_API_TOKENS": "a-token"}


@pytest.mark.skipif(
    importlib.util.find_spec("schemathesis") is None and not REQUIRED,
    reason="schemathesis is not installed: it comes with .[dev]",
)
@pytest.mark.parametrize(
    ("settings", "phases", "most"),
    [({}, "examples,coverage", 1), ({}, "fuzzing,stateful", 6), (STRICT, "examples,fuzzing", 2)],
    ids=["coverage", "fuzzing", "strict"],
)
def test_schemathesis_finds_nothing(fresh, tmp_path, settings, phases, most):
    faulthandler.cancel_dump_traceback_later()  # it may take longer than a test: its own time-out ends it
    server = fresh(**settings)
    server.session.headers["Authorization"] = "Bearer a-token"
    prepare(server)
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{server.url}/openapi.json",
        "--checks",
        "all",
    ]
    command += ["--phases", phases, "--max-examples", str(most), "--seed", "1", "--continue-on-failure"]
    command += ["--generation-database", "none", "--no-color", "--header", "Authorization: Bearer a-token"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests")}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
