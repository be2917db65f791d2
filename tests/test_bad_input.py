"""Whatever is sent: a 4xx with a sentence, nothing stored, and the server keeps serving."""

from __future__ import annotations

import gzip
import json
import urllib.parse

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire import NOWHERE, exchange, head, nothing_stored, refused, request_bytes, words

TASK, WORKSTREAM = "TASK", "WORKSTREAM"  # stand for the ids of what the tests may write to

# Every endpoint that takes a body, with a body that it accepts.
ACCEPTED = {
    "POST /api/workstreams": {"name": "a workstream", "metadata": {}},
    "PATCH /api/workstreams/WORKSTREAM": {"name": "a workstream", "status": "active", "metadata": {}},
    "POST /api/tasks": {"workstream_id": WORKSTREAM, "name": "a task", "metadata": {}},
    "PATCH /api/tasks/TASK": {
        "name": "a task",
        "workstream_id": WORKSTREAM,
        "status": "active",
        "summary_text": "a summary",
        "summary_source": "me",
        "hidden": False,
        "metadata": {},
    },
    "POST /api/updates": {
        "task_id": TASK,
        "source": "a source",
        "message": "a message",
        "level": "info",
        "kind": "decision",
        "tags": ["a"],
        "data": {},
    },
    "POST /api/updates/manual": {
        "task_id": TASK,
        "message": "a message",
        "level": "info",
        "kind": "decision",
        "tags": ["a"],
        "data": {},
    },
    "POST /api/updates/claude-hook": {"task_id": TASK, "payload": {"hook_event_name": "Stop"}},
    "POST /api/updates/github-webhook": {"task_id": TASK, "payload": {"zen": "Calm."}, "headers": {}},
}
REQUIRED = {
    "POST /api/workstreams": ["name"],
    "POST /api/tasks": ["workstream_id", "name"],
    "POST /api/updates": ["task_id", "source", "message"],
    "POST /api/updates/manual": ["task_id", "message"],
    "POST /api/updates/claude-hook": ["task_id", "payload"],
    "POST /api/updates/github-webhook": ["task_id", "payload"],
}
NO_TEXT = [5, -1.5, True, [], ["text"], {}, {"text": 1}]
NO_REFERENCE = [*NO_TEXT, 1, "", "nope", "zzzz", "1 OR 1", "../1", f"{NOWHERE}0", "'", "\uff11"]
WRONG = {
    "name": [*NO_TEXT, "", "x" * 100_000],
    "workstream_id": NO_REFERENCE,
    "task_id": NO_REFERENCE,
    "status": [*NO_TEXT, "", "nope", "Active", "active "],
    "level": [*NO_TEXT, "", "loud", "warning", "INFO"],
    "kind": [*NO_TEXT, "x" * 100_000],
    "source": [*NO_TEXT, "", "x" * 100_000],
    "message": [*NO_TEXT, "", "x" * 1_000_000],
    "tags": [
        5,
        True,
        "a,b",
        {},
        {"a": 1},
        [1],
        [None],
        [["a"]],
        [{}],
        ["a", 5],
        ["x"] * 10_000,
        ["x" * 10_000],
    ],
    "summary_text": [*NO_TEXT, "x" * 1_000_000],
    "summary_source": [*NO_TEXT, "x" * 100_000],
    "hidden": [0, 1, "true", "", [], {}],
    "headers": [5, True, "x-github-event: push", [], ["push"]],
}
CHECKED = [(endpoint, field) for endpoint, body in ACCEPTED.items() for field in body if field in WRONG]

