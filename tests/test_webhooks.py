"""GitHub's own requests: who may send them, which task they land on, what the task then shows."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import hmac
import itertools
import json
import random
import subprocess
import tarfile
import uuid
from unittest import mock
from urllib.parse import quote_plus, urlencode

import pytest
from conftest import ROOT
from rig import Browser, on

import monitor

pytestmark = pytest.mark.usefixtures("answers_conform")

CASES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((ROOT / "tests" / "payloads" / "github").glob("*.json"))
}
SECRET = "It's a Secret to Everybody"
WRONG = [None, True, 0, -1, 10**30, 1.5, "", "x" * 5000, "\ud800\0", [], [[1]], {}, {"a": {"b": []}}]
SENDER = {"login": "mona", "type": "User"}


class Hub:
    """A repository on GitHub whose events go to a server."""

    def __init__(self, server, name: str | None = None):
        self.server, self.name = server, name or f"acme/{uuid.uuid4().hex}"

    def payload(self, **fields) -> dict:
        home = {"id": 1, "full_name": self.name, "html_url": f"https://github.com/{self.name}"}
        return {"repository": home | {"default_branch": "main"}, "sender": SENDER} | fields

    def send(self, event: str, payload: dict, delivery: str | None = None, task=None, **headers):
        headers |= {"X-GitHub-Event": event, "X-GitHub-Delivery": delivery or str(uuid.uuid4())}
        query = {"task_id": task["id"]} if task else {}
        return self.server.ask("POST", "/api/webhooks/github", payload, params=query, headers=headers)

    def __call__(self, event: str, delivery=None, task=None, **fields) -> dict:
        """Send an event that is taken; the answer with its status as `code`."""
        answer = self.send(event, self.payload(**fields), delivery, task)
        assert answer.status_code in (200, 202), answer.text
        return answer.json() | {"code": answer.status_code}

    def run(
        self, number: int, state: str, branch: str = "fix", attempt: int = 1, task=None, **fields
    ) -> dict:
        """The workflow run `number` is queued, in_progress, or ended with a conclusion."""
        ended = state not in ("queued", "in_progress")
        action = "completed" if ended else {"queued": "requested"}.get(state, state)
        url = f"https://github.com/{self.name}/actions/runs/{number}"
        run = {
            "id": 100 + number,
            "name": "CI",
            "run_number": number,
            "run_attempt": attempt,
            "html_url": url,
        }
        run |= {"status": "completed" if ended else state, "conclusion": state if ended else None}
        run |= {"head_branch": branch, "updated_at": f"2026-01-01T10:{number:02}:{attempt:02}Z"}
        return self("workflow_run", task=task, action=action, workflow_run=run | fields)

    def pull(self, number: int, action: str = "opened", minute: int = 0, task=None, **fields) -> dict:
        """A pull request from branch pull-NUMBER is opened, closed, merged ..."""
        url = f"https://github.com/{self.name}/pull/{number}"
        pull = {"number": number, "title": "A title", "html_url": url, "merged": action == "merged"}
        pull |= {"state": "closed" if action in ("closed", "merged") else "open", "body": ""}
        pull |= {"head": {"ref": f"pull-{number}", "sha": f"{number:040x}", "repo": {"full_name": self.name}}}
        pull |= {"updated_at": f"2026-01-01T10:{minute:02}:00Z"}
        action = "closed" if action == "merged" else action
        return self("pull_request", task=task, action=action, pull_request=pull | fields)

    def comment(self, number: int, pull: bool = True, **fields) -> dict:
        issue = {"number": number, "title": "An issue"} | ({"pull_request": {}} if pull else {}) | fields
        return self("issue_comment", action="created", issue=issue, comment={"body": "Look here"})


@pytest.fixture
def hub(server):
    """A repository of its own on the shared server."""
    return Hub(server)


def shown(server, task) -> dict:
    return server.get(f"/api/tasks/{task['id']}")


def state_of(server, task) -> tuple:
    """What a task shows: CI, pull requests, attention."""
    task = shown(server, task)
    pulls = [(pull["number"], pull["state"]) for pull in task.get("pull_requests", [])]
    return task.get("ci", {}).get("state"), pulls, task.get("attention", {}).get("state")


def bind(server, task, kind: str, value: str, **fields) -> None:
    server.post("/api/links", link=kind, value=value, task_id=task["id"], **fields)


def sign(body: bytes, secret: str = SECRET) -> str:
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def post(server, body: bytes, media: str = "application/json", event: str = "push", **headers):
    headers = {"Content-Type": media, "X-GitHub-Event": event} | headers
    return server.ask("POST", "/api/webhooks/github", data=body, headers=headers)


# --- who may send ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"), [("repo", "shop"), ("repo", "a b/c"), ("commit", "zzz"), ("commit", "abc1234")]
)
def test_a_link_that_could_never_lead_anywhere_is_refused(server, task, kind, value):
    body = {"link": kind, "value": value, "task_id": task["id"]}
    assert server.ask("POST", "/api/links", body).status_code == 400


@pytest.mark.parametrize(
    "value", ["acme/shop", "https://github.com/Acme/shop", "https://github.com/acme/shop.git/"]
)
def test_a_repository_may_be_named_by_its_address(server, task, value):
    bind(server, task, "repo", value)
    assert server.get("/api/links", task_id=task["id"])["items"][0]["value"] == "acme/shop"


def test_the_documented_signature_is_taken():
    known = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert monitor.signed((SECRET.encode(),), known, b"Hello, World!")
    assert not monitor.signed((SECRET.encode(),), known, b"Hello, World?")
    assert not monitor.signed((), known, b"Hello, World!")


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A strict server with two secrets, for rotation."""
    from conftest import Server

    settings = {"MONITOR_GITHUB_SECRET": f"new one, {SECRET}", "MONITOR_AUTH_MODE": "strict"}
    running = Server(tmp_path_factory.mktemp("strict") / "m.db", **settings, MONITOR_API_TOKENS="a-token")
    yield running
    assert running.stop() == 0 and "Traceback" not in running.output


