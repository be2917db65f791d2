"""`monitor doctor`: what it finds, what mends it, with a server and without; and that it changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import pty
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest
from conftest import ROOT, Server, clean_environment
from rig import at_rest, command, made_before, on, one_sentence, serving
from test_docs import RUNNABLE

import monitor

TOKEN = "a-token"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home of one's own, without any agent, and a repository to stand in."""
    folder = tmp_path / "home"
    (folder / "bin").mkdir(parents=True)
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    return folder


def look(ran) -> dict[str, list[dict]]:
    """The findings that a command printed, by check."""
    assert ran.status in (0, 1), ran.error
    found: dict[str, list[dict]] = {}
    for finding in ran.json["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    fails = [finding for rows in found.values() for finding in rows if finding["level"] == "fail"]
    assert ran.json["ok"] is (ran.status == 0) is (not fails)
    assert one_sentence(ran.error) if fails else ran.error == ""
    return found


def level(found: dict[str, list[dict]], check: str) -> str:
    """How bad the one finding of a check is."""
    (finding,) = found[check]
    assert ("mend" in finding) is (finding["level"] != "ok")
    return finding["level"]


def test_all_is_well_on_a_running_server(server):
    found = look(on(server, "doctor"))
    checks = ("server", "token", "clock", "database", "disk", "python", "sqlite", "rights")
    assert [level(found, check) for check in checks if check in found] == ["ok"] * (len(checks) - 1)
    assert str(server.database) in found["database"][0]["message"]
    assert monitor.__version__ in found["server"][0]["message"]
    assert {finding["message"].split()[0] for finding in found["packages"]} == set(monitor.PACKAGES)
    assert found["hooks"] == [
        {
            "check": "hooks",
            "level": "warn",
            "message": "no coding agent is plugged in",
            "mend": "monitor hooks install claude",
        }
    ]


def test_without_a_server_it_says_so_and_looks_at_the_file(tmp_path):
    made_before(tmp_path / "a.db", 3)
    found = look(at_rest("doctor", "--db", str(tmp_path / "a.db")))
    assert (level(found, "server"), found["server"][0]["mend"]) == ("fail", "monitor serve")
    assert level(found, "database") == "ok"
    assert "token" not in found
    found = look(at_rest("doctor", MONITOR_DB=f"sqlite:{tmp_path}/nope.db"))
    assert level(found, "database") == "warn"
    assert found["database"][0]["mend"] == f"monitor serve --db {tmp_path}/nope.db"


def test_the_database_of_another_server_is_not_the_one_here(fresh, tmp_path, monkeypatch):
    made_before(tmp_path / "monitor.db", 3)
    monkeypatch.chdir(tmp_path)
    assert "database" in look(at_rest("doctor", MONITOR_BIND="127.0.0.1:9"))
    assert "database" not in look(at_rest("doctor", "--server", "http://127.0.0.1:19"))
    strict = fresh(database=tmp_path / "its.db", MONITOR_API_TOKENS="s3cret", MONITOR_AUTH_MODE="strict")
    found = look(on(strict, "doctor"))
    assert found["server"][0]["message"] == f"Monitor answers at {strict.url}"
    assert level(found, "token") == "fail" and "database" not in found


@contextlib.contextmanager
def foreign(status: int, body: bytes, late: float = 0):
    """A server that is not Monitor, or pretends to be; its clock may be late."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() - late)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"{}"),
        (200, b"<html>"),
        (200, b"[]"),
        (302, b""),
        (500, b'{"status":"ok"'),
        (200, b"\xff" * 100),
    ],
)
def test_another_program_on_the_port_is_told_from_monitor(status, body):
    with foreign(status, body) as address:
        found = look(command("doctor", MONITOR_SERVER=address))
    assert level(found, "server") == "fail"
    assert f"status {status}" in found["server"][0]["message"] and "hooks" in found["server"][0]["message"]


def test_a_server_that_takes_and_never_answers_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = look(command("doctor", MONITOR_SERVER=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert "within 2 s" in found["server"][0]["message"]


@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_a_wrong_token_is_found_and_the_right_one_is_well(fresh, mode):
    server = fresh(MONITOR_API_TOKENS=TOKEN, MONITOR_AUTH_MODE=mode)
    for wrong in ("", "another"):
        found = look(on(server, "doctor", MONITOR_TOKEN=wrong))
        assert level(found, "server") == "ok"
        assert level(found, "token") == "fail"
        assert TOKEN not in json.dumps(found) and "MONITOR_TOKEN" in found["token"][0]["mend"]
    assert level(look(on(server, "doctor", MONITOR_TOKEN=TOKEN)), "token") == "ok"


@pytest.mark.parametrize(
    ("health", "check", "bad"),
    [
        ({"version": "9.9.9"}, "server", "warn"),
        ({"version": monitor.__version__, "writer": "disk I/O error"}, "server", "fail"),
        ({"version": monitor.__version__, "sqlite_version": "3.36.0"}, "sqlite", "fail"),
        ({"version": monitor.__version__, "sqlite_version": "3.53.0"}, "sqlite", "ok"),
        ({"version": monitor.__version__, "writer": "\x1b[31m{0.__class__}"}, "server", "fail"),
    ],
)
def test_what_a_server_says_of_itself_is_judged(health, check, bad):
    with foreign(200, json.dumps({"status": "ok"} | health).encode()) as address:
        assert level(look(command("doctor", MONITOR_SERVER=address)), check) == bad


def test_clocks_that_disagree_are_found():
    for late, bad in ((0, "ok"), (90, "warn"), (-90, "warn")):
        with foreign(200, b'{"status":"ok"}', late) as address:
            assert level(look(command("doctor", MONITOR_SERVER=address)), "clock") == bad


DAMAGE = {
    "not a database": (lambda path: path.write_bytes(b"hello" * 1000), "fail"),
    "another program's": (
        lambda path: sqlite3.connect(path).executescript("CREATE TABLE x (y)").close(),
        "fail",
    ),
    "spoilt pages": (
        lambda path: path.write_bytes(path.read_bytes()[:9000] + b"x" * 9000 + path.read_bytes()[18000:]),
        "fail",
    ),
    "readable by others": (lambda path: path.chmod(0o644), "fail"),
    "empty": (lambda path: path.write_bytes(b""), "ok"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_wrong_with_a_file_is_found(tmp_path, what):
    path = tmp_path / "a b.db"
    spoil, bad = DAMAGE[what]
    if what != "another program's":
        made_before(path, 200)
    spoil(path)
    found = look(at_rest("doctor", "--db", str(path)))
    assert level(found, "database") == bad
    if bad == "fail":
        assert shlex.split(found["database"][0]["mend"])[-1] == str(path)


def test_a_file_of_a_killed_server_is_left_alone(tmp_path):
    with serving(Server, tmp_path / "a.db") as server:
        server.new_task()
        server.kill()
    assert (tmp_path / "a.db-wal").stat().st_size > 0
    before = fingerprint(tmp_path)
    found = look(at_rest("doctor", "--db", str(tmp_path / "a.db")))
    assert (level(found, "database"), found["database"][0]["mend"]) == (
        "warn",
        f"monitor serve --db {tmp_path}/a.db",
    )
    assert fingerprint(tmp_path) == before


def fingerprint(folder: Path) -> dict[str, tuple]:
    """All files below a folder: their bytes, modes and times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path)] = content, path.stat().st_mode, path.stat().st_mtime_ns if path.is_file() else 0
    return found


