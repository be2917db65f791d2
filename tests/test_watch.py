"""`monitor watch`: follows the log as a process, through restarts, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from http.server import ThreadingHTTPServer

import pytest
import rig
from conftest import clean_environment, wait_until
from test_cli import PROGRAM, Stub, assert_one_line, run
from test_wait import streams


class Watcher:
    """A `monitor watch` whose lines are read as they come."""

    def __init__(self, server, *words: str, terminal: bool = False, **settings: str):
        ours, theirs = pty.openpty() if terminal else os.pipe()
        self.process = subprocess.Popen(
            [*PROGRAM, "watch", *words],
            env=clean_environment(**({"MONITOR_SERVER": server.url, "TERM": "xterm"} | settings)),
            stdout=theirs,
            stderr=subprocess.PIPE,
        )
        os.close(theirs)
        self.output, self.buffer = ours, b""

    def line(self, seconds: float = 20) -> str:
        """The next line; AssertionError when none comes in time."""
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.output], [], [], max(0, end - time.monotonic()))
            assert ready, "no line came in time"
            part = os.read(self.output, 65536)
            assert part, "the output ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode().rstrip("\r")

    def messages(self, count: int) -> list[str]:
        """The messages of the next updates."""
        return [json.loads(self.line())["message"] for _ in range(count)]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Stop it; its exit status and what it said beside its output."""
        self.process.send_signal(number)
        error = self.process.communicate(timeout=10)[1].decode()
        return self.process.returncode, error


@pytest.fixture
def watch():
    """Start watchers that are gone at the end; each one follows when this returns."""
    started: list[Watcher] = []

    def start(server, *words: str, **settings) -> Watcher:
        before = streams(server)
        started.append(Watcher(server, *words, **settings))
        wait_until(lambda: streams(server) > before, 20)
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.communicate()
        os.close(each.output)


def test_in_a_pipe_each_update_is_a_line_of_json_as_the_api_has_it(server, task, watch):
    watcher = watch(server, "--task", task["id"])
    said = [server.say(task, f"news {number}", tags=["a"]) for number in range(3)]
    assert [json.loads(watcher.line()) for _ in range(3)] == said
    assert watcher.end() == (130, "\n")


def test_with_events_each_event_of_the_log_is_a_line(server, task, watch):
    watcher = watch(server, "--task", task["id"], "--events")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "done"})
    server.say(task, "over")
    events = [json.loads(watcher.line()) for _ in range(3)]
    assert [event["event"] for event in events] == ["hello", "task_updated", "update"]
    assert events[2]["id"] == events[2]["data"]["seq"] > events[1]["id"]


def test_filters_and_where_to_begin(server, watch):
    task = server.new_task()
    first = server.say(task, "one", level="error", tags=["x"])
    for message, level, tag in (("two", "info", "x"), ("three", "error", "y"), ("four", "error", "x")):
        server.say(task, message, level=level, tags=[tag])
    ours = ("--task", task["id"])
    assert watch(server, *ours, "--after", "0").messages(4) == ["one", "two", "three", "four"]
    assert watch(server, *ours, "--after", str(first["seq"]), "--level", "error").messages(2) == [
        "three",
        "four",
    ]
    assert watch(server, *ours, "--tail", "2").messages(2) == ["three", "four"]
    assert watch(server, *ours, "--after", "0", "--tag", "x,z").messages(3) == ["one", "two", "four"]


def test_a_tail_of_nothing_misses_nothing(server, watch):
    task = server.new_task()
    watcher = watch(server, "--task", task["id"], "--tail", "5")
    server.say(task, "the first")
    assert watcher.messages(1) == ["the first"]


def test_a_restart_of_the_server_loses_nothing(fresh, watch):
    running = fresh()
    task = running.new_task()
    watcher = watch(running, "--task", task["id"])
    running.say(task, "before")
    assert watcher.messages(1) == ["before"]
    for turn in range(2):
        running.kill() if turn else running.stop()
        running.start()
        running.say(task, f"after {turn}")
        assert watcher.messages(1) == [f"after {turn}"]
    status, error = watcher.end()
    assert status == 130 and error.count("; trying again\n") == 2 == error.count(" again\n") - 2


def test_another_database_in_its_place_is_told(fresh, watch, tmp_path):
    running = fresh()
    watcher = watch(running)
    running.say(running.new_task(), "before")
    assert watcher.messages(1) == ["before"]
    running.kill()
    running.database = tmp_path / "other.db"
    running.start()
    wait_until(lambda: streams(running) == 1, 20)
    running.say(running.new_task(), "elsewhere")
    assert watcher.messages(1) == ["elsewhere"]
    assert "does not go on from" in watcher.end()[1]


def test_on_a_terminal_an_event_is_a_readable_line(server, task, watch):
    watcher = watch(server, "--task", task["id"], terminal=True)
    server.say(task, "it failed\nbadly \x1b[2J", level="error")
    line = watcher.line()
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d  #{task['number']} *  \x1b\[31merror\x1b\[0m +manual +it failed badly \ufffd\[2J",
        line,
    )


def test_on_a_terminal_other_events_are_readable_too(server, task, watch):
    watcher = watch(server, "--task", task["id"], "--events", "--color", "never", terminal=True)
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "blocked", "name": "Renamed"})
    assert "hello" in watcher.line()
    assert re.search(rf"#{task['number']} +blocked +task_updated +Renamed$", watcher.line())


def test_three_thousand_updates_behind_are_caught_up_with_in_order(tmp_path, watch):
    rig.made_before(tmp_path / "monitor.db", 3000)
    with rig.serving(rig.Server, tmp_path / "monitor.db") as server:
        watcher = watch(server, "--after", "0")
        assert watcher.messages(3000) == [f"old news {number}" for number in range(3000)]


def test_a_reader_that_goes_away_ends_it_quietly(server, task):
    watcher = Watcher(server, "--task", task["id"], "--after", "0")
    server.say(task, "one")
    assert watcher.messages(1) == ["one"]
    os.close(watcher.output)
    server.say(task, "two")
    error = watcher.process.communicate(timeout=20)[1]
    assert (watcher.process.returncode, error) == (1, b"")


WRONG = {
    "no such level": (("--level", "fatal"), 2, "fatal"),
    "a number that is none": (("--after", "soon"), 2, "--after"),
    "too long a tail": (("--tail", "201"), 2, "--tail"),
    "two beginnings": (("--tail", "1", "--after", "1"), 2, "--tail"),
    "a task that can be none": (("--task", "../x"), 1, "task_id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_followed_is_told_in_a_line(server, name):
    words, status, said = WRONG[name]
    assert_one_line(rig.on(server, "watch", *words), status, said)


def test_without_a_server_it_does_not_wait_for_one():
    assert_one_line(run("watch", MONITOR_SERVER="http://127.0.0.1:9"), 5, "monitor serve")


def test_a_server_that_is_not_monitor_is_told(page_server):
    assert_one_line(rig.at_rest("watch", MONITOR_SERVER=page_server), 1, "does not answer like Monitor")


@pytest.fixture
def page_server():
    """The address of a server that answers everything with a page."""

    class Pages(Stub):
        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<title>It works!</title>\n")

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()
