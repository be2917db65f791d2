"""`monitor run`: the command notices nothing of it, whatever happens to the server, and the task tells of it.

Real processes; where a terminal matters, bash with job control in a pseudo-terminal, as a person has it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import Server, clean_environment, wait_until

import monitor

PROGRAM = Server.command
NOWHERE = "http://127.0.0.1:9"
SHELL = shutil.which("bash")


@pytest.fixture
def run(server, task, tmp_path):
    """Runs `monitor run --task T ARGUMENTS` in a folder of its own, against the shared server."""

    def ran(*arguments: str, **options) -> subprocess.CompletedProcess:
        settings = {"MONITOR_SERVER": server.url, "MONITOR_SPOOL": str(tmp_path / "spool")}
        settings |= options.pop("settings", {"MONITOR_TASK_ID": str(task["number"])})
        options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 50} | options
        command = [*PROGRAM, "run", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=clean_environment(**settings), **options)

    return ran


def updates(server: Server, task: dict, count: int) -> list[dict]:
    """The updates of a task, once there are so many."""
    path = {"task_id": task["id"], "limit": 200}
    return wait_until(lambda: (all_ := server.get("/api/updates", **path)["items"])[count - 1 :] and all_)


def spooled(folder) -> list[dict]:
    """The updates that wait in a spool, oldest first."""
    files = sorted(folder.glob("*/*.hook"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_bytes().partition(b"\n\n")[2]) for file in files]


# What it records -----------------------------------------------------------------------------------------


def test_start_and_end_are_recorded_with_status_duration_and_output(run, server, task, tmp_path):
    done = run("--", "sh", "-c", "echo out; sleep 0.2; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    start, end = updates(server, task, 2)
    assert (start["kind"], start["level"]) == ("command_start", "info")
    assert (end["kind"], end["level"]) == ("command_end", "error")
    assert start["message"].startswith("started: sh -c ") and ": exit status 3 after " in end["message"]
    assert start["source"] == end["source"] and start["source"].startswith("run:sh-")
    assert (end["data"]["exit_status"], end["data"]["output"]) == (3, "out\nerr")
    assert 200 <= end["data"]["duration_ms"] < 30_000
    assert end["data"]["folder"] == str(tmp_path)
    assert start["data"]["occurred_at"] <= end["data"]["occurred_at"] <= end["timestamp"]


def test_a_command_that_succeeds_is_no_error(run, server, task):
    assert run("true").returncode == 0
    assert [update["level"] for update in updates(server, task, 2)] == ["info", "info"]


def test_no_output_records_none_and_puts_nothing_between(run, server, task, tmp_path):
    with open(tmp_path / "file", "w") as file:
        done = run("--no-output", "readlink", "/proc/self/fd/1", stdout=file, capture_output=False)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == f"{tmp_path}/file\n"
    assert "output" not in updates(server, task, 2)[1]["data"]


def test_a_new_task_is_made_in_the_workstream_of_the_folder(run, server, tmp_path):
    assert run("--new", f"Build of {tmp_path.name}", "--", "echo", "x", settings={}).returncode == 0
    found = wait_until(lambda: server.get("/api/tasks", q=tmp_path.name)["items"])
    assert [task["name"] for task in found] == [f"Build of {tmp_path.name}"]
    assert [update["kind"] for update in updates(server, found[0], 2)] == ["command_start", "command_end"]
    named = server.get(f"/api/workstreams/{found[0]['workstream_id']}")
    assert named["name"] == tmp_path.name


def test_tests_and_builds_are_what_they_are_elsewhere(run, server, task, tmp_path):
    (tmp_path / "pytest").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "pytest").chmod(0o755)
    assert run("./pytest", "-q").returncode == 1
    assert updates(server, task, 2)[1]["kind"] == "test_result"


@pytest.mark.parametrize(
    "words", [("--password", "hunter22"), ("--api-key=hunter22",), ("PASSWORD=hunter22",)]
)
def test_secrets_of_the_command_line_and_the_output_are_masked(run, server, task, words):
    done = run("--", "sh", "-c", "echo password=hunter$1; shift; echo $#", "sh", "33", *words)
    assert done.stdout == f"password=hunter33\n{len(words)}\n".encode()  # nothing of the command itself
    text = json.dumps(updates(server, task, 2))
    assert "hunter2" not in text and "hunter3" not in text and text.count(monitor.MASK) >= 4


def test_a_secret_is_masked_before_the_output_is_cut(run, server, task):
    lines = "x" * 63 + "\n"
    key = f"-----BEGIN PRIVATE KEY-----\n{lines * 200}-----END PRIVATE KEY-----\n"
    run("--", sys.executable, "-c", f"print({key!r} + 'the end')")
    assert "xxx" not in updates(server, task, 2)[1]["data"]["output"]


def test_the_child_knows_its_task(run, task):
    assert run("sh", "-c", "echo $MONITOR_TASK_ID").stdout.decode().strip() == str(task["number"])


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07plain\x1b(B\n", "red plain"),
        (b"10%\r 50%\r100%\r\ndone\r\n", "100%\ndone"),
        (b"a |\b/\b-\bx", "a x"),
        (b"before\n\x1b[?1049h\x1b[2Jscreen\x1b[?1049lafter", "before\nafter"),
        (b"screen of before\x1b[?1049lafter\x1b[?1049hmore", "after"),
        (b"\xff\xfe\0\x9b\x07tab\tend", "\ufffd\ufffd\ufffdtab\tend"),
        (b"\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        (b"cut \x1b[", "cut"),
        (b"", ""),
    ],
)
def test_output_is_recorded_as_it_stood_there_in_the_end(raw, text):
    assert monitor.readable(raw).rstrip() == text


def test_of_much_output_the_last_whole_lines_are_recorded(run, server, task):
    done = run("--", "seq", "1", "200000")
    assert done.stdout.count(b"\n") == 200_000
    lines = updates(server, task, 2)[1]["data"]["output"].splitlines()
    assert (
        lines[0] == "…"
        and lines[-1] == "200000"
        and lines[1:] == [str(number) for number in range(int(lines[1]), 200_001)]
    )
    assert 9_000 < len("\n".join(lines)) <= 10_002


# What the command sees, and its caller -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], -signal.SIGKILL),
        (["sh", "-c", "kill -INT $$"], -signal.SIGINT),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
        ([""], 127),
        (["sh", "-c", "exit 255"], 255),
    ],
    ids=str,
)
def test_the_status_is_that_of_the_command_its_signal_too(run, words, status):
    assert run("--", *words).returncode == status


def test_a_signal_without_a_name_is_recorded_by_its_number(run, server, task):
    number = signal.SIGRTMIN + 3
    done = run("--", "sh", "-c", f"kill -{number} $$")
    assert (done.returncode, done.stderr) == (-number, b"")
    assert f"killed by signal {number} after" in updates(server, task, 2)[1]["message"]


def test_a_program_that_cannot_be_run_is_told_in_one_line(run):
    error = run("no-such-program").stderr.decode()
    assert error == "monitor: cannot run 'no-such-program': No such file or directory\n"


def test_options_behind_the_command_are_its_own(run):
    assert run("echo", "--task", "5", "--help", "--", "x").stdout == b"--task 5 --help -- x\n"


def test_stdin_reaches_it_and_the_outputs_stay_apart_to_the_byte(run):
    raw = bytes(range(256)) * 4000
    done = run("--", "sh", "-c", "tee /dev/stderr", stdin=None, input=raw)
    assert done.stdout == raw and done.stderr == raw


def test_signals_are_as_if_it_were_started_by_the_caller(run):
    code = "import signal as s; print(s.pthread_sigmask(s.SIG_BLOCK, []), s.getsignal(s.SIGHUP))"
    code += "; print(open('/proc/self/status').read().partition('SigIgn:')[2].split()[0])"
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, restore_signals=True)
    assert run("--", sys.executable, "-c", code).stdout == bare.stdout


@pytest.mark.skipif(not SHELL, reason="PIPESTATUS needs bash")
def test_a_reader_that_goes_away_is_noticed_by_the_command(server, task, tmp_path):
    command = shlex.join([*PROGRAM, "run", "--task", str(task["number"]), "yes"])
    settings = {"MONITOR_SERVER": server.url, "MONITOR_SPOOL": str(tmp_path)}
    script = f"{command} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        [SHELL, "-c", script], env=clean_environment(**settings), capture_output=True, timeout=50
    )
    assert done.stdout.split() == [b"y", str(128 + signal.SIGPIPE).encode()]


def test_what_it_leaves_behind_does_not_hold_us(run):
    begin = time.monotonic()
    assert run("--", "sh", "-c", "sleep 40 & echo here").stdout == b"here\n"
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_a_signal_is_forwarded_once(server, task, tmp_path, number):
    code = f"import signal, time; got = []; signal.signal({int(number)}, lambda *_: got.append(1))"
    code += "\nprint('ready', flush=True)\nwhile not got: time.sleep(0.05)"
    code += "\ntime.sleep(0.3); print(len(got)); exit(5)"
    settings = {"MONITOR_SERVER": server.url, "MONITOR_TASK_ID": task["id"], "MONITOR_SPOOL": str(tmp_path)}
    command = [*PROGRAM, "run", "--", sys.executable, "-c", code]
    with subprocess.Popen(command, env=clean_environment(**settings), stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.stdout.read() == b"1\n"
    assert process.returncode == 5


def test_much_output_passes_in_constant_memory(server, task, tmp_path):
    settings = {"MONITOR_SERVER": server.url, "MONITOR_TASK_ID": task["id"], "MONITOR_SPOOL": str(tmp_path)}
    code = "import sys; chunk = b'0123456789abcde\\n' * 65536"
    code += "\nfor _ in range(100): sys.stdout.buffer.write(chunk)"
    command = [*PROGRAM, "run", "--", sys.executable, "-c", code]
    size = 0
    with subprocess.Popen(command, env=clean_environment(**settings), stdout=subprocess.PIPE) as process:
        while chunk := process.stdout.read(1 << 20):
            size += len(chunk)
            with contextlib.suppress(FileNotFoundError, IndexError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                peak = int(status.partition("VmHWM:")[2].split()[0])
    assert (process.returncode, size) == (0, 100 << 20)
    assert peak < 100_000  # kB


# The server ----------------------------------------------------------------------------------------------


def test_without_a_server_it_runs_the_same_and_is_taken_in_later(tmp_path, fresh):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MONITOR_SERVER": f"http://127.0.0.1:{port}", "MONITOR_SPOOL": str(tmp_path / "spool")}
    command = [*PROGRAM, "run", "--new", "Later", "--", "sh", "-c", "echo out; exit 4"]
    done = subprocess.run(command, env=clean_environment(**settings), capture_output=True, timeout=50)
    assert (done.returncode, done.stdout) == (4, b"out\n")
    assert done.stderr.count(b"\n") == 1 and b"no server at " in done.stderr
    start, end = spooled(tmp_path / "spool")
    server = fresh(MONITOR_BIND=f"127.0.0.1:{port}", MONITOR_SPOOL=str(tmp_path / "spool"), port=port)
    (task,) = wait_until(lambda: server.get("/api/tasks")["items"])
    taken = updates(server, task, 2)
    assert [update["message"] for update in taken] == [start["message"], end["message"]]
    assert all(update["data"]["occurred_at"] < update["timestamp"] for update in taken)
    assert wait_until(lambda: not spooled(tmp_path / "spool"))


def test_an_update_from_the_spool_is_stored_once(server, task):
    head = f"agent: update\ntask: {task['number']}\ntime: 2026-01-02T03:04:05Z\nkey: once-{task['id']}\n\n"
    body = json.dumps({"source": "run:x", "message": "hello", "data": {}})
    for _ in range(2):
        headers = {"Content-Type": "application/vnd.monitor.hook"}
        answered = server.session.post(f"{server.url}/api/hooks/spooled", data=head + body, headers=headers)
        assert (answered.status_code, answered.text) == (204, "")
    (update,) = server.get("/api/updates", task_id=task["id"])["items"]
    assert update["data"] == {"occurred_at": "2026-01-02T03:04:05.000000Z"}


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"source": "x"}', '{"source": "x", "message": "\\u0000"}'])
def test_what_is_no_update_is_refused_and_stores_nothing(server, body):
    seq = server.get("/health", full=1)["seq"]
    headers = {"Content-Type": "application/vnd.monitor.hook"}
    raw = f"agent: update\nkey: k\n\n{body}"
    answered = server.session.post(f"{server.url}/api/hooks/spooled", data=raw, headers=headers)
    assert answered.status_code == 400 and answered.json()["error"] == "invalid_input"
    assert server.get("/health", full=1)["seq"] == seq


def test_a_server_that_hangs_delays_nothing_but_the_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        settings = {"MONITOR_SERVER": f"http://127.0.0.1:{deaf.getsockname()[1]}"}
        settings |= {"MONITOR_SPOOL": str(tmp_path)}
        command = [*PROGRAM, "run", "--new", "x", "--", "date", "+%s"]
        done = subprocess.run(command, env=clean_environment(**settings), capture_output=True, timeout=50)
    assert done.returncode == 0 and b"waits for it" in done.stderr and done.stderr.count(b"\n") == 1
    assert [update["kind"] for update in spooled(tmp_path)] == ["command_start", "command_end"]


def test_a_strict_server_wants_its_token(tmp_path, fresh):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="right")
    settings = {"MONITOR_SERVER": server.url, "MONITOR_SPOOL": str(tmp_path / "spool")}
    command = [*PROGRAM, "run", "--new", "x", "--", "echo", "out"]
    for token in ("wrong", "right"):
        environment = clean_environment(MONITOR_TOKEN=token, **settings)
        done = subprocess.run(command, env=environment, capture_output=True, timeout=50)
        assert (done.returncode, done.stdout) == (0, b"out\n")
        assert token == "right" or b"waits for it" in done.stderr
    flush = [*PROGRAM, "hooks", "flush", "--token", "right"]
    subprocess.run(flush, env=clean_environment(**settings), check=True, capture_output=True, timeout=50)
    kept = server.session.get(f"{server.url}/api/updates", headers={"Authorization": "Bearer right"}).json()
    assert kept["total"] == 4 and spooled(tmp_path / "spool") == []


def test_without_a_spool_or_a_server_it_says_that_nothing_is_recorded(run):
    done = run(
        "echo", "x", settings={"MONITOR_SERVER": NOWHERE, "MONITOR_SPOOL": "off", "MONITOR_TASK_ID": "1"}
    )
    assert (done.returncode, done.stdout) == (0, b"x\n") and b"nothing is recorded" in done.stderr


def test_quiet_keeps_the_warning_to_itself(run):
    settings = {"MONITOR_SERVER": NOWHERE, "MONITOR_SPOOL": "off", "MONITOR_TASK_ID": "1"}
    done = run("--quiet", "echo", "x", settings=settings)
    assert (done.stdout, done.stderr) == (b"x\n", b"")


def test_an_unknown_task_is_told_after_the_command(run):
    done = run("--task", "987654", "echo", "x")
    assert (done.returncode, done.stdout) == (0, b"x\n") and b"is there a task 987654?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("echo", "x"), b"--task ID"),
        (("--task", "1", "--new", "x", "echo", "x"), b"--new TITLE"),
        (("--new", "x" * 501, "echo", "x"), b"name must"),
        (("--task", "no such", "echo", "x"), b"task_id must"),
        (("--task", "1"), b"COMMAND"),
    ],
)
def test_a_wrong_command_line_runs_nothing(run, arguments, words):
    done = run(*arguments, settings={})
    assert done.returncode in (1, 2) and done.stdout == b""
    assert words in done.stderr and done.stderr.count(b"\n") == 1


# A terminal ----------------------------------------------------------------------------------------------


class Typist:
    """Somebody at bash in a terminal."""

    def __init__(self, environment: dict[str, str], folder):
        self.process, self.terminal = pty.fork()
        if not self.process:
            os.chdir(folder)
            os.execvpe(SHELL, [SHELL, "--norc", "--noprofile", "-i"], environment)
        self.seen = b""
        termios.tcsetwinsize(self.terminal, (40, 100))
        self.sees(b"P> ")

    def types(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def sees(self, *words: bytes) -> bytes:
        """All that is shown up to some words."""

        def shown():
            while select.select([self.terminal], [], [], 0.02)[0]:
                self.seen += os.read(self.terminal, 65536)
            return next((word for word in words if word in self.seen), None)

        try:
            word = wait_until(shown, 20)
        except AssertionError:
            raise AssertionError(f"no {words} in {self.seen}") from None
        before, _, self.seen = self.seen.partition(word)
        return before + word

    def runs(self, command: str) -> None:
        """Type a command; what it shows comes next."""
        self.types(f"{command}\n")
        self.sees(b"\n")

    def stty(self) -> str:
        self.runs("stty -a; echo STTY-$?")
        return self.sees(b"STTY-0").decode()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.process, signal.SIGKILL)
        os.close(self.terminal)
        os.waitpid(self.process, 0)


@pytest.fixture
def typist(server, task, tmp_path):
    """bash in a terminal, where $RUN is `monitor run --task T`, and ./program what program() wrote."""
    if not SHELL:
        pytest.skip("job control needs bash")
    settings = {"MONITOR_SERVER": server.url, "MONITOR_SPOOL": str(tmp_path / "spool"), "PS1": "P> "}
    settings |= {"RUN": shlex.join([*PROGRAM, "run", "--task", str(task["number"])]), "TERM": "dumb"}
    settings |= {"INPUTRC": "/dev/null", "HISTFILE": "/dev/null"}
    made = Typist(clean_environment(**settings), tmp_path)
    yield made
    made.end()


def program(folder, text: str) -> None:
    """A shell script ./program: what it prints cannot be mistaken for what was typed."""
    (folder / "program").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "program").chmod(0o755)


def test_it_has_a_terminal_of_the_same_size_and_modes(typist, server, task, tmp_path):
    program(tmp_path, "stty size; stty -a | grep -o 'susp = ^.'; test -t 2 && echo 'err is one' >&2; exit 6")
    typist.runs("stty susp ^X; $RUN ./program; echo ended $?")
    shown = typist.sees(b"ended 6")
    assert b"40 100\r\nsusp = ^X\r\nerr is one\r\n" in shown
    assert updates(server, task, 2)[1]["data"]["output"] == "40 100\nsusp = ^X\nerr is one"


def test_a_full_screen_program_works_and_the_terminal_is_as_before(typist, server, task, tmp_path):
    before = typist.stty()
    program(tmp_path, "stty raw -echo; printf '\\033[?1049hscreen'; head -c 3 | od -c; printf '\\033[?1049l'")
    typist.runs("$RUN ./program")
    typist.sees(b"screen")
    typist.types("a\x03\x1a")  # Ctrl-C and Ctrl-Z are keys like others to it
    assert b"a 003 032" in typist.sees(b"\x1b[?1049l")
    typist.sees(b"P> ")
    assert typist.stty() == before
    assert updates(server, task, 2)[1]["data"]["output"] == ""


def test_a_change_of_size_reaches_it(typist, tmp_path):
    program(tmp_path, "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done")
    typist.runs("$RUN ./program")
    typist.sees(b"ready")
    termios.tcsetwinsize(typist.terminal, (11, 77))
    typist.sees(b"11 77")
    typist.types("\x03")
    typist.sees(b"P> ")


def test_ctrl_c_interrupts_it_and_the_script_around_it(typist, server, task, tmp_path):
    program(tmp_path, "echo ready; sleep 60")
    (tmp_path / "script").write_text('$RUN ./program\necho "went on"\n')
    typist.runs(f"{SHELL} script; echo ended $?")
    typist.sees(b"ready")
    typist.types("\x03")
    shown = typist.sees(b"P> ")
    assert b"went on" not in shown
    assert "killed by SIGINT" in updates(server, task, 2)[1]["message"]


def test_ctrl_c_reaches_it_once_where_its_output_is_no_terminal(typist, tmp_path):
    program(tmp_path, "trap 'n=$((n+1))' INT; echo ready >&2; sleep 1; sleep 1; echo got $n >&2")
    typist.runs("$RUN ./program | cat; echo over")
    typist.sees(b"ready")
    typist.types("\x03")
    typist.sees(b"got 1")


@pytest.mark.parametrize("on", ["fg", "bg\nfg"])
def test_ctrl_z_stops_it_and_the_shell_has_its_terminal(typist, tmp_path, on):
    before = typist.stty()
    program(tmp_path, "echo ready; read line; echo got $line")
    typist.runs("$RUN ./program; echo ended")
    typist.sees(b"ready")
    typist.types("\x1a")
    typist.sees(b"Stopped")
    typist.sees(b"P> ")
    assert typist.stty() == before
    for word in on.split():
        typist.runs(word)
        time.sleep(0.5)
    typist.types("hello\n")
    typist.sees(b"got hello")
    typist.sees(b"P> ")
    assert typist.stty() == before


def test_it_goes_on_in_the_background(typist, tmp_path):
    program(tmp_path, "echo ready; test -t 1 && echo on a terminal; sleep 1; echo over")
    typist.runs("$RUN ./program &")
    typist.sees(b"on a terminal")
    typist.runs("echo 'mine'")
    typist.sees(b"mine")
    typist.sees(b"over")
    assert " icanon" in typist.stty()


def test_after_kill_9_it_gets_the_hangup_of_a_terminal_that_is_closed(typist, tmp_path):
    program(tmp_path, "trap 'echo hangup >file; exit' HUP; echo $PPID is ready; sleep 60 & wait")
    typist.runs("$RUN ./program & sleep 0; fg")
    typist.sees(b"is ready")
    ours = subprocess.run(["pgrep", "-P", str(typist.process)], capture_output=True, text=True).stdout.split()
    os.kill(int(ours[0]), signal.SIGKILL)
    wait_until((tmp_path / "file").exists)
    typist.sees(b"Killed")
    assert " icanon" in typist.stty()