BODY = json.dumps({"zen": "x", "hook_id": 1, "hook": {"events": ["push"]}}).encode()
FORM = urlencode({"payload": BODY.decode()}).encode()
AS_FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("body", "media", "signature", "status"),
    [
        (BODY, "application/json", sign(BODY), 200),
        (BODY, "application/json", sign(BODY, "new one"), 200),
        (BODY, "application/json", sign(BODY, "another"), 401),
        (BODY, "application/json", "", 401),
        (BODY, "application/json", "sha256=", 401),
        (BODY, "application/json", "sha256=é\xff", 401),
        (BODY, "application/json", sign(BODY).upper(), 401),
        (BODY, "application/json", sign(BODY).removeprefix("sha256="), 401),
        (BODY + b" ", "application/json", sign(BODY), 401),
        (FORM, AS_FORM, sign(FORM), 200),
        (FORM, AS_FORM, sign(BODY), 200),  # Gitea signs what is in the form
        (FORM, AS_FORM, sign(b""), 401),
        (b"", "application/json", sign(b""), 400),
        (b"{", "application/json", sign(b"{"), 400),
        (b"{", "application/json", sign(b"}"), 401),
    ],
)
def test_a_signature_stands_for_the_token_in_strict_mode(strict, body, media, signature, status):
    headers = {"X-Hub-Signature-256": signature.encode("latin-1")}
    answer = post(strict, body, media, "ping", **headers)
    assert answer.status_code == status, answer.text
    assert "message" in answer.json()


def test_a_token_does_not_stand_for_the_signature(strict):
    assert post(strict, BODY, Authorization="Bearer a-token").status_code == 401
    assert strict.ask("GET", "/api/tasks").status_code == 401


def test_nothing_comes_of_an_unsigned_delivery(strict):
    hub, payload = Hub(strict), Hub(strict, "acme/x").payload(ref="refs/heads/a", commits=[])
    body = json.dumps(payload).encode()
    headers = {"X-GitHub-Delivery": "poisoned"}
    assert post(strict, body, **headers).status_code == 401
    taken = post(strict, body, **headers, **{"X-Hub-Signature-256": sign(body)})
    assert taken.status_code == 202 and hub.name


def test_without_a_secret_the_token_is_asked_for(fresh):
    server = fresh(MONITOR_API_TOKENS="a-token")
    assert post(server, BODY, event="ping").status_code == 401
    assert post(server, BODY, event="ping", Authorization="Bearer a-token").status_code == 200


