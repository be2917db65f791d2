"""`monitor log`, `status`, `search` and `open`: what a person and an agent do all day."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import time

import pytest
import rig
from conftest import clean_environment, wait_until
from test_cli import PROGRAM, assert_one_line, run
from test_wait import blocked, change

OFF = "http://127.0.0.1:9"


def piped(server, text: bytes, *words: str) -> rig.Ran:
    """Run `monitor WORDS` with something on its standard input."""
    command, environment = [*PROGRAM, *words], clean_environment(MONITOR_SERVER=server.url)
    done = subprocess.run(command, input=text, env=environment, capture_output=True, timeout=60)
    return rig.Ran(done.returncode, done.stdout.decode(), done.stderr.decode())


# log ---------------------------------------------------------------------------------------------------


def test_a_message_goes_to_the_current_task(server, task):
    ran = run(
        *("log", "all green", "--level", "warn", "--kind", "decision", "--tags", "a,b", "--data", '{"n": 1}'),
        MONITOR_SERVER=server.url,
        MONITOR_TASK_ID=str(task["number"]),
    )
    update = server.get(f"/api/updates/{ran.json['seq']}")
    assert ran.json == update and (update["task_id"], update["source"]) == (task["id"], "manual")
    assert (update["message"], update["level"], update["kind"]) == ("all green", "warn", "decision")
    assert (update["tags"], update["data"]) == (["a", "b"], {"n": 1})


@pytest.mark.parametrize("words", [("log",), ("log", "-")], ids=" ".join)
def test_a_message_may_come_from_standard_input(server, task, words):
    ran = piped(server, b"two\nlines \xff\n", *words, "--task", task["id"])
    assert (ran.status, ran.json["message"]) == (0, "two\nlines \ufffd")


def test_on_a_terminal_what_was_said_is_a_line(server, task):
    there = rig.in_terminal("log", "hello", "--task", task["id"], MONITOR_SERVER=server.url)
    assert there.out.count("\n") == 1 and f"#{task['number']}" in there.out and "hello" in there.out


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"a\0b", b"x" * 70_000], ids=["nothing", "a line end", "NUL", "much"]
)
def test_what_cannot_be_said_is_told_in_a_line(server, task, text):
    assert_one_line(piped(server, text, "log", "-", "--task", task["id"]), 1, "must")


def test_without_a_message_a_person_is_asked_for_one(server, task):
    there = rig.in_terminal("log", "--task", task["id"], MONITOR_SERVER=server.url)
    assert (there.status, "monitor log MESSAGE" in there.out) == (2, True)


# status ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A server where one task waits, one is active, one blocked, one done and one hidden."""
    with rig.serving(rig.Server, tmp_path_factory.mktemp("busy") / "monitor.db") as running:
        assert run("status", "--short", MONITOR_SERVER=running.url) == rig.Ran(0, "", "")
        names = ("active", "stalled", "waits", "done", "hidden")
        running.tasks = {name: running.new_task(name) for name in names}
        blocked(running, running.tasks["waits"])
        change(running, running.tasks["stalled"], status="blocked")
        change(running, running.tasks["done"], status="done")
        change(running, running.tasks["hidden"], hidden=True)
        yield running


def test_who_needs_somebody_comes_first(busy):
    ran = run("status", MONITOR_SERVER=busy.url)
    assert [task["name"] for task in ran.json["items"]] == ["waits", "active", "stalled"]
    _, first, second, third = rig.in_terminal("status", MONITOR_SERVER=busy.url).out.splitlines()
    assert "blocked" in first and "may I?" in first and "active" in second and "stalled" in third


@pytest.mark.parametrize("style", ["--json", "--table", "--plain"])
def test_the_short_line_counts(busy, style):
    assert run("status", "--short", style, MONITOR_SERVER=busy.url) == rig.Ran(
        0, "1 waiting · 1 active · 1 blocked\n", ""
    )


def test_the_short_line_is_silent_without_a_server_or_token(fresh):
    assert run("status", "--short", MONITOR_SERVER=OFF) == rig.Ran(5, "", "")
    closed = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="t")
    assert run("status", "--short", MONITOR_SERVER=closed.url) == rig.Ran(4, "", "")
    assert_one_line(run("status", MONITOR_SERVER=OFF), 5, "monitor serve")


# search ------------------------------------------------------------------------------------------------


def test_a_search_finds_all_words_the_newest_first(server, task):
    for message in ("zebra crossing one", "crossing", "two zebra-crossing", "zebra crossing three"):
        server.say(task, message, level="error" if "three" in message else "info")
    found = run("search", "zebra", "crossing", MONITOR_SERVER=server.url).json
    assert [each["message"].split()[-1] for each in found["items"]] == ["three", "zebra-crossing", "one"]
    assert run("search", "zebra crossing", "--level", "error", MONITOR_SERVER=server.url).json["total"] == 1
    assert_one_line(run("search", MONITOR_SERVER=server.url), 2, "WORDS")


# open --------------------------------------------------------------------------------------------------


def browser(folder) -> dict[str, str]:
    """Settings with a browser that writes down what it was asked for."""
    program = folder / "browser"
    program.write_text(f'#!/bin/sh\nenv > {folder}/environment\necho "$@" > {folder}/opened\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"BROWSER": f"{program} %s"}


def opened(folder) -> str:
    """The command line that the browser got."""
    wait_until(lambda: (folder / "opened").exists() and (folder / "opened").read_text())
    return (folder / "opened").read_text().strip()


def test_a_page_is_opened_in_a_browser_and_no_token_on_its_command_line(server, task, tmp_path):
    here = browser(tmp_path) | {"MONITOR_SERVER": server.url}
    assert run("open", f"#{task['number']}", "--token", "s3cret", **here) == rig.Ran(0, "", "")
    assert opened(tmp_path) == f"{server.url}/tasks/{task['id']}"
    assert run("open", **here).status == 0
    wait_until(lambda: opened(tmp_path) == f"{server.url}/dashboard")


def test_without_a_browser_the_address_is_printed(server, task):
    settings = {"MONITOR_SERVER": server.url, "PATH": "/nonexistent", "BROWSER": "", "DISPLAY": ""}
    assert run("open", task["id"], **settings).out == f"{server.url}/tasks/{task['id']}\n"
    assert_one_line(run("open", "999999999", **settings), 3, "999999999")


# Whatever it is that ends a command --------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_flask_tells_a_full_output_without_a_trace(server):
    flask = [rig.sys.executable, "-m", "flask", "--app", "monitor", "task", "list", "--server", server.url]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            flask, cwd=rig.ROOT, stdout=full, stderr=subprocess.PIPE, text=True, env=clean_environment()
        )
    assert done.returncode == 1 and "cannot write" in done.stderr and "Traceback" not in done.stderr


def test_bad_words_of_an_option_are_bad_usage(server):
    assert_one_line(run("task", "list", "--attention", "angry", MONITOR_SERVER=server.url), 2, "blocked")


def test_a_prompt_does_not_wait_for_a_server_that_hangs():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = time.monotonic()
        ran = run("status", "--short", MONITOR_SERVER=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert (ran.status, ran.out, ran.error) == (5, "", "")
        assert time.monotonic() - before < 20
