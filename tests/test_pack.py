"""`monitor pack`: one file that runs where there is only Python, the same from every place it is made in.

With MONITOR_COMMAND, as .ci/run does, tests of the API, the stream and the commands run against such a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import rig
from conftest import ROOT, Server, clean_environment

import monitor

OTHERS = {str(path): path.parts[-3] for path in Path.home().glob(".pyenv/versions/*/bin/python")}
OTHERS |= {f"/usr/bin/python3.{minor}": f"3.{minor}" for minor in range(6, 15)}
OTHERS = {
    path: monitor.version_key(version)[:2] for path, version in OTHERS.items() if os.access(path, os.X_OK)
}
PYTHONS = {sys.version_info[:2]: sys.executable} | {version: path for path, version in OTHERS.items()}
PACKAGES = {"blinker", "click", "flask", "h11", "itsdangerous", "jinja2", "markupsafe", "werkzeug", "wsproto"}


def output(*command: object, status: int = 0, **settings: str) -> str:
    """What a command prints, on both outputs, that ends so."""
    done = subprocess.run(
        [str(word) for word in command],
        env=clean_environment(**settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The file, made by the command of this checkout."""
    path = tmp_path_factory.mktemp("packed") / "monitor.pyz"
    told = json.loads(output(sys.executable, ROOT / "monitor.py", "pack", "--output", path))
    assert told == {"file": str(path), "bytes": path.stat().st_size}
    return path


def serves(path: Path, python: str, database: Path, *options: str, **settings: str) -> str:
    """A server from the file that takes an update and shows it everywhere; what it said at the start."""
    kind = type("Packed", (Server,), {"command": (python, *options, str(path))})
    with rig.serving(kind, database, **settings) as running:
        task = running.new_task()
        with running.follow("?after_seq=0") as follower:
            running.say(task, "hello")
            assert follower.take(1, "update")[0]["message"] == "hello"
        for page in ("/dashboard", "/stream", f"/tasks/{task['id']}"):
            assert running.ask("GET", page).status_code == 200
        style = running.ask("GET", "/static/style.css")
        assert style.content == (ROOT / "static" / "style.css").read_bytes()
        listed = output(python, *options, path, "task", "list", MONITOR_SERVER=running.url)
        assert json.loads(listed)["total"] == 1
        return running.output


# What is in it -------------------------------------------------------------------------------------------


def test_it_holds_us_and_what_we_need_with_source_byte_code_and_licences(packed):
    names = zipfile.ZipFile(packed).namelist()
    modules = {name.partition("/")[0] for name in names if name.endswith("/__init__.py")}
    assert modules == PACKAGES | {"monitor"}
    sources = {name for name in names if name.endswith(".py")}
    assert {f"{name}c" for name in sources} == {name for name in names if name.endswith(".pyc")}
    licences = [name for name in names if "licen" in name.lower()]
    known = {name.partition("-")[0] for name in licences if ".dist-info/" in name}
    assert known == PACKAGES and "monitor/LICENSE" in licences
    files = {
        f"monitor/{folder}/{path.name}"
        for folder in ("static", "templates")
        for path in (ROOT / folder).iterdir()
    }
    assert {"monitor/schema.sql", *files} <= set(names)
    assert [name for name in names if name.endswith((".so", ".pyd", ".c", ".pyi"))] == []


def test_the_byte_code_is_never_checked_and_names_no_place_of_this_machine(packed):
    archive = zipfile.ZipFile(packed)
    codes = [archive.read(name) for name in archive.namelist() if name.endswith(".pyc")]
    assert {code[4:8] for code in codes} == {b"\1\0\0\0"}  # unchecked hash
    assert [code for code in codes if os.fsencode(ROOT) in code or os.fsencode(sys.prefix) in code] == []


def test_it_can_be_run_as_a_program(packed):
    assert packed.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert packed.stat().st_mode & 0o777 == 0o755
    done = subprocess.run(
        ["./monitor.pyz", "--version"],
        cwd=packed.parent,
        env=clean_environment(),
        text=True,
        stdout=subprocess.PIPE,
    )
    assert done.stdout == f"monitor {monitor.__version__}\n"


# The same bytes ------------------------------------------------------------------------------------------


def test_the_same_input_makes_the_same_bytes_also_out_of_the_file_itself(packed, tmp_path):
    output(sys.executable, ROOT / "monitor.py", "pack", "--output", tmp_path / "again", PYTHONHASHSEED="7")
    os.utime(ROOT / "schema.sql")
    output(sys.executable, "-S", "-I", packed, "pack", "--output", tmp_path / "out of it")
    assert digest(tmp_path / "again") == digest(tmp_path / "out of it") == digest(packed)