def test_it_changes_nothing(server, tmp_path, home):
    made_before(tmp_path / "a.db", 3)
    on(server, "hooks", "install", "claude", "--yes")
    before, head = fingerprint(tmp_path), server.get("/health", full="1")["seq"]
    look(at_rest("doctor", "--db", str(tmp_path / "a.db")))
    look(at_rest("doctor", MONITOR_DB=str(tmp_path / "nope.db"), MONITOR_SPOOL=str(tmp_path / "spool")))
    look(on(server, "doctor"))
    assert fingerprint(tmp_path) == before
    assert server.get("/health", full="1")["seq"] == head


def test_the_hooks_of_agents(server, home):
    on(server, "hooks", "install", "gemini", "--yes")
    found = look(on(server, "doctor"))
    assert level(found, "hooks") == "ok" and "gemini" in found["hooks"][0]["message"]
    found = look(at_rest("doctor", "--db", str(home / "none.db")))
    assert level(found, "hooks") == "warn" and server.url in found["hooks"][0]["message"]
    (home / ".gemini" / "settings.json").write_text("{ not JSON")
    found = look(on(server, "doctor"))
    assert level(found, "hooks") == "warn"


def test_hooks_in_a_repository_are_mended_there(server, home):
    (home / "repository" / ".git").mkdir(parents=True)
    with contextlib.chdir(home / "repository"):
        on(server, "hooks", "install", "gemini", "--project", "--yes")
        path = home / "repository" / ".gemini" / "settings.json"
        path.write_text(path.read_text().replace("-m 2", "-m 9"))
        (finding,) = look(on(server, "doctor"))["hooks"]
    assert finding["mend"] == "monitor hooks install gemini --project"
    assert finding["message"].endswith(f"old hooks in {path}; type: {finding['mend']}")


def test_an_agent_that_never_tells_its_version_is_not_waited_for(server, home, monkeypatch):
    (home / "bin" / "claude").write_text("#!/bin/sh\nexec sleep 600\n")
    (home / "bin" / "claude").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(
        monitor, "agent_version", lambda agent, seconds=20: seconds > 2 and pytest.fail("too long")
    )
    on(server, "hooks", "install", "gemini", "--yes")
    assert "hooks" in look(on(server, "doctor"))


