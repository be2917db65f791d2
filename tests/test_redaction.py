"""What looks like a secret is masked before anything is stored or sent on; what does not is left as it is."""

from __future__ import annotations

import json
import time

import pytest
from conftest import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Browser, bytes_of, serving

import monitor

SOME = "a1B2c3D4e5F6g7H8i9J0"  # secrets are put together: else scanners of repositories would find them
BODY_OF_KEY = "MIIEpAIBAAKCAQEA7bq8\nq1w2e3r4t5y6u7i8o9p0"

# Name: the text before it, the secret, the text behind it.
SECRETS = {
    "an OpenAI key": ("key ", "sk-" + SOME * 2, " was used"),
    "a project key": ("", "sk-proj-" + SOME * 3, ""),
    "an Anthropic key": ("ANTHROPIC_API_KEY=", "sk-ant-api03-" + SOME * 3 + "-AA", " claude"),
    "a Stripe key": ("charge with ", "sk_live_" + SOME, "."),
    "a restricted Stripe key": ("", "rk_test_" + SOME, ""),
    "a Google key": ("https://maps.example/?key=", "AIza" + "Sy" + SOME + "abcdefghijklm", "&q=x"),
    "a Hugging Face token": ("login ", "hf_" + SOME * 2, ""),
    "a GitHub token": ("pushed with ", "ghp_" + SOME * 2, " to main"),
    "a GitHub OAuth token": ("", "gho_" + SOME * 2, ""),
    "a GitHub app token": ("", "ghs_" + SOME * 2, ""),
    "a GitHub refresh token": ("", "ghr_" + SOME * 4, ""),
    "a fine-grained GitHub token": ("(", "github_pat_" + SOME + "_" + SOME * 3, ")"),
    "a token in a remote": ("git clone https://", "ghp_" + SOME * 2, "@github.com/a/b.git"),
    "a GitLab token": ("", "glpat-" + SOME, " is"),
    "an npm token": ("//registry.npmjs.org/:_authToken=", "npm_" + SOME + "a1B2c3D4e5F6g7H8", ""),
    "a PyPI token": ("twine -p ", "pypi-" + "AgEIcHlwaS5vcmc" + SOME * 3, ""),
    "a Slack token": ("", "xoxb-" + "123456789012-" + SOME, ""),
    "a Slack hook": ("https://hooks.slack.com/services/", "T00000000/B00000000/" + SOME, " is where it goes"),
    "an AWS key id": ("id ", "AKIA" + "IOSFODNN7EXAMPLE", " in eu"),
    "a session's AWS key id": ("id ", "ASIA" + "IOSFODNN7EXAMPLE", " in eu"),
    "an AWS secret": ("aws_secret_access_key = ", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "\nregion = eu"),
    "a JSON web token": ("session ", f"eyJ{SOME}.eyJ{SOME}.{SOME}_-{SOME}", " ended"),
    "a private key": (
        "-----BEGIN RSA PRIVATE KEY-----",
        f"\n{BODY_OF_KEY}\n",
        "-----END RSA PRIVATE KEY-----",
    ),
    "a nameless private key": (
        "-----BEGIN PRIVATE KEY-----",
        f"\n{BODY_OF_KEY}\n",
        "-----END PRIVATE KEY-----",
    ),
    "an OpenSSH key": (
        "x\n-----BEGIN OPENSSH PRIVATE KEY-----",
        f"\n{BODY_OF_KEY}\n",
        "-----END OPENSSH PRIVATE KEY-----\ny",
    ),
    "a PGP key": (
        "-----BEGIN PGP PRIVATE KEY BLOCK-----",
        f"\n{BODY_OF_KEY}\n",
        "-----END PGP PRIVATE KEY BLOCK-----",
    ),
    "a key cut short": ("-----BEGIN EC PRIVATE KEY-----", f"\n{BODY_OF_KEY}", ""),
    "a key in one line": (
        "-----BEGIN PRIVATE KEY-----",
        r"\n" + BODY_OF_KEY.replace("\n", r"\n"),
        "-----END PRIVATE KEY-----",
    ),
    "a bearer header": ("curl -H 'Authorization: Bearer ", SOME, "' http://localhost"),
    "a bearer header in small letters": ("authorization: bearer ", SOME + "._~+/=-", " sent"),
    "a basic header": ("Authorization: Basic ", "dXNlcjpwYXNzd29yZA==", "\nAccept: */*"),
    "a password in a URL": ("postgres://admin:", "correct-horse", "@db.example:5432/shop"),
    "a password without a user": ("redis://:", "correct-horse", "@cache.example/0"),
    "a user's token in a URL": ("https://x-access-token:", SOME, "@github.com/a/b.git"),
    "a password that is set": ("export DB_PASSWORD=", "correct-horse", " && run"),
    "a password in quotes": ('password: "', "correct-horse", '", user: "me"'),
    "a password in single quotes": ("{'password': '", "correct-horse", "'}"),
    "a password in JSON": ('{"password":"', "correct-horse", '","user":"me"}'),
    "a password in YAML": ("db:\n  password: ", "correct-horse", "\n  user: me"),
    "a password in a query": ("/login?user=me&password=", "correct-horse", "&next=/"),
    "a password in capitals": ("PASSWORD=", "correct-horse", ""),
    "a passphrase": ("passphrase = ", "correct-horse", ""),
    "a secret": ("CLIENT_SECRET=", SOME, ""),
    "a key of some service": ("DATADOG_API_KEY=", SOME, "\n"),
    "a key in a header": ("x-api-key: ", SOME, ""),
    "an access token": ("access_token=", SOME, "&expires=3600"),
    "an auth token": ('"authToken": "', SOME, '"'),
    "a private key's setting": ("PRIVATE_KEY=", SOME, ""),
}
CASES = [pytest.param(*case, id=name) for name, case in SECRETS.items()]