DEEP, ABYSS = 1_000, 100_000
VALUES_THAT_NO_JSON_HOLDS = {  # in the place of a value that may be any JSON
    "nothing": "",
    "a word": "nope",
    "single quotes": "'text'",
    "a trailing comma": "[1,]",
    "a comment": "/* one */ 1",
    "an open string": '"text',
    "an open list": "[1, 2",
    "a raw line feed in a string": '"a\nb"',
    "a raw NUL in a string": '"a\0b"',
    "an unknown escape": r'"\x41"',
    "half an escape": r'"\u12"',
    "a leading zero": "012",
    "hexadecimal": "0x10",
    "a bare point": ".5",
    "NaN": "NaN",
    "Infinity": "Infinity",
    "-Infinity": "-Infinity",
}
VALUES_THAT_CANNOT_BE_KEPT = {  # by JSON's grammar, but they could not be given back as they came
    "1e999": "1e999",
    "-1e999": "-1e999",
    "a long mantissa that overflows": "1" * 400 + ".0",
    "2^63": str(2**63),
    "-2^63-1": str(-(2**63) - 1),
    "10^30": "1" + "0" * 30,
    "an integer of 5000 digits": "9" * 5000,
    "a negative integer of 5000 digits": "-" + "9" * 5000,
    "NUL": r'"a\u0000b"',
    "NUL in a key": r'{"a\u0000b": 1}',
    "NUL far down": r'[[{"a": ["\u0000"]}]]',
    "a high surrogate": r'"\ud800"',
    "a low surrogate": r'"\udfff"',
    "surrogates the wrong way round": r'"\udc00\ud800"',
    "a surrogate in a key": r'{"\uD800": 1}',
    "lists of depth 1,000": "[" * DEEP + "]" * DEEP,
    "objects of depth 1,000": '{"a":' * DEEP + "1" + "}" * DEEP,
    "lists of depth 100,000": "[" * ABYSS + "]" * ABYSS,
    "objects of depth 100,000": '{"a":' * ABYSS + "1" + "}" * ABYSS,
    "lists of depth 100,000, never closed": "[" * ABYSS,
}
ANY_JSON_GOES = [
    ("POST /api/workstreams", "metadata"),
    ("PATCH /api/workstreams/WORKSTREAM", "metadata"),
    ("POST /api/tasks", "metadata"),
    ("PATCH /api/tasks/TASK", "metadata"),
    ("POST /api/updates", "data"),
    ("POST /api/updates/claude-hook", "payload"),
    ("POST /api/updates/github-webhook", "payload"),
]
NAMED = '{"name": "a workstream"}'
BODIES_THAT_ARE_NOT_AN_OBJECT_IN_UTF8 = {
    "empty": b"",
    "blank": b" \r\n\t ",
    "a list": f"[{NAMED}]".encode(),
    "a string": b'"name"',
    "a number": b"5",
    "null": b"null",
    "true": b"true",
    "two documents": f"{NAMED} {NAMED}".encode(),
    "two lines": f"{NAMED}\n{NAMED}\n".encode(),
    "text after it": f"{NAMED};".encode(),
    "form fields": b"name=a+workstream",
    "XML": b"<name>a workstream</name>",
    "a byte-order mark": b"\xef\xbb\xbf" + NAMED.encode(),
    "UTF-16": NAMED.encode("utf-16"),
    "UTF-16-LE": NAMED.encode("utf-16-le"),
    "UTF-32": NAMED.encode("utf-32"),
    "Latin-1": '{"name": "café"}'.encode("latin-1"),
    "an overlong NUL": b'{"name": "a\xc0\x80b"}',
    "a surrogate in UTF-8": b'{"name": "\xed\xa0\x80"}',
    "half a character": b'{"name": "\xe2\x82"}',
    "random bytes": bytes(range(256)),
}


def address(endpoint: str, task: dict) -> tuple[str, str]:
    """Method and path of an endpoint, with real ids."""
    method, path = endpoint.split()
    return method, path.replace(WORKSTREAM, task["workstream_id"]).replace(TASK, task["id"])


def repr_of(value) -> str:
    """A short name for a case."""
    return repr(value)[:24]


def filled(body: dict, task: dict) -> dict:
    """A body with real ids."""
    real = {TASK: task["id"], WORKSTREAM: task["workstream_id"]}
    return {name: real.get(value, value) if isinstance(value, str) else value for name, value in body.items()}


@pytest.fixture(scope="module")
def place(server) -> dict:
    """A task that may be written to."""
    return server.new_task()


@pytest.mark.parametrize("endpoint", ACCEPTED)
def test_the_bodies_that_the_cases_spoil_are_accepted(server, place, endpoint):
    response = server.ask(*address(endpoint, place), filled(ACCEPTED[endpoint], place))
    assert response.status_code in (200, 201), response.text