def test_other_web_sites_are_refused_even_where_they_need_no_token(server):
    assert post(server, FORM, AS_FORM, Origin="https://evil.example").status_code == 403
    assert post(server, FORM, AS_FORM, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403


# --- bodies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["json", "form", "smee", "form with more", "json called a form"])
def test_an_event_is_the_same_however_it_is_wrapped(hub, wrap):
    text = json.dumps(hub.payload(ref="refs/heads/a", commits=[], note="ä+&=%"), ensure_ascii=False)
    body, media = {
        "json": (text.encode(), "application/json"),
        "form": (f"payload={quote_plus(text)}".encode(), AS_FORM),
        "smee": (json.dumps({"payload": text}).encode(), "application/json"),
        "form with more": (f"a=b&payload={quote_plus(text)}&payload=x".encode(), AS_FORM + "; charset=utf-8"),
        "json called a form": (text.encode(), AS_FORM),
    }[wrap]
    answer = post(hub.server, body, media)
    assert answer.status_code == 202, answer.text
    assert answer.json()["message"] == "mona pushed to a"
    assert answer.json()["source"] == f"github:{hub.name}"


@pytest.mark.parametrize("body", [b"", b"{", b"payload=", b"\xff\xfe", b'{"payload": "no json"}'])
def test_what_is_no_json_is_refused_in_a_sentence(server, body):
    for media in ("application/json", AS_FORM):
        answer = post(server, body, media)
        assert answer.status_code == 400 and answer.json()["message"].startswith("the body is not JSON")


def test_25_mib_are_taken_and_one_byte_more_is_not(hub):
    payload = json.dumps(hub.payload(ref="refs/heads/a", commits=[], pad="")).encode()
    room = 25 * 1024 * 1024 - len(payload)
    for more, status in ((0, 202), (1, 413)):
        body = payload[:-2] + b"x" * (room + more) + payload[-2:]
        assert len(body) == 25 * 1024 * 1024 + more
        answer = post(hub.server, body)
        assert answer.status_code == status and "message" in answer.json()


def test_a_form_of_25_mib_is_taken(hub):
    payload = json.dumps(hub.payload(ref="refs/heads/a", commits=[], pad="@")).encode()
    body = b"payload=" + quote_plus(payload).encode().replace(b"%40", b"%C3%A9" * 4_300_000)
    answer = post(hub.server, body, AS_FORM)
    assert answer.status_code == 202


def test_a_ping_says_what_is_connected_and_stores_nothing(hub):
    hook = {"events": ["push", "workflow_run"], "config": {"secret": "********"}}
    answer = hub("ping", zen="Keep it logically awesome.", hook_id=7, hook=hook)
    said = f"Webhook connected: {hub.name} will send push, workflow_run"
    assert answer == {"status": "ping", "message": said, "code": 200}
    assert hub.server.get("/api/updates", source=f"github:{hub.name}")["total"] == 0


# --- once per delivery and task --------------------------------------------------------------------------


def test_a_delivery_is_stored_once_a_task(hub):
    one, two = hub.server.new_task("one"), hub.server.new_task("two")
    fields = {"ref": "refs/heads/a", "commits": []}
    first = [hub("push", "same", task, **fields) for task in (one, two)]
    again = [hub("push", "same", task, **fields) for task in (one, two)]
    assert again == first and first[0]["task_id"] == one["id"] and first[1]["task_id"] == two["id"]
    other = hub("push", "other", one, **fields)
    assert other["seq"] != first[0]["seq"]
    assert hub.server.get("/api/updates", source=f"github:{hub.name}")["total"] == 3


def test_without_the_name_of_a_delivery_each_is_another(hub):
    body = json.dumps(hub.payload(ref="refs/heads/a", commits=[])).encode()
    assert post(hub.server, body).json()["seq"] != post(hub.server, body).json()["seq"]


def test_a_delivery_of_the_inbox_comes_again_with_200(hub):
    assert hub("push", "in", ref="refs/heads/a", commits=[])["code"] == 202
    assert hub("push", "in", ref="refs/heads/a", commits=[])["code"] == 200


def test_no_raw_payload_and_no_secret_is_stored(hub):
    token = "ghp_" + "a1B2" * 9
    told = hub.pull(1, title=f"Use {token}", body="x" * 5000, url=f"https://e.org/{token}")
    assert len(json.dumps(told)) < 2500 and token not in json.dumps(told)
    link = f"https://ci.example.org/?t={token}"
    hub("status", sha="a" * 40, context="lint", state="failure", target_url=link, branches=[])
    assert token not in json.dumps(hub.server.get("/api/tasks")) + json.dumps(hub.server.get("/api/links"))


# --- routing ---------------------------------------------------------------------------------------------


def routed(answer: dict, task: dict) -> str:
    """How an event came to the task that it must belong to."""
    assert answer["task_id"] == task["id"], answer
    return answer["data"]["routed_by"]


def test_a_named_task_comes_first(hub, task):
    other = hub.server.new_task("other")
    assert routed(hub.pull(1, title=f"mon-{other['number']}", task=task), task) == "task_id"
    answer = hub.send("push", hub.payload(ref="refs/heads/a"), **{"X-Monitor-Task": str(other["number"])})
    assert routed(answer.json(), other) == "task_id"
    assert hub.send("push", hub.payload(), task={"id": str(uuid.uuid4())}).status_code == 404
    assert hub.send("push", hub.payload(), task={"id": "no/id"}).status_code == 400
    assert hub.send("push", hub.payload(ref="refs/heads/b"), **{"X-Monitor-Task": ""}).status_code == 202


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("branch", "amit/MON-{n}/x"),
        ("branch", "task/{n}"),
        ("branch", "feature/mon{n}-fix"),
        ("branch", "{id}"),
        ("title", "[mon-{n}] Fix it"),
        ("body", "Closes mon-{n}."),
        ("trailer", "Words.\n\nMonitor-Task: {n}\n"),
        ("trailer", "Words.\r\n\r\nmonitor-task: #{n}\r\n"),
        ("body", "Monitor-Task: {id}"),
    ],
)
def test_a_key_in_a_text_names_the_task(hub, task, place, text):
    text, name = text.format(n=task["number"], id=task["id"]), "body" if place == "trailer" else place
    fields = {"head": {"ref": text}} if place == "branch" else {name: text}
    assert routed(hub.pull(1, **fields), task) == f"key:{place}"