INNOCENT = [
    "",
    "Fixed the login: tests pass (3 of 3), see src/auth/password.py:12",
    "def check(password): return hash(password)",
    "the password was wrong, the secret stays secret, the key is under the mat",
    "Renamed api_key to key",
    "commit 3f2a9c1d5e8b7a6f4c3d2e1f0a9b8c7d6e5f4a3b on main",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "id 5f0c2a9e-8f59-4c4e-b7a4-2f6a1f0f9d11",
    "https://github.com/a/b/actions/runs/123456789/job/987654321?pr=5#step:4:20",
    "http://127.0.0.1:3000/tasks/1",
    "git@github.com:a/b.git",
    "ssh://git@github.com:22/a/b.git",
    "write to me@example.com: at 10:30@noon",
    "ask-the-risk-takers-of-disk-management-first",
    "task-0123456789-0123456789-0123456789",
    "sk-short",
    "ghp_short",
    "tokens: 123456 used, 200000 left",
    "input_tokens=5120 output_tokens=12",
    "max_tokens: 4096",
    "Bearer of bad news",
    "basic authorization is off",
    "-----BEGIN CERTIFICATE-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOC\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOC\n-----END PUBLIC KEY-----",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ me@host",
    "eyJ is how base64 of JSON begins",
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4",
    "password=",
    "password: no",
    "api_key: str, count: int",
    "naïve café ☃ \u2028 \x1b[31m",
]

# Accepted: a value behind such a name is masked whatever it is. Better a word too many than one secret.
FALSE_ALARMS = {
    "password: required": f"password: {monitor.MASK}",
    "secret=none given": f"secret={monitor.MASK} given",
    "api_key: string, count: int": f"api_key: {monitor.MASK}, count: int",
    "client_secret=os.environ['X']": f"client_secret={monitor.MASK}'X']",
    "http://host:8080@path": f"http://host:{monitor.MASK}@path",
    "Bearer authentication-is-needed": f"Bearer {monitor.MASK}",
}


@pytest.mark.parametrize(("before", "secret", "behind"), CASES)
def test_a_secret_is_masked_and_what_stands_around_it_is_kept(before, secret, behind):
    masked = monitor.redact_text(before + secret + behind)
    assert secret.strip() not in masked
    assert SOME not in masked
    assert monitor.MASK in masked
    assert masked.endswith(behind)
    assert masked.startswith(before[:3])


@pytest.mark.parametrize("text", INNOCENT)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert monitor.redact_text(text) == text


@pytest.mark.parametrize(("text", "masked"), FALSE_ALARMS.items())
def test_these_false_alarms_are_accepted(text, masked):
    assert monitor.redact_text(text) == masked


def test_several_secrets_in_one_text_are_all_masked():
    text = "\n".join(before + secret + behind for before, secret, behind in SECRETS.values())
    masked = monitor.redact_text(text.replace("-----BEGIN EC PRIVATE KEY-----", ""))
    for _, secret, _ in SECRETS.values():
        assert secret.strip() not in masked.replace(BODY_OF_KEY, "")


# --- names -----------------------------------------------------------------------------------------------

