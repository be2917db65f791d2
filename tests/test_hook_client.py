"""What agents run: the one-liner and `monitor hook`, as real processes against a small real server.

Whatever happens to the server, an agent must not notice: exit status 0, nothing printed, in two seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import Server, clean_environment, wait_until

import monitor

PROGRAM = Server.command
SHELLS = [shell for shell in ("sh", "dash", "bash", "zsh", "fish") if shutil.which(shell)]
WAYS = [*SHELLS, "monitor hook"]
NASTY = {"text": "it's \"quoted\" $HOME `id` $(id) \\n %s\n\ttäb 漢字 \U0001f600 'end"}

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="the one-liner needs curl")


class Listener:
    """A server that keeps what it is sent and answers as told: with a status, or not at all (0)."""

    def __init__(self):
        self.status, self.statuses, self.seen, self.release = 204, {}, [], threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.seen.append((self.path, dict(self.headers), body))
                status = outer.statuses.get(body, outer.status)
                if not status:
                    outer.release.wait(20)
                    return
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(b"" if status == 204 else b"words that must not reach the agent")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def listener():
    made = Listener()
    yield made
    made.close()


class Agent:
    """Runs hooks as an agent does, in a home of its own."""

    def __init__(self, folder, server: str):
        self.server, self.spool = server, folder / "spool"
        self.settings = {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
        self.settings |= {"MONITOR_SPOOL": str(self.spool), "MONITOR_SERVER": server}

    def start(
        self, way: str, agent: str = "claude", event: str = "Stop", **settings: str
    ) -> subprocess.Popen:
        """Start a hook; its standard input is open."""
        command = [*PROGRAM, "hook", agent]
        if way == "monitor hook":
            command += ["--event", event] if agent == "copilot" else []
        else:
            entry = monitor.hook_entry(agent, event, "http://127.0.0.1:9", False)
            command = [way, "-c", entry.get("bash") or entry["hooks"][0]["command"]]
        environment = clean_environment(**self.settings | settings)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, **pipes)

    def run(
        self, way: str, payload: object = None, agent: str = "claude", event: str = "Stop", **settings: str
    ):
        """Run a hook to its end, and hold it to its promises."""
        body = (
            payload if isinstance(payload, bytes) else json.dumps(payload or {}, ensure_ascii=False).encode()
        )
        process = self.start(way, agent, event, **settings)
        out, error = process.communicate(body, timeout=20)
        assert (process.returncode, out, error) == (0, b"", b"")
        return body

    def kept(self) -> list[tuple[dict[str, str], bytes]]:
        """(head, payload) of the events in the spool."""
        found = []
        for path in sorted(self.spool.glob("*/*.hook")):
            head, _, body = path.read_bytes().partition(b"\n\n")
            found.append((dict(line.split(": ", 1) for line in head.decode().split("\n")), body))
        return found


@pytest.fixture
def agent(tmp_path, listener):
    return Agent(tmp_path, listener.url)


@pytest.fixture
def lonely(tmp_path):
    """An agent whose server is off."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield Agent(tmp_path, f"http://127.0.0.1:{reserved.getsockname()[1]}")


@pytest.mark.parametrize("way", WAYS)
def test_a_payload_arrives_as_it_is(agent, listener, way):
    body = agent.run(
        way, NASTY, MONITOR_TASK_ID="12", MONITOR_TOKEN="a\"$b'\\n", http_proxy="http://127.0.0.1:9"
    )
    ((path, headers, seen),) = listener.seen
    assert (path, seen) == ("/api/hooks/claude", body)
    assert headers["Authorization"] == "Bearer a\"$b'\\n"
    assert headers["X-Monitor-Task"] == "12"
    assert headers["Content-Type"] == "application/json"
    assert len(headers["Idempotency-Key"]) >= 16
    assert not agent.spool.exists()