@pytest.mark.parametrize(
    "name", ["multitask-{}", "mon-{}x", "release/2024-{}", "pr-{}", "fix/{}-login", "{}"]
)
def test_what_only_looks_like_a_key_names_nothing(hub, task, name):
    assert hub.pull(1, head={"ref": name.format(task["number"])})["code"] == 202


def test_a_key_of_no_task_is_passed_over(hub, task):
    text = f"mon-999999999 task-{task['id'][:8]}x mon-0 then mon-{task['number']}"
    assert routed(hub.pull(1, title=text), task) == "key:title"


def test_a_trailer_in_a_commit_names_the_task(hub, task):
    commits = [{"message": "One"}, {"message": f"Two\n\nMonitor-Task: {task['number']}"}]
    assert routed(hub("push", ref="refs/heads/topic", commits=commits), task) == "key:trailer"
    assert routed(hub.run(1, "success", "topic"), task) == "link:branch"


@pytest.mark.parametrize("named", [True, False])
def test_links_lead_to_their_task(hub, named):
    server, kinds = hub.server, ("branch", "pr", "issue", "commit", "repo")
    tasks = {kind: server.new_task(kind) for kind in kinds}
    where = {"repository": hub.name.upper()} if named else {}
    if not named:  # in any repository
        hub.name = f"acme/{uuid.uuid4().hex}"
    number = random.randint(10**6, 10**9)
    bind(server, tasks["branch"], "branch", f"topic-{number}", **where)
    bind(server, tasks["pr"], "pr", str(number), **where)
    bind(server, tasks["issue"], "issue", str(number + 1), **where)
    bind(server, tasks["commit"], "commit", f"{number:040X}", **where)
    bind(server, tasks["repo"], "repo", hub.name)
    assert routed(hub.run(1, "success", f"topic-{number}"), tasks["branch"]) == "link:branch"
    assert routed(hub.comment(number), tasks["pr"]) == "link:pr"
    assert routed(hub.comment(number + 1, pull=False), tasks["issue"]) == "link:issue"
    assert routed(hub.run(2, "success", None, head_sha=f"{number:040x}"), tasks["commit"]) == "link:commit"
    assert routed(hub.pull(number + 2, body=f"Fixes #{number + 1}"), tasks["issue"]) == "fixes"
    assert routed(hub.comment(number + 2), tasks["issue"]) == "link:pr"  # learnt
    assert routed(hub.comment(number + 3), tasks["repo"]) == "repo"


def test_a_link_of_another_repository_leads_nowhere(hub, task):
    bind(hub.server, task, "branch", "topic", repository="acme/other")
    assert hub.run(1, "success", "topic")["code"] == 202
    fork = {"ref": "topic", "repo": {"full_name": "acme/other"}}
    assert routed(hub.pull(1, head=fork), task) == "link:branch"


def test_a_branch_of_a_fork_is_not_ours_of_the_same_name(hub, task):
    bind(hub.server, task, "branch", "main", repository=hub.name)
    assert hub.pull(1, head={"ref": "main", "repo": {"full_name": "eve/fork"}})["code"] == 202


def test_what_a_pull_request_shows_is_remembered_for_events_that_name_less(hub, task):
    hub.pull(7, title=f"mon-{task['number']}")
    assert routed(hub.comment(7), task) == "link:pr"
    assert routed(hub.run(1, "success", "pull-7"), task) == "link:branch"
    assert routed(hub.run(2, "failure", None, head_sha=f"{7:040x}"), task) == "link:commit"
    links = hub.server.get("/api/links", task_id=task["id"])["items"]
    assert {link["link"] for link in links} == {"pr", "branch", "commit"} and all(
        link["learnt"] for link in links
    )


def test_the_main_branch_is_never_learnt(hub, task):
    hub.pull(7, title=f"mon-{task['number']}", head={"ref": "main", "repo": {"full_name": hub.name}})
    assert hub.run(1, "success", "main")["code"] == 202


def test_what_a_person_set_is_not_changed_by_what_is_learnt(hub, task):
    mine = hub.server.new_task("mine")
    bind(hub.server, mine, "pr", f"{hub.name}#7")
    hub.pull(7, title=f"mon-{task['number']}")
    assert routed(hub.comment(7), mine) == "link:pr"
    assert routed(hub.run(1, "success", "pull-7"), task) == "link:branch"
    hub.pull(8, title=f"mon-{task['number']}")
    hub.pull(8, title=f"mon-{mine['number']}")
    assert routed(hub.comment(8), mine) == "link:pr"