SECRET_NAMES = [
    *("password", "PASSWORD", "Password", "db_password", "DB-PASSWORD", "passwd", "passphrase", "secret"),
    *("client_secret", "clientSecret", "CLIENT_SECRET", "secret_key", "secretKey", "SECRET_KEY", "apiKey"),
    *("api_key", "API_KEY", "x-api-key", "OPENAI_API_KEY", "access_key", "aws_secret_access_key"),
    *("private_key", "privateKey", "access_token", "accessToken", "auth_token", "authToken"),
    *("Authorization", "authorization", "Proxy-Authorization"),
]
CAMEL_NAMES = ["dbPassword", "openaiApiKey", "awsSecretAccessKey", "stripeClientSecret", "userAccessToken"]
TOKEN_NAMES = ["refresh_token", "session_token", "id_token", "bot_token", "github_token", "GITHUB_TOKEN"]
OTHER_NAMES = [
    "name",
    "user",
    "tokens",
    "max_tokens",
    "keyboard",
    "monkey",
    "passed",
    "secretary",
    "password_hint",
]
OTHER_NAMES += ["key", "primary_key", "file_path", "secrets_found", "tokenizer", "author"]


@pytest.mark.parametrize("name", SECRET_NAMES + CAMEL_NAMES + TOKEN_NAMES)
def test_what_stands_under_the_name_of_a_secret_is_masked_whole(name):
    assert monitor.redact({name: "correct horse battery staple"}) == {name: monitor.MASK}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_stands_under_any_other_name_is_kept(name):
    assert monitor.redact({name: "correct horse"}) == {name: "correct horse"}


@pytest.mark.parametrize("value", [None, True, False, 0, 42, 1.5, "", [], {}])
def test_what_is_no_text_is_kept_even_there(value):
    assert monitor.redact({"password": value}) == {"password": value}


def test_secrets_are_found_at_any_depth_in_lists_objects_and_keys():
    secret = "ghp_" + SOME * 2
    value = secret
    for _ in range(30):
        value = [{"a": value, secret: 1}, secret]
    masked = monitor.redact({"payload": value})
    assert SOME not in json.dumps(masked)
    assert json.dumps(masked).count(monitor.MASK) == 61


def test_two_keys_that_are_secrets_keep_both_their_values():
    masked = monitor.redact({"ghp_" + SOME * 2: "one", "glpat-" + SOME: "two"})
    assert sorted(masked.values()) == ["one", "two"]
    assert SOME not in json.dumps(masked)


# --- any value -------------------------------------------------------------------------------------------

PIECES = [*(secret for case in SECRETS.values() for secret in case), *INNOCENT, *FALSE_ALARMS, monitor.MASK]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=4).map("".join)
NAMES = st.sampled_from(SECRET_NAMES + OTHER_NAMES) | TEXTS
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(NAMES, children, max_size=3),
    max_leaves=8,
)


def shape(value):
    """A value without its texts."""
    if isinstance(value, dict):
        return [shape(child) for child in value.values()]
    if isinstance(value, list):
        return ["list", *(shape(child) for child in value)]
    return type(value)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_masking_never_fails_and_changes_nothing_but_texts(value):
    assert shape(monitor.redact(value)) == shape(value)


@given(VALUES)
@settings(max_examples=150, deadline=None)
def test_what_was_masked_once_is_not_masked_again(value):
    once = monitor.redact(value)
    assert monitor.redact(once) == once


def test_a_secret_that_begins_where_another_ends_is_masked_too():
    glued = f"AIza{SOME * 2}"[:39] + f"sk-{SOME * 2}"
    assert monitor.redact_text(glued) == monitor.MASK * 2


PRESSED = [
    "a.",
    "a+",
    "a:",
    "sk",
    "sk-",
    "eyJ",
    "eyJ-",
    "eyJa.eyJ",
    "gh",
    "bearer ",
    "password ",
    "secret_",
    "x-",
]
PRESSED += [
    "password=",
    "password\t",
    "api_key'",
    "://",
    "a://",
    "a://b:",
    "authorization: basic ",
    "xox",
    "A",
]
PRESSED += [
    "-----BEGIN PRIVATE KEY",
    "-----BEGIN PRIVATE KEY-----",
    "-----BEGIN ",
    "hooks.slack.com/services/",
]
MARKS = (
    " :// eyj bearer basic password secret sk- k_ aiza hf_ gh github_pat_ glpat- npm_ pypi- xox private key"
)


