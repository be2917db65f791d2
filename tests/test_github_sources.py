"""A GitHub webhook becomes an update that a person understands, whatever its payload looks like.

Each file of payloads/github is a case: what GitHub sent (from the MIT-licensed @octokit/webhooks-examples,
cut down and, for what these lack, changed), and what is expected of it.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor import github_draft

CASES = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "payloads" / "github").glob("*.json"))
}
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
CHARACTERS = st.characters(exclude_categories=[])  # lone surrogates too: JSON can hold them
TEXT = st.text(CHARACTERS, max_size=20) | st.sampled_from(
    [
        "\x1b[31mred",
        "\u202eevil",
        "a\n\nb",
        " \t ",
        "refs/tags/v1",
        "0" * 40,
        "<{who}>",
        "x" * 5000,
        "Bot",
        "é" * 300,
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=10,
)
REPOSITORY = {"id": 1, "full_name": "mona/parser", "html_url": "https://github.com/mona/parser"}
SENDER = {"login": "mona", "type": "User"}


def draft_of(event: str, **payload):
    """The draft of an event in mona's repository."""
    return github_draft({"repository": REPOSITORY, "sender": SENDER} | payload, {"x-github-event": event})


def run(conclusion: str | None, **fields):
    """The draft of a finished workflow run."""
    fields = {"name": "CI", "status": "completed", "head_branch": "main", "conclusion": conclusion} | fields
    return draft_of("workflow_run", action="completed", workflow_run=fields)


def places(value, way=()):
    """Every way into a JSON value."""
    yield way
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*way, key))


def replaced(value, way, new):
    """A copy of a JSON value with something else at the end of a way."""
    if not way:
        return new
    value = copy.deepcopy(value)
    inside = value
    for step in way[:-1]:
        inside = inside[step]
    inside[way[-1]] = new
    return value


def assert_storable(draft):
    """What every draft holds, whatever it was made of."""
    assert re.fullmatch(r"github:[\w.-]+/[\w.-]+", draft.source)
    assert 0 < len(draft.message) <= 300
    assert draft.message == draft.message.strip() and not UNSEEN.search(draft.message)
    assert draft.kind in ("ci_run", "ci_job", "deployment", "external_update")
    assert draft.level in ("info", "warn", "error")
    assert all(isinstance(tag, str) and 0 < len(tag) <= 200 for tag in draft.tags)
    assert len(set(draft.tags)) == len(draft.tags) and draft.tags[0] == "github"
    assert json.loads(json.dumps(draft.data, allow_nan=False)) == draft.data
    assert not {None, ""} & {value for value in draft.data.values() if isinstance(value, str | None)}
    assert len(json.dumps(draft.data)) < 60_000
    assert isinstance(draft.keep, bool)


@pytest.mark.parametrize("name", CASES)
def test_an_event_is_told_as_expected(name):
    case = CASES[name]
    draft = github_draft(case["payload"], case["headers"])
    expect = dict(case["expect"])
    assert expect.pop("data", {}).items() <= draft.data.items()
    assert expect.pop("keep", True) is draft.keep
    assert expect.pop("url", None) == draft.data.get("url")
    assert draft._asdict() | expect | {"tags": tuple(expect["tags"])} == draft._asdict()
    assert_storable(draft)


def test_every_case_says_what_it_shows():
    assert [name for name, case in CASES.items() if not case["note"]] == []


@pytest.mark.parametrize("name", CASES)
def test_data_is_a_curated_part_of_the_payload(name):
    data = github_draft(CASES[name]["payload"], CASES[name]["headers"]).data
    assert len(json.dumps(data)) < 1000
    nested = {key for key, value in data.items() if isinstance(value, list | dict)}
    assert nested <= {"failed_steps", "labels", "commits", "events", "inputs"}


