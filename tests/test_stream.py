"""The promises of the stream, asked of real server processes and of the parts it is made of."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import requests
import urllib3
from conftest import ROOT, Server, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import monitor

PAST = 10_000  # updates that the servers of this file find in their database
CURSOR_NAMES = ("Last-Event-ID", "lastEventId", "last_event_id", "after_seq")
ENGINES = {"gevent": {}, "threads": {"MONITOR_THREADS": "1"}}
HOSTILE = (
    "two\nlines",
    "\r\n\r\ndata: forged\r\nid: 1\r\n\r\n",
    "a\rb",
    "\n\nevent: reset\ndata: {}\n\n",
    "line\u2028paragraph\u2029next\u0085line",
    "\ufeff\ufeffmarks",
    "🦊 fox, 👩‍👩‍👧 family, 漢字",
    "إلى اليمين \u202e reversed",
    "\x1b[31mred\x1b[0m \x7f \x0b \x0c \x1c \x1d \x1e",
    "</script><script>alert(1)</script>",
    ": comment",
    'quo"te \\ back\\u2028slash',
    "  blanks around  ",
)


class Event(NamedTuple):
    """One event as a reader got it."""

    event: str
    data: Any
    id: str | None


@contextlib.contextmanager
def reading(server: Server, query: str = "", cursor: object = None):
    """A reader's events, one iterator for its whole life; `cursor` goes into Last-Event-ID."""
    headers = {} if cursor is None else {"Last-Event-ID": str(cursor)}
    with server.follow(query, **headers) as follower:
        assert follower.response.status_code == 200
        yield map(Event._make, follower)


def poll(server: Server, query: str = "", cursor: object = None) -> list[Event]:
    """Every event that there is for a reader, hello first."""
    with reading(server, f"?poll=1&{query}", cursor) as events:
        return list(events)


def head(server: Server) -> int:
    """The last number that the server gave."""
    return poll(server)[0].data["seq"]


def messages(events) -> list[str]:
    """The messages of the updates among some events."""
    return [event.data["message"] for event in events if event.event == "update"]


def until(events, message: str) -> list[Event]:
    """The next events up to and with the update that says `message`; fails when the stream ends before it."""
    seen = []
    for event in events:
        seen.append(event)
        if event.event == "update" and event.data["message"] == message:
            return seen
    raise AssertionError(f"the stream ended after {seen[-1:]}, before {message!r}")


def parse_sse(raw: bytes) -> list[Event]:
    """An event stream read by the letter of the standard: any line end, a leading byte order mark dropped."""
    events, event, data, last = [], "message", [], None
    for line in re.split("\r\n|\n|\r", raw.decode().removeprefix("\ufeff")):
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line and data:
            events.append(Event(event, json.loads("\n".join(data)), last))
        if not line:
            event, data = "message", []
        elif field == "event":
            event = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            last = value
    return events


def opened(path: Path) -> monitor.Monitor:
    """A Monitor in this process on a database file."""
    return monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path)}))


def fill(path: Path, count: int, source: str = "past") -> None:
    """Make a database with `count` updates in one task, as its events 3 to count + 2."""
    filled = opened(path)
    workstream = json.loads(filled.create(monitor.WORKSTREAM, {"name": "past"}))
    task = json.loads(filled.create(monitor.TASK, {"workstream_id": workstream["id"], "name": "past"}))

    def operation(t: monitor.Transaction) -> None:
        row = t.one(monitor.TASK, task["id"])
        for number in range(count):
            t.insert_update(row, {"source": source, "message": f"{source} {number}"}, monitor.timestamp())

    filled.store.write(operation)
    filled.close()


@pytest.fixture(scope="module")
def past(tmp_path_factory):
    """A database with PAST updates, to be copied."""
    path = tmp_path_factory.mktemp("past") / "past.db"
    fill(path, PAST)
    return path


@pytest.fixture(scope="module", params=ENGINES)
def either(request, past, tmp_path_factory):
    """A server with a long past, on gevent and on threads: both keep the same promises."""
    database = tmp_path_factory.mktemp(request.param) / "monitor.db"
    shutil.copy(past, database)
    running = Server(database, **ENGINES[request.param])
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.output


@pytest.fixture
def work(either):
    """A task of its own on that server."""
    return either.new_task()


@pytest.fixture(params=ENGINES)
def alone(request, fresh):
    """A server that the test may stop and kill."""
    return fresh(**ENGINES[request.param])


# --- what a connection begins with ----------------------------------------------------------------------


def test_hello_comes_first_and_tells_the_database_and_its_head(either, work):
    """hello carries no id: it must not move a reader's cursor."""
    last = either.say(work, "the last one")["seq"]
    with reading(either) as events:
        hello = next(events)
    assert hello.event == "hello"
    assert hello.data == {"stream": hello.data["stream"], "seq": last, "resumed": False}
    assert re.fullmatch(r"[0-9a-f-]{36}", hello.data["stream"])
    assert hello.id is None


def test_the_answer_is_one_that_nobody_on_the_way_keeps_or_holds_back(either):
    """EventSource wants exactly this type; caches, nginx and compression stay out."""
    with either.follow("?poll=1") as follower:
        headers = follower.response.headers
    assert headers["Content-Type"].split(";")[0] == "text/event-stream"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in headers
    assert "Content-Encoding" not in headers


def test_retry_is_sent_first_and_differs_between_connections(either):
    """A thousand readers must not return in the same moment."""
    firsts = [either.ask("GET", "/api/stream?poll=1").content.split(b"\n")[0] for _ in range(6)]
    delays = [int(re.fullmatch(rb"retry: ([0-9]+)", line)[1]) for line in firsts]
    assert all(1000 <= delay <= 3000 for delay in delays)
    assert len(set(delays)) > 1


def test_without_a_cursor_only_what_happens_from_now_on_is_told(either, work):
    """The past is not replayed to somebody who did not ask."""
    either.say(work, "before")
    with reading(either) as events:
        assert next(events).event == "hello"
        said = either.say(work, "after")
        assert next(events) == Event("update", said, str(said["seq"]))


# --- cursors --------------------------------------------------------------------------------------------


