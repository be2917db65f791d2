# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "flask>=3.1.3", "werkzeug>=3.1.6", "flask-sock>=0.7", "gevent>=25.4.1", "click>=8.2", "requests>=2.32.4"
# ]
# ///
"""Monitor: a local-first monitor of development work.

Workstreams hold tasks; every task has an append-only thread of updates from people, coding agents and CI.
The file, top to bottom (each section has a banner of its own):

    errors       Problem: the one way to say no, the same for the API, the pages and the command line
    config       settings as data, and the frozen Config made from the environment
    validation   JSON from outside, field tables, clean()
    redaction    what looks like a secret is masked (pure)
    agents       hook payloads of coding agents -> Draft of an update (pure)
    github       GitHub webhook payloads -> Draft of an update (pure)
    log          ids, frames, filters, the objects that clients know (pure)
    store        all the SQL there is: reading, and writing inside a transaction
    database     the file, its connections, the one writer with group commit
    stream       the ring of newest frames, the wake-up, follow(): a subscriber is a cursor into the log
    monitor      the operations: everything that API, pages and commands do
    guard        who may ask: Host, Origin, bearer token
    web          API routes, stream, pages, create_app()
    server       the WSGI server with limits and time-outs, gevent first, threads without it
    cli          the click commands and the HTTP client behind them
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import errno
import functools
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import os
import random
import re
import secrets
import sqlite3
import sys
import tempfile
import threading
import time
import types
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import click

__version__ = "0.1.0"


def lazy(name: str):
    """Return the module `name`, imported at its first use: a client command must not pay for Flask."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        return None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


flask = lazy("flask")


@functools.cache
def asset(*parts: str) -> bytes:
    """Return a file that ships beside this module; FileNotFoundError where there is none. Through the
    module's loader: a checkout, a wheel and a zip are the same to it (Flask's own folders do not work in a
    zip)."""
    try:
        return __loader__.get_data(os.path.join(os.path.dirname(os.path.abspath(__file__)), *parts))
    except OSError as error:
        raise FileNotFoundError(os.path.join(*parts)) from error


# ======================================================================================================
# errors: the one way to say no
# ======================================================================================================

STATUS_OF = {
    "invalid_input": 400, "unauthorized": 401, "forbidden": 403, "not_found": 404, "method_not_allowed": 405,
    "timed_out": 408, "conflict": 409, "too_large": 413, "unsupported_media_type": 415,
    "too_many_requests": 429, "internal_error": 500, "server_misconfigured": 500, "unavailable": 503,
}  # fmt: skip


class Problem(Exception):
    """An error for the reader: a code of STATUS_OF, one sentence, and the field that it is about."""

    def __init__(self, code: str, message: str, field: str | None = None):
        super().__init__(message)
        self.code, self.message, self.field = code, message, field

    @property
    def status(self) -> int:
        """The HTTP status that goes with the code."""
        return STATUS_OF[self.code]

    def body(self) -> dict[str, str]:
        """The JSON body that tells it."""
        body = {"error": self.code, "message": self.message}
        return body | {"field": self.field} if self.field else body


def invalid(message: str, field: str | None = None) -> Problem:
    """The Problem of bad input."""
    return Problem("invalid_input", message, field)


def misconfigured(message: str) -> Problem:
    """The Problem of a server that cannot start."""
    return Problem("server_misconfigured", message)


# ======================================================================================================
# config: settings as data
# ======================================================================================================


class Setting(NamedTuple):
    """One environment variable: its name, default, and what it is for."""

    name: str
    default: str
    help: str


SETTINGS = (
    Setting("MONITOR_BIND", "127.0.0.1:3000", "Address and port to listen on."),
    Setting("MONITOR_DB", "sqlite:monitor.db?mode=rwc", "Database: a path, sqlite:PATH, sqlite::memory:."),
    Setting("MONITOR_AUTH_MODE", "relaxed", "relaxed: reads are open; strict: reads need a token too."),
    Setting("MONITOR_API_TOKENS", "", "Tokens that may write, comma separated; none: writes are open."),
    Setting("MONITOR_ALLOWED_HOSTS", "", "More names that this server answers to, comma separated."),
    Setting("MONITOR_REDACT", "on", "off: strings that look like secrets are stored as they come."),
    Setting("MONITOR_RETENTION", "", "Age at which updates go, as 90d; data:30d drops their data only."),
)
CLIENT_SETTINGS = (
    Setting("MONITOR_SERVER", "http://127.0.0.1:3000", "The server that the commands talk to."),
    Setting("MONITOR_TOKEN", "", "The token that the commands send."),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a server needs to know. Made by `Config.load`; every value has been checked."""

    host: str
    port: int
    database: str | None  # a path; None: a private temporary file
    auth_mode: str
    tokens: tuple[bytes, ...]
    allowed_hosts: tuple[str, ...] = ()
    redact: bool = True
    retention: tuple[tuple[bool, datetime.timedelta], ...] = ()  # (only the data, age)

    @classmethod
    def load(cls, given: dict[str, str | None] | None = None) -> Config:
        """Read the settings: `given` by name, else from the environment. Problem for what makes no sense."""
        given = given or {}
        values = {name: given.get(name) or os.environ.get(name) or default for name, default, _ in SETTINGS}
        host, port = parse_bind(values["MONITOR_BIND"])
        for name, words in (("MONITOR_AUTH_MODE", ("relaxed", "strict")), ("MONITOR_REDACT", ("on", "off"))):
            values[name] = values[name].strip().lower()
            if values[name] not in words:
                raise misconfigured(f"{name} is {values[name]!r}; it must be {' or '.join(words)}")
        return cls(
            host,
            port,
            parse_database(values["MONITOR_DB"]),
            values["MONITOR_AUTH_MODE"],
            tuple(token.encode() for token in split_list(values["MONITOR_API_TOKENS"])),
            tuple(name.lower() for name in split_list(values["MONITOR_ALLOWED_HOSTS"])),
            values["MONITOR_REDACT"] == "on",
            tuple(parse_retention(rule) for rule in split_list(values["MONITOR_RETENTION"])),
        )


def parse_age(text: str) -> datetime.timedelta:
    """An age such as 30d, 12h or 45m; Problem (invalid_input) when it is none."""
    found = re.fullmatch(r"([0-9]{1,5})([dhm])", text.strip(), re.ASCII)
    if not found:
        raise invalid(f"{text[:40]!r} is not an age; it must look like 30d, 12h or 45m", "older_than")
    return datetime.timedelta(**{{"d": "days", "h": "hours", "m": "minutes"}[found[2]]: int(found[1])})


def parse_retention(rule: str) -> tuple[bool, datetime.timedelta]:
    """One rule of MONITOR_RETENTION: whether only the data goes, and at what age."""
    try:
        return rule.startswith("data:"), parse_age(rule.removeprefix("data:"))
    except Problem:
        raise misconfigured(f"MONITOR_RETENTION is {rule!r}; it must look like 90d or data:30d") from None


def split_list(text: str) -> list[str]:
    """Split at commas; blanks around the entries and empty entries are dropped."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def parse_bind(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`; Problem (server_misconfigured) when it is neither."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s]*)):([0-9]{1,5})", text.strip())
    if not found or int(found[3]) > 65535:
        raise misconfigured(f"MONITOR_BIND is {text!r}; it must look like 127.0.0.1:3000")
    return found[1] or found[2] or "0.0.0.0", int(found[3])


def parse_database(text: str) -> str | None:
    """The path in PATH, sqlite:PATH?query or, for the absolute /PATH, sqlite:///PATH; None: in memory."""
    path = text = text.strip()
    if text.startswith("sqlite:"):
        path = text.removeprefix("sqlite:").partition("?")[0]
        path = path[2:] if path.startswith("//") else path
    if not path or "\0" in path:
        raise misconfigured(f"MONITOR_DB is {text!r}; it must name a file, as sqlite:monitor.db")
    return None if path == ":memory:" and text != path else path


# ======================================================================================================
# validation: JSON from outside, field tables
# ======================================================================================================

MAX_BODY = 1024 * 1024
MAX_WEBHOOK = 25 * 1024 * 1024
MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1


def timestamp(moment: datetime.datetime | None = None) -> str:
    """RFC 3339 in UTC with microseconds, ending in Z: sorts as text."""
    moment = moment or datetime.datetime.now(datetime.UTC)
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")[:26] + "Z"


ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # made once: json.dumps makes one a call


def dump(value: Any) -> str:
    """Serialise to compact ASCII JSON: U+2028 breaks some SSE clients, NaN and Infinity break them all."""
    return ENCODER.encode(value)


def parse_json(raw: bytes) -> Any:
    """Parse a JSON text in UTF-8. Problem for what could not be stored and given back: also NaN, numbers
    that overflow to infinity (json.loads("1e999") gives one, and one stored breaks every list that holds
    it), integers beyond 64 bits, more than 64 levels, NUL (SQL functions cut strings there), lone
    surrogates."""
    try:
        text = raw.decode("utf-8")
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and any(
            itertools.islice(nested(value), MAX_DEPTH, None)
        ):
            raise RecursionError
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8") from None
    except RecursionError:
        raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if "\\u" in text and re.search(r"\\u(0000|[dD][89a-fA-F])", text):
        check_strings(value)
    return value


def parse_integer(digits: str) -> int:
    """Read a JSON integer; ValueError beyond 64 bits."""
    if len(digits) > 20 or not -MAX_INTEGER - 1 <= int(digits) <= MAX_INTEGER:
        raise ValueError(f"the number {digits[:24]}... does not fit 64 bits")
    return int(digits)


def parse_float(digits: str) -> float:
    """Read a JSON number; ValueError when it is not finite."""
    if not abs(float(digits)) <= sys.float_info.max:
        raise ValueError(f"the number {digits[:24]} is not finite")
    return float(digits)


DECODER = json.JSONDecoder(parse_int=parse_integer, parse_float=parse_float, parse_constant=parse_float)


def nested(value: Any) -> Iterator[list[Any]]:
    """Yield, level by level, the dicts and lists in a value; without recursion."""
    level = [value]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        yield level
        level = [child for node in level for child in (node.values() if isinstance(node, dict) else node)]


def check_strings(value: Any) -> None:
    """Problem (invalid_input) when a string or key at any depth holds NUL or a lone surrogate."""
    for node in itertools.chain.from_iterable(nested([value])):
        for text in [*node, *node.values()] if isinstance(node, dict) else node:
            if isinstance(text, str):
                check_text(text)


def check_text(text: str, field: str | None = None) -> str:
    """Return `text`; Problem (invalid_input) when it holds NUL or a lone surrogate."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise invalid(f"{field or 'text'} must hold neither NUL nor lone surrogates", field)
    return text


class Field(NamedTuple):
    """A field of a body or query: its checker (value, name -> value), its JSON schema, whether it must be."""

    check: Callable[[Any, str], Any]
    schema: dict[str, Any]
    required: bool = False
    text: str = ""


class QueryText(str):
    """A value from a query string or form: there `true` is a boolean's only spelling."""


def wrong(name: str, sentence: str) -> Problem:
    """The Problem of a field: `name` and what it must be."""
    return invalid(f"{name} must {sentence}", name)


def field_from(read: Callable[[Any], Any], sentence: str, schema: dict[str, Any]) -> Field:
    """A field that `read` makes its value of; None says that it is not what it must be."""

    def check(value: Any, name: str) -> Any:
        if (found := read(value)) is None:
            raise wrong(name, sentence)
        return found

    return Field(check, schema)


def field_of(kind: type, word: str) -> Field:
    """A field of a JSON type; of `object` any value (parse_json has refused what cannot be stored)."""
    schema = {"type": word.split()[-1]} if word else {}
    return field_from(lambda value: value if isinstance(value, kind) else None, f"be {word}", schema)


def text_field(limit: int, required: bool = False, empty: bool = False) -> Field:
    """A string of 1 (0 where `empty` is allowed) to `limit` characters."""

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str):
            raise wrong(name, "be a string")
        if len(value) > limit:
            raise wrong(name, f"have at most {limit} characters")
        if not empty and not value.strip():
            raise wrong(name, "not be empty")
        return check_text(value, name)

    length = {"maxLength": limit} | ({} if empty else {"minLength": 1})
    return Field(check, {"type": "string"} | length, required)


def choice_field(*words: str) -> Field:
    """One of a few words."""
    sentence = f"be one of {', '.join(words)}"
    return field_from(lambda value: value if value in words else None, sentence, {"enum": list(words)})


def flag_field() -> Field:
    """A JSON boolean; in a query `true` or `false`."""
    flags = {"true": True, "1": True, "false": False, "0": False}

    def read(value: Any) -> bool | None:
        value = flags.get(value.lower()) if isinstance(value, QueryText) else value
        return value if isinstance(value, bool) else None

    return field_from(read, "be true or false", {"type": "boolean"})


def tags_field(most: int = 100, limit: int = 200) -> Field:
    """A list of at most `most` strings of at most `limit` characters; doubles are dropped."""
    entry = text_field(limit)

    def check(value: Any, name: str) -> list[str]:
        if not isinstance(value, list) or len(value) > most:
            raise wrong(name, f"be a list of at most {most} strings")
        return list(dict.fromkeys(entry.check(tag, name) for tag in value))

    return Field(check, {"type": "array", "items": entry.schema, "maxItems": most})


def reference_field() -> Field:
    """What names a task or workstream: a UUID, a task's number, or 4 or more first digits of a UUID."""

    def read(value: Any) -> str | None:
        fits = isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}|[0-9a-fA-F-]{4,36}", value)
        return value.lower() if fits else None

    sentence = "be a string: an id, a number, or 4 or more first digits of an id"
    return field_from(read, sentence, {"type": "string"})


def number_field(least: int = 0, most: int = MAX_INTEGER) -> Field:
    """A whole number in a query; what lies outside `least`..`most` is clamped."""

    def read(value: str) -> int | None:
        fits = re.fullmatch(r"-?[0-9]{1,40}" if least else r"[0-9]{1,40}", value, re.ASCII)
        return min(max(int(value), least), most) if fits else None

    return field_from(read, "be a whole number", {"type": "integer", "minimum": least})


def time_field() -> Field:
    """An RFC 3339 time in a query (UTC where it names no zone), normalised to sort as text."""

    def read(value: str) -> str | None:
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.datetime.fromisoformat(value)
            return timestamp(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))

    sentence = "be a time such as 2026-01-31T09:30:00Z"
    return field_from(read, sentence, {"type": "string", "format": "date-time"})


Fields = dict[str, Field]

FIELD_KINDS = {
    "any": lambda: field_of(object, ""),
    "choice": lambda words: choice_field(*words),
    "flag": flag_field,
    "number": number_field,
    "object": lambda: field_of(dict, "an object"),
    "reference": reference_field,
    "tags": tags_field,
    "text": text_field,
    "time": time_field,
}
FIELDS = {  # what a field takes, and what it is for
    name: FIELD_KINDS[kind](**limits)._replace(text=text)
    for name, (kind, limits, text) in json.loads(asset("templates", "fields.json")).items()
}


def fields(names: str) -> Fields:
    """The field table of a body or query; a name with `!` must be there."""
    return {
        name.rstrip("!"): FIELDS[name.rstrip("!")]._replace(required="!" in name) for name in names.split()
    }


NEW_WORKSTREAM = fields("name! metadata")
WORKSTREAM_CHANGES = fields("name status metadata") | {"status": FIELDS["workstream_status"]}
NEW_TASK = fields("workstream_id! name! metadata")
TASK_CHANGES = fields("name workstream_id status summary_text summary_source hidden metadata")
MANUAL_UPDATE = fields("task_id! message! level kind tags data")
NEW_UPDATE = fields("task_id! source! message! level kind tags data")
CLAUDE_HOOK = fields("task_id! payload!")
GITHUB_WEBHOOK = fields("task_id! payload! headers")
PRUNING = fields("older_than! data_only dry_run")
WORKSTREAM_QUERY = fields("include_archived")
TASK_QUERY = fields("workstream_id status include_hidden include_archived q")
STREAM_FILTER = fields("task_id workstream_id source kind level tag")
UPDATE_QUERY = STREAM_FILTER | fields("q after_seq before_seq since until order limit total")


def clean(payload: Any, fields: Fields) -> dict[str, Any]:
    """The known fields of a JSON object, checked; null counts as absent. Problem names the first wrong
    one."""
    if not isinstance(payload, dict):
        raise invalid("the body must be a JSON object")
    missing = [name for name, field in fields.items() if field.required and payload.get(name) is None]
    if missing:
        raise invalid(f"{missing[0]} is missing", missing[0])
    given = {name: payload[name] for name in fields if payload.get(name) is not None}
    return {name: fields[name].check(value, name) for name, value in given.items()}


# ======================================================================================================
# redaction: what looks like a secret is masked before it is stored (pure)
# ======================================================================================================

MASK = "[masked]"


@functools.cache
def tables() -> types.SimpleNamespace:
    """The tables of templates/sources.toml, by name, read at their first use."""
    import tomllib

    found = tomllib.loads(asset("templates", "sources.toml").decode())
    found |= {name: table(found[name]) for name in ("agent_words", "agent_sentences")}
    marks = {f"<{name}>": found[f"shell_{name}"] for name in ("script", "error")}
    found["shell_bad"] = found["shell_bad"].replace("<error>", marks["<error>"])
    for rows in (found["shell_jobs"], found["shell_news"]):
        rows |= {
            name: re.sub("<(?:script|error)>", lambda m: marks[m[0]], "|".join(rows[name])) for name in rows
        }
    found["secrets"] = [(row["marks"].split(), re.compile(row["pattern"])) for row in found["secrets"]]
    found["secret_marks"] = {"authorization", *(mark for marks, _ in found["secrets"] for mark in marks)}
    return types.SimpleNamespace(**found | {"secret_name": re.compile(found["secret_name"])})


