"""What a shell completes, and the help of each command."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import click
import pytest
from conftest import clean_environment
from test_cli import COMMANDS, PROGRAM, run

LEAVES = {words: made for words, made in COMMANDS.items() if not isinstance(made, click.Group)}
EXAMPLES = {" ".join(words): made for words, made in LEAVES.items() if words != ("routes",)}
OFF = "http://127.0.0.1:9"


def completed(server_url: str, *words: str) -> list[str]:
    """What bash offers for the last of some words."""
    environment = clean_environment(
        _MONITOR_COMPLETE="bash_complete",
        COMP_WORDS=shlex.join(("monitor", *words)),
        COMP_CWORD=str(len(words)),
        MONITOR_SERVER=server_url,
    )
    done = subprocess.run([*PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.partition(",")[2] for line in done.stdout.split()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(shell):
    ran = run("completion", shell)
    assert (ran.status, "_MONITOR_COMPLETE" in ran.out, shell in ran.out) == (0, True, True)


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_bash_takes_the_script():
    done = subprocess.run(["bash", "-n"], input=run("completion", "bash").out, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_options_and_words_are_completed():
    assert {"status", "watch", "wait"} <= set(completed(OFF, ""))
    assert completed(OFF, "task", "sh") == ["show"]
    assert "--attention" in completed(OFF, "task", "list", "--att")
    assert completed(OFF, "task", "list", "--status", "d") == ["done"]


def test_tasks_and_workstreams_are_completed_as_they_are_now(server):
    task = server.new_task("to complete")
    number = str(task["number"])
    for words in (("wait",), ("task", "show"), ("task", "update"), ("log", "m", "--task"), ("link",)):
        assert number in completed(server.url, *words, number[0]), words
    assert completed(server.url, "task", "list", "--workstream", task["workstream_id"][:13]) == [
        task["workstream_id"]
    ]
    assert number in completed(OFF, "--server", server.url, "wait", number)


def test_without_a_server_nothing_is_offered_and_nothing_said():
    assert completed(OFF, "wait", "") == []


def test_hostile_names_do_not_get_into_a_shell(server):
    task = server.new_task("$(touch owned)\n`x`\x1b[2J")
    environment = clean_environment(
        _MONITOR_COMPLETE="zsh_complete",
        COMP_WORDS=f"monitor wait {task['number']}",
        COMP_CWORD="2",
        MONITOR_SERVER=server.url,
    )
    done = subprocess.run([*PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[:2] == ["plain", str(task["number"])]
    assert done.stdout.count("\n") == 3 and "\x1b" not in done.stdout


@pytest.mark.parametrize("words", EXAMPLES)
def test_every_command_has_an_example_that_can_be_typed(words):
    shown = subprocess_help(words)
    example = shown.partition("Example:\n")[2].strip()
    assert example and "\n" not in example
    typed = re.search(rf"\bmonitor ({re.escape(words)}\b.*?)(?= &&| <|$|\)\")", example)[1]
    arguments = shlex.split(typed)[len(words.split()) :]
    if "@last" not in arguments:
        EXAMPLES[words].make_context(words, arguments)


def subprocess_help(words: str) -> str:
    """The help of a command."""
    made = EXAMPLES[words]
    return made.get_help(click.Context(made, info_name=f"monitor {words}", terminal_width=80))