GARBAGE = ("x", "-1", "1.5", "1e3", "0x10", "null", "%20", "9" * 40, "%D9%A3", "%00", "1 2", "7%0A")


def with_cursors(server: Server, cursors: dict[str, object]) -> list[Event]:
    """Poll with several cursors at once, each under its name."""
    given = {name: str(value) for name, value in cursors.items()}
    header = given.pop("Last-Event-ID", None)
    return poll(server, "&".join(f"{name}={value}" for name, value in given.items()), header)


@pytest.mark.parametrize("name", CURSOR_NAMES)
def test_a_reader_resumes_after_its_cursor(either, work, name):
    """Each of the four places is understood."""
    said = [either.say(work, f"number {number}") for number in range(4)]
    hello, *events = with_cursors(either, {name: said[1]["seq"]})
    assert hello.data["resumed"] is True
    assert [event.data for event in events] == said[2:]
    assert [event.id for event in events] == [str(update["seq"]) for update in said[2:]]


@pytest.mark.parametrize("winner", range(4))
def test_the_more_exact_cursor_wins(either, work, winner):
    """A browser repeats its first query for ever, with the header telling how far it got."""
    said = [either.say(work, f"number {number}") for number in range(5)]
    cursors = dict(zip(CURSOR_NAMES, [update["seq"] for update in said], strict=False))
    _, *events = with_cursors(either, {name: cursors[name] for name in CURSOR_NAMES[winner:]})
    assert [event.data for event in events] == said[winner + 1 :]


def test_an_empty_cursor_counts_as_none(either, work):
    """Some clients send the header before they have anything to put there."""
    said = [either.say(work, f"number {number}") for number in range(2)]
    _, *events = poll(either, f"lastEventId=&after_seq={said[0]['seq']}", "")
    assert [event.data for event in events] == said[1:]
    assert [event.event for event in poll(either, "after_seq=", "")] == ["hello"]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_cursor_of_garbage_is_reset_not_refused(either, garbage):
    """On any status but 200 EventSource would give up for good."""
    now = head(either)
    hello, reset = poll(either, f"last_event_id={garbage}")
    assert hello.data["resumed"] is False
    assert reset.event == "reset"
    assert reset.data["seq"] == now
    assert reset.data["reason"]
    assert reset.id == str(now)


def test_a_cursor_ahead_of_the_log_is_reset(either):
    """It was made by a database that is gone: nothing is replayed, nothing is awaited."""
    now = head(either)
    for far in (now + 1, 2**63, 10**18):
        hello, reset = poll(either, cursor=far)
        assert hello.data["resumed"] is False
        assert reset == Event("reset", {"reason": "ahead", "seq": now}, str(now))


def test_a_cursor_of_another_database_is_reset(either):
    """The number alone would pass: only ?stream= tells."""
    now = head(either)
    hello, reset = poll(either, "stream=00000000-0000-4000-8000-000000000000", 1)
    assert hello.data["resumed"] is False
    assert reset == Event("reset", {"reason": "other_stream", "seq": now}, str(now))


def test_a_cursor_of_this_database_is_honoured(either, work):
    """With its name beside it."""
    said = [either.say(work, f"number {number}") for number in range(2)]
    hello, *events = poll(either, f"stream={poll(either)[0].data['stream']}", said[0]["seq"])
    assert hello.data["resumed"] is True
    assert [event.data for event in events] == said[1:]


def test_after_a_reset_the_stream_is_live(either, work):
    """And it can be resumed from the id that the reset gave."""
    with reading(either, cursor="garbage") as events:
        reset = [next(events), next(events)][1]
        said = either.say(work, "after the reset")
        assert next(events) == Event("update", said, str(said["seq"]))
    assert [event.data for event in poll(either, cursor=reset.id)[1:]] == [said]


def test_a_database_swapped_while_the_server_was_down_is_noticed(fresh, tmp_path):
    """The new one is longer, so only its name gives it away."""
    server = fresh(database=tmp_path / "one.db")
    task = server.new_task()
    for number in range(5):
        server.say(task, f"old {number}")
    hello, *_ = poll(server)
    assert server.stop() == 0
    fill(tmp_path / "two.db", 50, "new")
    shutil.move(tmp_path / "two.db", tmp_path / "one.db")
    server.start()
    with reading(server, f"?stream={hello.data['stream']}", 4) as events:
        assert next(events).data["stream"] != hello.data["stream"]
        assert next(events).data == {"reason": "other_stream", "seq": 52}
        said = server.say(server.new_task(), "live")
        assert until(events, "live")[-1].data == said
    assert poll(server, cursor=10_000)[1].data["reason"] == "ahead"


def test_a_database_swapped_under_a_running_server_is_not_written_to(fresh, tmp_path):
    """What is written would be lost. After a restart the new one is served, unharmed."""
    server = fresh()
    said = server.say(server.new_task(), "into the old one")
    old = poll(server)[0].data["stream"]
    fill(tmp_path / "two.db", 20, "new")
    shutil.move(tmp_path / "two.db", tmp_path / "monitor.db")
    response = server.ask("POST", "/api/workstreams", {"name": "nowhere"})
    assert response.status_code == 503
    assert response.json()["error"] == "unavailable"
    assert server.stop() == 0
    server.start()
    assert messages(poll(server, cursor=0)) == [f"new {number}" for number in range(20)]
    assert poll(server, f"stream={old}", said["seq"])[1].data["reason"] == "other_stream"
    assert server.new_task()["number"] == 2


# --- what is told, and to whom --------------------------------------------------------------------------


def test_state_events_stand_among_the_updates_in_the_order_things_happened(either):
    """Their numbers come from the same sequence, and the objects are those that the API answered."""
    before = head(either)
    workstream = either.post("/api/workstreams", name="order")
    task = either.new_task("first name", workstream["id"])
    said = either.say(task, "between")
    renamed = either.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "second name"}).json()
    archived = either.ask("PATCH", f"/api/workstreams/{workstream['id']}", {"status": "archived"}).json()
    events = poll(either, cursor=before)[1:]
    assert [(event.event, event.data) for event in events] == [
        ("workstream_created", workstream),
        ("task_created", task),
        ("update", said),
        ("task_updated", renamed),
        ("workstream_updated", archived),
    ]
    assert [int(event.id) for event in events] == list(range(before + 1, before + 6))


