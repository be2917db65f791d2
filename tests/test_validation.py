"""What comes from outside is checked before anything looks at it: settings, JSON, fields, times."""

from __future__ import annotations

import datetime
import json
import math
import re
import subprocess
import uuid

import pytest
from conftest import Server, clean_environment
from hypothesis import given
from hypothesis import strategies as st
from wire import words

import monitor
from monitor import Config, Field, Problem, QueryText

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
STORABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=15,
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def refusal(function, *arguments, code: str = "invalid_input") -> Problem:
    """The Problem that a call raises: with that code, and with a sentence."""
    with pytest.raises(Problem) as raised:
        function(*arguments)
    assert raised.value.code == code
    assert len(raised.value.message) > 10
    return raised.value


# ------------------------------------------------------------------------------------------------------
# settings
# ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """An environment without settings."""
    for setting in monitor.SETTINGS:
        monkeypatch.delenv(setting.name, raising=False)


def test_without_settings_the_server_is_local_relaxed_and_without_tokens():
    config = Config.load()
    assert (config.host, config.port, config.database) == ("127.0.0.1", 3000, "monitor.db")
    assert (config.auth_mode, config.tokens) == ("relaxed", ())


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MONITOR_BIND", "127.0.0.2:4000")
    monkeypatch.setenv("MONITOR_DB", "sqlite:/data/work.db?mode=rwc")
    monkeypatch.setenv("MONITOR_AUTH_MODE", "strict")
    monkeypatch.setenv("MONITOR_API_TOKENS", "one,two")
    config = Config.load()
    assert (config.host, config.port, config.database) == ("127.0.0.2", 4000, "/data/work.db")
    assert (config.auth_mode, config.tokens) == ("strict", (b"one", b"two"))


def test_a_given_value_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("MONITOR_BIND", "127.0.0.2:4000")
    assert Config.load({"MONITOR_BIND": "127.0.0.3:5000"}).host == "127.0.0.3"
    assert Config.load({"MONITOR_BIND": None}).host == "127.0.0.2"


@pytest.mark.parametrize("name", [setting.name for setting in monitor.SETTINGS])
def test_an_empty_setting_is_as_good_as_none(monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert Config.load() == Config.load({})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("tok", (b"tok",)),
        ("tok,,", (b"tok",)),
        (",", ()),
        (" , ,", ()),
        (" one , two ", (b"one", b"two")),
        ("sécret", ("sécret".encode(),)),
    ],
)
def test_blanks_around_tokens_and_empty_tokens_are_dropped(text, tokens):
    assert Config.load({"MONITOR_API_TOKENS": text}).tokens == tokens


@pytest.mark.parametrize("mode", ["stirct", "open", "none", "0", "relaxed,strict", "strict mode"])
def test_an_unknown_mode_is_refused_in_a_sentence_that_names_it(mode):
    problem = refusal(Config.load, {"MONITOR_AUTH_MODE": mode}, code="server_misconfigured")
    assert "MONITOR_AUTH_MODE" in problem.message
    assert mode in problem.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:3000", ("127.0.0.1", 3000)),
        ("localhost:0", ("localhost", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("[::1]:3000", ("::1", 3000)),
        ("box.local:80", ("box.local", 80)),
    ],
)
def test_an_address_is_host_and_port(text, expected):
    assert monitor.parse_bind(text) == expected


NO_ADDRESSES = words(
    """
    nope 127.0.0.1 127.0.0.1: 127.0.0.1:65536 127.0.0.1:-1 127.0.0.1:http ::1:3000 [::1] [::1:3000 [nope]:3000
    127.0.0.1:3000/x http://127.0.0.1:3000 127.0.0.1:1_0 a:\u0661
    """
)


@pytest.mark.parametrize("text", ["", "host name:1", *NO_ADDRESSES])
def test_what_is_no_address_is_refused_in_a_sentence_that_names_it(text):
    assert repr(text) in refusal(monitor.parse_bind, text).message
    given = {"MONITOR_BIND": text or "nope"}
    assert "MONITOR_BIND" in refusal(Config.load, given, code="server_misconfigured").message


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("monitor.db", "monitor.db"),
        ("some folder/work.db", "some folder/work.db"),
        ("/data/work.db", "/data/work.db"),
        ("sqlite:monitor.db", "monitor.db"),
        ("sqlite:monitor.db?mode=rwc", "monitor.db"),
        ("sqlite:data/work.db", "data/work.db"),
        ("sqlite:/data/work.db", "/data/work.db"),
        ("sqlite:///data/work.db", "/data/work.db"),
        ("sqlite:///data/work.db?mode=rwc", "/data/work.db"),
        ("sqlite::memory:", None),
    ],
)
def test_a_database_is_named_by_a_path_or_a_url(text, path):
    assert monitor.parse_database(text) == path


