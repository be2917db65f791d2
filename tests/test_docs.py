"""The documents hold what the code has: routes, commands, settings, and the two commands that matter."""

from __future__ import annotations

import os
import re
import tomllib
from typing import NamedTuple

import click
import pytest
from click.testing import CliRunner
from conftest import ROOT

import monitor

README = (ROOT / "README.md").read_text()
OPTIONS = [setting.name for setting in (*monitor.SETTINGS, *monitor.CLIENT_SETTINGS)]
ALL_SETTINGS = (*monitor.SETTINGS, *monitor.CLIENT_SETTINGS, *monitor.HOOK_SETTINGS)
SETTINGS = [setting.name for setting in ALL_SETTINGS]
VARIABLE = re.compile(r"""environ(?:\.get\(|\[)\s*["'](MONITOR_\w+)""")


class Block(NamedTuple):
    """A fenced block of the README."""

    language: str
    lines: list[str]


BLOCKS = [
    Block(language, text.splitlines())
    for language, text in re.findall(r"^```([a-z]*)\n(.*?)^```$", README, re.M | re.S)
]
COMMANDS = [block for block in BLOCKS if block.language in ("sh", "bash", "console", "")]
TESTING = [block for block in COMMANDS if any("pytest" in line for line in block.lines)]


def every_command(command: click.Command, words: tuple[str, ...] = ()):
    """Yield (words, command) for the commands below a group."""
    for name, below in getattr(command, "commands", {}).items():
        yield (*words, name), below
        yield from every_command(below, (*words, name))


OURS = dict(every_command(monitor.cli))
RUNNABLE = [words for words, command in OURS.items() if not isinstance(command, click.Group)]


def test_the_readme_opens_with_what_monitor_is():
    title, _, rest = README.partition("\n")
    assert title == "# Monitor"
    opening = rest.strip().partition("\n\n")[0].replace("\n", " ")
    assert opening.startswith("Monitor ") and opening.endswith(".") and len(opening) < 400


def test_every_fence_is_closed():
    assert len(re.findall(r"^```", README, re.M)) == 2 * len(BLOCKS)


def test_the_first_command_sets_up_and_serves():
    (line,) = COMMANDS[0].lines
    assert line.startswith("python3 -m venv ")
    assert "pip install" in line and line.endswith("monitor serve")
    assert "[" not in line and "pytest" not in line


def test_the_test_command_sets_up_and_runs_the_tests():
    (line,) = TESTING[0].lines
    assert line.startswith("python3 -m venv ")
    assert "pip install" in line and ".[test]" in line and "pytest" in line
    assert COMMANDS.index(TESTING[0]) == 1


def test_a_command_stands_on_a_line_of_its_own_without_a_prompt():
    for block in (COMMANDS[0], TESTING[0]):
        assert len(block.lines) == 1 and not block.lines[0].endswith("\\")
    prompts = [line for block in COMMANDS for line in block.lines if re.match(r"\s*([$%>#]|>>>) ", line)]
    assert prompts == []


def test_what_the_first_commands_need_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "test" in project["optional-dependencies"]
    assert "monitor" in project["scripts"]
    assert re.search(r"Python 3\.11\b", README) and project["requires-python"] == ">=3.11"


def test_the_ci_runs_the_very_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert TESTING[0].lines[0] in [line.strip() for line in script.read_text().splitlines()]
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize(("method", "rule"), [route[:2] for route in monitor.ROUTES], ids=" ".join)
def test_every_route_is_in_the_readme(method, rule):
    path = re.sub(
        r"<(?:\w+:)?(\w+)>", lambda found: {"reference": "ID"}.get(found[1], found[1].upper()), rule
    )
    if path.startswith("/api/"):
        assert re.search(rf"`{method} {re.escape(path)}`", README), f"{method} {path}"
    else:
        assert re.search(rf"`(?:{method} )?{re.escape(path)}`", README), path


@pytest.mark.parametrize("words", RUNNABLE, ids=" ".join)
def test_every_command_and_its_options_are_in_the_readme(words):
    rows = [row for row in README.splitlines() if re.match(rf"\| `monitor {' '.join(words)}\b", row)]
    assert len(rows) == 1, f"the table of commands has {len(rows)} rows for {' '.join(words)}"
    own = [option.opts[0] for option in OURS[words].params if isinstance(option, click.Option)]
    if words not in (("serve",), ("demo",)):  # the settings have a table of their own
        assert [option for option in own if option not in rows[0] and option not in GLOBAL] == []


GLOBAL = (
    "--server",
    "--token",
    "--quiet",
    "--token-file",
    "--color",
    "--json",
    "--plain",
    "--table",
    "--help",
)


def test_the_global_options_are_in_the_readme():
    assert [option for option in (*GLOBAL[:-1], "--silent") if f"`{option}`" not in README] == []


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_has_help_text(words):
    assert len((OURS[words].help or "").strip()) > 10


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_in_the_readme_with_its_default(name):
    default = {setting.name: setting.default for setting in ALL_SETTINGS}[name]
    (row,) = [row for row in README.splitlines() if row.startswith(f"| `{name}`")]
    assert not default or f"`{default}`" in row


def test_every_variable_that_is_read_is_a_setting_or_in_the_readme():
    read = set(VARIABLE.findall((ROOT / "monitor.py").read_text()))
    assert {name for name in read if name not in SETTINGS and f"`{name}`" not in README} == set()


def test_the_help_of_serve_names_every_setting():
    shown = CliRunner().invoke(monitor.cli, ["serve", "--help"]).output
    assert [name for name in OPTIONS if name not in shown] == []


def test_every_setting_says_what_it_is():
    assert [setting.name for setting in ALL_SETTINGS if not setting.help.endswith(".")] == []


def test_the_readme_names_no_setting_that_is_not_there():
    source = (ROOT / "monitor.py").read_text()
    named = set(re.findall(r"\bMONITOR_[A-Z_]+\b", README)) - set(SETTINGS)
    assert {name for name in named if name not in source} == set()


def test_every_command_that_the_readme_shows_can_be_parsed():
    lines = [
        line for block in COMMANDS for line in block.lines if re.match(r"(?:\S*/)?monitor(?:-cli)? ", line)
    ]
    assert lines
    for line in lines:
        words = tuple(re.findall(r"[a-z-]+", line)[1:])
        assert any(known == words[at : at + len(known)] for known in RUNNABLE for at in (0, 1, 2)), line


def test_relative_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", README)
    targets += re.findall(r"""(?:src|srcset)=["'](?!https?:)([^"']+)""", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []
