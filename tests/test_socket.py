"""The WebSocket, asked by real clients and, byte by byte, by rude ones; on gevent and on threads."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import websocket
from conftest import Server, wait_until
from rig import Browser, changed, made_before, serving
from wire import exchange, refused, request_bytes

import monitor

ENGINES = {"gevent": {}, "threads": {"MONITOR_THREADS": "1"}}
CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # of RFC 6455, with the answer that it must get
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
TOKEN = "tokens may be anything/+=?>~"
HANDSHAKE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
HANDSHAKE |= {"Sec_WebSocket_Key": KEY, "Content_Type": None}


class Client(websocket.WebSocket):
    """A client of the socket: asks and waits for the answer, keeps the events that come meanwhile."""

    def __init__(self, server: Server, **options):
        super().__init__(skip_utf8_validation=True)  # in Python, a second a megabyte
        self.settimeout(20)
        self.kept, self.numbers = [], itertools.count(1)
        self.connect(f"ws://127.0.0.1:{server.port}/api/ws", **options)

    def close(self, *_) -> None:
        """Close it, also when the server has done so: the library leaves its file open then."""
        super().close()
        self.shutdown()

    def next(self) -> dict:
        """The next message, whatever it is."""
        opcode, data = self.recv_data()
        if opcode == CLOSE:
            raise Closed(*struct.unpack("!H", data[:2]), data[2:].decode())
        assert opcode == TEXT and data.isascii()
        return json.loads(data)

    def ask(self, op: str, **fields) -> dict:
        """The answer to a message."""
        number = next(self.numbers)
        self.send(json.dumps({"op": op, "id": number} | fields))
        while (message := self.next()).get("sub"):
            self.kept.append(message)
        assert message.pop("id") == number
        return message

    def do(self, op: str, **fields):
        """What was done, where nothing may go wrong."""
        answer = self.ask(op, **fields)
        assert list(answer) == ["ok"], answer
        return answer["ok"]

    def refused(self, op: str, **fields) -> dict:
        """The error that a message gets."""
        answer = self.ask(op, **fields)
        assert list(answer) == ["error"], answer
        assert " " in answer["error"]["message"], "a sentence for a person"
        return answer["error"]

    def events(self):
        """Yield (sub, event, id, data) as they come."""
        while True:
            message = self.kept.pop(0) if self.kept else self.next()
            yield message["sub"], message["event"], message.get("id"), message["data"]

    def until(self, message: str) -> list[tuple]:
        """The events up to and with the update that says `message`."""
        seen = []
        for event in self.events():
            seen.append(event)
            if event[1] == "update" and event[3]["message"] == message:
                return seen

    def closed(self) -> tuple[int, str]:
        """The code and reason of the close that comes, maybe after something else."""
        with pytest.raises(Closed) as raised:
            while True:
                self.next()
        return raised.value.args


class Closed(Exception):
    """The server closed: code, reason."""


def frame(opcode: int, payload: bytes = b"", fin: bool = True, rsv: int = 0, masked: bool = True) -> bytes:
    """A frame of a client, right or wrong."""
    size, mask = len(payload), b"\x01\x02\x03\x04"
    length = (
        bytes([size])
        if size < 126
        else b"\x7e" + size.to_bytes(2)
        if size < 65536
        else b"\x7f" + size.to_bytes(8)
    )
    head = bytes([fin << 7 | rsv << 4 | opcode, length[0] | masked << 7]) + length[1:]
    return head + (
        mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload)) if masked else payload
    )


class Raw:
    """A WebSocket without a library."""

    def __init__(self, server: Server, ahead: bytes = b"", receive_buffer: int = 0, **headers: str):
        self.line = socket.socket()
        if receive_buffer:
            self.line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.line.settimeout(20)
        self.line.connect(("127.0.0.1", server.port))
        request = request_bytes(server, "GET", "/api/ws", **HANDSHAKE | headers)
        self.line.sendall(request + ahead)
        self.file = self.line.makefile("rb")
        self.status = int(self.file.readline().split()[1])
        self.headers = http.client.parse_headers(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.line.close()

    def send(self, *frames: bytes) -> None:
        """Send frames; the server may hang up meanwhile."""
        with contextlib.suppress(ConnectionError):
            self.line.sendall(b"".join(frames))

    def read_any(self) -> tuple[int, bytes]:
        """The next frame: opcode, payload. (-1, b"") at the end of the connection."""
        with contextlib.suppress(ConnectionError):
            if head := self.file.read(2):
                assert head[0] & 0xF0 == 0x80, "whole messages, no reserved bits"
                assert not head[1] & 0x80, "servers do not mask"
                size = head[1]
                if size > 125:
                    size = int.from_bytes(self.file.read(2 if size == 126 else 8))
                return head[0] & 15, self.file.read(size)
        return -1, b""

    def read(self) -> tuple[int, bytes]:
        """The next frame that is no ping; those are answered."""
        opcode, payload = self.read_any()
        while opcode == PING:
            self.send(frame(PONG, payload))
            opcode, payload = self.read_any()
        return opcode, payload

    def closed(self) -> int:
        """The code with which it is closed; then the connection ends."""
        opcode, payload = self.read()
        while opcode not in (CLOSE, -1):
            opcode, payload = self.read()
        assert opcode == CLOSE, "no close came"
        assert self.read() == (-1, b"")
        return int.from_bytes(payload[:2]) if payload else 1005


def message(op: str, **fields) -> bytes:
    """A message in a frame."""
    return frame(TEXT, json.dumps({"op": op} | fields).encode())


def lives(raw: Raw) -> bool:
    """Whether the connection goes on."""
    raw.send(message("ping", id="alive?"))
    return raw.read() == (TEXT, b'{"id":"alive?","ok":true}')


@pytest.fixture(scope="module", params=ENGINES)
def either(request, tmp_path_factory):
    """A server on gevent, and one on threads: both keep the same promises."""
    running = Server(
        tmp_path_factory.mktemp(request.param) / "monitor.db", "--access-log", **ENGINES[request.param]
    )
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.output


@pytest.fixture
def work(either):
    """A task of its own on that server."""
    return either.new_task()


@pytest.fixture
def talk(either):
    """Opens clients that are closed afterwards: talk(), talk(header=[...])."""
    with contextlib.ExitStack() as stack:
        yield lambda server=either, **options: stack.enter_context(
            contextlib.closing(Client(server, **options))
        )


@pytest.fixture
def raw(either):
    """A raw WebSocket."""
    with Raw(either) as opened:
        assert opened.status == 101
        yield opened


@pytest.fixture(params=ENGINES)
def engine(request):
    """The settings of an engine, for servers of a test's own."""
    return ENGINES[request.param]