def table(text):
    """Rows of columns, two blanks or more apart, by the names in the first; `.case` adds to the one above."""
    rows, above = {}, ""
    for line in text.strip().splitlines():
        names, *row = re.split(r"\s{2,}", line.strip())
        above = above if names.startswith(".") else names.split()[0]
        rows |= {above * name.startswith(".") + name: row for name in names.split()}
    return rows


def redact_text(text: str) -> str:
    """Mask what looks like a secret in a text."""
    lowered = text.lower()
    for marks, pattern in tables().secrets:
        if any(map(lowered.__contains__, marks)):
            text = pattern.sub(lambda found: found.expand(MASKED[found.re.groups]), text)
    return text


# The groups that a pattern keeps stand before the mask, the second one behind it.
MASKED = (MASK, r"\1" + MASK, r"\1" + MASK + r"\2")


def redact(value: Any) -> Any:
    """Mask what looks like a secret at any depth; a value without any mark of one is given back as it is."""
    lowered = json.dumps(value).lower()
    return redact_deep(value) if any(map(lowered.__contains__, tables().secret_marks)) else value


def redact_deep(value: Any) -> Any:
    """Mask what looks like a secret at any depth, and whole strings under names such as password."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, list):
        return [redact_deep(child) for child in value]
    if isinstance(value, dict):
        masked: dict[str, Any] = {}
        for name, child in value.items():
            label = redact_text(name)
            while label in masked:
                label += "*"  # two names that are secrets keep both their values
            masked[label] = (
                MASK if isinstance(child, str) and child and names_secret(name) else redact_deep(child)
            )
        return masked
    return value


def names_secret(name: str) -> bool:
    """Whether what stands under this name, in any spelling (dbPassword, DB_PASSWORD), is a secret."""
    return bool(tables().secret_name.search(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()))


# ======================================================================================================
# agents: hook payloads of coding agents -> Draft of an update (pure)
# ======================================================================================================

AGENTS = ("claude", "codex", "gemini", "copilot", "cursor")
# Escape sequences, control, bidi and zero-width characters, lone surrogates: none may reach a page or a log.
INVISIBLE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b"
    r"\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


class Draft(NamedTuple):
    """What an adapter makes of one payload: the fields of an update, and what the event means for the run."""

    source: str
    message: str
    kind: str
    level: str = "info"  # info | warn | error
    tags: tuple[str, ...] = ()
    data: object = None
    keep: bool = True  # False: noise, which the raw hook endpoint does not store
    state: str | None = None  # of the session: blocked | idle | working | ended | None (no change)


def dig(value, *path, kind=str, default=None):
    """Walk dicts and lists along `path`: what is there, if of type `kind`, else `default` ("" for text)."""
    for step in path:
        try:
            value = value[step] if isinstance(value, dict | list) else None
        except (LookupError, TypeError):
            value = None
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    return value if fits else ("" if kind is str and default is None else default)


def one_line(text, limit=240):
    """The first line that says something, without control and bidi characters, cut with an ellipsis."""
    lines = (INVISIBLE.sub("", line[: limit * 8]).strip() for line in str(text).expandtabs(1).splitlines())
    line = next(filter(None, lines), "")
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


AGENT_CASES = (  # events, what else must hold -> the row of tables().agent_sentences
    ("Stop UserPromptSubmit", lambda p: dig(p, "agent_id"), "SubagentTurn"),
    ("SubagentStart SubagentStop", lambda p: not dig(p, "agent_type"), "SubagentTurn"),
    ("Stop", lambda p: p["background"], "Stop.background"),
    ("UserPromptSubmit", lambda p: "<task-notification>" in dig(p, "prompt"), "UserPromptSubmit.background"),
    ("PermissionRequest", lambda p: p["tool"] in ("AskUserQuestion", "ExitPlanMode"), "PreToolUse"),
    ("PostToolUse", lambda p: dig(p, "tool_response", "interrupted", kind=bool), "Interrupt.tool"),
    ("PostToolUse", lambda p: pick(p["tool_response"], "backgroundTaskId outputFile"), "PostToolUse.started"),
    ("PostToolUseFailure", lambda p: dig(p, "is_interrupt", kind=bool), "Interrupt.tool"),
    ("PostToolBatch", lambda p: p["tool"], "PostToolBatch.refused"),
)
AGENT_WORKS = re.compile("UserPromptSubmit|PreTool|PostTool|ElicitationResult|Stop$")


def pick(value, names, kind=str):
    """The first of several fields that holds something of a type."""
    return next(filter(None, (dig(value, name, kind=kind) for name in names.split())), kind())


def output_of(response, depth=5):
    """All the text in a tool's response, whatever its shape."""
    parts = [response[key] for key in response if key != "type"] if isinstance(response, dict) else response
    if isinstance(parts, list) and depth:
        return "\n".join(filter(None, (output_of(part, depth - 1) for part in parts[:50])))
    return "\n".join(INVISIBLE.sub("", line[:500]) for line in dig(parts)[-100_000:].splitlines())


def unpacked(value):
    """JSON inside a string (Cursor, older Copilot) as what it says; anything else as it is."""
    try:
        return json.loads(value) if dig(value).startswith(("{", "[")) else value
    except (ValueError, RecursionError):
        return value


def canonical(agent, payload, event=None):
    """The payload in Claude Code's words, with its `event`, `tool` and `command`."""
    given, words = payload.items() if isinstance(payload, dict) else (), tables().agent_words
    p = {re.sub(r"-|(?<=[a-z0-9])(?=[A-Z])", "_", key).lower(): value for key, value in given}
    for other in filter(p.__contains__, words):
        p[words[other][0]] = p.get(words[other][0]) or p[other]
    shapes = tables().agent_shapes.split()
    shape = next((s for s in shapes if p.keys() >= set(s.partition(":")[0].split("+"))), "")
    name = one_line(dig(p, "hook_event_name") or event or shape.partition(":")[2], 80)
    known = words.get(f"{agent}:{name}") or words.get(name) or [name[:1].upper() + name[1:], ""]
    p["event"], tool = [*known, ""][:2] if known[0] in tables().agent_sentences else (name, "")
    if dig(p, "notification_type") == "ToolPermission":  # Gemini's question for a permission
        tool = {"exec": "Bash", "edit": "Edit"}.get(dig(p, "details", "type"), dig(p, "details", "toolName"))
        p |= {"event": "PermissionRequest", "tool_input": p.get("details")}
    for call in pick(p, "tool_calls", list):
        if re.match("Permission to use|The user doesn't", output_of(dig(call, "tool_response", kind=object))):
            p |= {"tool_name": dig(call, "tool_name"), "tool_input": call.get("tool_input")}
    p["tool_input"] = unpacked(p.get("tool_input", dict(p)))  # Cursor: of shell and file events at the top
    p["tool_response"] = unpacked(p.get("tool_response"))
    name = one_line(dig(p, "tool_name") or tool, 60)
    known = words.get(name, [name])[0]
    p |= {"tool": re.sub(r"^mcp__(.+?)__", r"\1: ", known), "tool_name": name if agent == "claude" else known}
    p["command"] = dig(p, "tool_input", "command").strip()
    p["asked"] = dig(p, "tool_input", "questions", 0, kind=dict, default=p["tool_input"])
    p["options"] = pick(p["asked"], "options choices", list)
    p["answers"] = pick(p["tool_response"], "answers", dict)
    p["background"] = pick(p, "background_tasks", list)
    p["items"] = pick(p["tool_input"], "todos plan", list)
    p["plan"] = {dig(item, "status"): pick(item, "content step description") for item in p["items"]}
    p["cwd"] = dig(p, "cwd") or dig(p, "workspace_roots", 0)
    if dig(p, "agent_id") and dig(p, "session_id") in ("", p["agent_id"]):  # a subagent of Copilot's
        p["session_id"] = p.get("parent_agent_id")
    p["session_id"] = one_line(dig(p, "session_id"), 200)
    p |= hidden_error(p) if agent != "claude" and p["event"] == "PostToolUse" else {}
    error = output_of(dig(p, "error", "message") or p.get("error"))
    return p | {"errors": re.sub(r"^Exit code \d+\s*", "", error).splitlines()}


def hidden_error(p):
    """The failure in a PostToolUse: outside Claude only the response shows it. Exit 1 of a search is none."""
    response, output = p["tool_response"], output_of(p["tool_response"])
    found = re.search(r"(?m)^Exit Code: (\d{1,9})$|with exit code (\d{1,9})>", output)  # Gemini, Copilot
    code = dig(response, "exitCode", kind=int) or int((found and (found[1] or found[2])) or 0)
    quiet = code == 1 and re.match(r"(?:[ef]?grep|rg|diff|cmp|test|\[) ", ["", *steps(p["command"])][-1])
    told = dig(response, "error", "message") or dig(response, "error")
    shown = dig(response, "returnDisplay") or output
    error = told or (f"Exit code {code}\n{shown}" if code and not quiet else "")
    return {"event": "PostToolUseFailure", "error": error} if error else {}


def steps(command):
    """The simple commands of a command line, without here-documents, quoted text and wrappers."""
    command = re.sub(r"(?s)<<-?\s*['\"]?(\w+).*?(?:\n\s*\1\b|\Z)", " ", command[:4000])
    command = re.sub(r"'[^']*'|\"[^\"]*\"", "''", re.sub(r"\b(?:ba|z)?sh -\w*c ['\"]", "", command))
    found = map(str.strip, re.split(r"[;&|\n(]+", command))
    return [re.sub(tables().shell_wrappers, "", part) for part in found if part]


def shell_case(p):
    """How a shell command went, by its output: the exit code of `pytest | tail` is tail's. Sets `said`."""
    failed, ran = p["event"] == "PostToolUseFailure", steps(p["command"])
    output = output_of(p.get("error") if failed else p["tool_response"])
    jobs = [job for job, begin in tables().shell_jobs.items() if any(re.match(begin, step) for step in ran)]
    for job in jobs + ["tests"] * ("test" in dig(p, "tool_input", "description").lower()):
        found = re.finditer(tables().shell_news.get(job, tables().shell_news["build"]), output, re.M)
        lines = dict.fromkeys(" ".join(" ".join(filter(None, m.groups())).split()).strip(" =") for m in found)
        bad = dict.fromkeys(line for line in lines if re.search(tables().shell_bad, line))
        sure = job in ("build", "deploy") and isinstance(p["tool_response"], dict) and "|" not in p["command"]
        cases = ["bad"] * bool(bad) + (["unclear"] if failed else ["ok"] * bool(lines or sure))
        for case in cases:
            if f"PostToolUse.{job}_{case}" in tables().agent_sentences:
                p["said"] = " · ".join(bad | lines) or (AGENT_FACTS["trouble"](p) if failed else what(p))
                return f"PostToolUse.{job}_{case}"
    return ""


def what(p):
    """What a tool call is about: its command, its file as seen from the session's directory, its address."""
    if p["command"]:
        return one_line(p["command"], 120) + " …" * ("\n" in p["command"])
    path = pick(p["tool_input"], "file_path filePath path notebook_path fileName")
    path = path.removeprefix(p["cwd"]).lstrip("/\\") if p["cwd"] and path.startswith(p["cwd"]) else path
    return path or pick(p["tool_input"], "url query pattern subject title description name skill prompt")


def changed(p):
    """`Edited calc.py (+1 -1)`: which files a tool has changed, and by how many lines."""
    files = re.findall(r"(?m)^\*\*\* (?:Add|Update|Delete) File: (.+)", p["command"]) or [what(p) or "a file"]
    hunks = pick(p["tool_response"], "structuredPatch", list)
    lines = [str(line) for hunk in hunks for line in pick(hunk, "lines", list)]
    lines = lines or (p["command"] or dig(p, "tool_response", "returnDisplay", "fileDiff")).splitlines()
    counts = [(sign, sum(line[:1] == sign and line[:3] != sign * 3 for line in lines)) for sign in "+-"]
    size = " ".join(f"{sign}{count}" for sign, count in counts if count)
    new = dig(p, "tool_response", "type") == "create" or dig(p, "tool_input", "file_text")
    new = new or any(line.startswith(("*** Add", "@@ -0,0 ")) for line in lines)
    return ("Created " if new else "Edited ") + ", ".join(files) + (f" ({size})" if size else "")


AGENT_FACTS = {  # what sentences say that no field holds as it is
    "answer": lambda p: "; ".join(f"{q} -> {a}" for q, a in p["answers"].items()),
    "call": lambda p: ": ".join(filter(None, (p["tool"], what(p)))),
    "changed": changed,
    "code": lambda p: re.sub(r"(?s)^(?:Exit code (\d+))?.*", r"\1", dig(p, "error")),
    "done": lambda p: f"{sum(dig(i, 'status') == 'completed' for i in p['items'])}/{len(p['items'])}",
    "finished": lambda p: "Turn finished",
    "file": lambda p: what(p | {"tool_input": p, "command": ""}),
    "hint": lambda p: pick(p, "message prompt title reason name file_path delta to_model") or what(p),
    "options": lambda p: " / ".join(dig(o) or dig(o, "label") for o in p["options"]),
    "project": lambda p: re.split(r"[/\\]", p["cwd"].rstrip("/\\"))[-1],
    "running": lambda p: f"{(n := len(p['background']))} background task{'s'[: n - 1]} running",
    "notice": lambda p: (re.findall("<summary>([^<]*)", dig(p, "prompt")) or ["Background task ended"])[0],
    "tokens": lambda p: f"{dig(p, 'tool_response', 'totalTokens', kind=int, default=0):,}".removeprefix("0"),
    "trouble": lambda p: next(
        filter(re.compile(tables().shell_bad).search, p["errors"]), "".join(p["errors"][:1])
    ),
    "what": what,
}


def say(template, value):
    """Fill a template's {holes} with what `value` makes of them; a <part> with an empty one is left out."""
    for part in re.findall("<.*?>", template):
        full = all(map(value, re.findall("{(.*?)}", part)))
        template = template.replace(part, part[1:-1] if full else "")
    return re.sub("{(.*?)}", lambda hole: value(hole[1]), template)


def agent_say(template, p):
    """`Ended< ({reason})>` filled from the payload: `Ended (logout)`, or `Ended` when it has no reason."""

    def value(names):
        texts = (AGENT_FACTS[f](p) if f in AGENT_FACTS else dig(p, *f.split(".")) for f in names.split("|"))
        text = re.sub(r"(?m)^#+ ", "", next(filter(None, texts), "")[:4000])
        return one_line(" ".join(text.split()), 200)

    return say(template, value)


def agent_draft(agent, payload, event=None):
    """The Draft of one hook payload, of any shape. `event` names it where the payload does not."""
    p = canonical(agent, payload, event)
    rows = (row for events, holds, row in AGENT_CASES if p["event"] in events.split() and holds(p))
    row = next(rows, p["event"])
    shell = shell_case(p) if p["tool"] == "Bash" and row in ("PostToolUse", "PostToolUseFailure") else ""
    keys = (f"{row}.{dig(p, name)}" for name in ("tool", "notification_type", "source", "status"))
    row = next((key for key in (shell, *keys, row) if key in tables().agent_sentences), "unknown")
    kind, level, sentence, *tags = tables().agent_sentences[row]
    tags = [agent_say(tag, p) for tag in " ".join(tags).split()]
    if p["tool_name"] and (kind[:5] in ("tool_", "permi") or level == "error"):
        tags.append(f"tool:{p['tool_name']}")
    tags = ["waiting"] * ("needs-human" in tags) + [*tags, dig(p, "notification_type"), p["tool_name"]]
    tags = tuple(dict.fromkeys(filter(None, (one_line(tag, 60) for tag in tags))))
    state = "working" if AGENT_WORKS.match(p["event"]) else "ended" * (p["event"] == "SessionEnd") or None
    state = "blocked" if "needs-human" in tags else "idle" if "waiting" in tags else state
    source = f"{agent}:{p['session_id'] or 'unknown'}"
    message = one_line(agent_say(sentence, p)) or p["event"]
    data = {k: v for k, v in payload.items() if k != "user_email"} if isinstance(payload, dict) else payload
    state = None if dig(p, "agent_id") else state
    return Draft(source, message, kind, level.replace("-", "info"), tags, data, level != "-", state)


def session_facts(agent, payload, event=None):
    """What routing and de-duplication ask of a payload, as far as it is there and is text."""
    p = canonical(agent, payload, event)
    names = "session_id event cwd model agent_id tool_use_id tool_name prompt prompt_id source reason"
    return {name: p[name] for name in names.split() if dig(p, name)}


# ======================================================================================================
# github: webhook payloads -> Draft of an update (pure)
# ======================================================================================================

# A new event costs a row of github_sentences. A path like `head_commit.message` starts at the payload, one
# like `.name` at the event's subject, its workflow_run, comment, alert; of paths divided by `|`, the first
# that leads to anything counts. A sentence fills its {paths}, with blanks for underscores in {path~}, and
# leaves out a <part> in which one of them is empty.


GITHUB_QUEUE = re.compile(r"(?:refs/pull/|gh-readonly-queue/.+/pr-)(\d{1,9})\b")


def github_value(view, paths):
    """The line of text, number or truth that the first of `paths` with something in it holds, else ""."""
    for path in paths.split("|"):
        steps = (int(step) if step.isdigit() else step for step in path.split("."))
        value = dig(view, *steps, kind=(str, int), default="")
        value = re.sub("^refs/(heads|tags)/", "", one_line(value)) if isinstance(value, str) else value
        if value != "":
            return value
    return ""


