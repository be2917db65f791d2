"""What one client can do: sizes, framing, slow and silent peers, too many of them; others do not notice."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Server, wait_until
from rig import Browser, changed, serving
from wire import exchange, head, nothing_stored, refused, request_bytes, words

import monitor

KIB = 1024
MIB = 1024 * KIB

# --- sizes -----------------------------------------------------------------------------------------------


def nested(levels: int):
    """A list of a list ... so many levels deep."""
    value = 1
    for _ in range(levels):
        value = [value]
    return value


JUST_INSIDE = {
    "a message of 64 KiB": {"message": "é" * 64 * KIB},
    "100 tags of 200 characters": {"tags": [f"{number:0200}" for number in range(100)]},
    "64 levels with the body's own": {"data": nested(63)},
    "a source of 200 characters": {"source": "s" * 200},
    "a kind of 200 characters": {"kind": "k" * 200},
}
JUST_OUTSIDE = {
    "message": {"message": "é" * (64 * KIB + 1)},
    "tags": {"tags": [f"{number}" for number in range(101)]},
    "tags, one too long": {"tags": ["x" * 201]},
    "source": {"source": "s" * 201},
    "kind": {"kind": "k" * 201},
}


@pytest.mark.parametrize("fields", JUST_INSIDE.values(), ids=JUST_INSIDE.keys())
def test_an_update_may_be_as_large_as_the_limits(server, task, fields):
    body = {"task_id": task["id"], "message": "x", "source": "s"} | fields
    stored = server.post("/api/updates", **body)
    assert stored | body == stored
    assert server.get(f"/api/updates/{stored['seq']}") == stored


@pytest.mark.parametrize("name", JUST_OUTSIDE)
def test_an_update_may_be_no_larger(server, task, name):
    body = {"task_id": task["id"], "message": "x", "source": "s"} | JUST_OUTSIDE[name]
    with nothing_stored(server):
        refused(server.ask("POST", "/api/updates", body), 400, "invalid_input", name.partition(",")[0])


def test_json_may_be_no_deeper(server, task):
    body = {"task_id": task["id"], "message": "x", "data": nested(64)}
    with nothing_stored(server):
        refused(server.ask("POST", "/api/updates/manual", body), 400, "invalid_input")


def test_a_name_has_at_most_500_characters(server):
    workstream = server.post("/api/workstreams", name="é" * 500)
    assert server.new_task("☃" * 500, workstream["id"])["name"] == "☃" * 500
    for path, body in (("workstreams", {}), ("tasks", {"workstream_id": workstream["id"]})):
        refused(server.ask("POST", f"/api/{path}", body | {"name": "x" * 501}), 400, "invalid_input", "name")


def body_of(task: dict, size: int, **fields) -> bytes:
    """The JSON of an update that has exactly so many bytes."""
    start = json.dumps({"task_id": task["id"]} | fields | {"data": ""}).encode()
    return start[:-2] + b"x" * (size - len(start)) + b'"}'


def test_a_body_has_at_most_one_mebibyte(server, task):
    path, fields = "/api/updates/manual", {"message": "large"}
    for size, status in ((MIB, 201), (MIB + 1, 413)):
        answer = exchange(server, request_bytes(server, "POST", path, body_of(task, size, **fields)))
        assert answer.status == status


def test_a_webhook_has_at_most_25(server, task):
    path, fields = "/api/updates/github-webhook", {"payload": {"zen": "Calm."}}
    large = request_bytes(server, "POST", path, body_of(task, 3 * MIB, **fields))
    assert exchange(server, large).status == 201
    with nothing_stored(server):
        announced = request_bytes(server, "POST", path, Content_Length=str(25 * MIB + 1))
        refused(exchange(server, announced), 413, "too_large")


@pytest.fixture(scope="module")
def heavy(server):
    """A task with twelve updates of almost a mebibyte."""
    task = server.new_task("heavy")
    for number in range(12):
        server.say(task, f"heavy {number}", data="x" * (MIB - 300))
    return task


def test_a_page_is_bounded_by_bytes_never_empty_and_says_how_many_there_are(server, heavy):
    """Who goes on after its last update gets them all."""
    cursor, found, pages = 0, [], 0
    while len(found) < 12:
        response = server.ask("GET", f"/api/updates?task_id={heavy['id']}&after_seq={cursor}&limit=200")
        assert len(response.content) < 8.5 * MIB
        items = response.json()["items"]
        assert items
        found += [update["message"] for update in items]
        cursor, pages = items[-1]["seq"], pages + 1
    assert found == [f"heavy {number}" for number in range(12)]
    assert pages == 2
    assert server.get("/api/updates", task_id=heavy["id"], limit=1)["total"] == 12


@pytest.mark.parametrize("page", ["/tasks/TASK", "/stream"])
def test_a_page_that_bytes_cut_short_leads_to_the_older_ones(server, heavy, page):
    path, seen = page.replace("TASK", heavy["id"]), []
    with Browser(server) as browser:
        for _ in range(4):
            html = browser.get(path).text
            seen += re.findall(r"heavy (\d+)", html)
            older = re.search(r'href="([^"]*before_seq=\d+[^"]*)"', html)
            if older is None:
                break
            path = older[1].replace("&amp;", "&")
            path = path if path.startswith("/") else page.replace("TASK", heavy["id"]) + path
            if "0" in seen:
                break
    assert {str(number) for number in range(12)} <= set(seen)


# --- framing ---------------------------------------------------------------------------------------------

HOST = b"Host: localhost\r\n"
POST = b"POST /api/workstreams HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
NAMED = b'{"name": "x"}'
CHUNKED = b"Transfer-Encoding: chunked\r\n"
MALFORMED = {
    "HTTP/0.9": b"GET /health\r\n",
    "HTTP/0.9 as a version": b"GET /health HTTP/0.9\r\n" + HOST + b"\r\n",
    "HTTP/2 as a version": b"GET /health HTTP/2.0\r\n" + HOST + b"\r\n",
    "small letters": b"get /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "two blanks": b"GET  /health HTTP/1.1\r\n" + HOST + b"\r\n",
    "bare LF after the request line": b"GET /health HTTP/1.1\n" + HOST + b"\r\n",
    "bare LF after a header": b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n",
    "bare LF at the end": b"GET /health HTTP/1.1\r\n" + HOST + b"\n",
    "bare CR": b"GET /health HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n",
    "a folded header": b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: b\r\n c\r\n\r\n",
    "a header that is folded with a tab": b"GET /health HTTP/1.1\r\n" + HOST + b"X-A: b\r\n\tc\r\n\r\n",
    "a first header that is folded": b"GET /health HTTP/1.1\r\n " + HOST + b"\r\n",
    "a header without a colon": b"GET /health HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n",
    "a blank before the colon": POST + b"Content-Length : 13\r\n\r\n" + NAMED,
    "a length of 10^30": POST + b"Content-Length: 1" + b"0" * 30 + b"\r\n\r\n" + NAMED,
    "a length with a sign": POST + b"Content-Length: +13\r\n\r\n" + NAMED,
    "a length with an underscore": POST + b"Content-Length: 1_3\r\n\r\n" + NAMED,
    "two lengths": POST + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + NAMED,
    "the same length twice": POST + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + NAMED,
    "a list of lengths": POST + b"Content-Length: 13, 13\r\n\r\n" + NAMED,
    "a length and chunks": POST
    + b"Content-Length: 13\r\n"
    + CHUNKED
    + b"\r\nd\r\n"
    + NAMED
    + b"\r\n0\r\n\r\n",
    "chunks twice": POST + CHUNKED + CHUNKED + b"\r\nd\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "chunks in a list": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\nd\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "a coding that is no coding": POST + b"Transfer-Encoding: identity\r\n\r\n" + NAMED,
    "a chunk size of letters": POST + CHUNKED + b"\r\nzz\r\n" + NAMED,
    "a request behind a broken chunk": POST
    + CHUNKED
    + b"\r\n3\r\n{} -GET /health HTTP/1.1\r\n"
    + HOST
    + b"\r\n",
    "a negative chunk size": POST + CHUNKED + b"\r\n-2\r\n" + NAMED,
    "a chunk size with a sign": POST + CHUNKED + b"\r\n+d\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "a hexadecimal chunk size": POST + CHUNKED + b"\r\n0xd\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "a chunk size with an underscore": POST + CHUNKED + b"\r\n0_d\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "an endless chunk size": POST + CHUNKED + b"\r\n" + b"f" * 5000,
    "a chunk longer than it says": POST + CHUNKED + b"\r\n3\r\n" + NAMED + b"\r\n0\r\n\r\n",
    "two hosts": b"GET /api/tasks HTTP/1.1\r\n" + HOST + HOST + b"\r\n",
    "an empty host": b"GET /api/tasks HTTP/1.1\r\nHost:\r\n\r\n",
    "NUL in a header": b"GET /api/tasks HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
    "half a request": POST + b"Content-Length: 13\r\n\r\n" + NAMED[:5],
    "half a header": POST[:40],
}


def statuses(server, raw: bytes) -> list[int]:
    """The statuses of all that is answered to some bytes until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3})", answer)]


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED.keys())
def test_framing_that_can_be_read_in_two_ways_is_refused(server, raw):
    with nothing_stored(server):
        answered = statuses(server, raw)
        assert answered == [] or 400 <= answered[0] < 500
        assert len(answered) < 2
    assert "Traceback" not in server.output