def updates(events, sub: str) -> list[str]:
    """The messages of the updates of a subscription."""
    return [data["message"] for name, event, _, data in events if (name, event) == (sub, "update")]


# --- subscriptions --------------------------------------------------------------------------------------


def test_a_subscription_gets_what_the_stream_gets(either, work, talk):
    """Hello, state events and updates, with the same numbers and data as NDJSON, from any cursor on."""
    for number in range(3):
        either.say(work, f"news {number}")
    client = talk(subprotocols=["monitor.v1"])
    assert client.subprotocol == "monitor.v1"
    client.do("subscribe", sub="all", after=0)
    seen = client.until("news 2")
    lines = either.ask("GET", "/api/stream?poll=1&format=ndjson&after_seq=0").text.splitlines()
    told = [json.loads(line) for line in lines]
    assert seen == [("all", line["event"], line.get("id"), line["data"]) for line in told]
    client.do("subscribe", sub="later", after=str(seen[-1][2] - 1), stream=told[0]["data"]["stream"])
    assert [event[1:3] for event in client.until("news 2")] == [("hello", None), ("update", seen[-1][2])]


def test_without_a_cursor_a_subscription_is_live_only(either, work, talk):
    client = talk()
    either.say(work, "before")
    client.do("subscribe", sub="s")
    events = client.events()
    assert next(events)[1] == "hello"
    either.say(work, "after")
    assert next(events)[3]["message"] == "after"


@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        ({"after": 10**15}, "ahead"),
        ({"after": "garbage"}, "unknown"),
        ({"after": [1]}, "unknown"),
        ({"after": -1}, "unknown"),
        ({"after": 1, "stream": "another"}, "other_stream"),
        ({"after": 1, "stream": {}}, "other_stream"),
    ],
)
def test_a_cursor_that_cannot_be_honoured_is_reset(either, work, talk, cursor, reason):
    client = talk()
    client.do("subscribe", sub="s", **cursor)
    events = client.events()
    assert next(events)[3]["resumed"] is False
    assert next(events)[1:] == (
        "reset",
        10**15 and (seq := either.get("/health", full=1)["seq"]),
        {"reason": reason, "seq": seq},
    )
    either.say(work, "live")
    assert next(events)[3]["message"] == "live"


def test_filters_are_changed_on_the_way(either, work, talk):
    """Subscriptions come and go while others run; each gets what it asked for, and nothing once it ended."""
    client, other = talk(), either.new_task()
    client.do("subscribe", sub="task", filter={"task_id": str(work["number"])})
    client.do("subscribe", sub="errors", filter={"level": "error", "task_id": other["id"]})
    client.do("subscribe", sub="tags", filter={"tag": ["a", "b"]})
    either.say(work, "one", tags=["b"])
    either.say(other, "two", level="error")
    either.say(other, "three", tags=["a"])
    seen = []
    while len(seen) < 4:
        sub, event, _, data = next(client.events())
        seen += [(sub, data["message"])] if event == "update" else []
    assert sorted(seen) == [("errors", "two"), ("tags", "one"), ("tags", "three"), ("task", "one")]
    client.do("unsubscribe", sub="task")
    client.do("unsubscribe", sub="errors")
    client.do("subscribe", sub="task", filter={"task_id": other["id"]})
    client.kept.clear()
    either.say(work, "not wanted any more", level="error")
    either.say(other, "wanted")
    assert updates(client.until("wanted"), "task") == ["wanted"]
    assert {sub for sub, event, _, _ in client.kept if event == "update"} == set()


def test_a_name_is_free_again_after_unsubscribing_and_only_then(talk):
    client = talk()
    client.do("subscribe", sub="s")
    assert client.refused("subscribe", sub="s")["error"] == "conflict"
    for _ in range(5):
        client.do("unsubscribe", sub="s")
        client.do("subscribe", sub="s")
    client.do("unsubscribe", sub="s")
    assert client.refused("unsubscribe", sub="s")["error"] == "not_found"


def test_a_subscription_to_little_gets_checkpoints(either, work, talk):
    """So that it need not look through everything again."""
    client = talk()
    client.do("subscribe", sub="s", filter={"source": "nobody"}, after=0)
    events = client.events()
    assert next(events)[1] == "hello"
    assert next(events)[1] == "checkpoint"