@pytest.mark.parametrize(
    ("conclusion", "level", "words"),
    [
        ("success", "info", "passed"),
        ("neutral", "info", "finished (neutral)"),
        ("skipped", "info", "was skipped"),
        ("cancelled", "warn", "was cancelled"),
        ("stale", "warn", "went stale"),
        ("action_required", "warn", "needs action"),
        ("failure", "error", "failed"),
        ("timed_out", "error", "timed out"),
        ("startup_failure", "error", "failed to start"),
        ("brand_new", "info", "finished (brand_new)"),
        (None, "info", "finished"),
    ],
)
def test_the_conclusion_of_a_run_sets_level_and_words(conclusion, level, words):
    draft = run(conclusion)
    assert (draft.level, draft.message) == (level, f"Workflow CI {words} on main")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("queued", "is queued"),
        ("pending", "is pending"),
        ("in_progress", "started"),
        ("waiting", "is waiting"),
    ],
)
def test_a_run_that_has_not_ended_has_no_conclusion(status, words):
    draft = run("success", status=status)
    assert (draft.level, draft.message) == ("info", f"Workflow CI {words} on main")
    assert "conclusion" not in draft.data and "success" not in draft.tags


@pytest.mark.parametrize("event", ["workflow_job", "check_run", "check_suite"])
@pytest.mark.parametrize(
    ("conclusion", "kept"), [("success", False), ("cancelled", False), ("failure", True)]
)
def test_the_parts_of_a_run_are_noise_unless_they_failed(event, conclusion, kept):
    part = {"name": "lint", "app": {"name": "Lint"}, "status": "completed", "conclusion": conclusion}
    assert draft_of(event, action="completed", **{event: part}).keep is kept


@pytest.mark.parametrize(("status", "kept"), [("queued", False), ("in_progress", False), ("completed", True)])
def test_a_run_is_noise_until_it_has_ended(status, kept):
    assert run("success", status=status).keep is kept


@pytest.mark.parametrize(
    ("reason", "level"), [("CI_FAILURE", "warn"), ("MERGE_CONFLICT", "warn"), ("MERGE", "info")]
)
def test_leaving_the_merge_queue_is_a_warning_unless_merged(reason, level):
    pull = {"number": 5, "title": "Add the parser"}
    draft = draft_of("pull_request", action="dequeued", reason=reason, pull_request=pull)
    assert (draft.level, draft.data["reason"]) == (level, reason)


@pytest.mark.parametrize(
    ("action", "severity", "level"),
    [
        ("created", "critical", "error"),
        ("reopened", "high", "error"),
        ("auto_reopened", "medium", "warn"),
        ("created", "low", "info"),
        ("fixed", "critical", "info"),
        ("dismissed", "high", "info"),
    ],
)
def test_an_alert_is_as_bad_as_its_severity_when_it_is_news(action, severity, level):
    alert = {"number": 1, "security_vulnerability": {"severity": severity}}
    assert draft_of("dependabot_alert", action=action, alert=alert).level == level


def test_a_pull_request_of_another_repository_is_not_taken_for_ours():
    theirs, ours = ({"number": number, "base": {"repo": {"id": id}}} for number, id in ((7, 99), (8, 1)))
    assert run("success", pull_requests=[theirs, ours]).data["pr"] == 8
    assert "pr" not in run("success", pull_requests=[theirs]).data


def test_a_run_for_the_merge_queue_belongs_to_its_pull_request():
    draft = run("success", head_branch="gh-readonly-queue/main/pr-104-929f8209d40f")
    assert "pr:104" in draft.tags


def test_a_branch_that_only_looks_like_the_queue_belongs_to_no_pull_request():
    assert "pr" not in run("success", head_branch="feature/pr-104-rework").data


def test_a_commit_or_tag_is_no_branch():
    deployment = {"ref": "3484a3fb816e0859fd6e1cea078d76385ff50625", "environment": "production"}
    draft = draft_of("deployment", action="created", deployment=deployment)
    assert draft.message == "mona started deployment of 3484a3f to production"
    assert "branch" not in draft.data
    assert "branch" not in draft_of("push", ref="refs/tags/v1", created=True, commits=[]).data