@pytest.fixture(scope="module")
def varied(either):
    """A few updates and changes that filters tell apart; also the server's head before them."""
    before = head(either)
    one, two = either.new_task("one"), either.new_task("two")
    told = (
        (one, "a", {"kind": "decision", "level": "warn", "tags": ["red", "blue"]}),
        (two, "b", {"kind": "decision", "tags": ["blue"]}),
        (one, "c", {"level": "error"}),
        (two, "d", {"kind": "error", "level": "error", "tags": ["green", "Red"]}),
    )
    for task, message, fields in told:
        either.say(task, message, **fields)
    either.ask("PATCH", f"/api/tasks/{one['id']}", {"status": "done"})
    either.post("/api/updates", task_id=two["id"], source="robot", message="e", tags=["red"])
    return {"before": before, "one": one, "two": two}


FILTERS = {
    "task_id={one[id]}": ["task_created", "a", "c", "task_updated"],
    "task_id={one[number]}": ["task_created", "a", "c", "task_updated"],
    "task_id={two[id]}": ["task_created", "b", "d", "e"],
    "workstream_id={one[workstream_id]}": ["workstream_created", "task_created", "a", "c", "task_updated"],
    "source=manual": ["a", "b", "c", "d"],
    "source=robot": ["e"],
    "kind=decision": ["a", "b"],
    "level=error": ["c", "d"],
    "tag=red": ["a", "e"],
    "tag=green&tag=blue": ["a", "b", "d"],
    "tag=red&tag=red": ["a", "e"],
    "task_id={one[id]}&level=error": ["c"],
    "task_id={two[id]}&tag=red&tag=blue": ["b", "e"],
    "kind=decision&tag=red": ["a"],
    "kind=error&level=error&source=manual&tag=green": ["d"],
    "workstream_id={two[workstream_id]}&tag=blue": ["b"],
    "task_id=99999999": [],
    "tag=RED": [],
    "source=man": [],
    "kind=decision&level=error": [],
}


def told(events) -> list[str]:
    """Messages of updates and names of other events, without the stream's own."""
    shown = [event for event in events if event.event not in ("hello", "checkpoint")]
    return [event.data["message"] if event.event == "update" else event.event for event in shown]


@pytest.mark.parametrize("query", FILTERS)
def test_a_filter_lets_through_what_it_names(either, varied, query):
    """State events only where no source, kind, level or tag is asked for; of several tags any will do."""
    assert told(poll(either, query.format(**varied), varied["before"])) == FILTERS[query]


def test_a_filter_says_the_same_of_the_newest_events_and_of_the_file(either, varied):
    """After a restart everything comes from the file."""
    queries = [query.format(**varied) for query in FILTERS]
    before = [told(poll(either, query, varied["before"])) for query in queries]
    either.kill()
    either.start()
    assert [told(poll(either, query, varied["before"])) for query in queries] == before


def test_a_filtered_reader_gets_its_events_live(either, work):
    """And nothing of what others do."""
    with reading(either, f"?task_id={work['id']}") as events:
        next(events)
        other = either.new_task()
        either.say(other, "not for them")
        said = either.say(work, "for them")
        done = either.ask("PATCH", f"/api/tasks/{work['id']}", {"status": "done"}).json()
        assert [(event.event, event.data) for event in itertools.islice(events, 2)] == [
            ("update", said),
            ("task_updated", done),
        ]


@pytest.mark.parametrize("query", ["task_id=zz", "level=loud", "tag=", "source="])
def test_a_malformed_filter_is_refused(either, query):
    """It is a mistake in a program, not a cursor: silence would hide it."""
    response = either.ask("GET", f"/api/stream?poll=1&{query}")
    assert response.status_code == 400
    assert response.json()["error"] == "invalid_input"


def test_a_reader_whose_filter_matches_nothing_still_moves_on(either, work):
    """It gets a checkpoint past all the others and can resume there, live."""
    with reading(either, "?source=nobody", 0) as events:
        hello, checkpoint = next(events), next(events)
    assert hello.data["resumed"] is True
    assert checkpoint.event == "checkpoint"
    assert checkpoint.data == {"seq": int(checkpoint.id)}
    assert PAST <= int(checkpoint.id) <= hello.data["seq"]
    with reading(either, "?source=nobody", checkpoint.id) as events:
        assert next(events).data["resumed"] is True
        either.say(work, "not for them")
        mine = either.post("/api/updates", task_id=work["id"], source="nobody", message="mine")
        assert next(event for event in events if event.event != "checkpoint").data == mine


def test_a_filtered_poll_ends_with_how_far_it_looked(either, work):
    """So the next one begins there."""
    before = head(either)
    mine = either.post("/api/updates", task_id=work["id"], source="rare", message="mine")
    last = either.say(work, "not for them")
    _, update, checkpoint = poll(either, "source=rare", before)
    assert update.data == mine
    assert checkpoint == Event("checkpoint", {"seq": last["seq"]}, str(last["seq"]))
    assert [event.event for event in poll(either, "source=rare", checkpoint.id)] == ["hello"]


# --- how it is written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["format=ndjson", "Accept"])
def test_ndjson_tells_the_same_events(either, work, asked):
    """One line an event: event, id and data."""
    before = head(either)
    either.say(work, HOSTILE[1], data={"deep": [1, {"er": None}]})
    either.ask("PATCH", f"/api/tasks/{work['id']}", {"status": "blocked"})
    events = poll(either, cursor=before)
    headers = {"Accept": "application/x-ndjson"} if asked == "Accept" else {}
    response = either.ask("GET", f"/api/stream?poll=1&after_seq={before}&{asked}", headers=headers)
    assert response.headers["Content-Type"].split(";")[0] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "id" not in lines[0]
    assert [line["event"] for line in lines] == [event.event for event in events]
    assert [line["data"] for line in lines] == [event.data for event in events]
    assert [line["id"] for line in lines[1:]] == [int(event.id) for event in events[1:]]