@pytest.mark.parametrize("text", ["", " ", "sqlite:", "sqlite:?mode=rwc", "sqlite:a\0b"])
def test_what_names_no_database_is_refused(text):
    assert repr(text) in refusal(monitor.parse_database, text).message
    given = {"MONITOR_DB": text or "sqlite:"}
    assert "MONITOR_DB" in refusal(Config.load, given, code="server_misconfigured").message


@pytest.mark.parametrize(("name", "value"), [("MONITOR_BIND", "nope"), ("MONITOR_DB", "sqlite:")])
def test_a_server_with_a_senseless_setting_does_not_start(tmp_path, name, value):
    command = [*Server.command, "serve"]
    settings = {"MONITOR_BIND": "127.0.0.1:0", name: value}
    ended = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(**settings), capture_output=True, text=True, timeout=20
    )
    assert ended.returncode != 0
    assert ended.stdout == ""
    assert name in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_memory_database_is_a_private_file_that_is_removed_at_exit(fresh, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    server = fresh(database="sqlite::memory:", TMPDIR=str(folder))
    server.new_task()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    server.stop()
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------


@given(STORABLE)
def test_what_is_stored_comes_back_as_it_was(value):
    assert monitor.parse_json(monitor.dump(value).encode()) == value


@given(STORABLE)
def test_json_on_the_wire_is_ascii_on_one_line(value):
    text = monitor.dump(value)
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, [math.inf], {"a": math.nan}])
def test_nothing_that_is_no_json_is_written(value):
    with pytest.raises(ValueError, match="JSON"):
        monitor.dump(value)


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_refused(raw):
    try:
        value = monitor.parse_json(raw)
    except Problem as problem:
        assert problem.code == "invalid_input"
    else:
        assert monitor.parse_json(monitor.dump(value).encode()) == value


@given(ANYTHING)
def test_any_value_comes_back_as_it_was_or_is_refused(value):
    try:
        parsed = monitor.parse_json(json.dumps(value).encode())
    except Problem as problem:
        assert problem.code == "invalid_input"
    else:
        assert parsed == value


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b"0", 0),
        (b"-0", 0),
        (b" [1] \n", [1]),
        (b"9223372036854775807", 2**63 - 1),
        (b"-9223372036854775808", -(2**63)),
        (b"1e308", 1e308),
        (b"1e-999", 0.0),
        ('"é\u2028😀"'.encode(), "é\u2028😀"),
        (rb'"\ud83d\ude00"', "😀"),
        (rb'"\\u0000 \\ud800"', r"\u0000 \ud800"),
    ],
)
def test_ordinary_json_is_read(raw, value):
    assert monitor.parse_json(raw) == value


NO_JSON = rb"""
{ [ nope [1,] {'a':1} {"a":1,} {a:1} 1;2 012 .5 0x10 'a' "a \x00 "\u12" "\x41" NaN Infinity -Infinity //1
""".split()
NO_JSON += [
    b"",
    b" ",
    b"1 2",
    b'"\n"',
    b'"\0"',
    b"\xff",
    b'"\xed\xa0\x80"',
    b"\xef\xbb\xbf1",
    '"é"'.encode("latin-1"),
]
NO_JSON += ["[]".encode("utf-16"), "[]".encode("utf-32")]
NOT_STORABLE = rb"""
1e999 -1e999 [[1e999]] 9223372036854775808 -9223372036854775809 1000000000000000000000000000000
"\u0000" {"\u0000":1} [["\u0000"]] "\ud800" "\uDFFF" {"\ud800":1} "\udc00\ud800" "\ud800\u0041"
""".split()
NOT_STORABLE += [b"9" * 400 + b".0", b"9" * 5000, b"-" + b"9" * 5000, b"[" * 1000 + b"]" * 1000]
NOT_STORABLE += [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 1000 + b"1" + b"}" * 1000]