@pytest.mark.parametrize(("endpoint", "field"), CHECKED)
def test_a_wrong_field_is_named(server, place, endpoint, field):
    body = filled(ACCEPTED[endpoint], place)
    with nothing_stored(server):
        for value in WRONG[field]:
            answer = server.ask(*address(endpoint, place), body | {field: value})
            refused(answer, 400, "invalid_input", field)


@pytest.mark.parametrize(
    ("endpoint", "field"), [(endpoint, field) for endpoint, fields in REQUIRED.items() for field in fields]
)
def test_a_missing_field_is_named(server, place, endpoint, field):
    null = filled(ACCEPTED[endpoint], place) | {field: None}
    left_out = {name: value for name, value in null.items() if name != field}
    with nothing_stored(server):
        for body in (null, left_out):
            refused(server.ask(*address(endpoint, place), body), 400, "invalid_input", field)


REFERENCES = [
    ("POST /api/tasks", "workstream_id"),
    ("PATCH /api/tasks/TASK", "workstream_id"),
    ("POST /api/updates", "task_id"),
    ("POST /api/updates/manual", "task_id"),
    ("POST /api/updates/claude-hook", "task_id"),
    ("POST /api/updates/github-webhook", "task_id"),
]


@pytest.mark.parametrize(("endpoint", "field"), REFERENCES)
def test_an_id_of_nothing_is_not_found(server, place, endpoint, field):
    body = filled(ACCEPTED[endpoint], place) | {field: NOWHERE}
    with nothing_stored(server):
        refused(server.ask(*address(endpoint, place), body), 404, "not_found")


@pytest.mark.parametrize(("endpoint", "field"), REFERENCES)
def test_a_number_beyond_all_tasks_names_nothing(server, place, endpoint, field):
    body = filled(ACCEPTED[endpoint], place)
    with nothing_stored(server):
        for digits in (18, 19, 20, 30, 36):
            answer = server.ask(*address(endpoint, place), body | {field: "9" * digits})
            refused(answer, answer.status_code, {400: "invalid_input", 404: "not_found"}[answer.status_code])


def with_value(endpoint: str, place: dict, field: str, text: str) -> bytes:
    """A good body whose `field` has the JSON text given."""
    usual = {name: value for name, value in filled(ACCEPTED[endpoint], place).items() if name != field}
    return (json.dumps(usual)[:-1] + f'{", " if usual else ""}"{field}": {text}}}').encode()


UNFIT = VALUES_THAT_NO_JSON_HOLDS | VALUES_THAT_CANNOT_BE_KEPT


@pytest.mark.parametrize("text", UNFIT.values(), ids=UNFIT)
def test_a_value_that_cannot_be_kept_is_refused(server, place, text):
    body = with_value("POST /api/updates/manual", place, "data", text)
    with nothing_stored(server):
        refused(
            exchange(server, request_bytes(server, "POST", "/api/updates/manual", body)), 400, "invalid_input"
        )


@pytest.mark.parametrize(("endpoint", "field"), ANY_JSON_GOES)
def test_wherever_any_json_goes_it_is_checked(server, place, endpoint, field):
    with nothing_stored(server):
        for text in VALUES_THAT_CANNOT_BE_KEPT.values():
            raw = request_bytes(server, *address(endpoint, place), with_value(endpoint, place, field, text))
            refused(exchange(server, raw), 400, "invalid_input")


@pytest.mark.parametrize(
    "text",
    ['"plain"', "0", str(2**63 - 1), str(-(2**63)), "1e30", "1e-400", "[" * 20 + "]" * 20, r'"\ud83d\ude00"'],
)
def test_values_just_inside_the_limits_come_back_as_they_were_sent(server, place, text):
    update = server.say(place, "any JSON", data=json.loads(text))
    assert server.get(f"/api/updates/{update['seq']}")["data"] == json.loads(text)


@pytest.mark.parametrize(
    "body", BODIES_THAT_ARE_NOT_AN_OBJECT_IN_UTF8.values(), ids=BODIES_THAT_ARE_NOT_AN_OBJECT_IN_UTF8
)
def test_a_body_that_is_not_an_object_in_utf8_is_refused(server, body):
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/api/workstreams", body)
        refused(exchange(server, raw), 400, "invalid_input")