def test_ndjson_is_live_too(either, work):
    """Each line comes when its event does."""
    with either.follow("?format=ndjson") as follower:
        lines = (json.loads(line) for line in follower.response.iter_lines(chunk_size=1) if line)
        assert next(lines)["event"] == "hello"
        said = either.say(work, "live")
        assert next(lines) == {"event": "update", "id": said["seq"], "data": said}


@pytest.mark.parametrize("form", ["sse", "ndjson"])
def test_whatever_was_written_comes_back_and_the_wire_is_ascii(either, work, form):
    """U+2028 alone breaks some clients."""
    before = head(either)
    said = [either.say(work, text, tags=[text], data={text: [text]}) for text in HOSTILE]
    raw = either.ask("GET", f"/api/stream?poll=1&after_seq={before}&format={form}").content
    assert raw.isascii()
    events = parse_sse(raw) if form == "sse" else [json.loads(line) for line in raw.split(b"\n") if line]
    data = [event.data if form == "sse" else event["data"] for event in events][1:]
    assert data == said
    assert [(update["message"], update["tags"], update["data"]) for update in data] == [
        (text, [text], {text: [text]}) for text in HOSTILE
    ]


def test_a_poll_ends_and_the_next_one_goes_on(either, work):
    """A shell loop needs nothing but curl."""
    said = [either.say(work, f"number {number}") for number in range(3)]
    first = poll(either, cursor=said[0]["seq"])
    assert [event.data for event in first[1:]] == said[1:]
    assert [event.event for event in poll(either, cursor=first[-1].id)] == ["hello"]
    later = either.say(work, "later")
    assert [event.data for event in poll(either, cursor=first[-1].id)[1:]] == [later]


# --- many events, many writers, many readers ------------------------------------------------------------


def test_catching_up_with_ten_thousand_is_exact_and_quick(either):
    """No cap on how far back."""
    begun = time.monotonic()
    events = poll(either, cursor=0)
    assert [int(event.id) for event in events[1:]] == list(range(1, events[0].data["seq"] + 1))
    assert messages(events)[:PAST] == [f"past {number}" for number in range(PAST)]
    assert time.monotonic() - begun < 5


class Crowd:
    """Writers at work, each in a thread with a connection of its own: what they were told is in `seqs`."""

    def __init__(self, server: Server, task: dict, writers: int, each: int):
        self.server, self.task, self.each = server, task, each
        self.seqs: list[list[int]] = [[] for _ in range(writers)]
        self.pool = ThreadPoolExecutor(writers)
        self.futures = [self.pool.submit(self._write, name) for name in range(writers)]

    def _write(self, name: int) -> None:
        with requests.Session() as session:
            session.trust_env = False
            for number in range(self.each):
                wanted = {"task_id": self.task["id"], "message": f"{name}.{number}"}
                self.seqs[name].append(wait_until(lambda wanted=wanted: self._post(session, wanted))["seq"])

    def _post(self, session: requests.Session, wanted: dict) -> dict:
        # Tried again until acknowledged, for the server may be down; the key keeps that from doubling it.
        address = self.server.url + "/api/updates/manual"
        headers = {"Idempotency-Key": f"{wanted['task_id']} {wanted['message']}"}
        response = session.post(address, json=wanted, headers=headers, timeout=5)
        if response.status_code not in (200, 201, 503):
            raise AssertionError(response.text)
        return response.json() if response.ok else {}

    @property
    def count(self) -> int:
        """How many updates were acknowledged."""
        return sum(len(seqs) for seqs in self.seqs)

    def finish(self) -> list[int]:
        """Wait for all of them; returns the acknowledged seqs in order. Fails with a writer that failed."""
        for future in self.futures:
            future.result()
        self.pool.shutdown()
        return sorted(itertools.chain(*self.seqs))


def test_readers_that_join_in_the_middle_of_a_burst_miss_and_double_nothing(either, work):
    """Eight writers; every reader gets exactly what follows the place where it came in, in order."""
    joined = []

    def read(place: int) -> None:
        wait_until(lambda: crowd.count >= 40 * place)
        cursor = max(crowd.seqs[place]) if place % 2 else None
        with reading(either, cursor=cursor) as events:
            start = next(events).data["seq"] if cursor is None else cursor
            joined.append(place)
            numbers = [int(event.id) for event in until(events, "the end") if event.event != "hello"]
        assert numbers == list(range(start + 1, numbers[-1] + 1))

    with ThreadPoolExecutor(6) as pool:
        crowd = Crowd(either, work, writers=8, each=50)
        readers = [pool.submit(read, place) for place in range(6)]
        seqs = crowd.finish()
        wait_until(lambda: len(joined) == 6 or any(reader.done() for reader in readers))
        either.say(work, "the end")
        for reader in readers:
            reader.result()
    assert len(set(seqs)) == 400


def test_the_wire_has_the_order_in_which_things_were_committed(either, work):
    """What a writer wrote later stands later, and lists have the same order."""
    with reading(either, f"?task_id={work['id']}") as events:
        next(events)
        crowd = Crowd(either, work, writers=6, each=30)
        acknowledged = crowd.finish()
        either.say(work, "the end")
        updates = [event.data for event in until(events, "the end")]
    assert [update["seq"] for update in updates[:-1]] == acknowledged
    assert all(seqs == sorted(seqs) for seqs in crowd.seqs)
    listed = either.get("/api/updates", task_id=work["id"], limit=200)
    assert listed["items"] == updates


def follow_through(server: Server, last: str) -> list[Event]:
    """Follow like a browser, from the beginning, through every lost connection, to the update `last`."""
    seen: list[Event] = []
    while True:
        cursor = seen[-1].id if seen else 0
        with (
            contextlib.suppress(requests.RequestException, urllib3.exceptions.HTTPError),
            reading(server, cursor=cursor) as events,
        ):
            for event in events:
                assert event.event != "reset"
                seen += [event] if event.event != "hello" else []
                if event.event == "update" and event.data["message"] == last:
                    return seen
        time.sleep(0.01)


