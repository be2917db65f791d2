"""`monitor hooks install`, `remove` and `check`: what they do to the settings of agents, and what not."""

from __future__ import annotations

import errno
import json
import os
import pty
import select
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment
from test_hook_client import Listener

import monitor

AGENTS = monitor.AGENTS
FILES = {
    "claude": ".claude/settings.json",
    "codex": ".codex/hooks.json",
    "gemini": ".gemini/settings.json",
    "copilot": ".copilot/hooks/monitor.json",
    "cursor": ".cursor/hooks.json",
}
PROJECT_FILES = FILES | {"claude": ".claude/settings.local.json", "copilot": ".github/hooks/monitor.json"}
HARMFUL = {"WorktreeCreate", "MessageDisplay", "FileChanged", "PreCompress", "BeforeModel", "AfterModel"}
HARMFUL |= {"preToolUse", "permissionRequest", "beforeShellExecution", "beforeReadFile"}

HOOKS_TEXT = """    "Stop": [{"hooks": [{"type": "command", "command": "say"}]}],
    "stop": [ {"command": "say done"} ],
    "agentStop": [{"type": "command", "bash": "say"}]
"""
FOREIGN = {
    "empty object": "{}\n",
    "empty file": "",
    "spread empty object": "{\n}",
    "no hooks": '{\n  "model": "opus",\n  "z": [1, 2],\n  "a": {"b": "\\u00fc ü"}\n}\n',
    "one line": '{"model": "opus","permissions":{"allow":["Bash(ls:*)"]}}',
    "tabs": '{\n\t"model": "opus",\n\t"hooks": {\n\t\t"Stop": []\n\t}\n}\n',
    "four blanks, CRLF": '{\r\n    "model": "opus",\r\n    "hooks": {}\r\n}\r\n',
    "foreign hooks": '{\n  "first": [ 1 ],\n  "hooks": {\n' + HOOKS_TEXT + '  },\n  "last" : true\n}\n',
    "byte order mark": '\ufeff{ "model" : "opus" }\n',
    "brackets in strings": '{"a": "}]{[\\"", "hooks": {"X": ["{"]}, "b": "// no comment /* */"}',
}


class Ran(subprocess.CompletedProcess):
    """How a command ended."""

    @property
    def json(self):
        return json.loads(self.stdout)


class Home:
    """A home, a repository in it and a folder of programs; `monitor` is run there within this process."""

    def __init__(self, folder: Path, monkeypatch, capsys):
        self.folder, self.patch, self.capsys = folder, monkeypatch, capsys
        self.programs, self.repository = folder / "bin", folder / "work" / "repo"
        for made in (self.programs, self.repository / ".git", self.repository / "deep"):
            made.mkdir(parents=True)
        for name in [
            name for name in os.environ if name.startswith(("MONITOR_", "CLAUDE", "CODEX", "COPILOT"))
        ]:
            monkeypatch.delenv(name)
        for name, value in (("HOME", folder), ("XDG_STATE_HOME", folder / "state"), ("PATH", self.programs)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MONITOR_SPOOL", str(folder / "spool"))
        monkeypatch.chdir(self.repository / "deep")

    def run(self, *arguments: str) -> Ran:
        self.patch.setattr(sys, "argv", ["monitor", "hooks", *arguments])
        status = 0
        try:
            monitor.main()
        except SystemExit as end:
            status = end.code or 0
        out, error = self.capsys.readouterr()
        return Ran(arguments, status, out, error)

    def ok(self, *arguments: str) -> Ran:
        ran = self.run(*arguments)
        assert ran.returncode == 0, ran
        return ran

    def agent(self, name: str, version: str) -> None:
        """An agent's program that tells its version."""
        program = self.programs / {"cursor": "cursor-agent"}.get(name, name)
        program.write_text(f"#!/bin/sh\necho '{version}'\n")
        program.chmod(0o755)

    def file(self, agent: str) -> Path:
        return self.folder / FILES[agent]

    def write(self, agent: str, text: str) -> Path:
        self.file(agent).parent.mkdir(parents=True, exist_ok=True)
        self.file(agent).write_bytes(text.encode())
        return self.file(agent)

    def snapshot(self) -> dict[str, bytes]:
        """Every file of the home but the programs."""
        found = [
            path for path in self.folder.rglob("*") if path.is_file() and self.programs not in path.parents
        ]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}


