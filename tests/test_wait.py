"""Waiting for a task: the request that is answered when something holds, and `monitor wait`."""

from __future__ import annotations

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import rig
from conftest import ROOT, clean_environment, wait_until
from test_cli import PROGRAM, assert_one_line, run

LONG = 60


def path_of(task: dict, words: str, timeout: int | str | None = None) -> str:
    """The request that waits for a task."""
    return f"/api/tasks/{task['id']}?wait_for={words}" + ("" if timeout is None else f"&timeout={timeout}")


def change(server, task: dict, **fields) -> dict:
    """Change a task."""
    return server.ask("PATCH", f"/api/tasks/{task['id']}", fields).json()


def blocked(server, task: dict) -> None:
    """Let an agent ask for a permission on a task."""
    event = {"session_id": task["id"], "cwd": "/nowhere", "hook_event_name": "Notification"}
    event |= {"notification_type": "permission_prompt", "message": "may I?"}
    assert server.ask("POST", f"/api/hooks/claude?task_id={task['id']}", event).status_code == 204


def streams(server) -> int:
    """How many streams a server has."""
    return server.get("/health", full=1)["streams"]


@pytest.fixture
def waiting(server):
    """Ask in a thread of its own, on a connection of its own; the request is there when this returns."""
    with ThreadPoolExecutor(8) as pool:

        def ask(task: dict, words: str, timeout: int = LONG):
            before = streams(server)
            there = pool.submit(rig.requests.get, server.url + path_of(task, words, timeout), timeout=90)
            wait_until(lambda: streams(server) > before)
            return there

        yield ask


# The request -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["active", "done,active", " active , stuck "])
def test_what_holds_already_is_answered_at_once(server, task, words):
    assert server.get(path_of(task, words, LONG)) == task


@pytest.mark.parametrize(
    ("words", "act"),
    [
        ("done,cancelled", lambda server, task: change(server, task, status="done")),
        ("blocked", lambda server, task: change(server, task, status="blocked")),
        ("blocked,failed", blocked),
    ],
    ids=["a status", "the status blocked", "attention"],
)
def test_a_change_is_answered_when_it_comes(server, task, waiting, words, act):
    asked = waiting(task, words)
    act(server, task)
    found = asked.result(20).json()
    assert found["status"] in words or found["attention"]["state"] in words
    assert found == server.get(f"/api/tasks/{task['id']}")


def test_what_is_not_waited_for_is_not_answered(server, task, waiting):
    asked = waiting(task, "done")
    change(server, task, status="blocked")
    change(server, server.new_task(), status="done")
    server.say(task, "still at it")
    assert not asked.done()
    change(server, task, status="done")
    assert asked.result(20).json()["status"] == "done"


@pytest.mark.parametrize("timeout", [0, -5])
def test_at_the_time_out_the_task_is_answered_as_it_stands(server, task, timeout):
    assert server.get(path_of(task, "done", timeout)) == task


def test_a_time_out_takes_the_time_that_it_says(server, task):
    before = time.monotonic()
    assert server.get(path_of(task, "done", 1)) == task
    assert time.monotonic() - before >= 1


def test_the_time_out_is_clamped():
    field = rig.monitor.FIELDS["timeout"]
    assert [field.check(text, "timeout") for text in ("-1", "61", "9" * 30)] == [0, 60, 60]


@pytest.mark.parametrize(
    "query", ["wait_for=", "wait_for=finished", "wait_for=done,x", "wait_for=done&timeout=soon"]
)
def test_a_wrong_word_or_time_is_refused(server, task, query):
    refused = server.ask("GET", f"/api/tasks/{task['id']}?{query}")
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_input")


def test_a_task_that_is_not_there_is_not_found(server):
    assert server.ask("GET", path_of({"id": "999999999"}, "done", LONG)).status_code == 404


def test_who_waits_counts_as_a_stream_and_leaves(server, task, waiting):
    before = streams(server)
    asked = [waiting(task, "done") for _ in range(3)]
    assert streams(server) == before + 3
    change(server, task, status="done")
    assert {each.result(20).status_code for each in asked} == {200}
    assert streams(server) == before


def test_too_many_are_turned_away(tmp_path):
    with rig.serving(rig.changed("monitor.MAX_STREAMS = 0"), tmp_path / "monitor.db") as server:
        task = server.new_task()
        refused = server.ask("GET", path_of(task, "done", LONG))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "2")
        assert server.get(f"/api/tasks/{task['id']}") == task