def test_the_spool(server, tmp_path):
    state = tmp_path / "state"
    settings = {"MONITOR_SPOOL": str(state)}
    assert level(look(on(server, "doctor", **settings)), "spool") == "ok"
    folder = Path(monitor_spool(state, server.url))
    folder.mkdir(parents=True, mode=0o700)
    for number in range(3):
        (folder / f"{number}.hook").write_text("agent: claude\n\n{}")
        os.utime(folder / f"{number}.hook", (1_700_000_000 + number,) * 2)
    found = look(on(server, "doctor", **settings))
    assert level(found, "spool") == "warn" and found["spool"][0]["mend"] == "monitor hooks flush"
    assert re.search(r"3 events wait in \S+, the oldest for \d+ d", found["spool"][0]["message"])
    folder.chmod(0o755)
    assert look(on(server, "doctor", **settings))["rights"][0]["mend"] == f"chmod go= {folder}"
    for number in range(3, monitor.MAX_SPOOLED):
        (folder / f"{number}.hook").touch()
    assert level(look(on(server, "doctor", **settings)), "spool") == "fail"
    assert level(look(on(server, "doctor", MONITOR_SPOOL="off")), "spool") == "warn"


def monitor_spool(state: Path, url: str) -> str:
    """The folder where events for a server wait."""
    return f"{state}/{re.sub(r'[^A-Za-z0-9.-]', '_', url)}"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_spool_that_cannot_be_written(server, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    found = look(on(server, "doctor", MONITOR_SPOOL=str(tmp_path / "closed" / "spool")))
    assert level(found, "spool") == "fail"


def test_a_token_in_a_file_that_others_can_read(server, home):
    (home / ".config" / "monitor").mkdir(parents=True)
    (home / ".config" / "monitor" / "config.toml").write_text('token = "x"')
    (home / ".config" / "monitor" / "config.toml").chmod(0o644)
    assert level(look(on(server, "doctor")), "rights") == "warn"


def test_a_setting_that_makes_no_sense_is_one_of_the_findings():
    found = look(at_rest("doctor", MONITOR_STUCK_AFTER="soon"))
    assert level(found, "settings") == "fail" and "MONITOR_STUCK_AFTER" in found["settings"][0]["message"]


def test_a_package_that_is_missing_or_old(server, monkeypatch):
    monkeypatch.setattr(monitor, "PACKAGES", {"no-such-thing": "1.0", "click": "99.0"})
    missing, old = look(on(server, "doctor"))["packages"]
    assert (
        missing["level"] == "fail"
        and missing["mend"] == f"{sys.executable} -m pip install 'no-such-thing>=1.0'"
    )
    assert old["level"] == "warn"


def test_the_packages_are_those_that_are_declared():
    header = (ROOT / "monitor.py").read_text().partition("# ///\n")[0] + (ROOT / "pyproject.toml").read_text()
    declared = set(re.findall(r'"([a-z-]+)>=([\d.]+)"', header))
    assert {(name, least) for name, least in monitor.PACKAGES.items()} <= declared


def test_on_a_terminal_it_is_lines_with_the_command_below(server):
    leader, follower = pty.openpty()
    command_line = [sys.executable, str(ROOT / "monitor.py"), "doctor", "--server", server.url]
    running = subprocess.Popen(command_line, env=clean_environment(), stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 65536):
            shown += chunk
    os.close(leader)
    assert (running.communicate()[1], running.returncode) == (b"", 0)
    lines = click.unstyle(shown.decode()).splitlines()
    assert lines[0].startswith("ok   server    Monitor ")
    warned = lines.index("warn hooks     no coding agent is plugged in")
    assert lines[warned + 1] == " " * 15 + "monitor hooks install claude"
    assert on(server, "--quiet", "doctor")[1:] == ("", "")


def test_every_sentence_ends_somewhere_and_every_command_is_one():
    for check, rows in monitor.FINDINGS.items():
        assert rows[-1][1] == "", f"{check}: the last row always holds"
        for bad, _, sentence, mend in rows:
            assert bad in ("ok", "warn", "fail") and sentence
            assert bool(mend) is (bad != "ok")
            words = (
                tuple(re.findall(r"^monitor ([a-z]+)(?: ([a-z]+))?", mend)[0])
                if mend.startswith("monitor ")
                else ()
            )
            assert not words or words in RUNNABLE or words[:1] in RUNNABLE, mend


def test_it_starts_without_what_it_does_not_need(tmp_path):
    """The one who mends must work where a package is missing."""
    code = "import sys; sys.modules['gevent'] = sys.modules['wsproto'] = None; import monitor; monitor.main()"
    environment = clean_environment(MONITOR_SERVER="http://127.0.0.1:9", PYTHONPATH=str(ROOT))
    ran = subprocess.run(
        [sys.executable, "-c", code, "doctor"],
        env=environment,
        capture_output=True,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 1 and b"Traceback" not in ran.stderr
    assert shutil.which("sh") and json.loads(ran.stdout)["ok"] is False