def github_say(template, view, limit=160):
    """The sentence that a template and the facts make; of a commit only the first digits."""

    def value(paths):
        text = one_line(github_value(view, paths.rstrip("~")), limit)
        text = text[:7] if limit < 200 and re.fullmatch("[0-9a-f]{40}", text) else text
        return text.replace("_", " ") if paths.endswith("~") else text

    return " ".join(say(template, value).split())


def github_place(view):
    """Branch, commit, and the pull request or issue it is about."""
    tag = "tag" if dig(view, "ref").startswith("refs/tags/") else "branch"
    kind = github_say("{ref_type}", view) or (tag if "ref" in view else "")
    branch = "" if kind == "tag" or re.match("refs/|[0-9a-f]{40}$", view["branch"]) else view["branch"]
    owner = "" if view["fork"] in ("", view["repo"]) else view["fork"].split("/")[0] + ":"
    pulls = dig(view, "", "pull_requests", kind=list, default=[])
    # A run also lists pull requests of other repositories.
    home = (None, dig(view, "repository", "id", kind=int))
    pulls = [pull for pull in pulls if dig(pull, "base", "repo", "id", kind=int) in home]
    queued = GITHUB_QUEUE.search(github_say("{.head_ref|ref|.head_branch}", view))
    pull = int(queued[1]) if queued else github_value(view | {"p": pulls}, "pull_request.number|p.0.number")
    issue = github_value(view, "issue.number")
    if "pull_request" in dig(view, "issue", kind=dict, default={}):
        pull, issue = issue, ""
    things = {"PR": pull, "issue": issue, "discussion": github_value(view, "discussion.number")}
    other = github_say("{event~} {sha}", view).replace(" comment", "")
    thing = next((f"{noun} #{number}" for noun, number in things.items() if number), other)
    where = f"on {owner}{branch}" if branch else github_say("<at {sha}>", view)
    return {"ref_type": kind, "branch": branch, "where": where, "pr": pull, "ticket": issue, "it": thing}


def github_case(view):
    """What the action leaves open: that closing merged, what a review says, what a push did to its branch."""
    if view["event"] == "push":
        return next((flag for flag in ("deleted", "created", "forced") if view.get(flag) is True), "")
    if view["event"] == "pull_request" and view["action"] == "closed":
        return "merged" if dig(view, "pull_request", "merged", kind=bool) else "closed"
    decided = view["action"] in ("submitted", "destroyed", "dequeued")
    return github_say("{reason|.state}", view).lower() if decided else view["action"]


def github_lists(view):
    """The lists that data holds, cut down."""
    items = functools.partial(dig, view, kind=list, default=[])
    raw = {
        "failed_steps": [step for step in items("", "steps") if dig(step, "conclusion") == "failure"],
        "labels": items("issue", "labels"),
        "events": items("hook", "events"),
        "inputs": [*dig(view, "inputs", kind=dict, default={})],
    }
    lists = {key: [one_line(dig(item, "name") or dig([item], 0)) for item in raw[key][:50]] for key in raw}
    keys = {"id": "id", "subject": "message", "author": "author.name"}.items()
    commits = [{key: github_value(commit, path) for key, path in keys} for commit in items("commits")[:20]]
    return lists | {"commits": commits}


def github_view(event, payload, headers):
    """The payload, its subject under "", and what templates need besides, which hides keys of the payload."""
    names = (event, *tables().github_subjects.split(), *payload)
    keys = (key for key in names if isinstance(payload.get(key), dict))
    subject = next((payload[key] for key in keys if key not in tables().github_frame.split()), {})
    view = payload | {"": subject, "event": event, "action": one_line(dig(payload, "action"), 100)}
    view |= {name: str(github_value(view, paths)) for name, paths in tables().github_facts.items()}
    view |= github_place(view)
    case, lists = github_case(view), github_lists(view)
    count = len(dig(payload, "commits", kind=list, default=[]))
    # A check that is asked for again still carries its old conclusion.
    again = view["action"] in ("rerequested", "requested_action")
    status = view["action"] if again else github_say("{.status}", view)
    ended = event in tables().github_kinds and status in ("", "completed")
    conclusion = github_say("{.conclusion|.state|state}", view) if ended else ""
    status = conclusion or status or view["action"]
    verdict = tables().github_verdicts.get(status, f"finished ({status})")
    verdict = re.sub("^was", "were", re.sub("^is", "are", verdict)) if event == "check_suite" else verdict
    view |= {"case": case, "conclusion": conclusion, "status": status, "verdict": verdict, "lists": lists}
    links = (github_say(link, view, 2000) for link in tables().github_links.split())
    return view | {
        "who": view["who"] or "someone",
        "repo": view["repo"] if re.fullmatch(r"[\w.-]+/[\w.-]+", view["repo"]) else "",
        "did": tables().github_did.get(case, case.replace("_", " ")) or "changed",
        "retry": "" if view["retry"] == "1" else view["retry"],
        "bot": "sender:bot" if dig(view, "sender", "type") == "Bot" else "",
        "commit_count": count or "",
        "commit_words": f"{count} commit{'s' * (count > 1)}" if count else "",
        "subject": github_say("{head_commit.message}", view) if count else "",
        "body": re.sub(r"(?ms)<!--.*?-->|^\s*>.*?$", "", dig(subject, "body")[:4000]),
        "event_list": ", ".join(lists["events"]).replace("*", "every event"),
        "delivery": one_line(dig(headers, "x-github-delivery")),
        "url": next((link for link in links if re.fullmatch(r"https?://\S+", link)), ""),
    }


def github_draft(payload: object, headers: dict | None = None) -> Draft:
    """The update that a GitHub webhook's payload makes, whatever its shape; without X-GitHub-Event among
    the request's `headers` the shape tells the event."""
    payload = payload if isinstance(payload, dict) else {}
    headers = {str(name).lower(): text for name, text in headers.items()} if isinstance(headers, dict) else {}
    shapes = (shape.partition("=") for shape in tables().github_shapes.split())
    fits = (event for event, _, keys in shapes if all(key in payload for key in (keys or event).split("+")))
    event = one_line(dig(headers, "x-github-event"), 100) or next(fits, "unknown")
    view = github_view(event, payload, headers)
    case, action, last = view["case"], view["action"], event.rpartition("_")[2]
    other = "it" if event in ("pull_request", "issues", "discussion") else ""
    names = (f"{event}.{case}", f"{event}.{action}", f"{last}.{action}", event, last, other, "")
    sentence = next(tables().github_sentences[name] for name in names if name in tables().github_sentences)
    signs = github_say("{event}.{case} {event}.{action} verdict.{conclusion} severity.{severity|event}", view)
    levels = tables().github_levels.items()
    level = next((level for pattern, level in levels if re.search(pattern, signs)), "info")
    tags = tuple(filter(None, dict.fromkeys(github_say(tag, view) for tag in tables().github_tags.split())))
    fields = (path.rpartition("=")[::2] for path in tables().github_data.split())
    fields = ((key or paths.rpartition(".")[2], paths) for key, paths in fields)
    data = {key: value for key, paths in fields if (value := github_value(view, paths)) != ""}
    quiet = (
        view["status"] in tables().github_pending.split()
        if event in ("workflow_run", "status")
        else level != "error"
    )
    kind = tables().github_kinds.get(event, "external_update")
    source = f"github:{view['repo'] or 'unknown/unknown'}"
    message = one_line(github_say(sentence, view)) or "GitHub sent an event"
    data |= {name: items for name, items in view["lists"].items() if items}
    keep = not (kind.startswith("ci_") and quiet)
    return Draft(source, message, kind, level, tags, data, keep)


# ======================================================================================================
# log: ids, frames, filters, the objects that clients know (pure)
# ======================================================================================================


def uuid7() -> uuid.UUID:
    """A time-ordered UUID (RFC 9562 section 5.7): random ones halve the insert rate of their index."""
    milliseconds = time.time_ns() // 1_000_000
    bits = milliseconds << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return uuid.UUID(int=bits)


class Frame:
    """One log row as readers get it: what it is filtered by, and its encoded SSE event."""

    __slots__ = ("event", "kind", "level", "seq", "source", "sse", "tags", "task", "workstream")

    def __init__(self, seq, event, task, workstream, body, source=None, kind=None, level=None, tags=()):
        self.seq, self.event, self.task, self.workstream = seq, event, task, workstream
        self.source, self.kind, self.level, self.tags = source, kind, level, tags
        self.sse = f"id: {seq}\nevent: {event}\ndata: {body}\n\n".encode()

    @property
    def body(self) -> bytes:
        """The JSON of the event."""
        return self.sse[self.sse.index(b"\ndata: ") + 7 : -2]


class Filter(NamedTuple):
    """What a reader of updates or events wants to see; None is no condition. Made by Queries.filter."""

    task: int | None = None  # numbers of rows; 0 matches nothing
    workstream: int | None = None
    source: str | None = None
    kind: str | None = None
    level: str | None = None
    tags: tuple[str, ...] = ()

    @property
    def updates_only(self) -> bool:
        """State events carry no source, kind, level or tag: asking for one leaves updates alone."""
        return bool(self.source or self.kind or self.level or self.tags)

    def matches(self, frame: Frame) -> bool:
        """Whether the frame is one that the reader wants. Says the same as the SQL of `update_query`."""
        return (
            (self.task is None or frame.task == self.task)
            and (self.workstream is None or frame.workstream == self.workstream)
            and (not self.updates_only or frame.event == "update")
            and (self.source is None or frame.source == self.source)
            and (self.kind is None or frame.kind == self.kind)
            and (self.level is None or frame.level == self.level)
            and (not self.tags or not set(self.tags).isdisjoint(frame.tags))
        )


EVERYTHING = Filter()


class Kind(NamedTuple):
    """What workstreams and tasks differ in: where they are kept and read, their JSON, their bodies."""

    name: str
    table: str
    view: str
    columns: str
    new: Fields
    changes: Fields

    def make(self, row: sqlite3.Row) -> dict[str, Any]:
        """A row as the JSON object clients know: what has no value is left out."""
        found = {name: row[name] for name in self.columns.split() if row[name] is not None}
        return found | {"metadata": json.loads(row["metadata"])}


COLUMNS = "id name status created_at updated_at"
WORKSTREAM = Kind("workstream", "workstreams", "workstreams", COLUMNS, NEW_WORKSTREAM, WORKSTREAM_CHANGES)
COLUMNS += " number workstream_id summary_text summary_updated_at summary_source hidden_at"
TASK = Kind("task", "tasks", "task_rows", COLUMNS, NEW_TASK, TASK_CHANGES)


# ======================================================================================================
# store: all the SQL there is
# ======================================================================================================

READ_ROWS, READ_BYTES = 256, 1024 * 1024
SCAN_ROWS = 20_000  # a filtered catch-up looks at this many log rows at a time
PAGE_BYTES = 8 * 1024 * 1024
KEY_DAYS = 7
PRUNE_ROWS = 500  # one batch of pruning: writers wait for it
FREE_PAGES = 1000


def search_words(text: str) -> str:
    """Plain words as an FTS5 query for rows that hold them all, each quoted; "" without any word."""
    words = [word for word in text.split() if re.search(r"[^\W_]", word)]
    return " ".join('"' + word.replace('"', '""') + '"' for word in words)