def test_a_file_that_is_there_is_replaced_at_once_or_not_at_all(tmp_path):
    (tmp_path / "monitor.pyz").write_bytes(b"old")
    ran = rig.command("pack", "--output", str(tmp_path / "monitor.pyz" / "below"))
    assert ran.status == 1 and rig.one_sentence(ran.error)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("monitor.pyz", b"old")]


def test_what_is_not_installed_is_named_with_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "PACKED", ("click", "no-such-package"))
    ran = rig.command("pack", "--output", str(tmp_path / "monitor.pyz"))
    assert ran.status == 1 and rig.one_sentence(ran.error) and "pip install no-such-package" in ran.error
    assert list(tmp_path.iterdir()) == []


def test_a_python_in_a_folder_with_a_blank_packs_too(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "a b" / "python"))
    ran = rig.command("pack", "--output", str(tmp_path / "monitor.pyz"))
    assert (ran.status, ran.error) == (0, "")


# Where it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("python", [path for version, path in PYTHONS.items() if version >= (3, 11)])
def test_it_serves_where_there_is_only_python(packed, tmp_path, python):
    assert "threads" in serves(packed, python, tmp_path / "monitor.db", "-S", "-I")


def test_it_uses_the_gevent_of_its_host(packed, tmp_path):
    pytest.importorskip("gevent")
    assert "gevent" in serves(packed, sys.executable, tmp_path / "monitor.db")


@pytest.mark.parametrize("python", [path for version, path in PYTHONS.items() if version < (3, 11)])
def test_an_older_python_is_told_so(packed, python):
    said = output(python, packed, "serve", status=1)
    assert said.startswith("monitor: this is Python ") and said.endswith("needs 3.11 or newer\n")
    assert said.count("\n") == 1


def test_it_installs_a_hook_that_works_without_it(packed, server, tmp_path):
    output(sys.executable, "-S", packed, "hooks", "install", "claude", "--yes", HOME=str(tmp_path))
    settings = json.loads((tmp_path / ".claude" / "settings.json").read_text())
    command = settings["hooks"]["UserPromptSubmit"][0]["hooks"][0]["command"]
    assert "monitor.pyz" not in command and str(packed) not in command
    payload = {
        "hook_event_name": "UserPromptSubmit",
        "session_id": tmp_path.name,
        "prompt": "from a pyz",
        "cwd": "/",
    }
    for words in (["sh", "-c", command], [sys.executable, "-S", packed, "hook", "claude"]):
        payload["session_id"] += "x"
        environment = clean_environment(MONITOR_SERVER=server.url)
        done = subprocess.run(
            [str(word) for word in words],
            input=json.dumps(payload),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        (run,) = [
            run
            for run in server.get("/api/sessions")["items"]
            if run["source"] == f"claude:{payload['session_id']}"
        ]
        assert server.get("/api/updates", task_id=run["task_id"])["total"] == 1


def test_it_runs_commands(packed, server, task):
    words = (sys.executable, "-S", packed, "run", "--task", task["id"], "--", "sh", "-c", "echo out; exit 3")
    assert output(*words, status=3, MONITOR_SERVER=server.url) == "out\n"
    assert server.get("/api/updates", task_id=task["id"])["total"] == 2


def test_a_server_with_a_certificate_that_nobody_vouches_for_is_told_in_a_sentence(packed, tmp_path):
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl")
    names = {"-keyout": tmp_path / "key", "-out": tmp_path / "certificate", "-subj": "/CN=localhost"}
    words = [str(word) for pair in names.items() for word in pair]
    output("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *words)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    seen = []

    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                context.wrap_socket(connection, server_side=True).close()
            except OSError as error:
                seen.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        url = f"https://localhost:{listener.getsockname()[1]}"
        said = output(sys.executable, "-S", packed, "task", "list", "--server", url, status=5)
        thread.join(10)
    assert said.startswith("monitor: ") and said.count("\n") == 1
    assert "unknown ca" in seen[0] or "unknown CA" in seen[0]  # it has looked, and at certificates


# With gevent inside --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The file with gevent inside."""
    pytest.importorskip("shiv")
    pytest.importorskip("gevent")
    path = tmp_path_factory.mktemp("native") / "monitor.pyz"
    output(sys.executable, ROOT / "monitor.py", "pack", "--native", "--output", path)
    return path


def test_the_native_one_serves_under_gevent(native, tmp_path):
    assert "gevent" in serves(native, sys.executable, tmp_path / "monitor.db", "-S", "-I", HOME=str(tmp_path))


def test_the_native_one_is_the_same_each_time(native, tmp_path):
    output(sys.executable, ROOT / "monitor.py", "pack", "--native", "--output", tmp_path / "again")
    assert digest(tmp_path / "again") == digest(native)


def test_without_shiv_it_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "shiv.cli", None)
    ran = rig.command("pack", "--native", "--output", str(tmp_path / "monitor.pyz"))
    assert ran.status == 1 and rig.one_sentence(ran.error) and "pip install shiv" in ran.error