def test_there_is_a_bound_of_subscriptions(talk, monkeypatch):
    client = talk()
    for number in range(monitor.MAX_SUBSCRIPTIONS):
        client.do("subscribe", sub=str(number))
    assert client.refused("subscribe", sub="one more")["error"] == "too_many_requests"
    client.do("unsubscribe", sub="7")
    client.do("subscribe", sub="one more")


def test_catching_up_with_ten_thousand_is_exact(tmp_path, engine):
    """While another subscription, the answers and the pings go on."""
    task = made_before(tmp_path / "monitor.db", 10_000)
    with (
        serving(Server, tmp_path / "monitor.db", **engine) as server,
        contextlib.closing(Client(server)) as client,
    ):
        client.do("subscribe", sub="all", after=0)
        client.do("subscribe", sub="some", after=5000)
        server.say(task, "the end")
        seen = client.until("the end")
        seen += client.until("the end")  # of the other one
        last = seen[-1][2]
        for sub, after in (("all", 0), ("some", 5000)):
            numbers = [number for name, event, number, _ in seen if name == sub and event not in ("hello",)]
            assert numbers == list(range(after + 1, last + 1))


def follow_through(server: Server, last: str, cookie: list) -> list[int]:
    """Follow from the beginning, over as many connections as it takes, up to an update; the numbers as they
    came."""
    numbers: list[int] = []
    while True:
        with (
            contextlib.suppress(OSError, websocket.WebSocketException, Closed),
            contextlib.closing(Client(server)) as client,
        ):
            client.do("subscribe", sub="s", after=numbers[-1] if numbers else 0)
            cookie.append(len(numbers))
            for _, event, number, data in client.events():
                assert event != "reset"
                numbers += [] if event == "hello" else [number]
                if event == "update" and data["message"] == last:
                    return numbers
        time.sleep(0.02)


def test_a_reader_resumes_through_crashes_exactly_once_and_writers_too(fresh, engine):
    """Killed, stopped and killed again: nothing acknowledged is lost, doubled or out of order."""
    server = fresh(**engine)
    task, acknowledged, connections = server.new_task(), [], []

    def write(name: int) -> None:
        left = [f"{name}.{number}" for number in range(40)]
        while left:
            with contextlib.suppress(OSError, websocket.WebSocketException, Closed):
                with contextlib.closing(Client(server)) as client:
                    while left:
                        fields = {"task_id": task["id"], "source": "w", "message": left[0]}
                        acknowledged.append(client.do("update", update=fields, key=left[0])["message"])
                        left.pop(0)
            time.sleep(0.02)

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(follow_through, server, "the end", connections) for _ in range(2)]
        writers = [pool.submit(write, name) for name in range(3)]
        for number, end in enumerate((server.kill, server.stop, server.kill)):
            wait_until(lambda number=number: len(acknowledged) > 25 * (number + 1))
            end()
            server.start()
        for writer in writers:
            writer.result(30)
        last = server.say(task, "the end")["seq"]
        assert [reader.result(30) for reader in readers] == [list(range(1, last + 1))] * 2
    stored = server.get("/api/updates", task_id=task["id"], limit=200)["items"]
    said = [update["message"] for update in stored]
    assert sorted(said) == sorted({f"{w}.{n}" for w in range(3) for n in range(40)} | {"the end"})
    assert len(connections) > 4


# --- updates --------------------------------------------------------------------------------------------


def test_an_update_is_acknowledged_once_it_is_stored(either, work, talk):
    fields = {
        "task_id": work["id"],
        "source": "script",
        "message": "hello",
        "level": "warn",
        "tags": ["x"],
        "data": [1],
    }
    stored = talk().do("update", update=fields | {"id": "mine", "seq": 1})
    assert stored == either.get(f"/api/updates/{stored['seq']}")
    assert {name: stored[name] for name in fields} == fields


def test_a_key_makes_an_update_happen_once_also_between_the_socket_and_http(either, work, talk):
    client, fields = talk(), {"task_id": work["id"], "source": "script", "message": "once"}
    key = f"once {work['id']}"
    first = client.do("update", update=fields, key=key)
    assert client.do("update", update=fields, key=key) == first
    answer = either.ask("POST", "/api/updates", fields, headers={"Idempotency-Key": key})
    assert (answer.status_code, answer.json()) == (200, first)
    error = client.refused("update", update=fields | {"message": "another"}, key=key)
    assert error["error"] == "conflict"
    assert either.get("/api/updates", task_id=work["id"])["total"] == 1