def test_the_stream_can_be_followed_through_crashes_under_load(alone):
    """Killed, stopped and killed again: nothing acknowledged is lost, doubled or out of order."""
    task = alone.new_task()
    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(follow_through, alone, "the end") for _ in range(2)]
        crowd = Crowd(alone, task, writers=4, each=40)
        for number, end in enumerate((alone.kill, alone.stop, alone.kill)):
            wait_until(lambda number=number: crowd.count > 35 * (number + 1))
            end()
            alone.start()
        acknowledged = crowd.finish()
        last = alone.say(task, "the end")["seq"]
        seen = [reader.result(20) for reader in readers]
    for events in seen:
        assert [int(event.id) for event in events] == list(range(1, last + 1))
        assert [event.data["seq"] for event in events if event.event == "update"] == [*acknowledged, last]
        for name in range(4):
            own = [text for text in messages(events) if text.startswith(f"{name}.")]
            assert own == [f"{name}.{number}" for number in range(40)]


def resident(server: Server) -> int:
    """The memory that a server process holds, in bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_readers_that_stop_reading_cost_bounded_memory_and_disturb_nobody(alone):
    """Six of them while 20 MB are published; afterwards they still get everything."""
    task, payload = alone.new_task(), "x" * 500_000
    alone.say(task, "warm", data=payload)
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(reading(alone)) for _ in range(6)]
        events = stack.enter_context(reading(alone))
        before = resident(alone)
        said = [alone.say(task, f"big {number}", data=payload) for number in range(40)]
        assert until(events, "big 39")[1:] == [Event("update", update, str(update["seq"])) for update in said]
        assert resident(alone) - before < 32_000_000
        assert [event.data for event in until(stuck[0], "big 39")[1:]] == said


# --- beginnings and ends --------------------------------------------------------------------------------


def read_to(chunks, text: bytes) -> bytes:
    """What comes up to the piece in which `text` ends."""
    raw = b""
    while text not in raw:
        raw += next(chunks)
    return raw


@pytest.mark.parametrize(
    ("engine", "number"),
    [("gevent", signal.SIGTERM), ("gevent", signal.SIGINT), ("threads", signal.SIGTERM)],
    ids=["gevent-SIGTERM", "gevent-SIGINT", "threads-SIGTERM"],
)
def test_a_stopped_server_ends_its_streams_cleanly(fresh, engine, number):
    """Every open stream gets to its end, told when to come back, and the process is gone at once."""
    server = fresh(**ENGINES[engine])
    said = server.say(server.new_task(), "before the end")
    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(server.follow("?after_seq=0")) for _ in range(12)]
        streams = [follower.response.raw.stream() for follower in followers]
        beginnings = [read_to(chunks, b"before the end") for chunks in streams]
        begun = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - begun < 2
        # Without the chunk that ends the body this raises.
        whole = [first + b"".join(chunks) for first, chunks in zip(beginnings, streams, strict=True)]
    assert [parse_sse(raw)[-1].data for raw in whole] == [said] * 12
    assert all(re.search(rb"\n\nretry: [0-9]+\n(:.*\n)*\n$", raw) for raw in whole)


class Hasty(Server):
    """A server with one place for a stream and little patience."""

    changes = "monitor.MAX_STREAMS, monitor.WAIT_SECONDS, monitor.QUIET_SECONDS = 1, 0.05, 0.1"
    start_up = f"import sys; sys.path[0] = {str(ROOT)!r}; import monitor"
    command = (sys.executable, "-c", f"{start_up}; {changes}; monitor.main()")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_quiet_stream_shows_signs_of_life_and_its_place_is_free_when_the_reader_has_gone(tmp_path, engine):
    """Who comes meanwhile is told when to try again."""
    server = Hasty(tmp_path / "monitor.db", **ENGINES[engine])
    try:
        with server.follow() as follower:
            lines = follower.response.iter_lines(chunk_size=1)
            assert [line for line in itertools.islice(lines, 9) if line.startswith(b":")]
            refused = server.ask("GET", "/api/stream")
            assert refused.status_code == 200
            assert refused.content.startswith(b"retry: 30000\n")
            assert parse_sse(refused.content) == []
        wait_until(lambda: parse_sse(server.ask("GET", "/api/stream?poll=1").content))
    finally:
        assert server.stop() == 0


def test_a_sign_of_life_is_never_more_than_fifteen_seconds_away():
    """The wait that just missed the quiet time adds to it."""
    assert monitor.QUIET_SECONDS + monitor.WAIT_SECONDS < 15


@pytest.fixture
def app(tmp_path):
    """Monitor in this process, without a server."""
    made = monitor.create_app(monitor.Config.load({"MONITOR_DB": str(tmp_path / "monitor.db")}))
    yield made
    made.extensions["monitor"].close()


def test_too_many_streams_are_told_to_come_back_later(app, monkeypatch):
    """Never with an error: a browser would not return. A stream that ends gives its place back."""
    monkeypatch.setattr(monitor, "MAX_STREAMS", 2)
    client = app.test_client()
    open_ones = [client.get("/api/stream") for _ in range(2)]
    with client.get("/api/stream") as refused:
        assert refused.status_code == 200
        assert refused.mimetype == "text/event-stream"
        assert re.match(rb"retry: [0-9]+\n", refused.data)
        assert parse_sse(refused.data) == []
    open_ones.pop().close()
    with client.get("/api/stream?poll=1") as welcome:
        assert parse_sse(welcome.data)[0].event == "hello"
    for response in open_ones:
        response.close()


def test_who_comes_while_the_server_goes_is_told_to_come_back(app):
    """And is not kept."""
    app.extensions["monitor"].broadcaster.close()
    with app.test_client().get("/api/stream") as refused:
        assert refused.status_code == 200
        assert re.match(rb"retry: [0-9]+\n", refused.data)


def app_poll(app, query: str) -> list[Event]:
    """Every event that there is, from an app without a server."""
    with app.test_client().get(f"/api/stream?poll=1&{query}") as response:
        assert response.status_code == 200
        return parse_sse(response.data)


def test_what_was_removed_is_not_replayed_and_its_loss_is_said(app):
    """A redacted update keeps its place; of pruned ones a cursor before them learns first."""
    m = app.extensions["monitor"]
    workstream = json.loads(m.create(monitor.WORKSTREAM, {"name": "w"}))["id"]
    task = json.loads(m.create(monitor.TASK, {"workstream_id": workstream, "name": "t"}))["id"]
    fields = {"task_id": task, "source": "manual"}
    for message, moment in (("old", "2020-01-01T00:00:00.000000Z"), ("delicate", None), ("new", None)):
        m.add_update(fields | {"message": message}, moment=moment)
    m.redact_update(4)
    assert messages(app_poll(app, "after_seq=0")) == ["old", "[redacted]", "new"]
    m.prune("2021-01-01T00:00:00.000000Z", False)
    hello, reset, *rest = app_poll(app, "after_seq=1")
    assert hello.data["resumed"] is False
    assert reset.data["reason"] == "pruned"
    assert messages(rest) == ["[redacted]", "new"]
    assert [event.event for event in app_poll(app, "after_seq=3")][:2] == ["hello", "update"]


# --- the parts: ring, cursor, filter, encoding ----------------------------------------------------------


def frame(seq: int, size: int = 0, **facets) -> monitor.Frame:
    """An update's frame of about `size` bytes."""
    return monitor.Frame(seq, "update", 1, 1, monitor.dump({"seq": seq, "message": "x" * size}), **facets)


