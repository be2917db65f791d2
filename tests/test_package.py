"""The package: what the wheel holds, that it works without a checkout, that Flask's command finds us."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest
from conftest import ROOT, Server, clean_environment

NEWER = [f"python3.{minor}" for minor in range(sys.version_info.minor + 1, 15)]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def output(*command: object, folder=None, **settings: str) -> str:
    """The output of a command that succeeds."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=clean_environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout. With hatchling at hand it is built without asking a package index."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip")
    folder = tmp_path_factory.mktemp("wheel")
    apart = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    output(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *apart, "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the programs of a fresh venv that holds the wheel and sees our dependencies."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    programs = folder / "bin"
    packages = output(
        programs / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"
    ).strip()
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    with open(os.path.join(packages, "dependencies.pth"), "w") as file:
        file.write("\n".join(sorted(seen)) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps")
    output(*pip, "--no-index", "--ignore-installed", wheel)
    return programs


def test_the_wheel_holds_the_module_and_all_its_files(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = ("templates", "static")
    files = {f"monitor/{name}/{path.name}" for name in folders for path in (ROOT / name).iterdir()}
    assert held >= {"monitor/__init__.py", "monitor/schema.sql"} | files
    strays = {name for name in held if not name.startswith("monitor/") and ".dist-info/" not in name}
    assert strays == set()


def test_the_wheel_has_both_programs(wheel):
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")]
    entries = zipfile.ZipFile(wheel).read(name).decode().split()
    assert "".join(entries) == "[console_scripts]monitor=monitor:mainmonitor-cli=monitor:main"


def test_both_programs_are_installed(installed, tmp_path):
    versions = {output(installed / name, "--version", folder=tmp_path) for name in ("monitor", "monitor-cli")}
    assert len(versions) == 1 and versions.pop().startswith("monitor ")


def test_the_installed_program_serves_from_an_empty_folder(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Server, "command", (str(installed / "monitor"),))
    running = Server("monitor.db")
    try:
        page = running.ask("GET", "/dashboard", headers={"Accept": "text/html"})
        style = running.ask("GET", "/static/style.css")
        made = output(installed / "monitor-cli", "workstream", "create", "x", MONITOR_SERVER=running.url)
    finally:
        assert running.stop(signal.SIGINT) == 0
    assert (page.status_code, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert re.search(r'href="/static/style\.css\b', page.text)
    assert (style.status_code, style.content) == (200, (ROOT / "static" / "style.css").read_bytes())
    assert '"name": "x"' in made
    assert "monitor workstream create" in running.output and str(ROOT) not in running.output


def test_the_installed_program_shows_its_demo(installed, tmp_path, monkeypatch):
    """The story is a file of the package too."""
    code = "import monitor; print(monitor.__file__, len(monitor.asset('templates', 'demo.jsonl')))"
    file, size = output(installed / "python", "-c", code, folder=tmp_path).rsplit(maxsplit=1)
    assert str(ROOT) not in file and int(size) == (ROOT / "templates" / "demo.jsonl").stat().st_size


def test_the_installed_program_packs_the_same_file_as_a_checkout(installed, tmp_path):
    output(installed / "monitor", "pack", "--output", tmp_path / "installed", folder=tmp_path)
    output(sys.executable, ROOT / "monitor.py", "pack", "--output", tmp_path / "checkout", folder=tmp_path)
    assert (tmp_path / "installed").read_bytes() == (tmp_path / "checkout").read_bytes()


def test_the_script_and_the_package_need_the_same():
    """`uv run monitor.py` reads the block at the top of the script, pip reads pyproject.toml."""
    block = re.search(r"^# /// script$(.*?)^# ///$", (ROOT / "monitor.py").read_text(), re.M | re.S)[1]
    script = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    project = PYPROJECT["project"]
    assert sorted(script["dependencies"]) == sorted(project["dependencies"])
    assert script["requires-python"] == project["requires-python"]


# Flask's own command -----------------------------------------------------------------------------------


def flask(*arguments: str, folder=None, **settings: str) -> str:
    """The output of `flask --app monitor ARGUMENTS`."""
    command = (sys.executable, "-m", "flask", "--app", "monitor", *arguments)
    return output(*command, folder=folder, PYTHONPATH=str(ROOT), **settings)


def test_flask_lists_our_commands_beside_its_own(tmp_path):
    helped = flask("--help", folder=tmp_path)
    commands = dict(re.findall(r"^  ([a-z]+) {2,}(.+)$", helped.partition("Commands:")[2], re.M))
    assert {"serve", "demo", "workstream", "task", "update"} <= set(commands)
    own = ("development server", "shell in the app context", "routes for the app")
    assert all(words in commands[name] for name, words in zip(("run", "shell", "routes"), own, strict=True))


def test_our_commands_run_under_flask_with_global_options_after_the_command(server, tmp_path):
    listed = flask("workstream", "list", "--server", server.url, folder=tmp_path)
    assert '"items"' in listed and '"total"' in listed
    assert flask("workstream", "list", "--quiet", folder=tmp_path, MONITOR_SERVER=server.url) == ""


def test_flask_opens_no_database_before_the_first_request(tmp_path):
    routes = flask("routes", folder=tmp_path, MONITOR_DB="no/such/folder/monitor.db")
    assert "/api/updates/manual" in routes and "/dashboard" in routes
    assert list(tmp_path.iterdir()) == []


# Newer Pythons -----------------------------------------------------------------------------------------


def runs(python: str, code: str, *options: str) -> bool:
    """Whether another Python is there and runs `code` without an error."""
    found = shutil.which(python)
    if not found:
        return False
    environment = clean_environment(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH="")
    done = subprocess.run(
        [found, *options, "-c", code], capture_output=True, cwd=ROOT, env=environment, timeout=60
    )
    return done.returncode == 0


@pytest.mark.parametrize("python", NEWER)
def test_a_newer_python_compiles_it_without_a_warning(python):
    if not runs(python, "pass"):
        pytest.skip(f"{python} does not run here")
    assert runs(python, "compile(open('monitor.py').read(), 'monitor.py', 'exec')", "-W", "error")


@pytest.mark.parametrize("python", NEWER)
def test_a_newer_python_serves(python, tmp_path, monkeypatch):
    if not runs(python, "import click, flask, requests"):
        pytest.skip(f"{python} does not run here, or has none of the dependencies")
    monkeypatch.setattr(Server, "command", (python, str(ROOT / "monitor.py")))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    running = Server(tmp_path / "monitor.db")
    try:
        assert running.say(running.new_task(), "hello")["message"] == "hello"
        assert running.ask("GET", "/dashboard").status_code == 200
    finally:
        assert running.stop() == 0
