"""What the commands print: JSON in a pipe, tables on a terminal, a record a line with --plain."""

from __future__ import annotations

import json
import re

import pytest
import requests
import rig
from test_cli import assert_one_line, run

HOSTILE = "\x1b]0;owned\x07 \u202e evil \x9b31m \u2066 end"
WIDE = "漢字" * 40
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def told(server):
    """A workstream with tasks of all sorts: ordinary, hostile, wide, blocked, with many lines."""
    home = server.post("/api/workstreams", name="Payments API")["id"]
    names = {
        "plain": "Refunds fail",
        "hostile": HOSTILE,
        "wide": WIDE,
        "asks": "Rotate keys",
        "long": "x" * 500,
    }
    tasks = {key: server.new_task(name, home) for key, name in names.items()}
    event = {"session_id": "s-1", "cwd": "/nowhere/shop", "hook_event_name": "Notification"}
    event |= {"notification_type": "permission_prompt", "message": "Claude needs your permission to use Bash"}
    asked = server.ask("POST", f"/api/hooks/claude?task_id={tasks['asks']['id']}", event)
    assert asked.status_code == 204
    server.say(tasks["plain"], "one\ntwo\tthree", level="warn", tags=["a", "b"])
    return {"home": home, **{key: server.get(f"/api/tasks/{task['id']}") for key, task in tasks.items()}}


@pytest.fixture
def shown(server, told):
    """Run a command for the shared server on a terminal."""

    def run_there(*words: str, **options):
        return rig.in_terminal(*words, **({"MONITOR_SERVER": server.url} | options))

    return run_there


def listing(told) -> tuple[str, ...]:
    """The command that lists these tasks."""
    return "task", "list", "--workstream", told["home"]


def test_a_pipe_gets_json_and_a_terminal_a_table(server, told, shown):
    piped, there = run(*listing(told), MONITOR_SERVER=server.url), shown(*listing(told))
    answer = requests.get(f"{server.url}/api/tasks?workstream_id={told['home']}", timeout=10).json()
    assert piped.out == json.dumps(answer, indent=2) + "\n"
    head, *rows = there.out.splitlines()
    assert (there.status, head.split()[:3], len(rows)) == (0, ["TASK", "STATE", "NAME"], answer["total"])
    assert rows[0].split()[:4] == [f"#{told['plain']['number']}", "active", "Refunds", "fail"]


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_table_fits_the_terminal(shown, told, columns):
    lines = shown(*listing(told), columns=columns).out.splitlines()
    assert max(map(rig.columns_of, lines)) <= columns
    starts = {
        rig.columns_of(line[: line.index(word)]) for line, word in ((lines[0], "STATE"), (lines[1], "active"))
    }
    assert len(starts) == 1, "columns stand below each other"
    assert any("…" in line for line in lines)


def test_wide_characters_take_two_columns(shown, told):
    head, *rows = shown(*listing(told), columns=100).out.splitlines()
    wide = next(COLOUR.sub("", row) for row in rows if "漢" in row)
    ordinary = next(COLOUR.sub("", row) for row in rows if "Rotate" in row)
    after = ordinary.index("Claude") if "Claude" in ordinary else None
    assert after is None or rig.columns_of(ordinary[:after]) == rig.columns_of(head[: head.index("ASKS")])
    assert rig.columns_of(wide) <= 100 and wide.count("漢") > 5


@pytest.mark.parametrize("style", ["--table", "--plain"])
def test_stored_text_does_not_steer_the_terminal(server, shown, told, style):
    for words in (listing(told), ("task", "show", told["hostile"]["id"]), ("search", "owned")):
        out = COLOUR.sub("", shown(*words, style).out)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)


def test_only_what_asks_for_attention_is_coloured(shown, told):
    rows = shown(*listing(told)).out.splitlines()
    coloured = [row for row in rows if COLOUR.search(row)]
    assert len(coloured) == 1 and "Rotate" in coloured[0] and "\x1b[35mblocked" in coloured[0]


NO_COLOUR = {
    "NO_COLOR": ((), {"NO_COLOR": "1"}),
    "a dumb terminal": ((), {"TERM": "dumb"}),
    "--color never": (("--color", "never"), {"CLICOLOR_FORCE": "1"}),
    "MONITOR_COLOR": ((), {"MONITOR_COLOR": "never"}),
}


@pytest.mark.parametrize("name", NO_COLOUR)
def test_colour_can_be_had_without(shown, told, name):
    options, settings = NO_COLOUR[name]
    there = shown(*listing(told), *options, **settings)
    assert "blocked" in there.out and not COLOUR.search(there.out)