@pytest.mark.parametrize("settings", [{}, {"MONITOR_THREADS": "1"}], ids=["gevent", "threads"])
def test_waiting_ends_when_the_server_does(fresh, settings):
    running = fresh(**settings)
    task = running.new_task()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(rig.requests.get, running.url + path_of(task, "done", LONG), timeout=90)
        wait_until(lambda: streams(running) == 1)
        before = time.monotonic()
        assert running.stop() == 0
        assert time.monotonic() - before < 10
        assert asked.result(10).json() == task


COUNTING = """
class Counting(monitor.Broadcaster):
    waits = 0
    def wait(self, *arguments):
        Counting.waits += 1
        return super().wait(*arguments)
monitor.Broadcaster = Counting
health = monitor.Monitor.health
monitor.Monitor.health = lambda self: health(self) | {"waits": Counting.waits}
"""


def test_what_happens_to_other_tasks_wakes_nobody_who_waits_for_this_one(tmp_path):
    with rig.serving(rig.changed(COUNTING), tmp_path / "monitor.db") as server, ThreadPoolExecutor(1) as pool:
        task, other = server.new_task(), server.new_task()
        asked = pool.submit(rig.requests.get, server.url + path_of(task, "done", LONG), timeout=90)
        wait_until(lambda: server.get("/health", full=1)["waits"] == 1)
        for number in range(50):
            server.say(other, str(number))
        assert server.get("/health", full=1)["waits"] <= 3, "but for the beat, each five seconds"
        change(server, task, status="done")
        assert asked.result(20).json()["status"] == "done"


# The command -------------------------------------------------------------------------------------------


def start(server, *words: str) -> subprocess.Popen:
    """`monitor wait` as a process."""
    return subprocess.Popen(
        [*PROGRAM, "wait", *words],
        env=clean_environment(MONITOR_SERVER=server.url),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_the_task_when_it_is_so_far(server, task):
    before = streams(server)
    process = start(server, f"#{task['number']}", "--for", "done,cancelled")
    wait_until(lambda: streams(server) > before)
    done = change(server, task, status="done")
    out, error = process.communicate(timeout=20)
    assert (process.returncode, rig.json.loads(out), error) == (0, done, "")


@pytest.mark.parametrize("seconds", ["0", "1"])
def test_the_command_gives_up_with_a_status_of_its_own(server, task, seconds):
    ran = run("wait", task["id"], "--for", "done", "--timeout", seconds, MONITOR_SERVER=server.url)
    assert_one_line(ran, 8, f"#{task['number']} is active")


def test_the_command_waits_on_through_a_restart(fresh):
    running = fresh()
    task = running.new_task()
    process = start(running, task["id"], "--for", "done")
    wait_until(lambda: streams(running) == 1)
    running.kill()
    running.start()
    wait_until(lambda: streams(running) == 1, 30)
    change(running, task, status="done")
    out, error = process.communicate(timeout=30)
    assert (process.returncode, rig.json.loads(out)["status"], error) == (0, "done", "")


def test_the_command_gives_up_in_time_also_without_a_server(fresh):
    running = fresh()
    task = running.new_task()
    process = start(running, task["id"], "--for", "done", "--timeout", "3")
    wait_until(lambda: streams(running) == 1)
    running.kill()
    out, error = process.communicate(timeout=30)
    assert (process.returncode, out, error.count("\n")) == (8, "", 1)


WRONG = {
    "no such word": (("1", "--for", "finished"), 2, "done"),
    "no words": (("1",), 2, "--for"),
    "a time that is none": (("1", "--for", "done", "--timeout", "soon"), 2, "--timeout"),
    "no such task": (("999999999", "--for", "done"), 3, "999999999"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_waited_for_is_told_in_a_line(server, name):
    words, status, said = WRONG[name]
    assert_one_line(rig.on(server, "wait", *words), status, said)


def test_no_server_is_no_reason_to_wait():
    assert_one_line(rig.at_rest("wait", "1", "--for", "done"), 5, "monitor serve")


def test_ctrl_c_ends_waiting(server, task):
    before = streams(server)
    process = start(server, task["id"], "--for", "done")
    wait_until(lambda: streams(server) > before)
    process.send_signal(signal.SIGINT)
    assert [text.strip() for text in process.communicate(timeout=10)] == ["", ""]
    assert process.returncode == 130