def test_secrets_are_masked_on_this_way_too(work, talk):
    secret = "ghp_" + "a1B2" * 9
    fields = {"task_id": work["id"], "source": "script", "message": f"token {secret}", "data": {"x": secret}}
    assert secret not in json.dumps(talk().do("update", update=fields))


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"op": "dance"}, "invalid_input", "op"),
        ({"op": []}, "invalid_input", "op"),
        ({"op": None}, "invalid_input", "op"),
        ({"op": "_cut"}, "invalid_input", "op"),
        ({"op": "subscribe"}, "invalid_input", "sub"),
        ({"op": "subscribe", "sub": 1}, "invalid_input", "sub"),
        ({"op": "subscribe", "sub": ""}, "invalid_input", "sub"),
        ({"op": "subscribe", "sub": "x" * 101}, "invalid_input", "sub"),
        ({"op": "subscribe", "sub": "s", "filter": []}, "invalid_input", "filter"),
        ({"op": "subscribe", "sub": "s", "filter": {"task": "1"}}, "invalid_input", "filter"),
        ({"op": "subscribe", "sub": "s", "filter": {"task_id": 1}}, "invalid_input", "task_id"),
        ({"op": "subscribe", "sub": "s", "filter": {"level": "loud"}}, "invalid_input", "level"),
        ({"op": "subscribe", "sub": "s", "filter": {"tag": "a"}}, "invalid_input", "tag"),
        ({"op": "unsubscribe", "sub": "s"}, "not_found", "sub"),
        ({"op": "update"}, "invalid_input", "update"),
        ({"op": "update", "update": "text"}, "invalid_input", "update"),
        ({"op": "update", "update": {"source": "s", "message": "m"}}, "invalid_input", "task_id"),
        ({"op": "update", "update": {"task_id": "0", "source": "s", "message": "m"}}, "not_found", "task_id"),
        (
            {"op": "update", "update": {"task_id": "1", "source": "s", "message": "m"}, "key": "é"},
            "invalid_input",
            None,
        ),
        (
            {"op": "update", "update": {"task_id": "1", "source": "s", "message": "m"}, "key": 1},
            "invalid_input",
            "key",
        ),
        (
            {"op": "update", "update": {"task_id": "1", "source": "s", "message": "a\0b"}},
            "invalid_input",
            None,
        ),
        ({"op": "update", "update": {"data": float("inf")}}, "invalid_input", None),
        ({"op": "update", "update": {"data": 2**64}}, "invalid_input", None),
        ({"op": "update", "update": {"data": json.loads("[" * 80 + "]" * 80)}}, "invalid_input", None),
    ],
)
def test_what_is_wrong_is_said_in_the_answer_and_the_connection_lives_on(either, talk, fields, code, field):
    client, before = talk(), either.get("/health", full=1)["seq"]
    error = client.refused(**fields)
    assert (error["error"], error.get("field")) == (code, field)
    assert client.do("ping") is True
    assert either.get("/health", full=1)["seq"] == before


@pytest.mark.parametrize("name", ["text", 7, "", "é\u2028", 2**63 - 1])
def test_the_id_of_a_message_comes_back(talk, name):
    client = talk()
    client.send(json.dumps({"op": "ping", "id": name}))
    assert client.next() == {"id": name, "ok": True}


@pytest.mark.parametrize("name", [None, [1], {"a": 1}, 1.5, float("nan")])
def test_an_id_that_is_none_comes_back_as_null(talk, name):
    client = talk()
    client.send(json.dumps({"op": "ping", "id": name}))
    assert client.next()["id"] is None


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "null", '"text"', '{"op":', "[" * 100_000])
def test_what_is_no_object_closes_with_3501(talk, text):
    client = talk()
    client.send(text)
    assert client.closed() == (3501, "a message must be a JSON object")


def test_two_threads_subscribe_and_post_at_once(work, talk):
    """On one connection, as many as like may send; every answer and every event comes whole."""
    client, each = talk(), 40
    client.do("subscribe", sub="all", filter={"task_id": work["id"]})
    lock = threading.Lock()

    def post(name: int) -> None:
        for number in range(each):
            fields = {"task_id": work["id"], "source": "s", "message": f"{name}.{number}", "data": "x" * 5000}
            text = json.dumps({"op": "update", "id": f"{name}.{number}", "update": fields})
            also = json.dumps({"op": "subscribe", "id": f"s{name}.{number}", "sub": f"{name}.{number % 20}"})
            with lock:
                client.send(text)
                client.send(also)

    with ThreadPoolExecutor(2) as pool:
        posting = [pool.submit(post, name) for name in range(2)]
        answers, heard = {}, []
        while len(answers) < 4 * each or len(heard) < 2 * each:
            got = client.next()
            if "sub" not in got:
                answers[got["id"]] = got
            elif (got["sub"], got["event"]) == ("all", "update"):
                heard.append(got)
        for done in posting:
            done.result()
    stored = [answers[f"{name}.{number}"]["ok"] for name in range(2) for number in range(each)]
    assert [got["data"] for got in heard] == sorted(stored, key=lambda update: update["seq"])