class Queries:
    """Reading: every method takes part in whatever transaction its connection is in."""

    def __init__(self, db: sqlite3.Connection):
        self.db = db

    def rows(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        """All rows of a statement."""
        return self.db.execute(sql, values).fetchall()

    def head(self) -> sqlite3.Row:
        """The one row that says which database this is and how far its log goes."""
        return self.rows("SELECT stream, seq, pruned, secret FROM head")[0]

    def find(self, kind: Kind, reference: str) -> sqlite3.Row | None:
        """The row that a checked reference names, or None. Problem (conflict) when a prefix fits several."""
        if kind is TASK and re.fullmatch("[0-9]{1,18}", reference):
            found = self.rows("SELECT * FROM task_rows WHERE number = :number", number=int(reference))
            if found:
                return found[0]
        sql = f"SELECT * FROM {kind.view} WHERE id >= :prefix AND id < :prefix || 'g' LIMIT 6"
        found = self.rows(sql, prefix=reference) if len(reference) >= 4 else []
        if len(found) > 1:
            names = ", ".join(f"{row['id'][:13]} ({row['name'][:40]})" for row in found[:5])
            raise Problem("conflict", f"{reference} is the beginning of several ids: {names}")
        return found[0] if found else None

    def one(self, kind: Kind, reference: str) -> sqlite3.Row:
        """The row that a reference names; Problem (not_found)."""
        row = self.find(kind, reference)
        if row is None:
            raise Problem("not_found", f"no {kind.name} {reference}", f"{kind.name}_id")
        return row

    def filter(self, wanted: dict[str, Any]) -> Filter:
        """A Filter from cleaned STREAM_FILTER fields; a reference to nothing known matches nothing."""

        numbers: dict[str, int] = {}
        for kind in (TASK, WORKSTREAM):
            if f"{kind.name}_id" in wanted:
                row = self.find(kind, wanted[f"{kind.name}_id"])
                numbers[kind.name] = row["number"] if row else 0
        facets = {name: wanted.get(name) for name in ("source", "kind", "level")}
        return Filter(**numbers, **facets, tags=tuple(wanted.get("tag", ())))

    def workstreams(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Workstream objects for cleaned WORKSTREAM_QUERY fields, oldest first."""
        sql = "SELECT * FROM workstreams WHERE status = 'active' OR :archived ORDER BY number"
        rows = self.rows(sql, archived=wanted.get("include_archived", False))
        return [WORKSTREAM.make(row) for row in rows]

    def tasks(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Task objects that match cleaned TASK_QUERY fields, oldest first. Tasks of archived workstreams
        come when asked for, or when their workstream is named."""
        values = {name: wanted.get(name) for name in ("status", "q")}
        where = ["TRUE"]  # literal clauses only: no input gets in here
        if "workstream_id" in wanted:
            row = self.find(WORKSTREAM, wanted["workstream_id"])
            values["workstream"] = row["number"] if row else 0
            where.append("workstream = :workstream")
        elif not wanted.get("include_archived"):
            where.append("workstream_status = 'active'")
        if "status" in wanted:
            where.append("status = :status")
        if not wanted.get("include_hidden"):
            where.append("hidden_at IS NULL")
        if wanted.get("q"):
            values["q"] = search_words(wanted["q"])
            where.append("number IN (SELECT rowid FROM task_search WHERE task_search MATCH :q)")
            if not values["q"]:
                return []
        rows = self.rows(f"SELECT * FROM task_rows WHERE {' AND '.join(where)} ORDER BY number", **values)
        return [TASK.make(row) for row in rows]

    def update(self, seq: int) -> str:
        """The JSON of one update; Problem (not_found)."""
        found = self.rows("SELECT body FROM log WHERE seq = :seq AND event = 'update'", seq=seq)
        if not found:
            raise Problem("not_found", f"no update {seq}")
        return found[0]["body"]

    def updates(self, chosen: Filter, wanted: dict[str, Any]) -> tuple[list[str], int | None]:
        """One page of updates (their JSON) for cleaned UPDATE_QUERY fields, and how many match in all, if
        wanted. It ends early rather than pass 8 MiB, but holds one update at least."""
        arms, values = update_query(chosen, wanted)
        order = wanted.get("order", "desc" if wanted.get("q") else "asc")
        limit = wanted.get("limit", 50)
        newest = f"ORDER BY 1 {order} LIMIT {limit}"
        page = " UNION ".join(f"SELECT * FROM (SELECT {seq} AS seq {rows} {newest})" for seq, rows in arms)
        sql = f"SELECT body FROM ({page}) AS page JOIN log USING (seq) ORDER BY seq {order} LIMIT {limit}"
        bodies = take(self.db.execute(sql, values), PAGE_BYTES) if arms else []
        if not wanted.get("total", True):
            return bodies, None
        if len(arms) == 1:
            count = f"SELECT COUNT(*) {arms[0][1]}"
        else:
            seqs = " UNION ".join(f"SELECT {seq} AS seq {rows}" for seq, rows in arms)
            count = f"SELECT COUNT(*) FROM ({seqs or 'SELECT 1 WHERE FALSE'})"
        return bodies, self.db.execute(count, values).fetchone()[0]

    def expired(self, before: str, data_only: bool) -> int:
        """How many updates pruning would touch."""
        has_data = " AND has_data" if data_only else ""
        sql = f"SELECT COUNT(*) FROM updates WHERE timestamp < :before{has_data}"
        return self.rows(sql, before=before)[0][0]

    def session_ended(self, signature: str) -> bool:
        """Whether a browser session was ended by its user."""
        sql = "SELECT 1 FROM ended_sessions WHERE signature = :signature"
        return bool(self.rows(sql, signature=signature))

    def check(self) -> list[str]:
        """What is wrong with the database, a sentence each; none when all is well. Reads all of it."""
        problems = [row[0] for row in self.rows("PRAGMA integrity_check(20)") if row[0] != "ok"]
        strays = self.rows("PRAGMA foreign_key_check")
        problems += [f"a row of {row[0]} points to a missing {row[2]}" for row in strays]
        faults = self.rows("SELECT * FROM faults WHERE n > 0")
        return problems + [f"{row['n']} {row['what']}" for row in faults]

    def newest_of_tasks(self) -> dict[str, str]:
        """The JSON of each task's newest update, by the task's id."""
        rows = self.rows(
            """
            SELECT tasks.id, log.body
            FROM tasks JOIN log ON log.seq = (SELECT MAX(seq) FROM updates WHERE updates.task = tasks.number)
            """
        )
        return {row["id"]: row["body"] for row in rows}

    def events(self, cursor: int, chosen: Filter, head: int) -> tuple[list[Frame], int]:
        """The next frames after `cursor` that match, oldest first, and the seq up to which the log was
        read. Bounded in rows and bytes, and in rows looked at: there may be none, with the cursor moved
        on."""
        last = min(head, cursor + (READ_ROWS if chosen == EVERYTHING else SCAN_ROWS))
        values = chosen._asdict() | {"cursor": cursor, "last": last}
        rows = "log"
        if chosen.updates_only:
            window = {"after_seq": cursor, "before_seq": last + 1}
            arms, named = update_query(chosen._replace(workstream=None), window)
            seqs = " UNION ".join(f"SELECT {seq} AS seq {found}" for seq, found in arms)
            rows, values = f"({seqs}) AS page JOIN log USING (seq)", values | named
        sql = f"""
            SELECT log.seq, event, log.task, log.workstream, body, source, kind, level
            FROM {rows} LEFT JOIN updates ON updates.seq = log.seq
            WHERE log.seq > :cursor AND log.seq <= :last
              AND (:task IS NULL OR log.task = :task)
              AND (:workstream IS NULL OR log.workstream = :workstream)
            ORDER BY log.seq LIMIT {READ_ROWS}
        """
        frames, size = [], 0
        for row in self.db.execute(sql, values):
            frames.append(Frame(*row))
            size += len(frames[-1].sse)
            if size > READ_BYTES:
                break
        stopped_early = size > READ_BYTES or len(frames) == READ_ROWS
        return frames, frames[-1].seq if stopped_early else last


def take(rows: Iterable[Any], limit: int) -> list[str]:
    """The first column of rows until `limit` characters are passed; one row at least where there is one."""
    texts, size = [], 0
    for row in rows:
        size += len(row[0])
        if texts and size > limit:
            break
        texts.append(row[0])
    return texts


def update_query(chosen: Filter, wanted: dict[str, Any]) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """The SELECTs whose union is the seqs of matching updates (none: nothing can match), and their values.
    The most telling condition drives the query: the others are kept from the planner by a unary plus, for
    without statistics it might walk the index of a kind that most rows have. Tags drive as one SELECT a
    tag (microseconds at a million rows; a correlated EXISTS over all updates takes 0.4 s on a miss)."""
    values = {name: value for name, value in chosen._asdict().items() if value is not None and name != "tags"}
    values |= {name: wanted[name] for name in ("after_seq", "before_seq", "since", "until") if name in wanted}
    values |= {f"tag{index}": tag for index, tag in enumerate(chosen.tags)}
    tag_names = [f":tag{index}" for index in range(len(chosen.tags))]
    seq, table, drivers, others = "updates.seq", "updates", [""], []
    if wanted.get("q"):
        values["q"] = search_words(wanted["q"])
        seq, table = "update_search.rowid", "update_search JOIN updates ON updates.seq = update_search.rowid"
        drivers = ["update_search MATCH :q"] if values["q"] else []
    elif chosen.tags and chosen.task is None:
        seq, table = "update_tags.seq", "update_tags JOIN updates USING (seq)"
        drivers, tag_names = [f"update_tags.tag = {name}" for name in tag_names], []
    if tag_names:
        names = ", ".join(tag_names)
        exists = f"SELECT 1 FROM update_tags WHERE tag IN ({names}) AND update_tags.seq = updates.seq"
        others = [f"EXISTS ({exists})"]
    driven = drivers != [""]
    for name, clause in UPDATE_CLAUSES.items():
        if name in values:
            others.append(clause.format(seq=seq, plus="+" if driven else ""))
            driven = driven or "plus" in clause
    wheres = [" AND ".join(filter(None, [driver, *others])) for driver in drivers]
    return [(seq, f"FROM {table}" + (f" WHERE {where}" if where else "")) for where in wheres], values


# Literal clauses, the most telling first: no input gets in here.
UPDATE_CLAUSES = {
    "after_seq": "{seq} > :after_seq",
    "before_seq": "{seq} < :before_seq",
    "task": "{plus}updates.task = :task",
    "source": "{plus}updates.source = :source",
    "level": "{plus}updates.level = :level",
    "kind": "{plus}updates.kind = :kind",
    "since": "{plus}updates.timestamp >= :since",
    "until": "{plus}updates.timestamp < :until",
    "workstream": "{plus}updates.task IN (SELECT number FROM tasks WHERE workstream = :workstream)",
}


class Transaction(Queries):
    """Writing: what an operation may do inside the writer's transaction. Collects the frames it logs."""

    def __init__(self, db: sqlite3.Connection):
        super().__init__(db)
        self.frames: list[Frame] = []

    def append(
        self, event: str, task: int | None, workstream: int, make: Callable[[int], dict], **facets
    ) -> str:
        """Write the next log row; `make` gets its seq and returns the object. Returns the JSON."""
        seq = self.rows("UPDATE head SET seq = seq + 1 RETURNING seq")[0]["seq"]
        body = dump(make(seq))
        self.db.execute(
            "INSERT INTO log (seq, event, task, workstream, body) VALUES (?, ?, ?, ?, ?)",
            (seq, event, task, workstream, body),
        )
        self.frames.append(Frame(seq, event, task, workstream, body, **facets))
        return body

    def append_row(self, kind: Kind, event: str, number: int) -> str:
        """Log a workstream or task as it now stands; returns its JSON."""
        row = self.rows(f"SELECT * FROM {kind.view} WHERE number = :number", number=number)[0]
        place = (number, row["workstream"]) if kind is TASK else (None, number)
        return self.append(f"{kind.name}_{event}", *place, lambda seq: kind.make(row))

    def add(self, kind: Kind, values: dict[str, Any]) -> str:
        """Add a workstream or task (column names are ours) with a new id; returns its JSON."""
        values = {"id": str(uuid.uuid4())} | values
        names, slots = ", ".join(values), ", ".join(f":{name}" for name in values)
        sql = f"INSERT INTO {kind.table} ({names}) VALUES ({slots}) RETURNING number"
        number = self.rows(sql, **values)[0]["number"]
        if kind is TASK:
            self.index_task(number)
        return self.append_row(kind, "created", number)

    def change(self, kind: Kind, number: int, values: dict[str, Any]) -> str:
        """Set columns (their names are ours) of a workstream or task; returns its JSON."""
        if kind is TASK:
            self.index_task(number, "'delete'")
        sets = ", ".join(f"{name} = :{name}" for name in values)
        self.db.execute(f"UPDATE {kind.table} SET {sets} WHERE number = :number", values | {"number": number})
        if kind is TASK:
            self.index_task(number)
        return self.append_row(kind, "updated", number)

    def index_task(self, number: int, command: str = "NULL") -> None:
        """Tell the search index what a task holds now, or, before a change, what to forget."""
        self.db.execute(
            f"""
            INSERT INTO task_search (task_search, rowid, name, summary_text)
            SELECT {command}, number, name, summary_text FROM tasks WHERE number = :number
            """,
            {"number": number},
        )

    def insert_update(self, task: sqlite3.Row, fields: dict[str, Any], moment: str) -> str:
        """Add an update: source, message, and kind, level, tags, data where given; returns its JSON."""
        identity = uuid7()
        tags = list(dict.fromkeys(fields.get("tags", ())))
        facets = {name: fields.get(name) for name in ("source", "kind", "level")}

        def make(seq: int) -> dict[str, Any]:
            start = {"seq": seq, "id": str(identity), "task_id": task["id"], "source": fields["source"]}
            start |= {"timestamp": moment, "message": fields["message"]}
            start |= {name: fields[name] for name in ("kind", "level") if fields.get(name) is not None}
            return (
                start | {"tags": tags} | ({"data": fields["data"]} if fields.get("data") is not None else {})
            )

        body = self.append("update", task["number"], task["workstream"], make, tags=tags, **facets)
        seq = self.frames[-1].seq
        self.db.execute(
            """
            INSERT INTO updates (seq, id, task, source, kind, level, timestamp, has_data)
            VALUES (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            (seq, identity.bytes, task["number"], *facets.values(), moment, fields.get("data") is not None),
        )
        self.db.executemany("INSERT INTO update_tags (tag, seq) VALUES (?, ?)", [(tag, seq) for tag in tags])
        self.db.execute("INSERT INTO update_search (rowid, message) VALUES (?, ?)", (seq, fields["message"]))
        return body

    def claim_key(self, key: str, digest: bytes, now: datetime.datetime) -> str | None:
        """The JSON of the update that a key made before, None for a new key. Problem for another body."""
        oldest = timestamp(now - datetime.timedelta(days=KEY_DAYS))
        self.db.execute("DELETE FROM idempotency_keys WHERE created_at < ?", (oldest,))
        found = self.rows("SELECT digest, seq FROM idempotency_keys WHERE key = :key", key=key)
        if not found:
            return None
        if found[0]["digest"] != digest:
            raise Problem("conflict", "this Idempotency-Key was already used with another body")
        return self.update(found[0]["seq"])

    def keep_key(self, key: str, digest: bytes, now: datetime.datetime) -> None:
        """Remember that a key made the update just logged."""
        self.db.execute(
            "INSERT INTO idempotency_keys (key, digest, seq, created_at) VALUES (?, ?, ?, ?)",
            (key, digest, self.frames[-1].seq, timestamp(now)),
        )

    def end_session(self, signature: str, until: str) -> None:
        """Remember until its expiry that a browser session was ended."""
        self.db.execute("DELETE FROM ended_sessions WHERE until < ?", (timestamp(),))
        sql = "INSERT OR IGNORE INTO ended_sessions (signature, until) VALUES (?, ?)"
        self.db.execute(sql, (signature, until))

    def unindex_update(self, seq: int) -> None:
        """Tell the search index to forget an update; its message must still be in the log."""
        self.db.execute(
            """
            INSERT INTO update_search (update_search, rowid, message)
            SELECT 'delete', seq, message FROM update_messages WHERE seq = ?
            """,
            (seq,),
        )

    def redact_update(self, seq: int, now: str) -> str:
        """Wipe message and data of an update, leave its seq and a mark, and log that; returns its JSON.
        The search index is merged, for a deleted entry stays in it until then (seconds at a million
        updates)."""
        body = json.loads(self.update(seq))
        row = self.rows("SELECT task, workstream FROM log WHERE seq = :seq", seq=seq)[0]
        self.unindex_update(seq)
        body.pop("data", None)
        body |= {"message": "[redacted]", "redacted_at": now}
        self.db.execute("UPDATE log SET body = ? WHERE seq = ?", (dump(body), seq))
        self.db.execute("UPDATE updates SET has_data = 0 WHERE seq = ?", (seq,))
        self.db.execute("INSERT INTO update_search (rowid, message) VALUES (?, ?)", (seq, body["message"]))
        self.db.execute("INSERT INTO update_search (update_search) VALUES ('optimize')")
        return self.append("update_redacted", row["task"], row["workstream"], lambda _: body)

    def prune(self, before: str, data_only: bool) -> int:
        """Remove the next PRUNE_ROWS updates older than `before`, or only their data; returns how many."""
        has_data = " AND has_data" if data_only else ""
        sql = f"SELECT seq FROM updates WHERE timestamp < :before{has_data} ORDER BY timestamp"
        sql += f" LIMIT {PRUNE_ROWS}"
        seqs = [(row["seq"],) for row in self.rows(sql, before=before)]
        if data_only:
            # REPLACE, not UPDATE: rows that shrink in place keep their pages, and no space is given back.
            self.db.executemany(
                """
                REPLACE INTO log (seq, event, task, workstream, body)
                SELECT seq, event, task, workstream, json_remove(body, '$.data') FROM log WHERE seq = ?
                """,
                seqs,
            )
            self.db.executemany("UPDATE updates SET has_data = 0 WHERE seq = ?", seqs)
            return len(seqs)
        for (seq,) in seqs:
            self.unindex_update(seq)
            tags = [(tag, seq) for tag in json.loads(self.update(seq))["tags"]]
            self.db.executemany("DELETE FROM update_tags WHERE tag = ? AND seq = ?", tags)
        for table in ("idempotency_keys", "updates", "log"):
            self.db.executemany(f"DELETE FROM {table} WHERE seq = ?", seqs)
        if seqs:
            self.db.execute("UPDATE head SET pruned = MAX(pruned, ?)", max(seqs))
        return len(seqs)


# ======================================================================================================
# database: the file, its connections, the one writer
# ======================================================================================================

BUSY_SECONDS = 5  # how long a write waits for another process that holds the lock
BATCH_OPERATIONS = 256
APPLICATION_ID = 0x4D4F4E49  # "MONI" in the file's header: tells our file from any other database
SCHEMA_VERSION = 1
MIGRATIONS: dict[int, str] = {}  # version: the statements that lead to it from the one before


def thread_pool(size: int) -> Callable[..., Any]:
    """A function that calls another one in one of `size` real threads. Under gevent those of its own pool:
    sqlite3 blocks every greenlet while it works. Without gevent each caller is a real thread already."""
    if "gevent" in sys.modules and sys.modules["gevent.monkey"].is_module_patched("threading"):
        from gevent.threadpool import ThreadPool

        run = ThreadPool(size).apply
    else:
        gate = threading.Semaphore(size)

        def run(function: Callable[..., Any], arguments: tuple) -> Any:
            with gate:
                return function(*arguments)

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        value, error = run(outcome, (function, arguments))
        if error is not None:
            raise error
        return value

    return call


def outcome(function: Callable[..., Any], arguments: tuple) -> tuple[Any, Exception | None]:
    """What a function returns or raises: gevent prints the trace of whatever leaves a thread of its pool."""
    try:
        return function(*arguments), None
    except Exception as error:
        return None, error


class Store:
    """The database: one writer with group commit, readers with connections of their own. Opening it raises
    Problem (server_misconfigured) when the file is not one to work on."""

    def __init__(self, path: str | None, on_commit: Callable[[list[Frame]], None] = lambda frames: None):
        if sqlite3.sqlite_version_info < (3, 37):
            raise misconfigured(f"SQLite {sqlite3.sqlite_version} is too old; 3.37 or newer is needed")
        self._folder = tempfile.TemporaryDirectory(prefix="monitor-") if path is None else None
        self.path = os.path.abspath(path or os.path.join(self._folder.name, "monitor.db"))
        self._on_commit = on_commit
        self.trouble: str | None = None  # why the last write failed
        self._lock = lock_file(self.path)
        try:
            self._db = open_writer(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        self._identity = file_identity(self.path)
        self._readers: list[sqlite3.Connection] = []
        self._in_reader, self._in_writer = thread_pool(4), thread_pool(1)
        self._waiting: deque[types.SimpleNamespace] = deque()
        self._signal = threading.Event()
        self._gate = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._write_waiting, name="monitor-writer", daemon=True)
        self._thread.start()

    def read(self, query: Callable[[Queries], Any]) -> Any:
        """Run a query that may take long, in a thread where that is needed; returns what it returns."""
        return self._in_reader(self.read_here, query)

    def read_here(self, query: Callable[[Queries], Any]) -> Any:
        """Run a query of well under a millisecond right here, on one snapshot of the database."""
        try:
            if not self._readers:
                self._look_at_file()
            db = self._readers.pop() if self._readers else open_reader(self.path)
        except (OSError, sqlite3.Error) as error:
            raise unavailable(error) from error
        try:
            db.execute("BEGIN")
            return query(Queries(db))
        except sqlite3.Error as error:
            raise unavailable(error) from error
        finally:
            with contextlib.suppress(sqlite3.Error):
                db.rollback()
            self._readers.append(db)

    def backup(self, path: str) -> None:
        """Copy the database, as it is at this moment, into a new file. Writers go on meanwhile."""
        self.read(lambda q: copy_into(q.db, path))

    def write(self, operation: Callable[[Transaction], Any]) -> Any:
        """Run an operation in the writer's next transaction; returns its result once that is on disk. What
        it raises undoes it alone. Only the writer gives it up: a time-out here might follow what is
        stored."""
        pending = types.SimpleNamespace(operation=operation, done=threading.Event(), result=None, error=None)
        with self._gate:
            if self._closed:
                raise Problem("unavailable", "the server is shutting down; nothing was stored")
            self._waiting.append(pending)
        self._signal.set()
        pending.done.wait()
        if pending.error is not None:
            raise pending.error
        return pending.result

    def checkpoint(self) -> bool:
        """Fold the write-ahead log into the file and empty it; False while somebody reads in it."""
        return self._in_writer(self._checkpoint)

    def _checkpoint(self) -> bool:
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA busy_timeout = 0")  # no writer waits for a reader
            try:
                return not self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                self._db.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")
        return False

    def free_pages(self) -> int:
        """Give up to FREE_PAGES unused pages back to the file system; returns how many are left."""
        return self._in_writer(self._free_pages)

    def _free_pages(self) -> int:
        try:
            # As a script: execute() makes one step of this statement, and a step frees one page.
            self._db.executescript(f"PRAGMA incremental_vacuum({FREE_PAGES})")
            left = self._db.execute("PRAGMA freelist_count").fetchone()[0]
        except sqlite3.Error as error:
            raise unavailable(error) from error
        if not left:
            self._checkpoint()
        return left

    def close(self) -> None:
        """Finish what waits, fold the write-ahead log into the file, release it."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        self._signal.set()
        self._thread.join()
        # Where the writer's connection is used: closing it under another thread's hands is a crash.
        self._in_writer(self._release)
        if self._folder:
            self._folder.cleanup()

    def _release(self) -> None:
        while self._readers:
            self._readers.pop().close()
        self._checkpoint()
        self._db.close()
        os.close(self._lock)

    def _write_waiting(self) -> None:
        """The writer's loop: everything that waits goes into one transaction and one fsync."""
        while self._waiting or not self._closed:
            if not self._waiting:
                self._signal.wait()
                self._signal.clear()
                continue
            gathered = 0
            while gathered < len(self._waiting) < BATCH_OPERATIONS:
                gathered = len(self._waiting)
                time.sleep(0)  # who is about to write shall share this transaction
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), BATCH_OPERATIONS))]
            frames = self._in_writer(self._commit, batch)
            if frames:
                self._on_commit(frames)
            for pending in batch:
                pending.done.set()

    def _commit(self, batch: list[types.SimpleNamespace]) -> list[Frame]:
        """Run a batch in one transaction, each operation in a savepoint; returns the frames now on disk."""
        frames: list[Frame] = []
        try:
            self._look_at_file()
            self._db.execute("BEGIN IMMEDIATE")
            for pending in batch:
                frames += self._run(pending)
            self._db.execute("COMMIT")
            self.trouble = None
            return frames
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                self._db.rollback()
            self.trouble = str(error)
            for pending in batch:
                pending.error = unavailable(error)
            return []

    def _look_at_file(self) -> None:
        """Make sure that the file is the one that was opened. A new one in its place is not taken up: the
        write-ahead log of the old one would be applied to it."""
        found = file_identity(self.path)
        if found is None:
            raise FileNotFoundError(f"{self.path} is gone")
        if found != self._identity:
            raise FileNotFoundError(f"{self.path} was replaced: put it back, or restart Monitor")

    def _run(self, pending: types.SimpleNamespace) -> list[Frame]:
        transaction = Transaction(self._db)
        self._db.execute("SAVEPOINT operation")
        try:
            pending.result = pending.operation(transaction)
        except sqlite3.Error as error:
            if not self._db.in_transaction:
                raise  # the engine gave the whole transaction up: a full disk, an I/O error
            pending.error = unavailable(error)
        except BaseException as error:  # whatever it is: the writer must live on
            pending.error = error
        if pending.error is None:
            self._db.execute("RELEASE operation")
            return transaction.frames
        self._db.execute("ROLLBACK TO operation")
        self._db.execute("RELEASE operation")
        return []


