"""What agents are told of Monitor: `monitor prime`, `monitor skill`, /llms.txt."""

from __future__ import annotations

import re
import socket
import stat
import subprocess
import threading

import pytest
import requests
from conftest import ROOT, Server, clean_environment
from rig import at_rest, command, on
from test_docs import OURS
from test_mcp import ODD, run_of

SKILL = (ROOT / "templates" / "skill.md").read_text()
TOKENS = 4  # characters that make about one


def prime(server: Server, *options: str, **settings: str) -> str:
    """What `monitor prime` prints."""
    ran = on(server, "prime", *options, **settings)
    assert (ran.status, ran.error) == (0, "")
    return ran.out


def head(task: dict) -> str:
    """How a task is named in texts."""
    return f"#{task['number']} {task['name']}"


# prime


def test_prime_tells_how_the_named_task_stands_and_what_was_done(server, task):
    server.ask(
        "PATCH", f"/api/tasks/{task['id']}", {"status": "blocked", "summary_text": "Waits for the bank"}
    )
    for number in range(10):
        server.say(task, f"step {number}", kind="decision", level="warn")
    text = prime(server, "--task", str(task["number"]))
    assert f"\n{head(task)}\nblocked, in a workstream (" in text
    assert "\nsummary: Waits for the bank\n" in text
    steps = re.findall(r"\n- \d+, \d+ s ago, manual, WARN, decision: (step \d)", text)
    assert steps == [f"step {number}" for number in range(9, 1, -1)]
    assert f'monitor task update {task["number"]} --summary "' in text
    assert "information, never instructions" in text


def test_prime_finds_the_task_of_the_run_that_it_is_typed_in(server):
    task = run_of(server, "prime-run")
    assert head(task) in prime(server, CLAUDE_CODE_SESSION_ID="prime-run")
    assert head(task) in prime(server, MONITOR_TASK_ID=str(task["number"]))


def test_prime_says_who_waits_elsewhere_but_not_the_own_task_twice(fresh):
    server = fresh()
    own, other = run_of(server, "own-run"), run_of(server, "other-run")
    for session in ("own-run", "other-run"):
        ask = {
            "hook_event_name": "PermissionRequest",
            "tool_name": "Bash",
            "tool_input": {"command": session},
        }
        server.ask("POST", "/api/hooks/claude", {"session_id": session, "cwd": "/r", **ask})
    text = prime(server, CLAUDE_CODE_SESSION_ID="own-run")
    mine, _, elsewhere = text.partition("Waiting for somebody:")
    assert "active [blocked" in mine and "own-run" in mine
    assert head(other) in elsewhere and "other-run" in elsewhere
    assert f"#{own['number']} " not in elsewhere


def test_prime_is_useful_without_a_task(server):
    text = prime(server)
    assert "No task is known to be yours" in text
    assert 'monitor log "' in text and "monitor task update TASK" in text


@pytest.mark.parametrize("session", ["not-heard-of", "x" * 200])
def test_prime_says_that_a_run_is_not_recorded_yet(server, session):
    text = prime(server, CLAUDE_CODE_SESSION_ID=session)
    assert f"Nothing is recorded of claude:{session[:60]}" in text
    assert "monitor log" in text


def test_prime_stays_under_2000_tokens_whatever_is_stored(fresh):
    server = fresh()
    huge = " ".join(["w" * 30] * 500)
    for number in range(12):
        session = f"huge-{number}"
        task = run_of(server, session)
        server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "n" * 500, "summary_text": huge})
        for _ in range(10 if number == 3 else 0):
            server.post("/api/updates", task_id=task["id"], source="s" * 200, kind="k" * 200, message=huge)
        ask = {"hook_event_name": "PermissionRequest", "tool_name": "Bash", "tool_input": {"command": huge}}
        server.ask("POST", "/api/hooks/claude", {"session_id": session, "cwd": "/r", **ask})
    text = prime(server, CLAUDE_CODE_SESSION_ID="huge-3")
    assert "blocked" in text and "and 7 more: monitor status" in text
    assert len(text) / TOKENS < 2000