def test_the_secret_of_an_alert_is_not_in_the_draft():
    case = CASES["secret_scanning_alert"]
    assert case["payload"]["alert"]["secret"] not in str(github_draft(case["payload"], case["headers"]))


def test_of_dispatched_inputs_only_the_names_are_kept():
    draft = draft_of(
        "workflow_dispatch", workflow="release.yml", ref="refs/heads/main", inputs={"token": "hush"}
    )
    assert draft.message == "mona dispatched release.yml on main"
    assert draft.data["inputs"] == ["token"] and "hush" not in str(draft)


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "data:text/html,x", "ftp://x/y", "https://x y", "//x", 5]
)
def test_only_a_web_address_becomes_a_link(url):
    draft = run("success", html_url=url)
    assert draft.data["url"] == REPOSITORY["html_url"]


def test_what_would_dress_up_a_message_is_taken_out():
    title = "\x1b[31mred\x1b[0m \u202eevil\u202c \nsecond line"
    draft = draft_of("pull_request", action="opened", pull_request={"number": 5, "title": title})
    assert draft.message == "mona opened PR #5: red evil"


def test_a_long_title_is_cut():
    draft = draft_of("pull_request", action="opened", pull_request={"number": 5, "title": "x" * 5000})
    assert draft.message.endswith("…") and len(draft.message) < 200


def test_an_unknown_event_is_told_in_its_own_words():
    draft = draft_of("moon_phase", action="became_full", moon_phase={"name": "Luna"})
    assert draft.message == "mona: moon phase became full (Luna) in mona/parser"
    assert draft.tags == ("github", "moon_phase", "became_full", "repo:mona/parser")


@pytest.mark.parametrize("name", [None, False, 5, "parser", "a/b/c", "mona/par ser", "x" * 5000])
def test_a_repository_without_a_proper_name_is_unknown(name):
    draft = draft_of("push", repository={"full_name": name}, ref="refs/heads/main")
    assert draft.source == "github:unknown/unknown"
    assert "repo" not in draft.data and not any(tag.startswith("repo:") for tag in draft.tags)


@pytest.mark.parametrize("payload", [None, [], "text", 5, {}, {"action": "opened"}])
def test_a_payload_that_says_nothing_is_still_told(payload):
    draft = github_draft(payload, None)
    assert draft.source == "github:unknown/unknown"
    assert draft.message.startswith("GitHub sent an event without a name")


@pytest.mark.parametrize(
    "name", [name for name in CASES if not name.endswith("_alert") and "milestone" not in name]
)
def test_without_a_header_the_shape_of_the_payload_names_the_event(name):
    case = CASES[name]
    assert github_draft(case["payload"], {}).message == case["expect"]["message"]


def test_the_names_of_headers_may_be_in_any_case():
    assert github_draft({}, {"X-GitHub-Event": "push", "X-GITHUB-DELIVERY": "7"}).data["delivery"] == "7"


@settings(max_examples=300, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(CASES)), new=ANYTHING)
def test_any_value_may_stand_in_any_place_of_an_event(data, name, new):
    request = {part: CASES[name][part] for part in ("payload", "headers")}
    way = data.draw(st.sampled_from(list(places(request))[1:]))
    request = replaced(request, way, new)
    assert_storable(github_draft(request["payload"], request["headers"]))


@settings(max_examples=300, deadline=None)
@given(
    payload=ANYTHING,
    headers=ANYTHING,
    event=st.sampled_from(["", *sorted({c["expect"]["tags"][1] for c in CASES.values()})]),
)
def test_any_json_makes_a_draft(payload, headers, event):
    assert_storable(github_draft(payload, headers))
    assert_storable(github_draft(payload, {"x-github-event": event}))