def test_the_newest_run_of_an_agent_on_the_branch_has_the_task(hub, tmp_path):
    git = tmp_path / ".git"
    git.mkdir()
    (git / "config").write_text(f'[remote "origin"]\n\turl = git@github.com:{hub.name.upper()}.git\n')
    (git / "HEAD").write_text("ref: refs/heads/topic\n")
    for session in ("old", "new"):
        body = {"hook_event_name": "UserPromptSubmit", "prompt": session, "cwd": str(tmp_path)}
        hub.server.ask("POST", "/api/hooks/claude", body | {"session_id": f"{session} {hub.name}"})
    tasks = {t["name"]: t for t in hub.server.get("/api/tasks")["items"]}
    head = {"ref": "topic", "repo": {"full_name": hub.name}}
    assert routed(hub.pull(3, head=head), tasks["new"]) == "run"
    assert routed(hub.comment(3), tasks["new"]) == "link:pr"
    other = hub.run(1, "success", "elsewhere")
    assert other["code"] == 202
    inbox = shown(hub.server, {"id": other["task_id"]})
    assert inbox["workstream_id"] == tasks["new"]["workstream_id"]


def test_the_inbox_takes_the_rest_in_the_workstream_of_the_repository(hub):
    first, second = hub.comment(1), hub.run(1, "success")
    assert first["task_id"] == second["task_id"] and first["data"]["routed_by"] == "inbox"
    inbox = shown(hub.server, {"id": first["task_id"]})
    assert inbox["name"] == f"GitHub inbox: {hub.name}"
    workstream = hub.server.get(f"/api/workstreams/{inbox['workstream_id']}")
    assert workstream["name"] == hub.name.partition("/")[2]


def test_text_changes_no_status_but_a_link_may(hub, task):
    hub.pull(1, "merged", title=f"Closes mon-{task['number']}", body=f"Fixes mon-{task['number']}")
    assert shown(hub.server, task)["status"] == "active"
    bind(hub.server, task, "pr", f"https://github.com/{hub.name}/pull/2", close_on_merge=True)
    hub.pull(2, "closed", 1)
    assert shown(hub.server, task)["status"] == "active"
    hub.pull(2, "merged", 2)
    assert shown(hub.server, task)["status"] == "done"
    hub.server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "active"})
    hub.pull(2, "labeled", 3, state="closed", merged=True)
    assert shown(hub.server, task)["status"] == "active"


# --- what the task shows ---------------------------------------------------------------------------------


def test_the_newest_run_is_shown_whatever_comes_last(hub, task):
    bind(hub.server, task, "branch", "fix", repository=hub.name)
    hub.run(2, "success", attempt=2)
    for number, state, attempt in [
        (1, "failure", 3),
        (2, "queued", 2),
        (2, "failure", 1),
        (2, "in_progress", 2),
    ]:
        hub.run(number, state, attempt=attempt)
    url = f"https://github.com/{hub.name}/actions/runs/2"
    ci = {"state": "passed", "url": url, "run": 2, "attempt": 2, "at": "2026-01-01T10:02:02.000000Z"}
    assert shown(hub.server, task)["ci"] == ci
    hub.run(3, "queued")
    assert state_of(hub.server, task) == ("queued", [], None)
    hub.run(3, "in_progress")
    assert state_of(hub.server, task) == ("running", [], None)
    hub.run(3, "cancelled")
    assert state_of(hub.server, task) == ("cancelled", [], None)


def test_a_failure_asks_for_attention_until_the_next_run_passes(hub, task):
    bind(hub.server, task, "branch", "fix", repository=hub.name)
    failed = hub.run(1, "failure")
    attention = shown(hub.server, task)["attention"]
    assert attention["state"] == "failed" and attention["message"] == failed["message"]
    assert attention["seq"] == failed["seq"] and attention["since"] == "2026-01-01T10:01:01.000000Z"
    assert [
        t["id"] for t in hub.server.get("/api/tasks", attention="failed")["items"] if t["id"] == task["id"]
    ]
    for state in ("queued", "in_progress", "cancelled"):
        hub.run(2, state)
        assert state_of(hub.server, task)[2] == "failed"
    hub.run(1, "success", attempt=1)  # the same second: the first word holds
    hub.run(3, "success")
    assert state_of(hub.server, task) == ("passed", [], None)


def test_a_task_gives_up_what_belongs_to_another_one_by_now(hub, server):
    old, new = server.new_task("old"), server.new_task("new")
    bind(server, old, "branch", "pull-1", repository=hub.name)
    hub.pull(1)
    hub.run(1, "failure", "pull-1")
    assert state_of(server, old) == ("failed", [(1, "open")], "failed")
    bind(server, new, "branch", "pull-1", repository=hub.name)
    with server.follow(f"?task_id={old['id']}") as follower:
        hub.run(2, "success", "pull-1")
        assert "attention" not in follower.take(1, "task_updated")[0]
    hub.pull(1, "merged", 5)
    assert state_of(server, old)[2] is None
    assert state_of(server, new)[0] == "passed"