@pytest.mark.parametrize("endpoint", ACCEPTED)
def test_every_endpoint_takes_objects_only(server, place, endpoint):
    with nothing_stored(server):
        for body in (b"", b"[]", b"null", b'"text"', b"{", b"\xff", b"[" * ABYSS):
            raw = request_bytes(server, *address(endpoint, place), body)
            refused(exchange(server, raw), 400, "invalid_input")


def test_of_a_key_that_comes_twice_the_last_one_counts(server):
    raw = request_bytes(server, "POST", "/api/workstreams", b'{"name": "first", "name": "last"}')
    assert exchange(server, raw).json()["name"] == "last"


OTHER_MEDIA_TYPES = [
    None,
    "",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
]
OTHER_MEDIA_TYPES += ["application/octet-stream", "application/jsonp", "json", "*/*", ";;;", "\xe9\xff"]


@pytest.mark.parametrize(
    ("endpoint", "media_type"),
    [(endpoint, "text/plain") for endpoint in ACCEPTED]
    + [("POST /api/workstreams", media_type) for media_type in OTHER_MEDIA_TYPES],
)
def test_a_body_of_another_media_type_is_refused(server, place, endpoint, media_type):
    body = json.dumps(filled(ACCEPTED[endpoint], place)).encode()
    raw = request_bytes(server, *address(endpoint, place), body, Content_Type=media_type)
    with nothing_stored(server):
        refused(exchange(server, raw), 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "Application/JSON", 'application/json;charset="UTF-8"']
)
def test_the_json_media_type_may_have_parameters(server, media_type):
    raw = request_bytes(server, "POST", "/api/workstreams", NAMED.encode(), Content_Type=media_type)
    assert exchange(server, raw).status == 201


@pytest.mark.parametrize(
    "body", [b"\x1f\x8b\x08 garbage", gzip.compress(NAMED.encode())], ids=["garbage", "real"]
)
def test_a_compressed_body_is_refused(server, body):
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/api/workstreams", body, Content_Encoding="gzip")
        answer = exchange(server, raw)
        refused(answer, answer.status, {400: "invalid_input", 415: "unsupported_media_type"}[answer.status])


# ------------------------------------------------------------------------------------------------------
# sizes and framing
# ------------------------------------------------------------------------------------------------------

HUGE = 64 * 1024 * 1024
BODY = NAMED.encode()


def chunked(*chunks: bytes) -> bytes:
    """A body in chunks, with the last one."""
    return b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


@pytest.mark.parametrize(
    "endpoint", ["POST /api/workstreams", "PATCH /api/tasks/TASK", "POST /api/updates/github-webhook"]
)
def test_64_mib_are_too_large(server, place, endpoint):
    raw = request_bytes(server, *address(endpoint, place), b'"' + b"x" * HUGE + b'"')
    with nothing_stored(server):
        refused(exchange(server, raw), 413, "too_large")


@pytest.mark.parametrize("length", [str(HUGE), "1" + "0" * 30], ids=["64 MiB", "10^30"])
def test_a_body_that_announces_itself_too_large_is_not_waited_for(server, length):
    raw = request_bytes(server, "POST", "/api/workstreams", Content_Length=length)
    with nothing_stored(server):
        refused(exchange(server, raw), 413, "too_large")


@pytest.mark.parametrize(
    "chunks",
    [[BODY + b" " * HUGE], [BODY, *[b" " * 65536] * 1024], [b'{"name": "', *[b"x" * 65536] * 1024, b'"}']],
    ids=["one chunk", "a whole body, then blanks", "a long name"],
)
def test_chunks_may_not_add_up_to_more_than_a_body(server, chunks):
    headers = {"Content_Length": None, "Transfer_Encoding": "chunked"}
    raw = request_bytes(server, "POST", "/api/workstreams", chunked(*chunks), **headers)
    with nothing_stored(server):
        refused(exchange(server, raw), 413, "too_large")


def test_a_body_in_chunks_is_read_whole(server):
    headers = {"Content_Length": None, "Transfer_Encoding": "chunked"}
    raw = request_bytes(server, "POST", "/api/workstreams", chunked(BODY[:5], BODY[5:]), **headers)
    assert exchange(server, raw).json()["name"] == "a workstream"


