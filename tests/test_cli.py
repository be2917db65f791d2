"""The command line: what it prints, where, and with which exit status.

Real processes (`run`) for what each command does and for how processes begin and end; main() within this
process (`call`) for the tables of wrong input and strange answers, where a process each would take a minute.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import click
import pytest
import requests
import rig
from click.testing import CliRunner
from conftest import ROOT, Server, clean_environment, wait_until

import monitor

PROGRAM = Server.command
NOBODY = "00000000-0000-4000-8000-000000000000"
DEEP = "[" * 100_000


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    error: str

    @property
    def json(self):
        """The JSON that it printed, and nothing else."""
        return json.loads(self.out)


def run(*arguments: str, folder=None, **settings: str) -> Ran:
    """Run `monitor ARGUMENTS` with these settings in its environment."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        env=clean_environment(**settings),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call main() as `monitor ARGUMENTS`, with these settings: what escapes it but SystemExit is a fault."""

    def called(*arguments: str, **settings: str) -> Ran:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("MONITOR_")]:
                patch.delenv(name)
            for name, value in settings.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["monitor", *arguments])
            status = 0
            try:
                monitor.main()
            except SystemExit as end:
                status = end.code or 0
        return Ran(status, *capsys.readouterr())

    return called


class Batch(dict):
    """Commands that run side by side: their results by name, each waited for when it is asked for."""

    def __init__(self, pool: ThreadPoolExecutor, commands: dict[str, tuple], **settings: str):
        super().__init__({name: pool.submit(run, *words, **settings) for name, words in commands.items()})

    def __getitem__(self, name: str) -> Ran:
        return super().__getitem__(name).result()


@pytest.fixture(scope="module")
def pool():
    """A few processes at a time: more would only make each of them slower."""
    with ThreadPoolExecutor(4) as made:
        yield made


def assert_one_line(ran: Ran, status: int, *words: str) -> None:
    """A failure is one line on standard error that holds these words, and nothing on standard output."""
    assert (ran.status, ran.out) == (status, ""), ran
    assert ran.error.endswith("\n") and ran.error.count("\n") == 1 and len(ran.error) > 10, ran.error
    assert "Traceback" not in ran.error
    for word in words:
        assert word in ran.error


# What the commands do and print ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(server):
    """A workstream, one more to move to, and a task for each command that changes one."""
    workstream, other = (server.post("/api/workstreams", name=name)["id"] for name in ("one", "two"))
    tasks = {name: server.new_task(name, workstream) for name in ("a", "b", "c")}
    return {"workstream": workstream, "other": other} | tasks


@pytest.fixture(scope="module")
def done(server, home, pool):
    """Every client command with all its options, as a process of its own."""
    commands = {
        "workstream create": ("workstream", "create", "Payments", "--metadata", '{"team": ["a", 1]}'),
        "workstream update": ("workstream", "update", home["other"], "--name", "three", "--metadata", "[1]"),
        "workstream list": ("workstream", "list", "--include-archived"),
        "task create": ("task", "create", "Refunds", "--workstream", home["workstream"], "--metadata", "{}"),
        "task list": ("task", "list", "--workstream", home["workstream"], "--status", "active"),
        "task update": (
            *(
                "task",
                "update",
                str(home["a"]["number"]),
                "--name",
                "A",
                "--workstream",
                home["other"],
                "--hidden",
            ),
            *(
                "--summary",
                "so",
                "--summary-source",
                "me",
                "--metadata",
                '{"k": null}',
                "--status",
                "blocked",
            ),
        ),
        "update manual": (
            *("update", "manual", "--task", home["b"]["id"], "--message", "done", "--level", "warn"),
            *("--kind", "decision", "--tags", " api, ,b b ,", "--data", '{"n": [1.5, null]}'),
        ),
    }
    return Batch(pool, commands, MONITOR_SERVER=server.url)


@pytest.fixture
def ask(call, server):
    """Call main() for the shared server."""
    return lambda *words, **settings: call(*words, MONITOR_SERVER=server.url, **settings)


def test_every_command_succeeds_in_silence(done):
    assert {name: (done[name].status, done[name].error) for name in done} == dict.fromkeys(done, (0, ""))


