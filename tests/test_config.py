"""Where the client's settings come from, which task is meant, and where a token goes and where not."""

from __future__ import annotations

import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import rig
from test_cli import assert_one_line, run

EVIL = "https://evil.example"


class Listening(BaseHTTPRequestHandler):
    """Answers as a server without tasks, and keeps the tokens that it was sent."""

    def do_GET(self) -> None:
        self.server.sent.append(self.headers.get("Authorization"))
        body = b'{"items": [], "total": 0}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Nothing to say."""


@pytest.fixture(scope="module")
def other():
    """A server on this machine that is not the user's."""
    running = ThreadingHTTPServer(("127.0.0.1", 0), Listening)
    running.sent, running.url = [], f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


class Place:
    """A user with settings, in a project with settings; commands run there."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.user = folder / "project" / "deep", folder / "config" / "monitor" / "config.toml"
        self.folder.mkdir(parents=True)
        self.user.parent.mkdir(parents=True)
        monkeypatch.chdir(self.folder)
        self.base = {"XDG_CONFIG_HOME": str(folder / "config"), "XDG_STATE_HOME": str(folder / "state")}
        for name in ("CLAUDE_CODE_SESSION_ID", "CODEX_THREAD_ID"):
            monkeypatch.delenv(name, raising=False)

    def project(self, text: str) -> None:
        """The project's file, two folders up."""
        (self.folder.parent / ".monitor.toml").write_text(text)

    def run(self, *words: str, **settings: str) -> rig.Ran:
        """Run a command there."""
        return rig.command(*words, **self.base, **settings)

    def config(self, *words: str, **settings: str) -> dict[str, tuple]:
        """What `monitor config` says: (value, from) by name."""
        ran = self.run("config", *words, **settings)
        assert ran.status == 0, ran
        return {row["name"]: (row["value"], row["from"]) for row in ran.json["items"]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Such a place, without any settings yet."""
    return Place(tmp_path, monkeypatch)


# Which setting counts ----------------------------------------------------------------------------------


def test_an_option_goes_before_a_variable_before_the_project_before_the_user_before_the_default(place):
    project, user = str(place.folder.parent / ".monitor.toml"), str(place.user)
    assert place.config()["server"] == ("http://127.0.0.1:3000", "default")
    place.user.write_text('server = "http://127.0.0.1:1"')
    assert place.config()["server"] == ("http://127.0.0.1:1", user)
    place.project('server = "http://127.0.0.1:2"')
    assert place.config()["server"] == ("http://127.0.0.1:2", project)
    settings = {"MONITOR_SERVER": "http://127.0.0.1:3"}
    assert place.config(**settings)["server"] == ("http://127.0.0.1:3", "environment")
    assert place.config("--server", "http://127.0.0.1:4", **settings)["server"] == (
        "http://127.0.0.1:4",
        "option",
    )


def test_each_setting_can_stand_in_a_file(place):
    place.user.write_text('output = "json"\ncolor = "never"\ntoken = "s3cret"\n')
    place.project('task = 12\nworkstream = "8c1f"\n')
    found = place.config()
    assert (found["output"][0], found["color"][0]) == ("json", "never")
    assert (found["task"][0], found["workstream"][0]) == ("12", "8c1f")


def test_a_token_is_never_shown(place):
    place.user.write_text('token = "s3cret"')
    assert place.config()["token"] == ("********", str(place.user))
    for words in (("config", "--table"), ("config", "--plain"), ("config", "--token", "s3cret")):
        assert "s3cret" not in place.run(*words).out


BAD_FILES = {
    "no TOML": ("user", "server = ", "TOML"),
    "not UTF-8": ("user", b"\xff\xfe".decode("latin-1"), "TOML"),
    "an unknown key": ("user", 'sever = "x"', "sever"),
    "a value of another kind": ("user", "server = [1]", "server"),
    "a word that is none": ("user", 'output = "xml"', "json, plain or table"),
    "a table": ("project", "[task]\nid = 1", "task"),
    "an unknown key of a project": ("project", "tsak = 1", "task, workstream, server"),
    "a token in a project": ("project", 'token = "s3cret"', "config.toml"),
    "a token file in a project": ("project", 'token_file = "/etc/passwd"', "config.toml"),
    "servers in a project": ("project", f'servers = ["{EVIL}"]', "config.toml"),
    "no address": ("project", 'server = "evil"', "http://127.0.0.1:3000"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_makes_no_sense_is_told_in_a_line(place, name):
    whose, text, said = BAD_FILES[name]
    place.user.write_text(text, "latin-1") if whose == "user" else place.project(text)
    ran = place.run("config")
    assert_one_line(ran, 2, said)
    assert "s3cret" not in ran.error


@pytest.mark.parametrize("settings", [{"MONITOR_OUTPUT": "xml"}, {"MONITOR_COLOR": "mauve"}], ids=str)
def test_a_wrong_setting_is_told_before_anything_is_stored(place, server, settings):
    task = server.new_task()
    assert_one_line(
        place.run("log", "x", "--task", task["id"], MONITOR_SERVER=server.url, **settings), 2, " or "
    )
    assert server.get("/api/updates", task_id=task["id"])["total"] == 0


def test_a_file_of_another_user_is_not_followed(place, monkeypatch):
    place.project("task = 12")
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(place.folder).st_uid + 1)
    if os.stat(place.folder).st_uid == 0:
        os.chown(place.folder.parent / ".monitor.toml", 4711, -1)
    assert place.config()["task"] == (None, "nowhere")


def test_a_pipe_in_place_of_a_file_holds_nobody(place):
    os.mkfifo(place.user)
    assert place.config()["server"][1] == "default"


def test_without_files_no_parser_is_loaded(tmp_path):
    code = f"import sys; sys.path[0] = {str(rig.ROOT)!r}; import monitor\ntry: monitor.main()\n"
    code += "finally: sys.stderr.write(str('tomllib' in sys.modules))"
    done = rig.subprocess.run(
        [rig.sys.executable, "-c", code, "config"],
        env=rig.clean_environment(XDG_CONFIG_HOME=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "False")


# Where a token goes ------------------------------------------------------------------------------------

THERE = {"MONITOR_SERVER": "OTHER"}
MINE, MANY = 'token = "t"\nserver = "OTHER"', 'token = "t"\nservers = ["OTHER/"]'
SENT = {  # the user's file, the project's, variables, and the token that the server OTHER gets
    "the user's token to the user's server": (MINE, "", {}, "t"),
    "the user's token to one of the user's servers": (MANY, "", THERE, "t"),
    "the user's token to another server": ('token = "t"', "", THERE, None),
    "the user's token to the project's server": ('token = "t"', 'server = "OTHER"', {}, None),
    "the same where the user has named it": (MANY, 'server = "OTHER"', {}, "t"),
    "a variable's token to a variable's server": ("", "", THERE | {"MONITOR_TOKEN": "t"}, "t"),
    "a variable's token to the project's server": ("", 'server = "OTHER"', {"MONITOR_TOKEN": "t"}, None),
    "a variable's token to the user's server": ('server = "OTHER"', "", {"MONITOR_TOKEN": "t"}, "t"),
    "no token": ("", "", THERE, None),
}


@pytest.mark.parametrize("name", SENT)
def test_a_token_goes_only_to_the_server_that_it_is_for(place, other, name):
    user, project, settings, token = SENT[name]
    place.user.write_text(user.replace("OTHER", other.url))
    place.project(project.replace("OTHER", other.url)) if project else None
    other.sent.clear()
    ran = place.run(
        "task", "list", **{key: text.replace("OTHER", other.url) for key, text in settings.items()}
    )
    assert ran.status == 0, ran
    assert other.sent == [f"Bearer {token}" if token else None]


def test_a_token_on_the_command_line_goes_where_the_command_goes(place, other):
    place.project(f'server = "{other.url}"')
    other.sent.clear()
    assert place.run("task", "list", "--token", "t").status == 0
    assert other.sent == ["Bearer t"]


@pytest.mark.parametrize(
    "server", [EVIL, "http://127.0.0.1@evil.example", "http://127.0.0.1.evil.example:80"]
)
def test_a_project_names_no_server_elsewhere_that_the_user_has_not(place, server):
    place.project(f'server = "{server}"')
    for words in (
        ("task", "list"),
        ("log", "secret plans", "--task", "1"),
        ("hooks", "install", "claude", "--project"),
    ):
        assert_one_line(place.run(*words, HOME=str(place.folder)), 2, server, "servers", "config.toml")
    place.user.write_text(f'servers = ["{server}"]')
    assert place.config()["server"][0] == server


def test_a_projects_server_gets_into_nobodys_own_hooks(place):
    place.project('server = "http://127.0.0.1:4711"')
    for options, there in (((), False), (("--project",), True)):
        ran = place.run("hooks", "install", "claude", "--print", *options, HOME=str(place.folder))
        assert ran.status == 0 and ("4711" in ran.out) is there


TOKEN_FILES = {
    "in a variable": ("", {"MONITOR_TOKEN_FILE": "secrets/token"}),
    "in the user's file, beside it": ('token_file = "token"', {}),
}


@pytest.mark.parametrize("name", TOKEN_FILES)
def test_a_token_may_come_from_a_file(place, other, name):
    user, settings = TOKEN_FILES[name]
    place.user.write_text(f'server = "{other.url}"\n{user}')
    (place.folder / "secrets").mkdir()
    for path in (place.folder / "secrets" / "token", place.user.parent / "token"):
        path.write_text("from-file\n")
    other.sent.clear()
    assert place.run("task", "list", **settings).status == 0
    assert other.sent == ["Bearer from-file"]


def test_a_token_file_that_cannot_be_read_is_told_and_none_of_it_shown(place):
    assert_one_line(place.run("task", "list", MONITOR_TOKEN_FILE="/no/such/file"), 2, "/no/such/file")
    (place.folder / "token").write_bytes(b"s3cret \xff")
    ran = place.run("task", "list", "--token-file", "token")
    assert_one_line(ran, 2, "token")
    assert "s3cret" not in ran.error


# Which task is meant -----------------------------------------------------------------------------------


def test_the_last_task_is_the_one_that_was_touched_from_here(place, server):
    here = {"MONITOR_SERVER": server.url}
    first, second = server.new_task(), server.new_task()
    assert_one_line(place.run("task", "show", "@last", **here), 3, "monitor task list")
    made = place.run("task", "create", "x", "--workstream", first["workstream_id"], **here).json
    assert place.run("task", "show", "@last", **here).json["id"] == made["id"]
    place.run("update", "manual", "--task", f"#{second['number']}", "--message", "m", **here)
    assert place.run("task", "update", "@last", "--summary", "s", **here).json["id"] == second["id"]
    place.run("task", "list", **here)
    place.run("task", "show", first["id"], **here)
    assert place.run("log", "x", "--task", "@last", **here).json["task_id"] == second["id"]
    assert_one_line(place.run("task", "show", "@last", MONITOR_SERVER="http://127.0.0.1:9"), 3)


def test_what_an_agent_does_is_not_the_persons_last(place, server):
    here = {"MONITOR_SERVER": server.url}
    first, second = server.new_task(), server.new_task()
    place.run("log", "x", "--task", first["id"], **here)
    place.run("log", "x", "--task", second["id"], CLAUDE_CODE_SESSION_ID="s", **here)
    assert place.run("task", "show", "@last", **here).json["id"] == first["id"]


def test_a_state_folder_that_cannot_be_written_stops_nothing(place, server):
    (place.folder.parent.parent / "state").write_text("in the way")
    task = server.new_task()
    assert place.run("log", "x", "--task", task["id"], MONITOR_SERVER=server.url).status == 0
    assert place.run("task", "show", "@last", MONITOR_SERVER=server.url).status == 3


def test_the_current_task(place, server):
    """An option, then MONITOR_TASK_ID, then the agent's run, then the project."""
    here, tasks = {"MONITOR_SERVER": server.url}, [server.new_task() for _ in range(4)]
    event = {"session_id": "run-7", "cwd": "/nowhere", "hook_event_name": "SessionStart", "source": "startup"}
    for agent in ("claude", "codex"):
        server.ask("POST", f"/api/hooks/{agent}?task_id={tasks[2]['id']}", event)
    assert_one_line(place.run("log", "x", **here), 2, "--task", "MONITOR_TASK_ID", ".monitor.toml")
    place.project(f"task = {tasks[3]['number']}")
    runs = {"CODEX_THREAD_ID": "run-7"}
    named = {"MONITOR_TASK_ID": tasks[1]["id"]}

    def spoken_on(*words: str, **settings: str) -> str:
        return place.run("log", "x", *words, **here, **settings).json["task_id"]

    assert spoken_on() == tasks[3]["id"]
    assert spoken_on(**runs) == tasks[2]["id"]
    assert spoken_on(CLAUDE_CODE_SESSION_ID="run-7") == tasks[2]["id"]
    assert spoken_on(**runs, **named) == tasks[1]["id"]
    assert spoken_on("--task", str(tasks[0]["number"]), **runs, **named) == tasks[0]["id"]
    assert place.run("task", "show", **here).json["id"] == tasks[3]["id"]


def test_the_workstream_of_a_project_takes_its_tasks(place, server):
    workstream = server.post("/api/workstreams", name="w")["id"]
    place.project(f'workstream = "{workstream[:13]}"')
    assert place.run("task", "create", "x", MONITOR_SERVER=server.url).json["workstream_id"] == workstream


def test_settings_of_a_real_process(tmp_path, server):
    (tmp_path / ".monitor.toml").write_text(f'server = "{server.url}"\n')
    ran = run("config", folder=tmp_path)
    assert (json.loads(ran.out)["items"][0]["value"], ran.error) == (server.url, "")
    assert re.search(r"server +http", rig.in_terminal("config", folder=tmp_path).out)


@pytest.mark.parametrize("text", ["server = ", "sever = 1"])
def test_a_file_that_makes_no_sense_loses_no_event_of_an_agent(place, fresh, text):
    place.user.write_text(text)
    server = fresh()
    event = json.dumps({"session_id": "s", "cwd": "/nowhere", "hook_event_name": "SessionStart"})
    done = rig.subprocess.run(
        [rig.sys.executable, rig.ROOT / "monitor.py", "hook", "claude"],
        env=rig.clean_environment(**place.base, MONITOR_SERVER=server.url),
        input=event,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert server.get("/api/updates")["items"][0]["source"] == "claude:s"