def test_another_check_does_not_make_up_for_a_failure(hub, task):
    bind(hub.server, task, "branch", "fix", repository=hub.name)
    hub.run(1, "failure", path="a.yml")
    hub.run(2, "success", path="b.yml")
    hub.run(3, "success", "other", path="a.yml", task=task)
    assert state_of(hub.server, task) == ("failed", [], "failed")
    hub.run(4, "success", path="a.yml")
    assert state_of(hub.server, task) == ("passed", [], None)


def test_a_job_says_nothing_where_its_workflow_is_seen(hub, task):
    job = {"id": 5, "name": "build", "head_branch": "fix", "conclusion": "failure", "status": "completed"}
    hub("workflow_job", task=task, action="completed", workflow_job=job)
    assert state_of(hub.server, task) == ("failed", [], "failed")
    hub.run(1, "success", task=task)
    assert state_of(hub.server, task) == ("passed", [], None)


@pytest.mark.parametrize("event", ["check_run", "check_suite"])
def test_checks_of_others_count(hub, task, event):
    for number, conclusion, seen in ((1, "failure", "failed"), (2, "success", None)):
        check = {"id": number, "name": "lint", "app": {"slug": "lint"}, "conclusion": conclusion}
        check |= {"status": "completed", "check_suite": {"head_branch": "fix"}, "head_branch": "fix"}
        hub(event, task=task, action="completed", **{event: check})
        assert state_of(hub.server, task)[2] == seen


def test_the_status_of_a_commit_counts(hub, task):
    for number, state in enumerate(("pending", "failure", "pending", "success"), 1):
        fields = {"sha": "a" * 40, "context": "ci/lint", "state": state, "branches": [{"name": "fix"}]}
        hub("status", task=task, id=number, **fields)
        expected = {
            1: ("queued", None),
            2: ("failed", "failed"),
            3: ("queued", "failed"),
            4: ("passed", None),
        }
        assert state_of(hub.server, task)[::2] == expected[number]


def test_every_change_of_what_is_shown_is_told(hub, task):
    with hub.server.follow(f"?task_id={task['id']}") as follower:
        hub.run(1, "in_progress", task=task)
        hub.run(1, "in_progress", task=task)
        hub.run(1, "failure", task=task)
        hub.run(1, "in_progress", task=task)
        hub.pull(4, task=task)
        hub.server.say(task, "the end")
        told = [(event, data) for event, data in itertools.islice(events(follower), 6)]
    kinds = [event for event, _ in told]
    assert kinds == ["task_updated", "update", "task_updated", "update", "task_updated", "update"]
    assert told[0][1]["ci"]["state"] == "running" and told[2][1]["attention"]["state"] == "failed"
    assert told[4][1]["pull_requests"][0]["state"] == "open"


def events(follower):
    for event, data, _ in follower:
        if event in ("update", "task_updated"):
            yield event, data


def life(hub: Hub) -> list[tuple[str, dict]]:
    """A pull request's whole life: a failing run, its second attempt, a push, a passing run, the merge."""
    sent: list[tuple[str, dict]] = []
    recorder = Hub(hub.server, hub.name)
    recorder.send = lambda event, payload, *_, **__: sent.append((event, payload)) or Taken()
    recorder.pull(9, "opened", 0)
    for number, attempt, states in (
        (1, 1, "failure"),
        (1, 2, "cancelled"),
        (2, 1, "failure"),
        (3, 1, "success"),
    ):
        for state in ("queued", "in_progress", states):
            recorder.run(number, state, "pull-9", attempt)
    recorder.pull(9, "synchronize", 1)
    recorder.pull(9, "closed", 2)
    recorder.pull(9, "reopened", 3)
    recorder.pull(9, "merged", 4)
    recorder.pull(9, "labeled", 5, state="closed", merged=True)
    return sent


class Taken:
    status_code, text = 200, ""

    def json(self) -> dict:
        return {}


@pytest.mark.parametrize("seed", range(12))
def test_a_pull_requests_life_ends_the_same_in_any_order(server, seed):
    chance, hub, task = random.Random(seed), Hub(server), server.new_task("life")
    bind(server, task, "pr", "9", repository=hub.name, close_on_merge=True)
    bind(server, task, "branch", "pull-9", repository=hub.name)
    sent = [(event, payload, f"{seed} {number}") for number, (event, payload) in enumerate(life(hub))]
    if seed:
        sent = chance.sample(sent, len(sent)) + chance.sample(sent, 8)
    for event, payload, delivery in sent:
        assert hub.send(event, payload, delivery + hub.name).status_code == 200
    assert state_of(server, task) == ("passed", [(9, "merged")], None)
    assert shown(server, task)["status"] == "done" and shown(server, task)["ci"]["run"] == 3
    ended = server.get("/api/updates", source=f"github:{hub.name}", limit=200)
    assert ended["total"] == 4 + 6  # runs that ended, and what happened to the pull request


def test_a_failure_before_the_pull_request_was_closed_asks_for_nothing(hub, task):
    hub.pull(5, task=task)
    hub.run(1, "failure", "pull-5", task=task)
    assert state_of(hub.server, task) == ("failed", [(5, "open")], "failed")
    hub.pull(5, "closed", 1, task=task)
    assert state_of(hub.server, task) == ("failed", [(5, "closed")], None)