def test_a_command_prints_the_servers_answer_indented_and_nothing_else(server, done):
    for name, kind in (
        ("task create", "tasks"),
        ("task update", "tasks"),
        ("workstream update", "workstreams"),
    ):
        made = done[name]
        assert made.out == json.dumps(server.get(f"/api/{kind}/{made.json['id']}"), indent=2) + "\n"


def test_a_list_is_printed_as_the_server_answers(home, done):
    for name, known in (("workstream list", home["workstream"]), ("task list", home["c"]["id"])):
        ran = done[name]
        assert ran.out == json.dumps(ran.json, indent=2) + "\n"
        assert ran.json["total"] == len(ran.json["items"])
        assert known in [item["id"] for item in ran.json["items"]]


def test_a_workstream_is_made_and_changed(home, done):
    made = done["workstream create"].json
    assert (made["name"], made["status"], made["metadata"]) == ("Payments", "active", {"team": ["a", 1]})
    changed = done["workstream update"].json
    assert (changed["id"], changed["name"], changed["metadata"]) == (home["other"], "three", [1])


def test_a_task_is_made_and_changed(home, done):
    made = done["task create"].json
    assert (made["name"], made["workstream_id"], made["status"]) == ("Refunds", home["workstream"], "active")
    changed = done["task update"].json
    assert (changed["id"], changed["name"], changed["status"]) == (home["a"]["id"], "A", "blocked")
    assert (changed["workstream_id"], changed["metadata"]) == (home["other"], {"k": None})
    assert (changed["summary_text"], changed["summary_source"]) == ("so", "me")
    assert {"hidden_at", "summary_updated_at"} <= set(changed)


def test_an_update_takes_every_field(home, done):
    update = done["update manual"].json
    assert (update["task_id"], update["source"], update["message"]) == (home["b"]["id"], "manual", "done")
    assert (update["level"], update["kind"], update["data"]) == ("warn", "decision", {"n": [1.5, None]})
    assert update["tags"] == ["api", "b b"]


def test_a_task_is_named_by_its_number_its_id_or_the_first_digits_of_it(ask, home):
    for reference in (str(home["c"]["number"]), home["c"]["id"], home["c"]["id"][:13]):
        assert ask("task", "update", reference).json == home["c"]


def test_options_that_were_not_given_are_not_sent(ask, home):
    update = ask("update", "manual", "--task", home["b"]["id"], "--message", "m").json
    assert update["tags"] == [] and {"level", "kind", "data"} & set(update) == set()
    assert (
        ask("update", "manual", "--task", home["b"]["id"], "--message", "m", "--tags", " , ").json["tags"]
        == []
    )


def test_no_stored_text_reaches_the_terminal_raw(ask):
    hostile = "\x1b]0;owned\x07 \u202e \u20ac \x9b\n"
    ran = ask("workstream", "create", hostile)
    assert ran.out.isascii() and ran.out.replace("\n", "").isprintable()
    assert ran.json["name"] == hostile


def test_hidden_tasks_are_listed_when_asked_for_and_can_be_shown_again(server, ask):
    task = server.new_task("to hide")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"hidden": True, "status": "done", "summary_text": "s"})
    lists = ("task", "list", "--workstream", task["workstream_id"])
    assert ask(*lists).json["total"] == 0
    assert ask(*lists, "--include-hidden", "--status", "done").json["total"] == 1
    assert ask(*lists, "--include-hidden", "--status", "active").json["total"] == 0
    shown = ask("task", "update", task["id"], "--no-hidden", "--summary", "").json
    assert {"hidden_at", "summary_text"} & set(shown) == set()


def test_archived_workstreams_are_listed_when_asked_for(server, ask):
    made = server.post("/api/workstreams", name="old")["id"]
    assert ask("workstream", "update", made, "--status", "archived").json["status"] == "archived"
    every = ask("workstream", "list", "--include-archived").json["items"]
    assert made in [workstream["id"] for workstream in every]
    assert made not in [workstream["id"] for workstream in server.get("/api/workstreams")["items"]]


# Errors ------------------------------------------------------------------------------------------------