@pytest.fixture
def home(tmp_path, monkeypatch, capsys):
    return Home(tmp_path, monkeypatch, capsys)


@pytest.fixture
def listener():
    made = Listener()
    made.status = 400  # what the server says to no event at all
    yield made
    made.close()


def entries_of(path: Path) -> dict[str, list]:
    return json.loads(path.read_bytes().decode("utf-8-sig"))["hooks"]


def ours_in(path: Path) -> list[str]:
    """The events under which a settings file has entries of ours."""
    return list(dict(monitor.our_hooks(path.read_text())))


def command_of(entry: dict) -> str:
    handler = entry.get("hooks", [entry])[0]
    return handler.get("command") or handler["bash"]


@pytest.mark.parametrize("agent", AGENTS)
def test_install_makes_the_file_and_remove_takes_it_away(home, agent):
    told = home.ok("install", agent).json
    assert (told["file"], told["changed"]) == (str(home.file(agent)), True)
    assert ours_in(home.file(agent)) == told["events"]
    assert set(home.snapshot()) == {FILES[agent]}
    assert home.ok("remove", agent).json["changed"] is True
    assert home.snapshot() == {}
    assert home.ok("remove", agent).json["changed"] is False


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_remove_restores_what_was_there_to_the_byte(home, agent, text):
    home.write(agent, text)
    before = home.snapshot()
    home.ok("install", agent)
    assert home.file(agent).read_bytes() != text.encode()
    home.ok("install", agent, "--server", "http://127.0.0.1:4000")
    home.ok("remove", agent)
    assert home.snapshot() == before


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_ours_stays(home, agent, text):
    path = home.write(agent, text)
    home.ok("install", agent)
    old = json.loads(text.removeprefix("\ufeff") or "{}")
    new = json.loads(path.read_bytes().decode("utf-8-sig"))
    assert [name for name in new if name not in ("hooks", "version")] == [
        name for name in old if name != "hooks"
    ]
    assert {name: new[name] for name in old if name != "hooks"} == {
        n: v for n, v in old.items() if n != "hooks"
    }
    for event, entries in old.get("hooks", {}).items():
        assert new["hooks"][event][: len(entries)] == entries
    assert list(new["hooks"])[: len(old.get("hooks", {}))] == list(old.get("hooks", {}))
    assert path.with_name(path.name + ".monitor-backup").read_bytes() == text.encode()
    lines = iter(path.read_bytes().decode().splitlines())
    outside = text.replace(
        HOOKS_TEXT, ""
    )  # the value of "hooks" is written anew: the same data in the same order
    kept = [
        line.rstrip(" ,}]{[")
        for line in outside.splitlines()
        if "hooks" not in line and line.strip(" \t}]{[,")
    ]
    assert all(any(line in other for other in lines) for line in kept), "a foreign line moved or changed"
    assert b"\r\n" not in path.read_bytes().replace(b"\r\n", b"") and (b"\n" in path.read_bytes())


@pytest.mark.parametrize("agent", AGENTS)
def test_a_second_install_changes_nothing(home, agent):
    home.write(agent, FOREIGN["foreign hooks"])
    home.ok("install", agent)
    before, changed = home.snapshot(), home.file(agent).stat().st_mtime_ns
    assert home.ok("install", agent).json["changed"] is False
    assert home.snapshot() == before and home.file(agent).stat().st_mtime_ns == changed


@pytest.mark.parametrize("agent", AGENTS)
def test_older_entries_of_ours_are_replaced(home, agent):
    home.ok("install", agent, "--server", "http://127.0.0.1:4000")
    path = home.file(agent)
    path.write_text(path.read_text().replace("-m 2", "-m 9"))
    home.ok("install", agent)
    text = path.read_text()
    assert "-m 9" not in text and ":4000" not in text
    assert all(len(entries) == 1 for entries in entries_of(path).values())
    home.ok("remove", agent)
    assert "monitor-hook" not in (path.read_text() if path.exists() else "")