# --- who may ask ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A server with a token whose reads are open."""
    with serving(
        Server, tmp_path_factory.mktemp("kept") / "monitor.db", "--access-log", MONITOR_API_TOKENS=TOKEN
    ) as running:
        running.session.headers["Authorization"] = f"Bearer {TOKEN}".encode()
        yield running


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server that answers nobody without a token."""
    settings = {"MONITOR_API_TOKENS": TOKEN, "MONITOR_AUTH_MODE": "strict"}
    with serving(
        Server, tmp_path_factory.mktemp("strict") / "monitor.db", "--access-log", **settings
    ) as running:
        yield running


def bearer(token: str) -> str:
    """A token as a subprotocol."""
    return "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": None},
    ],
)
def test_another_site_is_refused_before_the_upgrade(either, headers):
    answer = exchange(either, request_bytes(either, "GET", "/api/ws", **HANDSHAKE | headers))
    refused(answer, 400 if headers == {"Host": None} and answer.status == 400 else 403, "forbidden")


def test_our_own_pages_and_clients_without_an_origin_are_let_in(either):
    for headers in (
        {},
        {"Origin": either.url},
        {"Origin": either.url.upper()},
        {"Sec_Fetch_Site": "same-origin"},
    ):
        with Raw(either, **headers) as opened:
            assert opened.status == 101
            assert opened.headers["Sec-WebSocket-Accept"] == ACCEPT
            assert lives(opened)


def test_in_relaxed_mode_a_socket_without_a_token_may_read_but_not_write(kept, talk):
    task, client = kept.new_task(), talk(kept)
    client.do("subscribe", sub="s", after=0)
    fields = {"task_id": task["id"], "source": "s", "message": "m"}
    assert client.refused("update", update=fields)["error"] == "unauthorized"
    assert client.refused("update", update={})["error"] == "unauthorized"
    assert kept.get("/api/updates", task_id=task["id"])["total"] == 0
    writer = talk(kept, subprotocols=["monitor.v1", bearer(TOKEN)])
    assert writer.subprotocol == "monitor.v1"
    assert writer.do("update", update=fields)["message"] == "m"
    assert client.until("m")[-1][1] == "update"


@pytest.mark.parametrize(
    "options",
    [
        {"header": [f"Authorization: Bearer {TOKEN.encode().decode('latin-1')}"]},
        {"subprotocols": ["monitor.v1", bearer(TOKEN)]},
        {"subprotocols": [bearer(TOKEN), "monitor.v1"]},
    ],
    ids=["header", "subprotocol", "subprotocol first"],
)
def test_in_strict_mode_a_token_opens_the_socket(strict, talk, options):
    client = talk(strict, **options)
    client.do("subscribe", sub="s")
    assert client.refused("update", update={})["error"] == "invalid_input"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Sec_WebSocket_Protocol": "monitor.v1"},
        {"Sec_WebSocket_Protocol": f"monitor.v1, {bearer('wrong')}"},
        {"Sec_WebSocket_Protocol": "monitor.v1, bearer."},
        {"Sec_WebSocket_Protocol": "monitor.v1, bearer.a"},
        {"Sec_WebSocket_Protocol": "monitor.v1, bearer.ÿÿ"},
        {"Sec_WebSocket_Protocol": f"monitor.v1, xbearer.{bearer(TOKEN)[7:]}x"},
    ],
)
def test_in_strict_mode_nobody_else_gets_the_upgrade(strict, headers):
    refused(
        exchange(strict, request_bytes(strict, "GET", "/api/ws", **HANDSHAKE | headers)), 401, "unauthorized"
    )


def test_a_header_that_is_wrong_wins_over_a_subprotocol_that_is_right(strict):
    headers = {"Authorization": "Bearer wrong", "Sec_WebSocket_Protocol": f"monitor.v1, {bearer(TOKEN)}"}
    refused(
        exchange(strict, request_bytes(strict, "GET", "/api/ws", **HANDSHAKE | headers)), 401, "unauthorized"
    )


def test_the_log_has_a_line_and_no_token(strict, talk):
    talk(strict, subprotocols=["monitor.v1", bearer(TOKEN)]).close()
    wait_until(lambda: '"GET /api/ws HTTP/1.1" 101' in strict.output)
    assert TOKEN not in strict.output and bearer(TOKEN) not in strict.output


def test_a_logout_ends_the_socket_as_it_ends_streams(tmp_path, engine):
    """No event comes after it, no update is taken, and a code says not to come back."""
    quick = changed("monitor.WAIT_SECONDS = 0.2")
    with serving(
        quick, tmp_path / "monitor.db", MONITOR_API_TOKENS="tok", MONITOR_AUTH_MODE="strict", **engine
    ) as server:
        server.session.headers["Authorization"] = "Bearer tok"
        task = server.new_task()
        with Browser(server) as browser:
            browser.submit("/login", token="tok")
            ((name, value),) = browser.session.cookies.items()
            with contextlib.closing(Client(server, cookie=f"{name}={value}", origin=server.url)) as client:
                client.do("subscribe", sub="s")
                fields = {"task_id": task["id"], "source": "s", "message": "by cookie"}
                client.do("update", update=fields)
                assert client.until("by cookie")
                browser.submit("/logout")
                server.say(task, "after the logout")
                with pytest.raises(Closed) as raised:
                    while True:
                        assert "after the logout" not in json.dumps(client.next())
                assert raised.value.args == (3502, "the session has ended")
            with pytest.raises(websocket.WebSocketBadStatusException):
                Client(server, cookie=f"{name}={value}", origin=server.url)


# --- the handshake --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Sec_WebSocket_Key": None}, 400, "invalid_input"),
        ({"Sec_WebSocket_Key": ""}, 400, "invalid_input"),
        ({"Sec_WebSocket_Key": "short"}, 400, "invalid_input"),
        ({"Sec_WebSocket_Key": "é" * 24}, 400, "invalid_input"),
        ({"Sec_WebSocket_Version": None}, 426, "upgrade_required"),
        ({"Sec_WebSocket_Version": "8"}, 426, "upgrade_required"),
        ({"Upgrade": None}, 426, "upgrade_required"),
        ({"Upgrade": "h2c"}, 426, "upgrade_required"),
        ({"Connection": "keep-alive"}, 426, "upgrade_required"),
        ({"Sec_WebSocket_Protocol": "mqtt"}, 400, "invalid_input"),
        ({"Content_Length": "3"}, 400, "invalid_input"),
    ],
)
def test_a_bad_handshake_is_told_what_is_wrong(either, headers, status, code):
    answer = exchange(
        either,
        request_bytes(
            either, "GET", "/api/ws", b"abc" * ("Content_Length" in headers), **HANDSHAKE | headers
        ),
    )
    refused(answer, status, code)
    if status == 426:
        assert answer.headers["Sec-WebSocket-Version"] == "13"
        assert answer.headers["Upgrade"] == "websocket"


def test_a_browser_that_just_asks_for_it_is_told(either):
    refused(either.ask("GET", "/api/ws"), 426, "upgrade_required")
    refused(either.ask("POST", "/api/ws", {}), 405, "method_not_allowed")


def test_other_paths_are_no_sockets(either):
    for path in ("/api/stream", "/health", "/nowhere"):
        assert exchange(either, request_bytes(either, "GET", path, **HANDSHAKE)).status in (400, 404)


@pytest.mark.parametrize("connection", ["keep-alive, Upgrade", "upgrade", "UPGRADE"])
def test_names_of_the_handshake_know_no_case_and_may_stand_in_lists(either, connection):
    with Raw(either, Connection=connection, Upgrade="WebSocket") as opened:
        assert opened.status == 101
        assert lives(opened)


def test_compression_is_never_agreed_on(either):
    with Raw(either, Sec_WebSocket_Extensions="permessage-deflate; client_max_window_bits") as opened:
        assert opened.status == 101
        assert "Sec-WebSocket-Extensions" not in opened.headers
        assert "Sec-WebSocket-Protocol" not in opened.headers
        assert lives(opened)


def test_frames_that_come_together_with_the_handshake_are_not_lost(either):
    with Raw(either, message("ping", id="early")) as opened:
        assert opened.read() == (TEXT, b'{"id":"early","ok":true}')


def test_too_many_streams_are_refused_before_the_upgrade_and_on_it(tmp_path, engine):
    """A socket is counted, and each of its subscriptions; who leaves makes room."""
    few = changed("monitor.MAX_STREAMS, monitor.WAIT_SECONDS = 3, 0.1")
    with serving(few, tmp_path / "monitor.db", **engine) as server:
        with contextlib.closing(Client(server)) as client:
            client.do("subscribe", sub="a")
            client.do("subscribe", sub="b")
            assert client.refused("subscribe", sub="c")["error"] == "unavailable"
            assert server.get("/health", full=1)["streams"] == 3
            answer = exchange(server, request_bytes(server, "GET", "/api/ws", **HANDSHAKE))
            refused(answer, 503, "unavailable")
            assert int(answer.headers["Retry-After"]) > 0
            client.do("unsubscribe", sub="a")
            wait_until(lambda: list(client.ask("subscribe", sub="c")) == ["ok"])
        wait_until(lambda: server.get("/health", full=1)["streams"] == 0)


# --- frames, by RFC 6455 --------------------------------------------------------------------------------


HELLO = json.dumps({"op": "ping", "id": "é, 漢字"}, ensure_ascii=False).encode()
ANSWER = (TEXT, b'{"id":"\\u00e9, \\u6f22\\u5b57","ok":true}')


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_message_may_come_in_fragments_however_small_with_control_frames_among_them(raw, size):
    pieces = [HELLO[at : at + size] for at in range(0, len(HELLO), size)]
    for number, piece in enumerate(pieces):
        raw.send(frame(CONT if number else TEXT, piece, fin=False), frame(PING, b"%d" % number))
        assert raw.read() == (PONG, b"%d" % number)
    raw.send(frame(CONT))
    assert raw.read() == ANSWER


def test_a_message_may_come_byte_by_byte(raw):
    for byte in frame(TEXT, HELLO[:20], fin=False) + frame(CONT, HELLO[20:]):
        raw.send(bytes([byte]))
    assert raw.read() == ANSWER


def test_many_messages_may_come_at_once_and_are_answered_in_order(raw):
    raw.send(*(message("ping", id=number) for number in range(500)))
    assert [raw.read()[1] for _ in range(500)] == [b'{"id":%d,"ok":true}' % n for n in range(500)]


@pytest.mark.parametrize("payload", [b"", b"x", b"x" * 125])
def test_a_ping_is_answered_with_its_own_payload_and_a_pong_with_nothing(raw, payload):
    raw.send(frame(PONG, payload), frame(PING, payload))
    assert raw.read() == (PONG, payload)
    assert lives(raw)


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([frame(TEXT, HELLO, masked=False)], 1002),
        ([frame(PING, masked=False)], 1002),
        ([frame(TEXT, HELLO, rsv=4)], 1002),
        ([frame(TEXT, HELLO, rsv=2)], 1002),
        ([frame(PING, rsv=1)], 1002),
        *[([frame(opcode, b"x")], 1002) for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)],
        ([frame(PING, b"x" * 126)], 1002),
        ([frame(CLOSE, b"\x03\xe8" + b"x" * 124)], 1002),
        ([frame(PING, b"x", fin=False)], 1002),
        ([frame(CONT, HELLO)], 1002),
        ([frame(TEXT, HELLO, fin=False), frame(TEXT, HELLO)], 1002),
        ([frame(TEXT, HELLO), frame(CONT, b"x")], 1002),
        ([b"\x81\xfe\x00\x05\0\0\0\0hello"], 1002),
        ([b"\x81\xff" + (5).to_bytes(8) + b"\0\0\0\0hello"], 1002),
        ([b"\x81\xff" + (2**63 + 5).to_bytes(8) + b"\0\0\0\0"], 1002),
        ([frame(TEXT, b"\xff")], 1007),
        ([frame(TEXT, b"\xed\xa0\x80")], 1007),
        ([frame(TEXT, b"\xc0\xaf")], 1007),
        ([frame(TEXT, b"\xf4\x90\x80\x80")], 1007),
        ([frame(TEXT, b"caf\xc3")], 1007),
        ([frame(TEXT, b"caf\xc3", fin=False), frame(CONT, b"x")], 1007),
        ([frame(TEXT, b"caf\xc3", fin=False), frame(PING), frame(CONT)], 1007),
        ([frame(TEXT, b"ok" + b"\xff", fin=False)], 1007),
        ([frame(BINARY, HELLO)], 1003),
        ([frame(BINARY, HELLO, fin=False)], 1003),
        ([frame(TEXT, b"x" * (monitor.MAX_BODY + 1))], 1009),
        ([frame(TEXT, b"x" * 600_000, fin=False), frame(CONT, b"x" * 600_000)], 1009),
        ([b"\x81\xff" + (2**40).to_bytes(8) + b"\0\0\0\0"], 1009),
        ([b"\x82\xff" + (2**62).to_bytes(8) + b"\0\0\0\0"], 1009),
    ],
)
def test_what_breaks_the_rules_is_closed_with_its_code(either, raw, frames, code):
    raw.send(*frames)
    assert raw.closed() == code
    assert either.get("/health") == {"status": "ok"}


@pytest.mark.parametrize("piece", [b"", b"x", b"x" * 4000])
def test_endless_fragments_are_cut(either, raw, piece):
    """Also empty ones: they are not kept, and the connection ends while the client still sends."""
    more, over = frame(CONT, piece, fin=False) * 1000, threading.Event()

    def pump() -> None:
        with contextlib.suppress(OSError):
            raw.line.sendall(frame(TEXT, fin=False))
            while not over.is_set():
                raw.line.sendall(more)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(pump)
        try:
            assert raw.closed() == 1009
        finally:
            over.set()
            raw.line.shutdown(socket.SHUT_RDWR)
    assert either.get("/health") == {"status": "ok"}


def test_a_message_of_the_largest_size_is_taken(either, work, talk):
    client = talk()
    fields = {"task_id": work["id"], "source": "s", "message": "big", "data": ""}
    client.do("ping")  # so the next one is the second
    room = monitor.MAX_BODY - len(json.dumps({"op": "update", "id": 2, "update": fields}))
    stored = client.do("update", update=fields | {"data": "x" * room})
    assert len(stored["data"]) == room
    assert client.do("ping") is True


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", 1005),
        *[(code.to_bytes(2), code) for code in (1000, 1001, 1003, 1007, 1009, 1011, 3000, 3999, 4000, 4999)],
        ((1000).to_bytes(2) + "über".encode(), 1000),
        ((1000).to_bytes(2) + b"x" * 123, 1000),
        *[
            (code.to_bytes(2), 1002)
            for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 2000, 2999, 5000, 65535)
        ],
        (b"\x03", 1002),
        ((1000).to_bytes(2) + b"\xff", 1007),
    ],
)
def test_a_close_is_answered_and_the_connection_ends(raw, payload, code):
    raw.send(frame(CLOSE, payload), message("ping", id="too late"))
    assert raw.closed() == code


def test_nothing_is_answered_after_a_close(raw):
    raw.send(message("ping", id=1), frame(TEXT, b"[]"), message("ping", id=2), frame(PING))
    assert raw.read() == (TEXT, b'{"id":1,"ok":true}')
    assert raw.closed() == 3501


def test_a_peer_that_does_not_answer_a_close_is_cut(raw):
    raw.send(frame(TEXT, b"[]"))
    assert raw.read()[0] == CLOSE
    begun = time.monotonic()
    assert raw.read() == (-1, b"")
    assert time.monotonic() - begun < 10


# --- slow, dead and leaving -----------------------------------------------------------------------------


def resident(server: Server) -> int:
    """The memory that a server process holds, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) * 1024