CUT_SHORT = {
    "fewer bytes than announced": ({"Content_Length": "100"}, BODY),
    "no bytes": ({"Content_Length": "100"}, b""),
    "no last chunk": ({"Transfer_Encoding": "chunked", "Content_Length": None}, chunked(BODY)[:-5]),
    "no chunk": ({"Transfer_Encoding": "chunked", "Content_Length": None}, b""),
    "a chunk cut short": ({"Transfer_Encoding": "chunked", "Content_Length": None}, b"ff\r\n" + BODY),
    "no length": ({"Content_Length": None}, b""),
    "a chunk size of letters": ({"Transfer_Encoding": "chunked", "Content_Length": None}, b"zz\r\n" + BODY),
    "a negative chunk size": ({"Transfer_Encoding": "chunked", "Content_Length": None}, b"-2\r\n" + BODY),
    "an endless chunk size": (
        {"Transfer_Encoding": "chunked", "Content_Length": None},
        b"f" * 40 + b"\r\n" + BODY,
    ),
}


@pytest.mark.parametrize(
    ("headers", "body"), [pytest.param(*case, id=name) for name, case in CUT_SHORT.items()]
)
def test_a_body_that_does_not_arrive_whole_is_refused(server, headers, body):
    raw = request_bytes(server, "POST", "/api/workstreams", body, **headers)
    with nothing_stored(server):
        refused(exchange(server, raw, finished=True), 400, "invalid_input")


def test_the_server_without_gevent_reads_no_further_than_what_arrived(fresh):
    server = fresh(MONITOR_THREADS="1")
    with nothing_stored(server):
        for headers, body in CUT_SHORT.values():
            raw = request_bytes(server, "POST", "/api/workstreams", body, **headers)
            refused(exchange(server, raw, finished=True), 400, "invalid_input")


def test_the_server_without_gevent_outlives_a_chunk_that_promises_more_than_it_holds(fresh):
    server = fresh(MONITOR_THREADS="1")
    headers, body = CUT_SHORT["an endless chunk size"]
    for path in ("/api/updates/github-webhook", "/api/updates/manual"):
        raw = request_bytes(server, "POST", path, body, **headers)
        refused(exchange(server, raw, finished=True), 400, "invalid_input")
    assert server.get("/health") == {"status": "ok"}


LENGTHS = ["-1", "abc", "", "1_0", "+24", "24, 24", "0x18", "\xb2\xb4", "24 24"]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_content_length_that_is_no_number_is_refused(server, length):
    raw = request_bytes(server, "POST", "/api/workstreams", BODY, Content_Length=length)
    with nothing_stored(server):
        refused(exchange(server, raw, finished=True), 400, "invalid_input")


TWO_LENGTHS = {
    "two lengths": {"Content_Length": f"{len(BODY)}\r\nContent-Length: 3"},
    "a length and chunks": {"Transfer_Encoding": "chunked"},
    "an unknown encoding": {"Transfer_Encoding": "xchunked"},
}


@pytest.mark.parametrize("headers", TWO_LENGTHS.values(), ids=TWO_LENGTHS.keys())
def test_a_body_whose_end_is_a_matter_of_opinion_is_refused(server, headers):
    body = chunked(BODY) if headers.get("Transfer_Encoding") == "chunked" else BODY
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/api/workstreams", body, **headers)
        refused(exchange(server, raw, finished=True), 400, "invalid_input")


NO_REQUESTS = {
    "words": b"open the door\r\n\r\n",
    "one word": b"GET\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": b"GET /health HTTP/9.9\r\n\r\n",
    "a version that is none": b"GET /health HTTP/x.y\r\n\r\n",
    "a very long request line": b"GET /api/updates?q=" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "a very long header": b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 200_000 + b"\r\n\r\n",
    "very many headers": b"GET /health HTTP/1.1\r\n" + b"X-Many: x\r\n" * 1000 + b"\r\n",
}


@pytest.mark.parametrize("raw", NO_REQUESTS.values(), ids=NO_REQUESTS.keys())
def test_what_is_no_request_gets_a_4xx_and_leaves_no_trace_of_a_fault(server, raw):
    traces = server.output.count("Traceback")
    with nothing_stored(server):
        assert 400 <= exchange(server, raw).status < 500
    assert server.output.count("Traceback") == traces