def test_a_hook_pasted_by_hand_is_replaced_too(home):
    pasted = {"hooks": {"Stop": [{"hooks": [{"type": "command", "_monitor": True, "command": "curl ..."}]}]}}
    path = home.write("claude", json.dumps(pasted))
    home.ok("install", "claude")
    assert "curl ..." not in path.read_text()
    home.ok("remove", "claude")
    assert json.loads(path.read_text()) == {}


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_remove_leaves_what_was_changed_since(home, agent, text):
    path = home.write(agent, text)
    home.ok("install", agent)
    new = path.read_bytes().decode("utf-8")
    path.write_bytes(new.replace("{", '{"added": 1, ', 1).encode())
    home.ok("remove", agent)
    left, old = json.loads(path.read_bytes().decode("utf-8-sig")), json.loads(text.strip("\ufeff") or "{}")
    assert left.pop("added") == 1
    hooks = {event: entries for event, entries in old.pop("hooks", {}).items() if entries}
    assert {event: entries for event, entries in left.pop("hooks", {}).items() if entries} == hooks
    assert {name: value for name, value in left.items() if name != "version" or name in old} == old
    assert list(home.snapshot()) == [FILES[agent]], "the backup is of no use any more"


def test_a_handler_of_the_user_in_our_group_stays(home):
    home.ok("install", "claude")
    path = home.file("claude")
    settings = json.loads(path.read_text())
    settings["hooks"]["Stop"][0]["hooks"].append({"type": "command", "command": "say done"})
    path.write_text(json.dumps(settings, indent=2))
    home.ok("install", "claude")
    home.ok("remove", "claude")
    assert entries_of(path) == {"Stop": [{"hooks": [{"type": "command", "command": "say done"}]}]}


COMMENTED = """// mine
{
  "model": "pro", // fast
  /* {"hooks": 1} */
  "hooks": {"AfterTool": [{"hooks": []}]} // of hooks
} // end
"""


def test_comments_stay_where_the_agent_allows_them(home):
    """Outside of the value of "hooks": that is written anew."""
    path = home.write("gemini", COMMENTED)
    home.ok("install", "gemini")
    before, behind = COMMENTED.split('{"AfterTool": [{"hooks": []}]}')
    assert path.read_text().startswith(before) and path.read_text().endswith(behind)
    assert json.loads(monitor.without_comments(path.read_text()))["hooks"]["AfterTool"][0] == {"hooks": []}
    path.write_text(path.read_text().replace("fast", "slow"))
    home.ok("remove", "gemini")
    left, hooks = path.read_text(), {"AfterTool": [{"hooks": []}]}
    assert left.startswith(before.replace("fast", "slow")) and left.endswith(behind)
    assert json.loads(monitor.without_comments(left)) == {"model": "pro", "hooks": hooks}


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "pro" /* , */, // fast\n  "a": 1 // last\n} // end\n',
        "{ // none\n}\n",
        '// "hooks": {}\n{"a": {"hooks": {"b": 1}} /* "hooks": */}',
        '{"a": "\\"hooks\\": {}", "b": [{"hooks": 1}], "hooks": {}}',
    ],
)
def test_the_right_hooks_are_found_and_go_again(home, text):
    path = home.write("gemini", text)
    old = json.loads(monitor.without_comments(text))
    home.ok("install", "gemini")
    new = json.loads(monitor.without_comments(path.read_text()))
    assert new["hooks"] and new | {"hooks": 0} == old | {"hooks": 0}
    path.write_text(path.read_text() + "// added\n")
    home.ok("remove", "gemini")
    left = path.read_text()
    old.pop("hooks", None)
    assert json.loads(monitor.without_comments(left)) == old
    words = (
        "/* , */",
        "// fast",
        "// last",
        "// end",
        "// none",
        '// "hooks": {}',
        '/* "hooks": */',
        "// added",
    )
    assert all(left.count(word) == (text + "// added").count(word) for word in words)