@pytest.mark.parametrize("way", ("sh", "monitor hook"))
def test_without_token_and_task_none_is_sent(agent, listener, way):
    agent.run(way)
    headers = listener.seen[0][1]
    assert "Authorization" not in headers and not headers.get("X-Monitor-Task")


@pytest.mark.parametrize("way", ("sh", "monitor hook"))
def test_an_agent_whose_payload_does_not_name_the_event_has_it_in_the_address(agent, listener, way):
    agent.run(way, agent="copilot", event="sessionStart")
    listener.status = 503
    agent.run(way, agent="copilot", event="agentStop")
    assert [path for path, *_ in listener.seen] == [
        "/api/hooks/copilot?event=sessionStart",
        "/api/hooks/copilot?event=agentStop",
    ]
    ((head, _),) = agent.kept()
    assert (head["agent"], head["event"]) == ("copilot", "agentStop")


@pytest.mark.parametrize("way", WAYS)
def test_while_the_server_is_off_the_event_is_kept(lonely, way):
    body = lonely.run(way, NASTY, MONITOR_TASK_ID="12", MONITOR_SERVER=lonely.server + "/")
    ((head, kept),) = lonely.kept()
    assert kept == body
    assert (head["agent"], head["event"], head["task"]) == ("claude", "", "12")
    assert abs(time.time() - monitor.datetime.datetime.fromisoformat(head["time"]).timestamp()) < 60
    (folder,) = lonely.spool.iterdir()
    assert folder.name == "http___127.0.0.1_" + lonely.server.rpartition(":")[2]
    (file,) = folder.iterdir()
    assert file.name == head["key"] + ".hook"
    assert [stat.S_IMODE(place.stat().st_mode) for place in (lonely.spool, folder, file)] == [
        0o700,
        0o700,
        0o600,
    ]


@pytest.mark.parametrize(
    ("way", "status", "kept"),
    [
        *[("sh", *case) for case in ((401, 1), (500, 1), (503, 1), (400, 0), (404, 0), (413, 0), (302, 0))],
        *[("monitor hook", *case) for case in ((401, 1), (503, 1), (404, 0), (302, 0))],
    ],
)
def test_what_a_server_could_take_later_is_kept_and_what_it_refuses_is_not(
    agent, listener, way, status, kept
):
    listener.status = status
    agent.run(way)
    assert len(agent.kept()) == kept
    if kept:
        assert agent.kept()[0][0]["key"] == listener.seen[0][1]["Idempotency-Key"]
    assert len(listener.seen) == 1, "a redirect was followed"


