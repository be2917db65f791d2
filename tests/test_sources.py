"""A coding agent's hook payload becomes an update that a person understands, whatever the payload looks like.

Each file of payloads/AGENT is a case: what it sent, and what is expected. Each sequence is a recorded run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor import AGENTS, agent_draft, dig, one_line, session_facts

PAYLOADS = Path(__file__).parent / "payloads"
FILES = [path for agent in AGENTS for path in sorted((PAYLOADS / agent).glob("*.json"))]
CASES = {f"{path.parent.name}/{path.stem}": json.loads(path.read_text()) for path in FILES}
RUNS = {f"{path.parent.parent.name}/{path.stem}": path for path in PAYLOADS.glob("*/sequences/*.jsonl")}
CLAUDE_EVENTS = """
    PreToolUse PostToolUse PostToolUseFailure PostToolBatch Notification UserPromptSubmit UserPromptExpansion
    SessionStart SessionEnd Stop StopFailure SubagentStart SubagentStop PreCompact PostCompact PreModelSwitch
    PostModelSwitch PermissionRequest PermissionDenied Setup TeammateIdle TaskCreated TaskCompleted
    Elicitation ElicitationResult ConfigChange WorktreeCreate WorktreeRemove InstructionsLoaded CwdChanged
    FileChanged DirectoryAdded MessageDisplay
"""
TEXT = st.text(st.characters(exclude_categories=[]), max_size=20) | st.sampled_from(
    ["\x1b[31mred", "\u202eevil", "a\n\nb", " \t ", "<: {prompt}>", "*" * 5000, "unknown", "[[", '{"a": "b"}']
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def draft_of(case: dict):
    """The draft of a case."""
    return agent_draft(case["agent"], case["payload"], case.get("event"))


def drafts_of(run: str):
    """The drafts of a recorded run, in its order."""
    lines = RUNS[run].read_text().splitlines()
    return [agent_draft(run.partition("/")[0], json.loads(line)["payload"]) for line in lines]


def places(value, way=()):
    """Every way into a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(deeper for key, part in inside for deeper in places(part, (*way, key)))]


def replaced(value, way, new):
    """The JSON value with something else at one place."""
    if not way:
        return new
    changed = value.copy()
    changed[way[0]] = replaced(value[way[0]], way[1:], new)
    return changed


@pytest.mark.parametrize("name", CASES)
def test_a_payload_becomes_the_expected_update(name):
    case, draft = CASES[name], draft_of(CASES[name])
    made = {field: getattr(draft, field) for field in case["expect"]} | {"tags": list(draft.tags)}
    assert made == case["expect"], case["note"]


@pytest.mark.parametrize("event", CLAUDE_EVENTS.split())
def test_every_event_of_claude_code_has_a_case(event):
    assert any(dig(case, "payload", "hook_event_name") == event for case in CASES.values())


@pytest.mark.parametrize("run", RUNS)
def test_a_recorded_run_is_one_session_from_its_start_to_its_end(run):
    drafts = drafts_of(run)
    assert (drafts[0].kind, drafts[-1].kind, drafts[-1].state) == ("session_start", "session_end", "ended")
    assert len({draft.source for draft in drafts}) == 1


def test_a_session_is_blocked_until_its_permission_is_answered():
    states = [draft.state for draft in drafts_of("claude/tui_perm_default")]
    assert states[2:10] == ["working", "working", "blocked", "blocked", "working", "working", None, "idle"]


def test_a_subagent_does_not_change_the_state_of_its_session():
    states = [draft.state for draft in drafts_of("claude/agent")]
    assert states[3:11] == ["working", None, None, None, None, None, "working", "working"]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.sampled_from(sorted(AGENTS)), st.data())
def test_no_value_of_any_field_breaks_an_adapter(name, agent, data):
    case = CASES[name]
    way = data.draw(st.sampled_from(places(case["payload"])))
    payload = replaced(case["payload"], way, data.draw(ANYTHING))
    draft = agent_draft(agent, payload, case.get("event"))
    assert 0 < len(draft.message) <= 300 and draft.message == one_line(draft.message, 300)
    assert draft.level in ("info", "warn", "error") and draft.kind and isinstance(draft.keep, bool)
    assert draft.state in ("blocked", "idle", "working", "ended", None)
    assert all(tag and tag == one_line(tag) for tag in draft.tags)
    assert draft.source.startswith(f"{agent}:") and draft.source == one_line(draft.source)
    json.dumps([draft.data, draft.message, draft.tags]).encode()
    assert all(isinstance(value, str) for value in session_facts(agent, payload).values())


def test_the_update_carries_the_payload_as_it_was_sent_but_no_address_of_a_person():
    sent = {"hook_event_name": "stop", "conversation_id": "c1", "user_email": "dev@example.com"}
    assert agent_draft("cursor", sent).data == {"hook_event_name": "stop", "conversation_id": "c1"}
    assert agent_draft("claude", [1, 2]).data == [1, 2]


@pytest.mark.parametrize(
    ("name", "session", "event"),
    [
        ("claude/PreToolUse-1", "0a28cb74-662a-43bd-aba2-e3d45122d31b", "PreToolUse"),
        ("codex/notify-1", "01a202a6-6515-73c2-b4fb-bec759b34e67", "Stop"),
        ("gemini/AfterTool-1", "f7e3052e-5330-4ba2-b9e2-ef48fa67f75c", "PostToolUse"),
        ("copilot/userPromptSubmitted-1", "970808f8-03ee-4407-bbe4-5ad3a863e19f", "UserPromptSubmit"),
        (
            "copilot/Stop-2",
            "3128bddf-4618-4726-b7ed-6fb6a35d37f9",
            "Stop",
        ),  # a subagent's: its parent's session
        ("cursor/prompt", "c0ffee00-1111-4222-8333-abcdefabcdef", "UserPromptSubmit"),
    ],
)
def test_the_facts_of_a_session_are_found_in_every_agents_words(name, session, event):
    facts = session_facts(CASES[name]["agent"], CASES[name]["payload"])
    assert (facts["session_id"], facts["event"]) == (session, event)
    assert facts["cwd"].startswith("/") and "reason" not in facts


def test_digging_gives_what_is_of_the_kind_and_else_the_default():
    assert dig({"a": [{"b": "x"}]}, "a", 0, "b") == "x"
    assert dig({"a": 1}, "a") == dig("abc", 0) == ""
    assert dig({"a": True}, "a", kind=int) is None
    assert dig({}, "a", "b", kind=list, default=[]) == []


def test_one_line_is_the_first_that_says_something():
    assert one_line("\n \n first \nsecond") == "first"
    assert one_line("a\tb\x00\u202ec\x1b[1;31md\x1b[0m") == "a bcd"
    assert one_line("x" * 300) == "x" * 239 + "…"
    assert one_line("") == ""