def test_foreign_hooks_that_only_json_can_hold_stay(home):
    path = home.write(
        "claude", '{"hooks": {"Stop": [{"command": "\\ud800 ü \\u2028", "n": 1.50, "x": [null]}]}}'
    )
    before = entries_of(path)
    home.ok("install", "claude")
    assert entries_of(path)["Stop"][0] == before["Stop"][0]
    path.write_text(path.read_text() + " ")
    home.ok("remove", "claude")
    assert entries_of(path) == before


def test_ours_that_stand_before_others_stay_in_their_place(home):
    """Where codex knows a hook by its place, its trust would go."""
    home.ok("install", "codex")
    path = home.file("codex")
    settings = json.loads(path.read_text())
    settings["hooks"]["Stop"].append({"hooks": [{"type": "command", "command": "say done"}]})
    path.write_text(json.dumps(settings))
    before = path.read_bytes()
    assert home.ok("install", "codex").json["changed"] is False
    assert path.read_bytes() == before


BROKEN = {
    "no JSON": "{'model': 1}",
    "cut off": '{"hooks": {',
    "trailing comma": '{"a": 1,}',
    "a list": "[]",
    "a string": '"hooks"',
    "hooks is a list": '{"hooks": []}',
    "an event is an object": '{"hooks": {"Stop": {}}}',
    "not UTF-8": "\udcff",
    "very deep": "[" * 100_000,
}


@pytest.mark.parametrize("agent", ("claude", "copilot"))
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_added_to_is_left_alone(home, agent, text):
    home.write(agent, "")
    home.file(agent).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = home.snapshot()
    for command in ("install", "remove"):
        ran = home.run(command, agent)
        assert ran.returncode == 1 and ran.stdout == ""
        assert ran.stderr.count("\n") == 1 and str(home.file(agent)) in ran.stderr, ran.stderr
        assert home.snapshot() == before
    assert home.run("check", agent).returncode == 1


def test_comments_are_refused_where_the_agent_would_not_read_them(home):
    home.write("claude", '{} // "hooks"')
    assert (
        "is not" in home.run("install", "claude").stderr
        or "cannot read" in home.run("install", "claude").stderr
    )


@pytest.mark.parametrize("what", ("file", "folder"))
def test_what_is_read_only_is_left_alone(home, what):
    path = home.write("claude", "{}")
    place = path if what == "file" else path.parent
    mode = place.stat().st_mode
    place.chmod(0o444 if what == "file" else 0o555)
    before = home.snapshot()
    ran = home.run("install", "claude")
    place.chmod(mode)
    assert ran.returncode == 1 and "read-only" in ran.stderr and ran.stderr.count("\n") == 1
    assert home.snapshot() == before


def test_a_folder_in_the_way_is_one_sentence(home):
    home.file("claude").mkdir(parents=True)
    ran = home.run("install", "claude")
    assert ran.returncode == 1 and ran.stderr.count("\n") == 1