def test_an_inbox_gives_up_what_has_found_its_task(hub, task):
    inbox = {"id": hub.pull(3)["task_id"]}
    hub.run(1, "failure", "pull-3")
    assert state_of(hub.server, inbox) == ("failed", [(3, "open")], "failed")
    bind(hub.server, task, "branch", "pull-3", repository=hub.name)
    with hub.server.follow(f"?task_id={inbox['id']}") as follower:
        hub.run(2, "in_progress", "pull-3")
        hub.pull(3, "labeled", 1)
        first, second = follower.take(2, "task_updated")
    assert "ci" not in first and first["pull_requests"] and "pull_requests" not in second
    assert state_of(hub.server, inbox) == (None, [], None)
    assert state_of(hub.server, task) == ("running", [(3, "open")], None)


def test_twenty_pull_requests_are_shown_the_open_ones_first(hub, task):
    hub.pull(1, task=task)
    for number in range(2, 26):
        hub.pull(number, "merged", number, task=task)
    numbers = [pull["number"] for pull in shown(hub.server, task)["pull_requests"]]
    assert numbers == [1, *range(25, 6, -1)]


# --- noise -----------------------------------------------------------------------------------------------


def test_one_run_is_one_line_whatever_tells_of_it(hub, task):
    hub.run(1, "queued", task=task)
    part = {"id": 1, "name": "build", "conclusion": "success", "status": "completed", "head_branch": "fix"}
    for event in ("check_run", "check_suite", "workflow_job"):
        told = hub(event, task=task, action="completed", **{event: part})
        assert told["status"] == "dropped" and told["message"]
    hub.run(1, "success", task=task)
    said = hub.server.get("/api/updates", task_id=task["id"])["items"]
    assert [update["message"] for update in said] == ["Workflow CI #1 passed on fix"]


def test_noise_makes_no_inbox(hub):
    assert hub.run(1, "queued")["status"] == "dropped"
    assert hub.server.get("/api/tasks", q=hub.name.partition("/")[2])["total"] == 0


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ("", "workflow_run.success workflow_run.failure star"),
        (
            "-star,workflow_run.in_progress",
            "workflow_run.in_progress workflow_run.success workflow_run.failure",
        ),
        ("-workflow_run.success", "workflow_run.failure star"),
        ("-*,workflow_run.failure", "workflow_run.failure"),
        ("*", "workflow_run.in_progress workflow_run.success workflow_run.failure star"),
    ],
)
def test_a_setting_narrows_or_widens_what_is_kept(rules, kept):
    config = monitor.Config.load({"MONITOR_GITHUB_EVENTS": rules})
    found = []
    for name in ("workflow_run.in_progress", "workflow_run.success", "workflow_run.failure", "star"):
        event, _, state = name.partition(".")
        ended = state in ("success", "failure")
        run = {"status": "completed" if ended else state, "conclusion": state if ended else None}
        action = "completed" if ended else state or "created"
        draft = monitor.github_draft({"action": action, event: run}, {"x-github-event": event})
        found += [name] * monitor.github_wanted(config.github_events, draft)
    assert " ".join(found) == kept


def test_a_rule_that_makes_no_sense_is_refused():
    with pytest.raises(monitor.Problem, match="MONITOR_GITHUB_EVENTS"):
        monitor.Config.load({"MONITOR_GITHUB_EVENTS": "push; drop table"})


# --- whatever comes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """A Monitor in this process: thousands of payloads in a second."""
    settings = {"MONITOR_DB": str(tmp_path_factory.mktemp("inside") / "m.db"), "MONITOR_GITHUB_EVENTS": "*"}
    made = monitor.Monitor(monitor.Config.load(settings))
    yield made
    assert made.store.read(lambda q: q.check()) == []
    made.close()