@pytest.mark.parametrize("raw", NO_JSON + NOT_STORABLE, ids=lambda raw: repr(raw[:16]))
def test_what_could_not_be_given_back_is_refused(raw):
    refusal(monitor.parse_json, raw)


@pytest.mark.parametrize(
    "make", [lambda depth: b"[" * depth + b"]" * depth, lambda depth: b'{"a":' * depth + b"1" + b"}" * depth]
)
def test_json_may_be_as_deep_as_the_limit_and_no_deeper(make):
    monitor.parse_json(make(monitor.MAX_DEPTH))
    refusal(monitor.parse_json, make(monitor.MAX_DEPTH + 1))


# ------------------------------------------------------------------------------------------------------
# fields
# ------------------------------------------------------------------------------------------------------

ID = "0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d"
FLAG, JSON, REFERENCE, TIME = (Field(kind, {}) for kind in ("flag", "any", "reference", "time"))
OBJECT = Field("any", {"type": "object"})
TEXT_FIELD, OPEN_TEXT = Field("text", {"minLength": 1, "maxLength": 5}), Field("text", {"maxLength": 5})
CHOICE, TAGS = (
    Field("choice", {"enum": ["a", "b"]}),
    Field("tags", {"maxItems": 3, "items": TEXT_FIELD.schema}),
)
NUMBER, PAGE = Field("number", {"minimum": 0}), Field("number", {"minimum": 1, "maximum": 200})
BODY_FIELDS = st.sampled_from([TEXT_FIELD, OPEN_TEXT, CHOICE, FLAG, TAGS, REFERENCE, OBJECT])
QUERY_FIELDS = st.sampled_from([TEXT_FIELD, OPEN_TEXT, CHOICE, REFERENCE, NUMBER, PAGE, FLAG, TIME])

TAKEN = [  # field, value, what becomes of it
    (TEXT_FIELD, "text", "text"),
    (TEXT_FIELD, "12345", "12345"),
    (TEXT_FIELD, "é\u2028 😀", "é\u2028 😀"),
    (OPEN_TEXT, "", ""),
    (CHOICE, "b", "b"),
    (FLAG, True, True),
    (FLAG, False, False),
    (JSON, [{"a": None}], [{"a": None}]),
    (JSON, 0, 0),
    (TAGS, [], []),
    (TAGS, ["b", "a"], ["b", "a"]),
    (TAGS, ["b", "a", "b"], ["b", "a"]),
    (OBJECT, {}, {}),
    (OBJECT, {"a": 1}, {"a": 1}),
    (REFERENCE, ID, ID),
    (REFERENCE, ID.upper(), ID),
    (REFERENCE, "0a1b", "0a1b"),
    (REFERENCE, ID[:13], ID[:13]),
    (REFERENCE, "7", "7"),
    (NUMBER, "0", 0),
    (NUMBER, "12", 12),
    (NUMBER, "9" * 30, 2**63 - 1),
    (PAGE, "0", 1),
    (PAGE, "-5", 1),
    (PAGE, "201", 200),
    (PAGE, "9" * 30, 200),
    (FLAG, QueryText("true"), True),
    (FLAG, QueryText("false"), False),
    (TIME, "2026-01-31T09:30:00Z", "2026-01-31T09:30:00.000000Z"),
    (TIME, "2026-01-31T09:30:00.123456+02:00", "2026-01-31T07:30:00.123456Z"),
    (TIME, "2026-01-31T00:30:00-01:00", "2026-01-31T01:30:00.000000Z"),
]
REFUSED = [
    (TEXT_FIELD, [5, True, None, [], {}, "", " ", "123456", "\0", "\ud800"]),
    (OPEN_TEXT, [5, True, [], {}, "123456", "\0", "\ud800"]),
    (CHOICE, ["c", "A", "", 5, None, [], ["a"], {}, "a\0", "a "]),
    (FLAG, [0, 1, "true", "", None, []]),
    (TAGS, ["a", {}, {"a": 1}, 5, [1], [None], [["a"]], ["123456"], ["a", "b", "c", "d"], ["\0"]]),
    (REFERENCE, [7, True, [], "", "abc", "nope", f"{ID}0", f" {ID}", "1 ", "-1", "1_0", "\u0661", "0a1b\n"]),
    (NUMBER, ["", "x", "1.5", "1_0", " 5 ", "\uff11\uff12", "+1", "0x10", "1e3", "5\n"]),
    (PAGE, ["", "x", "--1", "1.5", "\u0661"]),
    (FLAG, [QueryText(text) for text in ("", "maybe", "2", "true ", "truefalse")]),
    (TIME, ["", "yesterday", "1", "2026-13-01", "2026-01-31T25:00:00Z", "0001-01-01T00:00:00+23:00", "\0"]),
]