def unavailable(error: Exception) -> Problem:
    """A database error as the sentence for who asked: nothing was stored, try again."""
    return Problem("unavailable", f"the database cannot be used now ({error}); nothing was stored, try again")


def file_identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one that took its place; None when there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def lock_file(path: str) -> int:
    """Take the lock beside a database; returns its descriptor. Problem when another process holds it."""
    import fcntl  # not on Windows, where only the client commands work

    try:
        descriptor = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise misconfigured(f"cannot write beside {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise misconfigured(f"another Monitor is using {path}; stop it, or name another --db") from None
    return descriptor


def connect(path: str, mode: str) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are begun by hand."""
    location = "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + f"?mode={mode}"
    settings = {"isolation_level": None, "check_same_thread": False, "timeout": BUSY_SECONDS}
    db = sqlite3.connect(location, uri=True, **settings)
    db.row_factory = sqlite3.Row
    return db


def copy_into(db: sqlite3.Connection, path: str) -> None:
    """Copy a database into a new file."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(path, "rw")) as target:
        db.backup(target)


def open_reader(path: str) -> sqlite3.Connection:
    """A read-only connection. Only the writer may checkpoint: SQLite before 3.51.3 can corrupt a database
    in which two connections write or checkpoint at the same moment."""
    db = connect(path, "ro")
    db.execute("PRAGMA query_only = ON")
    return db


def open_writer(path: str) -> sqlite3.Connection:
    """The one connection that writes, on a file that is ours and of our version."""
    version = stored_version(path)
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
        db = connect(path, "rw")
        try:
            if version == 0:
                create_schema(db)
            elif version < SCHEMA_VERSION:
                migrate(db, path, version)
            # FULL: what was acknowledged survives power loss too, not only kill -9. What is wiped must not be
            # found in the file: secure_delete.
            db.executescript(
                """
                PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
                PRAGMA foreign_keys = ON; PRAGMA secure_delete = ON;
                """
            )
        except BaseException:
            db.close()
            raise
        return db
    except (OSError, sqlite3.Error) as error:
        raise misconfigured(f"cannot open {path}: {error}") from error


def stored_version(path: str) -> int:
    """The schema version of a file, 0 when it is missing or empty. Problem when it is not ours."""
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return 0
    try:
        # Without a write-ahead log to read, immutable keeps SQLite from making one beside a file not ours.
        mode = "ro" if os.path.exists(path + "-wal") else "ro&immutable=1"
        with contextlib.closing(connect(path, mode)) as db:
            application = db.execute("PRAGMA application_id").fetchone()[0]
            version = db.execute("PRAGMA user_version").fetchone()[0]
            empty = not db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()[0]
    except sqlite3.Error as error:
        raise misconfigured(f"cannot read {path}: {error}; it was left as it is") from None
    if empty and application == 0:
        return 0
    if application != APPLICATION_ID:
        raise misconfigured(f"{path} is not a Monitor database; it was left as it is")
    if version > SCHEMA_VERSION:
        raise misconfigured(
            f"{path} was made by a newer Monitor (schema {version}, this one knows {SCHEMA_VERSION}); "
            "it was left as it is: update Monitor"
        )
    return version


def create_schema(db: sqlite3.Connection) -> None:
    """Make a fresh database, all or nothing. auto_vacuum works only when set before anything is written."""
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("PRAGMA journal_mode = WAL")
    # One script: Python commits what is open before it runs one.
    first = f"INSERT INTO head VALUES (1, '{uuid.uuid4()}', 0, 0, randomblob(32));"
    stamp = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
    db.executescript(f"BEGIN; {asset('schema.sql').decode()} {first} {stamp} COMMIT;")


def migrate(db: sqlite3.Connection, path: str, version: int) -> None:
    """Bring an older database to SCHEMA_VERSION, all steps or none, after a copy of it was put beside it."""
    copy_into(db, f"{path}.v{version}.{time.strftime('%Y%m%d-%H%M%S')}.backup")
    steps = "".join(f"{MIGRATIONS[step]};" for step in range(version + 1, SCHEMA_VERSION + 1))
    db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


# ======================================================================================================
# stream: a subscriber is a cursor, the broadcaster only wakes
# ======================================================================================================

RING_BYTES = 8 * 1024 * 1024
WAKE_SECONDS = 0.005  # one wake and write costs 9 to 15 microseconds a reader, an event inside a batch 0.3
WAIT_SECONDS = 5  # a quiet stream looks up this often; with the next, a sign of life at least every 15 s
QUIET_SECONDS = 9
CHECKPOINT_ROWS = 1000
MAX_STREAMS = 2000


class Broadcaster:
    """The newest frames in a ring bounded by bytes, and the readers' wake-up. There is no queue per
    reader: nothing is dropped, replay and live have no seam, a stuck reader costs the batch it holds."""

    def __init__(self):
        self.head = self.streams = 0
        self.closed = False
        self._frames: list[Frame] = []
        self._seqs: list[int] = []
        self._bytes = 0
        self._lock = threading.Lock()
        self._dirty = threading.Event()
        self._wake = threading.Event()
        threading.Thread(target=self._wake_readers, name="monitor-waker", daemon=True).start()

    def publish(self, frames: list[Frame]) -> None:
        """Take in committed frames, in order, and wake the readers."""
        if any(frame.event == "update_redacted" for frame in frames):
            self.forget()  # the ring holds what was wiped
        with self._lock:
            self._frames += frames
            self._seqs += [frame.seq for frame in frames]
            self._bytes += sum(len(frame.sse) for frame in frames)
            cut = 0
            while self._bytes > RING_BYTES:
                self._bytes -= len(self._frames[cut].sse)
                cut += 1
            del self._frames[:cut], self._seqs[:cut]
            self.head = frames[-1].seq
        self._dirty.set()

    def after(self, cursor: int) -> list[Frame] | None:
        """The next frames after `cursor`, at most about 1 MiB; None when they have left the ring."""
        with self._lock:
            if cursor >= self.head:
                return []
            if not self._seqs or self._seqs[0] > cursor + 1:
                return None
            start = bisect.bisect_right(self._seqs, cursor)
            end, size = start, 0
            while end < len(self._frames) and size < READ_BYTES:
                size += len(self._frames[end].sse)
                end += 1
            return self._frames[start:end]

    def wait(self, cursor: int, seconds: float) -> bool:
        """Wait until there is something after `cursor` or the stream closes; False after `seconds`."""
        wake = self._wake
        if self.head > cursor or self.closed:
            return True
        return wake.wait(seconds)

    def forget(self) -> None:
        """Drop the ring: rows of the log were changed or removed, and must be read again."""
        with self._lock:
            self._frames, self._seqs, self._bytes = [], [], 0

    def leave(self) -> None:
        """A stream has ended."""
        self.streams -= 1

    def close(self) -> None:
        """End every stream."""
        self.closed = True
        self._dirty.set()

    def _wake_readers(self) -> None:
        """Wake at most every WAKE_SECONDS, the first event of a lull at once."""
        while True:
            self._dirty.wait()
            self._dirty.clear()
            wake, self._wake = self._wake, threading.Event()
            wake.set()
            if self.closed:
                self._wake.set()  # for a reader that took it up between the swap and the close
                return
            time.sleep(WAKE_SECONDS)


def follow(store: Store, broadcaster: Broadcaster, cursor: int, chosen: Filter, poll: bool) -> Iterator:
    """Yield (frames, cursor): the matching events after a cursor, oldest first, and how far it got. A
    batch is empty when the cursor moved past events that do not match, or, the cursor unmoved, after
    WAIT_SECONDS without any. Ends when the broadcaster closes; with `poll` when there is no more."""
    everything = chosen == EVERYTHING
    while not broadcaster.closed:
        frames = broadcaster.after(cursor)
        if frames is None:
            head = broadcaster.head
            frames, cursor = store.read(lambda q, at=cursor, head=head: q.events(at, chosen, head))
            yield frames, cursor
        elif frames:
            cursor = frames[-1].seq
            yield frames if everything else [frame for frame in frames if chosen.matches(frame)], cursor
        elif poll:
            return
        elif not broadcaster.wait(cursor, WAIT_SECONDS):
            yield [], cursor


class Cursor(NamedTuple):
    """Where a stream begins: after which seq, what `hello` says, and why the wish could not be met."""

    seq: int
    resumed: bool
    reset: str | None = None


def place_cursor(given: str | None, stream: str | None, head: sqlite3.Row) -> Cursor:
    """Read the cursor of a client. Never an error: one that cannot be honoured resets to what is possible,
    for EventSource gives up for good on any status but 200."""
    known = given is not None and re.fullmatch(r"[0-9]{1,19}", given, re.ASCII)
    if given is None or not known or stream not in (None, head["stream"]) or int(given) > head["seq"]:
        reason = "other_stream" if stream not in (None, head["stream"]) else "ahead" if known else "unknown"
        return Cursor(head["seq"], False, None if given is None else reason)
    if int(given) < head["pruned"]:
        return Cursor(int(given), False, "pruned")
    return Cursor(int(given), True)


def encode_sse(event: str, data: Any, seq: int | None = None) -> bytes:
    """One SSE event that is not in the log (hello, reset, checkpoint)."""
    return f"{'' if seq is None else f'id: {seq}' + chr(10)}event: {event}\ndata: {dump(data)}\n\n".encode()


def encode_line(event: str, data: Any, seq: int | None = None) -> bytes:
    """The same as one line of NDJSON."""
    return (dump({"event": event} | ({} if seq is None else {"id": seq}) | {"data": data}) + "\n").encode()


def frame_line(frame: Frame) -> bytes:
    """A log frame as one line of NDJSON."""
    return b'{"event":"%s","id":%d,"data":%s}\n' % (frame.event.encode(), frame.seq, frame.body)


class StreamFormat(NamedTuple):
    """How a stream is written: media type, an event that is not in the log, a frame, a sign of life."""

    mimetype: str
    special: Callable[..., bytes]
    frame: Callable[[Frame], bytes]
    heartbeat: bytes
    ends: bool  # whether it can say when to come back


FORMATS = {
    "sse": StreamFormat("text/event-stream", encode_sse, lambda frame: frame.sse, b":\n\n", True),
    "ndjson": StreamFormat("application/x-ndjson", encode_line, frame_line, b"\n", False),
}


def retry_line() -> bytes:
    """When to come back, jittered: a thousand readers must not return in the same moment."""
    return b"retry: %d\n" % random.randint(1000, 3000)


@functools.lru_cache(maxsize=1)
def joined(encode: Callable[[Frame], bytes], frames: tuple[Frame, ...]) -> bytes:
    """Frames as they are written: the readers at the tail all get the same."""
    return b"".join([encode(frame) for frame in frames])


def stream_bytes(style: StreamFormat, start: Cursor, head: sqlite3.Row, batches: Iterable) -> Iterator[bytes]:
    """Write a stream: hello, reset where one is due, then batch by batch, with checkpoints and heartbeats."""
    hello = {"stream": head["stream"], "seq": head["seq"], "resumed": start.resumed}
    first = style.special("hello", hello)
    if start.reset:
        seq = max(start.seq, head["pruned"])
        first += style.special("reset", {"reason": start.reset, "seq": seq}, start.seq)
    yield retry_line() + b"\n" + first if style.ends else first
    seen = told = cursor = start.seq
    written = time.monotonic()
    for frames, cursor in batches:
        chunk = joined(style.frame, tuple(frames)) if frames else b""
        told = frames[-1].seq if frames else told
        quiet = cursor == seen or time.monotonic() - written > QUIET_SECONDS
        if cursor - told >= CHECKPOINT_ROWS or (quiet and cursor > told):
            chunk += style.special("checkpoint", {"seq": cursor}, cursor)
            told = cursor
        elif quiet and not chunk and time.monotonic() - written > QUIET_SECONDS:
            chunk = style.heartbeat
        seen = cursor
        if chunk:
            yield chunk
            written = time.monotonic()
    if cursor > told:
        yield style.special("checkpoint", {"seq": cursor}, cursor)


def farewell(style: StreamFormat, broadcaster: Broadcaster) -> Iterator[bytes]:
    """The end of a stream that the server ends: when to come back."""
    if style.ends and broadcaster.closed:
        yield retry_line() + b": come back later\n\n"


# ======================================================================================================
# monitor: the operations
# ======================================================================================================


class Monitor:
    """Everything that API, pages, hooks and commands do. Answers are the JSON texts that are stored."""

    def __init__(self, config: Config):
        self.config = config
        self.broadcaster = Broadcaster()
        self.wrong_tries: deque[float] = deque()
        self._store: Store | None = None
        self._opening = threading.Lock()

    @property
    def store(self) -> Store:
        """The database, opened at its first use."""
        if self._store is None:
            self.open()
        return self._store

    def open(self) -> None:
        """Open the database; Problem (server_misconfigured) when that cannot be."""
        with self._opening:
            if self._store is None:
                store = Store(self.config.database, self.broadcaster.publish)
                self.broadcaster.head = store.read(lambda q: q.head()["seq"])
                self._store = store
                if self.config.retention:
                    threading.Thread(target=self._retain, name="monitor-retention", daemon=True).start()

    def _retain(self) -> None:
        """Apply MONITOR_RETENTION now and every hour."""
        while not self.broadcaster.closed:
            for data_only, age in self.config.retention:
                before = timestamp(datetime.datetime.now(datetime.UTC) - age)
                with contextlib.suppress(Problem):
                    while self.prune(before, data_only)[1]:
                        pass
            time.sleep(3600)

    def columns(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Cleaned fields as column values, masked; metadata is kept as text."""
        values = redact(fields) if self.config.redact else fields
        return values | ({"metadata": dump(values["metadata"])} if "metadata" in values else {})

    def close(self) -> None:
        """End the streams, finish the writes, close the database."""
        self.broadcaster.close()
        if self._store is not None:
            self._store.close()

    def create(self, kind: Kind, payload: Any, moment: str | None = None) -> str:
        """Make a workstream or task from its body. `moment` sets its time (a replay), here and below."""
        now = moment or timestamp()
        values = self.columns(clean(payload, kind.new)) | {"created_at": now, "updated_at": now}

        def operation(t: Transaction) -> str:
            workstream = values.pop("workstream_id", None)
            place = {} if workstream is None else {"workstream": t.one(WORKSTREAM, workstream)["number"]}
            return t.add(kind, values | place)

        return self.store.write(operation)

    def change(self, kind: Kind, reference: str, payload: Any, moment: str | None = None) -> str:
        """Apply a body of changes; without any change all stays as it is and nothing is logged."""
        values, now = self.columns(clean(payload, kind.changes)), moment or timestamp()

        def operation(t: Transaction) -> str:
            row = t.one(kind, reference)
            changes = task_changes(t, row, values, now) if kind is TASK else values
            if not changes:
                return dump(kind.make(row))
            return t.change(kind, row["number"], changes | {"updated_at": now})

        return self.store.write(operation)

    def add_update(
        self, fields: dict[str, Any], key: str | None = None, sent: Any = None, moment: str | None = None
    ) -> tuple[str, bool]:
        """Store an update (cleaned NEW_UPDATE fields); returns its JSON and whether it is new: with an
        idempotency key the same that was `sent` before is not."""
        sent = fields if sent is None else sent
        digest = hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).digest() if key else b""
        fields = redact(fields) if self.config.redact else fields

        def operation(t: Transaction) -> tuple[str, bool]:
            now = datetime.datetime.now(datetime.UTC)
            earlier = t.claim_key(key, digest, now) if key else None
            if earlier is not None:
                return earlier, False
            body = t.insert_update(t.one(TASK, fields["task_id"]), fields, moment or timestamp(now))
            if key:
                t.keep_key(key, digest, now)
            return body, True

        return self.store.write(operation)

    def redact_update(self, seq: int) -> str:
        """Wipe message and data of an update for good; returns its JSON. Problem (not_found)."""
        body = self.store.write(lambda t: t.redact_update(seq, timestamp()))
        if not self.store.checkpoint():
            threading.Thread(target=self._scrub, name="monitor-scrub", daemon=True).start()
        return body

    def _scrub(self) -> None:
        """Empty the write-ahead log as soon as nobody reads from it."""
        while not self.broadcaster.closed and not self.store.checkpoint():
            time.sleep(0.5)

    def prune(self, before: str, data_only: bool, seconds: float = 1.0) -> tuple[int, int]:
        """Remove updates older than `before`, or only their data, in small batches for about some seconds;
        returns how many went and how many are left. The space is given back with the last of them."""
        deadline, done, count = time.monotonic() + seconds, 0, 1
        while count and time.monotonic() < deadline:
            count = self.store.write(lambda t: t.prune(before, data_only))
            done += count
        left = self.store.read(lambda q: q.expired(before, data_only))
        if done:
            self.broadcaster.forget()
        while not left and self.store.free_pages():
            pass
        return done, left

    def health(self) -> dict[str, Any]:
        """How the server is: database, writer, streams."""
        head = self.store.read(lambda q: q.head())
        return {
            "status": "ok" if self.store.trouble is None else "degraded",
            "database": self.store.path,
            "writer": self.store.trouble or "ok",
            "streams": self.broadcaster.streams,
            "seq": head["seq"],
            "version": __version__,
            "sqlite_version": sqlite3.sqlite_version,
        }


def task_changes(t: Transaction, row: sqlite3.Row, values: dict[str, Any], now: str) -> dict[str, Any]:
    """The columns that a TASK_CHANGES body sets."""
    changes = dict(values)
    if "workstream_id" in changes:
        changes["workstream"] = t.one(WORKSTREAM, changes.pop("workstream_id"))["number"]
    if "hidden" in changes:
        changes["hidden_at"] = (row["hidden_at"] or now) if changes.pop("hidden") else None
    if changes.get("summary_text") == "":
        changes |= {"summary_text": None, "summary_source": None, "summary_updated_at": None}
    elif "summary_text" in changes:
        changes |= {"summary_source": changes.get("summary_source", "manual"), "summary_updated_at": now}
    return changes


def draft_fields(task_id: str, draft: Draft) -> dict[str, Any]:
    """What an adapter made, as the fields of an update."""
    fields = {"task_id": task_id, "source": draft.source, "message": draft.message, "kind": draft.kind}
    return fields | {"level": draft.level, "tags": list(draft.tags), "data": draft.data}


# ======================================================================================================
# guard: who may ask
# ======================================================================================================

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
WILDCARDS = ("0.0.0.0", "::")
SESSION_DAYS = 30
TRIES_A_MINUTE = 10
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def monitor() -> Monitor:
    """The Monitor that the current request is for."""
    return flask.current_app.extensions["monitor"]


def quoted(text: str) -> str:
    """Text as a part of a path or query."""
    from urllib.parse import quote

    return quote(text.encode("utf-8", "surrogateescape"), safe="")


def wants_page() -> bool:
    """Whether a browser asks for a page."""
    request = flask.request
    return "text/html" in request.headers.get("Accept", "") and not request.path.startswith("/api/")


def host_allowed(host: str | None, config: Config) -> bool:
    """Whether a Host header names this server: else a site whose DNS name is rebound to us reads all."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?", (host or "").lower())
    bound = () if config.host in WILDCARDS else (config.host.lower(),)
    return bool(found) and (found[1] or found[2]) in (*LOOPBACK_NAMES, *bound, *config.allowed_hosts)


def foreign_site(environ: Any, host: str, safe: bool) -> bool:
    """Whether a browser sent this for another web site. Other clients send none of these headers."""
    site, origin = environ.get("HTTP_SEC_FETCH_SITE"), environ.get("HTTP_ORIGIN")
    followed_link = safe and environ.get("HTTP_SEC_FETCH_MODE") == "navigate"
    if site not in (None, "same-origin", "none") and not followed_link:
        return True
    return origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())