def places(value, way=()):
    """Every way into a JSON value but the empty one."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*way, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*way, key))


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_type_in_any_field_is_no_fault(inside, name):
    case, chance, faults = CASES[name], random.Random(name), []
    batch = []
    for way in places(case["payload"]):
        for wrong in chance.sample(WRONG, 4):
            payload = copy.deepcopy(case["payload"])
            inner = payload
            for step in way[:-1]:
                inner = inner[step]
            inner[way[-1]] = wrong
            batch.append((way, wrong, payload))

    def all_of_them(t):  # in one transaction: one sync to disk
        with mock.patch.object(inside.store, "write", lambda operation: operation(t)):
            for way, wrong, payload in batch:
                try:
                    body, status = inside.take_webhook(payload, case["headers"] | {"x-github-delivery": ""})
                    assert status in (200, 202) and json.loads(body)
                except Exception as error:
                    faults.append((way, wrong, repr(error)))

    inside.store.write(all_of_them)
    assert faults == []


@pytest.mark.parametrize("payload", [None, [], "text", 5, {}, 1e999, {"repository": 5}, {"payload": 5}])
def test_any_json_gets_an_answer(server, payload):
    for event in ("", "push", "workflow_run", "pull_request", "nothing_known", "github", "é" * 300):
        body = json.dumps(payload).encode()
        answer = post(server, body, event=event.encode())
        assert answer.status_code in (200, 202), answer.text


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """GitHub's own examples, where npm can fetch them; else what was chosen from them."""
    folder = tmp_path_factory.mktemp("corpus")
    with contextlib.suppress(OSError, subprocess.SubprocessError, tarfile.TarError, KeyError):
        command = ["npm", "pack", "@octokit/webhooks-examples@7.6.1", "--silent", "--fetch-retries=0"]
        packed = subprocess.run(command, cwd=folder, capture_output=True, timeout=20, check=True, text=True)
        with tarfile.open(folder / packed.stdout.strip()) as archive:
            listed = json.load(archive.extractfile("package/api.github.com/index.json"))
        return [(each["name"], payload) for each in listed for payload in each["examples"]]
    return [(case["headers"].get("x-github-event", ""), case["payload"]) for case in CASES.values()]


MENDED = {  # what the examples lack
    "workflow_run": ("workflow_run", {"status": "completed", "conclusion": "failure"}),
    "deployment_status": ("deployment_status", {"state": "failure"}),
    "pull_request": ("pull_request", {"state": "closed", "merged": True}),
    "pull_request_review": ("review", {"state": "changes_requested"}),
}


def test_the_whole_corpus_is_taken(inside, corpus):
    mended = [(e, p | {MENDED[e][0]: p[MENDED[e][0]] | MENDED[e][1]}) for e, p in corpus if e in MENDED]
    assert len(corpus) >= 40 and len(mended) >= 4
    for number, (event, payload) in enumerate(corpus + mended):
        headers = {"x-github-event": event, "x-github-delivery": f"corpus {number}"}
        body, status = inside.take_webhook(payload, headers)
        again = inside.take_webhook(payload, headers)
        assert status in (200, 202) and again == (body, 200), event
        assert len(body) < 5000
    tasks = inside.store.read(lambda q: q.tasks({}))
    assert any(task.get("attention", {}).get("state") == "failed" for task in tasks)
    assert any(pull["state"] == "merged" for task in tasks for pull in task.get("pull_requests", []))


# --- command line and page -------------------------------------------------------------------------------


def test_links_are_made_listed_and_removed_on_the_command_line(hub, task):
    server, number = hub.server, str(task["number"])
    for option, value in (("--branch", "b"), ("--pr", "7"), ("--issue", "8"), ("--commit", "A" * 40)):
        assert on(server, "link", number, option, value, "--repository", hub.name).json["id"] == task["id"]
    assert on(server, "link", number, "--repo", hub.name, "--close-on-merge").status == 0
    assert on(server, "link", number, "--folder", f"x-{hub.name}").status == 0
    listed = on(server, "link", number, "--list").json["items"]
    assert {link["link"] for link in listed} == {"branch", "pr", "issue", "commit", "repo", "folder"}
    assert [link["value"] for link in listed if link.get("close_on_merge")] == [hub.name]
    assert next(link["value"] for link in listed if link["link"] == "folder").startswith("/")
    assert on(server, "unlink", "--branch", "b", "--repository", hub.name).json == {"removed": 1}
    assert on(server, "unlink", "--branch", "b", "--repository", hub.name).status == 3
    assert on(server, "link", "--list").json["total"] >= 5


@pytest.mark.parametrize(
    "words", ["link", "link 1", "link --branch b", "link 1 --branch b --pr 2", "unlink", "link 1 --nothing x"]
)
def test_a_link_that_is_not_said_in_full_is_a_usage_error(server, words):
    ran = on(server, *words.split())
    assert ran.status == 2 and ran.out == "" and len(ran.error.splitlines()) == 1


@pytest.mark.parametrize("value", ["x", "0", "acme/calc", "1e3", "7/8"])
def test_a_pull_request_is_named_by_its_number(server, task, value):
    body = {"link": "pr", "value": value, "task_id": task["id"]}
    assert server.ask("POST", "/api/links", body).status_code == 400


def test_the_tasks_page_binds_and_shows_what_is_bound(hub, task):
    with Browser(hub.server) as browser:
        place = f"/tasks/{task['id']}"
        fields = {"link": "pr", "value": "77", "repository": hub.name, "close_on_merge": "true"}
        assert browser.submit(f"{place}/links", **fields).headers["Location"] == place
        hub.pull(77)
        hub.run(1, "failure", "pull-77")
        page = browser.get(place).text
        assert "CI failed" in page and "PR 77 open" in page and "closes on merge" in page
        browser.submit(f"{place}/links", remove="true", link="pr", value="77", repository=hub.name)
        links = hub.server.get("/api/links", task_id=task["id"])["items"]
        assert [link["link"] for link in links if link["link"] == "pr"] == []
