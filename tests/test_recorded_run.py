"""A whole recorded run of a coding agent, event by event: on the stream and on the pages, as sentences."""

from __future__ import annotations

import json

import pytest
from conftest import ROOT

RUN = ROOT / "tests" / "payloads" / "claude" / "sequences" / "tools.jsonl"
SENTENCES = [  # what a person reads of it, in this order, among the rest
    "Session started in project",
    "Prompt: (scenario tools) go",
    "Ran: Say hello — echo hello",
    "Command failed (exit 1): false",
    "Created calc.py",
    "Edited calc.py (+1 -1)",
    "Tests failed: 3 passed, 1 failed in 0.12s",
    "All steps done: calc.py written and edited.",
    "Session ended (other)",
]


@pytest.fixture(scope="module")
def payloads() -> list[dict]:
    return [json.loads(line)["payload"] for line in RUN.read_text().splitlines()]


def test_a_recorded_run_arrives_as_sentences_on_the_stream_and_the_pages(server, task, payloads):
    with server.follow(f"?task_id={task['id']}") as follower:
        stored = [
            server.post("/api/updates/claude-hook", task_id=task["id"], payload=payload)
            for payload in payloads
        ]
        assert follower.take(len(payloads), "update") == stored
    messages = [update["message"] for update in stored]
    assert [message for message in messages if message in SENTENCES] == SENTENCES
    assert [update["data"] for update in stored] == payloads
    assert {update["source"] for update in stored} == {f"claude:{payloads[0]['session_id']}"}
    for path in (f"/tasks/{task['id']}", "/stream"):
        page = server.ask("GET", path).text
        assert all(message in page for message in SENTENCES)


def test_each_event_of_it_is_stored_once_when_it_is_sent_twice_with_its_key(server, task, payloads):
    for number, payload in [*enumerate(payloads), *enumerate(payloads)]:
        answer = server.ask(
            "POST",
            "/api/updates/claude-hook",
            {"task_id": task["id"], "payload": payload},
            headers={"Idempotency-Key": f"{task['id']}-{number}"},
        )
        assert answer.status_code in (200, 201)
    assert server.get("/api/updates", task_id=task["id"])["total"] == len(payloads)