@pytest.mark.parametrize(("field", "value", "expected"), TAKEN)
def test_a_field_takes_its_values(field, value, expected):
    assert field.check(value, "this") == expected


@pytest.mark.parametrize(("field", "values"), REFUSED)
def test_a_field_refuses_other_values_and_names_itself(field, values):
    for value in values:
        problem = refusal(field.check, value, "this")
        assert problem.field == "this"
        assert "this" in problem.message


@given(case=st.tuples(BODY_FIELDS, ANYTHING) | st.tuples(QUERY_FIELDS, st.text(max_size=30).map(QueryText)))
def test_a_field_takes_or_refuses_whatever_can_come(case):
    field, value = case
    try:
        field.check(value, "this")
    except Problem as problem:
        assert problem.field == "this"


CLEANED = {
    "name": Field("text", {"minLength": 1, "maxLength": 10}, required=True),
    "note": Field("text", {"minLength": 1, "maxLength": 10}),
    "any": JSON,
}


def test_unknown_fields_are_ignored():
    assert monitor.clean({"name": "a", "id": 5, "seq": [], "Name": "b"}, CLEANED) == {"name": "a"}


def test_null_counts_as_absent():
    assert monitor.clean({"name": "a", "note": None, "any": None}, CLEANED) == {"name": "a"}


@pytest.mark.parametrize("value", [0, False, "", [], {}, [None]])
def test_a_value_that_is_false_is_still_a_value(value):
    assert monitor.clean({"name": "a", "any": value}, CLEANED) == {"name": "a", "any": value}


@pytest.mark.parametrize("payload", [{}, {"name": None}, {"note": "b"}])
def test_a_missing_field_is_named(payload):
    problem = refusal(monitor.clean, payload, CLEANED)
    assert problem.field == "name"
    assert "name" in problem.message


@pytest.mark.parametrize("payload", [None, [], "name", 5, True, [{"name": "a"}]])
def test_what_is_no_object_is_refused(payload):
    refusal(monitor.clean, payload, CLEANED)


# ------------------------------------------------------------------------------------------------------
# times and ids
# ------------------------------------------------------------------------------------------------------

OFFSETS = st.timedeltas(datetime.timedelta(hours=-23), datetime.timedelta(hours=23)).map(datetime.timezone)
MOMENTS = st.datetimes(datetime.datetime(2, 1, 1), datetime.datetime(9998, 12, 31), timezones=OFFSETS)


def test_a_timestamp_is_now_in_utc_with_microseconds():
    text = monitor.timestamp()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", text)
    away = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(text)
    assert abs(away) < datetime.timedelta(minutes=1)


@given(MOMENTS)
def test_a_timestamp_keeps_the_moment(moment):
    assert datetime.datetime.fromisoformat(monitor.timestamp(moment)) == moment


@given(MOMENTS, MOMENTS)
def test_timestamps_sort_as_the_moments_do(one, other):
    assert (monitor.timestamp(one) < monitor.timestamp(other)) == (one < other)


@given(st.text(max_size=30) | MOMENTS.map(datetime.datetime.isoformat))
def test_any_text_is_a_time_or_refused(text):
    try:
        taken = TIME.check(text, "since")
    except Problem as problem:
        assert problem.field == "since"
    else:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", taken)


def test_an_update_id_is_a_uuid_of_version_7():
    made = monitor.uuid7()
    assert (made.version, made.variant) == (7, uuid.RFC_4122)


def test_update_ids_hold_their_time_and_sort_by_it(monkeypatch):
    made = []
    for second in (1, 1_000, 1_800_000_000, 4_000_000_000):
        monkeypatch.setattr(monitor.time, "time_ns", lambda second=second: second * 10**9)
        made.append(monitor.uuid7())
        assert made[-1].int >> 80 == second * 1000
    assert made == sorted(made)
    assert [str(one) for one in made] == sorted(str(one) for one in made)


def test_update_ids_of_one_moment_differ(monkeypatch):
    monkeypatch.setattr(monitor.time, "time_ns", lambda: 10**18)
    assert len({monitor.uuid7() for _ in range(1000)}) == 1000