def test_a_server_that_hangs_costs_no_more_than_the_limit(agent, listener):
    listener.status, start = 0, time.monotonic()
    with ThreadPoolExecutor(len(WAYS)) as pool:
        list(pool.map(agent.run, WAYS))
    assert time.monotonic() - start < 2 * len(WAYS) + 6
    assert {head["key"] for head, _ in agent.kept()} == {seen[1]["Idempotency-Key"] for seen in listener.seen}
    assert len(agent.kept()) == len(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_a_large_payload_arrives_and_is_kept_whole(agent, listener, way):
    payload = {"text": "ü\"\\$'" * 30_000}
    body = agent.run(way, payload)
    assert len(body) > 200_000 and listener.seen[0][2] == body
    listener.status = 500
    agent.run(way, payload)
    assert agent.kept()[0][1] == body


def test_hooks_that_run_side_by_side_do_not_mix(lonely):
    payloads = [{"number": number, "text": str(number) * 3000} for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        bodies = list(pool.map(lambda payload: lonely.run("sh", payload), payloads))
    assert sorted(body for _, body in lonely.kept()) == sorted(bodies)
    assert len({head["key"] for head, _ in lonely.kept()}) == 16


@pytest.mark.parametrize("way", ("sh", "bash", "monitor hook"))
def test_the_spool_is_bounded(lonely, way):
    folder = lonely.spool / ("http___127.0.0.1_" + lonely.server.rpartition(":")[2])
    folder.mkdir(parents=True)
    for number in range(999):
        (folder / f"{number}.hook").touch()
    lonely.run(way)
    lonely.run(way)
    assert len(list(folder.iterdir())) == 1000


@pytest.mark.parametrize("way", ("sh", "monitor hook"))
def test_nothing_is_kept_where_that_is_switched_off_or_cannot_be(lonely, tmp_path, way):
    lonely.run(way, MONITOR_SPOOL="off")
    (tmp_path / "file").write_text("in the way")
    lonely.run(way, MONITOR_SPOOL=str(tmp_path / "file"))
    assert lonely.kept() == [] and sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_cannot_be_kept_whole_leaves_nothing_behind(lonely):
    command = ["sh", "-c", 'ulimit -f 1; exec "$@"', "sh", *PROGRAM, "hook", "claude"]  # blocks: a full disk
    environment = clean_environment(**lonely.settings)
    done = subprocess.run(command, env=environment, input=b"x" * 5000, capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [path for path in lonely.spool.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("way", ("sh", "monitor hook"))
def test_the_spool_lies_in_the_state_folder(lonely, tmp_path, way):
    name = "http___127.0.0.1_" + lonely.server.rpartition(":")[2]
    lonely.run(way, MONITOR_SPOOL="")
    assert len(list((tmp_path / "state" / "monitor" / "spool" / name).iterdir())) == 1
    lonely.run(way, MONITOR_SPOOL="", XDG_STATE_HOME="")
    assert len(list((tmp_path / ".local" / "state" / "monitor" / "spool" / name).iterdir())) == 1


def test_without_curl_the_event_is_kept(lonely, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "cat", "mkdir", "mv", "rm", "date", "ls"):
        (programs / name).symlink_to(shutil.which(name))
    lonely.run("sh", {"a": 1}, PATH=str(programs))
    assert lonely.kept()[0][1] == b'{"a": 1}'


def spool_some(agent: Agent, listener: Listener, count: int) -> list[bytes]:
    """Events in the spool, with times apart; returns their payloads, oldest first."""
    listener.status = 503
    bodies = [agent.run("sh", {"number": number}, MONITOR_TASK_ID="7") for number in range(count)]
    for path in agent.spool.glob("*/*.hook"):
        number = json.loads(path.read_bytes().partition(b"\n\n")[2])["number"]
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    listener.status = 204
    listener.seen.clear()
    return bodies


@pytest.mark.parametrize("way", ("dash", "bash", "monitor hook"))
def test_the_next_success_sends_what_was_kept_in_order(agent, listener, way):
    if not shutil.which(way.split()[0]) and way != "monitor hook":
        pytest.skip(f"there is no {way}")
    bodies = spool_some(agent, listener, 3)
    agent.run(way, {"live": True}, MONITOR_TASK_ID="8", MONITOR_TOKEN="secret")
    wait_until(lambda: not agent.kept())
    (live, *later) = listener.seen
    assert live[2] == b'{"live": true}'
    assert [path for path, *_ in later] == ["/api/hooks/spooled"] * 3
    assert [body.partition(b"\n\n")[2] for *_, body in later] == bodies
    for _, headers, body in later:
        assert headers["Content-Type"] == "application/vnd.monitor.hook"
        assert headers["Authorization"] == "Bearer secret"
        assert "X-Monitor-Task" not in headers and "Idempotency-Key" not in headers
        assert b"\ntask: 7\n" in body


def test_emptying_the_spool_does_not_hold_up_the_agent(agent, listener):
    spool_some(agent, listener, 1)
    (kept,) = agent.spool.glob("*/*.hook")
    listener.statuses[kept.read_bytes()] = 0
    start = time.monotonic()
    agent.run("sh")
    wait_until(lambda: len(listener.seen) == 2)
    assert time.monotonic() - start < 10
    listener.release.set()


@pytest.mark.parametrize("way", ("sh", "flush"))
@pytest.mark.parametrize(("status", "left"), [(401, 2), (503, 2), (404, 0)])
def test_emptying_the_spool_stops_at_trouble_and_drops_what_is_refused(agent, listener, way, status, left):
    spool_some(agent, listener, 2)
    for path in agent.spool.glob("*/*.hook"):
        listener.statuses[path.read_bytes()] = status
    if way == "sh":
        agent.run("sh")
        wait_until(lambda: len(listener.seen) == (2 if left else 3) and len(agent.kept()) == left)
    else:
        done = flush(agent)
        assert done.returncode == {401: 4, 503: 1, 404: 0}[status]
        assert json.loads(done.stdout) == {"sent": 0, "refused": 2 - left, "left": left}
    assert len(agent.kept()) == left


def flush(agent: Agent) -> subprocess.CompletedProcess:
    """Run `monitor hooks flush`."""
    command = [*PROGRAM, "hooks", "flush"]
    return subprocess.run(command, env=clean_environment(**agent.settings), capture_output=True, timeout=30)


def test_flush_sends_what_was_kept(agent, listener):
    bodies = spool_some(agent, listener, 3)
    done = flush(agent)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"sent": 3, "refused": 0, "left": 0})
    assert [body.partition(b"\n\n")[2] for *_, body in listener.seen] == bodies


def test_flush_without_a_server_says_so(lonely):
    lonely.run("sh")
    done = flush(lonely)
    assert done.returncode == 5 and b"no server" in done.stderr
    assert json.loads(done.stdout)["left"] == 1


def test_the_token_and_the_payload_are_in_no_list_of_processes(agent, listener):
    if not os.path.isdir("/proc/self"):
        pytest.skip("there is no /proc")
    listener.status = 0
    process = agent.start("sh", MONITOR_TOKEN="very-secret-token")
    process.stdin.write(b'{"text": "very-secret-payload"}')
    process.stdin.close()
    wait_until(lambda: listener.seen)
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes())
    assert any(b"curl" in line and listener.url.encode() in line for line in lines)
    assert not any(b"very-secret" in line for line in lines)
    listener.release.set()
    process.wait(10)
    process.stdout.close()
    process.stderr.close()


def test_gemini_finds_nothing_to_fill_in():
    """It puts the values of $NAME, ${NAME} and ${NAME:-default} into the text of its settings."""
    ours = {"HOME", "XDG_STATE_HOME", "MONITOR_SERVER", "MONITOR_SPOOL", "MONITOR_TASK_ID", "MONITOR_TOKEN"}
    command = monitor.hook_entry("gemini", "AfterTool", "http://127.0.0.1:3000", False)["hooks"][0]["command"]
    assert ":-" not in command
    names = set(monitor.re.findall(r"\$\{?(\w+)", command)) - ours
    assert {name for name in names if not name.startswith("_") and not name.isdigit()} == set()
    assert not any(f"${name}" in command or f"${{{name}}}" in command for name in ours)


def test_monitor_hook_loads_no_web_stack(agent, listener, tmp_path):
    traps = tmp_path / "traps"
    traps.mkdir()
    for name in ("flask", "requests", "gevent", "werkzeug", "jinja2"):
        (traps / f"{name}.py").write_text(f"open({str(tmp_path / 'loaded')!r}, 'w')\nraise RuntimeError")
    agent.run("monitor hook", PYTHONPATH=str(traps))
    assert len(listener.seen) == 1 and not (tmp_path / "loaded").exists()


@pytest.mark.parametrize(
    "arguments", [("nobody",), (), ("claude", "--bogus"), ("claude", "--event"), ("claude", "--server", "x")]
)
def test_monitor_hook_ends_with_0_and_without_a_word_whatever_it_is_told(tmp_path, arguments):
    done = subprocess.run(
        [*PROGRAM, "hook", *arguments],
        env=clean_environment(HOME=str(tmp_path), MONITOR_SPOOL="off"),
        input=b"{}",
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