@pytest.mark.parametrize(
    ("options", "settings"),
    [(("--color", "always"), {"NO_COLOR": "1"}), ((), {"CLICOLOR_FORCE": "1"})],
    ids=["--color always", "CLICOLOR_FORCE"],
)
def test_colour_can_be_had_in_a_pipe(server, told, options, settings):
    piped = run(*listing(told), "--table", *options, MONITOR_SERVER=server.url, **settings)
    assert "\x1b[35mblocked" in piped.out


def test_json_is_never_coloured(server, told):
    piped = run(*listing(told), "--color", "always", MONITOR_SERVER=server.url)
    assert "\x1b" not in piped.out and piped.json["total"] == 5


def test_plain_is_a_record_a_line_with_tabs_and_whole_values(server, told):
    ran = run(*listing(told), "--plain", MONITOR_SERVER=server.url)
    rows = [line.split("\t") for line in ran.out.splitlines()]
    assert len(rows) == 5 and len({len(row) for row in rows}) == 1
    assert rows[0][:3] == [str(told["plain"]["number"]), "active", "Refunds fail"]
    assert rows[0][-1] == told["plain"]["id"] and told["plain"]["updated_at"] in rows[0]
    assert rows[4][2] == "x" * 500


def test_the_style_is_an_option_then_a_variable_then_what_the_output_is(server, told, shown):
    words = ("workstream", "list")
    assert shown(*words, "--json").out.startswith("{")
    assert shown(*words, MONITOR_OUTPUT="json").out.startswith("{")
    assert shown(*words, "--table", MONITOR_OUTPUT="json").out.startswith("WORKSTREAM")
    assert "\t" in run(*words, MONITOR_SERVER=server.url, MONITOR_OUTPUT="plain").out
    assert_one_line(run(*words, MONITOR_SERVER=server.url, MONITOR_OUTPUT="xml"), 2, "json, plain or table")


def test_a_task_is_shown_as_a_block(shown, told):
    there = shown("task", "show", f"#{told['plain']['number']}", columns=100).out
    facts = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in there.partition("\n\n")[0].splitlines())
    assert facts["task"] == f"#{told['plain']['number']}" and facts["name"] == "Refunds fail"
    assert facts["id"] == told["plain"]["id"] and re.fullmatch(r"\d+ [sm]", facts["changed"])
    assert "one two three" in there and "warn" in there


def test_a_task_that_waits_says_for_what(shown, told):
    there = shown("task", "show", told["asks"]["id"]).out
    assert re.search(r"(?m)^asks +.*permission", there) and re.search(r"(?m)^needs +\x1b\[35mblocked", there)


def test_a_task_is_shown_with_its_newest_updates(server, told):
    for number in range(3):
        server.say(told["long"], f"news {number}")
    ran = run("task", "show", told["long"]["id"], "--limit", "2", MONITOR_SERVER=server.url)
    assert [update["message"] for update in ran.json["updates"]] == ["news 2", "news 1"]
    assert ran.json["id"] == told["long"]["id"]


def test_nothing_is_said_in_words(shown):
    assert shown("search", "nosuchwordanywhere").out == "nothing found\n"


SPOKEN = {
    "check": ("check",),
    "config": ("config",),
    "hooks check": ("hooks", "check"),
    "hooks flush": ("hooks", "flush"),
    "link --list": ("link", "--list"),
    "prune": ("prune", "--older-than", "3650d"),
    "session list": ("session", "list"),
    "status": ("status",),
    "task create": ("task", "create", "x"),
    "update manual": ("update", "manual", "--message", "m"),
    "workstream create": ("workstream", "create", "x"),
}


@pytest.mark.parametrize("name", SPOKEN)
def test_no_command_prints_json_at_a_person(shown, told, tmp_path, name):
    words = SPOKEN[name]
    words += ("--workstream", told["home"]) if name == "task create" else ()
    words += ("--task", told["long"]["id"]) if name == "update manual" else ()
    there = shown(*words, HOME=str(tmp_path))
    assert there.status == 0 and there.out.strip()
    assert not re.search(r'^\s*[{}\[\]"]', there.out, re.M), there.out


def test_an_encoding_that_lacks_a_character_is_no_fault(server, told):
    ran = run(*listing(told), "--table", MONITOR_SERVER=server.url, PYTHONIOENCODING="ascii")
    assert ran.status == 0 and ran.error == "" and "Refunds" in ran.out


def test_an_age_is_told_in_one_unit(shown, told):
    since = re.compile(r"\d+ [smhd]\b")
    assert all(since.search(row) for row in shown(*listing(told)).out.splitlines()[1:])


def test_errors_are_a_line_on_a_terminal_too(shown):
    there = shown("task", "show", "999999999")
    assert (there.status, there.out.count("\n")) == (3, 1) and there.out.startswith("monitor: ")