def test_eight_megabytes_arrive_whole_at_a_reader_that_pauses(fresh, engine):
    """Far more than the kernel's buffers take: what `send` would cut, `sendall` must not. Answers to what it
    asks meanwhile come in between, in whole frames."""
    server = fresh(**engine)
    task, payload = server.new_task(), os.urandom(375_000).hex()
    with Raw(server, receive_buffer=8192) as reader:
        reader.send(
            message("subscribe", id=1, sub="a", after=0), message("subscribe", id=2, sub="b", after=0)
        )
        said = [server.say(task, f"big {number}", data=payload) for number in range(11)]
        time.sleep(1)
        reader.send(*(message("ping", id=f"p{number}") for number in range(50)))
        heard, answers, after_answers = {"a": [], "b": []}, [], None
        while len(heard["a"]) + len(heard["b"]) < 22 or len(answers) < 52:
            opcode, text = reader.read()
            assert opcode == TEXT
            got = json.loads(text)
            if "sub" not in got:
                answers.append(got["id"])
            elif got["event"] == "update":
                heard[got["sub"]].append(got["data"])
                after_answers = len(answers)
        assert heard == {"a": said, "b": said}
        assert answers == [1, 2, *(f"p{number}" for number in range(50))]
        assert after_answers is not None


def test_the_answers_do_not_wait_for_a_slow_subscription_to_be_done(tmp_path, engine):
    """A ping behind 40 MB that a slow reader takes is answered after the batches under way."""
    made_before(tmp_path / "monitor.db", 200, size=200_000)
    with (
        serving(Server, tmp_path / "monitor.db", **engine) as server,
        Raw(server, receive_buffer=8192) as reader,
    ):
        reader.send(message("subscribe", id=1, sub="a", after=0))
        for _ in range(3):
            reader.read()
        reader.send(message("ping", id="now"))
        heard = 0
        while (got := reader.read()) != (TEXT, b'{"id":"now","ok":true}'):
            assert got[0] == TEXT
            heard += len(got[1])
        assert heard < 8_000_000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_readers_that_never_read_cost_bounded_memory_and_disturb_nobody(fresh, engine):
    """Six of them while 20 MB are published; afterwards they still get everything."""
    server = fresh(**engine, MALLOC_ARENA_MAX="1")  # what counts is what is held, not what glibc keeps
    task, payload = server.new_task(), "x" * 500_000
    server.say(task, "warm", data=payload)
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(Raw(server)) for _ in range(6)]
        for each in stuck:
            each.send(message("subscribe", id=1, sub="s"))
            assert each.read()[0] == TEXT
        reader = stack.enter_context(contextlib.closing(Client(server)))
        reader.do("subscribe", sub="s")
        before = resident(server)
        said = [server.say(task, f"big {number}", data=payload) for number in range(40)]
        assert [event[3] for event in reader.until("big 39")[1:]] == said
        assert resident(server) - before < 32_000_000
        got = []
        while len(got) < 40:
            event = json.loads(stuck[0].read()[1])
            got += [event["data"]] if event["event"] == "update" else []
        assert got == said


