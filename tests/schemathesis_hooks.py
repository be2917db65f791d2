"""What schemathesis cannot know: SCHEMATHESIS_HOOKS names this file. Nothing is left out of any check."""

from __future__ import annotations

import json
import re

import schemathesis
from conftest import ROOT  # noqa: F401 (it makes ours importable)
from hypothesis import strategies as st

import monitor

TEXT = st.text(max_size=10)
VALUE = st.none() | st.integers() | TEXT | st.lists(TEXT, max_size=3)
PAYLOAD = st.dictionaries(TEXT, VALUE, max_size=4).map(json.dumps)
AGENT = st.sampled_from(["claude", "codex", "gemini", "copilot", "cursor"])
schemathesis.openapi.format("spooled-hook", st.builds("agent: {}\n\n{}".format, AGENT, PAYLOAD))
EXPORT = json.loads(monitor.asset("templates", "openapi.json"))["routes"]["POST /api/admin/import"]
EXPORT = EXPORT["requestBody"]["content"]["application/x-ndjson"]["example"]
schemathesis.openapi.format("export", st.just(EXPORT))


@schemathesis.serializer("application/x-ndjson")
def lines(context, value):
    """NDJSON goes out as it stands."""
    return value.encode("utf-8", "replace") if isinstance(value, str) else json.dumps(value).encode()


def kept(value):
    """A JSON value with no integer beyond 64 bits: that is refused in digits, taken as 1e30; no schema can
    tell these two apart."""
    if isinstance(value, dict):
        return {name: kept(part) for name, part in value.items()}
    if isinstance(value, list):
        return [kept(part) for part in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return float(max(-(10**300), min(10**300, value)))
    return value


@schemathesis.hook
def before_call(context, case, kwargs):
    """A stream would never end: `poll` is true unless it is something that must be refused; nor does it wait
    for a task longer than it waits for an answer."""
    query = dict(case.query or {})
    if "wait_for" in query and re.fullmatch(r"-?[0-9]+", str(query.get("timeout", 0))):
        case.query = query | {"timeout": 0}
    if case.operation.path == "/api/stream" and case.method == "GET":
        query = dict(case.query or {})
        if query.get("poll", False) in (False, 0, "false", "0"):
            case.query = query | {"poll": "true"}
    form = case.media_type == "application/x-www-form-urlencoded"
    if form and isinstance(case.body, dict) and case.meta and case.meta.generation.mode.is_positive:
        case.body = case.body | {"payload": json.dumps(case.body.get("payload"))}  # it must be JSON in a form
    elif isinstance(case.body, (dict, list, int)):
        case.body = kept(case.body)
