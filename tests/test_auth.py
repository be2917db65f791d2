"""Who may ask: tokens, and browsers that ask for another web site."""

from __future__ import annotations

import subprocess

import pytest
from conftest import Server, clean_environment
from wire import exchange, nothing_stored, refused, request_bytes, words

import monitor

TOKEN, OTHER, ACCENTED = "right-token", "other.token~2", "sécret"
TOKENS = f" {TOKEN} ,, {OTHER},{ACCENTED}, "
READS = words("/api/workstreams /api/tasks /api/updates /api/updates?q=word /api/stream?poll=1 /dashboard")
WRITES = [
    ("POST", "/api/workstreams"),
    ("PATCH", "/api/workstreams/abcd"),
    ("POST", "/api/tasks"),
    ("PATCH", "/api/tasks/1"),
    ("POST", "/api/updates"),
    ("POST", "/api/updates/manual"),
    ("POST", "/api/updates/claude-hook"),
    ("POST", "/api/updates/github-webhook"),
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Servers by mode and tokens, each started when first asked for."""
    started: dict[tuple[str, str], Server] = {}

    def running(mode: str, tokens: str) -> Server:
        if (mode, tokens) not in started:
            database = tmp_path_factory.mktemp("guarded") / "monitor.db"
            settings = {"MONITOR_AUTH_MODE": mode, "MONITOR_API_TOKENS": tokens}
            started[mode, tokens] = Server(database, **settings)
        return started[mode, tokens]

    yield running
    for server in started.values():
        assert server.stop() == 0
        assert "Traceback" not in server.output


def bearer(token: str) -> dict[str, str]:
    """The header that carries a token."""
    return {"Authorization": f"Bearer {token}"}


# ------------------------------------------------------------------------------------------------------
# tokens
# ------------------------------------------------------------------------------------------------------

TABLE = [  # mode, tokens; read and write without a token, read and write with one
    ("relaxed", "", [200, 201, 200, 201]),
    ("relaxed", TOKENS, [200, 401, 200, 201]),
    ("strict", TOKENS, [401, 401, 200, 201]),
    ("strict", "", [500, 500, 500, 500]),
]


@pytest.mark.parametrize(("mode", "tokens", "expected"), TABLE)
def test_mode_and_tokens_decide_who_may_read_and_write(guarded, mode, tokens, expected):
    server = guarded(mode, tokens)
    answers = [
        server.ask(method, "/api/workstreams", body, headers=headers).status_code
        for headers in ({}, bearer(TOKEN))
        for method, body in (("GET", None), ("POST", {"name": "a workstream"}))
    ]
    assert answers == expected


@pytest.mark.parametrize("path", READS)
def test_strict_mode_reads_nothing_without_a_token(guarded, path):
    server = guarded("strict", TOKENS)
    refused(server.ask("GET", path), 401, "unauthorized")
    assert server.ask("GET", path, headers=bearer(TOKEN)).status_code == 200


@pytest.mark.parametrize("path", READS)
def test_relaxed_mode_reads_whatever_token_is_sent(guarded, path):
    server = guarded("relaxed", TOKENS)
    for headers in ({}, bearer(TOKEN), bearer("wrong")):
        assert server.ask("GET", path, headers=headers).status_code == 200


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_with_tokens_set_nothing_is_written_without_one(guarded, mode, method, path):
    server = guarded(mode, TOKENS)
    refused(server.ask(method, path, {"name": "a workstream"}), 401, "unauthorized")


@pytest.mark.parametrize(("method", "path"), [("GET", path) for path in READS] + WRITES)
def test_strict_mode_without_tokens_says_that_it_is_misconfigured(guarded, method, path):
    refused(
        guarded("strict", "").ask(method, path, {} if method != "GET" else None), 500, "server_misconfigured"
    )


@pytest.mark.parametrize(("mode", "tokens"), [row[:2] for row in TABLE])
def test_health_is_open_to_all(guarded, mode, tokens):
    server = guarded(mode, tokens)
    for headers in ({}, bearer("wrong"), {"Authorization": "nonsense"}):
        response = server.ask("GET", "/health", headers=headers)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "header", [f"Bearer {TOKEN}", f"Bearer {OTHER}", f"bearer {TOKEN}", f"BEARER {TOKEN}"]
)
@pytest.mark.parametrize("mode", ["relaxed", "strict"])
def test_any_of_the_tokens_opens(guarded, mode, header):
    server = guarded(mode, TOKENS)
    response = server.ask("POST", "/api/workstreams", {"name": "mine"}, headers={"Authorization": header})
    assert response.status_code == 201


NO_TOKENS = {
    "nothing": "",
    "a bare token": TOKEN,
    "a bare scheme": "Bearer",
    "an empty token": "Bearer ",
    "a wrong token": "Bearer wrong",
    "half a token": f"Bearer {TOKEN[:-1]}",
    "a token and more": f"Bearer {TOKEN}x",
    "two tokens": f"Bearer {TOKEN} {OTHER}",
    "the whole setting": f"Bearer {TOKEN} ,, {OTHER}",
    "a comma": "Bearer ,",
    "another case": f"Bearer {TOKEN.upper()}",
    "quotes": f'Bearer "{TOKEN}"',
    "a colon": f"Bearer: {TOKEN}",
    "no blank": f"Bearer{TOKEN}",
    "another scheme": f"Token {TOKEN}",
    "Basic": "Basic cmlnaHQtdG9rZW46",
    "Latin-1": "Bearer \xe9\xff",
    "UTF-8": "Bearer " + "é☃".encode().decode("latin-1"),
    "control characters": f"Bearer {TOKEN}\x01\x7f",
    "a long one": "Bearer " + "x" * 5000,
}


@pytest.mark.parametrize("header", NO_TOKENS.values(), ids=NO_TOKENS.keys())
def test_what_is_no_valid_token_opens_nothing(guarded, header):
    for mode, method in (("relaxed", "POST"), ("strict", "POST"), ("strict", "GET")):
        server = guarded(mode, TOKENS)
        body = b'{"name": "mine"}' if method == "POST" else b""
        raw = request_bytes(server, method, "/api/workstreams", body, Authorization=header)
        answer = exchange(server, raw)
        refused(answer, 401, "unauthorized")
        assert TOKEN not in answer.text


def test_of_two_authorization_headers_none_opens_unless_it_is_valid(guarded):
    server = guarded("relaxed", TOKENS)
    headers = {"Authorization": "Bearer wrong\r\nAuthorization: Bearer wronger"}
    answer = exchange(
        server, request_bytes(server, "POST", "/api/workstreams", b'{"name": "mine"}', **headers)
    )
    assert 400 <= answer.status < 500


def test_a_token_in_the_query_opens_nothing(guarded):
    server = guarded("strict", TOKENS)
    for name in ("token", "access_token", "api_token", "authorization"):
        refused(server.ask("GET", f"/api/tasks?{name}={TOKEN}"), 401, "unauthorized")


def test_a_token_beyond_ascii_is_compared_as_its_bytes(guarded):
    server = guarded("strict", TOKENS)
    in_utf8, in_latin1 = ACCENTED.encode().decode("latin-1"), ACCENTED
    for token, status in ((in_utf8, 200), (in_latin1, 401), ("secret", 401)):
        raw = request_bytes(server, "GET", "/api/tasks", Authorization=f"Bearer {token}")
        assert exchange(server, raw).status == status


def test_the_token_is_asked_for_before_the_body_is_looked_at(guarded):
    server = guarded("relaxed", TOKENS)
    raw = request_bytes(server, "POST", "/api/workstreams", b"{", Content_Type="text/plain")
    refused(exchange(server, raw), 401, "unauthorized")


def test_a_server_with_an_unknown_mode_does_not_start(tmp_path):
    command = [*Server.command, "serve", "--bind", "127.0.0.1:0", "--db", str(tmp_path / "monitor.db")]
    environment = clean_environment(MONITOR_AUTH_MODE="stirct")
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    assert ended.returncode != 0
    assert "stirct" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------
# hosts
# ------------------------------------------------------------------------------------------------------

OUR_HOSTS = words(
    "localhost LOCALHOST:3000 Localhost localhost:1 127.0.0.1 127.0.0.1:8080 [::1] [::1]:3000 [::1]:65535"
)
FOREIGN_HOSTS = words(
    """
    evil.example evil.example:3000 127.0.0.1.evil.example localhost.evil.example evil.example#localhost
    evil.example/localhost localhost@evil.example localhost,evil.example evil.example:127.0.0.1 evil-localhost
    0.0.0.0 0.0.0.0:3000 [::] [::]:3000 127.0.0.2 127.1 2130706433 0x7f.0.0.1 [::ffff:127.0.0.1]
    ::1 [::1 ::1] :3000 localhost:port localhost: localhost:3000:3000 localhost:-1 \xff l\xf6calhost \x01 *
    """
)
FOREIGN_HOSTS += ["", "localhost evil.example"]
ROUTES = ["/health", "/api/tasks", "/api/stream?poll=1", "/dashboard", "/", "/api/nope", "/nope"]


@pytest.mark.parametrize("host", OUR_HOSTS)
def test_a_host_of_this_machine_is_answered_whatever_its_port_and_case(server, host):
    assert exchange(server, request_bytes(server, "GET", "/api/tasks", Host=host)).status == 200


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_a_foreign_host_is_refused(server, host):
    refused(exchange(server, request_bytes(server, "GET", "/api/tasks", Host=host)), 403, "forbidden")


@pytest.mark.parametrize(
    ("bind", "host", "allowed"),
    [
        ("box.local:3000", "Box.Local:3000", True),
        ("192.168.0.7:3000", "192.168.0.7", True),
        ("192.168.0.7:3000", "192.168.0.8", False),
        ("0.0.0.0:3000", "localhost:3000", True),
        ("0.0.0.0:3000", "0.0.0.0:3000", False),
        ("[::]:3000", "[::]:3000", False),
        ("[::]:3000", "rebound.example", False),
    ],
)
def test_the_address_it_is_bound_to_is_ours_unless_it_stands_for_all(bind, host, allowed):
    config = monitor.Config.load({"MONITOR_BIND": bind})
    assert monitor.host_allowed(host, config) is allowed


@pytest.mark.parametrize("path", ROUTES)
def test_a_foreign_host_is_refused_on_every_route(server, path):
    answer = exchange(server, request_bytes(server, "GET", path, Host="rebound.example:3000"))
    refused(answer, 403, "forbidden")


def test_a_foreign_host_writes_nothing(server):
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/api/workstreams", b'{"name": "x"}', Host="rebound.example")
        refused(exchange(server, raw), 403, "forbidden")


def test_a_valid_token_does_not_make_a_host_ours(guarded):
    server = guarded("strict", TOKENS)
    raw = request_bytes(server, "GET", "/api/tasks", Host="rebound.example", **bearer(TOKEN))
    refused(exchange(server, raw), 403, "forbidden")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_request_without_a_host_is_refused(server, version):
    answer = exchange(server, f"GET /api/tasks HTTP/{version}\r\n\r\n".encode())
    assert answer.status in (400, 403)
    assert b"items" not in answer.content


def test_of_two_hosts_none_counts(server):
    for hosts in ("localhost\r\nHost: evil.example", "evil.example\r\nHost: localhost"):
        answer = exchange(server, request_bytes(server, "GET", "/api/tasks", Host=hosts))
        assert answer.status in (400, 403)
        assert b"items" not in answer.content


# ------------------------------------------------------------------------------------------------------
# other web sites
# ------------------------------------------------------------------------------------------------------

HERE = "http://127.0.0.1:PORT"
FOREIGN_PAGES = [
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Sec_Fetch_Site": "cross-site", "Origin": HERE},
    {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
    {"Sec_Fetch_Site": "nonsense"},
    {"Origin": "http://evil.example"},
    {"Origin": "https://evil.example:3000"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": HERE + ".evil.example"},
    {"Origin": "http://evil.example#" + HERE},
    {"Origin": "file://"},
    {"Origin": "chrome-extension://abcdef"},
    {"Origin": "\xff\xfe"},
    {"Origin": "127.0.0.1:PORT"},
]
OUR_PAGES = [
    {},
    {"Origin": HERE},
    {"Sec_Fetch_Site": "same-origin"},
    {"Sec_Fetch_Site": "same-origin", "Origin": HERE},
    {"Sec_Fetch_Site": "none"},
    {"Origin": "http://LOCALHOST:PORT", "Host": "localhost:PORT"},
    {"Origin": "http://[::1]:PORT", "Host": "[::1]:PORT"},
]
PAGE_WRITES = [
    ("POST", "/workstreams"),
    ("POST", "/tasks"),
    ("POST", "/tasks/1"),
    ("POST", "/tasks/1/updates"),
]


def placed(server, headers: dict[str, str]) -> dict[str, str]:
    """Headers with the server's real port."""
    return {name: text.replace("PORT", str(server.port)) for name, text in headers.items()}


@pytest.mark.parametrize("headers", FOREIGN_PAGES, ids=str)
def test_a_page_of_another_site_writes_nothing(server, headers):
    raw = request_bytes(server, "POST", "/api/workstreams", b'{"name": "x"}', **placed(server, headers))
    with nothing_stored(server):
        refused(exchange(server, raw), 403, "forbidden")


@pytest.mark.parametrize("headers", OUR_PAGES, ids=str)
def test_our_pages_and_clients_that_are_no_browsers_write(server, headers):
    raw = request_bytes(server, "POST", "/api/workstreams", b'{"name": "x"}', **placed(server, headers))
    assert exchange(server, raw).status == 201


@pytest.mark.parametrize(("method", "path"), WRITES + PAGE_WRITES)
@pytest.mark.parametrize("name", ["Sec_Fetch_Site", "Origin"])
def test_every_way_to_write_is_closed_to_another_site(server, method, path, name):
    foreign = {"Sec_Fetch_Site": "cross-site", "Origin": "http://evil.example"}[name]
    raw = request_bytes(server, method, path, b"{}", **{name: foreign})
    refused(exchange(server, raw), 403, "forbidden")


def test_a_form_that_another_site_posts_is_refused(server):
    headers = {"Origin": "http://evil.example", "Content_Type": "application/x-www-form-urlencoded"}
    with nothing_stored(server):
        raw = request_bytes(server, "POST", "/workstreams", b"name=x", **headers)
        refused(exchange(server, raw), 403, "forbidden")


ASKED_BY_BROWSERS = [
    ("OPTIONS", "/api/tasks", {"Access_Control_Request_Method": "POST"}),
    ("OPTIONS", "/api/stream", {"Access_Control_Request_Method": "GET"}),
    ("GET", "/api/tasks", {}),
    ("GET", "/api/stream?poll=1", {}),
    ("GET", "/health", {}),
    ("GET", "/dashboard", {}),
    ("GET", "/api/nope", {}),
    ("POST", "/api/tasks", {}),
]


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:PORT", "null"])
@pytest.mark.parametrize(("method", "path", "headers"), ASKED_BY_BROWSERS)
def test_no_answer_allows_another_site_to_read_it(server, method, path, headers, origin):
    headers = placed(server, headers | {"Origin": origin})
    answer = exchange(server, request_bytes(server, method, path, **headers))
    assert not [name for name in answer.headers if name.lower().startswith("access-control-")]