@pytest.fixture
def ring():
    """A broadcaster of its own."""
    made = monitor.Broadcaster()
    yield made
    made.close()


def seqs(frames) -> list[int] | None:
    """The numbers of some frames."""
    return frames if frames is None else [frame.seq for frame in frames]


def test_the_ring_knows_what_follows_each_cursor(ring):
    """From the first it holds to the last."""
    ring.publish([frame(seq) for seq in range(5, 8)])
    ring.publish([frame(8)])
    assert seqs(ring.after(4)) == [5, 6, 7, 8]
    assert [seqs(ring.after(cursor)) for cursor in (5, 7, 8, 9)] == [[6, 7, 8], [8], [], []]
    assert ring.head == 8


def test_the_ring_sends_those_elsewhere_whom_it_cannot_serve(ring):
    """None is not []: there is something, in the file."""
    assert ring.after(0) == []
    ring.head = 3
    assert ring.after(0) is None
    assert ring.after(3) == []
    ring.publish([frame(4)])
    assert ring.after(2) is None
    assert seqs(ring.after(3)) == [4]


def test_the_ring_is_bounded_by_bytes(ring, monkeypatch):
    """The oldest leave first; what is held never passes the limit."""
    monkeypatch.setattr(monitor, "RING_BYTES", 10_000)
    monkeypatch.setattr(monitor, "FRAME_BYTES", 0)
    for first in range(1, 101, 10):
        ring.publish([frame(seq, 900) for seq in range(first, first + 10)])
    held = [cursor for cursor in range(100) if ring.after(cursor) is not None]
    assert held == list(range(held[0], 100))
    frames = ring.after(held[0])
    assert sum(len(one.sse) for one in frames) <= 10_000
    assert len(frames) == 10


def test_a_frame_larger_than_the_ring_is_left_to_the_file(ring, monkeypatch):
    """And does not harm what follows it."""
    monkeypatch.setattr(monitor, "RING_BYTES", 10_000)
    ring.publish([frame(1), frame(2, 20_000)])
    assert [ring.after(cursor) for cursor in (0, 1, 2)] == [None, None, []]
    ring.publish([frame(3)])
    assert ring.after(1) is None
    assert seqs(ring.after(2)) == [3]


def test_the_ring_hands_out_bounded_batches_that_join_without_a_seam(ring, monkeypatch):
    """One frame at least, however large."""
    monkeypatch.setattr(monitor, "READ_BYTES", 2_000)
    ring.publish([frame(seq, 3_000 if seq == 7 else 900) for seq in range(1, 21)])
    cursor, batches = 0, []
    while batch := ring.after(cursor):
        cursor = batch[-1].seq
        batches.append(seqs(batch))
    assert list(itertools.chain(*batches)) == list(range(1, 21))
    assert max(len(batch) for batch in batches) == 3


FOR_MANUAL, FOR_OTHERS = monitor.Filter(source="manual"), monitor.Filter(source="other")


def test_a_waiting_reader_wakes_for_what_it_wants_and_for_the_end_and_for_nothing_else(ring):
    """It does not wait for what is there already; what is not wanted moves its cursor when it wakes."""
    ring.publish([frame(1)])
    assert ring.wait(0, FOR_MANUAL) == 0
    with ThreadPoolExecutor(2) as pool:
        waiting, other = (pool.submit(ring.wait, 1, wanted) for wanted in (FOR_MANUAL, FOR_OTHERS))
        wait_until(lambda: len(ring._crowds) == 2)
        ring.publish([frame(2, source="other")])
        assert other.result(2) == 1
        time.sleep(0.05)
        assert not waiting.done()
        ring.publish([frame(3, source="manual")])
        assert waiting.result(2) == 2
        waiting = pool.submit(ring.wait, 3, FOR_MANUAL)
        ring.close()
        assert waiting.result(2) == 3
    assert ring.wait(3, FOR_MANUAL) == 3


def test_a_waiting_reader_looks_up_now_and_then(monkeypatch):
    """So that it can show a sign of life; and nobody's filter is kept for longer than that."""
    monkeypatch.setattr(monitor, "WAIT_SECONDS", 0.05)
    ring = monitor.Broadcaster()
    assert ring.wait(0, FOR_MANUAL) == 0
    wait_until(lambda: not ring._crowds)
    ring.close()


def test_readers_whose_frames_left_the_ring_unseen_are_woken(ring, monkeypatch):
    """They read the file."""
    ring.publish([frame(1)])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.wait, 1, FOR_MANUAL)
        wait_until(lambda: ring._crowds)
        time.sleep(0.05)
        monkeypatch.setattr(monitor, "RING_BYTES", 100)
        ring.publish([frame(2, 200)])
        assert waiting.result(2) == 1
    assert ring.after(1) is None


def test_more_than_a_batch_at_once_is_looked_through(ring, monkeypatch):
    """What is wanted stands at its end."""
    monkeypatch.setattr(monitor, "READ_BYTES", 1000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ring.wait, 0, FOR_MANUAL)
        wait_until(lambda: ring._crowds)
        time.sleep(0.05)
        ring.publish([*(frame(seq, 900) for seq in range(1, 20)), frame(20, source="manual")])
        assert waiting.result(2) > 10


