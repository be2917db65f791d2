# /// script
# requires-python = ">=3.11"
# dependencies = ["flask>=3.1.3", "werkzeug>=3.1.6", "wsproto>=1.2", "gevent>=25.4.1", "click>=8.2"]
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
    runs         what a run of an agent tells: where it works, what is kept of it, whether it waits
    log          ids, frames, filters, the objects that clients know (pure)
    queries      all the SQL that reads
    transaction  all the SQL that writes: what an operation may do inside the writer's transaction
    database     the file, its connections, the one writer with group commit
    stream       the ring of newest frames, the wake-up, follow(): a subscriber is a cursor into the log
    transfer     a database as lines of JSON, and back: exact into an empty one, merged into any other
    monitor      the operations: everything that API, pages and commands do
    guard        who may ask: Host, Origin, bearer token
    schema       the routes as an OpenAPI document, made from the tables that check what they are given
    socket       the WebSocket: several subscriptions, and updates, over one connection
    web          the API and the stream, thin over the operations
    pages        what a browser shows, its forms and files
    mcp          for agents: the Model Context Protocol and its tools, what to know at the start
    app          all routes, errors, what every answer has, create_app()
    server       the WSGI server with limits and time-outs, gevent first, threads without it
    hooks        agents plugged in: their settings, the hook that they run, the spool while no server answers
    doctor       what is wrong here, and the command that mends it
    client       settings of the client and where they come from; asking the server
    cli          options and output
    reading      commands that tell how things stand, wait for something and follow the log
    run          a command as if nobody watched it, its start and end recorded
    pack         the one file that needs nothing but Python
    commands     the click commands
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import datetime
import errno
import functools
import gzip
import hashlib
import hmac
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import sqlite3
import stat
import sys
import tempfile
import termios
import threading
import time
import tty
import types
import uuid
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
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
    "upgrade_required": 426, "too_many_requests": 429, "internal_error": 500,
    "server_misconfigured": 500, "unavailable": 503,
}  # fmt: skip


class Problem(Exception):
    """An error for the reader: a code of STATUS_OF, one sentence, and the field that it is about."""

    def __init__(self, code: str, message: str, field: str | None = None):
        super().__init__(message)
        self.code, self.message, self.field = code, message, field
        self.status = STATUS_OF.get(code)  # a client has errors that are no answer

    def body(self) -> dict[str, str]:
        """The JSON body that tells it."""
        return {"error": self.code, "message": self.message} | ({"field": self.field} if self.field else {})


invalid = functools.partial(Problem, "invalid_input")
misconfigured = functools.partial(Problem, "server_misconfigured")  # of a server that cannot start


# ======================================================================================================
# config: settings as data
# ======================================================================================================


Setting = namedtuple("Setting", "name default help")  # one environment variable, and what it is for
SETTINGS, CLIENT_SETTINGS, HOOK_SETTINGS = (
    tuple(Setting(*row) for row in rows) for rows in json.loads(asset("templates", "settings.json")).values()
)


def parse_age(text: str) -> datetime.timedelta:
    """An age such as 30d, 12h or 45m."""
    found = re.fullmatch(r"([0-9]{1,5})([dhm])", text.strip(), re.ASCII)
    if not found:
        raise invalid(f"{text[:40]!r} is not an age; it must look like 30d, 12h or 45m", "older_than")
    return datetime.timedelta(**{{"d": "days", "h": "hours", "m": "minutes"}[found[2]]: int(found[1])})


def parse_bind(text: str) -> tuple[str, int]:
    """The two parts of `host:port` or `[v6]:port`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]\s]*)):([0-9]{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise invalid(f"{text!r} is not an address; it must look like 127.0.0.1:3000")
    return found[1] or found[2] or "0.0.0.0", int(found[3])


def parse_database(text: str) -> str | None:
    """The path in PATH, sqlite:PATH?query or, for the absolute /PATH, sqlite:///PATH; None: in memory."""
    path = text
    if text.startswith("sqlite:"):
        path = text.removeprefix("sqlite:").partition("?")[0]
        path = path[2:] if path.startswith("//") else path
    if not path.strip() or "\0" in path:
        raise invalid(f"{text!r} names no file; it must look like sqlite:monitor.db")
    return None if path == ":memory:" and text != path else path


def parse_word(words: tuple[str, ...], text: str) -> str:
    """One of some words."""
    if text.lower() not in words:
        raise invalid(f"{text!r} must be {' or '.join(words)}")
    return text.lower()


def split_list(text: str) -> list[str]:
    """Split at commas; blanks around the entries and empty entries are dropped."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def parse_event_rule(rule: str) -> str:
    """One rule of MONITOR_GITHUB_EVENTS."""
    if not re.fullmatch(r"-?[a-z_*]+(\.[a-z_*]+)?", rule):
        raise invalid(f"{rule[:60]!r} must look like push or -star.created")
    return rule


def state_path(kind: str, server: str, base: str | None = None) -> str:
    """Where this user keeps something about a server."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = re.sub(r"[^A-Za-z0-9.-]", "_", server.removesuffix("/").encode().decode("latin-1"))
    return f"{base or f'{state}/monitor/{kind}'}/{name}"


def spool_folder(server: str) -> str | None:
    """The folder of events that a server has not taken yet; None: there is to be none."""
    base = os.environ.get("MONITOR_SPOOL")
    return None if base == "off" else state_path("spool", server, base)