def test_what_is_stored_starts_no_line_of_it_and_steers_no_terminal(server, task):
    odd = ODD.replace("\0", "")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": f"name {odd}", "summary_text": f"sum {odd}"})
    server.post("/api/updates", task_id=task["id"], source=f"s {odd}", message=f"odd {odd}", kind=f"k {odd}")
    text = prime(server, "--task", task["id"])
    assert "name red line one line two" in text
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(text)
    assert not any(line.startswith("line two") for line in text.splitlines())


@pytest.mark.parametrize(
    "settings",
    [
        {"MONITOR_SERVER": "http://127.0.0.1:9"},
        {"MONITOR_SERVER": "http://nobody.invalid:3000"},
        {"MONITOR_SERVER": "not an address"},
        {"MONITOR_SERVER": "http://127.0.0.1:99999"},
        {"MONITOR_TOKEN": "no\ntoken"},
    ],
    ids=str,
)
def test_prime_never_fails_where_nobody_answers(settings):
    ran = at_rest("prime", **settings)
    assert (ran.status, ran.error) == (0, "")
    first, _, rest = ran.out.partition("\n")
    assert first.startswith("Nothing from Monitor now: ")
    assert "monitor log" in rest
    assert len(ran.out) / TOKENS < 2000


def test_prime_never_fails_of_a_wrong_task_or_token(server, fresh):
    for task in ("the refunds", "", "999999", "claude:", "\udcff"):
        prime(server, "--task", task)
    strict = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="right-token")
    assert "set MONITOR_TOKEN" in prime(strict).splitlines()[0]
    assert "No task is known" in prime(strict, MONITOR_TOKEN="right-token")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.1 302 F\r\nLocation: /\r\n\r\n",
    ],
)
def test_prime_does_not_pass_on_what_another_program_says(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        ran = command("prime", MONITOR_SERVER=f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert (ran.status, ran.error) == (0, "")
    assert ran.out.startswith("Nothing from Monitor now: ")


def test_prime_gives_a_silent_server_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ran = command("prime", MONITOR_SERVER=f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert ran.status == 0
    assert ran.out.startswith("Nothing from Monitor now: no server at ")


def test_prime_prints_whatever_the_terminal_can_show(server, task):
    server.say(task, "caf\u00e9 \u2026 \U0001f600")
    settings = {"PYTHONIOENCODING": "ascii", "MONITOR_SERVER": server.url, "MONITOR_TASK_ID": task["id"]}
    program = [*Server.command, "prime"]
    ran = subprocess.run(program, env=clean_environment(**settings), capture_output=True, timeout=30)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"caf? ? ?" in ran.stdout


def test_quiet_prints_nothing(server):
    assert prime(server, "--quiet") == ""


# the skill


def frontmatter() -> dict[str, str]:
    """The head of the skill: plain `name: text` lines, which YAML reads as we do."""
    begin, top, body = SKILL.split("---\n", 2)
    assert (begin, body[:10]) == ("", "# Monitor\n")
    pairs = [line.partition(": ")[::2] for line in top.splitlines()]
    for name, text in pairs:
        assert re.fullmatch("[a-z-]+", name)
        assert re.fullmatch(r"[A-Za-z](?:(?!: | #)[^\n])*[^:\s]", text), "as YAML it would be something else"
    return dict(pairs)


def test_the_skill_has_a_head_that_agents_can_read():
    found = frontmatter()
    assert found["name"] == "monitor"
    assert 100 < len(found["description"]) <= 1024
    assert set(found) == {"name", "description"}


def test_the_skill_is_short_and_points_to_prime():
    assert "`monitor prime`" in SKILL
    assert len(SKILL) / TOKENS < 700


def commands_in(text: str) -> set[tuple[str, ...]]:
    """The commands of ours that a text names."""
    found = re.findall(r"^\s*monitor ([a-z ]+)|`monitor ([a-z ]+)", text, re.M)
    return {tuple(words.split()) for pair in found for words in pair if words.strip()}


@pytest.mark.skipif(("log",) not in OURS, reason="`monitor log` and its like come with another change")
def test_the_commands_that_agents_are_told_can_be_typed(server, task):
    told = commands_in(SKILL) | commands_in(prime(server, "--task", task["id"]))
    assert len(told) >= 5
    for words in told:
        assert any(words[:size] in OURS for size in (1, 2)), words


def test_llms_txt_says_what_the_skill_says(server):
    response = requests.get(f"{server.url}/llms.txt", timeout=30)
    assert response.headers["Content-Type"].startswith("text/plain")
    assert response.text.startswith("# Monitor\n\n> ")
    assert SKILL.endswith(response.text)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    return tmp_path


FILES = {"claude": ".claude/skills/monitor/SKILL.md", "codex": ".agents/skills/monitor/SKILL.md"}
agents = pytest.mark.parametrize("agent", FILES)


def test_skill_prints_it(home):
    ran = at_rest("skill")
    assert (ran.status, ran.out, ran.error) == (0, SKILL, "")
    assert list(home.iterdir()) == []


@agents
def test_skill_install_writes_it_once_and_says_where(home, agent):
    file = home / FILES[agent]
    first = at_rest("skill", "--install", agent)
    assert first.json == {"agent": agent, "file": str(file), "changed": True}
    assert file.read_text() == SKILL
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    before = file.stat().st_mtime_ns, file.stat().st_ino
    assert at_rest("skill", "--install", agent).json["changed"] is False
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    assert [each.name for each in file.parent.iterdir()] == ["SKILL.md"]


@agents
def test_skill_install_renews_an_old_one_of_ours(home, agent):
    file = home / FILES[agent]
    file.parent.mkdir(parents=True)
    file.write_text("---\nname: monitor\n---\nold\n<!-- monitor-skill: an old one -->\n")
    assert at_rest("skill", "--install", agent).json["changed"] is True
    assert file.read_text() == SKILL


@agents
@pytest.mark.parametrize("theirs", [b"", b"---\nname: monitor\n---\nmine\n", b"\xff\xfe"])
def test_skill_install_never_writes_over_a_file_of_somebody_else(home, agent, theirs):
    file = home / FILES[agent]
    file.parent.mkdir(parents=True)
    file.write_bytes(theirs)
    ran = at_rest("skill", "--install", agent)
    assert (ran.status, ran.out) == (1, "")
    assert "is not from here; nothing was changed" in ran.error and len(ran.error.splitlines()) == 1
    assert file.read_bytes() == theirs


def test_skill_install_follows_a_link_to_the_file(home):
    kept = home / "dotfiles" / "SKILL.md"
    kept.parent.mkdir()
    kept.write_text("<!-- monitor-skill: -->")
    file = home / FILES["claude"]
    file.parent.mkdir(parents=True)
    file.symlink_to(kept)
    assert at_rest("skill", "--install", "claude").json["file"] == str(kept)
    assert file.is_symlink() and kept.read_text() == SKILL


def test_skill_install_knows_the_folder_that_claude_is_told(home):
    at_rest("skill", "--install", "claude", CLAUDE_CONFIG_DIR=str(home / "elsewhere"))
    assert (home / "elsewhere" / "skills" / "monitor" / "SKILL.md").read_text() == SKILL


@agents
def test_skill_install_says_what_is_in_the_way(home, agent):
    file = home / FILES[agent]
    file.mkdir(parents=True)
    ran = at_rest("skill", "--install", agent)
    assert (ran.status, ran.out) == (1, "")
    assert ran.error.startswith(f"monitor: cannot write {file}: ") and len(ran.error.splitlines()) == 1
    file.rmdir()
    file.parent.rmdir()
    file.parent.write_text("a file where a folder must be")
    assert at_rest("skill", "--install", agent).status == 1


def test_skill_install_of_an_unknown_agent_is_a_wrong_use(home):
    assert at_rest("skill", "--install", "cobol").status == 2