@pytest.mark.parametrize(
    "raw",
    [NO_REQUESTS["a very long request line"], NO_REQUESTS["a very long header"]],
    ids=["line", "header"],
)
def test_a_request_that_is_too_long_is_told_so_in_a_sentence(server, raw):
    answer = exchange(server, raw)
    assert answer.headers["Content-Type"].startswith("application/json"), answer
    assert len(answer.json()["message"]) > 10


# ------------------------------------------------------------------------------------------------------
# paths and queries
# ------------------------------------------------------------------------------------------------------

BAD_NAMES = words(
    """
    %zz % %f %00 %ff %c0%80 %ed%a0%80 %0d%0aX-Injected:%20yes %1b[31m \xff ..%2f..%2fetc%2fpasswd ' "
    %27%20OR%201=1-- nope abc -1 1.0 1_0 %EF%BC%91%EF%BC%92
    """
)
BAD_NAMES += ["9" * 18, "9" * 19, "9" * 30, "9" * 40, "x" * 3000, NOWHERE]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr_of)
def test_a_path_that_names_nothing_is_not_found(server, name):
    for path in ("/api/workstreams/", "/api/tasks/", "/api/updates/", "/api//"):
        answer = exchange(server, request_bytes(server, "GET", path + name))
        refused(answer, 404, "not_found")
        assert "X-Injected" not in answer.headers
    with nothing_stored(server):
        refused(
            exchange(server, request_bytes(server, "PATCH", f"/api/tasks/{name}", BODY)), 404, "not_found"
        )


MALFORMED = {
    "/api/workstreams": "include_archived=maybe",
    "/api/tasks": """
        workstream_id=nope workstream_id=%00 status=nope status=ACTIVE include_hidden=maybe
        include_archived=maybe q=%00
    """,
    "/api/updates": """
        task_id=nope task_id=%zz task_id=%ff task_id=%27%20OR%201=1-- workstream_id=nope level=loud level=%ff
        source=%00 kind=%00 tag=%00 tag=fine&tag=%00 q=%00 after_seq=x after_seq=1.5 after_seq=1_0
        after_seq=%EF%BC%91 after_seq=1e3 before_seq=x limit=x limit=1.5 limit=1_0 limit=0x10 limit=%20
        since=yesterday since=1 since=%00 until=2026-13-01T00:00:00Z until=2026-01-01T25:00:00Z order=sideways
        order=DESC; total=maybe
    """,
    "/api/stream": "task_id=nope workstream_id=nope level=loud source=%00 kind=%00 tag=%00",
}


@pytest.mark.parametrize(
    ("path", "filter"), [(path, text) for path, filters in MALFORMED.items() for text in words(filters)]
)
def test_a_malformed_filter_is_named(server, path, filter):
    answer = exchange(server, request_bytes(server, "GET", f"{path}?{filter}"))
    refused(answer, 400, "invalid_input", filter.partition("=")[0])


ODD_QUERIES = words(
    """
    q=%ff q=% q=%zz kind=%ed%a0%80 source=%c0%80 tag=%ff&tag=%fe q=%F0%9F%8E%89 = &&=& q =x q=a;b %00=%00
    a[]=1 unknown=1 limit=1&limit=2 since=0001-01-01T00:00:00%2B23:59 until=9999-12-31T23:59:59-23:59
    """
)
ODD_QUERIES += [f"{name}={'9' * 40}" for name in words("limit after_seq before_seq since task_id")]
ODD_QUERIES += [f"{name}={'9' * digits}" for name in ("task_id", "workstream_id") for digits in (18, 19, 30)]
ODD_QUERIES += ["q=" + "x" * 7000, "q=" + "%22" * 2000, "q=" + "a+" * 3000, "tag=x&" * 1000, "&" * 5000]


@pytest.mark.parametrize("path", ["/api/updates", "/api/tasks"])
@pytest.mark.parametrize("query", ODD_QUERIES, ids=repr_of)
def test_an_odd_query_gets_a_list_or_a_sentence(server, query, path):
    answer = exchange(server, request_bytes(server, "GET", f"{path}?{query}"))
    if answer.status == 200:
        assert isinstance(answer.json()["items"], list)
    else:
        refused(answer, 400, "invalid_input")