USAGE = {
    "no such command": (("tasks",), "tasks"),
    "no such subcommand": (("task", "make"), "make"),
    "no such option": (("task", "list", "--state", "done"), "--state"),
    "a missing argument": (("workstream", "create"), "NAME"),
    "a missing option": (("task", "create", "x"), "--workstream"),
    "a missing value": (("task", "create", "x", "--workstream"), "--workstream"),
    "an unknown status": (("task", "update", "1", "--status", "finished"), "finished"),
    "an unknown level": (("update", "manual", "--task", "1", "--message", "m", "--level", "fatal"), "fatal"),
    "metadata that is no JSON": (("workstream", "create", "x", "--metadata", "{a: 1}"), "--metadata"),
    "data that is NaN": (("update", "manual", "--task", "1", "--message", "m", "--data", "[NaN]"), "--data"),
    "metadata beyond all numbers": (("task", "update", "1", "--metadata", "1e999"), "--metadata"),
    "metadata nested too deeply": (("task", "update", "1", "--metadata", DEEP), "--metadata"),
    "a server that is no address": (("task", "list", "--server", "localhost:3000"), "http://"),
}
PROBLEMS = {
    "an unknown task": (("task", "update", NOBODY, "--name", "x"), 3, NOBODY),
    "an unknown number": (("task", "update", "999999999", "--name", "x"), 3, "999999999"),
    "an unknown workstream": (("task", "create", "x", "--workstream", NOBODY), 3, NOBODY),
    "an update of an unknown task": (("update", "manual", "--task", NOBODY, "--message", "m"), 3, NOBODY),
    "an id that can be none": (("task", "update", "../workstreams", "--name", "x"), 3, "workstreams"),
    "an id of bytes that are no text": (("task", "update", "\udcff\udcfe", "--name", "x"), 3, ""),
    "an empty id": (("task", "update", "", "--name", "x"), 3, ""),
    "an empty name": (("workstream", "create", " "), 1, "name"),
    "a message of bytes that are no text": (
        ("update", "manual", "--task", "1", "--message", "\udcff"),
        1,
        "",
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_a_wrong_command_line_is_told_in_a_line(ask, name):
    words, said = USAGE[name]
    assert_one_line(ask(*words), 2, said)


@pytest.mark.parametrize("name", ["no such subcommand", "no such option", "a missing option"])
def test_a_usage_error_names_the_help_that_there_is(call, name):
    program, *words = call(*USAGE[name][0]).error.rpartition("see: ")[2].split()
    assert (program, words[-1], call(*words).status) == ("monitor", "--help", 0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_the_server_refuses_is_told_in_a_line(ask, name):
    words, status, said = PROBLEMS[name]
    assert_one_line(ask(*words), status, said)


SILENT = {
    ("--quiet", "workstream", "list"): 0,
    ("workstream", "--silent", "list"): 0,
    ("workstream", "create", "x", "--silent"): 0,
    ("--silent", "task", "update", NOBODY): 3,
    ("task", "--quiet", "update", NOBODY): 3,
    ("task", "update", NOBODY, "--quiet"): 3,
    ("task", "list", "--quiet", "--server", "http://127.0.0.1:9"): 5,
    ("--quiet", "task", "list", "--no-such-option"): 2,
    ("task", "make", "--silent"): 2,
}


@pytest.mark.parametrize("words", SILENT, ids=" ".join)
def test_quiet_silences_both_outputs_and_keeps_the_exit_status(ask, words):
    assert ask(*words) == Ran(SILENT[words], "", "")


def test_errors_of_a_real_process_are_a_line_too(server, pool):
    commands = {
        "usage": ("task", "list", "--state", "done"),
        "not found": ("task", "update", NOBODY, "--name", "x"),
        "quiet": ("task", "update", NOBODY, "--quiet"),
        "bytes": ("task", "update", "\udcff\udcfe", "--name", "x"),
        "unreachable": ("task", "list", "--server", "http://127.0.0.1:9/"),
    }
    ran = Batch(pool, commands, MONITOR_SERVER=server.url)
    assert ran["quiet"] == Ran(3, "", "")
    assert_one_line(ran["usage"], 2, "--state", "--help")
    assert_one_line(ran["not found"], 3, NOBODY)
    assert_one_line(ran["bytes"], 3)
    assert_one_line(ran["unreachable"], 5, "http://127.0.0.1:9", "monitor serve")


# Answers that are not Monitor's ------------------------------------------------------------------------

ANSWERS = {
    "a page": (200, "<title>It works!</title>"),
    "nothing": (200, ""),
    "no content": (204, None),
    "a list": (200, "[]"),
    "a word": (200, '"ok"'),
    "another object": (200, '{"status": "ok"}'),
    "items that are none": (200, '{"items": "many", "total": 1}'),
    "a total that is none": (200, '{"items": [], "total": "many"}'),
    "endless nesting": (200, DEEP),
    "bytes": (200, b"\xff\xfe\x00"),
    "half of it": (200, None),
    "another error": (500, "<h1>Internal Server Error</h1>"),
    "an error of another shape": (404, '{"detail": "Not Found"}'),
    "an error of other types": (404, '{"error": ["x"], "message": {"a": 1}}'),
    "a redirect": (302, '{"items": [], "total": 0}'),
    "a permanent redirect": (308, '{"items": [], "total": 0}'),
}
SAID = {
    "an ambiguous id": (409, "conflict", "1a2b is the beginning of several ids", 3),
    "a missing token": (401, "unauthorized", "a valid token is needed", 4),
    "a busy database": (503, "unavailable", "try again", 1),
    "hostile words": (400, "invalid_input", "two\nlines\x1b[31m \u202e\x9b", 1),
}


class Stub(BaseHTTPRequestHandler):
    """Answers /CASE/api/... as the case of that name says."""

    def do_GET(self) -> None:
        name = self.path.split("/")[1].replace("-", " ")
        self.server.asked.append(name)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if name in SAID:
            status, code, message, _ = SAID[name]
            body = json.dumps({"error": code, "message": message})
        else:
            status, body = ANSWERS[name]
        self.send_response(status)
        self.send_header("Location", f"http://{self.headers['Host']}/followed/api/tasks")
        raw = body if isinstance(body, bytes) else (body or "").encode()
        self.send_header("Content-Length", str(1000 if name == "half of it" else len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_PATCH = do_GET  # noqa: N815 (the names are http.server's)

    def log_message(self, *_) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def stub():
    """A server that is not Monitor."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def ask_stub(call, stub, name: str, *words: str) -> Ran:
    """Run a command against a case of the stub."""
    return call(*(words or ("task", "list")), MONITOR_SERVER=f"{stub.url}/{name.replace(' ', '-')}")


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_not_monitors_is_an_error(call, stub, name):
    ran = ask_stub(call, stub, name)
    assert_one_line(ran, 5 if name == "half of it" and ran.status == 5 else 1)


@pytest.mark.parametrize("name", ["a redirect", "a permanent redirect"])
def test_a_redirect_is_not_followed(call, stub, name):
    stub.asked.clear()
    assert ask_stub(call, stub, name, "workstream", "create", "x").status == 1
    assert stub.asked == [name]


@pytest.mark.parametrize("name", SAID)
def test_an_error_of_the_server_keeps_its_meaning(call, stub, name):
    _, _, message, status = SAID[name]
    ran = ask_stub(call, stub, name)
    assert_one_line(ran, status, message[:3])
    assert ran.error.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "words",
    [
        ("workstream", "list"),
        ("workstream", "create", "x"),
        ("task", "update", "1", "--name", "x"),
        ("update", "manual", "--task", "1", "--message", "m"),
    ],
    ids=" ".join,
)
def test_an_object_that_is_not_what_was_asked_for_is_an_error(call, stub, words):
    assert_one_line(ask_stub(call, stub, "another object", *words), 1)


# Tokens, and what must not be listened to --------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A server that wants a token for everything."""
    folder = tmp_path_factory.mktemp("guarded")
    running = Server(
        folder / "monitor.db", MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS=" s3cret , other,,"
    )
    yield running
    assert running.stop() == 0
    assert "s3cret" not in running.output


@pytest.mark.parametrize(
    "words",
    [
        ("workstream", "list", "--token", "s3cret"),
        ("--token", "other", "workstream", "list"),
        ("workstream", "--token", "s3cret", "list"),
    ],
    ids=" ".join,
)
def test_the_token_option_goes_anywhere_and_beats_the_environment(call, guarded, words):
    ran = call(*words, MONITOR_SERVER=guarded.url, MONITOR_TOKEN="wr0ng")
    assert (ran.status, "items" in ran.json) == (0, True)


def test_a_wrong_token_is_told_with_the_way_to_give_one(call, guarded):
    for given in ({}, {"MONITOR_TOKEN": "wr0ng"}):
        ran = call("workstream", "list", MONITOR_SERVER=guarded.url, **given)
        assert_one_line(ran, 4, "MONITOR_TOKEN", "--token")
        assert "wr0ng" not in ran.error


@pytest.mark.parametrize("token", ["s3cret\u20ac", "s3cret\nX-Other: 1", "s3cret\udcff"], ids=ascii)
def test_a_token_that_cannot_be_sent_is_an_error_that_does_not_show_it(call, guarded, token):
    ran = call("workstream", "list", "--token", token, MONITOR_SERVER=guarded.url)
    assert ran.status in (1, 2, 4)
    assert_one_line(ran, ran.status)
    assert "s3cret" not in ran.error


def test_netrc_and_proxies_are_ignored(guarded, tmp_path):
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\ndefault login x password y\n")
    netrc.chmod(0o600)
    proxies = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
    misleading = dict.fromkeys(proxies, "http://127.0.0.1:9") | {"no_proxy": "", "NO_PROXY": ""}
    misleading |= {"HOME": str(tmp_path), "NETRC": str(netrc), "MONITOR_TOKEN": "s3cret"}
    ran = run("workstream", "create", "x", MONITOR_SERVER=guarded.url, **misleading)
    assert (ran.status, ran.error) == (0, "")


def test_the_server_option_beats_the_environment(call, server):
    assert call("--server", server.url, "workstream", "list", MONITOR_SERVER="http://127.0.0.1:9").status == 0


# Outputs that break ------------------------------------------------------------------------------------


def test_an_output_that_is_closed_early_is_no_fault_of_ours(server):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [*PROGRAM, "workstream", "list", "--server", server.url]
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_an_output_that_is_full_is_an_error_in_a_line(server):
    with open("/dev/full", "w") as full:
        command = [*PROGRAM, "workstream", "list", "--server", server.url]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
    assert_one_line(Ran(done.returncode, "", done.stderr), 1)


def test_ctrl_c_ends_a_command_that_waits():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        process = subprocess.Popen(
            [*PROGRAM, "task", "list", "--server", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )
        with silent.accept()[0] as connection:
            connection.recv(1)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=10)
    assert (process.returncode, out, error.strip()) == (130, "", "")


# Looking after the database ----------------------------------------------------------------------------


def test_the_database_is_looked_after_while_the_server_runs(server, ask, tmp_path):
    update = server.say(server.new_task(), "a password: hunter2")
    copy = tmp_path / "copy.db"
    assert ask("check").json["ok"] is True
    assert ask("backup", str(copy)).json["bytes"] == copy.stat().st_size
    assert copy.stat().st_mode & 0o777 == 0o600
    assert ask("prune", "--older-than", "3650d", "--dry-run").json["pruned"] == 0
    wiped = ask("update", "redact", str(update["seq"])).json
    assert (wiped["seq"], "hunter2" in json.dumps(wiped)) == (update["seq"], False)
    assert [path.name for path in tmp_path.iterdir()] == ["copy.db"]


def test_a_database_at_rest_is_looked_after_too(ask, tmp_path):
    copy = tmp_path / "copy.db"
    ask("backup", str(copy))
    ran = run("check", "--db", str(copy), folder=tmp_path)
    assert (ran.status, ran.json["ok"], ran.error) == (0, True, "")


ADMIN_ERRORS = {
    "a backup onto a file": (("backup", __file__), 1, "exists"),
    "a backup into no folder": (("backup", "/no/such/folder/x.db"), 1, "/no/such/folder/x.db"),
    "an age that is none": (("prune", "--older-than", "soon"), 1, "soon"),
    "a database that is not there": (("check", "--db", "/no/such.db"), 1, "/no/such.db"),
    "an unknown update": (("update", "redact", "999999999"), 3, "999999999"),
}


@pytest.mark.parametrize("name", ADMIN_ERRORS)
def test_what_cannot_be_done_with_the_database_is_told_in_a_line(ask, name):
    words, status, said = ADMIN_ERRORS[name]
    assert_one_line(ask(*words), status, said)


def test_a_database_in_use_is_left_alone(server):
    ran = run("check", "--db", str(server.database), MONITOR_SERVER="http://127.0.0.1:9")
    assert_one_line(ran, 1, str(server.database))


# Help, and what it costs -------------------------------------------------------------------------------


def every_command(command: click.Command, words: tuple[str, ...] = ()):
    """Yield (words, command) for a command and all below it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from every_command(below, (*words, name))


COMMANDS = dict(every_command(monitor.cli))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_every_command_says_what_it_does_and_fits(words):
    shown = CliRunner().invoke(monitor.cli, [*words, "--help"], prog_name="monitor", env={"COLUMNS": "80"})
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert COMMANDS[words].help and COMMANDS[words].get_short_help_str(80).endswith(".")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_and_argument_says_what_it_is(words):
    for parameter in COMMANDS[words].params:
        if isinstance(parameter, click.Option):
            assert (parameter.help or "").endswith((".", "]", ".)")), parameter.opts
        else:
            assert (parameter.metavar or parameter.name).upper() in COMMANDS[words].help or len(words) == 2


HELPS = (("--help",), ("task", "update", "--help"), ("serve", "--help"))
ASKS = (("workstream", "list"), ("task", "update", NOBODY))
LOADED = """
import sys, monitor
sys.argv[0] = "monitor"
try:
    monitor.main()
finally:
    heavy = ("flask.app", "gevent", "werkzeug", "jinja2", "requests", "urllib3", "http.client")
    print(*[name for name in heavy if name in sys.modules], file=sys.stderr)
"""


@pytest.fixture(scope="module")
def loaded(server, pool):
    """What a command has imported when it ends, by the command."""

    def imports(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-c", LOADED, *arguments]
        environment = clean_environment(MONITOR_SERVER=server.url)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30)
        return done.stdout, done.stderr

    return {words: pool.submit(imports, *words) for words in (*HELPS, *ASKS)}


def test_a_client_command_imports_no_web_stack(loaded):
    for words in ASKS:
        assert set(loaded[words].result()[1].splitlines()[-1].split()) <= {
            "requests",
            "urllib3",
            "http.client",
        }


def test_help_imports_neither_the_web_stack_nor_requests(loaded):
    for words in HELPS:
        out, imported = loaded[words].result()
        assert out and imported.strip() == ""


def test_the_version_is_the_modules():
    assert run("--version") == Ran(0, f"monitor {monitor.__version__}\n", "")


def test_without_a_command_it_shows_the_help():
    ran = run()
    assert ran.status in (0, 2)
    assert "serve" in ran.out + ran.error and "Traceback" not in ran.error


# The server's start and end ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def not_started(server, pool, tmp_path_factory):
    """Servers that must refuse to start, each in an empty folder: how they ended, what they left behind."""
    text = tmp_path_factory.mktemp("text") / "notes.txt"
    text.write_text("dear diary, " * 100)
    free = ("--bind", "127.0.0.1:0")
    cases = {
        "an unknown auth mode": (free, {"MONITOR_AUTH_MODE": "stritc"}, "MONITOR_AUTH_MODE"),
        "a busy port": (("--bind", f"127.0.0.1:{server.port}"), {}, str(server.port)),
        "a database in use": ((*free, "--db", str(server.database)), {}, str(server.database)),
        "a bind without port": (("--bind", "localhost"), {}, "127.0.0.1:3000"),
        "a port beyond all": (("--bind", "127.0.0.1:65536"), {}, "127.0.0.1:3000"),
        "a foreign address": (("--bind", "192.0.2.1:3000"), {}, "192.0.2.1"),
        "a database in no folder": ((*free, "--db", "no/such/folder/m.db"), {}, "no/such/folder/m.db"),
        "a database that is a folder": ((*free, "--db", str(text.parent)), {}, str(text.parent)),
        "a database that is none": ((*free, "--db", str(text)), {}, str(text)),
        "a database without a name": ((*free, "--db", "sqlite:"), {}, "MONITOR_DB"),
    }
    folders = {name: tmp_path_factory.mktemp("empty") for name in cases}

    def start(name: str) -> Ran:
        options, settings, _ = cases[name]
        return run("serve", *options, folder=folders[name], **settings)

    return {name: (pool.submit(start, name), case[2], folders[name]) for name, case in cases.items()}


REFUSALS = (
    *("an unknown auth mode", "a busy port", "a database in use", "a bind without port", "a port beyond all"),
    *("a foreign address", "a database in no folder", "a database that is a folder"),
    *("a database that is none", "a database without a name"),
)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_that_cannot_work_refuses_to_start_in_a_sentence(not_started, name):
    ran, word, folder = not_started[name]
    assert_one_line(ran.result(), 1, word)
    assert list(folder.iterdir()) == []


def test_starting_says_address_database_auth_mode_and_what_to_type_next(server):
    wait_until(lambda: "next" in server.output)
    assert server.output.startswith(f"Monitor {monitor.__version__} at {server.url}\n")
    assert str(server.database) in server.output
    assert "relaxed" in server.output
    assert "workstream create" in server.output


def test_what_it_says_to_type_next_can_be_typed(server):
    wait_until(lambda: "next" in server.output)
    typed = next(line for line in server.output.splitlines() if "next" in line).rpartition("type: ")[2]
    typed = typed.replace("python3 ", f"{sys.executable} ", 1) if typed.startswith("python3 ") else typed
    done = subprocess.run(
        typed, shell=True, env=clean_environment(), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, json.loads(done.stdout or "{}").get("name")) == (0, "My project"), done.stderr


def test_a_server_says_who_may_do_what(guarded):
    wait_until(lambda: "server" in guarded.output)
    assert "strict" in guarded.output


@pytest.mark.parametrize(
    ("number", "settings"),
    [(signal.SIGINT, {}), (signal.SIGTERM, {}), (signal.SIGTERM, {"MONITOR_THREADS": "1"})],
    ids=["SIGINT", "SIGTERM", "SIGTERM-threads"],
)
def test_a_signal_ends_the_server_cleanly_and_at_once(fresh, number, settings):
    running = fresh(**settings)
    with running.follow() as reader:
        reader.take(1, "hello")
        before = time.monotonic()
        assert running.stop(number) == 0
        assert time.monotonic() - before < 2
        with contextlib.suppress(StopIteration):
            next(iter(reader))
    assert "Traceback" not in running.output


def test_a_server_can_be_quiet(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        bind = ("--bind", f"127.0.0.1:{port}", "--db", str(tmp_path / "monitor.db"))
        assert run("serve", *bind, "--quiet") == Ran(1, "", "")
    process = subprocess.Popen(
        [*PROGRAM, "serve", *bind, "--silent"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean_environment(),
    )
    with requests.Session() as session:
        session.trust_env = False
        wait_until(lambda: session.get(f"http://127.0.0.1:{port}/health", timeout=5).ok)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == b""
    assert process.returncode == 0


@pytest.mark.parametrize("group", ["", "task", "hooks"])
def test_a_group_alone_shows_its_help(group):
    told = rig.at_rest(*group.split())
    assert told.status == 2 and "\nCommands:\n" in told.error and told.out == ""


# Standard files, and words that are not ours -----------------------------------------------------------


def script(words: str, redirected: str, **settings: str) -> Ran:
    """What the installed console script does in a shell, where output is buffered."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; import monitor; sys.exit(monitor.main())"
    environment = clean_environment(**settings)
    environment.pop("PYTHONUNBUFFERED")
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {words} {redirected}', sys.executable, code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("words", ["skill", "hooks install claude --print", "prime", "completion bash"])
def test_quiet_succeeds_also_as_the_console_script(words):
    assert script(f"{words} --quiet", "", MONITOR_SERVER="http://127.0.0.1:9") == Ran(0, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("words", ["config", "skill", "--help", "--version"])
def test_a_full_output_is_told_in_one_line_also_where_it_is_buffered(words):
    assert_one_line(script(words, ">/dev/full"), 1, "cannot write")


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_files_are_no_fault(closed):
    assert script("config", closed) == Ran(0, "", "")


def test_quiet_behind_two_dashes_is_meant_for_another_program():
    ran = run("run", "--new", "x", "--", "echo", "--quiet", MONITOR_SERVER="http://127.0.0.1:9")
    assert (ran.status, ran.out) == (0, "--quiet\n")
    assert "http://127.0.0.1:9" in ran.error


@pytest.fixture(scope="module")
def distrusted(tmp_path_factory):
    """The address of a server whose certificate nobody has signed."""
    folder = tmp_path_factory.mktemp("certificate")
    words = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out cert -days 2 -subj /CN=localhost"
    try:
        subprocess.run(words.split(), cwd=folder, check=True, capture_output=True)
    except OSError:
        pytest.skip("there is no openssl")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert", folder / "key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Stub) as server:
        server.handle_error = lambda *_: None
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("words", [("task", "list"), ("watch",), ("check",)], ids=" ".join)
def test_a_certificate_that_is_not_trusted_is_told(call, distrusted, words):
    assert_one_line(call(*words, MONITOR_SERVER=distrusted), 5, "certificate", "SSL_CERT_FILE")