def match_token(given: bytes, tokens: tuple[bytes, ...]) -> bytes | None:
    """The token that `given` is. Bytes, in constant time: compare_digest raises for non-ASCII text."""
    matches = [known for known in tokens if hmac.compare_digest(given, known)]
    return matches[0] if given and matches else None


def sign(secret: bytes, *parts: bytes) -> str:
    """A signature that only the owner of the secret can make."""
    return hmac.new(secret, b"\0".join(parts), hashlib.sha256).hexdigest()


def open_session(secret: bytes, token: bytes, now: float) -> str:
    """The value of a session cookie: its end, a random part, and a signature that binds both to a token."""
    start = f"{int(now + SESSION_DAYS * 86400)}.{secrets.token_hex(8)}"
    return f"{start}.{sign(secret, token, start.encode())}"


def session_valid(cookie: str, secret: bytes, tokens: tuple[bytes, ...], now: float) -> bool:
    """Whether a session cookie is ours, has not run out, and its token is still one of ours."""
    found = re.fullmatch(r"(([0-9]{1,12})\.[0-9a-f]{16})\.([0-9a-f]{64})", cookie, re.ASCII)
    if not found or int(found[2]) < now:
        return False
    return any(hmac.compare_digest(found[3], sign(secret, token, found[1].encode())) for token in tokens)


def cookie_name() -> str:
    """Cookies know no port: without it in the name, servers on one host would share their sessions."""
    return f"monitor_session_{flask.request.environ.get('SERVER_PORT', '')}"


def logged_in() -> bool:
    """Whether the request carries a browser session that holds."""
    cookie, served = flask.request.cookies.get(cookie_name(), ""), monitor()
    if not cookie or not served.config.tokens:
        return False
    head, ended = served.store.read_here(lambda q: (q.head(), q.session_ended(cookie)))
    return not ended and session_valid(cookie, head["secret"], served.config.tokens, time.time())


def token_needed(config: Config) -> bool:
    """Whether the current request needs a token or a session."""
    request = flask.request
    if request.path == "/health" and not request.args.get("full"):
        return False
    if request.path == "/login" or request.path.startswith("/static/"):
        return False
    if config.auth_mode == "strict" and not config.tokens:
        raise misconfigured("strict mode needs tokens: set MONITOR_API_TOKENS")
    writes = request.method not in SAFE_METHODS or request.path.startswith("/api/admin/")
    return bool(config.tokens) and (config.auth_mode == "strict" or writes)


def guard():
    """Refuse a request that may not be answered, before anything else looks at it."""
    request, config = flask.request, monitor().config
    host = request.environ.get("HTTP_HOST")
    if not host_allowed(host, config):
        raise Problem("forbidden", "this server does not answer to that host name; see MONITOR_ALLOWED_HOSTS")
    if foreign_site(request.environ, host, request.method in SAFE_METHODS):
        raise Problem("forbidden", "requests from another web site are refused")
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    bearer = token.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
    if not token_needed(config) or match_token(bearer, config.tokens) or logged_in():
        return None
    if wants_page() and request.method in SAFE_METHODS:
        return flask.redirect("/login?next=" + quoted(request.full_path.rstrip("?")), 303)
    raise Problem("unauthorized", "a valid token is needed: Authorization: Bearer TOKEN, or log in at /login")


# ======================================================================================================
# web: API routes, stream, pages
# ======================================================================================================

PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
ERROR_HEADERS = {503: {"Retry-After": "2"}, 408: {"Connection": "close"}, 413: {"Connection": "close"}}
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
PAGE_ROWS = 100


def answer(text: str, status: int = 200):
    """A JSON text as a response."""
    return flask.Response(text, status, content_type="application/json")


def items(texts: list[str], total: int | None):
    """A List response of JSON texts, joined as they are stored (building dicts costs 17 times as much)."""
    count = "" if total is None else f',"total":{total}'
    return answer(f'{{"items":[{",".join(texts)}]{count}}}')


def read_body(limit: int = MAX_BODY) -> bytes:
    """The request's body; Problem (too_large, timed_out, invalid_input)."""
    environ, raw, chunk = flask.request.environ, b"", b"-"
    length = environ.get("CONTENT_LENGTH") or ("" if environ.get("wsgi.input_terminated") else "0")
    if length and not re.fullmatch("[0-9]{1,18}", length, re.ASCII):
        raise invalid("Content-Length is not a number")
    wanted = int(length) if length else limit + 1
    source = environ["wsgi.input"]
    if isinstance(source, io.RawIOBase):
        # Werkzeug's decoder of chunks reports more than it read: RawIOBase.read would copy memory behind it.
        source = io.BufferedReader(source)
    try:
        while chunk and len(raw) < wanted and int(length or 0) <= limit:
            chunk = source.read(wanted - len(raw))
            raw += chunk
    except TimeoutError:
        raise Problem("timed_out", "the body took too long to arrive") from None
    except (OSError, ValueError):
        raise invalid("the body was not received whole") from None
    if max(len(raw), int(length or 0)) > limit:
        raise Problem("too_large", f"the body has more than {limit} bytes")
    if length and len(raw) < wanted:
        raise invalid("the body was not received whole")
    return raw


def json_body(limit: int = MAX_BODY) -> Any:
    """The request's JSON. The media type must say so: a foreign page cannot send it without being asked."""
    kind = flask.request.mimetype
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise Problem("unsupported_media_type", "the body must be JSON: Content-Type: application/json")
    return parse_json(read_body(limit))


def query(fields: Fields) -> dict[str, Any]:
    """The request's query, checked by its field table; tags may come several times."""
    args = flask.request.args
    given = {name: QueryText(args[name]) for name in fields if name in args}
    return clean(given | ({"tag": args.getlist("tag")} if "tag" in given else {}), fields)


def read_path() -> None:
    """Check the reference or seq in a path, for its handler; what can name nothing is not found."""
    named = flask.request.view_args or {}
    if "seq" in named:
        if not re.fullmatch(r"[0-9]{1,18}", named["seq"], re.ASCII):
            raise Problem("not_found", f"no update {named['seq'][:60]!r}")
        named["seq"] = int(named["seq"])
    if "reference" in named:
        try:
            named["reference"] = FIELDS["task_id"].check(named["reference"], "id")
        except Problem:
            raise Problem("not_found", f"no such id: {named['reference'][:60]!r}") from None


def health():
    """Whether the server answers; with full=1, how it is."""
    full = flask.request.args.get("full")
    return answer(dump(monitor().health() if full else {"status": "ok"}))


def kind_routes(kind: Kind, read: Callable[[Queries, dict[str, Any]], list[dict[str, Any]]], wanted: Fields):
    """The routes of the API that make, list, show and change workstreams or tasks."""

    def list_all():
        """Those that the query asks for."""
        asked = query(wanted)
        found = monitor().store.read(lambda q: read(q, asked))
        return items([dump(each) for each in found], len(found))

    def show_one(reference: str):
        """One of them."""
        return answer(monitor().store.read_here(lambda q: dump(kind.make(q.one(kind, reference)))))

    def change_one(reference: str):
        """Change one of them."""
        return answer(monitor().change(kind, reference, json_body()))

    place, one = f"/api/{kind.table}", f"/api/{kind.table}/<reference>"
    create_one = ("POST", place, lambda: answer(monitor().create(kind, json_body()), 201))
    return create_one, ("GET", place, list_all), ("GET", one, show_one), ("PATCH", one, change_one)


def post_update(
    wanted: Fields, draft: Callable[[dict], Draft] | None = None, limit: int = MAX_BODY, **own: str
):
    """Store an update, or the one that `draft` makes of a payload; `own` are fields that no client sets.
    201, or 200 when its idempotency key has been seen with the same body."""
    posted = clean(json_body(limit), wanted) | own
    key = flask.request.headers.get("Idempotency-Key")
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,200}", key):
        raise invalid("Idempotency-Key must be 1 to 200 printable ASCII characters")
    made = draft_fields(posted["task_id"], draft(posted)) if draft else posted
    body, created = monitor().add_update(made, key, posted)
    return answer(body, 201 if created else 200)


def claude_draft(posted: dict[str, Any]) -> Draft:
    """The update of a Claude Code hook payload."""
    return agent_draft("claude", posted["payload"])


def webhook_draft(posted: dict[str, Any]) -> Draft:
    """The update of a GitHub webhook payload."""
    return github_draft(posted["payload"], posted.get("headers"))


def list_updates():
    """One page of updates."""
    wanted = query(UPDATE_QUERY)
    return items(*monitor().store.read(lambda q: q.updates(q.filter(wanted), wanted)))


def stream():
    """Follow the log: SSE, or NDJSON; with poll=1 what there is, then the end."""
    request, broadcaster, store = flask.request, monitor().broadcaster, monitor().store
    wanted, accepts = query(STREAM_FILTER), request.headers.get("Accept", "")
    lines = request.args.get("format") == "ndjson" or "application/x-ndjson" in accepts
    style = FORMATS["ndjson" if lines else "sse"]
    names = ("lastEventId", "last_event_id", "after_seq")
    cursors = [request.headers.get("Last-Event-ID"), *(request.args.get(name) for name in names)]
    given = next((text for text in cursors if text), None)
    head, chosen = store.read_here(lambda q: (q.head(), q.filter(wanted)))
    start = place_cursor(given, request.args.get("stream"), head)
    full = broadcaster.streams >= MAX_STREAMS or broadcaster.closed
    if full:
        body: Iterable[bytes] = [b"retry: 30000\n: too many streams\n\n"] if style.ends else []
    else:
        batches = follow(store, broadcaster, start.seq, chosen, request.args.get("poll") in ("1", "true"))
        body = itertools.chain(stream_bytes(style, start, head, batches), farewell(style, broadcaster))
        broadcaster.streams += 1
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    response = flask.Response(body, mimetype=style.mimetype, headers=headers)
    if not full:
        response.call_on_close(broadcaster.leave)
    return response


def send_backup():
    """The database, as it is at this moment, as a file."""
    with tempfile.TemporaryDirectory(prefix="monitor-backup-") as folder:
        monitor().store.backup(os.path.join(folder, "monitor.db"))
        file = open(os.path.join(folder, "monitor.db"), "rb")  # noqa: SIM115 (the response closes it)
    chunks = iter(lambda: file.read(256 * 1024), b"")
    response = flask.Response(chunks, mimetype="application/vnd.sqlite3")
    response.content_length = os.fstat(file.fileno()).st_size
    response.call_on_close(file.close)
    return response


def prune_updates():
    """Remove old updates for a second; the caller repeats it while any are left."""
    fields = clean(json_body(), PRUNING)
    before = timestamp(datetime.datetime.now(datetime.UTC) - parse_age(fields["older_than"]))
    data_only = fields.get("data_only", False)
    if fields.get("dry_run"):
        done, left = 0, monitor().store.read(lambda q: q.expired(before, data_only))
    else:
        done, left = monitor().prune(before, data_only)
    return answer(dump({"pruned": done, "left": left}))


def log_in():
    """Open a browser session for a token; a fixed number of wrong tries a minute."""
    served, posted = monitor(), form(["token", "next"])
    token = match_token(posted.get("token", "").strip().encode(), served.config.tokens)
    now, wrong = time.monotonic(), served.wrong_tries
    while wrong and wrong[0] < now - 60:
        wrong.popleft()
    if len(wrong) >= TRIES_A_MINUTE:
        raise Problem("too_many_requests", "too many wrong tokens; wait a minute")
    if token is None:
        wrong.append(now)
        return page("login.html", 401, next=local_path(posted.get("next")), wrong=True)
    response = flask.redirect(local_path(posted.get("next")), 303)
    value = open_session(served.store.read_here(lambda q: q.head()["secret"]), token, time.time())
    options = {"max_age": SESSION_DAYS * 86400, "httponly": True, "samesite": "Strict"}
    response.set_cookie(cookie_name(), value, secure=flask.request.is_secure, **options)
    return response


def log_out():
    """End the browser session for good."""
    cookie = flask.request.cookies.get(cookie_name(), "")
    if logged_in():
        until = datetime.datetime.fromtimestamp(int(cookie.partition(".")[0]), datetime.UTC)
        monitor().store.write(lambda t: t.end_session(cookie, timestamp(until)))
    response = flask.redirect("/login", 303)
    response.delete_cookie(cookie_name(), httponly=True, samesite="Strict")
    return response


def local_path(text: str | None) -> str:
    """A path of this server to go on to; anything that could lead elsewhere is the dashboard."""
    return text if text and re.fullmatch(r"/(?![/\\])[\x21-\x5b\x5d-\x7e]*", text) else "/dashboard"


def page(template: str, status: int = 200, **values: Any):
    """Render a page."""
    sessions = bool(monitor().config.tokens)  # else there is nothing to log in to
    values |= {"version": __version__, "sessions": sessions, "logged_in": sessions and logged_in()}
    return flask.render_template(template, **values), status


def show_page(template: str, read: Callable[[Queries, dict[str, Any]], dict[str, Any]], names: str):
    """A page of what `read` finds in the database for a query of these names."""
    wanted = query(fields(names))
    return page(template, **monitor().store.read(lambda q: read(q, wanted)))