def test_who_asks_without_reading_is_not_listened_to_any_longer(either, raw):
    """Answers are not piled up: the kernel's buffers fill, and the server stops reading."""
    raw.line.settimeout(2)
    pings, sent = frame(PING, b"x" * 100) * 1000, 0
    with contextlib.suppress(TimeoutError):
        while sent < 100_000_000:
            sent += raw.line.send(pings)
    assert sent < 50_000_000
    assert either.get("/health") == {"status": "ok"}


HASTY = "monitor.WAIT_SECONDS, monitor.PING_SECONDS = 0.05, 0.2"


def test_pings_come_and_who_answers_them_lives(tmp_path, engine):
    with serving(changed(HASTY), tmp_path / "monitor.db", **engine) as server, Raw(server) as reader:
        for _ in range(8):
            opcode, payload = reader.read_any()
            assert opcode == PING
            reader.send(frame(PONG, payload))
        assert lives(reader)


@pytest.mark.parametrize("subscribed", [False, True])
def test_a_dead_peer_is_cut_after_two_pings(tmp_path, engine, subscribed):
    with serving(changed(HASTY), tmp_path / "monitor.db", **engine) as server, Raw(server) as reader:
        if subscribed:
            reader.send(message("subscribe", id=1, sub="s"))
            assert [json.loads(reader.read_any()[1]).get("sub") for _ in range(2)] == [None, "s"]
        assert [reader.read_any()[0] for _ in range(3)] == [PING, PING, -1]
        wait_until(lambda: server.get("/health", full=1)["streams"] == 0)