def test_who_comes_ahead_of_the_ring_takes_nothing_from_those_who_wait_with_him(ring):
    """His cursor is of the file, where a commit stands a moment before it is told."""
    time.sleep(0.05)  # the waker's first look wakes all
    ring.publish([frame(1)])
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(ring.wait, 3, FOR_MANUAL)
        wait_until(lambda: ring._crowds)
        behind = pool.submit(ring.wait, 1, FOR_MANUAL)
        time.sleep(0.05)
        ring.publish([frame(2, source="manual"), frame(3, source="manual")])
        assert (behind.result(2), ahead.result(2)) == (1, 3)


class Interrupted(threading.Event):
    """An event in the middle of whose set() something else happens."""

    def __init__(self, meanwhile):
        super().__init__()
        self.meanwhile = meanwhile

    def set(self) -> None:
        super().set()
        self.meanwhile()


def test_a_reader_that_begins_to_wait_while_others_are_woken_sees_the_end(ring):
    """The end falls between the wake-up of the readers and the waker's look whether all is over."""
    found = []
    newcomer = threading.Thread(target=lambda: found.append(ring.wait(1, FOR_MANUAL)))

    def meanwhile() -> None:
        newcomer.start()
        wait_until(lambda: FOR_MANUAL in ring._crowds)
        ring.close()

    ring._crowds[FOR_OTHERS] = SimpleNamespace(seen=0, wake=Interrupted(meanwhile))
    ring.publish([frame(1, source="other")])
    wait_until(lambda: found == [1])
    newcomer.join()


HEAD = {"stream": "here", "seq": 50, "pruned": 10, "secret": b""}


@pytest.mark.parametrize(
    ("given", "stream", "expected"),
    [
        (None, None, (50, False, None)),
        (None, "elsewhere", (50, False, None)),
        ("20", None, (20, True, None)),
        ("20", "here", (20, True, None)),
        ("10", None, (10, True, None)),
        ("50", None, (50, True, None)),
        ("0020", None, (20, True, None)),
        ("51", None, (50, False, "ahead")),
        ("9", None, (9, False, "pruned")),
        ("0", "here", (0, False, "pruned")),
        ("20", "elsewhere", (50, False, "other_stream")),
        ("0", "elsewhere", (50, False, "other_stream")),
        ("٢٠", None, (50, False, "unknown")),
        ("-1", None, (50, False, "unknown")),
        ("20\n", None, (50, False, "unknown")),
        ("9" * 5000, None, (50, False, "unknown")),
    ],
)
def test_where_a_stream_begins(given, stream, expected):
    """Seq, whether it was resumed, and why not."""
    assert monitor.place_cursor(given, stream, HEAD) == expected


def test_what_was_pruned_is_said_before_what_is_left():
    """reset, then the rest of the past."""
    start = monitor.place_cursor("3", None, HEAD)
    raw = b"".join(monitor.stream_bytes(monitor.FORMATS["sse"], start, HEAD, [([frame(5), frame(12)], 12)]))
    hello, reset, *rest = parse_sse(raw)
    assert hello.data["resumed"] is False
    assert reset == Event("reset", {"reason": "pruned", "seq": 10}, "3")
    assert [event.id for event in rest] == ["5", "12"]


@pytest.mark.parametrize("form", ["sse", "ndjson"])
def test_a_live_reader_of_nothing_gets_checkpoints_as_three_thousand_pass(ring, form):
    """Every thousand or so, and at the end."""
    follow = monitor.follow(None, ring, 0, monitor.Filter(source="nobody"), poll=True)

    def passing():
        for first in range(1, 3001, 250):
            ring.publish([frame(seq) for seq in range(first, first + 250)])
            yield next(follow)

    start = monitor.Cursor(0, True)
    chunks = list(monitor.stream_bytes(monitor.FORMATS[form], start, HEAD, passing()))
    raw = b"".join(chunks[1:])
    events = parse_sse(raw) if form == "sse" else [Event(**json.loads(line)) for line in raw.splitlines()]
    assert [(event.event, int(event.id)) for event in events] == [
        ("checkpoint", 1000),
        ("checkpoint", 2000),
        ("checkpoint", 3000),
    ]