def dashboard(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """Active workstreams and their tasks, each with its newest update."""
    newest = q.newest_of_tasks()
    groups = {w["id"]: {"workstream": w, "tasks": []} for w in q.workstreams({})}
    for task in q.tasks({}):
        last = json.loads(newest[task["id"]]) if task["id"] in newest else None
        groups[task["workstream_id"]]["tasks"].append(task | {"last": last})
    return {"groups": list(groups.values())}


def thread(q: Queries, chosen: Filter, wanted: dict[str, Any]) -> dict[str, Any]:
    """One page of updates for a template, newest first, and the seq before which older ones are."""
    wanted = wanted | {"order": "desc", "total": False}
    updates = [json.loads(body) for body in q.updates(chosen, wanted | {"limit": PAGE_ROWS})[0]]
    last = updates[-1]["seq"] if updates else 0
    more = q.updates(chosen, wanted | {"before_seq": last, "limit": 1})[0]
    return {"updates": updates, "older": last if more else None}


def task_page(reference: str):
    """One task: its forms and its thread, newest first."""

    def read(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
        row = q.one(TASK, reference)
        chosen = Filter(task=row["number"])
        workstream = WORKSTREAM.make(q.one(WORKSTREAM, row["workstream_id"]))
        found = {"task": TASK.make(row), "workstream": workstream}
        found |= {"workstreams": q.workstreams({}), "total": q.updates(chosen, {"limit": 1})[1]}
        return found | thread(q, chosen, wanted)

    return show_page("task.html", read, "before_seq")


def whole_thread(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """The newest updates over all tasks, newest first."""
    found = thread(q, EVERYTHING, wanted)
    tasks = {task["id"]: task for task in q.tasks({"include_hidden": True, "include_archived": True})}
    for update in found["updates"]:
        update["task"] = tasks.get(update["task_id"])
    return found | {"query": wanted.get("q", "")}


def form(fields: Iterable[str], blanks: bool = True) -> dict[str, Any]:
    """The named fields of a posted form, those that were filled in; also blank ones, if wanted."""
    from urllib.parse import parse_qsl

    if flask.request.mimetype != "application/x-www-form-urlencoded":
        raise Problem("unsupported_media_type", "a form must be sent as application/x-www-form-urlencoded")
    try:
        pairs = parse_qsl(read_body().decode(), True, max_num_fields=100, errors="strict")
    except ValueError:
        raise invalid("the form is not UTF-8 text, or has too many fields") from None
    given = {name: text for name, text in pairs if name in fields and (blanks or text.strip())}
    posted: dict[str, Any] = {name: QueryText(text.replace("\r\n", "\n")) for name, text in given.items()}
    return posted | ({"tags": split_list(posted["tags"])} if "tags" in posted else {})


def see_other(place: str, stored: str):
    """Go on to the page of what a form has stored."""
    return flask.redirect(place.format(**json.loads(stored)), 303)


def add_update_form(reference: str):
    """The task page's form for an update."""
    posted = form(MANUAL_UPDATE, blanks=False) | {"task_id": reference}
    body, _ = monitor().add_update(clean(posted, MANUAL_UPDATE) | {"source": "manual"})
    return see_other("/tasks/{task_id}#u{seq}", body)


def change_task_form(reference: str):
    """The task page's forms for name, status, summary, workstream and hiding."""
    return see_other("/tasks/{id}", monitor().change(TASK, reference, form(TASK_CHANGES)))


def static_file(name: str):
    """A file of static/, with an ETag."""
    media_type = MEDIA_TYPES.get(name.rpartition(".")[2])
    if media_type and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        with contextlib.suppress(FileNotFoundError):
            response = flask.Response(asset("static", name), mimetype=media_type)
            response.add_etag()
            response.headers["Cache-Control"] = "no-cache"
            return response.make_conditional(flask.request)
    raise Problem("not_found", f"no such file: {name[:60]!r}")


ROUTES = (  # an answer of one expression stands here
    ("GET", "/health", health),
    *kind_routes(WORKSTREAM, Queries.workstreams, WORKSTREAM_QUERY),
    *kind_routes(TASK, Queries.tasks, TASK_QUERY),
    ("POST", "/api/updates", lambda: post_update(NEW_UPDATE)),
    ("POST", "/api/updates/manual", lambda: post_update(MANUAL_UPDATE, source="manual")),
    ("POST", "/api/updates/claude-hook", lambda: post_update(CLAUDE_HOOK, claude_draft)),
    ("POST", "/api/updates/github-webhook", lambda: post_update(GITHUB_WEBHOOK, webhook_draft, MAX_WEBHOOK)),
    ("GET", "/api/updates", list_updates),
    ("GET", "/api/updates/<seq>", lambda seq: answer(monitor().store.read_here(lambda q: q.update(seq)))),
    ("POST", "/api/updates/<seq>/redact", lambda seq: answer(monitor().redact_update(seq))),
    ("GET", "/api/stream", stream),
    ("GET", "/api/admin/backup", send_backup),
    ("GET", "/api/admin/check", lambda: answer(dump({"problems": monitor().store.read(Queries.check)}))),
    ("POST", "/api/admin/prune", prune_updates),
    ("GET", "/login", lambda: page("login.html", next=local_path(flask.request.args.get("next")))),
    ("POST", "/login", log_in),
    ("POST", "/logout", log_out),
    ("GET", "/", lambda: flask.redirect("/dashboard", 303)),
    ("GET", "/dashboard", lambda: show_page("dashboard.html", dashboard, "")),
    ("GET", "/tasks/<reference>", task_page),
    ("GET", "/stream", lambda: show_page("stream.html", whole_thread, "before_seq q")),
    (
        "POST",
        "/workstreams",
        lambda: see_other("/dashboard", monitor().create(WORKSTREAM, form(NEW_WORKSTREAM))),
    ),
    ("POST", "/tasks", lambda: see_other("/tasks/{id}", monitor().create(TASK, form(NEW_TASK)))),
    ("POST", "/tasks/<reference>", change_task_form),
    ("POST", "/tasks/<reference>/updates", add_update_form),
    ("GET", "/static/<name>", static_file),
)


def problem_of(error: Exception) -> Problem:
    """Any error as a Problem. What Flask refuses has a code; all else is a fault of ours: its trace goes to
    the log, one sentence to the client."""
    from werkzeug.exceptions import HTTPException

    if isinstance(error, Problem):
        return error
    if not isinstance(error, HTTPException):
        flask.current_app.logger.exception("unexpected error")
        return Problem("internal_error", "something went wrong in the server; its log says what")
    codes = {status: code for code, status in STATUS_OF.items() if code != "internal_error"}
    messages = {404: f"no such path: {flask.request.path[:200]}", 405: "this path does not take that method"}
    message = messages.get(error.code, error.description or error.name)
    return Problem(codes.get(error.code, "invalid_input"), message)


def show_error(error: Exception):
    """An error as JSON, or as a page where a browser asked for one."""
    problem = problem_of(error)
    if wants_page():
        title = problem.code.replace("_", " ").capitalize()
        # Not by page(): whether somebody is logged in stands in the database, which may be the trouble.
        values = {"status": problem.status, "title": title, "message": problem.message}
        shown = flask.render_template("error.html", version=__version__, **values)
        response = flask.make_response(shown, problem.status)
    else:
        response = answer(dump(problem.body()), problem.status)
    response.headers.update(ERROR_HEADERS.get(problem.status, {}))
    if methods := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(methods))
    return response


def age(moment: str) -> str:
    """How long ago an RFC 3339 time was, in one unit: `40 s`, `4 m`, `2 h`, `3 d`."""
    seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(moment)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def create_app(config: Config | None = None):
    """Make the Flask app. It opens no database: `flask --app monitor` runs this for every command."""
    import jinja2

    app = flask.Flask("monitor", static_folder=None, template_folder=None)
    app.jinja_loader = jinja2.FunctionLoader(lambda name: asset("templates", name).decode())
    app.jinja_env.filters |= {"age": age}
    app.extensions["monitor"] = Monitor(config or Config.load())
    app.before_request(guard)
    app.before_request(read_path)
    app.after_request(lambda response: response.headers.extend(PAGE_HEADERS) or response)
    for method, rule, handler in ROUTES:
        app.add_url_rule(rule, f"{method} {rule}".replace(".", " "), handler, methods=[method])
    app.register_error_handler(Exception, show_error)
    for name, command in cli.commands.items():
        if name not in ("run", "shell", "routes"):
            app.cli.add_command(command, name)
    return app


# ======================================================================================================
# server: limits and time-outs around the WSGI app
# ======================================================================================================

IDLE_SECONDS = 75  # a kept-alive connection between two requests
HEAD_SECONDS = 15  # request line and headers, once begun
BODY_SECONDS = 60
DEAD_PEER_SECONDS = 60  # a peer that takes nothing
MAX_HEAD = 64 * 1024
MAX_CONNECTIONS = 5000
TOO_MANY = b"HTTP/1.1 503 Too Many\r\nRetry-After: 5\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
SEND_BUFFER = 64 * 1024  # a client that never reads holds 0.24 MB in the kernel instead of 3.8


def listen(host: str, port: int):
    """A listening socket; accepted ones inherit TCP_NODELAY (without it every kept-alive request takes 44
    ms) and TCP_USER_TIMEOUT (else a peer that stops reading blocks a writer for ever)."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_PEER_SECONDS * 1000)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise misconfigured(f"cannot listen on {host}:{port}: {reason}; try --bind") from None
    return listener


class TimedInput:
    """A request body that must arrive before a deadline, however slowly it drips."""

    def __init__(self, handler: Any, body: Any):
        self._handler, self._body, self._deadline = handler, body, time.monotonic() + BODY_SECONDS

    def read(self, size: int = -1) -> bytes:
        """Read like a file; TimeoutError after the deadline. An error ends the connection."""
        try:
            with self._handler.limit(self._deadline - time.monotonic()):
                return self._body.read(size)
        except OSError:
            self._handler.close_connection = True
            raise

    def _discard(self) -> None:
        """Skip what the app did not read; pywsgi calls it before it reads the next request."""
        try:
            with self._handler.limit(self._deadline - time.monotonic()):
                self._body._discard()
        except TimeoutError:
            self._handler.close_connection = True


def read_head(stream: Any) -> bytes:
    """The header lines up to the empty one; Problem for what is none (bare LF, folded), or too many."""
    raw = line = b""
    while line != b"\r\n":
        line = stream.readline(MAX_HEAD)
        raw += line
        if not re.fullmatch(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n\0]*)?\r\n", line) or len(raw) > MAX_HEAD:
            raise invalid(f"the headers are malformed, or have more than {MAX_HEAD} bytes")
    return raw


def check_framing(headers: Any) -> None:
    """Problem unless the headers say in one way, and exactly, where the body ends."""
    lengths, codings = headers.get_all("content-length", []), headers.get_all("transfer-encoding", [])
    if len(lengths) + len(codings) > 1:
        raise invalid("the length of the body is given twice")
    if lengths and not re.fullmatch(r"[0-9]+", lengths[0], re.ASCII):
        raise invalid("Content-Length is not a number")
    if lengths and len(lengths[0]) > 18:
        raise Problem("too_large", "no body may be that large")
    if codings and codings[0].lower() != "chunked":
        raise invalid("Transfer-Encoding is not chunked")


def refusal(problem: Problem) -> bytes:
    """A whole HTTP answer for a request that cannot be given to the app."""
    body = dump(problem.body()).encode()
    head = f"HTTP/1.1 {problem.status} Refused\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class HandlerLimits:
    """What gevent's WSGIHandler lacks: time limits, one write for a whole answer, a clean log line."""

    def read_requestline(self):
        """Wait for the next request on the connection, but not for ever."""
        with self.limit(IDLE_SECONDS, quiet=True):
            line = super().read_requestline()
            return line if line.endswith("\n") else line[:80]  # too long: read_request refuses what is left
        return ""

    def read_request(self, raw_requestline):
        """Read the headers; dripped ones are cut off, ambiguous framing is refused."""
        if not re.fullmatch(r"[A-Z]{1,20} [^\s]+ HTTP/1\.[01]\r\n", raw_requestline):
            raise invalid("that is no HTTP/1 request line of at most 8,191 bytes")
        with self.limit(HEAD_SECONDS, quiet=True):
            return super().read_request(raw_requestline)
        raise Problem("timed_out", "the headers took too long to arrive")

    def MessageClass(self, stream, *_):  # noqa: N802 (the name is gevent's)
        """Parse the headers; Problem for framing that two readers could take differently."""
        headers = super().MessageClass(io.BytesIO(read_head(stream)))
        check_framing(headers)
        return headers

    def handle(self):
        """Serve a connection, or turn it away when there are too many."""
        if self.server.connections >= MAX_CONNECTIONS:
            with contextlib.suppress(OSError):
                self.socket.sendall(TOO_MANY)
            self.socket.close()
            return
        self.server.connections += 1
        try:
            super().handle()
        finally:
            self.server.connections -= 1

    def get_environ(self):
        """The WSGI environment, with a deadline on its body."""
        environ = super().get_environ()
        environ["wsgi.input"] = self.wsgi_input = TimedInput(self, self.wsgi_input)
        return environ

    def _handle_client_error(self, error):
        """Answer a request that could not be read in the same shape as any other error."""
        problem = error if isinstance(error, Problem) else invalid("the request is malformed")
        return str(problem.status), refusal(problem)

    def finalize_headers(self):
        """The answer to HEAD has no body: not even the last chunk of one."""
        super().finalize_headers()
        self.response_use_chunked = self.response_use_chunked and self.command != "HEAD"

    def _write_with_headers(self, data):
        """Send headers and first data in one piece: two small writes cost a round trip."""
        parts: list[bytes] = []
        self._sendall = parts.append
        try:
            super()._write_with_headers(data)
        finally:
            del self._sendall
        self._sendall(b"".join(parts))

    def format_request(self):
        """The log line without query (tokens) and control bytes (terminal escapes)."""
        line = re.sub(r"\?\S*", "", self.requestline or "")
        self.requestline = re.sub(r"[^\x20-\x7e]", "?", line)[:500]
        return super().format_request()


def gevent_server(listener, app, access_log: bool):
    """A gevent WSGI server on a listening socket: (serve until stopped, stop)."""
    import gevent
    from gevent import pywsgi

    class Handler(HandlerLimits, pywsgi.WSGIHandler):
        ignored_socket_errors = (*pywsgi.WSGIHandler.ignored_socket_errors, errno.ETIMEDOUT)

        @staticmethod
        def limit(seconds, quiet=False):
            return gevent.Timeout(max(0.001, seconds), False if quiet else TimeoutError())

    log = "default" if access_log else None
    name = {"SERVER_NAME": "localhost"}  # else pywsgi asks the resolver, which may be slow
    server = pywsgi.WSGIServer(listener, app, handler_class=Handler, log=log, environ=name)
    server.connections = 0
    return server.serve_forever, lambda: server.stop(timeout=1)


def thread_server(listener, app, access_log: bool):
    """A threaded WSGI server on a listening socket, for hosts without gevent: (serve until stopped, stop)."""
    from werkzeug import serving

    class Handler(serving.WSGIRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS

        def log_request(self, code="-", size="-"):
            if access_log:
                path = re.sub(r"[^\x20-\x7e]", "?", self.path.partition("?")[0])[:500]
                sys.stderr.write(f"{self.address_string()} {self.command} {path} {code}\n")

        def version_string(self):
            return ""

        def send_error(self, code, message=None, explain=None):
            self.close_connection = True
            self.wfile.write(refusal(invalid(message or "the request is malformed")))

        def parse_request(self):
            try:
                return super().parse_request() and check_framing(self.headers) is None
            except Problem as problem:
                return self.send_error(problem.status, problem.message)

    host, port = listener.getsockname()[:2]
    server = serving.make_server(host, port, app, True, request_handler=Handler, fd=listener.fileno())
    server.log = lambda *arguments: None

    def stop() -> None:
        server.shutdown()
        listener.close()

    return lambda: server.serve_forever(0.05), stop


def use_gevent() -> bool:
    """Patch the standard library for gevent; False where it is missing or not wanted."""
    if os.environ.get("MONITOR_THREADS") == "1" or importlib.util.find_spec("gevent") is None:
        return False
    from gevent import monkey

    _ = flask.Flask  # loads it now: gevent looks through all modules while it patches
    monkey.patch_all()
    return True


def run_server(config: Config, access_log: bool, ready: Callable[[Monitor, str, bool], None]) -> None:
    """Serve until SIGINT or SIGTERM, then end the streams and checkpoint. `ready` gets the address."""
    import resource

    with_gevent = use_gevent()
    stopping = on_signals(with_gevent)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    app = create_app(config)
    served: Monitor = app.extensions["monitor"]
    listener = listen(config.host, config.port)
    try:
        served.open()
    except Problem:
        listener.close()
        raise
    start, stop = (gevent_server if with_gevent else thread_server)(listener, app, access_log)
    threading.Thread(target=start, daemon=True).start()
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host.strip("[]") and host[0] != "[" else host
    ready(served, f"http://{host}:{listener.getsockname()[1]}", with_gevent)
    while not stopping.wait(0.2):
        pass  # not one long wait: a signal that another thread took would not end it
    served.broadcaster.close()
    stop()
    served.close()
    if with_gevent:
        sys.stdout.flush()
        # All is closed. gevent's locks would go before logging's last use of them, which leaves a trace.
        os._exit(0)


def on_signals(with_gevent: bool) -> threading.Event:
    """An event that SIGINT and SIGTERM set: raising in whatever greenlet runs would leave a mess."""
    import signal

    stopping, handle = threading.Event(), signal.signal
    if with_gevent:
        from gevent import signal_handler as handle
    for number in (signal.SIGINT, signal.SIGTERM):
        # In a thread of its own: this one may hold the event's lock in the very moment of the signal.
        handle(number, lambda *_: threading.Thread(target=stopping.set).start())
    return stopping


# ======================================================================================================
# cli: commands, and the HTTP client behind them
# ======================================================================================================

LONG_SECONDS = 3600  # how long an administrator's command waits for an answer
ANSWER_TYPES = {"id": str, "name": str, "seq": int, "items": list, "total": int}
EXIT_CODES = {"not_found": 3, "conflict": 3, "unauthorized": 4}
UNREACHABLE = 5
QUIET = "monitor.quiet"


class Failure(click.ClickException):
    """An error of a command: one line on standard error, and an exit status."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code

    def show(self, file=None) -> None:
        """Print the line, unless --quiet was given; only `flask --app monitor` calls this."""
        if not asked_quiet():
            click.echo(f"monitor: {plain(self.message)}", err=True)


def asked_quiet() -> bool:
    """Whether --quiet stands on the command line."""
    return bool({"--quiet", "--silent"} & set(sys.argv[1:]))


def plain(text: str) -> str:
    """Text for a terminal: control and bidi characters replaced, so that stored text cannot steer it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", "\ufffd", text)


def remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep a global option for the whole command line, wherever it stood."""
    if value:
        context.meta[f"monitor.{parameter.name}"] = value


def setting_option(setting: Setting, note: str = "", **more: Any) -> click.Option:
    """The option of a setting: --bind for MONITOR_BIND."""
    option = "--" + setting.name.removeprefix("MONITOR_").lower().replace("_", "-")
    return click.Option([option], help=f"{setting.help} [{setting.name}{note}]", **more)


class GlobalOptions:
    """What commands and groups have in common: the global options, and a Problem told as a Failure."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        keep = {"expose_value": False, "callback": remember}
        quiet = {"is_flag": True, "help": "Print nothing; keep the exit status."}
        self.params += [setting_option(setting, **keep) for setting in CLIENT_SETTINGS]
        self.params.append(click.Option(["--quiet", "--silent"], **quiet, **keep))

    def invoke(self, context: click.Context) -> Any:
        """Run it."""
        try:
            return super().invoke(context)
        except Problem as problem:
            raise Failure(problem.message, EXIT_CODES.get(problem.code, 1)) from None


class Command(GlobalOptions, click.Command):
    """A command; the global options may stand behind its name."""


class Group(GlobalOptions, click.Group):
    """A group of such commands; the global options may stand before the command."""

    command_class = Command
    group_class = type


class Client:
    """The HTTP client of the API that all client commands share."""

    def __init__(self, server: str, token: str):
        import requests  # here: gevent must patch before anybody imports it, and --help needs none

        self.server = server.rstrip("/")
        self.session = requests.Session()
        # Else ~/.netrc replaces our bearer header, and http_proxy gets the requests for 127.0.0.1.
        self.session.trust_env = False
        if not re.fullmatch(r"[\x21-\x7e]*", token):
            raise Failure("the token holds characters that cannot be sent; see MONITOR_TOKEN", 2)
        if token:
            self.session.headers["Authorization"] = f"Bearer {token}"

    def send(self, method: str, path: str, seconds: float = 30, **options: Any):
        """Make a request; returns its 2xx response. Failure for anything else."""
        import requests

        try:
            options |= {"timeout": (5, seconds), "allow_redirects": False}
            response = self.session.request(method, self.server + path, **options)
        except (requests.ConnectionError, requests.Timeout):
            raise Failure(f"no server at {self.server}; start one with: monitor serve", UNREACHABLE) from None
        except (requests.RequestException, UnicodeError) as error:
            raise Failure(f"cannot ask {self.server}: {error}") from None
        if 200 <= response.status_code < 300:
            return response
        problem = json_object(response)
        if not isinstance(problem.get("message"), str):
            raise Failure(f"{self.server} does not answer like Monitor (status {response.status_code})")
        hint = "; set MONITOR_TOKEN or give --token" if problem.get("error") == "unauthorized" else ""
        raise Failure(problem["message"] + hint, EXIT_CODES.get(str(problem.get("error")), 1))

    def call(self, method: str, path: str, body: Any = None, seconds: float = 30, query: Any = None) -> Any:
        """Make a request; returns the JSON object that answers it. Failure for anything else."""
        answered = json_object(self.send(method, path, seconds, json=body, params=query))
        if not answered:
            raise Failure(f"{self.server} does not answer like Monitor")
        return answered


def json_object(response: Any) -> dict[str, Any]:
    """The JSON object in a response; empty when there is none."""
    try:
        found = response.json()
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def client() -> Client:
    """The client for the current command line: options first, then the environment, then the defaults."""
    given = click.get_current_context().meta
    server, token = (
        given.get("monitor." + name.removeprefix("MONITOR_").lower()) or os.environ.get(name) or default
        for name, default, _ in CLIENT_SETTINGS
    )
    if not re.fullmatch(r"https?://[^\s/]+[^\s]*", server):
        raise Failure(f"{server!r} is not a server address; it must look like http://127.0.0.1:3000", 2)
    return Client(server, token)


def show(answered: dict[str, Any], *expected: str) -> None:
    """Print an answer as indented JSON; Failure when it lacks the fields that are expected of it."""
    odd = [name for name in expected if not isinstance(answered.get(name), ANSWER_TYPES[name])]
    if odd:
        raise Failure(f"the server's answer has no {odd[0]} as it should; is it a Monitor server?")
    if not click.get_current_context().meta.get(QUIET):
        click.echo(json.dumps(answered, indent=2))


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="monitor %(version)s")
def cli() -> None:
    """Monitor: what is going on, what is stuck, which agent waits for you.

    \b
      monitor demo     look at it with a recorded story
      monitor serve    start a server, then open the address that it prints
    """


update = cli.group("update", help="Add updates to tasks, or wipe one.")(lambda: None)
OPTION_NAMES = {"summary_text": "--summary", "task_id": "--task", "workstream_id": "--workstream"}


def json_value(text: str) -> Any:
    """The value of an option that takes JSON; click says what is wrong with it."""
    try:
        return parse_json(text.encode("utf-8", "surrogateescape"))
    except Problem as problem:
        raise click.BadParameter(problem.message.replace("the body", "it")) from None


def field_option(name: str, field: Field, in_query: bool) -> click.Option:
    """The command line's option for a field of the API."""
    option, schema = OPTION_NAMES.get(name, "--" + name.replace("_", "-")), field.schema
    settings: dict[str, Any] = {"required": True} if field.required else {"default": None}
    if schema.get("type") == "boolean":
        settings |= {"flag_value": "true", "is_flag": True} if in_query else {}
        option += "" if in_query else f"/--no-{name}"
    elif "enum" in schema:
        settings["type"] = click.Choice(schema["enum"])
    elif schema.get("type") == "array":
        settings |= {"type": split_list, "metavar": "A,B"}
    elif not schema:
        settings |= {"type": json_value, "metavar": "JSON"}
    elif name.endswith("_id"):
        settings["metavar"] = "ID"
    return click.Option([option, name], help=field.text, **settings)


def api_command(group: click.Group, name: str, method: str, place: str, fields: Fields, text: str) -> None:
    """Make a command of an API request; the fields of its body or query are the options."""
    argument = {"create": "name", "update": "id"}.get(name)
    expected = ("items", "total") if method == "GET" else ("id",)

    def call(**given: Any) -> None:
        target = f"/api/{place}" + (f"/{quoted(given.pop('id'))}" if argument == "id" else "")
        given = {field: value for field, value in given.items() if value is not None}
        sent = {"query": given} if method == "GET" else {"body": given}
        show(client().call(method, target, **sent), *expected)

    options = [field_option(field, check, method == "GET") for field, check in fields.items()]
    arguments = [click.Argument([argument], metavar=argument.upper())] if argument else []
    params = arguments + [option for option in options if option.name != (name == "create" and argument)]
    group.add_command(Command(name, params=params, callback=call, help=text))


def kind_commands(kind: Kind, wanted: Fields) -> None:
    """Make the commands that make, list and change workstreams or tasks."""
    group = cli.group(kind.name, help=f"Make, list and change {kind.table}.")(lambda: None)
    api_command(group, "create", "POST", kind.table, kind.new, f"Make a {kind.name}.")
    api_command(group, "list", "GET", kind.table, wanted, f"List {kind.table}, oldest first.")
    api_command(group, "update", "PATCH", kind.table, kind.changes, f"Change a {kind.name}.")


kind_commands(WORKSTREAM, WORKSTREAM_QUERY)
kind_commands(TASK, TASK_QUERY)
api_command(update, "manual", "POST", "updates/manual", MANUAL_UPDATE, "Add a person's update to a task.")


@contextlib.contextmanager
def database(file: str | None) -> Iterator[Client]:
    """A client for the server at --server or, where none answers or a file is named, for a database at
    rest: this process serves it for as long as the command takes, behind a token that nobody knows."""
    if file is None:
        try:
            client().call("GET", "/health")
        except Failure as failure:
            if failure.exit_code != UNREACHABLE:
                raise
        else:
            yield client()
            return
    token = secrets.token_hex()
    config = Config.load({"MONITOR_DB": file, "MONITOR_BIND": "127.0.0.1:0", "MONITOR_API_TOKENS": token})
    if config.database is None or not os.path.exists(config.database):
        raise Failure(
            f"no server at {client().server}, and no database at {config.database}; name it with --db"
        )
    app = create_app(dataclasses.replace(config, retention=()))
    app.extensions["monitor"].open()
    listener = listen(config.host, config.port)
    start, stop = thread_server(listener, app, False)
    threading.Thread(target=start, daemon=True).start()
    try:
        yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}", token)
    finally:
        stop()
        app.extensions["monitor"].close()


def database_option(function: Callable) -> Callable:
    """The option --db of the administrator's commands."""
    text = "Work on this file, which no server is using. [MONITOR_DB, when no server answers]"
    return click.option("--db", "file", metavar="FILE", help=text)(function)


@update.command("redact")
@click.argument("seq", type=int)
@database_option
def update_redact(seq: int, file: str | None) -> None:
    """Wipe message and data of an update that holds something it must not; its number and a mark stay.
    Copies made before, as backups, still hold it."""
    with database(file) as server:
        show(server.call("POST", f"/api/updates/{seq}/redact", seconds=LONG_SECONDS), "id", "seq")


def progress_bar(length: int, label: str):
    """A progress bar on standard error, silent unless that is a terminal."""
    silent = click.get_current_context().meta.get(QUIET) or not sys.stderr.isatty()
    return click.progressbar(length=length, label=label, file=sys.stderr, hidden=silent)


@cli.command()
@click.argument("target", metavar="FILE")
@database_option
def backup(target: str, file: str | None) -> None:
    """Copy the database into a new FILE while everything goes on; FILE is a database like any other."""
    if os.path.exists(target):
        raise Failure(f"{target} exists; name a new file")
    partial = f"{target}.partial"
    try:
        with database(file) as server:
            save(server.send("GET", "/api/admin/backup", LONG_SECONDS, stream=True), partial)
        os.replace(partial, target)
    except OSError as error:
        raise Failure(f"cannot write {target}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    show({"backup": os.path.abspath(target), "bytes": os.path.getsize(target)})


def save(response: Any, name: str) -> None:
    """Write what a server sends into a private file, and sync it."""
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    size = int(response.headers["Content-Length"])
    with os.fdopen(descriptor, "wb") as target, progress_bar(size, "Backup") as bar:
        for chunk in response.iter_content(256 * 1024):
            target.write(chunk)
            bar.update(len(chunk))
        target.flush()
        os.fsync(target.fileno())
    if os.path.getsize(name) != size:
        raise Failure("the backup did not arrive whole")


@cli.command()
@database_option
def check(file: str | None) -> None:
    """Read the whole database and say what is wrong with it: integrity, numbers, orphans, search index."""
    with database(file) as server, progress_bar(1, "Checking") as bar:
        problems = server.call("GET", "/api/admin/check", seconds=LONG_SECONDS).get("problems", [])
        bar.update(1)
    show({"ok": not problems, "problems": problems})
    if problems:
        raise Failure(f"{len(problems)} things are wrong with the database; restore a backup")


@cli.command()
@click.option("--older-than", required=True, metavar="AGE", help="Age of what goes, as 30d, 12h or 45m.")
@click.option("--data-only", is_flag=True, help="Drop the data, keep the sentences.")
@click.option("--dry-run", is_flag=True, help="Only say how many updates it would touch.")
@database_option
def prune(file: str | None, dry_run: bool, **wanted: Any) -> None:
    """Remove old updates, in small batches, and give their space back. Their numbers are never used again."""
    with database(file) as server:
        answered = server.call("POST", "/api/admin/prune", wanted | {"dry_run": True})
        done = 0
        with progress_bar(answered["left"], "Pruning") as bar:
            while answered["left"] and not dry_run:
                answered = server.call("POST", "/api/admin/prune", wanted, LONG_SECONDS)
                done += answered["pruned"]
                bar.update(answered["pruned"])
    show({"pruned": done, "left": answered["left"]})


@cli.command(params=[setting_option(each, f"; {each.default or 'none'}") for each in SETTINGS])
@click.option("--access-log", is_flag=True, help="Write a line a request on standard error.")
def serve(access_log: bool, **settings: str | None) -> None:
    """Serve the API, the stream and the pages until Ctrl-C."""
    config = Config.load({f"MONITOR_{name.upper()}": value for name, value in settings.items()})
    run_server(config, access_log, announce)


def announce(served: Monitor, address: str, with_gevent: bool, demo: bool = False) -> None:
    """Say where the server is, what it works on, and the next thing to type."""
    import jinja2

    name = os.path.basename(sys.argv[0])
    facts = {
        "version": __version__,
        "path": served.store.path,
        "server": "gevent" if with_gevent else "threads",
        "wide": served.config.host not in LOOPBACK_NAMES,
        "program": "monitor" if name in ("monitor", "monitor-cli") else f"python {sys.argv[0]}",
        "where": "" if address == CLIENT_SETTINGS[0].default else f" --server {address}",
    }
    text = jinja2.Template(asset("templates", "serve.txt").decode(), trim_blocks=True)
    if not asked_quiet():
        click.echo(text.render(facts, address=address, config=served.config, demo=demo), nl=False)
        sys.stdout.flush()


@cli.command()
@click.option("--bind", default="127.0.0.1:0", show_default=True, help="Address and port; 0: a free one.")
@click.option("--speed", default=1.0, show_default=True, help="How much faster than recorded the story runs.")
def demo(bind: str, speed: float) -> None:
    """Serve a recorded story from a temporary database: agents at work, CI, and one that waits for you."""
    config = Config.load({"MONITOR_BIND": bind, "MONITOR_DB": "sqlite::memory:"})
    config = dataclasses.replace(config, tokens=(), auth_mode="relaxed")

    def tell(served: Monitor, address: str, with_gevent: bool) -> None:
        lines = [json.loads(line) for line in asset("templates", "demo.jsonl").splitlines()]
        past = [line for line in lines if line["at"] <= 0]
        story = Story(served, time.time())
        with click.progressbar(past, label="Loading the story", file=sys.stderr) as steps:
            for step in steps:
                story.tell(step)
        announce(served, address, with_gevent, demo=True)
        live = [line for line in lines if line["at"] > 0]
        threading.Thread(target=story.tell_live, args=(live, speed), daemon=True).start()

    run_server(config, False, tell)


class Story:
    """Replays recorded steps into a Monitor: workstreams, tasks, hook payloads, webhooks, people's words."""

    def __init__(self, served: Monitor, start: float):
        self.monitor, self.start, self.ids = served, start, {}

    def tell(self, step: dict[str, Any]) -> None:
        """Do one step; an update of the past is stored with its own time."""
        step |= {name: self.ids[step[name]] for name in ("task_id", "workstream_id") if name in step}
        past = datetime.datetime.fromtimestamp(self.start + step["at"], datetime.UTC)
        moment, does = timestamp(past) if step["at"] <= 0 else None, step["do"]
        if does in ("workstream", "task"):
            made = self.monitor.create(TASK if does == "task" else WORKSTREAM, step, moment)
            self.ids[step["key"]] = json.loads(made)["id"]
        elif does == "patch":
            self.monitor.change(TASK, step["task_id"], step, moment)
        elif does == "update":
            self.monitor.add_update(clean(step, NEW_UPDATE), moment=moment)
        else:
            draft = claude_draft(step) if does == "claude" else webhook_draft(step)
            if draft.keep or does == "github":
                self.monitor.add_update(draft_fields(step["task_id"], draft), moment=moment)

    def tell_live(self, steps: list[dict[str, Any]], speed: float) -> None:
        """Do the steps that lie ahead, each at its time, until the server shuts down."""
        with contextlib.suppress(Problem):
            for step in steps:
                time.sleep(max(0.0, self.start + step["at"] / speed - time.time()))
                self.tell(step)


def main() -> None:
    """The console script: `monitor` and `monitor-cli`."""
    try:
        cli.main(prog_name="monitor", standalone_mode=False)
        return
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() + (f"; see: {context.command_path} --help" if context else "")
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # nobody reads on: Python would complain at exit
    except OSError as error:
        message, status = f"cannot write: {error.strerror}", 1
    if not asked_quiet():
        click.echo(f"monitor: {plain(' '.join(message.splitlines()))}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