@pytest.mark.parametrize("body", [b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", b"\r\n" * 20, b"x" * 70_000])
@pytest.mark.parametrize(
    "start", [b"GET /health", b"POST /api/workstreams", b"POST /nope", b"DELETE /api/tasks"]
)
def test_a_body_that_nobody_reads_is_never_taken_for_a_request(server, start, body):
    """Wherever the server stops reading, what comes next on the connection is the next request or nothing."""
    framing = b" HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % len(body)
    last = b"GET /api/nope HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    answered = statuses(server, start + framing + body + last)
    assert len(answered) in (1, 2)
    assert answered[1:] in ([], [404])


def test_requests_on_one_connection_are_answered_in_turn(server):
    one = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    write = POST + b"Content-Length: 13\r\n\r\n" + NAMED
    chunks = POST + CHUNKED + b"\r\nD;note=x\r\n" + NAMED + b"\r\n0\r\n\r\n"
    last = b"GET /api/nope HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
    assert statuses(server, one + write + chunks + one + last) == [200, 201, 201, 200, 404]


def test_a_client_may_wait_to_be_told_to_go_on(server):
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 13\r\nConnection: close\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(NAMED)
        assert connection.recv(1000).startswith(b"HTTP/1.1 201 ")


# --- slow and silent peers -------------------------------------------------------------------------------

IMPATIENT = """
monitor.IDLE_SECONDS, monitor.HEAD_SECONDS, monitor.BODY_SECONDS, monitor.DEAD_PEER_SECONDS = 0.8, 0.4, 0.4, 1
monitor.MAX_CONNECTIONS = 40
"""


@pytest.fixture(scope="module")
def impatient(tmp_path_factory):
    """A server with little patience."""
    with serving(changed(IMPATIENT), tmp_path_factory.mktemp("impatient") / "monitor.db") as server:
        yield server


HUNDRED = b"Content-Length: 100\r\n\r\n"
SLOW = {  # what is sent at once, and what then comes drop by drop
    "nothing at all": (b"", b""),
    "half a request line": (b"GET /hea", b""),
    "a request line drop by drop": (b"GET /", b"x"),
    "half the headers": (b"GET /health HTTP/1.1\r\n" + HOST, b""),
    "headers drop by drop": (b"GET /health HTTP/1.1\r\n" + HOST + b"X: ", b"x"),
    "header after header": (b"GET /health HTTP/1.1\r\n" + HOST, b"X: y\r\n"),
    "no body": (POST + HUNDRED, b""),
    "a body drop by drop": (POST + HUNDRED, b" "),
    "a form drop by drop": (
        b"POST /workstreams HTTP/1.1\r\n"
        + HOST
        + b"Content-Type: application/x-www-form-urlencoded\r\n"
        + HUNDRED,
        b"x",
    ),
    "no chunk": (POST + CHUNKED + b"\r\n", b""),
    "chunk after chunk": (POST + CHUNKED + b"\r\n", b"1\r\n \r\n"),
    "a chunk size drop by drop": (POST + CHUNKED + b"\r\n", b"0"),
    "a body that nobody reads": (b"GET /health HTTP/1.1\r\n" + HOST + HUNDRED, b""),
    "such a body drop by drop": (b"GET /health HTTP/1.1\r\n" + HOST + HUNDRED, b"x"),
    "such chunks": (b"GET /health HTTP/1.1\r\n" + HOST + CHUNKED + b"\r\n", b"1\r\nx\r\n"),
    "a body that is refused": (b"POST /api/tasks HTTP/1.1\r\n" + HOST + HUNDRED, b"x"),
    "a body for a foreign host": (b"POST /api/tasks HTTP/1.1\r\nHost: evil.example\r\n" + HUNDRED, b"x"),
    "a body that is too large": (POST + b"Content-Length: 900000000\r\n\r\n", b"x" * 10_000),
    "idle after an answer": (b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n", b""),
}


def cut_off(server, begin: bytes, drop: bytes, patience: float) -> float | None:
    """How long the server keeps a slow sender; None when it is still there after `patience` seconds."""
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.settimeout(0.1)
        with contextlib.suppress(ConnectionError):
            connection.sendall(begin)
            while time.monotonic() - begun < patience:
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(65536):
                        return time.monotonic() - begun
                with contextlib.suppress(TimeoutError):
                    connection.sendall(drop)
            return None
    return time.monotonic() - begun


@pytest.fixture(scope="module")
def kept(impatient):
    """How long each slow sender is kept, all at once, and how long others then wait for an answer."""
    found, waits = {}, []

    def send(name: str) -> None:
        found[name] = cut_off(impatient, *SLOW[name], patience=2.5)

    threads = [threading.Thread(target=send, args=[name]) for name in SLOW]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        begun = time.monotonic()
        assert impatient.ask("GET", "/api/tasks").status_code == 200
        waits.append(time.monotonic() - begun)
        time.sleep(0.05)
    return found, waits


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_sender_is_cut_off(kept, name):
    assert kept[0][name] is not None, "it is still connected"


def test_others_do_not_notice_slow_senders(kept):
    assert sorted(kept[1])[len(kept[1]) // 2] < 1
    assert max(kept[1]) < 1.5


def test_a_slow_body_is_told_so(impatient):
    raw = request_bytes(impatient, "POST", "/api/workstreams", Content_Length="100")
    refused(exchange(impatient, raw), 408, "timed_out")


def test_the_time_limits_are_such_that_ordinary_clients_do_not_meet_them():
    assert 10 <= monitor.HEAD_SECONDS <= 60
    assert 30 <= monitor.BODY_SECONDS <= 120
    assert 30 <= monitor.IDLE_SECONDS <= 300
    assert monitor.DEAD_PEER_SECONDS == 60
    assert monitor.MAX_CONNECTIONS > monitor.MAX_STREAMS


def test_a_peer_that_stops_reading_is_cut_off(impatient):
    """It would hold its stream and its connection for ever."""
    task = impatient.new_task()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", impatient.port))
        deaf.sendall(b"GET /api/stream HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: impatient.get("/health", full="1")["streams"] == 1)
        for _ in range(6):
            impatient.say(task, "x", data="x" * 500_000)
        wait_until(lambda: impatient.get("/health", full="1")["streams"] == 0, 8)


def connections(server) -> int:
    """How many sockets a server process holds, its listener too."""
    return sum("socket:" in os.readlink(name) for name in Path(f"/proc/{server.process.pid}/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_large_answer_that_nobody_reads_is_given_up(impatient):
    task = impatient.new_task()
    for _ in range(5):
        impatient.say(task, "x", data="x" * 900_000)
    impatient.session.close()
    quiet = wait_until(lambda: stable(lambda: connections(impatient)))
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", impatient.port))
        deaf.sendall(b"GET /api/updates?limit=200 HTTP/1.1\r\n" + HOST + b"\r\n")
        wait_until(lambda: connections(impatient) == quiet + 1)
        wait_until(lambda: connections(impatient) == quiet, 8)


def stable(value):
    """A value, once it has not changed for longer than idle connections are kept."""
    before = value()
    time.sleep(1)
    return value() == before and before


def test_too_many_connections_are_turned_away_until_some_have_gone(impatient):
    wait_until(lambda: impatient.ask("GET", "/health").status_code == 200)
    with contextlib.ExitStack() as stack:
        for _ in range(60):
            stack.enter_context(socket.create_connection(("127.0.0.1", impatient.port), 5))
        answer = exchange(impatient, request_bytes(impatient, "GET", "/health"))
        assert answer.status == 503
        assert int(answer.headers["Retry-After"]) > 0
    wait_until(lambda: exchange(impatient, request_bytes(impatient, "GET", "/health")).status == 200)


def test_it_may_open_as_many_files_as_the_system_lets_it(server):
    soft, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


# --- writing ---------------------------------------------------------------------------------------------


def test_accepted_connections_send_at_once_and_hold_little():
    listener = monitor.listen("127.0.0.1", 0)
    with listener, socket.create_connection(listener.getsockname()) as _, listener.accept()[0] as accepted:
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * monitor.SEND_BUFFER
        if sys.platform == "linux":
            limit = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert limit == monitor.DEAD_PEER_SECONDS * 1000


COUNTING = """
import gevent.server
class Counted(gevent.server.GeventSocket):
    def sendall(self, data, *flags):
        print("sent", bytes(data[:12]), flush=True)
        return super().sendall(data, *flags)
gevent.server.GeventSocket = Counted
"""
ANSWERS = words("/health /api/tasks /dashboard /nope /tasks/1 /static/style.css /api/updates?limit=x")


def test_an_answer_is_sent_in_one_piece(tmp_path):
    """Two small writes on a kept-alive connection cost a round trip, 44 ms."""
    with serving(changed(COUNTING), tmp_path / "monitor.db") as server:
        task = server.new_task()
        server.say(task, "one")
        for path in ANSWERS:
            server.ask("GET", path)
        server.ask("HEAD", "/health")
        server.stop()
        assert server.output.count("sent b'HTTP/1.1 ") == 3 + len(ANSWERS) + 1
        assert server.output.count("sent b") == server.output.count("sent b'HTTP/1.1 ")


def test_requests_on_a_kept_connection_do_not_stall(server):
    """The best of some: a stall by the network stack would hit each of them."""
    server.ask("GET", "/health")
    waits = []
    for _ in range(20):
        begun = time.monotonic()
        server.ask("GET", "/health")
        waits.append(time.monotonic() - begun)
    assert min(waits) < 0.02


# --- the access log --------------------------------------------------------------------------------------


def test_the_access_log_holds_neither_queries_nor_control_bytes(tmp_path):
    requests = [
        b"GET /api/tasks?q=hidden-word HTTP/1.1\r\n" + HOST,
        b"GET /api/\x1b[31mred\x07\x7f\xff?x=hidden-word HTTP/1.1\r\n" + HOST,
        b"GET /login?token=hidden-word#hidden-word HTTP/1.1\r\n" + HOST,
        b"GET /seen?a=b?hidden-word HTTP/1.1\r\nHost: evil.example\r\n",
        b"G\x1bT /odd?hidden-word HTTP/1.1\r\n" + HOST,
        b"GET /bad?hidden-word HTTP/7.1\r\n" + HOST,
        b"GET /line?hidden-word \x1b]0;x\x07 HTTP/1.1\r\n" + HOST,
        b"GET /folded?hidden-word HTTP/1.1\r\n" + HOST + b" \x1b[2Jhidden-word\r\n",
        b"GET /long?hidden-word" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST,
        POST + b"Content-Length: hidden-word\r\n",
        POST + CHUNKED + b"\r\nhidden-word\x1b[31m\r\n",
    ]
    with serving(Server, tmp_path / "monitor.db", "--access-log") as server:
        for raw in requests:
            statuses(server, raw + b"Connection: close\r\n\r\n")
        wait_until(lambda: "/seen" in server.output)
        server.stop()
        assert '"GET /api/tasks HTTP/1.1" 200' in server.output
        assert "GET /login HTTP/1.1" in server.output
        assert "hidden-word" not in server.output
        assert not re.search(r"[^\x20-\x7e\n]", server.output)


def test_without_being_asked_nothing_is_logged(fresh):
    server = fresh()
    for path in ("/health", "/nope", "/tasks/99", "/api/tasks/99", "/api/updates?limit=x"):
        server.ask("GET", path)
    assert head(server) == 0
    server.stop()
    assert re.findall("GET|HTTP/|Traceback|Problem", server.output) == []