# ------------------------------------------------------------------------------------------------------
# anything at all
# ------------------------------------------------------------------------------------------------------

SURPRISES = st.sampled_from(
    [1e999, -1e999, float("nan"), 2**63, -(2**63) - 1, 10**30, "\0", "\ud800", "", " ", "1"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | SURPRISES
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({name for body in ACCEPTED.values() for name in body})
PAYLOAD_FIELDS = words(
    """
    hook_event_name tool_name tool_input tool_response session_id error cwd action repository full_name
    workflow_run workflow_job sender commits ref pull_request
    """
)
ANY_PAYLOAD = st.dictionaries(st.sampled_from(PAYLOAD_FIELDS), ANY_JSON, max_size=6)
ANY_BODY = ANY_JSON | st.dictionaries(st.sampled_from(FIELDS), ANY_JSON, max_size=6)
ENDPOINTS = st.sampled_from(sorted(ACCEPTED))
FILTERS = words(
    """
    task_id workstream_id source kind tag level q status since until limit order after_seq before_seq total
    include_hidden include_archived attention
    """
)
OVER_SOCKETS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def send(server, place: dict, endpoint: str, body) -> None:
    """Send a body; assert that it is either stored or refused, and that the answer says which."""
    before = head(server)
    raw, media_type = json.dumps(body).encode(), {"Content-Type": "application/json"}
    answer = server.ask(*address(endpoint, place), data=raw, headers=media_type)
    assert answer.status_code in (200, 201, 400, 404, 409), (answer.text, body)
    if answer.status_code >= 400:
        code = {400: "invalid_input", 404: "not_found", 409: "conflict"}[answer.status_code]
        refused(answer, answer.status_code, code)
        assert head(server) == before


@OVER_SOCKETS
@given(endpoint=ENDPOINTS, body=ANY_BODY)
def test_any_json_as_a_body_is_stored_or_refused(server, place, endpoint, body):
    send(server, place, endpoint, body)


@OVER_SOCKETS
@given(endpoint=ENDPOINTS, fields=st.data(), value=ANY_JSON)
def test_any_json_as_one_field_of_a_good_body_is_stored_or_refused(server, place, endpoint, fields, value):
    body = filled(ACCEPTED[endpoint], place)
    field = fields.draw(st.sampled_from(sorted(body)))
    send(server, place, endpoint, body | {field: value})


@OVER_SOCKETS
@given(hook=st.sampled_from(["claude-hook", "github-webhook"]), payload=ANY_PAYLOAD, event=ANY_JSON)
def test_a_payload_of_any_shape_is_stored_or_refused(server, place, hook, payload, event):
    body = {"task_id": place["id"], "payload": payload | {"hook_event_name": event}}
    send(server, place, f"POST /api/updates/{hook}", body | {"headers": {"x-github-event": event}})


@OVER_SOCKETS
@given(
    method=st.sampled_from(["GET", "PATCH"]),
    path=st.sampled_from(["/api/tasks/", "/api/workstreams/", "/api/updates/", "/api/", "/"]),
    name=st.text(max_size=12) | st.integers(0).map(str) | st.from_regex("[0-9a-f-]{4,36}", fullmatch=True),
)
def test_any_path_gets_an_answer(server, method, path, name):
    quoted = urllib.parse.quote(name.encode("utf-8", "surrogatepass"), safe="")
    answer = server.ask(method, path + quoted, {} if method == "PATCH" else None)
    if answer.status_code >= 400:
        codes = {404: "not_found", 405: "method_not_allowed", 409: "conflict"}
        refused(answer, answer.status_code, codes[answer.status_code])


@OVER_SOCKETS
@given(
    path=st.sampled_from(["/api/updates", "/api/tasks", "/api/workstreams"]),
    query=st.dictionaries(st.sampled_from(FILTERS), st.text(max_size=12), max_size=3),
)
def test_any_query_gets_a_list_or_a_sentence(server, path, query):
    as_bytes = {name: text.encode("utf-8", "surrogatepass") for name, text in query.items()}
    answer = server.ask("GET", path, params=as_bytes)
    if answer.status_code == 200:
        assert isinstance(answer.json()["items"], list)
    else:
        code = {400: "invalid_input", 409: "conflict"}[answer.status_code]
        refused(answer, answer.status_code, code)