@pytest.mark.parametrize(("form", "sign"), [("sse", b":"), ("ndjson", b"\n")])
def test_a_quiet_reader_gets_a_sign_of_life_and_a_late_checkpoint(monkeypatch, form, sign):
    """A heartbeat where the cursor did not move, a checkpoint where a little went by."""
    monkeypatch.setattr(monitor, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(monitor, "QUIET_SECONDS", 0.02)
    ring = monitor.Broadcaster()
    follow = monitor.follow(None, ring, 0, monitor.Filter(source="nobody"), poll=False)
    chunks = monitor.stream_bytes(monitor.FORMATS[form], monitor.Cursor(0, True), HEAD, follow)
    assert b"hello" in next(chunks)
    assert next(chunks).startswith(sign)
    ring.publish([frame(1)])
    assert b'{"seq":1}' in next(chunks)
    assert next(chunks).startswith(sign)
    ring.close()
    assert b"checkpoint" not in b"".join(chunks)


SOURCES, KINDS = ("manual", "claude:1", "github:a/b"), ("decision", "error", None)
LEVELS, TAGS = ("info", "warn", "error", None), ("red", "blue", "green")


def do_something(m: monitor.Monitor, tasks: list[str], workstreams: list[str], chance: random.Random) -> None:
    """A random operation; tasks also move between workstreams."""
    task, workstream, action = chance.choice(tasks), chance.choice(workstreams), chance.random()
    if action < 0.8:
        fields = {
            "source": chance.choice(SOURCES),
            "kind": chance.choice(KINDS),
            "level": chance.choice(LEVELS),
        }
        tags = chance.sample(TAGS, chance.randint(0, 3))
        m.add_update(fields | {"task_id": task, "message": "m" * chance.randint(1, 300), "tags": tags})
    elif action < 0.95:
        m.change(monitor.TASK, task, {"workstream_id": workstream})
    else:
        m.change(monitor.WORKSTREAM, workstream, {"name": "renamed"})


def random_filter(chance: random.Random) -> monitor.Filter:
    """Any combination of conditions, most of them absent."""
    wanted = {
        "task": chance.randint(0, 4),
        "workstream": chance.randint(0, 4),
        "source": chance.choice((*SOURCES, "no such")),
        "kind": chance.choice(("decision", "error", "no such")),
        "level": chance.choice(("info", "warn", "error")),
        "tags": tuple(chance.sample((*TAGS, "no such"), chance.randint(1, 3))),
    }
    return monitor.Filter(**{name: value for name, value in wanted.items() if chance.random() < 0.3})


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """The store of a random log, and the frames as they were published."""
    written, chance = opened(tmp_path_factory.mktemp("log") / "monitor.db"), random.Random(5)
    workstreams = [
        json.loads(written.create(monitor.WORKSTREAM, {"name": f"w{number}"}))["id"] for number in range(3)
    ]
    tasks = [
        json.loads(written.create(monitor.TASK, {"workstream_id": workstream, "name": "t"}))["id"]
        for workstream in workstreams
    ]
    for _ in range(450):
        do_something(written, tasks, workstreams, chance)
    yield written.store, written.broadcaster.after(0)
    written.close()


def drain(store: monitor.Store, chosen: monitor.Filter, cursor: int, last: int) -> list[monitor.Frame]:
    """Everything that the file has for a reader, batch by batch."""
    found: list[monitor.Frame] = []
    while cursor < last:
        frames, reached = store.read(lambda q, at=cursor: q.events(at, chosen, last))
        assert reached > cursor
        assert all(cursor < one.seq <= reached for one in frames)
        found, cursor = found + frames, reached
    assert cursor == last
    return found


def test_the_ring_and_the_file_agree_on_every_filter(log, monkeypatch):
    """The same frames, byte by byte, whichever way a reader gets them and however small the batches are."""
    store, published = log
    chance = random.Random(7)
    for number in range(300):
        chosen = random_filter(chance) if number else monitor.EVERYTHING
        monkeypatch.setattr(monitor, "READ_ROWS", chance.choice((3, 256)))
        monkeypatch.setattr(monitor, "READ_BYTES", chance.choice((1, 2_000, 1_000_000)))
        monkeypatch.setattr(monitor, "SCAN_ROWS", chance.choice((7, 100, 20_000)))
        cursor, last = chance.choice(((0, len(published)), (100, 300), (456, 456)))
        found = [one.sse for one in drain(store, chosen, cursor, last)]
        expected = [one.sse for one in published[cursor:last] if chosen.matches(one)]
        assert found == expected, chosen


def test_a_reader_crosses_from_the_file_to_the_ring_without_a_seam(log, ring, monkeypatch):
    """Also when the ring moves on while it reads."""
    store, published = log
    monkeypatch.setattr(monitor, "READ_ROWS", 20)
    monkeypatch.setattr(monitor, "RING_BYTES", 10_000)
    ring.publish(published[:300])
    found: list[int] = []
    for frames, _ in monitor.follow(store, ring, 0, monitor.EVERYTHING, poll=True):
        found += seqs(frames)
        if ring.head < len(published):
            ring.publish(published[ring.head : ring.head + 15])
    assert found == list(range(1, len(published) + 1))


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(HOSTILE)


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.dictionaries(TEXT, TEXT | st.lists(TEXT), max_size=3), seq=st.integers(0, 2**63 - 1))
def test_any_text_survives_every_encoding(data, seq):
    """Log frames and the stream's own events, as SSE and as NDJSON."""
    logged = monitor.Frame(seq, "update", 1, 1, monitor.dump(data))
    own = monitor.encode_sse("hello", data) + monitor.encode_sse("reset", data, seq)
    assert parse_sse(own + logged.sse) == [
        Event("hello", data, None),
        Event("reset", data, str(seq)),
        Event("update", data, str(seq)),
    ]
    lines = monitor.encode_line("hello", data), monitor.FORMATS["ndjson"].frame(logged)
    assert [line.count(b"\n") for line in lines] == [1, 1]
    assert [json.loads(line) for line in lines] == [
        {"event": "hello", "data": data},
        {"event": "update", "id": seq, "data": data},
    ]
    assert (own + logged.sse + b"".join(lines)).isascii()


# Ticks: a page wants to know that something changed, no more ------------------------------------------------


def test_a_burst_is_a_few_ticks_of_which_the_last_is_up_to_date(fresh):
    server = fresh()
    task = server.new_task()
    with reading(server, "?view=tick") as events:
        assert next(events)[0] == "hello"
        began, ticks = time.monotonic(), []
        last = [server.say(task, f"news {number}")["seq"] for number in range(100)][-1]
        while not ticks or ticks[-1][1]["seq"] < last:
            ticks.append(next(events))
        took = time.monotonic() - began
    assert {event for event, _, _ in ticks} == {"tick"}
    assert [int(identity) for _, _, identity in ticks] == [data["seq"] for _, data, _ in ticks]
    assert len(ticks) <= took / 0.25 + 2


def test_ticks_take_filters_and_cursors(fresh):
    server = fresh()
    task, other = server.new_task(), server.new_task()
    wanted, unwanted = server.say(task, "one")["seq"], server.say(other, "two")["seq"]
    query = f"?view=tick&format=ndjson&poll=1&task_id={task['id']}&after_seq="
    lines = [json.loads(line) for line in server.ask("GET", f"/api/stream{query}0").text.splitlines()]
    assert [line["event"] for line in lines[:2]] == ["hello", "tick"]
    assert wanted <= lines[-1]["id"] <= unwanted
    lines = [json.loads(line) for line in server.ask("GET", f"/api/stream{query}{wanted}").text.splitlines()]
    assert "tick" not in [line["event"] for line in lines]
    lines = server.ask("GET", "/api/stream?view=tick&format=ndjson&poll=1&after_seq=999").text.splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["hello", "reset"]


def test_a_view_that_is_none_is_refused(server):
    assert server.ask("GET", "/api/stream?view=tock").status_code == 400