@pytest.mark.parametrize("piece", PRESSED)
def test_no_text_can_keep_it_busy(piece):
    text = piece * (monitor.FIELDS["message"].schema["maxLength"] // len(piece)) + MARKS
    begun = time.process_time()
    monitor.redact_text(text)
    assert time.process_time() - begun < 0.3


# --- end to end ------------------------------------------------------------------------------------------

HIDDEN = "ghp_" + SOME * 2
SENTENCE = f"it is {HIDDEN} for all"
WAYS_IN = {
    "a workstream": (
        "POST",
        "/api/workstreams",
        {"name": SENTENCE, "metadata": {"deep": [{"er": SENTENCE}]}},
    ),
    "a change of one": ("PATCH", "/api/workstreams/WORKSTREAM", {"name": SENTENCE, "metadata": [SENTENCE]}),
    "a task": ("POST", "/api/tasks", {"workstream_id": "WORKSTREAM", "name": SENTENCE, "metadata": SENTENCE}),
    "a summary": ("PATCH", "/api/tasks/TASK", {"summary_text": SENTENCE, "summary_source": SENTENCE}),
    "a task's name": ("PATCH", "/api/tasks/TASK", {"name": SENTENCE, "metadata": {HIDDEN: 1}}),
    "a person's update": (
        "POST",
        "/api/updates/manual",
        {"task_id": "TASK", "message": SENTENCE, "kind": SENTENCE, "tags": [HIDDEN], "data": [[SENTENCE]]},
    ),
    "a whole update": (
        "POST",
        "/api/updates",
        {"task_id": "TASK", "source": SENTENCE, "message": SENTENCE, "data": {HIDDEN: {"password": HIDDEN}}},
    ),
    "an agent's hook": (
        "POST",
        "/api/updates/claude-hook",
        {
            "task_id": "TASK",
            "payload": {
                "hook_event_name": "PostToolUse",
                "session_id": "s1",
                "tool_name": "Bash",
                "tool_input": {"command": f"git push https://me:{HIDDEN}@github.com/a/b"},
                "tool_response": {"stdout": SENTENCE},
            },
        },
    ),
    "a webhook": (
        "POST",
        "/api/updates/github-webhook",
        {
            "task_id": "TASK",
            "headers": {"x-github-event": "push"},
            "payload": {
                "ref": "refs/heads/main",
                "commits": [{"id": "1" * 40, "message": SENTENCE}],
                "head_commit": {"id": "1" * 40, "message": SENTENCE},
                "repository": {"full_name": "a/b"},
            },
        },
    ),
}


def filled(value, task: dict):
    """A path or body with real ids in it."""
    text = json.dumps(value).replace("WORKSTREAM", task["workstream_id"]).replace("TASK", task["id"])
    return json.loads(text)


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A server of this module's own, so that its files can be searched."""
    with serving(Server, tmp_path_factory.mktemp("private") / "monitor.db") as server:
        yield server


@pytest.mark.parametrize("way", WAYS_IN)
def test_a_secret_is_not_kept_by_any_way_in(private, way):
    method, path, body = WAYS_IN[way]
    task = private.new_task()
    with private.follow() as follower:
        response = private.ask(method, filled(path, task), filled(body, task))
        assert response.status_code in (200, 201), response.text
        assert SOME not in response.text
        assert monitor.MASK in response.text
        assert SOME not in json.dumps(follower.take(2))
    assert SOME not in private.ask("GET", "/api/stream?poll=1&after_seq=0").text
    assert SOME.encode() not in bytes_of(private.database.parent)


def test_a_secret_in_a_form_is_not_kept(private):
    task = private.new_task()
    with Browser(private) as browser:
        posted = [
            browser.submit("/workstreams", name=SENTENCE),
            browser.submit(f"/tasks/{task['id']}", summary_text=SENTENCE),
            browser.submit(f"/tasks/{task['id']}/updates", message=SENTENCE, tags=HIDDEN),
        ]
        assert [response.status_code for response in posted] == [303] * 3
        pages = browser.get("/dashboard").text + browser.get(f"/tasks/{task['id']}").text
    assert SOME not in pages
    assert monitor.MASK in pages
    assert SOME.encode() not in bytes_of(private.database.parent)


def test_tags_that_become_one_mask_are_one_tag(private):
    update = private.say(private.new_task(), "tagged", tags=["ghp_" + SOME * 2, "glpat-" + SOME, "kept"])
    assert update["tags"] == [monitor.MASK, "kept"]
    assert private.get("/api/updates", tag=monitor.MASK)["items"][-1] == update


def test_the_same_secret_sent_twice_with_a_key_is_stored_once(private):
    body = {"task_id": private.new_task()["id"], "message": SENTENCE}
    answers = [
        private.ask("POST", "/api/updates/manual", body, headers={"Idempotency-Key": "once"})
        for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [201, 200]
    assert answers[0].json() == answers[1].json()


def test_masking_can_be_switched_off(fresh):
    server = fresh(MONITOR_REDACT="off")
    update = server.say(server.new_task(SENTENCE), SENTENCE, data={"password": "horse"})
    assert update["message"] == SENTENCE
    assert update["data"] == {"password": "horse"}
    assert server.get("/api/tasks")["items"][0]["name"] == SENTENCE
