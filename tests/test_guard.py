"""Who may ask, from a browser: login and sessions, what strict mode hides, headers, hosts, the warning."""

from __future__ import annotations

import re
import sqlite3
import time

import pytest
import requests
from conftest import Server
from rig import Browser, serving
from wire import exchange, nothing_stored, refused, request_bytes, words

import monitor

TOKEN, OTHER = "first-token", "second.token~2"
TOKENS = f"{TOKEN},{OTHER}"


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server in strict mode with two tokens."""
    database = tmp_path_factory.mktemp("strict") / "monitor.db"
    with serving(Server, database, MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS=TOKENS) as server:
        server.session.headers["Authorization"] = f"Bearer {TOKEN}"
        yield server


@pytest.fixture(scope="module")
def relaxed(tmp_path_factory):
    """A server whose reads are open, with tokens, one more host name, and open to other machines."""
    database, options = tmp_path_factory.mktemp("relaxed") / "monitor.db", ("--bind", "0.0.0.0:0")
    given = {"MONITOR_API_TOKENS": TOKENS, "MONITOR_ALLOWED_HOSTS": " Monitor.Example , box.local,,"}
    with serving(Server, database, *options, **given) as server:
        server.url = f"http://127.0.0.1:{server.port}"
        server.session.headers["Authorization"] = f"Bearer {TOKEN}"
        yield server


@pytest.fixture
def browser(strict):
    """A browser of somebody who has not logged in."""
    with Browser(strict) as opened:
        yield opened


@pytest.fixture
def welcome(browser):
    """A browser of somebody who has."""
    assert browser.submit("/login", token=TOKEN).status_code == 303
    return browser


def cookie_of(browser: Browser):
    """The session cookie that a browser holds."""
    (cookie,) = browser.session.cookies
    return cookie


def with_cookie(server: Server, value: str) -> dict[str, str]:
    """The header of a browser that holds a session cookie with this value."""
    return {"Cookie": f"monitor_session_{server.port}={value}"}


def opens(server: Server, value: str) -> bool:
    """Whether a cookie opens a strict server."""
    answer = requests.get(
        f"{server.url}/api/tasks", headers=with_cookie(server, value), timeout=10, allow_redirects=False
    )
    assert answer.status_code in (200, 401)
    return answer.status_code == 200


# --- what strict mode hides ------------------------------------------------------------------------------

OPEN_ROUTES = ("/health", "/login", "/static/<name>")
ROUTES = [
    (method, re.sub("<(?:[a-z]+:)?[a-z]+>", "1", rule))
    for method, rule, *_ in monitor.ROUTES
    if rule not in OPEN_ROUTES
]
PATHS = "/health?full=1 /nope /api/nope /login/ /static /HEALTH /%6cogin/x /api/tasks?x=/login /stream;/login"
ROUTES += [("GET", path) for path in words(PATHS)]
ROUTES += [
    ("OPTIONS", "/dashboard"),
    ("OPTIONS", "/api/tasks"),
    ("DELETE", "/api/tasks/1"),
    ("PUT", "/health/"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_strict_mode_answers_nothing_to_a_stranger(strict, method, path):
    raw = request_bytes(strict, method, path, b"{}" if method != "GET" else b"")
    refused(exchange(strict, raw), 401, "unauthorized")


@pytest.mark.parametrize("path", ["/health", "/login", "/login?next=/tasks/1", "/static/style.css"])
def test_health_login_and_static_files_are_open(browser, path):
    assert browser.get(path).status_code == 200


def test_a_page_that_is_not_open_leads_to_the_login_and_back(browser):
    response = browser.get("/tasks/1?before_seq=5")
    assert response.status_code == 303
    assert response.headers["Location"] == "/login?next=%2Ftasks%2F1%3Fbefore_seq%3D5"
    form = browser.get(response.headers["Location"]).text
    assert 'name="next" value="/tasks/1?before_seq=5"' in form
    assert browser.submit("/login", token=TOKEN, next="/tasks/1?before_seq=5").headers["Location"] == (
        "/tasks/1?before_seq=5"
    )


def test_a_form_that_is_not_open_is_refused_not_redirected(strict, browser):
    strict_head = strict.get("/health", full="1")["seq"]
    assert browser.submit("/workstreams", name="mine").status_code == 401
    assert strict.get("/health", full="1")["seq"] == strict_head


@pytest.mark.parametrize(
    "path", ["/api/admin/backup", "/api/admin/check", "//api/admin/check", "/api/admin/x"]
)
def test_what_is_for_administrators_needs_a_token_where_reads_are_open(relaxed, path):
    assert exchange(relaxed, request_bytes(relaxed, "GET", "/api/tasks")).status == 200
    assert exchange(relaxed, request_bytes(relaxed, "GET", "/dashboard")).status == 200
    answer = exchange(relaxed, request_bytes(relaxed, "GET", path))
    assert answer.status in (308, 401)
    if answer.status == 308:
        assert answer.headers["Location"].endswith("/api/admin/check")


# --- login -----------------------------------------------------------------------------------------------


def test_a_login_opens_pages_stream_and_forms(strict, welcome):
    assert welcome.get("/dashboard").status_code == 200
    assert welcome.get("/api/tasks").json()["total"] >= 0
    assert welcome.submit("/workstreams", name="by a form").status_code == 303
    assert "by a form" in welcome.get("/dashboard").text
    with strict.follow("?poll=1", Cookie=f"{cookie_of(welcome).name}={cookie_of(welcome).value}") as follower:
        assert follower.response.status_code == 200
        assert len(follower.take(1, "hello")) == 1


def test_each_token_logs_in(browser):
    for token in (TOKEN, OTHER, f" {OTHER} "):
        assert browser.submit("/login", token=token).status_code == 303


def test_the_cookie_is_kept_from_scripts_and_other_sites_and_names_the_port(strict, browser):
    header = browser.submit("/login", token=TOKEN).headers["Set-Cookie"]
    name, *attributes = re.split("[;=] ?", header.lower())
    assert str(strict.port) in name
    assert {"httponly", "strict", "samesite", "path", "/"} <= set(attributes)
    assert "domain" not in attributes
    assert TOKEN not in header


def test_two_logins_have_different_cookies(strict):
    values = []
    for _ in range(2):
        with Browser(strict) as browser:
            browser.submit("/login", token=TOKEN)
            values.append(cookie_of(browser).value)
    assert values[0] != values[1]
    assert all(opens(strict, value) for value in values)


def test_servers_on_one_host_do_not_take_each_others_sessions(strict, relaxed, welcome):
    value = cookie_of(welcome).value
    answer = requests.post(
        f"{relaxed.url}/api/workstreams", json={"name": "x"}, headers=with_cookie(relaxed, value), timeout=10
    )
    assert answer.status_code == 401
    other = requests.get(
        f"{strict.url}/api/tasks", headers={"Cookie": f"monitor_session_{relaxed.port}={value}"}, timeout=10
    )
    assert other.status_code == 401


@pytest.mark.parametrize("token", ["wrong", TOKEN[:-1], TOKENS, f"Bearer {TOKEN}", "é☃"])
def test_a_wrong_token_gets_the_form_again_and_no_cookie(browser, token):
    response = browser.submit("/login", token=token, next="/tasks/1")
    assert response.status_code == 401
    assert not browser.session.cookies
    assert '<input type="hidden" name="next" value="/tasks/1">' in response.text
    assert token not in response.text


def test_a_token_is_taken_from_the_form_alone(strict, browser):
    assert browser.get(f"/login?token={TOKEN}").status_code == 200
    assert browser.ask("POST", f"/login?token={TOKEN}", data={"next": "/"}).status_code == 401
    raw = request_bytes(strict, "POST", "/login", b'{"token": "%b"}' % TOKEN.encode())
    assert exchange(strict, raw).status == 415
    assert not browser.session.cookies


def test_after_ten_wrong_tries_a_minute_no_token_is_looked_at(tmp_path):
    given = {"MONITOR_DB": str(tmp_path / "monitor.db"), "MONITOR_API_TOKENS": TOKEN}
    app = monitor.create_app(monitor.Config.load(given))
    served, client = app.extensions["monitor"], app.test_client()
    try:
        tries = [client.post("/login", data={"token": f"wrong {number}"}).status_code for number in range(12)]
        assert tries == [401] * 10 + [429] * 2
        closed = client.post("/login", data={"token": TOKEN})
        refused_json = closed.get_json()
        assert (closed.status_code, refused_json["error"]) == (429, "too_many_requests")
        assert len(refused_json["message"]) > 10
        served.wrong_tries = type(served.wrong_tries)(moment - 61 for moment in served.wrong_tries)
        assert client.post("/login", data={"token": TOKEN}).status_code == 303
    finally:
        served.close()


def test_without_tokens_there_is_nothing_to_log_in_to(server):
    with Browser(server) as browser:
        assert "no tokens" in browser.get("/login").text
        assert browser.submit("/login", token="").status_code == 401
        assert not browser.session.cookies


EVIL = ["//evil.example", "///evil.example", "https://evil.example/", "http:evil.example", "evil.example"]
EVIL += ["/\\evil.example", "\\\\evil.example", "/\t/evil.example", " //evil.example", "/\n/evil.example"]
EVIL += ["javascript:alert(1)", "data:text/html,x", "/a\r\nSet-Cookie: x=y", "/\x00", "/é", "", "?x", "@evil"]
GOOD = words("/dashboard /tasks/1 /stream?q=a%20b&before_seq=3 /tasks/1#u5 / /a//b /?next=//evil")


@pytest.mark.parametrize("target", EVIL)
def test_a_login_never_leads_off_site(strict, browser, target):
    response = browser.submit("/login", token=TOKEN, next=target)
    assert (response.status_code, response.headers["Location"]) == (303, "/dashboard")
    form = browser.get("/login", params={"next": target}).text
    assert 'name="next" value="/dashboard"' in form


@pytest.mark.parametrize("target", GOOD)
def test_a_login_leads_to_where_one_wanted_to_go(browser, target):
    assert browser.submit("/login", token=TOKEN, next=target).headers["Location"] == target


# --- the life of a session -------------------------------------------------------------------------------


def test_a_logout_ends_the_session_and_its_copies_but_no_other(strict, welcome):
    copied = cookie_of(welcome).value
    with Browser(strict) as other:
        other.submit("/login", token=TOKEN)
        response = welcome.submit("/logout")
        assert (response.status_code, response.headers["Location"]) == (303, "/login")
        assert not welcome.session.cookies
        assert not opens(strict, copied)
        assert opens(strict, cookie_of(other).value)


def test_a_logout_ends_the_streams_of_its_session(strict, welcome):
    cookie = cookie_of(welcome)
    with strict.follow(Cookie=f"{cookie.name}={cookie.value}") as follower:
        events = iter(follower)
        assert next(events)[0] == "hello"
        welcome.submit("/logout")
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert strict.ask("POST", "/api/workstreams", {"name": "secret"}, headers=bearer).status_code == 201
        assert [event for event, *_ in events] == []


def test_a_stream_that_a_token_opened_goes_on_whatever_cookie_came_with_it(strict, welcome):
    cookie = cookie_of(welcome)
    welcome.submit("/logout")
    headers = {"Cookie": f"{cookie.name}={cookie.value}", "Authorization": f"Bearer {TOKEN}"}
    with strict.follow("?poll=1", **headers) as follower:
        assert [event for event, *_ in follower] == ["hello"]


def test_a_session_is_not_ended_by_a_link(welcome):
    assert welcome.get("/logout").status_code == 405
    assert welcome.get("/dashboard").status_code == 200


def test_a_session_survives_a_restart_until_its_token_is_gone(fresh):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS=TOKENS)
    kept, ended = [], []
    for token in (TOKEN, OTHER, TOKEN):
        with Browser(server) as browser:
            browser.submit("/login", token=token)
            kept.append(cookie_of(browser).value)
    with Browser(server) as browser:
        browser.submit("/login", token=OTHER)
        ended.append(cookie_of(browser).value)
        browser.submit("/logout")
    server.stop()
    server.settings["MONITOR_API_TOKENS"] = f"new,{OTHER}"
    server.start()
    assert [opens(server, value) for value in kept] == [False, True, False]
    assert not opens(server, ended[0])


def test_a_cookie_that_is_not_ours_opens_nothing(strict, welcome):
    value = cookie_of(welcome).value
    end, nonce, signature = value.split(".")
    later = f"{int(end) + 1}.{nonce}.{signature}"
    forged = [TOKEN, "", "x", "..", later, f"{end}.{'0' * 16}.{signature}", f"{end}.{nonce}.{'0' * 64}"]
    forged += [value[:-1], value + "0", f"0{value}", f"{end}.{nonce}", value.upper(), f"{value}.{signature}"]
    assert opens(strict, value)
    assert [opened for opened in forged if opens(strict, opened)] == []


def test_a_session_runs_out(strict):
    db = sqlite3.connect(strict.database)
    secret = db.execute("SELECT secret FROM head").fetchone()[0]
    db.close()
    month, token = monitor.SESSION_DAYS * 86400, TOKEN.encode()
    assert opens(strict, monitor.open_session(secret, token, time.time() - month + 60))
    assert not opens(strict, monitor.open_session(secret, token, time.time() - month - 1))
    assert not opens(strict, monitor.open_session(bytes(32), token, time.time()))


def test_what_signs_the_cookies_is_in_no_answer(strict):
    db = sqlite3.connect(strict.database)
    secret = db.execute("SELECT secret FROM head").fetchone()[0]
    db.close()
    assert len(secret) >= 32
    for path in ("/health?full=1", "/api/stream?poll=1&after_seq=0", "/dashboard"):
        assert secret.hex() not in strict.ask("GET", path).text


# --- other web sites -------------------------------------------------------------------------------------

FOREIGN = [
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_a_session_is_of_no_use_to_another_site(strict, welcome, headers):
    with nothing_stored(strict):
        assert welcome.submit("/workstreams", headers, name="forged").status_code == 403
        assert welcome.submit("/logout", headers).status_code == 403
        assert welcome.submit("/login", headers, token=TOKEN).status_code == 403
    assert welcome.get("/dashboard").status_code == 200


@pytest.mark.parametrize("mode", ["no-cors", "cors", "same-origin", "websocket"])
@pytest.mark.parametrize(
    "path", ["/api/stream", "/api/stream?poll=1", "/api/tasks", "/dashboard", "/api/admin/backup"]
)
def test_another_site_reads_neither_stream_nor_anything(server, mode, path):
    for site in ("cross-site", "same-site"):
        headers = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode}
        refused(exchange(server, request_bytes(server, "GET", path, **headers)), 403, "forbidden")
    raw = request_bytes(server, "GET", path, Origin="http://evil.example")
    refused(exchange(server, raw), 403, "forbidden")


def test_a_link_on_another_site_may_lead_here(server):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    with Browser(server) as browser:
        assert browser.get("/dashboard", headers=headers).status_code == 200
        assert browser.ask("POST", "/workstreams", data={"name": "x"}, headers=headers).status_code == 403


# --- headers ---------------------------------------------------------------------------------------------

EVERYWHERE = [
    "/dashboard",
    "/stream",
    "/login",
    "/tasks/TASK",
    "/nope",
    "/health",
    "/api/tasks",
    "/static/style.css",
]


@pytest.fixture(scope="module")
def marked(server):
    """A task whose names and updates are markup."""
    markup = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onload='x'"
    task = server.new_task(markup, server.post("/api/workstreams", name=markup)["id"])
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"summary_text": markup})
    server.say(task, markup, tags=[markup], kind=markup, data={markup: markup})
    return task


@pytest.mark.parametrize("path", EVERYWHERE)
def test_every_answer_tells_browsers_to_be_careful(server, marked, path):
    with Browser(server) as browser:
        headers = browser.get(path.replace("TASK", marked["id"])).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["base-uri"] == "'none'"
    assert {word for words in policy.values() for word in words.split()} <= {"'none'", "'self'", "data:"}
    assert "data:" not in policy.get("script-src", "")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Server" not in headers
    assert not [name for name in headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize(
    "path", ["/dashboard", "/stream", "/tasks/TASK", "/stream?q=%3Cscript%3Ealert(1)%3C/script%3E"]
)
def test_pages_hold_no_script_of_their_own_and_none_of_what_was_stored(server, marked, path):
    with Browser(server) as browser:
        response = browser.get(path.replace("TASK", marked["id"]))
    assert response.status_code == 200
    tags = re.findall(r"<[a-zA-Z](?:[^>\"']|\"[^\"]*\"|'[^']*')*>", response.text)
    bare = [re.sub(r"\"[^\"]*\"|'[^']*'", '""', tag) for tag in tags]
    assert not [tag for tag in bare if re.search(r"\s(?:on\w+|style|srcdoc)\s*=", tag)]
    assert all("src=" in tag for tag in bare if tag.startswith("<script"))
    # Links to what a webhook told of, as the shared server shows them, load nothing.
    ours = [tag for tag in tags if not re.match(r'<a href="https?://[^"]*" rel="noopener noreferrer"', tag)]
    sources = re.findall(r"(?:src|href|action)=\"([^\"]*)\"", " ".join(ours))
    assert not [source for source in sources if not re.match(r"[/#?](?!/)", source)]


# --- more hosts ------------------------------------------------------------------------------------------

MORE_HOSTS = [
    "monitor.example",
    "MONITOR.example:8443",
    "box.local:3000",
    "localhost",
    "127.0.0.1:1",
    "[::1]",
]


@pytest.mark.parametrize("host", MORE_HOSTS)
def test_more_names_may_be_allowed(relaxed, host):
    assert exchange(relaxed, request_bytes(relaxed, "GET", "/api/tasks", Host=host)).status == 200
    headers = {"Host": host, "Origin": f"http://{host}", "Authorization": f"Bearer {TOKEN}"}
    raw = request_bytes(relaxed, "POST", "/api/workstreams", b'{"name": "x"}', **headers)
    assert exchange(relaxed, raw).status == 201


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "0.0.0.0:3000", "[::]", "example", "x.monitor.example", "box.local.evil.example"]
)
def test_no_others_are_even_where_other_machines_are_served(relaxed, host):
    for path in ("/health", "/api/tasks", "/api/stream", "/dashboard", "/static/style.css"):
        refused(exchange(relaxed, request_bytes(relaxed, "GET", path, Host=host)), 403, "forbidden")


@pytest.mark.parametrize(
    ("bound", "host", "allowed"),
    [
        ("192.168.1.5", "192.168.1.5:3000", True),
        ("192.168.1.5", "192.168.1.6", False),
        ("Box.Local", "bOX.lOCAL:3000", True),
        ("fd00::1", "[fd00::1]:3000", True),
        ("fd00::1", "[FD00::1]", True),
        ("fd00::1", "fd00::1", False),
        ("0.0.0.0", "0.0.0.0", False),
        ("::", "[::]", False),
        ("::", "localhost", True),
    ],
)
def test_the_address_it_was_told_to_listen_on_is_one_of_its_names(bound, host, allowed):
    config = monitor.Config.load({"MONITOR_BIND": f"[{bound}]:3000" if ":" in bound else f"{bound}:3000"})
    assert monitor.host_allowed(host, config) is allowed


# --- the warning -----------------------------------------------------------------------------------------


def first_words(tmp_path, *options: str, **settings: str) -> str:
    """What a server prints at its start."""
    with serving(Server, tmp_path / "monitor.db", *options, **settings) as server:
        server.stop()
        return server.output


def warnings(output: str) -> list[str]:
    """The lines that warn."""
    return [line for line in output.splitlines() if line.strip().startswith("warning")]


def test_who_opens_it_to_other_machines_is_told_that_they_may_read_and_write(tmp_path):
    output = first_words(tmp_path, "--bind", "0.0.0.0:0")
    (line,) = warnings(output)
    assert "machine" in line
    assert re.search("read.*(write|change)", line)
    assert "anyone on this machine" not in output


def test_who_opens_it_with_tokens_is_told_that_others_may_read(relaxed):
    (line,) = warnings(relaxed.output)
    assert "read" in line
    assert "write" not in line or "token" in line


def test_the_address_that_it_prints_can_be_opened(relaxed):
    printed = re.search(r"Monitor \S+ at (http://\S+)", relaxed.output)[1]
    assert requests.get(f"{printed}/health", timeout=10).status_code == 200


def test_there_is_no_warning_where_everything_needs_a_token_or_nobody_else_comes(tmp_path, strict):
    settings = {"MONITOR_AUTH_MODE": "strict", "MONITOR_API_TOKENS": TOKEN}
    assert warnings(first_words(tmp_path, "--bind", "0.0.0.0:0", **settings)) == []
    assert warnings(strict.output) == []