def test_a_symlink_stays_and_its_target_keeps_its_mode(home):
    target = home.folder / "dotfiles" / "claude.json"
    target.parent.mkdir()
    target.write_text('{"model": "opus"}')
    target.chmod(0o640)
    home.file("claude").parent.mkdir()
    home.file("claude").symlink_to(target)
    home.ok("install", "claude")
    assert home.file("claude").is_symlink() and ours_in(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert stat.S_IMODE(target.with_name("claude.json.monitor-backup").stat().st_mode) == 0o640
    home.ok("remove", "claude")
    assert home.file("claude").is_symlink() and target.read_text() == '{"model": "opus"}'
    assert sorted(path.name for path in target.parent.iterdir()) == ["claude.json"]


@pytest.mark.parametrize("agent", AGENTS)
def test_a_project_has_a_file_of_its_own(home, agent):
    told = home.ok("install", agent, "--project").json
    path = home.repository / PROJECT_FILES[agent]
    assert told["file"] == str(path) and ours_in(path)
    assert not home.file(agent).exists()
    home.ok("remove", agent, "--project")
    assert not path.exists()


@pytest.mark.parametrize(
    ("agent", "variable", "name"),
    [
        ("claude", "CLAUDE_CONFIG_DIR", "settings.json"),
        ("codex", "CODEX_HOME", "hooks.json"),
        ("copilot", "COPILOT_HOME", "hooks/monitor.json"),
    ],
)
def test_an_agent_that_keeps_its_settings_elsewhere(home, monkeypatch, agent, variable, name):
    monkeypatch.setenv(variable, str(home.folder / "elsewhere"))
    home.ok("install", agent)
    assert set(home.snapshot()) == {f"elsewhere/{name}"}


@pytest.mark.parametrize("agent", AGENTS)
def test_print_and_dry_run_touch_nothing(home, agent):
    home.write(agent, FOREIGN["no hooks"])
    before = home.snapshot()
    block = json.loads(home.ok("install", agent, "--print").stdout)
    lines = home.ok("install", agent, "--dry-run").stdout.splitlines()
    assert home.snapshot() == before
    assert block["hooks"] and lines[0].startswith("--- ") and lines[1].startswith("+++ ")
    home.ok("install", agent)
    assert entries_of(home.file(agent)) == block["hooks"]
    assert home.ok("install", agent, "--dry-run").stdout == ""


@pytest.mark.parametrize("agent", AGENTS)
def test_no_harmful_event_and_every_entry_is_one_that_ends(home, agent):
    home.agent(agent, "999.0.0")
    home.ok("install", agent)
    hooks = entries_of(home.file(agent))
    assert not HARMFUL & set(hooks)
    for entries in hooks.values():
        (entry,) = entries
        command = command_of(entry)
        assert command.startswith("sh -c ': monitor-hook;") and command.endswith("exit 0'")
        assert command.count("'") == 2 and "\n" not in command and "@@" not in command
        handler = entry.get("hooks", [entry])[0]
        assert handler.get("timeout") or handler["timeoutSec"]


@pytest.mark.parametrize(
    ("version", "knows", "does_not"),
    [
        ("2.1.330 (Claude Code)", {"PostModelSwitch", "TaskCreated", "PermissionRequest"}, set()),
        ("2.1.197", {"TaskCreated", "StopFailure"}, {"PostModelSwitch"}),
        ("2.0.9", {"SessionEnd"}, {"PermissionRequest", "SubagentStart"}),
        ("gibberish", {"PermissionRequest", "Stop"}, {"TaskCreated", "PostModelSwitch"}),
    ],
)
def test_only_events_that_the_installed_version_knows(home, version, knows, does_not):
    home.agent("claude", version)
    events = set(home.ok("install", "claude").json["events"])
    assert knows <= events and not does_not & events


def test_http_is_for_those_who_can(home):
    home.agent("claude", "2.1.330")
    home.ok("install", "claude", "--http")
    hooks = entries_of(home.file("claude"))
    assert command_of(hooks["SessionStart"][0]).startswith("sh -c")
    stop = hooks["Stop"][0]["hooks"][0]
    assert (stop["type"], stop["url"]) == ("http", "http://127.0.0.1:3000/api/hooks/claude")
    home.ok("install", "claude")
    assert "http" not in {entry["hooks"][0]["type"] for (entry,) in entries_of(home.file("claude")).values()}
    before = home.snapshot()
    for agent in [*AGENTS][1:]:
        assert "--http" in home.run("install", agent, "--http").stderr
    home.agent("claude", "2.1.62")
    assert "--http" in home.run("install", "claude", "--http").stderr
    assert home.snapshot() == before


@pytest.mark.parametrize(
    "server", ["http://127.0.0.1:3000/'; rm -rf x; '", "http://a$(id)", "http://a}b", 'http://a"b']
)
def test_an_address_that_could_break_out_of_the_hook_is_refused(home, server):
    ran = home.run("install", "claude", "--server", server)
    assert ran.returncode in (1, 2) and home.snapshot() == {}


def test_the_copilot_address_names_the_event(home):
    home.ok("install", "copilot")
    for event, (entry,) in entries_of(home.file("copilot")).items():
        assert f"/api/hooks/copilot?event={event}" in entry["bash"]
    assert json.loads(home.file("copilot").read_text())["version"] == 1


def test_the_questions_of_claude_are_told_and_no_other_tool_waits(home):
    home.ok("install", "claude")
    assert entries_of(home.file("claude"))["PreToolUse"][0]["matcher"] == "AskUserQuestion|ExitPlanMode"


def test_check_says_how_things_are(home, listener):
    server = ("--server", listener.url)
    ran = home.ok("check", *server)
    assert [row["installed"] for row in ran.json["agents"]] == [False] * len(AGENTS)
    home.agent("claude", "2.1.330 (Claude Code)")
    home.ok("install", "claude", *server)
    home.ok("install", "codex", "--project", *server)
    told = home.ok("check").json
    rows = {row["agent"]: row for row in told["agents"] if row["installed"]}
    assert set(rows) == {"claude", "codex"}
    assert rows["claude"]["version"] == "2.1.330" and "PostModelSwitch" in rows["claude"]["events"]
    assert rows["codex"]["file"] == str(home.repository / ".codex" / "hooks.json")
    assert (told["server"], told["server_ok"], told["spooled"]) == (listener.url, True, 0)


def test_check_counts_what_waits_and_says_what_is_wrong(home, listener):
    home.ok("install", "gemini", "--server", listener.url)
    folder = home.folder / "spool" / f"http___127.0.0.1_{listener.url.rpartition(':')[2]}"
    folder.mkdir(parents=True)
    (folder / "a.hook").touch()
    assert home.ok("check", "gemini").json["spooled"] == 1
    listener.status = 401
    assert "token" in home.run("check", "gemini").stderr
    listener.close()
    ran = home.run("check", "gemini")
    assert ran.returncode == 1 and "no server at" in ran.stderr
    path = home.file("gemini")
    path.write_text(path.read_text().replace("-m 2", "-m 9"))
    assert "monitor hooks install gemini" in home.run("check", "gemini").stderr


def test_check_names_a_file_that_it_cannot_read(home, listener):
    path = home.write("claude", "no JSON")
    (row,) = home.run("check", "claude", "--server", listener.url).json["agents"]
    assert (row["installed"], row["file"]) == (False, str(path)) and str(path) in row["problem"]


def test_check_knows_when_the_agent_was_updated(home, listener):
    home.agent("claude", "2.1.100")
    home.ok("install", "claude", "--server", listener.url)
    home.ok("check", "claude")
    home.agent("claude", "2.1.330")
    assert "monitor hooks install claude" in home.run("check", "claude").stderr
    (home.programs / "claude").unlink()
    home.ok("check", "claude")


def ask(arguments: tuple[str, ...], answer: str, **settings: str) -> tuple[int, str]:
    """Run `monitor hooks ARGUMENTS` at a terminal, and answer its question."""
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "monitor.py"), "hooks", *arguments],
        env=clean_environment(**settings),
        stdin=other,
        stdout=other,
        stderr=other,
    )
    os.close(other)
    os.write(main, answer.encode())
    shown = b""
    try:
        while select.select([main], [], [], 20)[0]:
            if not (chunk := os.read(main, 65536)):
                break
            shown += chunk
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    os.close(main)
    return process.wait(20), shown.decode()


def test_at_a_terminal_it_shows_the_difference_and_asks(tmp_path):
    settings = {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state"), "PATH": os.defpath}
    path = tmp_path / FILES["cursor"]
    status, shown = ask(("install", "cursor"), "n\n", **settings)
    assert status == 0 and "+++ " in shown and "Write " in shown and not path.exists()
    status, shown = ask(("install", "cursor"), "y\n", **settings)
    assert status == 0 and ours_in(path)
    path.unlink()
    status, shown = ask(("install", "cursor", "--yes"), "", **settings)
    assert status == 0 and "Write " not in shown and ours_in(path)


def test_the_table_of_agents_is_whole():
    table = monitor.hook_agents()
    assert tuple(table) == tuple(AGENTS)
    for agent, row in table.items():
        assert row["folder"].startswith("~/.") and row["program"]
        for event, (since, *matcher) in row["events"].items():
            assert since == "-" or monitor.version_key(since), (agent, event)
            assert len(matcher) <= 1