PARSERS = {  # by setting: the field of Config that it fills, and what reads it
    "MONITOR_BIND": ("address", parse_bind),
    "MONITOR_DB": ("database", parse_database),
    "MONITOR_AUTH_MODE": ("auth_mode", functools.partial(parse_word, ("relaxed", "strict"))),
    "MONITOR_API_TOKENS": ("tokens", lambda text: tuple(map(str.encode, split_list(text)))),
    "MONITOR_ALLOWED_HOSTS": ("allowed_hosts", lambda text: tuple(map(str.lower, split_list(text)))),
    "MONITOR_REDACT": ("redact", lambda text: parse_word(("on", "off"), text) == "on"),
    "MONITOR_STUCK_AFTER": ("stuck_after", parse_age),
    "MONITOR_GITHUB_SECRET": ("github_secrets", lambda text: tuple(map(str.encode, split_list(text)))),
    "MONITOR_GITHUB_EVENTS": ("github_events", lambda text: tuple(map(parse_event_rule, split_list(text)))),
    "MONITOR_RETENTION": (
        "retention",
        lambda text: tuple((":" in rule, parse_age(rule.removeprefix("data:"))) for rule in split_list(text)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a server needs to know. Made by `Config.load`; every value has been checked."""

    host: str
    port: int
    spools: tuple[str, ...]  # folders of hooks that found no server
    database: str | None  # a path; None: a private temporary file
    auth_mode: str
    tokens: tuple[bytes, ...]
    allowed_hosts: tuple[str, ...]
    redact: bool
    stuck_after: datetime.timedelta
    github_secrets: tuple[bytes, ...]
    github_events: tuple[str, ...]
    retention: tuple[tuple[bool, datetime.timedelta], ...]  # (only the data, age)
    tended: bool = True  # whether to do what is to be done from time to time

    @classmethod
    def load(cls, given: dict[str, str | None] | None = None) -> Config:
        """Read the settings: `given` by name, else from the environment. Problem for what makes no sense."""
        values: dict[str, Any] = {}
        for name, default, _ in SETTINGS:
            field, read = PARSERS[name]
            try:
                values[field] = read(((given or {}).get(name) or os.environ.get(name) or default).strip())
            except Problem as problem:
                raise misconfigured(f"{name}: {problem.message}") from None
        host, port = values.pop("address")
        spools = (spool_folder(f"http://{name}:{port}") for name in ("127.0.0.1", "localhost"))
        return cls(host, port, tuple(filter(None, spools)), **values)


# ======================================================================================================
# validation: JSON from outside, field tables
# ======================================================================================================

MAX_BODY = 1024 * 1024
MAX_WEBHOOK = 25 * 1024 * 1024
MAX_DEPTH = 64
MAX_INTEGER = 2**63 - 1
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
AGENTS = {"claude": "Claude Code"} | {name: name.title() for name in ("codex", "gemini", "copilot", "cursor")}
REFERENCE = "[0-9]{1,18}|[0-9a-fA-F-]{4,36}"
RUN_REFERENCE = rf"(?:{'|'.join(AGENTS)}):[\x21-\x2e\x30-\x7e]{{1,200}}"  # no slash: it may stand in a path


def timestamp(moment: datetime.datetime | None = None) -> str:
    """RFC 3339 in UTC with microseconds, ending in Z: sorts as text."""
    moment = moment or datetime.datetime.now(datetime.UTC)
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds")[:26] + "Z"


def shifted(moment: str, seconds: float) -> str:
    """A timestamp so many seconds later; itself where no year is left."""
    with contextlib.suppress(OverflowError):
        return timestamp(datetime.datetime.fromisoformat(moment) + datetime.timedelta(seconds=seconds))
    return moment


ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # made once: json.dumps makes one a call


def dump(value: Any) -> str:
    """Serialise to compact ASCII JSON: U+2028 breaks some SSE clients, NaN and Infinity break them all."""
    return ENCODER.encode(value)


def parse_json(raw: bytes, depth: int = MAX_DEPTH) -> Any:
    """Parse a JSON text in UTF-8. Problem for what could not be stored and given back: also NaN, numbers
    that overflow to infinity (json.loads("1e999") gives one, and one stored breaks every list that holds
    it), integers beyond 64 bits, more than `depth` levels, NUL (SQL functions cut strings there), lone
    surrogates."""
    try:
        text = raw.decode("utf-8")
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > depth and any(itertools.islice(nested(value), depth, None)):
            raise RecursionError
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8") from None
    except RecursionError:
        raise invalid(f"the body is nested deeper than {depth} levels") from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if "\\u" in text and re.search(r"\\u(0000|[dD][89a-fA-F])", text) and not storable(value):
        raise invalid("text must hold neither NUL nor lone surrogates")
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


def storable(value: Any) -> bool:
    """Whether no string or key at any depth holds NUL or a lone surrogate."""
    nodes = itertools.chain.from_iterable(nested([value]))
    texts = (text for node in nodes for text in ([*node, *node.values()] if isinstance(node, dict) else node))
    return not any(isinstance(text, str) and UNSTORABLE.search(text) for text in texts)


class QueryText(str):
    """A value from a query string or form: there `true` is a boolean's only spelling."""


def must(holds: Any, sentence: str) -> None:
    """ValueError: the sentence says what a value must be, or do."""
    if not holds:
        raise ValueError(sentence)


def read_text(value: Any, schema: dict[str, Any]) -> str:
    """A string within its lengths; where it must have one, of more than blanks."""
    must(isinstance(value, str), "be a string")
    must(len(value) <= schema["maxLength"], f"have at most {schema['maxLength']} characters")
    must(value.strip() or not schema.get("minLength"), "not be empty")
    must(not UNSTORABLE.search(value), "hold neither NUL nor lone surrogates")
    must("x-form" not in schema or re.fullmatch(schema["x-form"], value), "look like one of ours")
    return value


def read_choice(value: Any, schema: dict[str, Any]) -> str:
    """One of a few words."""
    must(value in schema["enum"], f"be one of {', '.join(schema['enum'])}")
    return value


def read_words(value: Any, schema: dict[str, Any]) -> list[str]:
    """Some of a few words, comma separated."""
    found, words = split_list(value) if isinstance(value, str) else [], schema["x-words"]
    must(found and set(found) <= set(words), f"be one or several of {', '.join(words)}, comma separated")
    return found


def read_flag(value: Any, schema: dict[str, Any]) -> bool:
    """A JSON boolean; in a query `true` or `false`."""
    flags = {"true": True, "1": True, "false": False, "0": False}
    value = flags.get(value.lower()) if isinstance(value, QueryText) else value
    must(isinstance(value, bool), "be true or false")
    return value


def read_tags(value: Any, schema: dict[str, Any]) -> list[str]:
    """A list of strings; doubles are dropped."""
    most = schema["maxItems"]
    must(isinstance(value, list) and len(value) <= most, f"be a list of at most {most} strings")
    return list(dict.fromkeys(read_text(tag, schema["items"]) for tag in value))


def read_reference(value: Any, schema: dict[str, Any]) -> str:
    """What names a task or workstream: a UUID, a task's number, 4 or more first digits of a UUID, or the run
    of an agent that is at work on the task, as claude:SESSION."""
    must(isinstance(value, str), "be a string: an id, a number, or 4 or more first digits of an id")
    if re.fullmatch(RUN_REFERENCE, value):
        return value
    fits = re.fullmatch(REFERENCE, value)
    must(fits, "be an id, a number, 4 or more first digits of an id, or a run as claude:SESSION")
    return value.lower()


def clamped(schema: dict[str, Any]) -> bool:
    """Whether a number beyond its bounds is taken as the nearest one within; only a least 0 alone is not."""
    return bool(schema["minimum"]) or "maximum" in schema


def read_number(value: str, schema: dict[str, Any]) -> int:
    """A whole number in a query; what lies outside its bounds is clamped."""
    form = r"-?[0-9]{1,40}" if clamped(schema) else r"[0-9]{1,40}"
    must(re.fullmatch(form, value, re.ASCII), "be a whole number")
    return min(max(int(value), schema["minimum"]), schema.get("maximum", MAX_INTEGER))


def read_time(value: str, schema: dict[str, Any]) -> str:
    """An RFC 3339 time in a query (UTC where it names no zone), normalised to sort as text."""
    with contextlib.suppress(ValueError, OverflowError, TypeError, AttributeError):
        text = re.sub(r"(?<=:\d\d):60", ":59", value.upper())  # a leap second
        moment = datetime.datetime.fromisoformat(text)
        return timestamp(moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC))
    raise ValueError("be a time such as 2026-01-31T09:30:00Z")


def read_count(value: Any, schema: dict[str, Any]) -> int:
    """A whole number in JSON, small enough for every reader of JSON."""
    must(type(value) is int and 0 <= value < 2**53, "be a whole number")
    return value


def read_any(value: Any, schema: dict[str, Any]) -> Any:
    """Any JSON, or an object: parse_json has refused what cannot be stored."""
    must(schema.get("type") != "object" or isinstance(value, dict), "be an object")
    return value


READERS = {
    "any": read_any, "choice": read_choice, "count": read_count, "flag": read_flag, "number": read_number,
    "reference": read_reference, "tags": read_tags, "text": read_text, "time": read_time, "words": read_words,
}  # fmt: skip


class Field(NamedTuple):
    """A field of a body or query: how it is read, its JSON schema, what it is for, whether it must be."""

    kind: str
    schema: dict[str, Any]
    text: str = ""
    required: bool = False

    def check(self, value: Any, name: str) -> Any:
        """The value as it is kept; Problem (invalid_input) says what the field must be."""
        try:
            return READERS[self.kind](value, self.schema)
        except ValueError as error:
            raise invalid(f"{name} must {error}", name) from None


Fields = dict[str, Field]
FIELDS = {name: Field(*row) for name, row in json.loads(asset("templates", "fields.json")).items()}


def fields(names: str) -> Fields:
    """The field table of a body or query; `!`: must be there; `name=other`: one like the other."""
    parts = ((*name.rstrip("!").partition("="), "!" in name) for name in names.split())
    return {name: FIELDS[other or name]._replace(required=required) for name, _, other, required in parts}


NEW_WORKSTREAM = fields("name! metadata")
WORKSTREAM_CHANGES = fields("name status=workstream_status metadata")
NEW_TASK = fields("workstream_id! name! metadata")
TASK_CHANGES = fields("name workstream_id status summary_text summary_source hidden metadata")
MANUAL_UPDATE = fields("task_id! message! level kind tags data")
NEW_UPDATE = fields("task_id! source! message! level kind tags data")
SPOOLED_TASK = fields("task_id name folder")  # of an update from a spool: a task, or a new one
SPOOLED_UPDATE = fields("source! message! level kind tags data") | SPOOLED_TASK
CLAUDE_HOOK = fields("task_id! payload!")
GITHUB_WEBHOOK = fields("task_id! payload! headers")
PRUNING = fields("older_than! data_only dry_run")
WORKSTREAM_QUERY = fields("include_archived")
TASK_QUERY = fields("workstream_id status attention include_hidden include_archived q")
TASK_WAIT = fields("wait_for timeout")
OF_TASK = fields("task_id")
SESSION_MOVE = fields("source! task_id! updates")
LINK_NAME = fields("link! value! repository")
LINK = LINK_NAME | fields("task_id! close_on_merge")
STREAM_FILTER = fields("task_id workstream_id source kind level tag")
FILE_QUERY = STREAM_FILTER | fields("q after_seq before_seq since until")
UPDATE_QUERY = FILE_QUERY | fields("order limit total")
CURSORS = {"lastEventId": FIELDS["cursor"], "last_event_id": FIELDS["cursor"], "after_seq": FIELDS["cursor"]}
STREAM_QUERY = STREAM_FILTER | fields("view format poll stream") | CURSORS
NAMED_TASK = fields("task_id=named_task")
HOOK_QUERY = fields("event") | NAMED_TASK
PATH = {"reference": FIELDS["task_id"], "seq": FIELDS["seq"]}
PATH["agent"] = Field("choice", {"enum": [*AGENTS]}, "The agent.")
SOCKET_OPERATION = fields("op!")
SOCKET_FIELDS = {
    "subscribe": fields("sub! after stream filter"),
    "unsubscribe": fields("sub!"),
    "update": fields("update! key"),
    "ping": {},
}
EXPORT_QUERY, IMPORT_QUERY = fields("after_seq since"), fields("line")


def clean(payload: Any, fields: Fields) -> dict[str, Any]:
    """The known fields of a JSON object, checked; null counts as absent. Problem names the first wrong."""
    if not isinstance(payload, dict):
        raise invalid("the body must be a JSON object")
    missing = [name for name, field in fields.items() if field.required and payload.get(name) is None]
    if missing:
        raise invalid(f"{missing[0]} is missing", missing[0])
    given = {name: payload[name] for name in fields if payload.get(name) is not None}
    return {name: fields[name].check(value, name) for name, value in given.items()}


def check_key(key: str | None) -> str | None:
    """An idempotency key, or none."""
    if key is not None and not re.fullmatch(r"[\x20-\x7e]{1,200}", key):
        raise invalid("Idempotency-Key must be 1 to 200 printable ASCII characters")
    return key


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


# The groups that a pattern keeps stand before the mask, the second one behind it.
MASKED = (MASK, r"\1" + MASK, r"\1" + MASK + r"\2")


def redact_text(text: str) -> str:
    """Mask what looks like a secret in a text, also what looks so only beside a mask."""
    masked, lowered = text, text.lower()
    for marks, pattern in tables().secrets:
        if any(map(lowered.__contains__, marks)):
            masked = pattern.sub(lambda found: found.expand(MASKED[found.re.groups]), masked)
    return masked if masked == text else redact_text(masked)


def redact(value: Any) -> Any:
    """Mask what looks like a secret at any depth; a value without any mark of one is given back as it is."""
    lowered = json.dumps(value).lower()
    return redact_deep(value) if any(map(lowered.__contains__, tables().secret_marks)) else value


def redact_deep(value: Any) -> Any:
    """Mask what looks like a secret at any depth, and whole strings under names such as password."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, list | tuple):
        return [redact_deep(child) for child in value]
    if isinstance(value, dict):
        masked: dict[str, Any] = {}
        for name, child in value.items():
            label = redact_text(name)
            while label in masked:
                label += "*"  # two names that are secrets keep both their values
            spelled = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # dbPassword, DB_PASSWORD
            secret = isinstance(child, str) and child and tables().secret_name.search(spelled)
            masked[label] = MASK if secret else redact_deep(child)
        return masked
    return value


# ======================================================================================================
# agents: hook payloads of coding agents -> Draft of an update (pure)
# ======================================================================================================

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


def shell_jobs(ran):
    """What simple commands do: pr, commit, deploy, tests, build."""
    return [job for job, begin in tables().shell_jobs.items() if any(re.match(begin, step) for step in ran)]


def shell_case(p):
    """How a shell command went, by its output: the exit code of `pytest | tail` is tail's. Sets `said`."""
    failed, ran = p["event"] == "PostToolUseFailure", steps(p["command"])
    output = output_of(p.get("error") if failed else p["tool_response"])
    for job in shell_jobs(ran) + ["tests"] * ("test" in dig(p, "tool_input", "description").lower()):
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
    waits = "blocked" if "needs-human" in tags or (kind, level) == ("error", "error") else "idle"
    state = waits if "waiting" in tags else state
    source = f"{agent}:{p['session_id'] or 'unknown'}"
    message = one_line(agent_say(sentence, p)) or p["event"]
    data = {k: v for k, v in payload.items() if k != "user_email"} if isinstance(payload, dict) else payload
    state = None if dig(p, "agent_id") and state != "blocked" else state
    return Draft(source, message, kind, level.replace("-", "info"), tags, data, level != "-", state)


def session_facts(agent, payload, event=None):
    """What routing and de-duplication ask of a payload, as far as it is text that can be kept; cut, for
    all folders above a cwd are looked at."""
    p = canonical(agent, payload, event)
    names = "session_id event cwd model agent_id tool_use_id tool_name prompt source"
    return {name: UNSTORABLE.sub("\ufffd", p[name][:4000]) for name in names.split() if dig(p, name)}


# ======================================================================================================
# github: webhook payloads -> Draft of an update (pure)
# ======================================================================================================

# A new event costs a row of github_sentences. A path like `head_commit.message` starts at the payload, one
# like `.name` at the event's subject, its workflow_run, comment, alert; of paths divided by `|`, the first
# that leads to anything counts. A sentence fills its {paths}, with blanks for underscores in {path~}, and
# leaves out a <part> in which one of them is empty.


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
    queue = github_say("{.head_ref|ref|.head_branch}", view)
    queued = re.search(r"(?:refs/pull/|gh-readonly-queue/.+/pr-)(\d{1,9})\b", queue)
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
    pending = view["status"] in tables().github_pending.split()
    quiet = pending if event in ("workflow_run", "status") else level != "error"
    kind = tables().github_kinds.get(event, "external_update")
    source = f"github:{view['repo'] or 'unknown/unknown'}"
    message = one_line(github_say(sentence, view)) or "GitHub sent an event"
    data |= {name: items for name, items in view["lists"].items() if items}
    keep = not (kind.startswith("ci_") and quiet)
    return Draft(source, message, kind, level, tags, data, keep)


class Subject(NamedTuple):
    """What an event of GitHub is about: what decides the task that it belongs to, and what the task shows."""

    repository: str
    branch: str  # fork:branch in a fork
    keys: list[tuple[str, str]]  # (where it stands, key) of tasks that texts name
    links: list[tuple[str, str, str]]  # (kind, value, repository), the most telling first
    learnt: list[tuple[str, str, str]]  # those that lead more of the same to the task
    fixes: list[tuple[str, str, str]]
    check: dict | None
    pull: dict | None


def github_subject(payload, draft):
    """What the event of a payload is about; `draft` is what github_draft made of it."""
    payload, data = payload if isinstance(payload, dict) else {}, draft.data
    repository, branch = data.get("repo", ""), str(data.get("branch", ""))
    home = data.get("head_repo") or repository
    values = {"pr": data.get("pr"), "branch": branch, "commit": data.get("sha"), "issue": data.get("issue")}
    links = [(kind, str(value), repository) for kind, value in values.items() if value and repository]
    links = [(kind, value, home if kind == "branch" else place) for kind, value, place in links]
    texts = {"branch": branch}
    for place, paths in tables().github_texts.items():
        ways = ([int(step) if step.isdigit() else step for step in path.split(".")] for path in paths.split())
        texts[place] = "\n".join(dig(payload, *way)[:20_000] for way in ways)
    found = functools.partial(re.findall, string="\n".join(texts.values()))
    named, trailer, fixed = (tables().github_patterns[name] for name in ("key", "trailer", "fixes"))
    keys = [(f"key:{place}", *key) for place in list(texts)[:3] for key in re.findall(named, texts[place])]
    keys = [(how, number or name) for how, number, name in keys[:20]]
    keys += [("key:trailer", name) for name in found(trailer)[:20]]
    fixes = [("issue", number, other or repository) for other, number in found(fixed)[:20]]
    shared = home == repository and branch in ("main", "master", dig(payload, "repository", "default_branch"))
    learnt = tables().github_learnt.get(data.get("event"), "").split()
    learnt = [link for link in links if link[0] in learnt and not (link[0] == "branch" and shared)]
    branch = branch if home == repository or not branch else f"{home.partition('/')[0]}:{branch}"
    state = "merged" if data.get("merged") is True else data.get("state", "")
    pull = {"number": data.get("number"), "at": data.get("updated_at"), "url": data.get("url", "")}
    pull = pull | {"state": state} if data.get("event") == "pull_request" else None
    return Subject(repository, branch, keys, links, learnt, fixes, github_check(payload, data), pull)


def github_check(payload, data):
    """The run of a check that an event tells of: name, number, state; None where it tells of none."""
    event, actions = data.get("event"), data.get("app") == "github-actions"
    paths = tables().github_checks.get(event)
    if paths is None or (event == "check_suite" and actions):
        return None  # all its workflows have one of that name
    states, view = tables().github_states, payload | {"": payload.get(event)}
    words = [data.get(name, "") for name in ("conclusion", "action", "status")]
    word = next((word for word in words if word in states), "")
    return {
        "name": f"{event}:{one_line(github_value(view, paths)).partition('@')[0]}"[:200],
        "part": int(event == "workflow_job" or (event == "check_run" and actions)),
        "run": github_value(data, "run_number|id"),
        "attempt": github_value(data, "run_attempt"),
        "state": states.get(word) or ("cancelled" if "completed" in words else "queued"),
        "url": data.get("url", ""),
        "at": github_value(data, "updated_at|completed_at|started_at"),
    }


def github_wanted(rules, draft):
    """Whether an event is stored: by the noise rules, unless one of MONITOR_GITHUB_EVENTS says otherwise. The
    last that fits counts; each names an event, and where it goes on, the action or conclusion."""
    import fnmatch

    event, action, conclusion = (draft.data.get(name) for name in ("event", "action", "conclusion"))
    names = [str(event), f"{event}.{action}", f"{event}.{conclusion}"]
    fits = [rule for rule in rules if fnmatch.filter(names, rule.removeprefix("-"))]
    return not fits[-1].startswith("-") if fits else draft.keep


# ======================================================================================================
# runs: what a run of an agent tells: where it works, what is kept of it, whether it waits
# ======================================================================================================

KEPT_TEXT = 4000  # characters of one text in a payload
KEPT_ITEMS = 100  # of one list or object
KEPT_BYTES = 64 * 1024
FOLD_SECONDS = 30  # Claude Code's notification follows the request for a permission 6 s later
TWICE_SECONDS = 5  # the same hook again, without an id of its own
FOLLOW_SECONDS = 30  # a cleared or forked session goes on under a new id


class Hook(NamedTuple):
    """One hook as it came: the agent, its payload, and what the request or the spooled file says besides."""

    agent: str
    payload: Any
    event: str | None = None
    task: str | None = None  # a reference, in whatever form it was written
    key: str | None = None
    time: str | None = None  # when it happened, where that is not now


class Heard(NamedTuple):
    """A hook with what is known of it before its transaction; `moment`: when it happened."""

    hook: Hook
    facts: dict[str, str]
    draft: Draft
    place: Place | None  # None: as the run has it
    digest: bytes
    moment: str


class Place(NamedTuple):
    """Where a run works: folder of its repository (of the main worktree), branch, owner/name of origin."""

    project: str
    branch: str = ""
    repository: str = ""


def parse_hook(raw: bytes) -> Any:
    """The JSON of a hook. Agents send what tools print: only what is not JSON is refused, what cannot be
    stored is replaced when it is trimmed."""
    try:
        return json.loads(raw.decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None


def parse_spooled(raw: bytes) -> Hook:
    """A hook or update that waited for a server: header lines, an empty one, the payload."""
    head, _, body = raw.partition(b"\n\n")
    lines = (line.partition(": ") for line in head.decode("utf-8", "replace").splitlines())
    found = {name: text.strip() or None for name, _, text in lines}
    if found.get("agent") not in (*AGENTS, "update"):
        raise invalid("this is not a spooled hook of an agent that is known here")
    moment = FIELDS["since"].check(found.get("time") or timestamp(), "time")
    payload = (parse_json if found["agent"] == "update" else parse_hook)(body)
    names = (found["agent"], payload, found.get("event"), found.get("task"), found.get("key"))
    return Hook(*names, min(moment, timestamp()))


def spooled(folder: str | None) -> list[str]:
    """The events in a spool folder, oldest first."""
    found = {}
    for path in Path(folder or os.devnull).glob("[!.]*.hook"):
        with contextlib.suppress(OSError):  # somebody else has sent it
            found[str(path)] = path.stat().st_mtime_ns
    return sorted(found, key=lambda path: (found[path], path))


def trimmed(value: Any, limit: int = KEPT_TEXT, depth: int = 12) -> Any:
    """A payload as it is kept: long texts, lists and objects cut, with the cut marked."""
    if isinstance(value, str):
        text = UNSTORABLE.sub("\ufffd", value[:limit])
        return text if len(value) <= limit else f"{text}… [{len(value) - limit:,} more characters cut]"
    if isinstance(value, int | float) and not abs(value) <= MAX_INTEGER:
        return str(value)
    if not isinstance(value, dict | list):
        return value
    if not depth:
        return "[cut: nested too deep]"
    most, rest = KEPT_ITEMS * limit // KEPT_TEXT, len(value) - KEPT_ITEMS * limit // KEPT_TEXT
    if isinstance(value, list):
        items = [trimmed(child, limit, depth - 1) for child in value[:most]]
        return items + [f"[{rest:,} more cut]"] * (rest > 0)
    pairs = list(value.items())[:most] + [("…", f"[{rest:,} more cut]")] * (rest > 0)
    return {trimmed(name, 200): trimmed(child, limit, depth - 1) for name, child in pairs}


def kept_data(payload: Any) -> Any:
    """What is stored of a payload: at most KEPT_BYTES of JSON."""
    for limit in (KEPT_TEXT, KEPT_TEXT // 5, KEPT_TEXT // 25):
        data = trimmed(payload, limit)
        size = len(dump(data))
        if size <= KEPT_BYTES:
            return data
    return {"cut": f"the payload has {size:,} characters even without its long texts"}


def settled(session: Any, heard: Heard) -> str | None:
    """The state of a run after an event; None: it stays as it was. An Esc sends nothing, and what a subagent
    does is no answer: a run that waits does so until its main thread says something."""
    before, state, facts = session["state"], heard.draft.state, heard.facts
    event = facts["event"]
    if late_for(session, heard.moment):
        return None
    if before in ("ended", "replaced"):
        return {"SessionStart": "new", "UserPromptSubmit": "working"}.get(event)
    if before == "stuck":
        return state or "working"
    notified = event == "Notification" and (before == "blocked" or before == state == "idle")
    same_tool = before == "blocked" and event == "PreToolUse" and facts.get("tool_name") == session["tool"]
    return None if notified or (same_tool and state == "working") else state


def late_for(session: Any, moment: str) -> bool:
    """Whether an event of this time was overtaken by another one; the shell knows only whole seconds."""
    return moment[:19] < session["heard_at"][:19]


def folds(waiting: list[Any], event: str, draft: Draft, moment: str) -> bool:
    """Whether an event says again what a run, or a subagent of its, is already known to wait for."""
    told = [row for row in waiting if event == "Notification" or draft.message == row["message"]]
    return draft.state == "blocked" and any(moment < shifted(row["since"], FOLD_SECONDS) for row in told)


def read_small(path: str) -> str:
    """The beginning of a small regular file, "" where there is none: a payload names where to look, and a
    pipe in that place must not hold us."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return file.read(16384).decode("utf-8", "replace").replace("\0", "\ufffd")
    return ""


def find_place(cwd: str) -> Place:
    """Where a run works, by what lies in its folder; by the folder's name where that is on another machine.
    A worktree belongs to its repository."""
    if not os.path.isdir(cwd):
        cwd = re.split(r"[/\\]\.claude[/\\]worktrees[/\\]", cwd)[0].rstrip("/\\")
    folder = cwd
    while folder and not os.path.lexists(os.path.join(folder, ".git")):
        folder = os.path.dirname(folder) if os.path.dirname(folder) != folder else ""
    if not folder:
        return Place(cwd)
    git = os.path.join(folder, ".git")
    pointer = read_small(git).strip()  # of a worktree or submodule
    if pointer.startswith("gitdir: "):
        git = os.path.normpath(os.path.join(folder, pointer.removeprefix("gitdir: ")))
    common = os.path.normpath(os.path.join(git, read_small(os.path.join(git, "commondir")).strip()))
    if os.path.basename(common) == ".git":
        folder = os.path.dirname(common)
    branch = re.match("ref: refs/heads/(.{1,200})$", read_small(os.path.join(git, "HEAD")).strip())
    origin = r'(?ms)^\[remote "origin"\][^\[]*?^\s*url\s*=\s*\S*?[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?\s*$'
    named = re.search(origin, read_small(os.path.join(common, "config")))
    return Place(folder, branch[1] if branch else "", named[1] if named else "")


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
    columns: tuple[str, ...]
    new: Fields
    changes: Fields

    def make(self, row: sqlite3.Row) -> dict[str, Any]:
        """A row as the JSON object clients know: what has no value is left out."""
        row = dict(zip(row.keys(), row, strict=True))  # a Row goes through all its names for each
        found = {name: row[name] for name in self.columns if row[name] is not None}
        return found | {name: json.loads(found[name]) for name in JSON_COLUMNS if name in found}


JSON_COLUMNS = ("metadata", "attention", "ci", "pull_requests")
COLUMNS = ("id", "name", "status", "created_at", "updated_at", "metadata")
WORKSTREAM = Kind("workstream", "workstreams", "workstreams", COLUMNS, NEW_WORKSTREAM, WORKSTREAM_CHANGES)
COLUMNS += ("number", "workstream_id", "summary_text", "summary_updated_at", "summary_source", "hidden_at")
TASK = Kind("task", "tasks", "task_rows", COLUMNS + JSON_COLUMNS[1:], NEW_TASK, TASK_CHANGES)
KINDS = {"workstream": WORKSTREAM, "task": TASK}


# ======================================================================================================
# queries: all the SQL that reads
# ======================================================================================================

READ_ROWS, READ_BYTES = 256, 1024 * 1024
SCAN_ROWS = 20_000  # a filtered catch-up looks at this many log rows at a time
PAGE_BYTES = 8 * 1024 * 1024
KEY_SECONDS = 7 * 86400
PRUNE_ROWS = 500  # one batch of pruning: writers wait for it
FREE_PAGES = 1000
STATE = {  # what exports hold besides the log, by table: the column that tells the newer of two rows
    "workstreams": "", "tasks": "", "sessions": "seen_at", "folders": "", "links": "", "pull_requests": "at",
    "checks": "at", "idempotency_keys": "",
}  # fmt: skip
POINTERS = {  # how exports name what a row points to: numbers of rows differ between databases
    "task": "(SELECT id FROM tasks WHERE number = t.task)",
    "workstream": "(SELECT id FROM workstreams WHERE number = t.workstream)",
    "seq": "(SELECT json_extract(body, '$.id') FROM log WHERE log.seq = t.seq) AS update_id, t.seq",
    "digest": "hex(digest)",
}


def search_words(text: str) -> str:
    """Plain words as an FTS5 query for rows that hold them all, each quoted; without any it finds nothing."""
    words = [word for word in text.split() if re.search(r"[^\W_]", word)]
    return " ".join('"' + word.replace('"', '""') + '"' for word in words) or '""'


class Queries:
    """Reading: every method takes part in whatever transaction its connection is in."""

    def __init__(self, db: sqlite3.Connection):
        self.db = db

    def rows(self, sql: str, **values: Any) -> list[sqlite3.Row]:
        """All rows of a statement."""
        return self.db.execute(sql, values).fetchall()

    def first(self, sql: str, **values: Any) -> sqlite3.Row | None:
        """The first row of a statement, or None."""
        return self.db.execute(sql, values).fetchone()

    def head(self) -> sqlite3.Row:
        """The one row that says which database this is and how far its log goes."""
        return self.first("SELECT stream, seq, pruned, secret FROM head")

    def find(self, kind: Kind, reference: str) -> sqlite3.Row | None:
        """The row that a checked reference names, or None. Problem (conflict) when a prefix fits several."""
        if kind is TASK and re.fullmatch("[0-9]{1,18}", reference):
            found = self.first("SELECT * FROM task_rows WHERE number = :number", number=int(reference))
            if found is not None:
                return found
        if ":" in reference:
            run = self.session(*reference.split(":", 1)) if kind is TASK else None
            return run and self.find(TASK, str(run["task"]))
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
        return [*map(WORKSTREAM.make, self.rows(sql, archived=wanted.get("include_archived", False)))]

    def tasks(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Task objects that match cleaned TASK_QUERY fields, oldest first. Tasks of archived workstreams
        come when asked for, or when their workstream is named."""
        sql = """
            SELECT * FROM task_rows
            WHERE (workstream = :workstream
                   OR :workstream IS NULL AND (:include_archived OR workstream_status = 'active'))
              AND (:status IS NULL OR status = :status)
              AND (:attention IS NULL OR instr(:attention, json_extract(attention, '$.state')))
              AND (:include_hidden OR hidden_at IS NULL)
              AND (:words IS NULL OR number IN (SELECT rowid FROM task_search WHERE task_search MATCH :words))
            ORDER BY number
        """
        values = {"include_archived": False, "include_hidden": False, "status": None} | wanted
        values["workstream"] = self.filter(wanted).workstream
        values["attention"] = " ".join(wanted["attention"]) if "attention" in wanted else None
        values["words"] = search_words(wanted["q"]) if wanted.get("q") else None
        return [*map(TASK.make, self.rows(sql, **values))]

    def update(self, seq: int) -> str:
        """The JSON of one update; Problem (not_found)."""
        found = self.first("SELECT body FROM log WHERE seq = :seq AND event = 'update'", seq=seq)
        if found is None:
            raise Problem("not_found", f"no update {seq}")
        return found["body"]

    def updates(self, chosen: Filter, wanted: dict[str, Any]) -> tuple[list[str], int | None]:
        """One page of updates (their JSON) for cleaned UPDATE_QUERY fields, and how many match in all, if
        wanted. It ends early rather than pass 8 MiB, but holds one update at least."""
        arms, values = update_query(chosen, wanted)
        order = wanted.get("order", "desc" if wanted.get("q") else "asc")
        limit = wanted.get("limit", 50)
        newest = f"ORDER BY 1 {order} LIMIT {limit}"
        since = f"AND {{}} >= ({BEGIN})" if "since" in wanted and order == "asc" else ""
        selects = [f"SELECT {seq} AS seq {rows} {since.format(seq)} {newest}" for seq, rows in arms]
        page = " UNION ".join(f"SELECT * FROM ({select})" for select in selects)
        sql = f"SELECT body FROM ({page}) AS page JOIN log USING (seq) ORDER BY seq {order} LIMIT {limit}"
        bodies = take(self.db.execute(sql, values), PAGE_BYTES)
        if not wanted.get("total", True):
            return bodies, None
        (seq, rows), counted = arms[0], "*"
        if len(arms) > 1:  # any of several tags: counting a list takes half the time of counting a UNION
            names = ", ".join(f":tag{index}" for index in range(len(arms)))
            counted, rows = f"DISTINCT {seq}", rows.replace("= :tag0", f"IN ({names})")
        return bodies, self.first(f"SELECT COUNT({counted}) {rows}", **values)[0]

    def expired(self, before: str, data_only: bool) -> int:
        """How many updates pruning would touch."""
        return self.first(f"SELECT COUNT(*) {OLD_UPDATES[data_only]}", before=before)[0]

    def session(self, agent: str, identity: str | None) -> sqlite3.Row | None:
        """A run of an agent, as it stands."""
        sql = "SELECT * FROM sessions WHERE agent = :agent AND id = :id AND subagent = ''"
        return self.first(sql, agent=agent, id=identity)

    def of_task(self, view: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Objects of a view (session_rows, link_rows), only those of a task where one is named."""
        task = self.filter(wanted).task
        rows = self.rows(f"SELECT * FROM {view} WHERE :task IS NULL OR task = :task LIMIT 1000", task=task)
        found = [{n: v for n, v in dict(row).items() if n != "task" and v is not None} for row in rows]
        flags = ("learnt", "close_on_merge")
        return [row | {name: True for name in flags if name in row} for row in found]

    sessions = functools.partialmethod(of_task, "session_rows")
    links = functools.partialmethod(of_task, "link_rows")

    def waiting(self, run: sqlite3.Row) -> list[sqlite3.Row]:
        """What a run and its subagents wait for."""
        sql = "SELECT * FROM sessions WHERE agent = :agent AND id = :id AND state = 'blocked'"
        return self.rows(sql, agent=run["agent"], id=run["id"])

    def run_before(self, agent: str, folder: str, since: str, cleared: bool) -> sqlite3.Row | None:
        """The run that ended (by a clear) in a folder since some moment, without a successor; the first."""
        sql = """
            SELECT * FROM sessions WHERE agent = :agent AND folder = :folder AND subagent = ''
              AND state = 'ended' AND seen_at >= :since AND (message LIKE '%(clear)' OR NOT :cleared)
            ORDER BY seen_at LIMIT 1
        """
        return self.first(sql, agent=agent, folder=folder, since=since, cleared=cleared)

    def linked_task(self, cwd: str, place: Place) -> sqlite3.Row | None:
        """The task, not over, that is bound to the branch, or to the folder or one above it."""
        folders = [cwd, place.project, *map(str, PurePath(cwd).parents)] if cwd else []
        sql = """
            SELECT task_rows.* FROM links JOIN task_rows ON task_rows.number = links.task
            WHERE task_rows.status IN ('active', 'blocked')
              AND (kind = 'branch' AND value = :branch AND repository IN ('', :project, :repository)
                   OR kind = 'folder' AND value IN (SELECT value FROM json_each(:folders)))
            ORDER BY kind, length(links.value) DESC LIMIT 1
        """
        return self.first(sql, **place._asdict(), folders=dump(folders))

    def keyed_task(self, key: str) -> sqlite3.Row | None:
        """The task of a whole key: its number or id, not the first digits of one."""
        sql = "SELECT * FROM task_rows WHERE id = :key OR number = :number"
        number = int(key) if key.isdecimal() and len(key) < 19 else None
        return self.first(sql, key=key.lower(), number=number)

    def linked(self, kind: str, value: str, repository: str) -> list[sqlite3.Row]:
        """The tasks that a name is bound to, there or anywhere; as `run`, that of a branch's newest run."""
        sql = """
            SELECT task, learnt, close_on_merge FROM links
            WHERE kind = :kind AND value = :value AND repository IN ('', :repository)
            UNION ALL SELECT * FROM (
                SELECT task, 0, 0 FROM sessions
                WHERE :kind = 'run' AND branch = :value AND repository = :repository COLLATE NOCASE
                ORDER BY seen_at DESC LIMIT 1)
        """
        return self.rows(sql, kind=kind, value=value, repository=repository)

    def showing(self, place: dict[str, Any], pull: int | None) -> list[int]:
        """The tasks that show checks of a branch, or a pull request."""
        sql = """
            SELECT task FROM checks WHERE repository = :repository AND branch = :branch
            UNION SELECT task FROM pull_requests WHERE repository = :repository AND number = :pull
        """
        return [row["task"] for row in self.rows(sql, **place, pull=pull)]

    def session_ended(self, signature: str) -> bool:
        """Whether a browser session was ended by its user."""
        return bool(self.rows("SELECT 1 FROM ended_sessions WHERE signature = :it", it=signature))

    def check(self) -> list[str]:
        """What is wrong with the database, a sentence each; none when all is well. Reads all of it."""
        problems = [row[0] for row in self.rows("PRAGMA integrity_check(20)") if row[0] != "ok"]
        strays = self.rows("PRAGMA foreign_key_check")
        problems += [f"a row of {row[0]} points to a missing {row[2]}" for row in strays]
        faults = self.rows("SELECT * FROM faults WHERE n > 0")
        return problems + [f"{row['n']} {row['what']}" for row in faults]

    def activity(self, seconds: int, count: int, tasks: list[int]) -> dict[int, dict[int, Any]]:
        """How much happened in the last `count` spans of so many seconds: for each of the tasks, by number,
        for each span that is not empty by its place, `updates`, `errors` among them, and the `last` seq."""
        first = int(time.time()) // seconds - count + 1
        sql = """
            SELECT task, strftime('%s', timestamp) / :seconds - :first AS span, COUNT(*) AS updates,
                   SUM(level IS 'error') AS errors, MAX(seq) AS last
            FROM updates
            WHERE seq >= (SELECT seq FROM updates WHERE timestamp >= :since ORDER BY timestamp LIMIT 1)
              AND timestamp >= :since AND task IN (SELECT value FROM json_each(:tasks))
            GROUP BY task, span
        """
        since = timestamp(datetime.datetime.fromtimestamp(first * seconds, datetime.UTC))
        found: dict[int, dict[int, Any]] = {}
        for row in self.rows(sql, since=since, seconds=seconds, first=first, tasks=dump(tasks)):
            found.setdefault(row["task"], {})[row["span"]] = row
        return found

    def changes(self, task: int, after: int, before: int) -> list[dict[str, Any]]:
        """What was done to a task between two places of the log: its status, name or workstream changed."""
        sql = "SELECT * FROM task_changes WHERE task = :task AND seq > :after AND seq < :before"
        return [dict(row) for row in self.rows(sql, task=task, after=after, before=before)]

    def seq_before(self, moment: str) -> int:
        """The number before that of the first update since a moment; the newest where there is none."""
        first = "SELECT MIN(seq) - 1 FROM updates WHERE timestamp >= :moment"
        return self.first(f"SELECT coalesce(({first}), seq) FROM head", moment=moment)[0]

    def log(self, since: int) -> Iterator[sqlite3.Row]:
        """The rows of the log after a number, one by one."""
        sql = "SELECT seq, event, task, workstream, body FROM log WHERE seq > ? ORDER BY seq"
        return self.db.execute(sql, (since,))

    def state(self, table: str) -> Iterator[dict[str, Any]]:
        """The rows of a table of STATE, one by one; what they point to is named by its id."""
        names = [row["name"] for row in self.rows(f"PRAGMA table_info({table})")]
        parts = ", ".join(f"{POINTERS.get(name, name)} AS {name}" for name in names)
        for row in self.db.execute(f"SELECT {parts} FROM {table} AS t"):
            found = dict(row)
            yield found | ({"metadata": json.loads(found["metadata"])} if "metadata" in found else {})

    def update_seq(self, identity: str) -> int | None:
        """The number of the update with an id; None: it is not here."""
        return self.first("SELECT MAX(seq) FROM updates WHERE id = :id", id=uuid.UUID(identity).bytes)[0]

    def last_row(self) -> tuple[int, str, str]:
        """Number, event and JSON of the last row of the log; those after it may have been removed."""
        return tuple(self.first("SELECT seq, event, body FROM log ORDER BY seq DESC LIMIT 1") or (0, "", ""))

    def news_of_tasks(self) -> dict[str, dict[str, Any]]:
        """By each task's id `since` when it has its status, `seq` and service of its newest update."""
        sql = """
            SELECT tasks.id, coalesce(status_since, created_at), seq,
                   substr(source, 1, instr(source || ':', ':') - 1)
            FROM tasks LEFT JOIN updates ON seq = (SELECT MAX(seq) FROM updates WHERE task = tasks.number)
        """
        return {id: {"since": at, "seq": seq, "source": who} for id, at, seq, who in self.rows(sql)}

    def newest_of_tasks(self, ids: list[str]) -> dict[str, dict[str, Any]]:
        """The newest update of each of these tasks that has one, by the task's id."""
        sql = "SELECT * FROM newest_of_tasks WHERE task_id IN (SELECT value FROM json_each(:ids))"
        return {row["task_id"]: json.loads(row["body"]) for row in self.rows(sql, ids=dump(ids))}

    def events(self, cursor: int, chosen: Filter, head: int) -> tuple[list[Frame], int]:
        """The next frames after `cursor` that match, and the seq up to which the log was read. Bounded in
        rows and bytes, and in rows looked at: there may be none, with the cursor moved on."""
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
    """The SELECTs whose union is the seqs of matching updates, and their values.
    The most telling condition drives the query: the others are kept from the planner by a unary plus, for
    without statistics it might walk the index of a kind that most rows have. Tags drive as one SELECT a
    tag (microseconds at a million rows; a correlated EXISTS over all updates takes 0.4 s on a miss)."""
    values = {name: value for name, value in chosen._asdict().items() if value is not None and name != "tags"}
    values |= {name: wanted[name] for name in ("after_seq", "before_seq", "since", "until") if name in wanted}
    values |= {f"tag{index}": tag for index, tag in enumerate(chosen.tags)}
    tag_names = [f":tag{index}" for index in range(len(chosen.tags))]
    seq, table, drivers, others = "updates.seq", "updates", [""], []
    join = ""
    if wanted.get("q"):
        values["q"] = search_words(wanted["q"])
        seq, table, join = "update_search.rowid", "update_search", "ON updates.seq = update_search.rowid"
        drivers = ["update_search MATCH :q"]
    elif chosen.tags and chosen.task is None:
        seq, table, join = "update_tags.seq", "update_tags", "USING (seq)"
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
    if join and any("updates." in clause for clause in others):
        table += f" JOIN updates {join}"  # only where needed: it makes counting far slower
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


# What pruning is about: whole updates, or their data. A condition for both would use no index.
OLD_UPDATES = (
    "FROM updates WHERE timestamp < :before",
    "FROM updates WHERE timestamp < :before AND has_data",
)
# Where the rows since a time begin: else a page of the last day, oldest first, walks over all before. Looked
# for among so many rows only; with more of them there is less to walk over.
BEGIN = """
    SELECT CASE COUNT(*) WHEN 100000 THEN 0 ELSE MIN(seq) END
    FROM (SELECT seq FROM updates WHERE timestamp >= :since LIMIT 100000)
"""


# ======================================================================================================
# transaction: all the SQL that writes
# ======================================================================================================


UPDATE_COLUMNS = "id task_id source timestamp message kind level tags data redacted_at"


class Transaction(Queries):
    """Writing: what an operation may do inside the writer's transaction. Collects the frames it logs."""

    def __init__(self, db: sqlite3.Connection):
        super().__init__(db)
        self.frames: list[Frame] = []

    def put(self, table: str, values: dict[str, Any], rest: str = "") -> sqlite3.Cursor:
        """Add a row; the names of table and columns, and the rest of the statement, are ours."""
        slots = ", ".join(f":{name}" for name in values)
        return self.db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({slots}) {rest}", values)

    def save(self, table: str, values: dict[str, Any], when: str = "TRUE") -> bool:
        """Add a row, or change the one with its key `when` that holds (a condition of ours; "": never); what
        is not among `values` stays. Returns whether it did."""
        sets = ", ".join(f"{name} = excluded.{name}" for name in values)
        change = f"UPDATE SET {sets} WHERE {when}" if when else "NOTHING"
        return self.put(table, values, f"ON CONFLICT DO {change}").rowcount > 0

    def append(self, event: str, task: int | None, workstream: int, value: dict, at=None, **facets) -> str:
        """Write the next log row, an update's with its number (`at`: what the row has elsewhere, beyond all
        of ours); returns the JSON."""
        seq = self.first("UPDATE head SET seq = coalesce(:at, seq + 1) RETURNING seq", at=at)["seq"]
        body = dump({"seq": seq} | value if event == "update" else value)
        sql = "INSERT INTO log (seq, event, task, workstream, body) VALUES (?, ?, ?, ?, ?)"
        self.db.execute(sql, (seq, event, task, workstream, body))
        self.frames.append(Frame(seq, event, task, workstream, body, **facets))
        return body

    def append_row(self, kind: Kind, event: str, number: int) -> str:
        """Log a workstream or task as it now stands; returns its JSON."""
        row = self.first(f"SELECT * FROM {kind.view} WHERE number = :number", number=number)
        place = (number, row["workstream"]) if kind is TASK else (None, number)
        return self.append(f"{kind.name}_{event}", *place, kind.make(row))

    def tell(self, before: sqlite3.Row) -> None:
        """Log a task where it shows another state of runs or checks than before."""
        after = self.one(TASK, str(before["number"]))
        if any(after[name] != before[name] for name in ("ci", "pull_requests", "attention")):
            self.append_row(TASK, "updated", before["number"])

    def add(self, kind: Kind, values: dict[str, Any], moment: str | None = None) -> int:
        """Add a workstream or task with a new id, unless it has one; returns its number."""
        values = {"id": str(uuid.uuid4()), "created_at": moment, "updated_at": moment} | values
        number = self.put(kind.table, values, "RETURNING number").fetchone()["number"]
        self.append_row(kind, "created", number)
        return number

    def change(self, kind: Kind, number: int, values: dict[str, Any], moment: str | None = None) -> str:
        """Set columns (their names are ours) of a workstream or task; returns its JSON."""
        values = {"updated_at": moment} | values
        sets = ", ".join(f"{name} = :{name}" for name in values)
        self.db.execute(f"UPDATE {kind.table} SET {sets} WHERE number = :number", values | {"number": number})
        return self.append_row(kind, "updated", number)

    def insert_update(self, task: sqlite3.Row, fields: dict[str, Any], moment: str) -> str:
        """Add an update: source, message, and kind, level, tags, data where given (an imported one has its id
        already); returns its JSON."""
        value = {"id": str(uuid7())} | fields | {"task_id": task["id"], "timestamp": moment}
        value["tags"] = list(dict.fromkeys(fields.get("tags", ())))
        value = {name: value[name] for name in UPDATE_COLUMNS.split() if value.get(name) is not None}
        return self.put_update(task["number"], task["workstream"], value)

    def put_update(self, task: int, workstream: int, value: dict[str, Any], at: int | None = None) -> str:
        """Log an update as it stands, and list it; returns its JSON."""
        facets = {name: value.get(name) for name in ("source", "kind", "level")}
        body = self.append("update", task, workstream, value, at, tags=value["tags"], **facets)
        seq = self.frames[-1].seq
        row = {"seq": seq, "id": uuid.UUID(value["id"]).bytes, "task": task, "has_data": "data" in value}
        self.put("updates", row | facets | {"timestamp": value["timestamp"]})
        tags = [(tag, seq) for tag in value["tags"]]
        self.db.executemany("INSERT INTO update_tags (tag, seq) VALUES (?, ?)", tags)
        self.db.execute("INSERT INTO update_search (rowid, message) VALUES (?, ?)", (seq, value["message"]))
        return body

    def seen_key(self, key: str | None, digest: bytes, now: str) -> sqlite3.Row | None:
        """What a key was used for before; None for a new one, or none. Problem (conflict): another body."""
        if not key:
            return None
        self.db.execute("DELETE FROM idempotency_keys WHERE created_at < ?", (shifted(now, -KEY_SECONDS),))
        found = self.first("SELECT digest, seq, created_at FROM idempotency_keys WHERE key = :key", key=key)
        if found is not None and found["digest"] != digest:
            raise Problem("conflict", "this Idempotency-Key was already used with another body")
        return found

    def keep_key(self, key: str | None, digest: bytes, now: str, seq: int | None) -> None:
        """Remember which update a key made, if there is one."""
        if key:
            self.save("idempotency_keys", {"key": key, "digest": digest, "seq": seq, "created_at": now})

    def end_subagents(self, agent: str, identity: str, subagent: str | None) -> None:
        """A subagent, or with None each of a run, asks for nothing any more."""
        which = "agent = ? AND id = ? AND subagent <> '' AND subagent = ifnull(?, subagent)"
        self.db.execute(f"DELETE FROM sessions WHERE {which}", (agent, identity, subagent))

    def silence(self, before: str) -> None:
        """Mark the runs that worked and have said nothing since some moment as stuck; their tasks say so."""
        sql = """
            UPDATE sessions SET state = 'stuck', since = seen_at, message = coalesce('Silent since: ' || (
                SELECT message FROM update_messages WHERE seq = sessions.seq), 'Silent since it began')
            WHERE state = 'working' AND seen_at < :before AND NOT EXISTS (
                SELECT 1 FROM sessions AS sub
                WHERE (sub.agent, sub.id) = (sessions.agent, sessions.id) AND sub.state = 'blocked')
            RETURNING task
        """
        for number in {row["task"] for row in self.rows(sql, before=before)}:
            self.append_row(TASK, "updated", number)

    def folder_workstream(self, folder: str, moment: str, repository: str) -> int:
        """The workstream of a repository's folder (of owner/name, where GitHub tells of it): its own, one of
        its name that has none, or a new one."""
        name = PurePath(folder.replace("\\", "/")).name[:500] or "Inbox"
        sql = """
            SELECT * FROM (
                SELECT workstream FROM folders WHERE path IN (:folder, nullif(:repository, ''), (
                    SELECT project FROM sessions
                    WHERE :folder = :repository AND repository = :repository COLLATE NOCASE
                      AND repository <> '' ORDER BY seen_at DESC LIMIT 1))
                ORDER BY path <> :folder)
            UNION ALL
            SELECT * FROM (
                SELECT number FROM workstreams WHERE name = :name AND status = 'active'
                  AND number NOT IN (SELECT workstream FROM folders) ORDER BY number)
        """
        found = self.first(sql, folder=folder, name=name, repository=repository)
        number = found[0] if found else self.add(WORKSTREAM, {"name": name}, moment)
        self.save("folders", {"path": folder, "workstream": number}, "")
        return number

    def add_task(self, name: str, moment: str, folder: str, repository: str) -> sqlite3.Row:
        """Add a task in the workstream of a repository's folder; returns it."""
        values = {"name": name, "workstream": self.folder_workstream(folder, moment, repository)}
        return self.one(TASK, str(self.add(TASK, values, moment)))

    def move_session(self, run: sqlite3.Row, task: sqlite3.Row, updates: bool) -> None:
        """Give a run to another task, with its updates where asked for; the log then says which."""
        place = {"agent": run["agent"], "id": run["id"], "old": run["task"], "new": task["number"]}
        self.rows("UPDATE sessions SET task = :new WHERE agent = :agent AND id = :id", **place)
        if updates:
            which = "source = :agent || ':' || :id AND task = :old"
            rows = self.rows(f"UPDATE updates SET task = :new WHERE {which} RETURNING seq", **place)
            old = self.one(TASK, str(run["task"]))
            moved = {"from": old["id"], "to": task["id"], "source": f"{run['agent']}:{run['id']}"}
            moved["seqs"] = sorted(row["seq"] for row in rows)
            for row in (old, task):  # for who follows only one of them
                self.append("updates_moved", row["number"], row["workstream"], moved)
        for number in (run["task"], task["number"]):
            self.append_row(TASK, "updated", number)

    def link(self, task: int, link: dict[str, Any]) -> None:
        """Bind what a link names to a task; what was bound to another one changes hands, unless a person
        bound it and the link is only learnt."""
        values = {"kind": link["link"], "value": link["value"], "repository": link.get("repository", "")}
        values |= {name: link.get(name, False) for name in ("learnt", "close_on_merge")}
        self.save("links", values | {"task": task}, "learnt OR NOT excluded.learnt")

    def unlink(self, link: dict[str, str]) -> int:
        """Remove a link; returns how many that were."""
        sql = "DELETE FROM links WHERE kind = :link AND value = :value AND repository = :repository"
        return self.db.execute(sql, {"repository": ""} | link).rowcount

    def end_session(self, signature: str, until: str) -> None:
        """Remember until its expiry that a browser session was ended."""
        self.db.execute("DELETE FROM ended_sessions WHERE until < ?", (timestamp(),))
        self.save("ended_sessions", {"signature": signature, "until": until}, "")

    def redact_update(self, seq: int, now: str) -> str:
        """Wipe message and data of an update, and log that; returns its JSON. Merges the search index: a
        deleted entry stays in it until then (seconds at a million updates)."""
        sql = """
            UPDATE log SET body = json_set(json_remove(body, '$.data'),
                                           '$.message', '[redacted]', '$.redacted_at', :now)
            WHERE seq = :seq AND event = 'update' RETURNING task, workstream, body
        """
        found = self.first(sql, seq=seq, now=now)
        if found is None:
            raise Problem("not_found", f"no update {seq}")
        self.db.execute("UPDATE updates SET has_data = 0 WHERE seq = ?", (seq,))
        self.db.execute("INSERT INTO update_search (update_search) VALUES ('optimize')")
        return self.append("update_redacted", found["task"], found["workstream"], json.loads(found["body"]))

    def become(self, stream: str, pruned: int) -> None:
        """Make an empty database the copy of another one: its cursors count here, too."""
        self.db.execute("UPDATE head SET stream = ?, pruned = max(pruned, ?)", (stream, pruned))

    def advance(self, seq: int) -> bool:
        """Give no number up to `seq` any more; returns whether that changes anything."""
        return self.db.execute("UPDATE head SET seq = ? WHERE seq < ?", (seq, seq)).rowcount > 0

    def columns_of(self, table: str, row: dict[str, Any], seq: int | None = None) -> dict[str, Any]:
        """A row of an export as the columns of its table; `seq`: the update that it points to."""
        names = {column["name"] for column in self.rows(f"PRAGMA table_info({table})")}
        must(row.keys() <= names | {"update_id"}, f"it must have the columns of {table}")
        values = {name: value for name, value in row.items() if name in names}
        values |= {name: self.one(kind, row[name])["number"] for name, kind in KINDS.items() if name in row}
        values |= {"metadata": dump(row["metadata"])} if "metadata" in row else {}
        values |= {"digest": bytes.fromhex(row["digest"])} if "digest" in row else {}
        return values | ({"seq": seq} if "seq" in row else {})

    def take_row(self, table: str, row: dict[str, Any], seq: int | None) -> bool:
        """Add a row of an export, or put it in the place of an older one; returns whether it did."""
        newer = STATE[table] and f"excluded.{STATE[table]} > {STATE[table]}"
        return self.save(table, self.columns_of(table, row, seq), newer)

    def merge_row(self, kind: Kind, row: dict[str, Any]) -> bool:
        """Add a workstream or task of an export, or change an older one; returns whether it did."""
        known, values = self.find(kind, row["id"]), self.columns_of(kind.table, row)
        del values["number"]
        if known is None:
            self.add(kind, values)
        elif row["updated_at"] > known["updated_at"]:
            self.change(kind, known["number"], values)
        return known is None or row["updated_at"] > known["updated_at"]

    def prune(self, before: str, data_only: bool) -> int:
        """Remove the next PRUNE_ROWS updates older than `before`, or only their data; returns how many."""
        change = "UPDATE updates SET has_data = 0" if data_only else "DELETE FROM updates"
        oldest = f"SELECT seq {OLD_UPDATES[data_only]} ORDER BY timestamp LIMIT {PRUNE_ROWS}"
        rows = self.rows(f"{change} WHERE seq IN ({oldest}) RETURNING seq", before=before)
        # REPLACE, not UPDATE: rows that shrink in place keep their pages, and no space is given back.
        without_data = """
            REPLACE INTO log (seq, event, task, workstream, body)
            SELECT seq, event, task, workstream, json_remove(body, '$.data') FROM log WHERE seq = ?
        """
        self.db.executemany(without_data if data_only else "DELETE FROM log WHERE seq = ?", map(tuple, rows))
        return len(rows)


# ======================================================================================================
# database: the file, its connections, the one writer
# ======================================================================================================

BUSY_SECONDS = 5  # how long a write waits for another process that holds the lock
BATCH_OPERATIONS = 256
APPLICATION_ID = 0x4D4F4E49  # "MONI" in the file's header: tells our file from any other database
SCHEMA_VERSION = 2
# By version the statements that lead to it from the one before: schema.sql ends with them.
MIGRATIONS = {2: asset("schema.sql").decode().partition("-- Version 2\n")[2]}


def thread_pool(size: int) -> Callable[..., Any]:
    """A function that calls another one in one of `size` real threads. Under gevent those of its own pool:
    sqlite3 blocks every greenlet while it works. Without gevent each caller is a real thread already."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey and monkey.is_module_patched("threading"):
        from gevent.threadpool import ThreadPool

        pool = ThreadPool(size)

        def outcome(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Exception | None]:
            try:
                return function(*arguments), None
            except Exception as error:  # gevent prints the trace of whatever leaves a thread of its pool
                return None, error

        def call(*wanted: Any) -> Any:
            value, error = pool.apply(outcome, wanted)
            if error is not None:
                raise error
            return value
    else:
        gate = threading.Semaphore(size)

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            with gate:
                return function(*arguments)

    return call


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
        self._file = os.stat(self.path)
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
            db = self._readers.pop() if self._readers else connect(self.path, "ro")
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

    def pieces(self, lines: Callable[[Queries], Iterator[bytes]]) -> Iterator[bytes]:
        """What `lines` yields from one snapshot of the database, about a megabyte at a time, each made in a
        reader's thread. Writers go on meanwhile; the write-ahead log is folded in when it is over."""
        with contextlib.closing(connect(self.path, "ro")) as db:
            db.execute("BEGIN")
            made = lines(Queries(db))
            while piece := self._in_reader(draw, made):
                yield piece

    def backup(self, path: str) -> None:
        """Copy the database, as it is at this moment, into a new file. Writers go on meanwhile."""
        self.read(lambda q: copy_into(q.db, path))

    def write(self, operation: Callable[[Transaction], Any]) -> Any:
        """Run an operation in the writer's next transaction; returns its result once that is on disk. What it
        raises undoes it alone. Only the writer gives it up: a time-out here might follow what is stored."""
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
        if not os.path.samestat(os.stat(self.path), self._file):
            raise FileNotFoundError(f"{self.path} was replaced: put it back, or restart Monitor")

    def _run(self, pending: types.SimpleNamespace) -> list[Frame]:
        transaction = Transaction(self._db)
        self._db.execute("SAVEPOINT operation")
        try:
            pending.result = pending.operation(transaction)
        except BaseException as error:  # whatever it is: the writer must live on
            if not self._db.in_transaction:
                raise  # the engine gave the whole transaction up: a full disk, an I/O error
            pending.error = unavailable(error) if isinstance(error, sqlite3.Error) else error
            transaction.frames = []
            self._db.execute("ROLLBACK TO operation")
        self._db.execute("RELEASE operation")
        return transaction.frames


def draw(lines: Iterator[bytes]) -> bytes:
    """The next lines, joined, up to READ_BYTES; one at least where there is one."""
    drawn = io.BytesIO()
    any(drawn.write(line) and drawn.tell() >= READ_BYTES for line in lines)
    return drawn.getvalue()


def unavailable(error: Exception) -> Problem:
    """A database error as the sentence for who asked: nothing was stored, try again."""
    return Problem("unavailable", f"the database cannot be used now ({error}); nothing was stored, try again")


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
    """A connection in autocommit mode: transactions are begun by hand. Only the writer's mode is not "ro":
    SQLite before 3.51.3 can corrupt a database in which two write or checkpoint at the same moment."""
    location = "file:" + path.replace("%", "%25").replace("?", "%3f").replace("#", "%23") + f"?mode={mode}"
    db = sqlite3.connect(
        location, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
    )
    db.row_factory = sqlite3.Row
    return db


def look_into(path: str) -> contextlib.closing:
    """A connection that only reads. Without a write-ahead log to read, immutable keeps SQLite from making one
    beside a file that may not be ours."""
    return contextlib.closing(connect(path, "ro" if os.path.exists(path + "-wal") else "ro&immutable=1"))


def quick_check(path: str, seconds: float) -> str:
    """What a quick look at all pages of a file finds: `ok`, what is wrong, or "" when it takes longer."""
    with look_into(path) as db:
        timer = threading.Timer(seconds, db.interrupt)
        timer.start()
        try:
            return db.execute("PRAGMA quick_check(1)").fetchone()[0]
        except sqlite3.Error as error:
            return "" if str(error) == "interrupted" else str(error)
        finally:
            timer.cancel()
            timer.join()


def copy_into(db: sqlite3.Connection, path: str) -> None:
    """Copy a database into a new file."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(path, "rw")) as target:
        db.backup(target)


def open_writer(path: str) -> sqlite3.Connection:
    """The one connection that writes, on a file that is ours and of our version."""
    version, db = stored_version(path), None
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
        db = connect(path, "rw")
        if version < SCHEMA_VERSION:
            bring_up(db, path, version)
        # FULL: what was acknowledged survives power loss too, not only kill -9. What is wiped must not be
        # found in the file: secure_delete.
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON"):
            db.execute(f"PRAGMA {pragma}")
        return db
    except (OSError, sqlite3.Error) as error:
        if db is not None:
            db.close()
        raise misconfigured(f"cannot open {path}: {error}") from error


def stored_version(path: str) -> int:
    """The schema version of a file, 0 when it is missing or empty. Problem when it is not ours."""
    if not os.path.exists(path) or os.path.getsize(path) == 0:
        return 0
    sql = "SELECT application_id, user_version, n FROM pragma_application_id, pragma_user_version, "
    try:
        with look_into(path) as db:
            counted = "(SELECT COUNT(*) AS n FROM sqlite_schema)"
            application, version, things = db.execute(sql + counted).fetchone()
    except sqlite3.Error as error:
        raise misconfigured(f"cannot read {path}: {error}; it was left as it is") from None
    if application == things == 0:
        return 0
    if application != APPLICATION_ID:
        raise misconfigured(f"{path} is not a Monitor database; it was left as it is")
    if version > SCHEMA_VERSION:
        newer = f"a newer Monitor (schema {version}, this one knows {SCHEMA_VERSION})"
        raise misconfigured(f"{path} was made by {newer}; it was left as it is: update Monitor")
    return version


def bring_up(db: sqlite3.Connection, path: str, version: int) -> None:
    """Make a fresh database, or bring an older one up once it was copied beside itself; all or nothing."""
    if version == 0:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # works only when set before anything is written
        db.execute("PRAGMA journal_mode = WAL")
        first = f"INSERT INTO head VALUES (1, '{uuid.uuid4()}', 0, 0, randomblob(32));"
        steps = f"{asset('schema.sql').decode()} {first} PRAGMA application_id = {APPLICATION_ID};"
    else:
        copy_into(db, f"{path}.v{version}.{time.strftime('%Y%m%d-%H%M%S')}.backup")
        steps = "".join(f"{MIGRATIONS[step]};" for step in range(version + 1, SCHEMA_VERSION + 1))
    # One script: Python commits what is open before it runs one.
    db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


# ======================================================================================================
# stream: a subscriber is a cursor, the broadcaster only wakes
# ======================================================================================================

RING_BYTES = 8 * 1024 * 1024
FRAME_BYTES = 700  # what a frame takes in memory besides its text
WAKE_SECONDS = 0.005  # one wake and write costs 9 to 15 microseconds a reader, an event inside a batch 0.3
WAIT_SECONDS = 5  # a quiet stream looks up this often; with the next, a sign of life at least every 15 s
QUIET_SECONDS = 9
CHECKPOINT_ROWS = 1000
TICK_SECONDS = 0.25
MAX_STREAMS = 2000


class Broadcaster:
    """The newest frames in a ring bounded by bytes, and the readers' wake-up. There is no queue per
    reader: nothing is dropped, replay and live have no seam, a stuck reader costs the batch it holds.
    Who waits for the same stands in one crowd; none is woken for what it does not want."""

    def __init__(self):
        self.head = self.streams = 0
        self.closed = False
        self._lock = threading.Lock()
        self.forget()
        self._crowds: dict[Filter, types.SimpleNamespace] = {}
        self._dirty = threading.Event()
        threading.Thread(target=self._wake_readers, name="monitor-waker", daemon=True).start()

    def publish(self, frames: list[Frame]) -> None:
        """Take in committed frames, in order, and wake the readers."""
        leap = frames[-1].seq - frames[0].seq >= len(frames)  # an import has left numbers out
        changed = any(frame.event in ("update_redacted", "updates_moved") for frame in frames)
        if leap or changed or frames[0].seq != self.head + 1:
            self.forget()  # the ring holds what was wiped, or stood elsewhere
        with self._lock:
            self._frames += [] if leap else frames
            self._bytes += 0 if leap else sum(len(frame.sse) + FRAME_BYTES for frame in frames)
            while self._bytes > RING_BYTES:
                self._bytes -= len(self._frames.pop(0).sse) + FRAME_BYTES
            self.head = frames[-1].seq
        if self._crowds:
            self._dirty.set()

    def after(self, cursor: int) -> list[Frame] | None:
        """The next frames after `cursor`, at most about 1 MiB; None when they have left the ring."""
        start, head, frames = self._newest
        if (start, head) == (cursor, self.head):
            return frames  # the same for all at the tail
        with self._lock:
            if cursor >= self.head:
                return []
            if not self._frames or self._frames[0].seq > cursor + 1:
                return None
            start = end = cursor + 1 - self._frames[0].seq  # no number is left out
            size = 0
            while end < len(self._frames) and size < READ_BYTES:
                size += len(self._frames[end].sse)
                end += 1
            self._newest = cursor, self.head, self._frames[start:end]
            return self._newest[2]

    def wait(self, cursor: int, chosen: Filter, seconds: float | None = None) -> int:
        """Wait for something wanted after `cursor`, the end, or WAIT_SECONDS (and `seconds`) at most; returns
        the cursor, moved past what is not. No lock: who joins a crowd looks at the head after that, who
        publishes looks for crowds after moving it."""
        crowd = self._crowds.get(chosen) or types.SimpleNamespace(seen=0, wake=threading.Event())
        crowd = self._crowds.setdefault(chosen, crowd)
        if self.head <= cursor and not self.closed:
            crowd.wake.wait(seconds)
            cursor = max(cursor, crowd.seen)
        return cursor

    def forget(self) -> None:
        """Drop the ring: rows of the log were changed or removed, and must be read again."""
        with self._lock:
            self._frames: list[Frame] = []
            self._bytes, self._newest = 0, (-1, -1, [])  # from, head, frames: what `after` found last

    def join(self) -> bool:
        """Count a new stream; False when there are too many, or the server shuts down."""
        with self._lock:
            room = self.streams < MAX_STREAMS and not self.closed
            self.streams += room
            return room

    def leave(self) -> None:
        """A stream has ended."""
        with self._lock:
            self.streams -= 1

    def close(self) -> None:
        """End every stream."""
        self.closed = True
        self._dirty.set()

    def _wake_readers(self) -> None:
        """Wake at most every WAKE_SECONDS, the first event of a lull at once."""
        told, beat, ending = 0, 0.0, False
        while not ending:
            self._dirty.wait(0.0 if told < self.head else max(0.0, beat - time.monotonic()))
            self._dirty.clear()
            ending, now, head, frames = self.closed, time.monotonic(), self.head, self.after(told)
            told = frames[-1].seq if frames else head
            for chosen, crowd in list(self._crowds.items()):
                if frames is None or ending or now >= beat or any(map(chosen.matches, frames)):
                    del self._crowds[chosen]
                    crowd.wake.set()
                else:
                    crowd.seen = told
            beat = now + WAIT_SECONDS if now >= beat else beat
            time.sleep(WAKE_SECONDS)
            time.sleep(max(0.0, time.monotonic() - now - 2 * WAKE_SECONDS))  # when busy, half is for others


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
        elif (cursor := broadcaster.wait(cursor, chosen)) >= broadcaster.head:
            yield [], cursor


def changes(broadcaster: Broadcaster, cursor: int, chosen: Filter, seconds: float) -> Iterator:
    """Yield each time that something wanted came after a cursor, for some seconds or until the end."""
    until = time.monotonic() + seconds
    while not broadcaster.closed and (left := until - time.monotonic()) > 0:
        frames = broadcaster.after(cursor)
        if frames is None or any(map(chosen.matches, frames)):
            cursor = broadcaster.head
            yield
        elif frames:
            cursor = frames[-1].seq
        else:
            cursor = broadcaster.wait(cursor, chosen, left)


def ticks(batches: Iterable, broadcaster: Broadcaster) -> Iterator:
    """Coalesce batches to at most one `tick` each TICK_SECONDS, the last event's included: a page only wants
    to know that something changed, and how far the log goes."""
    due, pending = 0.0, False
    for frames, cursor in batches:
        pending = pending or bool(frames)
        if pending and cursor >= broadcaster.head:
            time.sleep(max(0.0, due - time.monotonic()))
        told = pending and time.monotonic() >= due
        yield ([Frame(cursor, "tick", None, None, dump({"seq": cursor}))] if told else []), cursor
        due, pending = (time.monotonic() + TICK_SECONDS, False) if told else (due, pending)


# Where a stream begins: after which seq, what `hello` says, and why the wish could not be met.
Cursor = namedtuple("Cursor", "seq resumed reset", defaults=[None])


def place_cursor(given: str | None, stream: str | None, head: sqlite3.Row) -> Cursor:
    """Read a client's cursor. Never an error: EventSource gives up for good on any status but 200."""
    known = given is not None and re.fullmatch(r"[0-9]{1,19}", given, re.ASCII)
    other = stream not in (None, head["stream"])
    if not known or other or int(given) > head["seq"]:
        reason = None if given is None else "other_stream" if other else "ahead" if known else "unknown"
        return Cursor(head["seq"], False, reason)
    pruned = int(given) < head["pruned"]
    return Cursor(int(given), not pruned, "pruned" if pruned else None)


def encode_sse(event: str, data: Any, seq: int | None = None) -> bytes:
    """One SSE event that is not in the log (hello, reset, checkpoint)."""
    return f"{'' if seq is None else f'id: {seq}' + chr(10)}event: {event}\ndata: {dump(data)}\n\n".encode()


def encode_line(event: str, data: Any, seq: int | None = None) -> bytes:
    """The same as one line of NDJSON."""
    return (dump({"event": event} | ({} if seq is None else {"id": seq}) | {"data": data}) + "\n").encode()


def frame_line(frame: Frame) -> bytes:
    """A log frame as one line of NDJSON."""
    return b'{"event":"%s","id":%d,"data":%s}\n' % (frame.event.encode(), frame.seq, frame.body)


# How a stream is written: media type, an event that is not in the log, a frame, a sign of life, and whether
# it can say when to come back.
StreamFormat = namedtuple("StreamFormat", "mimetype special frame heartbeat ends")
FORMATS = {
    "sse": StreamFormat("text/event-stream", encode_sse, lambda frame: frame.sse, b":\n\n", True),
    "ndjson": StreamFormat("application/x-ndjson", encode_line, frame_line, b"\n", False),
}


@functools.lru_cache(maxsize=2)
def joined(encode: Callable[[Frame], bytes], frames: tuple[Frame, ...]) -> bytes:
    """Frames as they are written: the readers at the tail all get the same."""
    return b"".join([encode(frame) for frame in frames])


def stream_bytes(
    style: StreamFormat, start: Cursor, head: sqlite3.Row, batches: Iterable, ends=lambda: False
) -> Iterator[bytes]:
    """Write a stream: hello, reset where due, batch by batch with checkpoints and heartbeats, and its end."""
    retry = b"retry: %d\n" % random.randint(1000, 3000)  # a thousand readers must not return in one moment
    first = style.special("hello", {"stream": head["stream"], "seq": head["seq"], "resumed": start.resumed})
    if start.reset:
        seq = max(start.seq, head["pruned"])
        first += style.special("reset", {"reason": start.reset, "seq": seq}, start.seq)
    yield retry + b"\n" + first if style.ends else first
    seen = told = cursor = start.seq
    written = time.monotonic()
    for frames, cursor in batches:
        chunk = joined(style.frame, tuple(frames)) if frames else b""
        told = frames[-1].seq if frames else told
        silent = time.monotonic() - written > QUIET_SECONDS
        if cursor - told >= (1 if silent or cursor == seen else CHECKPOINT_ROWS):
            chunk += style.special("checkpoint", {"seq": cursor}, cursor)
            told = cursor
        elif silent and not chunk:
            chunk = style.heartbeat
        seen = cursor
        if chunk:
            yield chunk
            written = time.monotonic()
    if cursor > told:
        yield style.special("checkpoint", {"seq": cursor}, cursor)
    if style.ends and ends():
        yield retry + b": come back later\n\n"


# ======================================================================================================
# transfer: a database as lines of JSON, and back
# ======================================================================================================

# An export is a line `export` that says of which log, the rows of workstreams and tasks, the log as the
# stream sends it (with the numbers of task and workstream at that moment), what else is in STATE, and `end`.
# Not in it: who is logged in.
#
# Into an empty database the import is exact: the same rows under the same numbers, so that every answer of
# the API, every replay of the stream (its id too) and the next export but for its first line are the same to
# the byte. Each request repeats the last event before it: as long as that is the end of the log here, the
# import goes on exactly, also after it was interrupted. Anywhere else what is not here yet, by its id, gets
# new numbers; of a workstream, task, run, check or pull request the newer state stays, and updates that are
# here stay as they are, unless they were redacted there.
EXPORT_FORMAT = 1
MAX_LINE = 8 * MAX_BODY
LINES_TYPE = "application/x-ndjson"
END_LINE = b'{"event":"end","data":{}}\n'
Line = namedtuple("Line", "where event data id task workstream", defaults=[None, None, None])  # of an export
LINE = fields("event=kind! data! id=count task=count workstream=count")
LINES = {  # what the data of a line must hold, by its event; of runs, checks ... the database itself says it
    event: fields(names)
    for events, names in json.loads(asset("templates", "export.json")).items()
    for event in events.split()
}


def export_lines(q: Queries, wanted: dict[str, Any]) -> Iterator[bytes]:
    """An export, line by line; of the log all, or only what came after a number or since a time."""
    head, first = q.head(), wanted.get("after_seq", 0)
    since = q.seq_before(wanted["since"]) if "since" in wanted else min(first, head["seq"])
    facts = {"format": EXPORT_FORMAT, "version": __version__, "stream": head["stream"], "head": head["seq"]}
    yield encode_line("export", facts | {"pruned": max(head["pruned"], since), "exported_at": timestamp()})
    yield from (encode_line(kind.table, row) for kind in KINDS.values() for row in q.state(kind.table))
    for seq, event, task, workstream, body in q.log(since):
        place = f'"task":{task or "null"},"workstream":{workstream}'
        yield f'{{"event":"{event}","id":{seq},"data":{body},{place}}}\n'.encode()
    yield from (encode_line(table, row) for table in STATE if table not in LINES for row in q.state(table))
    yield END_LINE


def read_line(raw: bytes, where: int) -> Line:
    """A line of an export, checked; Problem where it is none."""
    try:
        line = clean(parse_json(raw, MAX_DEPTH + 1), LINE)
        event, data = line["event"], line["data"]
        if (event not in LINES and event not in STATE) or (event == "export") != (where == 1):
            raise invalid(f"{event[:60]!r} is no event of an export, or does not belong here")
        if line.get("id") is None and event not in STATE and event not in ("export", "end"):
            raise invalid(f"{event} must have an id")
        kept = clean(data, LINES.get(event, LINES["*"]))
        if event not in LINES:
            kept = {name: each for name, each in data.items() if isinstance(each, str | int)} | kept
        firm = (*KINDS, "digest", *(data if event not in STATE else ()))  # never null
        given = [name for name in data if data[name] is not None or name in firm]
        odd = [name for name in given if name not in kept or data[name] != kept[name]]
        if odd and event != "export":  # that of a later version may say more
            raise invalid(f"{odd[0][:60]!r} is not as an export of {event} has it")
        return Line(where, **line)
    except Problem as problem:
        raise invalid(f"line {where}: {problem.message.replace('the body', 'it')}") from None


def read_header(raw: bytes) -> dict[str, Any]:
    """The first line of an export: of which log it is."""
    try:
        header = read_line(raw, 1).data
    except Problem:
        hint = "; it is compressed: gunzip it first" if raw.startswith(b"\x1f\x8b") else ""
        sentence = f"this is no export of Monitor{hint}; its first line is not what monitor export writes"
        raise invalid(sentence) from None
    if header["format"] != EXPORT_FORMAT:
        made = f"Monitor {header['version']} in format {header['format']}"
        raise invalid(f"this export was made by {made}, this one knows {EXPORT_FORMAT}: update Monitor")
    return header


def restore(t: Transaction, line: Line, head: int, task: Callable[[str], sqlite3.Row]) -> bool:
    """Take in a line exactly as it is; returns whether it was news."""
    if line.event in STATE:
        return t.take_row(line.event, line.data, line.data.get("seq"))
    if line.id is None:
        return t.advance(head)
    if line.id <= (t.frames[-1].seq if t.frames else t.head()["seq"]):
        return False
    if line.event == "update":
        must(line.data["seq"] == line.id, "it must have the seq of its id")
        t.put_update(task(line.data["task_id"])["number"], line.workstream, line.data, line.id)
    else:
        t.append(line.event, line.task, line.workstream, line.data, line.id)
    return True


def merge(t: Transaction, line: Line, gone: int, task: Callable[[str], sqlite3.Row]) -> bool:
    """Take in what a line tells that is not here yet (of updates up to `gone`: or was); whether it did."""
    data, kind = line.data, next((kind for kind in KINDS.values() if kind.table == line.event), None)
    if kind is not None:
        return t.merge_row(kind, data)
    if line.event in STATE:
        before = task(data["task"]) if "task" in data else None
        seq = t.update_seq(data["update_id"]) if data.get("update_id") else None
        news = line.event != "idempotency_keys" and t.take_row(line.event, data, seq)
        if news and before is not None:
            t.tell(before)
        return news
    seq = t.update_seq(data["id"]) if line.event in ("update", "update_redacted") else None
    if line.event == "update" and seq is None and line.id > gone:
        t.insert_update(task(data["task_id"]), data, data["timestamp"])
        return True
    if line.event == "update_redacted" and seq and "redacted_at" not in json.loads(t.update(seq)):
        t.redact_update(seq, data.get("redacted_at") or timestamp())
        return True
    return False


def import_lines(t: Transaction, header: dict[str, Any], lines: list[Line]) -> dict[str, Any]:
    """Take in lines of an export, all or none; returns how many were news, and whether all is exact."""
    head, (last, event, body) = t.head(), t.last_row()
    told = Counter(updates=0, changes=0, known=0)
    exact, same = head["seq"] == 0, head["stream"] == header["stream"]
    if exact:
        t.become(header["stream"], header["pruned"])
    task = functools.cache(lambda identity: t.one(TASK, identity))
    for line in lines:
        try:
            if same and (line.id, line.event) == (last, event):  # of an update the id counts: it may be wiped
                here = json.loads(body)
                exact = exact or here == line.data or (event == "update" and here["id"] == line.data["id"])
            gone = head["pruned"] if same else 0
            news = restore(t, line, header["head"], task) if exact else merge(t, line, gone, task)
        except (Problem, ValueError, sqlite3.IntegrityError, sqlite3.DataError) as error:
            raise invalid(f"line {line.where}: {error}") from None
        told[("updates" if line.event == "update" else "changes") if news else "known"] += 1
    return {**told, "exact": exact}


# ======================================================================================================
# monitor: the operations
# ======================================================================================================

SPOOL_SECONDS = 2


class Monitor:
    """Everything that API, pages, hooks and commands do. Answers are the JSON texts that are stored."""

    def __init__(self, config: Config):
        self.config = config
        self.broadcaster = Broadcaster()
        self.wrong_tries: deque[float] = deque()
        self._in_thread = thread_pool(2)
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
                if self.config.tended:
                    threading.Thread(target=self._tend, name="monitor-tender", daemon=True).start()

    def masked(self, value: Any) -> Any:
        """A value with what looks like a secret masked, unless that is not wanted."""
        return redact(value) if self.config.redact else value

    def masked_apart(self, payload: Any) -> Any:
        """The same for what may be large, in a thread: 25 MiB take 5 s, and the others must not wait."""
        return self._in_thread(self.masked, payload)

    def columns(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Cleaned fields as column values, masked; metadata is kept as text."""
        values = self.masked(fields)
        return values | ({"metadata": dump(values["metadata"])} if "metadata" in values else {})

    def close(self) -> None:
        """End the streams, finish the writes, close the database."""
        self.broadcaster.close()
        if self._store is not None:
            self._store.close()

    def create(self, kind: Kind, payload: Any, moment: str | None = None) -> str:
        """Make a workstream or task from its body. `moment` sets its time (a replay), here and below."""
        values, now = self.columns(clean(payload, kind.new)), moment or timestamp()

        def operation(t: Transaction) -> str:
            if kind is TASK:
                values["workstream"] = t.one(WORKSTREAM, values.pop("workstream_id"))["number"]
            t.add(kind, values, now)
            return t.frames[-1].body.decode()

        return self.store.write(operation)

    def change(self, kind: Kind, reference: str, payload: Any, moment: str | None = None) -> str:
        """Apply a body of changes; without any change all stays as it is and nothing is logged."""
        values, now = self.columns(clean(payload, kind.changes)), moment or timestamp()

        def operation(t: Transaction) -> str:
            row = t.one(kind, reference)
            changes = task_changes(t, row, values, now) if kind is TASK else values
            return t.change(kind, row["number"], changes, now) if changes else dump(kind.make(row))

        return self.store.write(operation)

    def add_update(
        self, fields: dict[str, Any], key: str | None = None, sent: Any = None, moment: str | None = None
    ) -> tuple[str, bool]:
        """Store an update (cleaned NEW_UPDATE fields); returns its JSON and whether it is new: with an
        idempotency key the same that was `sent` before is not."""
        sent = fields if sent is None else sent
        digest = hashlib.sha256(json.dumps(sent, sort_keys=True).encode()).digest() if key else b""
        fields = self.masked(fields)

        def operation(t: Transaction) -> tuple[str, bool]:
            now = timestamp()
            if earlier := t.seen_key(key, digest, now):
                return t.update(earlier["seq"]), False
            body = t.insert_update(t.one(TASK, fields["task_id"]), fields, moment or now)
            t.keep_key(key, digest, now, t.frames[-1].seq)
            return body, True

        return self.store.write(operation)

    def take_hook(self, hook: Hook, moment: str | None = None) -> None:
        """Take in a hook of an agent: find or make its task, store what is worth it, and note whether the
        run waits. Nothing comes of a hook that came before, or of a run that cannot be told from others."""
        if hook.agent == "update":
            return self.take_update(hook)
        payload = self.masked_apart(hook.payload)  # first: half a secret, cut off, looks like none
        facts = {"event": "", "cwd": ""} | session_facts(hook.agent, payload, hook.event)
        draft, place = agent_draft(hook.agent, payload, hook.event), None
        known = self.store.read_here(lambda q: q.session(hook.agent, facts.get("session_id")))
        if known is None or facts["event"] in ("SessionStart", "Stop", "SessionEnd"):
            place = self._in_thread(find_place, facts["cwd"])
        draft = draft._replace(data=kept_data(draft.data))
        if hook.time and isinstance(draft.data, dict):
            draft.data["occurred_at"] = hook.time
        facts["title"] = one_line(facts.get("prompt", ""), 80)
        sent = json.dumps([hook.agent, hook.event, hook.payload], sort_keys=True).encode()
        now, digest = moment or timestamp(), hashlib.sha256(sent).digest()
        heard = Heard(hook, facts, draft, place, digest, hook.time or now)
        self.store.write(lambda t: record_hook(t, heard, now))

    def take_update(self, hook: Hook) -> None:
        """Take in an update that may have waited in a spool, each once, and note when it happened."""
        given = hook.payload if isinstance(hook.payload, dict) else {}
        fields = self.masked_apart(clean(given | {"task_id": hook.task}, SPOOLED_UPDATE))
        if not fields.keys() & {"task_id", "name"}:
            raise invalid("task_id is missing", "task_id")
        if isinstance(fields.get("data"), dict):
            fields["data"]["occurred_at"] = hook.time
        place = self._in_thread(find_place, fields.get("folder", ""))
        self.store.write(lambda t: record_spooled(t, hook.key, fields, place, timestamp()))

    def take_webhook(
        self, payload: Any, headers: dict, named: str | None = None, moment: str | None = None
    ) -> tuple[str, int]:
        """Take in an event of GitHub: find its task (`named` refers to one), store it there if it is worth
        that, and bring up to date what the task shows. Returns the JSON that answers it, and the status."""
        payload = self.masked_apart(payload)
        draft = github_draft(payload, headers)
        keep = github_wanted(self.config.github_events, draft)
        draft = draft._replace(data=kept_data(draft.data), keep=keep)
        subject = github_subject(payload, draft)
        if draft.data.get("event") == "ping":
            return dump({"status": "ping", "message": draft.message}), 200
        return self.store.write(lambda t: record_webhook(t, draft, subject, named, moment or timestamp()))

    def take_spooled(self) -> None:
        """Take in what hooks on this machine kept while no server answered, oldest first."""
        for path in [path for folder in self.config.spools for path in spooled(folder)]:
            with contextlib.suppress(OSError):  # not ours to read; or its agent's next hook has sent it
                try:
                    self.take_hook(parse_spooled(Path(path).read_bytes()))
                except Problem as problem:
                    if problem.status >= 500:
                        return
                os.unlink(path)

    def move_run(self, fields: dict[str, Any]) -> str:
        """Give a run (its source), and its updates where asked for, to another task; returns that task."""
        agent, _, identity = fields["source"].partition(":")

        def operation(t: Transaction) -> str:
            run, new = t.session(agent, identity), t.one(TASK, fields["task_id"])
            if run is None:
                raise Problem("not_found", f"no run {fields['source']}", "source")
            if new["number"] != run["task"]:
                t.move_session(run, new, fields.get("updates", False))
            return dump(TASK.make(t.one(TASK, new["id"])))

        return self.store.write(operation)

    def link(self, fields: dict[str, Any]) -> str:
        """Bind a folder, branch, pull request ... to a task; returns the task."""
        fields = link_name(fields)

        def operation(t: Transaction) -> str:
            task = t.one(TASK, fields["task_id"])
            t.link(task["number"], fields)
            return dump(TASK.make(task))

        return self.store.write(operation)

    def unlink(self, fields: dict[str, Any]) -> dict[str, int]:
        """Unbind a folder, branch ...; returns how many were bound."""
        return {"removed": self.store.write(lambda t: t.unlink(link_name(fields)))}

    def _tend(self) -> None:
        """What is to be done from time to time: spooled hooks, runs that fell silent, retention."""
        for turn in itertools.count():
            try:
                self.take_spooled()
                if turn % 5 == 0:
                    before = shifted(timestamp(), -self.config.stuck_after.total_seconds())
                    self.store.write(lambda t, before=before: t.silence(before))
                if turn % 1800 == 0:
                    self._retain()
            except Problem:
                pass  # the database cannot be used now
            except Exception:  # whatever it is: the rest must go on
                sys.excepthook(*sys.exc_info())
            if self.broadcaster.closed:
                return
            time.sleep(SPOOL_SECONDS)

    def _retain(self) -> None:
        """Apply MONITOR_RETENTION."""
        for data_only, age in self.config.retention:
            before = shifted(timestamp(), -age.total_seconds())
            while not self.broadcaster.closed and self.prune(before, data_only)[1]:
                pass

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

    def export(self, wanted: dict[str, Any]) -> Iterator[bytes]:
        """An export in pieces; it ends early when the server shuts down, and its last line is not there."""
        pieces = self.store.pieces(lambda q: export_lines(q, wanted))
        return itertools.takewhile(lambda _: not self.broadcaster.closed, pieces)

    def take_export(self, raw: bytes, first: int) -> dict[str, Any]:
        """Take in a part of an export, that begins with the header and goes on at line `first`: all or none.
        What looks like a secret is masked; what was when it was stored stays to the byte."""

        def read(where: int, raw: bytes) -> Line:
            line = read_line(raw, where)
            return line._replace(data=self.masked(line.data)) if line.event in LINES else line

        head, *rest = raw.split(b"\n")
        header = read_header(head)
        lines = self._in_thread(lambda: [read(*each) for each in enumerate(rest, first) if each[1].strip()])
        return self.store.write(lambda t: import_lines(t, header, lines))

    def health(self) -> dict[str, Any]:
        """How the server is: database, writer, streams."""
        return {
            "status": "ok" if self.store.trouble is None else "degraded",
            "database": self.store.path,
            "writer": self.store.trouble or "ok",
            "streams": self.broadcaster.streams,
            "seq": self.store.read(lambda q: q.head()["seq"]),
            "version": __version__,
            "sqlite_version": sqlite3.sqlite_version,
        }


def record_hook(t: Transaction, heard: Heard, now: str) -> None:
    """Store a hook, in one transaction: the update, the run's state, what its task then shows."""
    if seen_before(t, heard):
        return
    run, task = find_run(t, heard)
    if task is None:
        return
    seq, draft = None, heard.draft
    if run is not None and folds(t.waiting(run), heard.facts["event"], draft, heard.moment):
        draft = draft._replace(keep=False, state=None)
    if draft.keep:
        t.insert_update(task, draft_fields(task["id"], draft), now)
        seq = t.frames[-1].seq
    if run is not None:
        note_run(t, run, heard._replace(draft=draft), seq)
        if changes := task_after(run, task, draft, heard.facts["title"], now):
            t.change(TASK, task["number"], changes, now)
        else:
            t.tell(task)


def record_spooled(t: Transaction, key: str | None, fields: dict, place: Place, now: str) -> None:
    """Store an update from a spool unless it came before: for its task, else for the one that updates of this
    source went to so far; at first that is a new one."""
    own = f"source\n{fields['source']}"  # senders' keys hold no line break
    if t.seen_key(key, b"", now):
        return
    task = fields.get("task_id")
    if task is None and (first := t.seen_key(own, b"", now)):
        task = json.loads(t.update(first["seq"]))["task_id"]
    row = t.one(TASK, task) if task else t.add_task(fields["name"], now, place.project, place.repository)
    t.insert_update(row, fields, now)
    for each in (key, own):
        t.keep_key(each, b"", now, t.frames[-1].seq)


def task_after(run: Any, task: Any, draft: Draft, title: str, now: str) -> dict[str, Any]:
    """What an event changes in its run's own task: the first prompt names it; one never used is hidden."""
    if task["name"] != provisional_name(run["agent"], run["project"]):
        return {}
    if draft.kind == "user_prompt" and title:
        return {"name": title, "hidden_at": None}
    return {"hidden_at": now} if draft.state == "ended" and run["state"] == "new" else {}


def seen_before(t: Transaction, heard: Heard) -> bool:
    """Whether it came before: by its key, its tool call, or as the same words seconds ago. Remembers it."""
    hook, facts, moment = heard.hook, heard.facts, heard.moment
    call = facts.get("tool_use_id")
    if t.seen_key(hook.key, heard.digest, moment):
        return True
    # Senders' keys are printable: this one cannot be theirs.
    word = call or heard.digest.hex()
    own = "\n".join(["hook", hook.agent, facts.get("session_id", ""), facts["event"], word])
    seen, run = t.seen_key(own, b"", moment), t.session(hook.agent, facts.get("session_id"))
    again = seen is not None
    if again and not call:  # the same words: unless it is long ago, or the run has said something since
        early, late = shifted(moment, -TWICE_SECONDS), shifted(moment, TWICE_SECONDS)
        again = early < seen["created_at"] < late and (not run or run["seen_at"] <= seen["created_at"])
    if not again:
        t.keep_key(own, b"", moment, None)
    t.keep_key(hook.key, heard.digest, moment, None)
    return again


def find_run(t: Transaction, heard: Heard) -> tuple[sqlite3.Row | None, sqlite3.Row | None]:
    """The run that a hook is from, and its task. A run is made at its first word, with the first task that
    fits: named by its environment; of the run that it continues; bound to its branch or folder; else a new
    one. Without a session's id nobody can tell it from others: then only a named task counts."""
    hook, facts = heard.hook, heard.facts
    identity, named = facts.get("session_id"), None
    if hook.task:
        with contextlib.suppress(Problem):
            named = t.find(TASK, FIELDS["task_id"].check(hook.task, "task_id"))
    run = t.session(hook.agent, identity)
    if run is not None and named is not None and hook.task != run["asked"]:
        t.save("sessions", dict(run) | {"asked": hook.task})
        t.move_session(run, named, updates=False)
    elif run is None and identity and (named or heard.draft.keep):
        number = named["number"] if named else task_of_run(t, heard)
        values = {"agent": hook.agent, "id": identity, "task": number, "asked": hook.task if named else None}
        values |= {"model": facts.get("model"), "folder": facts["cwd"], **heard.place._asdict()}
        times = dict.fromkeys(("started_at", "seen_at", "heard_at", "since"), heard.moment)
        t.save("sessions", values | times)
    run = t.session(hook.agent, identity)
    return run, t.one(TASK, str(run["task"])) if run else named


def task_of_run(t: Transaction, heard: Heard) -> int:
    """The number of the task that a new run goes on with: after a clear or fork that of the run before it,
    else one bound to where it works, else a new one in its repository's workstream."""
    agent, facts, place, moment = heard.hook.agent, heard.facts, heard.place, heard.moment
    if facts["event"] == "SessionStart" and facts.get("source") in ("clear", "fork"):
        since, cleared = shifted(moment, -FOLLOW_SECONDS), facts["source"] == "clear"
        before = t.run_before(agent, facts["cwd"], since, cleared)
        if before is not None:
            t.save("sessions", dict(before) | {"state": "replaced"})
            return before["task"]
    title = facts["title"] if heard.draft.kind == "user_prompt" else ""
    name = title or provisional_name(agent, place.project)
    linked = t.linked_task(facts["cwd"], place)
    return (linked or t.add_task(name, moment, place.project, place.repository))["number"]


def provisional_name(agent: str, project: str) -> str:
    """The name of a run's task until its first prompt."""
    name = PurePath(project.replace("\\", "/")).name
    return f"{AGENTS[agent]} in {name}" if name else AGENTS[agent]


def note_run(t: Transaction, run: sqlite3.Row, heard: Heard, seq: int | None) -> None:
    """Bring a run up to date after an event; what a subagent asks stands in a row of its own."""
    _, facts, draft, place, _, moment = heard
    state, subagent = settled(run, heard), facts.get("agent_id")
    told = {"state": state, "message": draft.message, "since": moment, "seq": seq}
    told["tool"] = facts.get("tool_name")
    changes = {"seen_at": max(moment, run["seen_at"]), "model": facts.get("model") or run["model"]}
    late = late_for(run, moment)
    if not subagent and not late:
        changes |= {"heard_at": max(moment, run["heard_at"]), "folder": facts["cwd"] or run["folder"]}
    if place and place.project == run["project"]:
        changes["branch"] = place.branch
    if not late and (subagent or facts["event"] in ("UserPromptSubmit", "Stop", "SessionEnd")):
        t.end_subagents(run["agent"], run["id"], subagent)
    if subagent and draft.state == "blocked":
        if not late and run["state"] not in ("ended", "replaced"):
            t.save("sessions", dict(run) | told | {"subagent": subagent, "state": "blocked"})
    elif state and not state == run["state"] == "working":
        changes |= told
    elif seq and run["state"] == "working":
        changes["seq"] = seq
    t.save("sessions", dict(run) | changes)


def link_name(fields: dict[str, Any]) -> dict[str, Any]:
    """A link as events name it: the path of a folder absolute, without a slash at its end; the repository
    apart, where it is said with the value: owner/name#12, or a page's address."""
    kind, value = fields["link"], fields["value"]
    form, sentence = FIELDS["value"].schema["x-forms"][kind]
    said = re.search(form, value)
    if not said:
        raise invalid(f"value must be {sentence}", "value")
    if kind in ("pr", "issue", "commit"):
        repository, *named = said.groups()
        fields |= {"repository": repository} if repository else {}
        value = next(filter(None, named))
    value = (value.rstrip("/\\") or "/") if kind == "folder" else value
    value = said[1] if kind == "repo" else value.removeprefix("refs/heads/") if kind == "branch" else value
    return fields | {"value": value.lower() if kind in ("commit", "repo") else value}


def route(t: Transaction, subject: Subject, named: str | None) -> tuple[sqlite3.Row | None, str, bool]:
    """The task that an event belongs to, what led there, and whether a link says to close it on a merge."""
    found = [(f"link:{link[0]}", row) for link in subject.links for row in t.linked(*link)]
    found.sort(key=lambda each: each[1]["learnt"])  # what a person set comes first
    runs = [("run", *place) for kind, *place in subject.links if kind == "branch"]
    found += [("run", row) for link in runs for row in t.linked(*link)]
    found += [("fixes", row) for link in subject.fixes for row in t.linked(*link)]
    name = subject.repository.lower()
    found += [(kind, row) for kind in ("repo", "inbox") for row in t.linked(kind, name, "")]
    keyed = ((how, t.keyed_task(key)) for how, key in subject.keys)
    linked = ((how, t.one(TASK, str(row["task"]))) for how, row in found)
    fits = (each for each in itertools.chain(keyed, linked) if each[1] is not None)
    how, task = next(fits, ("inbox", None))
    if named:
        with contextlib.suppress(Problem):  # what can name nothing is not found, as in a path
            named = FIELDS["task_id"].check(named, "task_id")
        how, task = "task_id", t.one(TASK, named)
    closing = {row["task"] for _, row in found if row["close_on_merge"]}
    return task, how, task is not None and task["number"] in closing


def inbox_of(t: Transaction, repository: str, now: str) -> sqlite3.Row:
    """A new task for the events of a repository that belong to no other."""
    task = t.add_task(f"GitHub inbox: {repository or 'no repository'}", now, repository, repository)
    t.link(task["number"], {"link": "inbox", "value": repository.lower()})
    return task


def record_webhook(t, draft: Draft, subject: Subject, named: str | None, now: str) -> tuple[str, int]:
    """Store an event of GitHub, in one transaction: the update, links learnt from it, what the task shows."""
    task, how, closes = route(t, subject, named)
    status, body, seq = 200, dump({"status": "dropped", "message": draft.message}), None
    if draft.keep:
        task = task if task is not None else inbox_of(t, subject.repository, now)
        # Not by the delivery alone: several hooks for one event share it. Senders' keys hold no line break.
        delivery = draft.data.get("delivery")
        key = f"github\n{delivery}\n{task['number']}" if delivery else None
        if seen := t.seen_key(key, b"", now):
            return t.update(seen["seq"]), 200
        told = draft._replace(data=draft.data | {"routed_by": how})
        body = t.insert_update(task, draft_fields(task["id"], told), now)
        status = 202 if how == "inbox" else 200
        seq = t.frames[-1].seq
        t.keep_key(key, b"", now, seq)
    if task is not None:
        for kind, value, place in subject.learnt * (how not in ("repo", "inbox")):
            t.link(task["number"], {"link": kind, "value": value, "repository": place, "learnt": True})
        merged = draft.data.get("action") == "closed" and draft.data.get("merged") is True
        show_state(t, task, subject, closes and merged, seq, now)
    return body, status


def show_state(t: Transaction, task: sqlite3.Row, subject: Subject, closes: bool, seq: int | None, now: str):
    """Bring a task's checks and pull requests up to date; log every task that then shows others."""
    place = {"task": task["number"], "repository": subject.repository.lower(), "branch": subject.branch}
    others = t.showing(place, subject.pull and subject.pull["number"])
    before = [t.one(TASK, str(number)) for number in {task["number"], *others}]
    for name, facts in (("check_events", subject.check), ("pull_events", subject.pull)):
        if facts:
            t.put(name, facts | place | {"seq": seq, "now": now})
    if closes and task["status"] in ("active", "blocked"):
        t.change(TASK, task["number"], {"status": "done"}, now)
        before = [row for row in before if row["number"] != task["number"]]
    for row in before:
        t.tell(row)


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
    return draft._asdict() | {"task_id": task_id, "tags": list(draft.tags)}


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


def cookie_name() -> str:
    """Cookies know no port: without it in the name, servers on one host would share their sessions."""
    return f"monitor_session_{flask.request.environ.get('SERVER_PORT', '')}"


def logged_in() -> bool:
    """Whether the request has a browser session that goes on and whose token is still one of ours."""
    cookie, served = flask.request.cookies.get(cookie_name(), ""), monitor()
    found = re.fullmatch(r"(([0-9]{1,12})\.[0-9a-f]{16})\.([0-9a-f]{64})", cookie, re.ASCII)
    if not found or int(found[2]) < time.time() or not served.config.tokens:
        return False
    head, ended = served.store.read_here(lambda q: (q.head(), q.session_ended(cookie)))
    signatures = [sign(head["secret"], token, found[1].encode()) for token in served.config.tokens]
    return not ended and any(hmac.compare_digest(found[3], known) for known in signatures)


def session_watch() -> Callable[[], bool]:
    """What tells, later on, whether the browser session that a stream was opened in has been ended. Where it
    was over before, something else lets the stream in."""
    if not logged_in():
        return lambda: False
    cookie, served = flask.request.cookies[cookie_name()], monitor()
    return lambda: served.store.read_here(lambda q: q.session_ended(cookie))


def bearer_token() -> bytes:
    """The token that the request brings: in the usual header, or beside the subprotocol of a WebSocket, for
    which a browser sets no other."""
    scheme, _, token = flask.request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip().encode("latin-1", "replace")
    found = re.search(r"\bbearer\.([A-Za-z0-9_-]+)", flask.request.headers.get("Sec-WebSocket-Protocol", ""))
    with contextlib.suppress(ValueError):
        return base64.urlsafe_b64decode(found[1] + "==") if found else b""
    return b""


def signed(secrets_: tuple[bytes, ...], signature: str, *bodies: bytes) -> bool:
    """Whether one of the bodies has the signature of one of the secrets (X-Hub-Signature-256)."""
    given = signature.encode("utf-8", "replace")
    made = [hmac.new(each, body, hashlib.sha256).hexdigest() for each in secrets_ for body in bodies]
    return any(hmac.compare_digest(given, b"sha256=" + known.encode()) for known in made)


def token_needed(config: Config, method: str, path: str, full: Any = None) -> bool:
    """Whether a request needs a token or a session."""
    if path == "/api/webhooks/github" and config.github_secrets:
        return False  # its signature stands for the token
    if (path == "/health" and not full) or path == "/login" or path.startswith("/static/"):
        return False
    if config.auth_mode == "strict" and not config.tokens:
        raise misconfigured("strict mode needs tokens: set MONITOR_API_TOKENS")
    writes = method not in SAFE_METHODS and path != "/mcp"  # there the tools that write look
    closed = writes or path.startswith("/api/admin/") or config.auth_mode == "strict"
    return bool(config.tokens) and closed


def authorised() -> bool:
    """Whether the current request brings a valid token, or a session; without tokens of ours each does."""
    tokens = monitor().config.tokens
    return not tokens or bool(match_token(bearer_token(), tokens)) or logged_in()


def guard():
    """Refuse a request that may not be answered, before anything else looks at it."""
    request, config = flask.request, monitor().config
    host = request.environ.get("HTTP_HOST")
    if not host_allowed(host, config):
        raise Problem("forbidden", "this server does not answer to that host name; see MONITOR_ALLOWED_HOSTS")
    if foreign_site(request.environ, host, request.method in SAFE_METHODS):
        raise Problem("forbidden", "requests from another web site are refused")
    if UNSTORABLE.search(request.query_string.decode("utf-8", "surrogateescape")):
        raise invalid("the query is not UTF-8 text")  # Werkzeug decodes it without asking
    if not token_needed(config, request.method, request.path, request.args.get("full")) or authorised():
        return None
    if wants_page() and request.method in SAFE_METHODS:
        return flask.redirect("/login?next=" + quoted(request.full_path.rstrip("?")), 303)
    raise Problem("unauthorized", "a valid token is needed: Authorization: Bearer TOKEN, or log in at /login")


# ======================================================================================================
# schema: the routes as an OpenAPI document, made from the tables that check what they are given
# ======================================================================================================

# What no table knows stands in templates/openapi.json, by route, as OpenAPI has it: what it is for, answers,
# headers, a body that is no JSON object of fields. Pages are not described: they are for people, and change.


class Route(NamedTuple):
    """A row of ROUTES: what answers a request, and the tables that check its body and query before."""

    method: str
    rule: str
    handler: Callable
    body: Fields | None = None
    query: Fields | None = None
    limit: int = MAX_BODY  # of its body, in bytes


def component(name: str, kind: str = "schemas") -> dict[str, str]:
    """A reference to a part of the document that has a name."""
    return {"$ref": f"#/components/{kind}/{name}"}


# A text without NUL; one of more than blanks, on which Python and ECMAScript do not agree.
TEXTS = (r"^[^\x00]*$", r"^[^\x00]*(?:[^\x00\s\x1c-\x1f\x85]|\ufeff)[^\x00]*$")


def text_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """What read_text takes."""
    return {"pattern": TEXTS["minLength" in schema]} | schema


SCHEMA_OF = {  # by the kind of a field: what its reader takes, as JSON Schema
    "any": lambda schema: schema if schema.get("type") == "string" else component("Any") | schema,
    "choice": lambda schema: {"type": "string"} | schema,
    "number": lambda schema: {"type": "integer"} if clamped(schema) else schema,
    "reference": lambda schema: schema | {"pattern": f"^(?:{RUN_REFERENCE}|{REFERENCE})$"},
    "tags": lambda schema: schema | {"items": text_schema(schema["items"])},
    "text": text_schema,
    "words": lambda schema: {"type": "array", "items": {"enum": schema["x-words"]}, "minItems": 1},
}


def property_schema(field: Field) -> dict[str, Any]:
    """A field of a JSON body: null is as good as absent."""
    schema = SCHEMA_OF.get(field.kind, dict)(field.schema) | {"description": field.text}
    if field.required:
        return schema if "type" in schema else schema | {"not": {"type": "null"}}
    nullable = {"type": [schema["type"], "null"]} if "type" in schema else {}
    return schema | nullable | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})


def body_schema(table: Fields) -> dict[str, Any]:
    """The JSON object that a table takes. What it does not know is ignored, if it could be kept."""
    found = {
        "type": "object",
        "properties": {name: property_schema(field) for name, field in table.items()},
        "required": [name for name, field in table.items() if field.required],
        "additionalProperties": component("Any"),
        "propertyNames": text_schema({}),
    }
    forms = [pair for field in table.values() for pair in field.schema.get("x-forms", {}).items()]
    pairs = [{"link": {"const": kind}, "value": {"pattern": form}} for kind, (form, _) in forms]
    return found | ({"anyOf": [{"properties": pair} for pair in pairs]} if pairs else {})


def parameter(place: str, name: str, field: Field) -> dict[str, Any]:
    """A field of a path or query."""
    found = {"name": name.replace("reference", "id"), "in": place, "description": field.text}
    found |= {"required": place == "path", "schema": SCHEMA_OF.get(field.kind, dict)(field.schema)}
    return found | ({"style": "form", "explode": False} if field.kind == "words" else {})


def operation(route: Route, row: dict[str, Any], about: dict[str, Any], config: Config) -> dict[str, Any]:
    """One route of the API: its row in the file, and what its tables and the settings add."""
    known = PATH | ({"reference": FIELDS["workstream_id"]} if "/workstreams/" in route.rule else {})
    placed = [("path", *each) for each in known.items() if f"{each[0]}>" in route.rule]
    placed += [("query", *each) for each in (route.query or {}).items()]
    row["operationId"] = re.sub(r"\W+", "_", route.method.lower() + route.rule).strip("_")
    row["parameters"] = [parameter(*each) for each in placed] + row.get("parameters", [])
    open_to_all = [] if token_needed(config, route.method, route.rule) else [{}]
    row["security"] = [*open_to_all, {"bearer": []}, {"cookie": []}]
    table = route.body or {}
    if table:
        names = [name for name, field in table.items() if field.required] or [*table][:1]
        example = row.pop("x-example", None) or {name: about["examples"][name] for name in names}
        content = {"application/json": {"schema": body_schema(table), "example": example}}
        row["requestBody"] = {"required": True, "content": content}
    if "requestBody" in row:
        row["requestBody"]["description"] = f"At most {route.limit // 1024**2} MiB."
    named = "reference" in [field.kind for field in (*table.values(), *(field for *_, field in placed))]
    errors = [400, 401, 403, 500, 503] + [408, 413] * ("requestBody" in row) + [415] * bool(table)
    errors += [404] * ("<" in route.rule or bool(named and table)) + [409] * named
    problems = {str(code): component(f"Problem{code}", "responses") for code in errors}
    row["responses"] = dict(sorted((problems | row["responses"]).items()))
    return row


def openapi(routes: Iterable[Route], config: Config, cookie: str) -> dict[str, Any]:
    """The OpenAPI document of this server: its settings say where a token is needed."""
    about = json.loads(asset("templates", "openapi.json"))
    found, parts = about["document"], about["document"]["components"]
    found["info"]["version"] = __version__
    found["x-limits"] = {"body": MAX_BODY, "webhook": MAX_WEBHOOK, "depth": MAX_DEPTH, "integer": MAX_INTEGER}
    parts["securitySchemes"]["cookie"]["name"] = cookie
    parts["schemas"]["Error"]["properties"]["error"]["enum"] = [*STATUS_OF]
    for route in routes:
        if row := about["routes"].get(f"{route.method} {route.rule}"):
            path = re.sub("<([a-z]+:)?([a-z]+)>", r"{\2}", route.rule).replace("{reference}", "{id}")
            found["paths"].setdefault(path, {})[route.method.lower()] = operation(route, row, about, config)
    for status, codes in itertools.groupby(STATUS_OF, STATUS_OF.get):
        told = {code: f"`{code}`: {about['errors'][code]}" for code in codes}
        error = {"schema": component("Error") | {"properties": {"error": {"enum": [*told]}}}}
        problem = {"description": " ".join(told.values()), "content": {"application/json": error}}
        parts["responses"][f"Problem{status}"] = problem
    return found


# ======================================================================================================
# socket: the WebSocket: several subscriptions, and updates, over one connection
# ======================================================================================================

SUBPROTOCOL = "monitor.v1"
SWITCHING = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
SWITCHING += "Sec-WebSocket-Accept: {}\r\n{}\r\n"
PING_FRAME = b"\x89\0"
PING_SECONDS = 25
CLOSE_SECONDS = 1  # what the other side has to answer a close
MAX_SUBSCRIPTIONS = 64  # of one socket
NOTHING = Filter(task=0)
FULL = "there are too many streams, or the server is shutting down; come back later"


def text_frame(*parts: Any) -> bytes:
    """A text message as one frame. Not by wsproto, whose frames belong to one connection: all readers at the
    tail share these."""
    size = sum(map(len, parts))
    head = (size,) if size < 126 else (126, *size.to_bytes(2)) if size < 65536 else (127, *size.to_bytes(8))
    return b"".join((bytes((0x81, *head)), *parts))


@functools.lru_cache(maxsize=64)
def socket_style(sub: str) -> StreamFormat:
    """How the stream of a subscription is written: the lines of NDJSON, each in a frame, with its name."""
    name = b'{"sub":%s,' % dump(sub).encode()

    def named(encode: Callable[..., bytes]) -> Callable[..., bytes]:
        return lambda *told: text_frame(name, memoryview(encode(*told))[1:-1])  # a copy less of a megabyte

    return StreamFormat("", named(encode_line), named(frame_line), b"", False)


def size_limit():
    """An extension of wsproto that refuses a message for what its frames declare, before that comes.
    Fragments count 64 bytes more: empty ones must not go on for ever."""
    from wsproto.extensions import Extension
    from wsproto.frame_protocol import CloseReason, RsvBits

    class SizeLimit(Extension):
        size, offer, enabled = 0, None, staticmethod(lambda: True)

        def frame_inbound_header(self, proto, opcode, rsv, payload_length):
            too_large = not opcode.iscontrol() and self.size + payload_length > MAX_BODY
            return CloseReason.MESSAGE_TOO_BIG if too_large else RsvBits(False, False, False)

        def frame_inbound_complete(self, proto, fin):
            if not proto.header.opcode.iscontrol():
                self.size = 0 if fin else self.size + proto.header.payload_len + 64

    return SizeLimit()


class Socket:
    """One WebSocket. A thread reads and answers, one pings, one for each subscription follows the log. Who
    writes waits for its turn: an answer comes after at most one batch (a MiB) of each subscription, however
    far behind that is. A peer that takes nothing at all is cut by the kernel's time-out."""

    def __init__(self, served: Monitor, connection: tuple, may_write: bool, ended: Callable[[], bool]):
        from wsproto.connection import Connection, ConnectionType

        self._served, (self._connection, self._reader) = served, connection
        self._may_write, self._ended = may_write, ended
        self._protocol = Connection(ConnectionType.SERVER, [size_limit()])
        self._turn = threading.Lock()
        self._subscriptions: dict[str, threading.Thread] = {}
        self._pieces: list[str] = []  # of a message
        self._pings = 0  # since the last sign of life
        self._broken = False
        self._end = math.inf  # when a closed one is cut

    def serve(self, accepted: bytes) -> None:
        """Answer the handshake, then take what comes until either side closes."""
        with contextlib.suppress(OSError):  # the other side is gone
            self._connection.settimeout(None)
            self._connection.sendall(accepted)
            threading.Thread(target=self._keep, daemon=True).start()
            while time.monotonic() < self._end and self._receive(self._reader.read1(16384)):
                self._pings = 0
                time.sleep(0)  # whoever sends without a pause must not keep the others waiting
        self._subscriptions.clear()
        self._cut()

    def close(self, code: int, reason: str | None = None) -> None:
        """Say that it is over, and wait a moment for the other side to say so too."""
        from wsproto.events import CloseConnection

        with self._turn, contextlib.suppress(OSError):
            if self._end == math.inf:
                self._end = time.monotonic() + CLOSE_SECONDS
                threading.Thread(target=self._cut, args=[CLOSE_SECONDS], daemon=True).start()
                self._connection.sendall(self._protocol.send(CloseConnection(code, reason)))
                self._connection.shutdown(1)  # nothing more is sent

    def _cut(self, seconds: float = 0) -> None:
        time.sleep(seconds)
        self._end = 0
        with contextlib.suppress(OSError):
            self._connection.shutdown(2)  # both ways: whoever waits for it wakes up

    def _send(self, data: bytes, sub: str | None = None) -> None:
        """Write whole frames; those of a subscription only while it goes on."""
        with self._turn:
            if self._end == math.inf and (sub is None or self._goes_on(sub)):
                self._connection.sendall(data)
        time.sleep(0)  # who waits for the turn gets it

    def _goes_on(self, sub: str) -> bool:
        return self._subscriptions.get(sub) is threading.current_thread()

    def _keep(self) -> None:
        """Ping the other side, and close where it is dead, its session has ended, or the server ends."""
        broadcaster, pinged = self._served.broadcaster, time.monotonic()
        try:
            while self._end == math.inf:
                broadcaster.wait(broadcaster.head, NOTHING)
                if broadcaster.closed:
                    self.close(3001, "the server is shutting down")
                elif self._ended():
                    self.close(3502, "the session has ended")
                elif time.monotonic() - pinged < PING_SECONDS:
                    continue
                elif self._pings >= 2:
                    self._cut()
                else:
                    self._pings, pinged = self._pings + 1, time.monotonic()
                    self._send(PING_FRAME)
        except (OSError, Problem):
            self._cut()

    def _receive(self, data: bytes) -> bool:
        """Take in frames; False when all is said. What breaks the rules comes from wsproto as a close with
        its code, and what follows that is not looked at."""
        if not self._broken:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                self._take(event)
        return bool(data) and self._protocol.state.name != "CLOSED"

    def _take(self, event: Any) -> None:
        from wsproto import events

        match event:
            case events.CloseConnection():
                self.close(event.code, event.reason)
                self._broken = self._protocol.state.name == "LOCAL_CLOSING"
            case _ if self._end < math.inf:
                pass
            case events.Ping():
                self._send(self._protocol.send(event.response()))
            case events.BytesMessage():
                self.close(1003, "messages are JSON in text frames")
            case events.TextMessage():
                self._pieces.append(event.data)
                if event.message_finished:
                    text, self._pieces = "".join(self._pieces), []
                    self._answer(text)

    def _answer(self, text: str) -> None:
        """Do what a message asks for, and tell how it went; to what is no object nothing can be told."""
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            return self.close(3501, "a message must be a JSON object")
        name = message.get("id") if isinstance(message.get("id"), (str, int)) else None
        try:
            message = parse_json(text.encode())
            operation = clean(message, SOCKET_OPERATION)["op"]
            done = getattr(self, operation)(**clean(message, SOCKET_FIELDS[operation]))
            told = '"ok":' + (done or "true")
        except Problem as problem:
            told = '"error":' + dump(problem.body())
        try:
            self._send(text_frame(f'{{"id":{dump(name)},{told}}}'.encode()))
        finally:  # what was counted must run, to be counted out
            for thread in self._subscriptions.values():
                thread.ident or thread.start()
        return None

    def subscribe(self, sub: str, after: Any = None, stream: Any = None, filter: Any = None) -> None:
        """Follow the log from a cursor on, else from now on."""
        if sub in self._subscriptions:
            raise Problem("conflict", f"sub {sub!r} is there already: unsubscribe it first", "sub")
        if len(self._subscriptions) >= MAX_SUBSCRIPTIONS:
            raise Problem("too_many_requests", f"one socket has at most {MAX_SUBSCRIPTIONS} subscriptions")
        for name in set(filter or {}) - set(STREAM_FILTER):
            raise invalid(f"filter must not have {name[:60]!r}: there is no such filter", "filter")
        wanted = clean(filter or {}, STREAM_FILTER)
        head, chosen = self._served.store.read_here(lambda q: (q.head(), q.filter(wanted)))
        start = place_cursor(None if after in (None, "") else str(after), stream, head)
        if not self._served.broadcaster.join():
            raise Problem("unavailable", FULL)
        follower = threading.Thread(target=self._follow, args=(sub, start, head, chosen), daemon=True)
        self._subscriptions[sub] = follower  # begins when this is acknowledged

    def _follow(self, sub: str, start: Cursor, head: sqlite3.Row, chosen: Filter) -> None:
        broadcaster = self._served.broadcaster
        batches = follow(self._served.store, broadcaster, start.seq, chosen, False)
        batches = itertools.takewhile(lambda _: self._goes_on(sub) and not self._ended(), batches)
        try:
            for chunk in stream_bytes(socket_style(sub), start, head, batches):
                self._send(chunk, sub)
                self._pings = 0  # what is taken is a sign of life, too: a slow peer sees a ping late
        except (OSError, Problem):
            self._cut()
        finally:
            broadcaster.leave()

    def unsubscribe(self, sub: str) -> None:
        """End a subscription: nothing of it comes once this is acknowledged."""
        if self._subscriptions.pop(sub, None) is None:
            raise Problem("not_found", f"there is no sub {sub!r}", "sub")

    def update(self, update: dict[str, Any], key: str | None = None) -> str:
        """Store an update, as POST /api/updates does."""
        if not self._may_write or self._ended():
            raise Problem("unauthorized", "the socket was opened without a valid token or session")
        posted = clean(update, NEW_UPDATE)
        return self._served.add_update(posted, check_key(key), posted)[0]

    def ping(self) -> None:
        """Nothing but an answer: a browser's script does not see the protocol's own pings."""


def accept_handshake() -> bytes:
    """The answer to the handshake of a WebSocket; Problem where it is none, or not one of ours."""
    from wsproto.utilities import generate_accept_token

    request, headers = flask.request, flask.request.headers
    upgrade = request.method == "GET" and request.url_rule.websocket
    if not upgrade or headers.get("Sec-WebSocket-Version") != "13":
        raise Problem("upgrade_required", "this is a WebSocket, of version 13")
    key, offered = headers.get("Sec-WebSocket-Key", ""), split_list(headers.get("Sec-WebSocket-Protocol", ""))
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key):
        raise invalid("Sec-WebSocket-Key must be 16 bytes in base64")
    if offered and SUBPROTOCOL not in offered:
        raise invalid(f"Sec-WebSocket-Protocol must offer {SUBPROTOCOL}")
    if request.content_length or "Transfer-Encoding" in headers:
        raise invalid("a handshake has no body")  # it would be taken for frames
    chosen = f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n" if offered else ""
    return SWITCHING.format(generate_accept_token(key.encode()).decode(), chosen).encode()


def open_socket():
    """Take the connection over as a WebSocket. What is wrong is told before that, as to any request."""
    served, environ, accepted = monitor(), flask.request.environ, accept_handshake()
    connection = environ.get("monitor.connection") or (environ["werkzeug.socket"], environ["wsgi.input"])
    socket = Socket(served, connection, authorised(), session_watch())
    if not served.broadcaster.join():
        raise Problem("unavailable", FULL)

    def run() -> None:
        try:
            socket.serve(accepted)
        finally:
            served.broadcaster.leave()
        raise ConnectionResetError(errno.ECONNRESET, "over")  # what servers take to mean: answer no more

    response = flask.Response(status=101)
    response.get_app_iter = lambda environ: iter(run, None)  # runs when the request's context is gone
    return response


# ======================================================================================================
# web: the API and the stream
# ======================================================================================================

PAGE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self' data:; script-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}
LAST_ANSWER = {"Connection": "close"}
ERROR_HEADERS = {503: {"Retry-After": "2"}, 408: LAST_ANSWER, 413: LAST_ANSWER}
ERROR_HEADERS |= {426: {"Upgrade": "websocket", "Sec-WebSocket-Version": "13"}}
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}
COMPRESSED = ("text/html", *MEDIA_TYPES.values())
PAGE_ROWS = 100
FILE_ROWS = 10_000  # of a download: the newest
LANES, LANE_ROWS = 6, 20
HOUR, DAY = (300, 12), (3600, 24)  # of strips: seconds of a span, and how many
DASHBOARD_ROWS = 200  # shared by its groups
TASK_FILTER = "group status workstream_id attention source q include_hidden include_archived all"
THREAD_FILTER = "before_seq around seen level source kind tag q task_id workstream_id layout pin fixed"
FILE_TYPES = {"md": "text/markdown", "json": "application/json", "ndjson": LINES_TYPE}
TOOL_KINDS = ("tool_use", "tool_failure", "file_change")
OPEN = ("active", "blocked")  # the states of tasks that are not over


def answer(text: str, status: int = 200):
    """A JSON text as a response."""
    return flask.Response(text, status, content_type="application/json")


def items(texts: list[str], total: int | None):
    """A List response of JSON texts, joined as they are stored (building dicts costs 17 times as much)."""
    count = "" if total is None else f',"total":{total}'
    return answer(f'{{"items":[{",".join(texts)}]{count}}}')


def read_body(limit: int = MAX_BODY) -> bytes:
    """The request's body; Problem (too_large, timed_out, invalid_input)."""
    request = flask.request
    if isinstance(request.environ["wsgi.input"], io.RawIOBase):
        # Werkzeug's decoder of chunks reports more than it read: RawIOBase.read would copy memory behind it.
        request.environ["wsgi.input"] = io.BufferedReader(request.environ["wsgi.input"])
    request.max_content_length = limit + 1  # at its own limit Werkzeug cuts chunks off without a word
    if (request.content_length or 0) > limit or len(raw := request.get_data(cache=False)) > limit:
        flask.abort(413)
    return raw


def json_bytes(limit: int = MAX_BODY) -> bytes:
    """The request's body. Its media type must be JSON: a foreign page cannot send it without being asked."""
    if not flask.request.is_json:
        raise Problem("unsupported_media_type", "the body must be JSON: Content-Type: application/json")
    return read_body(limit)


def json_body(limit: int = MAX_BODY) -> Any:
    """The request's JSON."""
    return parse_json(json_bytes(limit))


def query(fields: Fields, blanks: bool = True) -> dict[str, Any]:
    """The request's query, checked by its field table; tags may come several times. A page's form sends
    what was not filled in, too: `blanks` are left out then."""
    args = flask.request.args
    given = {name: QueryText(args[name]) for name in fields if name in args and (blanks or args[name])}
    return clean(given | ({"tag": args.getlist("tag")} if "tag" in given else {}), fields)


def respond(route: Route, **named: Any):
    """Answer a request: the handler of its route is given what the path names (what can name nothing is not
    found), and what the route's tables have checked."""
    for name in PATH.keys() & named:
        try:
            named[name] = PATH[name].check(named[name], "id" if name == "reference" else name)
        except Problem as problem:
            raise Problem("not_found", f"{problem.message}; it is {named[name][:60]!r}") from None
    if route.query is not None:
        named["wanted"] = query(route.query)
    if route.body is not None:
        named["posted"] = clean(json_body(route.limit), route.body)
    return route.handler(**named)


def health(wanted: dict[str, Any]):
    """Whether the server answers; with full=1, how it is."""
    return answer(dump(monitor().health() if wanted.get("full") else {"status": "ok"}))


def list_all(read: Callable[..., list[dict[str, Any]]], wanted: dict[str, Any]):
    """The objects that the query asks for."""
    found = monitor().store.read(lambda q: read(q, wanted))
    return items([dump(each) for each in found], len(found))


def make_one(kind: Kind, posted: dict[str, Any]):
    """Make a workstream or task."""
    return answer(monitor().create(kind, posted), 201)


def change_one(kind: Kind, reference: str, posted: dict[str, Any]):
    """Change a workstream or task."""
    return answer(monitor().change(kind, reference, posted))


def show_one(kind: Kind, reference: str):
    """One workstream or task."""
    return answer(monitor().store.read_here(lambda q: dump(kind.make(q.one(kind, reference)))))


def show_task(reference: str, wanted: dict[str, Any]):
    """One task; with wait_for as soon as its status or attention is one of these words, or at the time-out.
    Who waits counts as a stream."""
    broadcaster, store = monitor().broadcaster, monitor().store
    if "wait_for" not in wanted:
        return show_one(TASK, reference)
    if not broadcaster.join():
        raise Problem("unavailable", "too many wait for something; try again")
    try:
        head = broadcaster.head  # before the task is read: what comes after it is not missed
        row = store.read_here(lambda q: q.one(TASK, reference))
        news = changes(broadcaster, head, Filter(task=row["number"]), wanted.get("timeout", 30))
        for _ in itertools.chain([None], news):
            task = store.read_here(lambda q: TASK.make(q.one(TASK, row["id"])))
            if {task["status"], task.get("attention", {}).get("state")} & set(wanted["wait_for"]):
                break
    finally:
        broadcaster.leave()
    return answer(dump(task))


def idempotency_key() -> str | None:
    """The Idempotency-Key header, checked."""
    return check_key(flask.request.headers.get("Idempotency-Key"))


def post_update(posted: dict[str, Any], draft: Callable[..., Draft] | None = None):
    """Store an update, or the one that `draft` makes of a payload and a webhook's headers. 201, or 200 when
    its idempotency key has been seen with the same body."""
    made = posted
    if draft:
        told = {name: posted[name] for name in posted if name != "task_id"}
        made = draft_fields(posted["task_id"], draft(**monitor().masked(told)))
    body, created = monitor().add_update(made, idempotency_key(), posted)
    return answer(body, 201 if created else 200)


post_claude = functools.partial(post_update, draft=functools.partial(agent_draft, "claude"))
post_webhook = functools.partial(post_update, draft=github_draft)


def named_task(wanted: dict[str, Any]) -> str | None:
    """The task that a hook, webhook or agent names; empty values count as absent."""
    return wanted.get("task_id") or flask.request.headers.get("X-Monitor-Task", "").strip() or None


def receive_hook(agent: str, wanted: dict[str, Any]):
    """Take in an agent's hook as it is; 204 whatever becomes of it."""
    payload = parse_hook(read_body(MAX_WEBHOOK))
    monitor().take_hook(Hook(agent, payload, wanted.get("event"), named_task(wanted), idempotency_key()))
    return flask.Response(status=204)


def receive_spooled():
    """Take in a hook that waited in a spool, as its file has it."""
    hook = parse_spooled(read_body(MAX_WEBHOOK))
    if monitor().config.database is None and hook.agent != "update":
        raise Problem("unavailable", "a temporary database keeps nothing: what waits in a spool waits on")
    monitor().take_hook(hook)
    return flask.Response(status=204)


def receive_webhook(wanted: dict[str, Any]):
    """Take in GitHub's own request: JSON, a form with JSON in it, or the wrapper that smee makes of that."""
    request, secrets_, raw = flask.request, monitor().config.github_secrets, read_body(MAX_WEBHOOK)
    bodies = [raw]  # before anything else reads it: of a form the raw bytes are signed, by Gitea the JSON
    form_sent = request.mimetype == "application/x-www-form-urlencoded"
    if form_sent and (field := re.search(rb"(?:^|&)payload=([^&]*)", raw)):
        # Quoted-printable but for its mark: unquote_to_bytes takes 3 s for 25 MiB, this 0.1.
        text = field[1].replace(b"+", b" ").replace(b"=", b"%3D").replace(b"%", b"=")
        bodies.append(binascii.a2b_qp(text))
    if secrets_ and not signed(secrets_, request.headers.get("X-Hub-Signature-256", ""), *bodies):
        raise Problem("unauthorized", "X-Hub-Signature-256 is not there, or not of MONITOR_GITHUB_SECRET")
    payload = parse_hook(bodies[-1])
    if isinstance(payload, dict) and len(payload) == 1 and isinstance(payload.get("payload"), str):
        payload = parse_hook(payload["payload"].encode("utf-8", "replace"))
    headers = {name: request.headers.get(name, "") for name in ("X-GitHub-Event", "X-GitHub-Delivery")}
    return answer(*monitor().take_webhook(payload, headers, named_task(wanted)))


def list_updates(wanted: dict[str, Any]):
    """One page of updates."""
    return items(*monitor().store.read(lambda q: q.updates(q.filter(wanted), wanted)))


def stream(wanted: dict[str, Any]):
    """Follow the log: SSE, or NDJSON; with poll=1 what there is, then the end."""
    request, broadcaster, store = flask.request, monitor().broadcaster, monitor().store
    accepted = "ndjson" if "application/x-ndjson" in request.headers.get("Accept", "") else "sse"
    style = FORMATS[wanted.get("format", accepted)]
    given = next(filter(None, (request.headers.get("Last-Event-ID"), *map(wanted.get, CURSORS))), None)
    head, chosen = store.read_here(lambda q: (q.head(), q.filter(wanted)))
    start = place_cursor(given, wanted.get("stream"), head)
    batches = follow(store, broadcaster, start.seq, chosen, wanted.get("poll", False))
    batches = ticks(batches, broadcaster) if "view" in wanted else batches
    ended = session_watch()  # a stream ends with the session that it was opened in
    chunks = stream_bytes(style, start, head, batches, lambda: broadcaster.closed)
    response = flask.Response(itertools.takewhile(lambda _: not ended(), chunks), mimetype=style.mimetype)
    response.headers.update({"X-Accel-Buffering": "no", "Cache-Control": "no-store"})
    if broadcaster.join():
        response.call_on_close(broadcaster.leave)
    else:
        response.response = [b"retry: 30000\n: too many streams\n\n"] if style.ends else []
    return response


def send_backup():
    """The database, as it is at this moment, as a file."""
    with tempfile.TemporaryDirectory(prefix="monitor-backup-") as folder:
        path = os.path.join(folder, "monitor.db")
        monitor().store.backup(path)
        return flask.send_file(path, "application/vnd.sqlite3", conditional=False, etag=False)


def prune_updates(posted: dict[str, Any]):
    """Remove old updates for a second; the caller repeats it while any are left."""
    before = timestamp(datetime.datetime.now(datetime.UTC) - parse_age(posted["older_than"]))
    done, data_only = 0, posted.get("data_only", False)
    if posted.get("dry_run"):
        left = monitor().store.read(lambda q: q.expired(before, data_only))
    else:
        done, left = monitor().prune(before, data_only)
    return answer(dump({"pruned": done, "left": left}))


def send_export(wanted: dict[str, Any]):
    """The log as lines of JSON, or only what came after a number or since a time."""
    return flask.Response(monitor().export(wanted), mimetype=LINES_TYPE)


def take_export(wanted: dict[str, Any]):
    """Take in a part of an export."""
    if flask.request.mimetype != LINES_TYPE:
        raise Problem("unsupported_media_type", f"an export must be sent as {LINES_TYPE}")
    return answer(dump(monitor().take_export(read_body(MAX_WEBHOOK), wanted.get("line", 2))))


# ======================================================================================================
# pages: what a browser shows, its forms and files
# ======================================================================================================


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


def show_page(template: str, read: Callable[..., dict[str, Any]], names: str, **named: str):
    """A page of what `read` finds in the database for a query of these names, and what its path names."""
    wanted = query(fields(names), blanks=False)

    def whole(q: Queries) -> dict[str, Any]:
        head = q.head()  # looked at first: the page's stream tells what comes after it
        frame = {"seq": head["seq"], "stream": head["stream"], "asking": asking(q), "wanted": wanted}
        return frame | read(q, wanted, **named)

    return page(template, **monitor().store.read(whole))


def asking(q: Queries) -> list[dict[str, Any]]:
    """The tasks that need somebody, the most urgent first: which is the order of the alphabet, too."""
    tasks = q.tasks({"attention": ["blocked", "failed", "stuck"]})
    return sorted(tasks, key=lambda task: (task["attention"]["state"], task["attention"]["since"]))


def palette(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """What the command palette leads to: open tasks first, the newest first."""
    tasks = sorted(q.tasks({}), key=lambda task: (task["status"] not in OPEN, -task["number"]))
    return {"tasks": tasks[:1000], "workstreams": q.workstreams({})}


def dashboard(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """The tasks that the filters leave, in groups, open ones and closed ones; and for each filter, how many
    tasks each of its values would leave beside the other filters."""
    scope = {name: wanted[name] for name in ("q", "include_hidden", "include_archived") if name in wanted}
    chosen = {name: [wanted[name]] for name in ("status", "source") if name in wanted}
    chosen |= {"attention": wanted["attention"]} if "attention" in wanted else {}
    if "workstream_id" in wanted:
        chosen["workstream_id"] = [q.one(WORKSTREAM, wanted["workstream_id"])["id"]]
    counts: dict[str, Counter] = defaultdict(Counter)
    groups: dict[str, dict[str, list]] = {}
    news = q.news_of_tasks()
    place = {"status": "status", "none": None}.get(wanted.get("group"), "workstream_id")
    for task in q.tasks(scope):
        task |= news[task["id"]]
        values = {name: task[name] for name in ("status", "source", "workstream_id")}
        values["attention"] = task.get("attention", {}).get("state")
        missed = [name for name in chosen if values[name] not in chosen[name]]
        for name, value in values.items():
            counts[name][value] += missed in ([], [name])
        if not missed:
            parts = groups.setdefault(task.get(place, "all"), {"open": [], "closed": []})
            parts["open" if task["status"] in OPEN else "closed"].append(task)
    room, few = max(5, DASHBOARD_ROWS // max(1, len(groups))), 5 if place == "workstream_id" else 20
    choose_rows(q, groups.values(), *((MAX_INTEGER, MAX_INTEGER) if wanted.get("all") else (room, few)))
    return {"workstreams": q.workstreams(scope), "groups": groups, "counts": counts, "chosen": chosen}


def choose_rows(q: Queries, groups: Iterable[dict[str, list]], room: int, few: int) -> None:
    """Give each group its `rows`: of its open tasks those that had the latest news, in their order, then the
    few that were closed last. What only rows show is read now."""
    for parts in groups:
        latest = sorted(parts["open"], key=lambda task: -(task["seq"] or 0))[:room]
        over = sorted(parts["closed"], key=lambda task: task["updated_at"], reverse=True)[:few]
        parts["rows"] = sorted(latest, key=lambda task: task["number"]) + over
    rows = [task for parts in groups for task in parts["rows"]]
    newest = q.newest_of_tasks([task["id"] for task in rows])
    strips = q.activity(*HOUR, [task["number"] for task in rows])
    for task in rows:
        task |= {"last": newest.get(task["id"]), "strip": strips.get(task["number"])}


def thread(q: Queries, chosen: Filter, wanted: dict[str, Any]) -> dict[str, Any]:
    """One page of updates for a template, newest first, and the seq before which older ones are. `around` a
    seq, it stands in the middle. After the last `seen`, how many are new, and skipped by this page."""
    wanted = {"limit": PAGE_ROWS} | wanted | {"order": "desc", "total": False}
    if "around" in wanted:
        after = {"after_seq": max(0, wanted["around"] - 1), "limit": PAGE_ROWS // 2, "total": False}
        newer = q.updates(chosen, after)[0]
        wanted |= {"before_seq": json.loads(newer[-1])["seq"] + 1} if newer else {}
    updates = [json.loads(body) for body in q.updates(chosen, wanted)[0]]
    last = updates[-1]["seq"] if updates else 0
    more = q.updates(chosen, wanted | {"before_seq": last, "limit": 1})[0]
    seen = wanted.get("seen", MAX_INTEGER)
    news = q.updates(chosen, wanted | {"after_seq": seen, "limit": 1, "total": True})[1]
    found = {"news": news, "skipped": news - sum(update["seq"] > seen for update in updates)}
    return found | {"updates": updates, "older": last if more else None, "query": wanted.get("q", "")}


def lanes(q: Queries, wanted: dict[str, Any], updates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks that stand beside each other, pinned ones first, then the latest, each with its updates."""
    pinned = [TASK.make(row) for pin in split_list(wanted.get("pin", "")) if (row := q.find(TASK, pin))]
    tasks = {task["id"]: task for task in [*pinned, *(update["task"] for update in updates)]}
    newest, found = wanted | {"order": "desc", "limit": LANE_ROWS, "total": False}, []
    for task in list(tasks.values())[:LANES]:
        bodies, _ = q.updates(q.filter(wanted | {"task_id": task["id"]}), newest)
        found.append({"task": task, "updates": list(map(json.loads, bodies))})
    return found


def bars(strip: dict[int, dict[str, Any]]) -> tuple[str, str]:
    """The paths of a strip's bars, higher for more updates: of what went well, and of errors, above it."""
    high = {n: round(5 + 12 * span["updates"] / (span["updates"] + 5)) for n, span in strip.items()}
    bad = {n: max(3, high[n] * s["errors"] // s["updates"]) for n, s in strip.items() if s["errors"]}
    well = "".join(f"M{5 * n + 2.5} 18V{19 - height + bad.get(n, -1)}" for n, height in high.items())
    return well, "".join(f"M{5 * n + 2.5} {18 - high[n]}v{top}" for n, top in bad.items())


def folded(updates: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Updates in a row that are tool calls of one run on one day stand together, each other by itself."""

    def place(update: dict[str, Any]) -> Any:
        called = update.get("kind") in TOOL_KINDS
        return (update["source"], update["timestamp"][:10]) if called else update["seq"]

    return [list(together) for _, together in itertools.groupby(updates, place)]


def marked(text: str, words: str):
    """A text with the words of a search in <mark>: whole ones, in any case."""
    from markupsafe import Markup

    found = (r"[\W_]+".join(re.findall(r"[^\W_]+", word)) for word in words.split()[:20])
    either = "|".join(filter(None, dict.fromkeys(found)))
    parts = re.split(rf"(?i)(?<![^\W_])({either})(?![^\W_])", text) if either else [text]
    return Markup().join(Markup("<mark>{}</mark>").format(p) if i % 2 else p for i, p in enumerate(parts))


def one_task(q: Queries, wanted: dict[str, Any], reference: str) -> dict[str, Any]:
    """One task, for its forms, and its thread, newest first."""
    row = q.one(TASK, reference)
    chosen = q.filter(wanted | {"task_id": row["id"]})
    workstream = WORKSTREAM.make(q.one(WORKSTREAM, row["workstream_id"]))
    found = {"task": TASK.make(row), "workstream": workstream, "workstreams": q.workstreams({})}
    found |= {"runs": q.sessions({"task_id": row["id"]}), "links": q.links({"task_id": row["id"]})}
    found["total"] = q.updates(Filter(task=row["number"]), {"limit": 1})[1]
    found["since"] = row["status_since"] or row["created_at"]
    found["strip"] = q.activity(*DAY, [row["number"]]).get(row["number"])
    found |= thread(q, chosen, wanted)
    before = wanted.get("before_seq", MAX_INTEGER)
    if "around" in wanted and found["updates"]:
        before = found["updates"][0]["seq"]
    return found | {"changes": q.changes(row["number"], found["older"] or 0, before)}


def whole_thread(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """The updates over all tasks that the filters want, newest first."""
    found = thread(q, q.filter(wanted), wanted)
    tasks = {task["id"]: task for task in q.tasks({"include_hidden": True, "include_archived": True})}
    for update in found["updates"]:
        update["task"] = tasks.get(update["task_id"])
    return found | ({"lanes": lanes(q, wanted, found["updates"])} if wanted.get("layout") == "lanes" else {})


def download(text: str, name: str, style: str):
    """A text as a file to keep."""
    headers = {"Content-Disposition": f'attachment; filename="{name}.{style}"'}
    return flask.Response(text, mimetype=FILE_TYPES[style], headers=headers)


def download_task(style: str, reference: str):
    """A task with its thread, the oldest first, as a file: Markdown or JSON."""
    found = monitor().store.read(lambda q: one_task(q, {"limit": FILE_ROWS}, reference))
    found["updates"].reverse()
    kept = {part: found[part] for part in ("task", "workstream", "runs", "links", "total", "updates")}
    text = flask.render_template("task.md", **kept) if style == "md" else dump(kept) + "\n"
    return download(text, f"task-{kept['task']['number']}", style)


def download_stream(wanted: dict[str, Any]):
    """The updates that the stream page's filters want, the oldest first, one a line."""
    wanted |= {"order": "desc", "limit": FILE_ROWS, "total": False}
    bodies = monitor().store.read(lambda q: q.updates(q.filter(wanted), wanted)[0])
    return download("".join(f"{body}\n" for body in reversed(bodies)), "updates", "ndjson")


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


def take_form(place: str, kind: Kind, reference: str | None = None):
    """Make a workstream or task as a form says, or change the one that is named; go on to its page."""
    if reference is None:
        return see_other(place, monitor().create(kind, form(kind.new)))
    return see_other(place, monitor().change(kind, reference, form(kind.changes)))


def add_update_form(reference: str):
    """The task page's form for an update."""
    posted = form(MANUAL_UPDATE, blanks=False) | {"task_id": reference}
    body, _ = monitor().add_update(clean(posted, MANUAL_UPDATE) | {"source": "manual"})
    return see_other("/tasks/{task_id}#u{seq}", body)


def move_run_form(reference: str):
    """The task page's form that gives a run to another task."""
    return see_other("/tasks/{id}", monitor().move_run(clean(form(SESSION_MOVE, blanks=False), SESSION_MOVE)))


def link_form(reference: str):
    """The task page's forms that bind things to the task, or unbind them."""
    posted = form(["remove", *LINK], blanks=False) | {"task_id": reference}
    if posted.get("remove"):
        monitor().unlink(clean(posted, LINK_NAME))
    else:
        monitor().link(clean(posted, LINK))
    return flask.redirect(f"/tasks/{reference}", 303)


def static_file(name: str):
    """A file of static/."""
    media_type = MEDIA_TYPES.get(name.rpartition(".")[2])
    if media_type and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        with contextlib.suppress(FileNotFoundError):
            return flask.Response(asset("static", name), mimetype=media_type)
    raise Problem("not_found", f"no such file: {name[:60]!r}")


# ======================================================================================================
# mcp: for agents: the Model Context Protocol and its tools, what to know at the start
# ======================================================================================================

ENVELOPE = "io.modelcontextprotocol/"  # what messages say of themselves since 2026, in params._meta
ANSWER_TEXT = 6000  # characters of all messages in one answer, at 200 a message or more
MOST_UPDATES, PRIME_UPDATES = 50, 8


@functools.cache
def mcp_tables() -> types.SimpleNamespace:
    """What templates/mcp.json says, the fields of each tool, and the tools as clients get them. A model pays
    for every word of these: bounds are told when they are broken."""
    found, known, listed = json.loads(asset("templates", "mcp.json")), {}, []
    for name, (text, names) in found["tools"].items():
        known[name], shapes, must = fields(names), {}, []
        for each, field in known[name].items():
            shape = {key: field.schema[key] for key in ("type", "enum") if key in field.schema}
            shapes[each] = shape | found["hints"].get(each, {})
            must += [each] if field.required and field.kind != "reference" else []
        schema = {"type": "object", "properties": shapes} | ({"required": must} if must else {})
        told = {"readOnlyHint": True} if name in READING_TOOLS else {"destructiveHint": False}
        listed.append({"name": name, "description": text, "inputSchema": schema, "annotations": told})
    versions = [*found["handshake"], *found["stateless"]]
    return types.SimpleNamespace(**found | {"tools": listed, "fields": known, "versions": versions})


def mcp_reply(raw: bytes, headers: Any, call: Callable[[str, dict], str]) -> tuple[dict | None, int]:
    """What answers a message, and the HTTP status; None: nothing does. `call` runs a tool; without headers it
    came on a pipe. A client of 2026 says in every message which version it speaks, an older one agrees on
    one by `initialize`; no answer depends on an earlier one."""
    told: dict[str, Any] = {"jsonrpc": "2.0", "id": None}
    stateless, status = False, 400
    try:
        message = read_message(raw)
        told["id"] = message.get("id")
        stateless = is_stateless(message, headers)
        if "id" not in message:
            return None, 202
        status = 400 if stateless else 200  # to an older client a 404 says that its session is over
        return told | {"result": mcp_result(message, stateless, call)}, 200
    except Problem as problem:
        # The codes are those of JSON-RPC here, and what a Problem says of a field is its data.
        told["error"] = {"code": problem.code, "message": problem.message}
        told["error"] |= {"data": problem.field} if problem.field else {}
        return told, 404 if stateless and problem.code == -32601 else status


def read_message(raw: bytes) -> dict[str, Any]:
    """A request or notification of JSON-RPC; Problem for anything else."""
    try:
        message, kinds = json.loads(raw.decode()), {"method": str, "params": dict, "id": (str, int)}
    except (ValueError, RecursionError) as error:
        raise Problem(-32700, f"the message is not JSON in UTF-8: {error}") from None
    whole = {"params": {}, "id": ""} | message if isinstance(message, dict) else {}
    fits = all(isinstance(whole.get(name), kind) for name, kind in kinds.items())
    if not fits or whole.get("jsonrpc") != "2.0" or isinstance(whole["id"], bool):
        raise Problem(-32600, "a message is one request or notification of JSON-RPC 2.0; no batch, no answer")
    return message


def is_stateless(message: dict[str, Any], headers: Any) -> bool:
    """Whether a message is of a version since 2026. Its headers then say what it says, for proxies that look
    at nothing else: Problem where they do not, or for a version that is not spoken here."""
    params, method, known = message.get("params", {}), message["method"], mcp_tables()
    meta = params["_meta"] if isinstance(params.get("_meta"), dict) else {}
    said = meta.get(f"{ENVELOPE}protocolVersion")
    version = said if headers is None else headers.get("MCP-Protocol-Version") or None
    if version not in (None, *known.versions):
        asked = {"supported": known.versions, "requested": version}
        raise Problem(-32022, "this version of the protocol is not spoken here", asked)
    if version in known.handshake or method == "initialize" or (version is None and said is None):
        return False
    missing = [name for name in ("protocolVersion", "clientCapabilities") if ENVELOPE + name not in meta]
    if missing and "id" in message:
        raise Problem(-32602, f"params._meta has no {ENVELOPE}{missing[0]}")
    if headers is None or "id" not in message:
        return True
    name = headers.get("Mcp-Name", "")
    with contextlib.suppress(ValueError):
        coded = re.fullmatch(r"=\?base64\?(.*)\?=", name)
        name = binascii.a2b_base64(coded[1]).decode() if coded else name
    named = method != "tools/call" or params.get("name") in (None, name)
    if version != said or headers.get("Mcp-Method") != method or not named:
        raise Problem(-32020, "MCP-Protocol-Version, Mcp-Method or Mcp-Name says something else than this")
    return True


def mcp_result(message: dict[str, Any], stateless: bool, call: Callable[[str, dict], str]) -> dict[str, Any]:
    """The result of a request; Problem for a method that is not there."""
    method, params, known = message["method"], message.get("params", {}), mcp_tables()
    server, result = {"name": "monitor", "version": __version__}, {}
    about = {"capabilities": {"tools": {}}, "instructions": known.instructions}
    if method == "tools/list":
        result = {"tools": known.tools}
    elif method == "tools/call":
        result = tool_result(params, call)
    elif method == "server/discover" and stateless:
        result = about | {"supportedVersions": known.versions}
    elif method == "initialize" and not stateless:
        asked = params.get("protocolVersion")
        agreed = asked if asked in known.handshake else known.handshake[-1]
        result = about | {"protocolVersion": agreed, "serverInfo": server}
    elif method != "ping" or stateless:
        raise Problem(-32601, f"there is no method {method[:60]!r}")
    if stateless:
        result |= {"resultType": "complete", "_meta": {f"{ENVELOPE}serverInfo": server}}
        result |= {"ttlMs": 0, "cacheScope": "private"} if method != "tools/call" else {}
    return result


def tool_result(params: dict[str, Any], call: Callable[[str, dict], str]) -> dict[str, Any]:
    """What a tool says. Why it cannot do its work is told to the model, too: it can mend that."""
    name, given = params.get("name"), params.get("arguments", {})
    if not isinstance(name, str) or name not in mcp_tables().fields or not isinstance(given, dict):
        names = ", ".join(mcp_tables().fields)
        raise Problem(-32602, f"name must be one of {names}; arguments must be an object")
    try:
        given = parse_json(json.dumps(given).encode())  # here: what cannot be stored is told to the model
        return {"content": [{"type": "text", "text": call(name, given)}]}
    except Problem as problem:
        return {"content": [{"type": "text", "text": problem.message}], "isError": True}


def receive_mcp(wanted: dict[str, Any]):
    """Answer a message of a client of the protocol."""
    call = functools.partial(call_tool, named_task(wanted))
    told, status = mcp_reply(json_bytes(), flask.request.headers, call)
    return answer(dump(told), status) if told else flask.Response(status=status)


def call_tool(named: str | None, name: str, given: dict[str, Any]) -> str:
    """Run a tool; returns its text. Where no task or workstream is given, it is about the agent's own, which
    the request names."""
    served, takes = monitor(), mcp_tables().fields[name]
    if name in WRITING_TOOLS and not authorised():
        raise Problem("unauthorized", f"{name} needs a valid token; whoever plugged Monitor in can give it")
    if given.keys() - takes:
        raise invalid(f"there is no {min(given.keys() - takes)[:60]}; {name} takes {', '.join(takes)}")
    given = {each: value for each, value in given.items() if value is not None}
    for each, field in takes.items():
        if each in given and field.kind in ("number", "reference") and not isinstance(given[each], str):
            given[each] = dump(given[each])  # models write numbers as numbers
        elif each not in given and field.required and field.kind == "reference":
            given[each] = own_reference(each, named)
    wanted = clean(given, takes)
    if "limit" in takes:
        wanted["limit"] = min(wanted.get("limit", 10), MOST_UPDATES)
    if name in READING_TOOLS:
        found = served.store.read(lambda q: READING_TOOLS[name](q, wanted))
    else:
        run = re.fullmatch(RUN_REFERENCE, named or "")
        made = json.loads(WRITING_TOOLS[name](wanted, run[0] if run else "mcp"))
        task = served.store.read(lambda q: TASK.make(q.one(TASK, made.get("task_id", made["id"]))))
        found = {"made": made, "task": task}
    size = max(200, ANSWER_TEXT // max(1, len(found.get("updates", ""))))
    return flask.render_template("mcp.txt", tool=name, size=size, **found).strip()


def own_reference(name: str, named: str | None) -> str:
    """The task that the request names, or its workstream."""
    reference = FIELDS["task_id"].check(named, "the header X-Monitor-Task") if named else ""
    row = monitor().store.read_here(lambda q: q.find(TASK, reference))
    if row is None:
        raise invalid(f"{name} is missing: list_tasks shows them; no task is known to be your own", name)
    return row["id" if name == "task_id" else name]


def open_tasks(q: Queries, wanted: dict[str, Any]) -> dict[str, Any]:
    """Tasks, without a state asked for those not over: who waits for somebody first, then the newest."""
    states, tasks = FIELDS["attention"].schema["x-words"], q.tasks(wanted)
    if not {"status", "attention"} & wanted.keys():
        tasks = [task for task in tasks if task["status"] in OPEN]
    places = {task["id"]: states.index(task["attention"]["state"]) for task in tasks if "attention" in task}
    tasks.sort(key=lambda task: (places.get(task["id"], len(states)), -task["number"]))
    return {"tasks": tasks, "waiting": len(places), "workstreams": q.workstreams({})}


READING_TOOLS = {
    "list_tasks": open_tasks,
    "read_task": lambda q, wanted: one_task(q, wanted, wanted["task_id"]),
    "search": lambda q, wanted: (
        whole_thread(q, wanted)
        | {"tasks": [] if "task_id" in wanted else q.tasks({"q": wanted["q"], "include_archived": True})}
    ),
}
WRITING_TOOLS = {  # what they made or changed, as JSON
    "create_task": lambda wanted, source: monitor().create(TASK, wanted),
    "change_task": lambda wanted, source: monitor().change(
        TASK, wanted["task_id"], wanted | ({"summary_source": source} if "summary_text" in wanted else {})
    ),
    "post_update": lambda wanted, source: monitor().add_update(wanted | {"source": source})[0],
}


def guide() -> str:
    """What agents are told of Monitor: the skill without its head."""
    return asset("templates", "skill.md").decode().partition("\n---\n")[2]


def show_prime(wanted: dict[str, Any]):
    """What an agent needs to know when it begins: how its task stands, who waits, how to record."""
    named = named_task(wanted)

    def read(q: Queries) -> dict[str, Any]:
        row = q.find(TASK, FIELDS["task_id"].check(named, "task_id")) if named else None
        found = one_task(q, {"limit": PRIME_UPDATES}, row["id"]) if row else {"task": {}}
        waiting = [task for task in asking(q) if task["id"] != found["task"].get("id")]
        return found | {"waiting": waiting, "named": named}

    text = flask.render_template("prime.txt", **monitor().store.read(read))
    return flask.Response(text, mimetype="text/plain")


# ======================================================================================================
# app: all routes, errors, what every answer has, create_app()
# ======================================================================================================

partial = functools.partial
# Method, rule, handler, and the tables that check body and query for it: Route. An answer of one expression
# stands here. What a route of the API is for, and answers, stands in templates/openapi.json.
ROUTES = (
    ("GET", "/health", health, None, fields("full")),
    ("POST", "/api/workstreams", partial(make_one, WORKSTREAM), NEW_WORKSTREAM),
    ("GET", "/api/workstreams", partial(list_all, Queries.workstreams), None, WORKSTREAM_QUERY),
    ("GET", "/api/workstreams/<reference>", partial(show_one, WORKSTREAM)),
    ("PATCH", "/api/workstreams/<reference>", partial(change_one, WORKSTREAM), WORKSTREAM_CHANGES),
    ("POST", "/api/tasks", partial(make_one, TASK), NEW_TASK),
    ("GET", "/api/tasks", partial(list_all, Queries.tasks), None, TASK_QUERY),
    ("GET", "/api/tasks/<reference>", show_task, None, TASK_WAIT),
    ("PATCH", "/api/tasks/<reference>", partial(change_one, TASK), TASK_CHANGES),
    ("POST", "/api/updates", post_update, NEW_UPDATE),
    ("POST", "/api/updates/manual", lambda posted: post_update(posted | {"source": "manual"}), MANUAL_UPDATE),
    ("POST", "/api/updates/claude-hook", post_claude, CLAUDE_HOOK),
    ("POST", "/api/updates/github-webhook", post_webhook, GITHUB_WEBHOOK, None, MAX_WEBHOOK),
    ("POST", "/api/hooks/<agent>", receive_hook, None, HOOK_QUERY, MAX_WEBHOOK),
    ("POST", "/api/hooks/spooled", receive_spooled, None, None, MAX_WEBHOOK),
    ("POST", "/api/webhooks/github", receive_webhook, None, OF_TASK, MAX_WEBHOOK),
    ("GET", "/api/sessions", partial(list_all, Queries.sessions), None, OF_TASK),
    ("POST", "/api/sessions/move", lambda posted: answer(monitor().move_run(posted)), SESSION_MOVE),
    ("GET", "/api/links", partial(list_all, Queries.links), None, OF_TASK),
    ("POST", "/api/links", lambda posted: answer(monitor().link(posted), 201), LINK),
    ("POST", "/api/links/remove", lambda posted: answer(dump(monitor().unlink(posted))), LINK_NAME),
    ("GET", "/api/updates", list_updates, None, UPDATE_QUERY),
    ("GET", "/api/updates/<seq:seq>", lambda seq: answer(monitor().store.read_here(lambda q: q.update(seq)))),
    ("POST", "/api/updates/<seq:seq>/redact", lambda seq: answer(monitor().redact_update(seq))),
    ("GET", "/api/stream", stream, None, STREAM_QUERY),
    ("GET", "/api/ws", open_socket),
    ("GET", "/api/admin/backup", send_backup),
    ("GET", "/api/admin/check", lambda: answer(dump({"problems": monitor().store.read(Queries.check)}))),
    ("POST", "/api/admin/prune", prune_updates, PRUNING),
    ("GET", "/api/admin/export", send_export, None, EXPORT_QUERY),
    ("POST", "/api/admin/import", take_export, None, IMPORT_QUERY, MAX_WEBHOOK),
    ("GET", "/openapi.json", lambda: answer(dump(api_document()))),
    ("GET", "/docs", lambda: page("docs.html", api=api_document(), asking=monitor().store.read(asking))),
    ("GET", "/login", lambda: page("login.html", next=local_path(flask.request.args.get("next")))),
    ("POST", "/login", log_in),
    ("POST", "/logout", log_out),
    ("GET", "/", lambda: flask.redirect("/dashboard", 303)),
    ("GET", "/dashboard", partial(show_page, "dashboard.html", dashboard, TASK_FILTER)),
    ("GET", "/tasks/<reference>", partial(show_page, "task.html", one_task, THREAD_FILTER)),
    ("GET", "/tasks/<reference>.md", partial(download_task, "md")),
    ("GET", "/tasks/<reference>.json", partial(download_task, "json")),
    ("GET", "/stream", partial(show_page, "stream.html", whole_thread, THREAD_FILTER)),
    ("GET", "/stream.ndjson", download_stream, None, FILE_QUERY),
    ("GET", "/needs", partial(show_page, "needs.html", lambda q, wanted: {}, "")),
    ("GET", "/palette", partial(show_page, "palette.html", palette, "")),
    ("POST", "/workstreams", partial(take_form, "/dashboard", WORKSTREAM)),
    ("POST", "/workstreams/<reference>", partial(take_form, "/dashboard", WORKSTREAM)),
    ("POST", "/tasks", partial(take_form, "/tasks/{id}", TASK)),
    ("POST", "/tasks/<page:reference>", partial(take_form, "/tasks/{id}", TASK)),
    ("POST", "/tasks/<reference>/updates", add_update_form),
    ("POST", "/tasks/<reference>/runs", move_run_form),
    ("POST", "/tasks/<reference>/links", link_form),
    ("GET", "/static/<name>", static_file),
    ("GET", "/llms.txt", lambda: flask.Response(guide(), mimetype="text/plain")),
    ("GET", "/prime", show_prime, None, NAMED_TASK),
    ("POST", "/mcp", receive_mcp, None, NAMED_TASK),
)


def api_document() -> dict[str, Any]:
    """The OpenAPI document of this server."""
    return openapi(itertools.starmap(Route, ROUTES), monitor().config, cookie_name())


def problem_of(error: Exception) -> Problem:
    """Any error as a Problem. What Flask does not know is a fault of ours: its trace goes to the log."""
    from werkzeug.exceptions import HTTPException

    if isinstance(error, Problem):
        return error
    if not isinstance(error, HTTPException):
        flask.current_app.logger.exception("unexpected error")
        return Problem("internal_error", "something went wrong in the server; its log says what")
    codes = {status: code for code, status in STATUS_OF.items() if code != "internal_error"}
    if isinstance(error.__context__, TimeoutError):
        return Problem("timed_out", "the body took too long to arrive")
    messages = {400: "the request is malformed, or was not received whole", 413: "the body is too large"}
    messages |= {404: f"no such path: {flask.request.path[:200]}", 405: "this path does not take that method"}
    message = messages.get(error.code, error.description or error.name)
    return Problem(codes.get(error.code, "invalid_input"), message)


def show_error(error: Exception):
    """An error as JSON, or as a page where a browser asked for one."""
    problem = problem_of(error)
    if wants_page():
        # Not by page(): whether somebody is logged in stands in the database, which may be the trouble.
        known = {"version": __version__, "problem": problem, "sessions": bool(monitor().config.tokens)}
        with contextlib.suppress(Problem):
            known["logged_in"] = logged_in()
        response = flask.make_response(flask.render_template("error.html", **known), problem.status)
    else:
        response = answer(dump(problem.body()), problem.status)
    response.headers.update(ERROR_HEADERS.get(problem.status, {}))
    if methods := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(methods))
    return response


def finish(response):
    """The headers that every answer has; of pages and files an ETag, 304, and gzip where it is accepted."""
    request, plain = flask.request, response.mimetype not in COMPRESSED
    response.headers.extend(PAGE_HEADERS)
    if response.status_code in (303, 401):
        response.headers["Cache-Control"] = "no-store"  # a redirection to the login is over after it
    if plain or response.status_code != 200 or request.method not in SAFE_METHODS:
        return response
    response.add_etag(weak=True)  # the same for the compressed and the plain text
    response.headers["Cache-Control"] = "no-cache"
    response.vary.update(("Accept-Encoding", "Cookie"))
    response.make_conditional(request)
    if response.status_code == 200 and request.accept_encodings.quality("gzip") > 0:
        response.set_data(gzip.compress(response.get_data(), 5, mtime=0))
        response.content_encoding = "gzip"
    return response


def age(moment: str) -> str:
    """How long ago an RFC 3339 time was, in one unit: `40 s`, `4 m`, `2 h`, `3 d`. By whole seconds of the
    clock: all times on a page grow older at the same moment, and until then it is the same page."""
    seconds = int(time.time()) - int(datetime.datetime.fromisoformat(moment).timestamp())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{max(0, seconds)} s"


def brief(text: Any, limit: int = 240) -> str:
    """A text on one line, without control characters, cut with an ellipsis."""
    return one_line(" ".join(str(text).split()), limit)


def create_app(config: Config | None = None):
    """Make the Flask app. It opens no database: `flask --app monitor` runs this for every command."""
    import jinja2
    from werkzeug.routing import BaseConverter

    app = flask.Flask("monitor", static_folder=None, template_folder=None)
    kinds = {"seq": "[0-9]{1,18}", "page": r"[^/]+(?<!\.md)(?<!\.json)"}  # else Allow tells of other paths
    app.url_map.converters |= {k: type(k, (BaseConverter,), {"regex": regex}) for k, regex in kinds.items()}
    app.jinja_loader = jinja2.FunctionLoader(lambda name: asset("templates", name).decode())
    filters = {"age": age, "bars": bars, "brief": brief, "folded": folded, "marked": marked}
    app.jinja_env.filters |= filters | {"quote": shlex.quote}
    app.extensions["monitor"] = Monitor(config or Config.load())
    app.before_request(guard)
    app.after_request(finish)
    for route in itertools.starmap(Route, ROUTES):
        name = f"{route.method} {route.rule}".replace(".", " ")
        view = functools.partial(respond, route)
        for websocket in {False, route.handler is open_socket}:
            app.add_url_rule(route.rule, name, view, methods=[route.method], websocket=websocket)
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
DRAIN_SECONDS = 1  # what streams have to say goodbye
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
    """A request body that must arrive before a deadline, however slowly it drips: else TimeoutError. An
    error ends the connection. pywsgi discards what the app did not read before it reads the next request."""

    def __init__(self, handler: Any, body: Any):
        deadline = time.monotonic() + BODY_SECONDS

        def in_time(take: Callable, *size: int) -> Any:
            try:
                with handler.limit(deadline - time.monotonic()):
                    return take(*size)
            except OSError:
                handler.close_connection = True
                raise

        self.read, self._discard = (functools.partial(in_time, take) for take in (body.read, body._discard))


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
        environ["monitor.connection"] = self.socket, self.rfile
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
        version_string = staticmethod(str)  # nobody needs to know it

        def log_request(self, code="-", size="-"):
            if access_log:
                path = re.sub(r"[^\x20-\x7e]", "?", self.path.partition("?")[0])[:500]
                sys.stderr.write(f"{self.address_string()} {self.command} {path} {code}\n")

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
    if os.environ.get("MONITOR_THREADS") == "1":
        return False
    try:
        from gevent import monkey
    except ImportError:  # none, or one that was built for another Python
        return False
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
    deadline = time.monotonic() + DRAIN_SECONDS
    while served.broadcaster.streams and time.monotonic() < deadline:
        time.sleep(0.01)
    stop()
    served.close()
    if with_gevent:
        sys.stdout.flush()
        # All is closed. gevent's locks would go before logging's last use of them, which leaves a trace.
        os._exit(0)


def on_signals(with_gevent: bool) -> threading.Event:
    """An event that SIGINT and SIGTERM set: raising in whatever greenlet runs would leave a mess."""
    stopping, handle = threading.Event(), signal.signal
    if with_gevent:
        from gevent import signal_handler as handle
    for number in (signal.SIGINT, signal.SIGTERM):
        # In a thread of its own: this one may hold the event's lock in the very moment of the signal.
        handle(number, lambda *_: threading.Thread(target=stopping.set).start())
    return stopping


# ======================================================================================================
# hooks: agents plugged in: their settings, the hook that they run, the spool while no server answers
# ======================================================================================================

HOOK_SECONDS = 2  # an agent waits for its hooks
HOOK_MARKS = (": monitor-hook;", '"_monitor": true')  # our entries are known by one of them
MAX_SPOOLED = 1000
UNTAKEN = (0, 401, *range(500, 600))  # nobody there, not let in, a server in trouble: the event is kept
Hooks = list[tuple[str, dict[str, Any]]]  # (event, entry), as in an agent's settings


@functools.cache
def hook_agents() -> dict[str, dict[str, Any]]:
    """What templates/hooks.toml says, by agent."""
    import tomllib

    found = tomllib.loads(asset("templates", "hooks.toml").decode())
    return {agent: row | {"events": table(row["events"])} for agent, row in found.items()}


def hook_entry(agent: str, event: str, server: str, http: bool) -> dict[str, Any]:
    """What an agent's settings hold for one event: the shell's one-liner, or the agent's own POST."""
    row = hook_agents()[agent]
    script = " ".join(re.findall("^[^#].*", asset("templates", "hook.sh").decode(), re.M))
    told = {"AGENT": agent, "SERVER": server, "QUERY": row.get("query", ""), "EVENT": row.get("event", "")}
    for name, value in told.items():
        script = script.replace(f"@{name}@", value.replace("$EVENT", event))
    entry = row["http" if http and event not in row["http_never"] else "entry"]
    entry = entry.replace('"$URL"', json.dumps(f"{server}/api/hooks/{agent}"))
    matcher = [{"matcher": each} for each in row["events"][event][1:]]
    return dict(*matcher) | json.loads(entry.replace('"$COMMAND"', json.dumps(script)))


def version_key(text: str | None) -> tuple[int, ...]:
    """The first version number in a text, to be compared; () when there is none."""
    found = re.search(r"\d+(?:\.\d+)+", text or "")
    return tuple(map(int, found[0].split("."))) if found else ()


def agent_version(agent: str, seconds: int = 20) -> str | None:
    """The version of an agent's program; None where it cannot be told."""
    import subprocess

    program = [hook_agents()[agent]["program"], "--version"]
    how = {"stdin": subprocess.DEVNULL, "capture_output": True, "encoding": "utf-8", "timeout": seconds}
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        return ".".join(map(str, version_key(subprocess.run(program, **how).stdout))) or None  # noqa: S603


def wanted_hooks(agent: str, server: str, version: str | None, http: bool = False) -> Hooks:
    """Our entries for an agent of this version (None: unknown): only events that it knows."""
    row = hook_agents()[agent]
    known = version_key(version or row.get("assume"))
    if not re.fullmatch(r"https?://[\w.:/~%\[\]-]+", server, re.ASCII):
        raise invalid(f"{server!r} cannot stand in a hook; it must look like http://127.0.0.1:3000")
    if http and ("http" not in row or (version and known < version_key(row["http_since"]))):
        raise invalid(f"{' '.join(filter(None, (agent, version)))} cannot post by itself; leave out --http")
    events = [event for event, (since, *_) in row["events"].items() if version_key(since) <= known]
    return [(event, hook_entry(agent, event, server, http)) for event in events]


def without_comments(text: str) -> str:
    """A JSON text with blanks for // and /* */ comments and the byte order mark: nothing else moves."""
    pattern = r'("(?:[^"\\]|\\.)*")|//[^\n]*|/\*.*?\*/|^\ufeff'
    return re.sub(pattern, lambda found: found[1] or re.sub(r"\S", " ", found[0]), text, flags=re.S)


def hooks_in(text: str) -> dict[str, list]:
    """The hooks in a settings text; ValueError where entries cannot be added to it."""
    settings = DECODER.decode(without_comments(text)) if text.strip() else {}
    hooks = settings.get("hooks", {}) if isinstance(settings, dict) else None
    if not isinstance(hooks, dict) or not all(isinstance(entries, list) for entries in hooks.values()):
        raise ValueError("it is no JSON object with lists of hooks")
    return hooks


def entries_of(entries: list, ours: bool) -> list:
    """The entries that came from us, or the others; a group that holds both is in both, with its share."""
    found: list = []
    for entry in entries:
        group = entry.get("hooks") if isinstance(entry, dict) else None
        if group and isinstance(group, list):
            part = entries_of(group, ours)
            found += [entry | {"hooks": part}] if part else []
        elif any(mark in json.dumps(entry) for mark in HOOK_MARKS) == ours:
            found.append(entry)
    return found


def our_hooks(text: str | None) -> Hooks:
    """The entries in a settings text that came from us."""
    hooks = hooks_in(text or "")
    return [(event, entry) for event in hooks for entry in entries_of(hooks[event], ours=True)]


def with_hooks(text: str | None, wanted: Hooks, agent: str) -> str:
    """A settings text with these entries of ours, each the last one of its event, and no others of ours. It
    stays as it is where that is so. Else only the value of "hooks" is written anew, all around it stays to
    the byte; comments inside that value, where an agent allows any, are lost."""
    text = text if text and text.strip() else hook_agents()[agent].get("frame", "{}\n")
    if sorted(our_hooks(text), key=str) == sorted(wanted, key=str):
        return text
    old = hooks_in(text)
    theirs = {event: entries_of(entries, ours=False) for event, entries in old.items()}
    hooks = {event: theirs[event] for event in old if theirs[event] or not old[event]}
    for event, entry in wanted:
        hooks.setdefault(event, []).append(entry)
    return put_hooks(text, hooks)


def put_hooks(text: str, hooks: dict[str, list]) -> str:
    """A JSON object's text with another value of "hooks"; none, when there is nothing in it."""
    plain, newline = without_comments(text), "\r\n" if "\r\n" in text else "\n"
    unit = (re.match(r"[^{]*\{\s*?\n([ \t]+)\S", plain) or ["", "  "])[1]
    written = json.dumps(hooks, indent=unit, ensure_ascii=False).replace("\n", newline + unit)
    written = re.sub("[\ud800-\udfff]", lambda found: json.dumps(found[0])[1:-1], written)
    close = plain.rindex("}")
    last = len(plain[:close].rstrip())  # where the last member ends, or behind the opening bracket
    for found in re.finditer(r'"hooks"\s*:\s*', plain):
        end = DECODER.raw_decode(plain, found.end())[1]
        if DECODER.decode(plain[: found.end()] + '"here"' + plain[end:]).get("hooks") != "here":
            continue  # a member of something else
        if hooks or end < last:
            return text[: found.end()] + written + text[end:]
        lead = re.search(r",?\s*$", plain[: found.start()]).start()
        kept = text[lead : found.start()].removeprefix(",").rstrip()
        return text[:lead] + kept + ("" if re.match(r"\s*\n", text[end:]) else newline) + text[end:]
    comma = "," if last > plain.index("{") + 1 else ""
    comment = text[last:close].rstrip()
    rest = text[last + len(comment) : close]
    rest = rest if "\n" in rest else newline
    return f'{text[:last]}{comma}{comment}{newline}{unit}"hooks": {written}{rest}{text[close:]}'


def hook_path(agent: str, project: bool) -> str:
    """The settings file of an agent: the user's, or that in this repository."""
    row = hook_agents()[agent]
    if not project:
        return f"{os.path.expanduser(os.environ.get(row.get('home', '')) or row['folder'])}/{row['file']}"
    upward = (Path.cwd(), *Path.cwd().parents)
    repository = next((place for place in upward if (place / ".git").exists()), upward[0])
    return f"{repository}/{row['project']}"


class HookFile:
    """An agent's settings file: its text (None: no file), and our entries in it."""

    def __init__(self, agent: str, project: bool):
        self.agent, self.name = agent, hook_path(agent, project)
        self.path = os.path.realpath(self.name)
        self.backup = f"{self.path}.monitor-backup"
        self.text = self.read(self.path)
        self.ours = our_hooks(self.text)

    def read(self, path: str) -> str | None:
        """A file's text; Problem where entries cannot be added to it."""
        try:
            text = Path(path).read_bytes().decode()
            hooks_in(text)
            if not hook_agents()[self.agent].get("comments") and text.strip():
                json.loads(text.removeprefix("\ufeff"))
            return text
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: JSON, UTF-8
            raise invalid(f"cannot read {path}: {error}; mend it first, nothing was changed") from None

    def original(self) -> str | None:
        """What the file was before us: the backup to the byte, where nothing else was changed since."""
        with contextlib.suppress(Problem):
            for before in (self.read(self.backup), None):
                if self.ours and self.text == with_hooks(before, self.ours, self.agent):
                    return before
        return with_hooks(self.text, [], self.agent) if self.ours else self.text

    def write(self, text: str | None, backup: str | None) -> None:
        """Put a text in place of the file (None: remove it), and beside it what it was before."""
        folder = os.path.dirname(self.path)
        for place in filter(os.path.exists, (self.path, folder)):  # a rename would not mind the file's mode
            if not (os.stat(place).st_mode & 0o222 and os.access(place, os.W_OK)):
                raise invalid(f"{place} is read-only; nothing was changed")
        try:
            os.makedirs(folder, exist_ok=True)
            mode = os.stat(self.path).st_mode & 0o7777 if self.text is not None else 0o644
            steps = ((self.backup, backup), (self.path, text))
            for path, whole in sorted(steps, key=lambda step: step[1] is None):  # nothing goes too early
                if whole is None:
                    Path(path).unlink(missing_ok=True)
                    continue
                with new_file(path, mode) as file:
                    file.write(whole.encode())
        except OSError as error:
            raise invalid(f"cannot write {self.path}: {error.strerror}") from None


@contextlib.contextmanager
def new_file(path: str, mode: int = 0o600) -> Iterator[io.BufferedWriter]:
    """A file to write: it takes its place at once, whole and for good, or leaves nothing behind."""
    partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def check_hooks(agent: str, project: bool, seconds: int = 20) -> dict[str, Any]:
    """What a settings file holds of us: events, server, and whether that is what we would install now."""
    row: dict[str, Any] = {"agent": agent, "installed": False, "file": hook_path(agent, project)}
    try:
        file = HookFile(agent, project)
        row["installed"] = bool(file.ours)
        if not file.ours:
            return {} if project else row
        version, written = agent_version(agent, seconds), json.dumps(file.ours)
        found = re.search(r"_s:=(.*?)\}|\"url\": \"(.*?)/api/hooks/", written)
        server = found[1] or found[2] if found else CLIENT_SETTINGS[0].default
        wanted = wanted_hooks(agent, server, version or "999.0", '"type": "http"' in written)
    except Problem as problem:
        return row | {"problem": problem.message}
    row |= {"version": version, "events": [event for event, _ in file.ours], "server": server}
    same = all(hook in wanted for hook in file.ours) and (not version or len(file.ours) == len(wanted))
    old = f"old hooks in {file.name}; type: monitor hooks install {agent}{' --project' * project}"
    return row if same else row | {"problem": old}


def check_agents(agents: Iterable[str], seconds: int = 20) -> list[dict[str, Any]]:
    """What a check finds of agents, for the user and in this repository; at home, both files are one."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(2 * len(AGENTS)) as pool:  # some agents take seconds to tell their version
        pairs = itertools.product(agents, (False, True))
        found = pool.map(lambda pair: check_hooks(*pair, seconds), pairs)
        return list({row["file"]: row for row in found if row}.values())


# What templates/hook.sh does, for shells without curl.


def request(server: str, token: str, method: str, path: str, body=None, headers=None, seconds: float = 30):
    """Send a request, on a connection of its own; returns the response, whatever it is. It knows neither
    proxies (they would get what is for 127.0.0.1) nor ~/.netrc (it would replace our token), and follows no
    redirect."""
    import http.client  # here: --help needs none
    from urllib.parse import urlsplit

    to = urlsplit(server)
    kind = http.client.HTTPSConnection if to.scheme == "https" else http.client.HTTPConnection
    connection = kind(to.hostname, to.port, timeout=min(5, seconds))
    headers = (headers or {}) | {"Connection": "close"}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.connect()
        connection.sock.settimeout(seconds)
        connection.request(method, to.path + path, body, headers)
        response = connection.getresponse()
    except BaseException:
        connection.close()
        raise
    if connection.sock:
        connection.sock.close()  # in earnest when the response is closed, or read to its end
    return response


def background(work: Callable, *given: Any) -> threading.Thread:
    """A thread that works, until we end at the latest."""
    thread = threading.Thread(target=work, args=given, daemon=True)
    thread.start()
    return thread


def exchange(server: str, token: str, method: str, path: str, body=None, headers=None) -> tuple:
    """Ask within two seconds in all; status (0: no answer), body of a GET, Date."""
    import http.client

    answered: list[tuple[int, bytes, str]] = [(0, b"", "")]

    def ask() -> None:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            with request(server, token, method, path, body, headers, HOOK_SECONDS) as response:
                whole = response.read(MAX_BODY) if method == "GET" else b""
                answered[0] = response.status, whole, response.getheader("Date", "")

    background(ask).join(HOOK_SECONDS)
    return answered[0]


def post_spooled(server: str, token: str, event: bytes = b"") -> int:
    """Post an event of the spool; the status, 0 without an answer. To no event at all Monitor says 400."""
    headers = {"Content-Type": "application/vnd.monitor.hook"}
    return exchange(server, token, "POST", "/api/hooks/spooled", event, headers)[0]


def trouble_of(server: str, status: int, told: Any = None) -> Problem:
    """Why a server did not do what it was asked, from the status (0: none) and JSON that it answered."""
    if status == 0:
        here = re.fullmatch(r"http://((?:127\.0\.0\.1|localhost):\d+)", server)
        usual = not here or server == CLIENT_SETTINGS[0].default
        start = "monitor serve" if usual else f"monitor serve --bind {here[1]}"
        return Problem("unreachable", f"no server at {server}; start one with: {start}")
    told = told if isinstance(told, dict) and isinstance(told.get("message"), str) else {}
    if 200 <= status < 300 or (status != 401 and not told):
        return invalid(f"{server} does not answer like Monitor (status {status}); is it, and up to date?")
    hint = "; set MONITOR_TOKEN or give --token" if status == 401 else ""
    code = told.get("error", "unauthorized")
    return Problem(str(code), told.get("message", f"{server} wants another token") + hint)


def spool_head(agent: str, event: str, task: str, key: str) -> bytes:
    """What stands before the payload in a spooled file."""
    return f"agent: {agent}\nevent: {event}\ntask: {task}\ntime: {timestamp()}\nkey: {key}\n\n".encode()


def keep_event(server: str, key: str, event: bytes) -> str | None:
    """Keep an event in the spool of a server; the file, None where there is no room."""
    folder = spool_folder(server)
    if not folder or len(spooled(folder)) >= MAX_SPOOLED:
        return None
    os.umask(0o077)
    os.makedirs(folder, exist_ok=True)
    with new_file(f"{folder}/{key}.hook") as file:
        file.write(event)
    return f"{folder}/{key}.hook"


def send_hook(server: str, token: str, agent: str, event: str, body: bytes) -> bool:
    """Post a payload, or keep it in the spool; whether it is now time to empty the spool."""
    key, task = str(uuid.uuid4()), " ".join(os.environ.get("MONITOR_TASK_ID", "").split())
    headers = {"Content-Type": "application/json", "X-Monitor-Task": task, "Idempotency-Key": key}
    path = f"/api/hooks/{agent}?event={quoted(event)}" if event else f"/api/hooks/{agent}"
    status = exchange(server, token, "POST", path, body, headers)[0]
    if status in UNTAKEN:
        keep_event(server, key, spool_head(agent, event, task, key) + body)
    return bool(200 <= status < 300 and spooled(spool_folder(server)))


def flush_spool(server: str, token: str) -> tuple[int, int, int]:
    """Send what is in the spool, oldest first, until nobody takes it: (sent, refused, last status)."""
    sent = refused = status = 0
    for path in spooled(spool_folder(server)):
        with contextlib.suppress(FileNotFoundError):  # somebody else has sent it
            status = post_spooled(server, token, Path(path).read_bytes())
            if status in UNTAKEN or 300 <= status < 400:  # a redirect: not Monitor
                break
            os.unlink(path)
            sent, refused = sent + (status < 300), refused + (status >= 400)
    return sent, refused, status


# ======================================================================================================
# doctor: what is wrong here, and the command that mends it; it changes nothing
# ======================================================================================================

FINDINGS = json.loads(asset("templates", "doctor.json"))  # by check: how bad, when, sentence, what mends it
PACKAGES = {"flask": "3.1.3", "werkzeug": "3.1.6", "wsproto": "1.2", "click": "8.2", "gevent": "25.4.1"}
FREE_BYTES, WAL_BYTES, SKEW_SECONDS = 100 * 1024 * 1024, 256 * 1024 * 1024, 5
Facts = Iterator[tuple[str, dict[str, Any]]]  # a check of FINDINGS, and what holds there


def json_of(raw: bytes) -> dict[str, Any]:
    """The JSON object in an answer; an empty one where there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(raw)
        return value if isinstance(value, dict) else {}
    return {}


def server_facts(server: str, token: str, health: dict[str, Any]) -> Facts:
    """Who answers, whether they let us in, and what time it is there; what they say goes into `health`."""
    from email.utils import parsedate_to_datetime

    status, body, date = exchange(server, token, "GET", "/health")
    ours = json_of(body).get("status") == "ok"
    health |= json_of(exchange(server, token, "GET", "/health?full=1")[1]) if ours else {}
    facts = {"server": server, "status": status, "off": not status, "foreign": not ours, "ours": __version__}
    facts |= {"version": "?", "writer": "ok", "seq": "?"} | health
    facts |= {"sick": facts["writer"] != "ok", "other": facts["version"] not in ("?", __version__)}
    facts["shut"] = "version" not in health
    yield "server", facts
    if ours:
        yield "token", facts | {"refused": "version" not in health or post_spooled(server, token) != 400}
        with contextlib.suppress(ValueError, TypeError):
            seconds = abs(parsedate_to_datetime(date).timestamp() - time.time())
            yield "clock", {"seconds": seconds, "skewed": seconds > SKEW_SECONDS}


def database_facts(path: str, served: bool) -> Facts:
    """The file and its disk. One that was not closed is left alone where no server has it open: to read it
    would change it."""
    size, wal = (os.path.getsize(each) if os.path.exists(each) else 0 for each in (path, f"{path}-wal"))
    none, left = not os.path.exists(path), wal and not served
    facts: dict[str, Any] = {"path": path, "size": size, "wal": wal, "none": none, "left": left}
    if not none and not left:
        try:
            found = quick_check(path, HOOK_SECONDS) if stored_version(path) else "ok"
            facts |= {"broken": found if found != "ok" else "", "slow": not found}
        except Problem as problem:
            facts["odd"] = problem.message
    facts |= {"open": size and os.stat(path).st_mode & 0o077, "grown": wal > WAL_BYTES}
    yield "database", facts
    folder = os.path.dirname(path)
    if os.path.isdir(folder):
        free = shutil.disk_usage(folder).free
        yield "disk", {"path": path, "free": free, "full": free < FREE_BYTES, "low": free < size}


def version_facts(sqlite: str) -> Facts:
    """Python, SQLite and the packages."""
    from importlib import metadata

    python = {"python": sys.version.split()[0], "executable": sys.executable}
    yield "python", python
    number = version_key(sqlite)
    yield "sqlite", {"version": sqlite, "old": number < (3, 37), "reset": number < (3, 51, 3)}
    for name, least in PACKAGES.items():
        missing, version = importlib.util.find_spec(name.replace("-", "_")) is None, ""
        with contextlib.suppress(metadata.PackageNotFoundError):  # in a zip a package has none
            version = metadata.version(name)
        facts = {"name": name, "least": least, "version": version, "wanted": f"{name}>={least}"}
        facts |= {"missing": missing, "gevent": missing and name == "gevent"}
        yield "packages", python | facts | {"old": version and version_key(version) < version_key(least)}


def hook_facts(server: str) -> Facts:
    """The hooks of each agent, for the user and in this repository."""
    found = check_agents(AGENTS, HOOK_SECONDS)
    rows = [row for row in found if row["installed"] or "problem" in row]
    for row in rows:
        flags = ["--project"] * (row["file"] != hook_path(row["agent"], project=False))
        facts = {"install": [row["agent"], *flags], "count": len(row.get("events", ())), "asked": server}
        yield "hooks", row | facts | {"elsewhere": row.get("server", server) != server}
    if not rows:
        yield "hooks", {"none": True}


def folder_facts(server: str) -> Facts:
    """What waits in the spool, and who can read what is kept for the user."""
    folder, home = spool_folder(server), os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    place, waiting = Path(folder or "/"), spooled(folder)
    there = next(filter(os.path.exists, (place, *place.parents)))
    facts = {"off": folder is None, "folder": folder, "there": there, "waiting": len(waiting)}
    facts |= {"closed": not os.access(there, os.W_OK | os.X_OK), "full": len(waiting) >= MAX_SPOOLED}
    with contextlib.suppress(OSError, IndexError):
        oldest = datetime.datetime.fromtimestamp(os.path.getmtime(waiting[0]), datetime.UTC)
        facts["oldest"] = age(timestamp(oldest))
    yield "spool", facts
    for path in filter(os.path.exists, (f"{home}/monitor/config.toml", folder or "")):
        yield "rights", {"path": path, "wide": os.stat(path).st_mode & 0o077}


def all_facts(server: str, token: str, database: str | None) -> Facts:
    """All that a doctor looks at; of the databases that which is named, which a server on this machine has
    open, or, where none answers, that of the settings: not for a server that is not theirs."""
    health: dict[str, Any] = {}
    yield from server_facts(server, token, health)
    try:
        config, asked = Config.load({"MONITOR_DB": database}), database is None and bool(health)
        named = database or os.environ.get("MONITOR_DB") or server.endswith(f":{config.port}")
        path = config.database if named else None
        if asked:
            near = re.match(r"https?://(localhost|127\.|\[::1\])", server)
            path = health["database"] if near and os.path.exists(str(health.get("database"))) else None
        yield from database_facts(os.path.abspath(path), asked) if path else ()
    except Problem as problem:
        yield "settings", {"problem": problem.message}
    yield from version_facts(str(health.get("sqlite_version", sqlite3.sqlite_version)))
    yield from hook_facts(server)
    yield from folder_facts(server)


def findings(facts: Facts) -> Iterator[dict[str, str]]:
    """Of each check the first row of FINDINGS that holds: how bad it is, a sentence, what mends it."""
    for check, told in facts:
        level, _, sentence, mend = next(row for row in FINDINGS[check] if not row[1] or told.get(row[1]))
        finding = {"check": check, "level": level, "message": sentence.format(**told)}
        lists = {name: value if isinstance(value, list) else [value] for name, value in told.items()}
        words = {name: shlex.join(map(str, value)) for name, value in lists.items()}
        yield finding | ({"mend": mend.format(**words)} if mend else {})


# ======================================================================================================
# client: settings of the client and where they come from; asking the server
# ======================================================================================================

EXIT_CODES = {
    "not_found": 3,
    "conflict": 3,
    "unauthorized": 4,
    "unreachable": 5,
    "distrusted": 5,
    "pending": 8,
}
# What agents set for the commands that they run, where it is known to be the session of their hooks: not
# COPILOT_AGENT_SESSION_ID, which only some versions set, and nothing of Gemini's and Cursor's.
RUN_VARIABLES = {"claude": "CLAUDE_CODE_SESSION_ID", "codex": "CODEX_THREAD_ID"}
VARIABLES = {name.removeprefix("MONITOR_").lower(): name for name, *_ in CLIENT_SETTINGS}
VARIABLES |= {"task": "MONITOR_TASK_ID"}
SETTING_WORDS = {"output": ("json", "plain", "table"), "color": ("auto", "always", "never")}
PROJECT_FILE, PROJECT_KEYS = ".monitor.toml", ("task", "workstream", "server")
THIS_MACHINE = r"https?://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]+)?(/.*)?"
USER_KEYS = ("server", "servers", "token", "token_file", "output", "color")


def quiet() -> bool:
    """Whether --quiet stands on the command line, also on one that cannot be parsed. Behind -- it is meant
    for somebody else."""
    ours = itertools.takewhile("--".__ne__, sys.argv[1:])
    return not {"--quiet", "--silent"}.isdisjoint(ours)


def plain(text: str) -> str:
    """Text for a terminal: control and bidi characters replaced, so that stored text cannot steer it."""
    odd = r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
    return re.sub(odd, "\ufffd", text)


def notice(text: str) -> None:
    """Tell something beside the output."""
    if not quiet():
        click.echo(f"monitor: {plain(text)}", err=True)


def failure(problem: Problem) -> click.ClickException:
    """A Problem as an error of click's, with its exit status."""
    failed = click.ClickException(plain(problem.message))
    failed.exit_code = EXIT_CODES.get(problem.code, 1)
    return failed


def user_file() -> str:
    """Where the user's own settings stand."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{folder}/monitor/config.toml"


def project_file() -> str | None:
    """The settings of the project that we are in: the first such file upward, if it is not another user's."""
    with contextlib.suppress(OSError):
        found = (folder / PROJECT_FILE for folder in (Path.cwd(), *Path.cwd().parents))
        path = next(filter(Path.is_file, found), None)
        return str(path) if path and path.stat().st_uid in (0, os.geteuid()) else None
    return None


def read_settings(path: str, known: tuple[str, ...]) -> dict[str, Any]:
    """What a settings file says; a usage error for what makes no sense in it."""
    text = read_small(path)
    if not text.strip():
        return {}
    import tomllib  # here: most people have no such file

    try:
        found = tomllib.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{path} is not TOML: {error}") from None
    for key, value in found.items():
        if key in USER_KEYS and key not in known:
            raise click.UsageError(f"{path}: {key} does not belong there; put it into {user_file()}")
        if key not in known or not isinstance(value, list if key == "servers" else str | int):
            raise click.UsageError(f"{path}: {key} makes no sense; it takes {', '.join(known)}")
    return {key: value if key == "servers" else str(value) for key, value in found.items()}


def setting_layers(project: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings of the client by where they come from, the strongest first."""
    options = click.get_current_context().meta
    yield "option", {key: options.get(f"monitor.{name}") for key, name in VARIABLES.items()}
    yield "environment", {key: os.environ.get(name) for key, name in VARIABLES.items()}
    runs = [f"{agent}:{os.environ[name]}" for agent, name in RUN_VARIABLES.items() if os.environ.get(name)]
    yield "the agent's run", {"task": runs[0] if runs else None}
    if project and (path := project_file()):
        yield path, read_settings(path, PROJECT_KEYS)
    yield user_file(), read_settings(user_file(), USER_KEYS)
    yield "default", {"server": CLIENT_SETTINGS[0].default, "color": "auto"}


def setting(*keys: str, project: bool = True) -> tuple[str | None, str, str]:
    """The strongest of some settings: its value, which it is, and where it comes from."""
    for place, values in setting_layers(project):
        for key in keys:
            if value := values.get(key):
                words = SETTING_WORDS.get(key)
                if words and value not in words:
                    raise click.UsageError(f"{key} ({place}) must be {', '.join(words[:-1])} or {words[-1]}")
                return value, key, place
    return None, keys[0], "nowhere"


def read_token(project: bool = True) -> tuple[str, str]:
    """The token, and where it comes from; from a file where one is named."""
    token, key, place = setting("token", "token_file", project=project)
    if key == "token_file" and token:
        path = os.path.join(os.path.dirname(place), os.path.expanduser(token))
        try:
            token = Path(path).read_text("ascii").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII"
            raise click.UsageError(f"cannot read the token in {path}: {reason}") from None
    return token or "", place


def target(project: bool = True) -> tuple[str, str]:
    """Server and token of the current command line. A project's file may have come with a repository: it
    names only servers on this machine or in the user's own file. A token goes only where it belongs: that
    of the user's file to the servers there, that of the environment not to a server of a project's file."""
    for key in SETTING_WORDS if project else ():
        setting(key)  # a wrong word is told before anything is stored
    server, _, named_by = setting("server", project=project)
    if not re.fullmatch(r"https?://[^\s/]\S*", server):
        raise click.UsageError(f"{server!r} is no server's address; one looks like http://127.0.0.1:3000")
    server, mine = server.removesuffix("/"), read_settings(user_file(), USER_KEYS)
    known = [mine.get("server", CLIENT_SETTINGS[0].default), *mine.get("servers", [])]
    ours, from_project = server in [str(each).removesuffix("/") for each in known], named_by == project_file()
    if from_project and not ours and not re.fullmatch(THIS_MACHINE, server):
        hint = f"add it to servers in {user_file()}, if you trust it"
        raise click.UsageError(f"{named_by} names {server}, which is none of yours; {hint}")
    token, place = read_token(project)
    sent = ours or place == "option" or (place == "environment" and not from_project)
    return server, token if sent else ""


def current_task(given: str | None = None) -> str | None:
    """The task that a command is about: the one that is named, else MONITOR_TASK_ID, else that of the agent's
    run that we are in, as claude:SESSION, else the project's; None: there is none."""
    found = given or setting("task")[0]
    return found and task_name(found)


def filled(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, without what was not."""
    return {name: value for name, value in given.items() if value not in (None, ())}


def ask(server: str, token: str, method: str, path: str, given=None, seconds=30, whole=True) -> Any:
    """Make a request of the API; returns the JSON object that answers it, or without `whole` the response.
    Problem for any other answer."""
    import http.client
    from urllib.parse import urlencode

    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise click.UsageError("the token holds characters that cannot be sent; see MONITOR_TOKEN")
    body, headers, lines = None, {}, isinstance(given, bytes)
    if method != "GET" and given is not None:
        body = given if lines else dump(given)
        headers = {"Content-Type": LINES_TYPE if lines else "application/json"}
    try:
        query = urlencode(filled(given), doseq=True) if given and method == "GET" else ""
        response = request(server, token, method, f"{path}?{query}".rstrip("?"), body, headers, seconds)
        taken = 200 <= response.status < 300
        if taken and not whole:
            return response
        with response:
            told = json_of(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        if distrust := getattr(error, "verify_message", ""):  # of the ssl module: an OSError and a ValueError
            told = f"the certificate of {server} is not trusted ({distrust})"
            raise Problem("distrusted", f"{told}; name who issued it in SSL_CERT_FILE") from None
        lost = isinstance(error, OSError)  # some of these are HTTPExceptions, too
        raise trouble_of(server, 0) if lost else invalid(f"cannot ask {server}: {error}") from None
    if taken and told:
        return told
    raise trouble_of(server, response.status, told)


def expect(told: dict[str, Any], **shape: type) -> dict[str, Any]:
    """An answer that has these members; Problem where it has not."""
    if all(isinstance(told.get(name), kind) for name, kind in shape.items()):
        return told
    raise trouble_of(target()[0], 200)


def items_of(path: str, given: dict[str, Any] | None = None, seconds: float = 30) -> list[Any]:
    """The items of a list of the API."""
    return expect(ask(*target(), "GET", path, given, seconds), items=list)["items"]


def task_name(text: str) -> str:
    """A task as it is named on the command line, for the API: #12 is its number, @last the task that was
    created, changed or written to from here before."""
    if text != "@last":
        return text.removeprefix("#")
    with contextlib.suppress(OSError):
        if found := re.fullmatch("[0-9a-f-]{36}", read_small(state_path("last", target()[0])).strip()):
            return found[0]
    raise failure(Problem("not_found", "there is no last task here yet; see: monitor task list"))


# ======================================================================================================
# cli: options and output
# ======================================================================================================

LONG_SECONDS = 3600  # how long an administrator's command waits for an answer
OPTION_NAMES = {"hidden": "--hidden/--no-hidden", "summary_text": "--summary", "task_id": "--task"}
OPTION_NAMES |= {"workstream_id": "--workstream", "wait_for": "--for"}
COLOURS = {"blocked": "magenta", "failed": "red", "error": "red", "stuck": "yellow", "warn": "yellow"}
LEAST_COLUMN = 8
EXAMPLES, OPTIONS, VIEWS = (
    json.loads(asset("templates", f"{name}.json")) for name in ("examples", "options", "views")
)


def checked(read: Callable, *given: Any) -> Any:
    """The value of an option as the API reads it; click says what is wrong with it."""
    try:
        return read(*given)
    except Problem as problem:
        raise click.BadParameter(problem.message.replace("the body", "it")) from None


def complete(kind: str, context: click.Context, parameter: click.Parameter, begun: str) -> list[Any]:
    """What can stand for a task or workstream, for a shell's completion; nothing where no server answers."""
    from click.shell_completion import CompletionItem

    with contextlib.suppress(Exception), context.scope(cleanup=False):
        rows = items_of(f"/api/{kind}s", seconds=1)
        pairs = ((str(row.get("number", row["id"])), plain(row["name"])) for row in rows)
        return [CompletionItem(id, help=name) for id, name in pairs if id.startswith(begun)]
    return []


def project_workstream(context: click.Context, parameter: click.Parameter, given: str | None) -> str:
    """The workstream that is named, else the project's."""
    if found := given or setting("workstream")[0]:
        return found
    raise click.MissingParameter(ctx=context, param=parameter)


def field_option(name: str, field: Field) -> click.Parameter:
    """The command line's option for a field of the API; a name that must be given is an argument."""
    if field.required and name == "name":
        return click.Argument([name])
    settings = OPTION_KINDS[field.kind](field) if field.kind in OPTION_KINDS else {}
    settings |= {"required": field.required} | LIKE.get(name, {})
    if field.required and name == "workstream_id":
        settings |= {"required": False, "callback": project_workstream, "show_default": PROJECT_FILE}
    option = OPTION_NAMES.get(name, "--" + name.replace("_", "-"))
    return click.Option([option, name], help=field.text, **settings)


def setting_option(setting: Setting, note: str = "", **more: Any) -> click.Option:
    """The option of a setting: --bind for MONITOR_BIND."""
    option = "--" + setting.name.removeprefix("MONITOR_").lower().replace("_", "-")
    return click.Option([option, setting.name], help=f"{setting.help} [{setting.name}{note}]", **more)


def remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Keep a global option for the whole command line, wherever it stood; --json is one of MONITOR_OUTPUT."""
    name, kept = (parameter.name, value) if parameter.name.isupper() else ("MONITOR_OUTPUT", parameter.name)
    context.meta.update({f"monitor.{name}": kept} if value else {})


def described(name: str, names: list[str] | None = None, like: str = "", **settings: Any) -> click.Parameter:
    """The option that a row of options.json describes; an argument where its name has no dashes."""
    names, settings = names or ["--" + name.replace("_", "-")], settings | LIKE.get(like, {})
    if words := settings.pop("words", None):
        settings["type"] = click.Choice(words)
    return (click.Option if names[0].startswith("-") else click.Argument)(names, **settings)


LIKE = {  # what parameters have in common
    "agent": {"type": click.Choice(AGENTS)},
    "kept": {"callback": remember, "expose_value": False, "is_eager": True},  # others may ask the server
    "phrase": {"callback": lambda context, parameter, words: " ".join(words)},
    "seq": {"type": int},
    "task": {"metavar": "TASK", "type": task_name, "shell_complete": functools.partial(complete, "task")},
    "workstream": {"metavar": "ID", "shell_complete": functools.partial(complete, "workstream")},
}
LIKE |= {"task_id": LIKE["task"] | {"metavar": "ID"}, "workstream_id": LIKE["workstream"]}
OPTION_KINDS = {  # by the kind of a field
    "any": lambda field: {"type": lambda text: checked(parse_json, os.fsencode(text)), "metavar": "JSON"},
    "choice": lambda field: {"type": click.Choice(field.schema["enum"])},
    "flag": lambda field: {"is_flag": True, "default": None},
    "number": lambda field: {"type": click.IntRange(field.schema["minimum"], field.schema.get("maximum"))},
    "tags": lambda field: {"type": split_list, "metavar": "A,B"},
    "words": lambda field: {
        "type": lambda text: ",".join(checked(field.check, text, "it")),
        "metavar": "A,B",
    },
}
PARAMETERS = {each.name: setting_option(each, f"; {each.default or 'none'}") for each in SETTINGS}
PARAMETERS |= {name: described(name, **row) for name, row in OPTIONS.items()}
SHOWN_SETTINGS = (each for each in CLIENT_SETTINGS if each.name != "MONITOR_OUTPUT")
GLOBAL_OPTIONS = [setting_option(each, **LIKE["kept"]) for each in SHOWN_SETTINGS]
GLOBAL_OPTIONS += [PARAMETERS[name] for name in ("json", "plain", "table", "quiet")]
GROUPS = (
    click.Group("workstream", params=GLOBAL_OPTIONS, help="Make, list and change workstreams."),
    click.Group("task", params=GLOBAL_OPTIONS, help="Make, list, show and change tasks."),
    click.Group("update", params=GLOBAL_OPTIONS, help="Add updates to tasks, or wipe one."),
    click.Group("session", params=GLOBAL_OPTIONS, help="List the runs of agents, or move one."),
    click.Group("hooks", params=GLOBAL_OPTIONS, help="Plug coding agents in: their runs appear as tasks."),
)
HELP_OPTIONS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(commands=GROUPS, params=list(GLOBAL_OPTIONS), context_settings=HELP_OPTIONS)
@click.version_option(__version__, message="monitor %(version)s")
def cli() -> None:
    """Monitor: what is going on, what is stuck, which agent waits for you.

    \b
      monitor demo     look at it with a recorded story
      monitor serve    start a server, then open the address that it prints
      monitor status   who needs you, and what goes on
    """


@contextlib.contextmanager
def file_errors(doing: str) -> Iterator[None]:
    """What goes wrong with files meanwhile, as a Problem."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise invalid(f"cannot {doing}: {error.strerror or error}") from None


class Command(click.Command):
    """A command that tells a Problem, or that it cannot write, as click tells an error."""

    def invoke(self, context: click.Context) -> None:
        """Run it."""
        try:
            with file_errors("write"):
                super().invoke(context)
        except Problem as problem:
            raise failure(problem) from None


def command(words: str, names: str = "", fields: Fields | None = None) -> Callable:
    """Make the command of these words of a function: with the PARAMETERS of these names and an option a
    field; the docstring is its help, and EXAMPLES has its example."""
    *group, name = words.split()
    params = [PARAMETERS[parameter] for parameter in names.split()]
    params += [field_option(*item) for item in (fields or {}).items()] + GLOBAL_OPTIONS
    shown = {"epilog": f"\b\nExample:\n  {EXAMPLES[words]}"} if words in EXAMPLES else {}

    def register(function: Callable) -> Callable:
        made = Command(name, params=params, callback=function, help=function.__doc__, **shown)
        (cli.commands[group[0]] if group else cli).add_command(made)
        return function

    return register


def output_style() -> str:
    """How to print: json, plain or table."""
    return setting("output")[0] or ("table" if sys.stdout.isatty() else "json")


def coloured() -> bool:
    """Whether to print in colour: an option or the user's file goes before the variables."""
    wanted = setting("color")[0]
    forced = os.environ.get("CLICOLOR_FORCE", "0") not in ("", "0")
    dull = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty()
    return wanted == "always" or (wanted == "auto" and (forced or not dull))


def view_of(row: dict[str, Any]) -> dict[str, Any]:
    """How an object is shown: the first view that fits what it has, else as a list of its own keys."""
    keys = [key for key, value in row.items() if not isinstance(value, dict) and not listed(value)]
    own = {"columns": [[key, key] for key in keys]}
    return next((view for view in VIEWS if all(key in row for key in view["has"])), own)


SHOWN = {  # how people read values of some kind
    "age": age,
    "id": lambda text: text[:8],
    "number": "#{}".format,
    "who": lambda text: text.partition(":")[0],
}


def cell(row: dict[str, Any], paths: str, kind: str = "") -> str:
    """The first value that an object has at one of some paths (`attention.state status`), as text in a line;
    of a kind of SHOWN, as people read that."""
    found = (dig(row, *path.split("."), kind=object) for path in paths.split())
    value = next((each for each in found if each not in (None, "", [])), None)
    if isinstance(value, list):
        parts = [each.values() if isinstance(each, dict) else [each] for each in value]
        value = ", ".join(" ".join(map(str, part)) for part in parts)
    text = value if isinstance(value, str) else "" if value is None else dump(value)
    with contextlib.suppress(ValueError):  # a time that is none
        text = SHOWN.get(kind, str)(text) if text else ""
    return plain(" ".join(text.split()))


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from unicodedata import category, east_asian_width

    shown = [each for each in text if category(each) not in ("Mn", "Me", "Cf")]
    return len(shown) + sum(east_asian_width(each) in "WF" for each in shown)


def painted(text: str, width: int) -> str:
    """A text in so many columns, cut with an ellipsis or padded, in the colour that its word has."""
    shown = text[: width + 1]
    while columns_of(shown) > width:
        shown = shown.rstrip("…")[:-1] + "…"
    padding = " " * (width - columns_of(shown))
    return (click.style(shown, fg=COLOURS[text]) if text in COLOURS else shown) + padding


def table_lines(rows: list[dict[str, Any]], head: bool = True) -> list[str]:
    """Objects as a table as wide as the terminal: the widest columns give way, empty ones are left out."""
    columns, room = view_of(rows[0])["columns"], shutil.get_terminal_size().columns
    made = [(name.upper(), [cell(row, *how) for row in rows]) for name, *how in columns if how[-1] != "-"]
    made = [[name, *column] if head else column for name, column in made if any(column)]
    widths = [max(columns_of(text[: room + 1]) for text in column) for column in made]
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > LEAST_COLUMN:
        widths[widths.index(max(widths))] -= 1
    texts = [[painted(text, width) for text in column] for column, width in zip(made, widths, strict=True)]
    return ["  ".join(line).rstrip() for line in zip(*texts, strict=True)]


def listed(value: Any) -> list[dict[str, Any]]:
    """The objects in a list; none in what is no list of objects."""
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def block_lines(told: dict[str, Any]) -> list[str]:
    """An object as a block: a fact a line, then tables of what it has lists of."""
    view = view_of(told)
    if "facts" not in view and "has" in view:
        return table_lines([told], head=False)
    facts = [(name, cell(told, *how)) for name, *how in view.get("facts", view["columns"])]
    wide = max(map(len, dict(facts)), default=0)
    lines = [f"{name:{wide}}  {painted(text, columns_of(text))}" for name, text in facts if text]
    for key in view.get("tables", told):
        rows = [{name: each[name] for name in each if name != "task_id"} for each in listed(told.get(key))]
        lines += ["", *table_lines(rows)] if rows else []
    return lines


def task_numbers(ids: set[str]) -> dict[str, str]:
    """The numbers of tasks, as #12, by their ids."""
    with contextlib.suppress(Problem):
        paths = [f"/{id}" for id in ids] if len(ids) < 10 else ["?include_hidden=1&include_archived=1"]
        answers = [ask(*target(), "GET", f"/api/tasks{path}") for path in paths]
        tasks = [task for told in answers for task in told.get("items", [told])]
        return {task["id"]: f"#{task['number']}" for task in tasks}
    return {}


def numbered(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Objects with the number of the task that they are of."""
    numbers = task_numbers({row["task_id"] for row in rows if "task_id" in row})
    return [row | {"task": numbers.get(row.get("task_id"), "")} for row in rows]


def record(row: dict[str, Any]) -> str:
    """An object as one line of a few values, tab separated."""
    return "\t".join(cell(row, path) for _, path, *_ in view_of(row)["columns"])


def answer_lines(told: dict[str, Any], style: str) -> list[str]:
    """An answer as lines, in a style that is not JSON."""
    rows = listed(told.get("items"))
    if style == "plain":
        pairs = [f"{key}\t{cell(told, key)}" for key in told]
        return [record(row) for row in rows] or ([record(told)] if "has" in view_of(told) else pairs)
    if "items" in told:
        return table_lines(numbered(rows)) if rows else ["nothing found"]
    return block_lines(numbered([told])[0])


def show(told: dict[str, Any]) -> None:
    """Print an answer: as indented JSON, or in the style that is wanted."""
    style = output_style()
    print_lines([json.dumps(told, indent=2)] if style == "json" else answer_lines(told, style))


def print_lines(lines: Iterable[str], colour: bool | None = None, end: bool = True) -> None:
    """Print lines as they come; what the terminal cannot show is replaced."""
    colour = coloured() if colour is None else colour
    with contextlib.suppress(AttributeError):  # of a test's output
        sys.stdout.reconfigure(errors="replace")
    for line in lines if not quiet() else ():
        click.echo(line, nl=end, color=colour)


def print_text(text: str) -> None:
    """Print a text as it is, whatever the settings are."""
    print_lines([text], colour=False, end=False)


def stored(told: dict[str, Any]) -> None:
    """Show what was stored, and keep which task it is about, for @last; not what an agent does."""
    task = told.get("task_id", told.get("id") if "workstream_id" in told else None)
    if task and not any(map(os.environ.get, RUN_VARIABLES.values())):
        with contextlib.suppress(OSError):
            path = Path(state_path("last", target()[0]))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(task)
    show(told)


def is_there() -> bool:
    """Whether a server answers; Problem where something else does, or one whom we cannot trust."""
    try:
        ask(*target(), "GET", "/health", seconds=HOOK_SECONDS)
    except Problem as problem:
        if problem.code != "unreachable":
            raise
        return False
    return True


@contextlib.contextmanager
def server_for(database: str | None, at_rest: bool = True) -> Iterator[Callable]:
    """What asks the server at --server or, where none answers or a file is named, a database at rest: this
    process serves it for as long as the command takes, behind a token that nobody knows."""
    if not at_rest or (database is None and is_there()):
        yield functools.partial(ask, *target())
        return
    if database is None and setting("server")[2] == "option":
        raise trouble_of(target()[0], 0)
    token = secrets.token_hex()
    names = {"MONITOR_DB": database, "MONITOR_BIND": "127.0.0.1:0", "MONITOR_API_TOKENS": token}
    config = dataclasses.replace(Config.load(names), tended=False)
    if not os.path.exists(config.database or ""):
        here = f"no server at {target()[0]}, and no database at {config.database}"
        raise invalid(f"{here}; name it with --db")
    app = create_app(config)
    app.extensions["monitor"].open()
    listener = listen(config.host, config.port)
    start, stop = thread_server(listener, app, False)
    threading.Thread(target=start, daemon=True).start()
    try:
        yield functools.partial(ask, f"http://127.0.0.1:{listener.getsockname()[1]}", token)
    finally:
        stop()
        app.extensions["monitor"].close()


def api_command(words: str, request: str, names: str, fields: Fields, text: str) -> None:
    """Make a command of an API request; the fields of its body or query are options."""
    (method, path), at_rest = request.split(), "database" in names
    shape = {"items": list, "total": int} if method == "GET" else {"id": str}

    def call(database: str | None = None, **given: Any) -> None:
        named = {name: quoted(str(given.pop(name))) for name in re.findall(r"\{(\w+)", path)}
        with server_for(database, at_rest) as server:
            told = server(method, path.format(**named), filled(given), LONG_SECONDS if at_rest else 30)
        (show if method == "GET" else stored)(expect(told, **shape))

    call.__doc__ = text
    command(words, names, fields)(call)


# ======================================================================================================
# reading: commands that tell how things stand, wait for something and follow the log
# ======================================================================================================

PATIENCE = 30  # seconds that one request waits for something; a stream gives a sign of life every 15
NEEDS = ("blocked", "failed", "stuck", "idle")  # the most urgent first
PASSING = ("unreachable", "unavailable")  # what ends by itself: a server that starts anew
FIRST_TRY, LAST_TRY = 0.1, 10.0  # seconds between two tries to reach a server that was there
AFTER = FIELDS["after_seq"]
PATIENTLY = {"timeout": AFTER._replace(text="Seconds to wait at most.")}
TAIL = {"after": AFTER, "tail": FIELDS["limit"]._replace(text="First so many of the newest.")}


def needs(task: dict[str, Any]) -> str:
    """What a task needs somebody for; "" for nothing."""
    return task.get("attention", {}).get("state", "")


@command("status", "short")
def status(short: bool) -> None:
    """Who needs you, and what goes on. `--short` is a line for a prompt or tmux: empty when nothing goes on,
    silent (status 5) when no server answers."""
    try:
        seconds = 2 if short else PATIENCE
        asking = items_of("/api/tasks", {"attention": ",".join(NEEDS)}, seconds)
        lists = [items_of("/api/tasks", {"status": state}, seconds) for state in ("active", "blocked")]
    except Problem as problem:
        if short:
            sys.exit(EXIT_CODES.get(problem.code, 1))
        raise
    asking.sort(key=lambda task: (NEEDS.index(needs(task)), task["attention"]["since"]))
    others = [task for tasks in lists for task in tasks if not needs(task)]
    if not short:
        return show({"items": asking + others, "total": len(asking + others)})
    counts = Counter(needs(task).replace("blocked", "waiting") for task in asking)
    counts.update(task["status"] for task in others)
    said = [f"{count} {word}" for word, count in counts.items() if count]
    return print_lines([" · ".join(said)] if said else [])


@command("task show", "any_task", fields("limit"))
def show_thread(task: str | None, limit: int | None) -> None:
    """Show TASK (the current one, if you name none) and its newest updates."""
    if (named := current_task(task)) is None:
        raise click.UsageError("name the TASK, or set MONITOR_TASK_ID")
    found = expect(ask(*target(), "GET", f"/api/tasks/{quoted(named)}"), id=str)
    wanted = {"task_id": found["id"], "order": "desc", "limit": limit or 10, "total": "false"}
    show(found | {"updates": items_of("/api/updates", wanted)})


@command("log", "said", fields("task_id level kind tags data"))
def log(message: str | None, task_id: str | None, **given: Any) -> None:
    """Say MESSAGE on the current task. With `-` it comes from standard input. The task is that of --task,
    MONITOR_TASK_ID, the agent's run that says it, or the project's .monitor.toml."""
    if (task := current_task(task_id)) is None:
        raise click.UsageError(f"which task? give --task, or set MONITOR_TASK_ID or task in {PROJECT_FILE}")
    if message is None and sys.stdin.isatty():
        raise click.UsageError("say something: monitor log MESSAGE")
    if message in (None, "-"):
        message = sys.stdin.buffer.read(MAX_BODY).decode("utf-8", "replace").rstrip("\n")
    body = filled(given) | {"task_id": task, "message": message}
    stored(expect(ask(*target(), "POST", "/api/updates/manual", body), id=str))


@command("open", "any_task")
def open_page(task: str | None) -> None:
    """Open a page in a browser: that of TASK, or the dashboard. Without a browser its address is printed."""
    import webbrowser

    server, token = target()
    found = ask(server, token, "GET", f"/api/tasks/{quoted(task)}") if task else None
    page = f"{server}/tasks/{expect(found, id=str)['id']}" if found else f"{server}/dashboard"
    if not webbrowser.open(page):
        print_lines([page])


@command("wait", "one_task", fields("wait_for!") | PATIENTLY)
def wait(task: str, wait_for: str, timeout: int | None) -> None:
    """Wait until TASK has come so far. Its status may be active, blocked, done or cancelled, and it may ask
    for attention as blocked, failed, stuck or idle. Exit status 8: not in time."""
    end = time.monotonic() + (math.inf if timeout is None else timeout)
    found, delay = {"id": task}, FIRST_TRY
    while True:
        # First without patience: is it there?
        left = max(0, min(PATIENCE, end - time.monotonic())) if "status" in found else 0
        asked = {"wait_for": wait_for, "timeout": math.ceil(left)}
        try:
            told = ask(*target(), "GET", f"/api/tasks/{quoted(found['id'])}", asked, left + 10)
            found, delay = expect(told, id=str, status=str), FIRST_TRY
        except Problem as problem:
            if problem.code not in PASSING or "status" not in found:
                raise
            delay = min(2 * delay, LAST_TRY)
        if {found["status"], needs(found)} & set(split_list(wait_for)):
            return show(found)
        if time.monotonic() >= end:
            state = needs(found) or found["status"]
            raise Problem("pending", f"#{found.get('number')} is {state}, and not {wait_for} yet")
        time.sleep(max(0, min(delay, end - time.monotonic())))


def events_in(response: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of a stream, until its end or where the connection was cut within one."""
    for line in itertools.takewhile(lambda line: line.endswith(b"\n"), response):
        if line.strip():  # else it is a sign of life
            yield expect(json_of(line), event=str, data=dict)


def events_after(cursor: int | None, filters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of the log after a cursor (None: from now on). A lost connection is made again, and they go
    on where they were."""
    import http.client

    (server, token), stream, delay, lost = target(), None, FIRST_TRY, False
    while True:
        asked = filters | filled({"format": "ndjson", "after_seq": cursor, "stream": stream})
        try:
            with ask(server, token, "GET", "/api/stream", asked, PATIENCE, whole=False) as response:
                for event in events_in(response):
                    if event["event"] == "hello":
                        stream, delay = event["data"]["stream"], FIRST_TRY
                        cursor = event["data"]["seq"] if cursor is None else cursor
                        if lost:
                            notice(f"connected to {server} again")
                        lost = False
                    if event["event"] == "reset":
                        notice(f"the log does not go on from {cursor} ({event['data']['reason']})")
                    cursor = event.get("id", cursor)
                    yield event
        except Problem as problem:
            if stream is None or problem.code not in PASSING:
                raise
        except (OSError, http.client.HTTPException):
            pass
        if not lost:
            notice(f"lost {server}; trying again")
        lost = True
        time.sleep(delay * random.uniform(0.5, 1))
        delay = min(2 * delay, LAST_TRY)


def event_line(event: dict[str, Any], numbers: dict[str, str]) -> str:
    """An event as a line for people: when, which task, how it stands, who says what."""
    row, task = event["data"], event["data"].get("task_id", "")
    if task and task not in numbers:
        numbers |= {task: task[:8]} | task_numbers({task})
    when = cell(row, "timestamp updated_at")
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.datetime.fromisoformat(when).astimezone().strftime("%H:%M:%S")
    number, who = numbers.get(task) or cell(row, "number", "number"), cell(row, "source", "who")
    state = cell(row, "level attention.state status").removeprefix("info")
    said = cell(row, "message attention.message name reason seq")
    cells = (when, number, state, who or event["event"], said)
    widths = [max(least, columns_of(text)) for text, least in zip(cells, (8, 4, 7, 8), strict=False)]
    widths += [max(LEAST_COLUMN, shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths))]
    return "  ".join(map(painted, cells, widths)).rstrip()


@command("watch", "events", STREAM_FILTER | TAIL)
def watch(events: bool, after: int | None, tail: int | None, **given: Any) -> None:
    """Follow what is said, until Ctrl-C. A restart of the server loses nothing. Piped, each update is a line
    of JSON, as the API has it; with --events each event of the log."""
    if tail and after is not None:
        raise click.UsageError("give one of --tail and --after")
    filters, style, numbers = filled(given), output_style(), {}
    newest = {"order": "desc", "limit": tail, "total": "false"}
    updates = items_of("/api/updates", filters | newest) if tail else []
    if tail:
        after = updates[0]["seq"] if updates else 0
    old = ({"event": "update", "id": update["seq"], "data": update} for update in reversed(updates))
    told = itertools.chain(old, events_after(after, filters))
    line = {
        "json": lambda event: dump(event if events else event["data"]),
        "plain": lambda event: record(event["data"]),
        "table": lambda event: event_line(event, numbers),
    }[style]
    print_lines(line(event) for event in told if events or event["event"] == "update")


@command("config")
def show_config() -> None:
    """Show the settings of the client and where each comes from."""
    (server, sent), (token, place) = target(), read_token()
    hidden = "********" if sent else "******** (not sent to this server)" if token else None
    found = {key: setting(key)[::2] for key in ("server", "task", "workstream", "output", "color")}
    found |= {"server": (server, found["server"][1]), "token": (hidden, place)}
    rows = [{"name": key, "value": value, "from": place} for key, (value, place) in found.items()]
    show({"items": rows, "total": len(rows)})


@command("completion", "shell")
def completion(shell: str) -> None:
    """Print what completes commands and tasks in SHELL."""
    from click.shell_completion import get_completion_class

    print_text(get_completion_class(shell)(cli, {}, "monitor", "_MONITOR_COMPLETE").source() + "\n")


# ======================================================================================================
# run: a command as if nobody watched it, its start and end recorded
# ======================================================================================================

OUTPUT_BYTES = 64 * 1024  # of output are looked at when a command has ended
OUTPUT_KEPT = 10_000  # characters of that are recorded
RECORD_SECONDS = 2  # a command that has ended waits for a server
FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
ESCAPES = r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~]?)"
JOB_KINDS = {"tests": "test_result", "build": "build_result", "deploy": "deployment"}


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of some bytes, also where the other side has made the descriptor non-blocking."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def readable(raw: bytes) -> str:
    """Output as it stood there in the end: no escape codes, full-screen programs, overwritten lines."""
    parts = re.split(r"\x1b\[\?(?:1049|1047|47)([hl])", raw.decode("utf-8", "replace"))
    sides = ["", *parts[1::2], ""]
    shown = zip(parts[::2], sides, sides[1:], strict=False)
    text = re.sub(ESCAPES, "", "".join(part for part, on, off in shown if on != "h" and off != "l"))
    text = re.sub(r"[^\n\x08]\x08", "", text)
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text).strip("\n")


def last_words(raw: bytes) -> str:
    """The end of what a command put out, as it is recorded. Masked here: half a secret looks like none."""
    text = redact_text(readable(raw))
    end = text[-OUTPUT_KEPT:]
    return text if end == text else "…\n" + (end.partition("\n")[2] or end)


def spoken(words: Iterable[str]) -> str:
    """A command line to be recorded, without what follows an option such as --password."""
    pairs = itertools.pairwise(["", *words])
    return shlex.join(
        MASK if redact_deep({before: word}) == {before: MASK} and before[:1] == "-" else word
        for before, word in pairs
    )


class Record:
    """What is told of a command: to the server, or to the spool until it answers."""

    def __init__(self, task: str | None, title: str | None, words: tuple[str, ...]):
        (self.server, self.token), self.trouble = target(), ""
        self.begun = threading.Event()  # the start has its place before the end
        self.task, self.line = task or "", spoken(words)
        program = one_line(PurePath(words[0]).name, 100) or "command"
        self.fields: dict[str, Any] = {"source": f"run:{program}-{secrets.token_hex(4)}", "name": title}
        with contextlib.suppress(OSError):  # somebody has removed the folder that we are in
            self.fields["folder"] = os.getcwd()

    def end(self, status: int, seconds: float, output: bytes | None) -> None:
        """Tell how it has ended."""
        code, names = os.waitstatus_to_exitcode(status), {number: number.name for number in signal.Signals}
        how = f"exit status {code}" if code >= 0 else f"killed by {names.get(-code, f'signal {-code}')}"
        kinds = filter(None, map(JOB_KINDS.get, shell_jobs(steps(self.line))))
        data = {"exit_status": code if code >= 0 else 128 - code, "duration_ms": int(seconds * 1000)}
        data |= {} if output is None else {"output": last_words(output)}
        message = f"{one_line(self.line)}: {how} after {seconds:,.1f} s"
        self.begun.wait(RECORD_SECONDS)
        self.tell(message, next(kinds, "command_end"), "error" if code else "info", data)

    def tell(self, message: str, kind: str, level: str, data: dict[str, Any]) -> None:
        """Send an update, after what waits in the spool; sets `trouble` to what is wrong."""
        key, data = str(uuid.uuid4()), {"command": self.line, "folder": self.fields.get("folder")} | data
        update = self.fields | {"message": message, "kind": kind, "level": level, "data": data}
        body = dump(trimmed(update, OUTPUT_KEPT + 2))
        event, kept = spool_head("update", "", self.task, key) + body.encode(), None
        with contextlib.suppress(OSError):  # no place for a spool
            kept = keep_event(self.server, key, event)
        if kept:
            self.begun.set()
        then = "what there is to record of this command waits for it" if kept else "nothing is recorded"
        self.trouble = f"no answer from {self.server}; {then}"  # until there is one
        to = (self.server, self.token)
        status = flush_spool(*to)[2] if kept else post_spooled(*to, event)
        if os.path.exists(kept) if kept else status in UNTAKEN:
            self.trouble = f"{trouble_of(self.server, status).message}; {then}"
        else:
            refused = f"{self.server} takes no record of this command (status {status}): is there a task"
            self.trouble = f"{refused} {self.task}?" if status >= 300 else ""
        self.begun.set()


class Terminal:
    """A pseudo-terminal that a command gets in place of ours on `number`. A `whole` one is all of its
    terminal, and takes what is typed; else it only takes output."""

    def __init__(self, number: int, whole: bool):
        self.number, self.whole, self.over, self.lock = number, whole, False, threading.Lock()
        self.master, self.slave = os.openpty()
        self.mode = termios.tcgetattr(number)
        mode = [*self.mode]
        mode[1] &= -1 if whole else ~termios.OPOST  # else ours does that
        termios.tcsetattr(self.slave, termios.TCSANOW, mode)
        self.resize()

    def resize(self) -> None:
        """Give it the size of ours."""
        with contextlib.suppress(termios.error):  # ours is gone
            termios.tcsetwinsize(self.master, termios.tcgetwinsize(self.number))

    def lend(self, raw: bool) -> bool:
        """Let all keys reach the command, or not; False when the keyboard is the shell's, as after bg."""
        if self.over or not has_keyboard():
            return False
        with contextlib.suppress(termios.error):  # it is gone
            if raw:
                tty.setraw(0, termios.TCSANOW)
            else:
                termios.tcsetattr(0, termios.TCSADRAIN, self.mode)
        return True

    def type(self) -> None:
        """Hand on what is typed until the command is over."""
        with contextlib.suppress(OSError):  # the terminal is gone, or the command
            while not self.over:
                with self.lock:
                    lent = self.lend(True)
                if not lent:
                    time.sleep(0.2)
                    continue
                select.select([0], [], [])
                with self.lock:  # not while we stop or end: then it is for somebody else, who has read it
                    typed = os.read(0, 4096) if self.lend(True) and can_read(0, 0) else b""
                write_whole(self.master, typed)

    def stop(self) -> None:
        """Stop, as the command has, until the shell lets us go on; where no shell could, not at all."""
        time.sleep(0.05)  # for what it has put out before
        with self.lock:
            self.lend(False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTSTP])
            os.kill(0, signal.SIGTSTP)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTSTP])
            self.lend(True)
        self.resize()

    def end(self) -> None:
        """Have our terminal as it was."""
        with self.lock:
            self.lend(False)
            self.over = True


def can_read(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, within some seconds."""
    return bool(select.select([descriptor], [], [], seconds)[0])


def has_keyboard() -> bool:
    """Whether what is typed on the terminal is for us: we are not in the background."""
    with contextlib.suppress(OSError):  # a terminal, but not the one of our session
        return os.tcgetpgrp(0) == os.getpgrp()
    return False


class Child:
    """A command that runs under us. What is a terminal for us is one for it; what is none is a pipe, or with
    `silent` the very same file."""

    def __init__(self, words: tuple[str, ...], silent: bool):
        self.words, self.kept, self.terminal = words, bytearray(), None
        self.outputs: dict[int, int] = {}  # of the command
        self.sources: dict[int, int] = {}  # what we read: where it goes
        self.whole = not silent and os.isatty(0) and os.isatty(1) and has_keyboard()
        for number in () if silent else (1, 2):
            if os.isatty(number):
                self.terminal = self.terminal or Terminal(number, self.whole)
                source, self.outputs[number] = self.terminal.master, self.terminal.slave
            else:
                source, self.outputs[number] = os.pipe()
            self.sources.setdefault(source, number)
        self.awaited = FORWARDED | {signal.SIGCHLD} | ({signal.SIGTSTP} if self.whole else set())
        for number in (signal.SIGCHLD, signal.SIGWINCH):
            signal.signal(number, lambda *_: None)  # what is ignored may never arrive
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*self.awaited, signal.SIGTTOU, signal.SIGWINCH})
        self.number = os.fork() or self.become()
        for descriptor in set(self.outputs.values()):
            os.close(descriptor)

    def become(self) -> int:
        """Be the command, in a process of its own."""
        try:
            if self.whole:
                os.login_tty(os.dup(self.terminal.slave))
            for number, descriptor in self.outputs.items():
                os.dup2(descriptor, number)
            if self.whole:
                self.lead()
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
            os.execvp(self.words[0], self.words)  # noqa: S606 (no shell is what we want)
        except (OSError, ValueError) as error:  # ValueError: an empty name
            said = f"monitor: cannot run {plain(self.words[0])!r}: {getattr(error, 'strerror', error)}\n"
            os.write(2, said.encode("utf-8", "replace"))
            os._exit(127 if isinstance(error, FileNotFoundError | ValueError) else 126)
        finally:
            os._exit(126)

    def lead(self) -> None:
        """Lead the session of the command, which goes on in a child of ours: Ctrl-Z does not stop a process
        whose parent is in another session. We stop when it does, and end as it ends."""
        number = os.fork()
        if not number:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            return
        os.closerange(3, 1 << 16)  # with our share of the other side the terminal would never hang up
        with contextlib.suppress(OSError):  # it has done so itself
            os.setpgid(number, number)

        def stopped() -> None:
            os.kill(os.getpid(), signal.SIGSTOP)
            os.killpg(number, signal.SIGCONT)

        end_as(wait_for(number, self.awaited, lambda signum, _: os.killpg(number, signum), stopped))

    def wait(self) -> int:
        """Wait for its end, its status, with all that it puts out passed on and the end of that kept."""
        over, ended = os.pipe()
        if self.whole:
            self.terminal.lend(True)  # before anything comes
            background(self.terminal.type)
        relays = [background(self.relay, source, to, over) for source, to in self.sources.items()]
        try:
            watched = self.awaited | ({signal.SIGWINCH} if self.terminal else set())
            return wait_for(self.number, watched, self.forward, self.stopped)
        finally:
            os.close(ended)
            for thread in relays:
                thread.join()
            if self.whole:
                self.terminal.end()

    def forward(self, number: int, sent: bool) -> None:
        """Hand a signal on. What comes from the keyboard goes to all that share a terminal, also to it."""
        resized = number == signal.SIGWINCH
        if resized:
            self.terminal.resize()
        if sent or self.whole or resized:
            os.kill(self.number, number)

    def stopped(self) -> None:
        """Stop with it, where the terminal has not done so."""
        if self.whole:
            self.terminal.stop()
            os.kill(self.number, signal.SIGCONT)

    def relay(self, source: int, to: int, over: int) -> None:
        """Pass on what it puts out; after its end until nothing comes: what it left may hold on to that."""
        with contextlib.suppress(OSError):  # of a pseudo-terminal that nobody has any more
            # `over` comes with the end: then what there is, but no waiting for more.
            while source in select.select([source, over], [], [])[0] or can_read(source, 0.1):
                data = os.read(source, 65536)
                self.kept += data
                del self.kept[:-OUTPUT_BYTES]
                try:
                    write_whole(to, data)
                except OSError:
                    to = os.open(os.devnull, os.O_WRONLY) if os.isatty(source) else -1
                if not data or to < 0:
                    break
        if not os.isatty(source):
            os.close(source)  # then it gets SIGPIPE, as if it wrote to what has gone itself


def wait_for(child: int, awaited: set[int], forward: Callable, stopped: Callable) -> int:
    """Wait for the end of a child; its status. Hand signals on, with whether a process sent it."""
    while True:
        if hasattr(signal, "sigwaitinfo"):
            told = signal.sigwaitinfo(awaited)
            number, sent = told.si_signo, told.si_code <= 0
        else:  # macOS
            number = signal.sigwait(awaited)
            sent = number not in (signal.SIGINT, signal.SIGQUIT)
        if number != signal.SIGCHLD:
            forward(number, sent)
            continue
        done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if done and os.WIFSTOPPED(status):
            stopped()
        elif done:
            return status


def end_as(status: int, keyboard: bool = False) -> None:
    """End as a command has: by its signal too, so that a shell's script stops at a Ctrl-C, which it has not
    seen itself where the `keyboard` was the command's."""
    import resource

    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it has left one
        with contextlib.suppress(OSError):  # of SIGKILL
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(0 if keyboard and -code in (signal.SIGINT, signal.SIGQUIT) else os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)  # the latter: the first process of a container


@command("run", "run_task new_title no_output command")
def run(run_task: str | None, new_title: str | None, no_output: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND, with its terminal, signals and exit status as without us, and record on a task that it
    started, how it ended and what it put out last. It never waits for the server.

    \b
      monitor run --task 12 -- make test
      monitor run --new "Nightly build" -- ./build.sh
    """
    task = None if new_title else current_task(run_task)
    if not (task or new_title) or (run_task and new_title):
        raise click.UsageError("name a task: --task ID, or --new TITLE for a new one, or set MONITOR_TASK_ID")
    clean({"task_id": task, "name": new_title}, SPOOLED_TASK)
    os.environ |= {"MONITOR_TASK_ID": task} if task else {}
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # standard files that are closed: pipes must not take their numbers
    os.close(spare)
    record = Record(task, new_title, command)
    child, begin = Child(command, no_output), time.monotonic()
    background(record.tell, f"started: {one_line(record.line)}", "command_start", "info", {})
    status = child.wait()
    told = (status, time.monotonic() - begin, None if no_output else bytes(child.kept))
    background(record.end, *told).join(RECORD_SECONDS)
    if record.trouble and not quiet():
        with contextlib.suppress(OSError):  # the terminal is gone
            click.echo(f"monitor: {plain(record.trouble)}", err=True)
    end_as(status, child.whole)


cli.commands["run"].allow_interspersed_args = False  # from COMMAND on, options are its own


# ======================================================================================================
# pack: the one file that needs nothing but Python
# ======================================================================================================

PACKED = ("click", "flask", "wsproto")  # and what these need
NATIVE = (*PACKED, "gevent", "greenlet")
UNPACKED = r"(^|/)\.\./|__pycache__/|^gevent/tests/|\.(c|h|pxd|pyc|pyi|pyx|typed)$"
UNPACKED += r"|\.dist-info/(?!METADATA|.*(?i:licen[cs]e|copying|notice|authors))"
INSTALL = "this Python has no {}, which is to be packed; type: {} -m pip install {}"


def our_files() -> dict[str, bytes]:
    """What Monitor consists of, by the names that it has in a package."""
    import zipfile

    archive = getattr(__loader__, "archive", None)  # we run from such a file
    home = zipfile.Path(archive, "monitor/") if archive else Path(os.path.abspath(__file__)).parent
    below = (file for folder in ("static", "templates") for file in (home / folder).iterdir())
    names = [f"{file.parent.name}/{file.name}" for file in below if file.is_file()]  # pip compiles ours
    found = {f"monitor/{name}": asset(*name.split("/")) for name in ["LICENSE", "schema.sql", *names]}
    return found | {"monitor/__init__.py": __loader__.get_source(__name__).encode()}


def installed_files(names: Iterable[str], unpacked: str) -> dict[str, bytes]:
    """The files of packages as they are installed here, and of all that they need. Each has its list of them,
    so that what is packed can be packed again; Problem names what is missing."""
    from importlib import metadata

    found, missing, wanted = {}, [], [*names]
    for name in wanted:  # grows
        try:
            package = metadata.distribution(name)
            files = [file for file in package.files or () if not re.search(unpacked, str(file))]
            (info,) = (str(file) for file in files if file.name == "METADATA")
        except (metadata.PackageNotFoundError, ValueError):  # ValueError: not as pip installs it
            missing.append(name)
            continue
        record = info.replace("METADATA", "RECORD")
        found |= {str(file): file.read_binary() for file in files}
        found[record] = "".join(f"{file},,\n" for file in sorted([*map(str, files), record])).encode()
        needs = (re.match(r"[\w.-]+", need)[0].lower() for need in package.requires or () if ";" not in need)
        wanted += dict.fromkeys(need for need in needs if need not in wanted)
    if missing:
        raise invalid(INSTALL.format(", ".join(missing), sys.executable, " ".join(missing)))
    return found


def pack_plain(folder: str, file: io.BufferedWriter) -> None:
    """Write a zip that Python runs as it is: source, and beside it byte code of this Python."""
    import subprocess
    import zipfile

    # In a process apart: the bytes of byte code depend on what else a process knows.
    compiler = [sys.executable, "-ISm", "compileall", "-q", "-b", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([*compiler, "-s", folder, folder], check=True)  # noqa: S603 (our own words)
    file.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(Path(folder).rglob("*")):
            # Folders too: without theirs, Python 3.12 finds no packages that have no __init__.py.
            entry = zipfile.ZipInfo(f"{path.relative_to(folder)}{'/' * path.is_dir()}")  # of 1980
            entry.external_attr = (0o40755 if path.is_dir() else 0o100644) << 16
            content = b"" if path.is_dir() else path.read_bytes()
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED, 9)


def pack_native(folder: str, file: io.BufferedWriter) -> None:
    """Write a zip that unpacks itself into ~/.shiv, as machine code must be files."""
    try:
        from shiv.cli import main as shiv
    except ImportError:
        raise invalid(INSTALL.format("shiv", sys.executable, "shiv")) from None
    with tempfile.TemporaryDirectory() as made:
        words = ["--python", "/usr/bin/env python3", "--site-packages", folder, "--entry-point", "start:main"]
        shiv([*words, "--reproducible", "--output-file", f"{made}/monitor.pyz"], standalone_mode=False)
        file.write(Path(made, "monitor.pyz").read_bytes())


@command("pack", "packed native")
def pack(packed: str, native: bool) -> None:
    """Write Monitor and all that it needs into one file, that runs where there is nothing but Python 3.11 or
    newer, without being unpacked. The same input makes the same bytes.

    \b
      monitor pack
      scp monitor.pyz host: && ssh host python3 monitor.pyz serve
    """
    names, unpacked = (NATIVE, UNPACKED) if native else (PACKED, UNPACKED + r"|\.(pyd|so)$")
    target = os.path.abspath(packed)
    try:
        files = our_files() | installed_files(names, unpacked)
        files["start.py" if native else "__main__.py"] = asset("templates", "start.py")
        with tempfile.TemporaryDirectory() as folder, new_file(target, 0o755) as file:
            for name, content in files.items():
                Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).write_bytes(content)
            (pack_native if native else pack_plain)(folder, file)
    except OSError as error:
        raise invalid(f"cannot pack into {packed}: {error.strerror or error}") from None
    show({"file": target, "bytes": os.path.getsize(target)})


# ======================================================================================================
# commands: what can be typed
# ======================================================================================================

SEARCH = fields("task_id workstream_id source kind level tag since limit")
REDACT = """Wipe message and data of update SEQ that holds something it must not; its number and a mark stay.
Copies made before, as backups, still hold it."""
for definition in (  # words, request, arguments, fields of its body or query, help
    ("workstream create", "POST /api/workstreams", "", NEW_WORKSTREAM, "Make a workstream."),
    ("workstream list", "GET /api/workstreams", "", WORKSTREAM_QUERY, "List workstreams, oldest first."),
    ("workstream update", "PATCH /api/workstreams/{id}", "id", WORKSTREAM_CHANGES, "Change a workstream."),
    ("task create", "POST /api/tasks", "", NEW_TASK, "Make a task."),
    ("task list", "GET /api/tasks", "", TASK_QUERY, "List tasks, oldest first."),
    ("task update", "PATCH /api/tasks/{task}", "one_task", TASK_CHANGES, "Change a task."),
    ("update manual", "POST /api/updates/manual", "", MANUAL_UPDATE, "Add a person's update to a task."),
    ("search", "GET /api/updates", "phrase", SEARCH, "Find updates that hold some WORDS, the newest first."),
    ("session list", "GET /api/sessions", "", OF_TASK, "List the runs of agents, the newest first."),
    ("session move", "POST /api/sessions/move", "", SESSION_MOVE, "Give a run, by its source, to a task."),
    ("update redact", "POST /api/updates/{seq}/redact", "seq database", {}, REDACT),
):
    api_command(*definition)


LINK_KINDS = fields("branch pr issue commit repo folder")


def link_body(repository: str | None, **given: str | None) -> dict[str, str | None]:
    """The one link that options name, as the API takes it."""
    if len(named := filled(given)) != 1:
        raise click.UsageError(f"name one of --{', --'.join(LINK_KINDS)}")
    ((kind, value),) = named.items()
    return {
        "link": kind,
        "value": os.path.abspath(value) if kind == "folder" else value,
        "repository": repository,
    }


@command("link", "any_task listed", LINK_KINDS | fields("repository close_on_merge"))
def link(task: str | None, listed: bool, close_on_merge: bool | None, **given: str | None) -> None:
    """Bind something to TASK. What happens on that branch, pull request, issue, repository or in that folder
    goes to it."""
    if listed:
        return show(ask(*target(), "GET", "/api/links", {"task_id": task} if task else None))
    if task is None:
        raise click.UsageError("name the TASK that it is to be bound to")
    body = link_body(**given) | {"task_id": task, "close_on_merge": close_on_merge}
    return stored(ask(*target(), "POST", "/api/links", body))


@command("unlink", "", LINK_KINDS | fields("repository"))
def unlink(**given: str | None) -> None:
    """Unbind a branch, pull request, issue ... from its task."""
    told = ask(*target(), "POST", "/api/links/remove", link_body(**given))
    if not told.get("removed"):
        raise Problem("not_found", "there is no such link; see: monitor link --list")
    show(told)


@contextlib.contextmanager
def progress_bar(length: int, label: str) -> Iterator[Any]:
    """A progress bar on standard error, silent unless that is a terminal; full when all went well."""
    silent = quiet() or not sys.stderr.isatty()
    with click.progressbar(length=max(1, length), label=label, file=sys.stderr, hidden=silent) as bar:
        yield bar
        bar.update(bar.length - bar.pos)


def save(label: str, file: str, database: str | None, given: dict[str, str] | None = None) -> None:
    """Write what /api/admin/LABEL answers into a new FILE (-: to standard output), once it is whole."""
    import http.client

    if file != "-" and os.path.exists(file):
        raise invalid(f"{file} exists; name a new file")
    place, size, end = contextlib.nullcontext(sys.stdout.buffer) if file == "-" else new_file(file), 0, b""
    with file_errors(f"write {file}"), server_for(database) as server, place as copy:
        response = server("GET", f"/api/admin/{label}", given, LONG_SECONDS, whole=False)
        length = int(response.headers["Content-Length"] or 0)
        with response, progress_bar(length, label.capitalize()) as bar:
            with contextlib.suppress(http.client.HTTPException):  # it is cut off
                while chunk := response.read(READ_BYTES):
                    copy.write(chunk)
                    size, end = size + len(chunk), (end + chunk)[-len(END_LINE) :]
                    bar.update(len(chunk)) if length else update_bar(bar, chunk)
        if (size != length) if length else (end != END_LINE):
            raise invalid(f"the {label} did not arrive whole")
    if file != "-":
        show({label: os.path.abspath(file), "bytes": size})


def update_bar(bar: Any, chunk: bytes) -> None:
    """Show how far an export is, by the numbers of its events: how many bytes come nobody knows."""
    if head := re.search(rb'^{"event":"export".*"head":(\d+)', chunk[:1000]):
        bar.length = int(head[1])
    if found := re.match(rb'\n{"event":"\w+","id":(\d+)', chunk[max(0, chunk.rfind(b'\n{"event":"')) :]):
        bar.update(int(found[1]) - bar.pos)


@command("backup", "file database")
def backup(file: str, database: str | None) -> None:
    """Copy the database into a new FILE. Everything goes on meanwhile; FILE is a database like any other."""
    save("backup", file, database)


@command("check", "database")
def check(database: str | None) -> None:
    """Say what is wrong with the database. All of it is read: integrity, numbers, orphans, search index."""
    with server_for(database) as server, progress_bar(1, "Checking"):
        problems = server("GET", "/api/admin/check", None, LONG_SECONDS).get("problems", [])
    show({"ok": not problems, "problems": problems})
    if problems:
        raise invalid(f"{len(problems)} things are wrong with the database; restore a backup")


@command("prune", "database", PRUNING)
def prune(database: str | None, dry_run: bool | None, **wanted: Any) -> None:
    """Remove old updates. They go in small batches and give their space back; no number comes again."""
    with server_for(database) as server:
        answered = server("POST", "/api/admin/prune", wanted | {"dry_run": True})
        done = 0
        with progress_bar(answered["left"], "Pruning") as bar:
            while answered["left"] and not dry_run:
                answered = server("POST", "/api/admin/prune", wanted, LONG_SECONDS)
                done += answered["pruned"]
                bar.update(answered["pruned"])
    show({"pruned": done, "left": answered["left"]})


@command("export", "file since database")
def export(file: str, since: str | None, database: str | None) -> None:
    """Write all into a new FILE (-: to standard output) as lines of JSON, from which import builds the
    database anew; with --since of the log only what came later."""
    name = "after_seq" if since and since.isdecimal() else "since"
    save("export", file, database, {name: since} if since else None)


@command("import", "file database")
def take_file(file: str, database: str | None) -> None:
    """Take in an export from FILE (-: from standard input): exact into an empty or new database, else what is
    not there yet. It may be interrupted and repeated."""
    ours = file == "-"
    with file_errors(f"read {file}"), open(0 if ours else file, "rb", closefd=not ours) as lines:
        header, size = lines.readline(MAX_LINE), 0
        read_header(header)
        if lines.seekable():
            size = lines.seek(0, os.SEEK_END)
            lines.seek(max(0, size - len(END_LINE)))
            if lines.read() != END_LINE:
                raise invalid(f"{file} is not whole: its last line is missing; nothing was stored")
            lines.seek(len(header))
        if database:
            os.close(os.open(parse_database(database) or os.devnull, os.O_WRONLY | os.O_CREAT, 0o600))
        with server_for(database) as server, progress_bar(size, "Import") as bar:
            bar.update(len(header))
            told = send_lines(server, header, lines, bar)
        show({"import": file, **told})


def next_lines(lines: io.BufferedReader) -> list[bytes]:
    """The next lines, about 1 MiB."""
    found, size = [], 0
    while size <= READ_BYTES and (line := lines.readline(MAX_LINE)):
        found.append(line)
        size += len(line)
    return found


def send_lines(server: Callable, header: bytes, lines: io.BufferedReader, bar: Any) -> dict[str, Any]:
    """Send an export; returns what became of it. Each request repeats the last event before it: by that the
    server sees whether the log goes on there."""
    told, exact, first, before, last = Counter(), False, 2, [], header
    while batch := next_lines(lines):
        path, body = f"/api/admin/import?line={first - len(before)}", b"".join([header, *before, *batch])
        try:
            answered = server("POST", path, body, LONG_SECONDS)
        except Problem as problem:
            stored = f"{problem.message}; nothing from line {first} on was stored"
            raise Problem(problem.code, stored) from None
        exact = expect(answered, updates=int, changes=int, known=int, exact=bool)["exact"]
        known = answered["known"] - len(before)
        told.update(updates=answered["updates"], changes=answered["changes"], known=known)
        bar.update(sum(map(len, batch)))
        before = [line for line in batch if re.match(rb'{"event":"\w+","id":', line)][-1:] or before
        first, last = first + len(batch), batch[-1]
    if last != END_LINE:
        raise invalid("this export is not whole: its last line is missing; what it has was stored")
    return {**told, "exact": exact}


@command("doctor", "database")
def doctor(database: str | None) -> None:
    """Say what is wrong, with the server, its database, the hooks of agents, the spool, versions and rights,
    and the command that mends it. Changes nothing."""
    found = list(findings(all_facts(*target(), database)))
    failed = [finding for finding in found if finding["level"] == "fail"]
    if output_style() == "table":
        print_lines(line for finding in found for line in finding_lines(finding))
    else:
        show({"ok": not failed, "findings": found})
    if failed:
        raise invalid(f"{len(failed)} of these must be mended")


def finding_lines(finding: dict[str, str]) -> list[str]:
    """A finding for people, and below it what mends it."""
    colour = {"warn": "yellow", "fail": "red"}.get(finding["level"], "green")
    line = click.style(f"{finding['level']:5}", colour) + plain(f"{finding['check']:10}{finding['message']}")
    return [line, plain(f"{'':15}{finding['mend']}")] if "mend" in finding else [line]


@command("hook", "agent event")
def send_event(agent: str, event: str) -> None:
    """Send a hook of AGENT from standard input. It does what the installed one-liner does with curl: within
    two seconds, silent, exit status 0; what cannot be sent waits in the spool."""
    try:
        server, token = target(False)
    except click.UsageError:  # the user's file makes no sense: without it rather than without the event
        os.environ["XDG_CONFIG_HOME"] = os.devnull
        server, token = target(False)
    if send_hook(server, token, agent, event, sys.stdin.buffer.read()) and os.fork() == 0:
        try:  # in a process apart: the agent waits for us, and for what holds its pipes
            os.setsid()
            for number in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            flush_spool(server, token)
        finally:
            os._exit(0)


@command("hooks install", "agent project http block dry_run yes")
def hooks_install(agent: str, project: bool, http: bool, block: bool, dry_run: bool, yes: bool) -> None:
    """Register hooks in the settings of AGENT; what else stands there stays as it is."""
    import difflib

    gated = "assume" in hook_agents()[agent]  # else its events need no version, and one takes 4 s to tell it
    version = agent_version(agent) if gated else None
    wanted = wanted_hooks(agent, target(project)[0], version, http)
    if block:
        print_text(with_hooks(None, wanted, agent))
        return
    file = HookFile(agent, project)
    before, text = file.original(), with_hooks(file.text, wanted, agent)
    if changed := text != file.text:
        text = with_hooks(before, wanted, agent)
    ask = changed and not yes and sys.stdin.isatty() and sys.stdout.isatty()
    if ask or (changed and dry_run):
        sides = (file.text or "").splitlines(), text.splitlines()
        print_lines(difflib.unified_diff(*sides, file.name, file.name, lineterm=""))
    if dry_run or (ask and not click.confirm(f"Write {file.name}?")):
        return
    if changed:
        file.write(text, before)
    told = {"agent": agent, "version": version, "file": file.name, "changed": changed}
    told |= {"events": [event for event, _ in wanted], "note": hook_agents()[agent].get("note")}
    show(filled(told))


@command("hooks remove", "agent project")
def hooks_remove(agent: str, project: bool) -> None:
    """Take our hooks out of the settings of AGENT; where nothing else changed, they are as before."""
    file = HookFile(agent, project)
    before = file.original()
    if before != file.text:
        file.write(before, None)
    show({"agent": agent, "file": file.name, "changed": before != file.text})


@command("hooks check", "any_agent")
def hooks_check(agent: str | None) -> None:
    """Say which agents are plugged in. Are their hooks (or those of AGENT) up to date, and does the server
    answer?"""
    agents = check_agents([agent] if agent else AGENTS)
    problems = [row["problem"] for row in agents if "problem" in row]
    (server, token), installed = target(), [row["server"] for row in agents if row["installed"]]
    given = setting("server")[2] in ("option", "environment")
    server = installed[0] if installed and not given else server
    status = post_spooled(server, token)
    problems += [trouble_of(server, status).message] if installed and status != 400 else []
    waiting = len(spooled(spool_folder(server)))
    show({"agents": agents, "server": server, "server_ok": status == 400, "spooled": waiting})
    if problems:
        raise invalid("; ".join(problems))


@command("hooks flush")
def hooks_flush() -> None:
    """Send the events that wait in the spool of the server."""
    server, token = target()
    sent, refused, status = flush_spool(server, token)
    left = len(spooled(spool_folder(server)))
    show({"sent": sent, "refused": refused, "left": left})
    if left:
        raise trouble_of(server, status)


@command("mcp")
def bridge() -> None:
    """Answer an MCP client on standard input and output: for agents that start a program instead of asking
    an address. Only what a tool is to do is asked of the server: an agent may start while there is none."""
    for line in sys.stdin.buffer:
        told = mcp_reply(line, None, remote_tool)[0] if line.strip() else None
        if told:
            sys.stdout.buffer.write(dump(told).encode() + b"\n")
            sys.stdout.buffer.flush()


def remote_tool(name: str, given: dict[str, Any]) -> str:
    """Have the server run a tool, for the task that we are in; returns its text. Problem says why not."""
    call = {"name": name, "arguments": given}
    message = {"jsonrpc": "2.0", "id": 0, "method": "tools/call", "params": call}
    told = ask(*target(), "POST", f"/mcp?task_id={quoted(current_task() or '')}", message)
    result = expect(expect(told, result=dict)["result"], content=list)
    if result.get("isError"):
        raise invalid(result["content"][0]["text"])
    return result["content"][0]["text"]


@command("prime", "", OF_TASK)
def prime(task_id: str | None) -> None:
    """Print what an agent needs to know when it begins: how its task stands, who waits, how to record. Fits a
    SessionStart hook: short, and never an error."""
    try:
        asked = {"task_id": current_task(task_id)}
        with ask(*target(), "GET", "/prime", asked, HOOK_SECONDS, whole=False) as response:
            text = response.read().decode()
        if not text.startswith("# Monitor"):
            raise trouble_of(target()[0], 200)
    except Exception as error:  # whatever it is: no agent's start may fail of it
        text = f"Nothing from Monitor now: {brief(getattr(error, 'message', error))}\n{guide()}"
    encoding = sys.stdout.encoding or "utf-8"  # of a hook it may be ASCII
    print_text(text.encode(encoding, "replace").decode(encoding))


@command("skill", "install")
def skill(install: str | None) -> None:
    """Print what agents should know of Monitor as a skill, or install it for an agent."""
    text = asset("templates", "skill.md")
    if not install:
        print_text(text.decode())
        return
    folder = {"claude": os.environ.get("CLAUDE_CONFIG_DIR") or "~/.claude", "codex": "~/.agents"}[install]
    path = os.path.realpath(os.path.expanduser(f"{folder}/skills/monitor/SKILL.md"))
    with file_errors(f"write {path}"):
        before = Path(path).read_bytes() if os.path.exists(path) else None
        if before is not None and b"<!-- monitor-skill:" not in before:
            raise invalid(f"{path} is not from here; nothing was changed: move it away first")
        if before != text:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with new_file(path, 0o644) as file:
                file.write(text)
    show({"agent": install, "file": path, "changed": before != text})


@command("serve", " ".join(setting.name for setting in SETTINGS) + " access_log")
def serve(access_log: bool, **settings: str | None) -> None:
    """Serve the API, the stream and the pages until Ctrl-C."""
    run_server(Config.load(settings), access_log, announce)


def announce(served: Monitor, address: str, with_gevent: bool, demo: bool = False) -> None:
    """Say where the server is, what it works on, and the next thing to type."""
    import jinja2

    facts = {"served": served, "address": address, "gevent": with_gevent, "demo": demo, "argv": sys.argv}
    facts |= {"version": __version__, "loopback": LOOPBACK_NAMES, "usual": CLIENT_SETTINGS[0].default}
    text = jinja2.Template(asset("templates", "serve.txt").decode(), trim_blocks=True)
    print_text(text.render(facts))


@command("demo", "bind speed")
def demo(bind: str, speed: float) -> None:
    """Serve a recorded story. It has agents at work, CI, and one that waits for you, in a temporary
    database."""
    config = Config.load({"MONITOR_BIND": bind, "MONITOR_DB": "sqlite::memory:"})
    config = dataclasses.replace(config, tokens=(), auth_mode="relaxed", spools=())

    def ready(served: Monitor, address: str, with_gevent: bool) -> None:
        steps = story(served, speed)
        any(steps)  # up to the first that lies ahead
        announce(served, address, with_gevent, demo=True)
        threading.Thread(target=deque, args=(steps, 0), daemon=True).start()

    run_server(config, False, ready)


def story(served: Monitor, speed: float) -> Iterator[bool]:
    """Tell the recorded story step by step: what lies behind with its own times, what lies ahead in time,
    until the server shuts down. Yields before each step whether it lies ahead."""
    start, ids, kinds = time.time(), {}, {"task": TASK, "workstream": WORKSTREAM}
    with contextlib.suppress(Problem):
        for step in map(json.loads, asset("templates", "demo.jsonl").splitlines()):
            at, does = step["at"], step["do"]
            yield at > 0
            time.sleep(max(0.0, start + at / speed - time.time()) if at > 0 else 0)
            past = datetime.datetime.fromtimestamp(start + min(at, 0), datetime.UTC)
            moment = timestamp(past) if at <= 0 else None
            step |= {name: ids[step[name]] for name in ("task_id", "workstream_id") if name in step}
            if does in kinds:
                ids[step["key"]] = json.loads(served.create(kinds[does], step, moment))["id"]
            elif does == "patch":
                served.change(TASK, step["task_id"], step, moment)
            elif does == "claude":
                served.take_hook(Hook("claude", step["payload"], task=step["task_id"]), moment)
            elif does == "github":
                served.take_webhook(step["payload"], step["headers"], step["task_id"], moment)
            else:
                served.add_update(clean(step, NEW_UPDATE), moment=moment)


def open_standard_files() -> None:
    """Have all three: of one that is closed, what we open next would take the number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def main() -> None:
    """The console script: `monitor` and `monitor-cli`."""
    open_standard_files()
    if sys.argv[1:2] == ["hook"] and not sys.stderr.isatty():
        with contextlib.suppress(BaseException):  # an agent reads what we say, and takes an error for a no
            cli.main(prog_name="monitor", standalone_mode=False)
        return
    try:
        cli.main(prog_name="monitor", standalone_mode=False)
        sys.stdout.flush()
        return
    except click.exceptions.NoArgsIsHelpError as error:
        if not quiet():
            click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context, status = getattr(error, "ctx", None), error.exit_code
        hint = f"; see: {context.command_path} --help" if context else ""
        message = error.format_message().rstrip(".") + hint
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os._exit(1)  # nobody reads on: Python would complain at exit
    except OSError as error:
        message, status = f"cannot write: {error.strerror}", 1
    notice(" ".join(message.splitlines()))
    try:
        sys.stdout.flush()
    except OSError:
        os._exit(status)  # the disk is full: Python would complain at exit
    sys.exit(status)


if __name__ == "__main__":
    main()