def test_a_ping_is_due_every_25_seconds():
    assert monitor.PING_SECONDS == 25


def test_a_healthy_socket_outlives_the_limits_of_requests(tmp_path, engine):
    limits = "monitor.IDLE_SECONDS, monitor.HEAD_SECONDS, monitor.BODY_SECONDS = 0.2, 0.2, 0.2"
    with serving(changed(limits), tmp_path / "monitor.db", **engine) as server, Raw(server) as reader:
        time.sleep(1)
        assert lives(reader)


def test_a_client_that_vanishes_gives_its_places_back(tmp_path, engine):
    quick = changed("monitor.WAIT_SECONDS = 0.1")
    with serving(quick, tmp_path / "monitor.db", **engine) as server:
        for _ in range(5):
            with Raw(server) as reader:
                reader.send(message("subscribe", id=1, sub="s", after=0))
                assert reader.read()[0] == TEXT
        wait_until(lambda: server.get("/health", full=1)["streams"] == 0)


def test_a_shutdown_closes_every_socket_with_3001_and_does_not_take_long(fresh, engine):
    """Also one whose client is silent, and one that reads nothing."""
    server = fresh(**engine)
    task = server.new_task()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(contextlib.closing(Client(server))) for _ in range(10)]
        for client in clients[:5]:
            client.do("subscribe", sub="s", after=0)
        silent = stack.enter_context(Raw(server))
        deaf = stack.enter_context(Raw(server, receive_buffer=8192))
        deaf.send(message("subscribe", id=1, sub="s", after=0))
        for number in range(4):
            server.say(task, f"big {number}", data="x" * 900_000)
        with ThreadPoolExecutor(10) as pool:
            ends = [pool.submit(client.closed) for client in clients]
            begun = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - begun < 6
            assert [end.result() for end in ends] == [(3001, "the server is shutting down")] * 10
        assert silent.closed() == 3001
    server.start()
    with contextlib.closing(Client(server)) as client:
        assert client.do("ping") is True


def test_flask_run_serves_it_too(tmp_path):
    """Werkzeug's development server: nothing of ours but the app."""
    import subprocess
    import sys

    from conftest import ROOT, clean_environment

    command = [sys.executable, "-m", "flask", "--app", str(ROOT / "monitor.py"), "run", "--port", "0"]
    environment = clean_environment(MONITOR_DB=str(tmp_path / "monitor.db"))
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            port = next(
                int(found[1]) for line in process.stderr if (found := re.search(r"http://[\d.]+:(\d+)", line))
            )
            with contextlib.closing(Client(type("At", (), {"port": port}))) as client:
                client.do("subscribe", sub="s", after=0)
                assert next(client.events())[1] == "hello"
                assert client.do("ping") is True
        finally:
            process.terminate()
            rest = process.stderr.read()
        assert "Traceback" not in rest
