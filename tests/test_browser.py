"""The pages in a browser: they are live, lose nothing that a reader does, and can be used by everybody."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import re
import shutil
import socket
import threading
import time
import uuid

import pytest
from conftest import Server, wait_until

CHROMIUM = shutil.which("chromium")
REQUIRED = os.environ.get("MONITOR_BROWSER_TESTS") == "required"
MISSING = [
    *([] if importlib.util.find_spec("playwright") else ["Playwright is not installed"]),
    *([] if CHROMIUM else ["there is no chromium"]),
]
pytestmark = [pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=" and ".join(MISSING))]

# What tests do to a page before it starts: to hide it, to set its clock, to make its stream deaf, to keep its
# notifications.
RIGGED = """
Object.defineProperty(document, 'hidden', {get: () => window.away ?? false});
window.hide = (away) => { window.away = away; document.dispatchEvent(new Event('visibilitychange')); };
const now = Date.now.bind(Date);
window.ahead = Number(sessionStorage.getItem('ahead'));
Date.now = () => now() + window.ahead;
window.deaf = Boolean(sessionStorage.getItem('deaf'));
const really = window.fetch;
const silence = (signal) => new ReadableStream({
  start: (control) => signal.addEventListener('abort', () => control.error(signal.reason)),
});
window.flying = window.most = 0; // how many requests for the page itself are, and were, under way
window.fetch = async (url, options) => {
  if (window.deaf && String(url).startsWith('/api/stream')) return new Response(silence(options.signal));
  const whole = url instanceof URL;
  window.most = Math.max(window.most, window.flying += whole);
  return really(url, options).finally(() => window.flying -= whole);
};
window.shown = []; window.asked = 0; window.allowed = 'default';
window.Notification = class {
  constructor(title, options) { window.shown.push([title, options.tag]); }
  static get permission() { return window.allowed; }
  static async requestPermission() { window.asked += 1; return window.allowed = 'granted'; }
};
window.longest = 0;
new PerformanceObserver((list) => {
  for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
}).observe({entryTypes: ['longtask']});
"""


@pytest.fixture(scope="module")
def chromium():
    """The browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM)
        yield launched
        launched.close()


@pytest.fixture
def visit(chromium, server):
    """Opens pages in one browser session: visit("/dashboard"). What goes wrong in one fails the test."""
    with contextlib.ExitStack() as stack:
        made, faults = {}, []

        def note(message) -> None:
            if message.type == "error" and "Failed to load resource" not in message.text:
                faults.append(message.text)

        def open_page(path: str, at: Server = server, live: bool = True, **options):
            key = repr(sorted(options.items()))
            if key not in made:
                made[key] = chromium.new_context(**options)
                made[key].add_init_script(RIGGED)
                stack.callback(made[key].close)
            page = made[key].new_page()
            page.set_default_timeout(10_000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", note)
            page.goto(at.url + path)
            if live:
                page.locator("#pill[data-state=live]").wait_for()
            page.evaluate("window.mark = 'the same document'")
            return page

        yield open_page
    assert faults == []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this file's own: its streams are counted."""
    running = Server(tmp_path_factory.mktemp("browser") / "monitor.db")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.output


def streams(server: Server) -> int:
    """How many connections to the server read its stream."""
    return server.get("/health", full=1)["streams"]


def path_of(task: dict) -> str:
    """The path of a task's page."""
    return f"/tasks/{task['id']}"


def appears(page, text: str, seconds: float = 10) -> None:
    """Wait until a text is shown."""
    page.wait_for_function(
        "text => document.querySelector('main').textContent.includes(text)", arg=text, timeout=seconds * 1000
    )


def stays(page) -> None:
    """Assert that the document was never loaded anew."""
    assert page.evaluate("window.mark") == "the same document"


def ask_permission(server: Server, name: str = "project") -> dict:
    """An agent's run that waits for somebody; its task."""
    session, cwd = str(uuid.uuid4()), f"/work/{uuid.uuid4()}/{name}"
    for event in (
        {"hook_event_name": "UserPromptSubmit", "prompt": f"tidy up {name}"},
        {"hook_event_name": "PermissionRequest", "tool_name": "Bash", "tool_input": {"command": "git push"}},
    ):
        answer = server.ask("POST", "/api/hooks/claude", {"session_id": session, "cwd": cwd} | event)
        assert answer.status_code == 204
    runs = wait_until(
        lambda: [run for run in server.get("/api/sessions")["items"] if session in run["source"]]
    )
    return server.get(f"/api/tasks/{runs[0]['task_id']}")


# What is new appears ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dashboard", "/stream", "TASK"])
def test_an_update_appears_without_a_reload(server, visit, task, path):
    page = visit(path.replace("TASK", path_of(task)))
    for number in range(3):
        server.say(task, f"news {number} of {task['id']}")
        appears(page, f"news {number} of {task['id']}", 2)
    stays(page)


def test_a_change_of_a_task_appears(server, visit, task):
    page = visit(path_of(task))
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "another name", "status": "blocked"})
    appears(page, "another name", 2)
    page.wait_for_function("() => document.title.includes('another name')")
    assert page.locator(".head .status.blocked").count() == 1


def test_nothing_between_render_and_subscription_is_missed(server, visit, task):
    page = visit(path_of(task))

    def late(route) -> None:
        server.say(task, "stored in between")
        route.continue_()

    page.route("**/api/stream?*", late, times=1)
    page.reload()
    appears(page, "stored in between")


def test_what_comes_while_the_page_is_fetched_is_shown_without_more_news(server, visit, task):
    page = visit(path_of(task))

    def slow(route) -> None:
        answer = route.fetch()
        server.say(task, "too late for this answer")
        page.wait_for_timeout(600)  # its tick is heard, and no other comes
        route.fulfill(response=answer)

    page.route("**/needs", lambda route: route.abort())  # what it tells is a reason to look again, too
    page.route("**/tasks/*seen=*", slow, times=1)
    server.say(task, "fetched at once")
    appears(page, "too late for this answer")


def test_pages_are_whole_without_javascript(server, visit, task):
    server.say(task, "it is all there")
    page = visit(path_of(task), live=False, java_script_enabled=False)
    assert page.get_by_text("it is all there").is_visible()
    assert not page.locator(".tools").is_visible()


def test_times_are_told_in_the_readers_zone_and_grow_old(server, visit, task):
    page = visit(path_of(task), live=False, timezone_id="Asia/Tokyo", locale="en-GB")
    page.clock.install()
    page.evaluate(
        "sessionStorage.setItem('deaf', '1')"
    )  # each time that it opens it tells what time it is there
    server.say(task, "just now")
    page.reload()
    time_of = page.locator(".update time").first
    assert re.search(r"\d\d:\d\d:\d\d (GMT\+9|JST)", time_of.get_attribute("title"))
    assert re.fullmatch(r"\d s", time_of.inner_text())
    page.clock.run_for(155_000)
    assert time_of.inner_text() == "2 m"


def test_the_activity_of_the_last_hour_moves_on_when_nothing_happens(server, visit, task):
    server.say(task, "the last for long")
    page = visit("/dashboard", live=False, locale="en-AU")
    page.clock.install()
    page.reload()
    page.locator("#pill[data-state=live]").wait_for()
    with page.expect_request("**/dashboard"):
        page.clock.run_for("05:30")


@pytest.mark.parametrize("ahead", [-600_000, 600_000])
def test_where_the_clocks_differ_times_are_as_long_ago_as_the_server_says(server, visit, task, ahead):
    page, other = visit("/login", live=False), visit("/login", live=False)
    for tab in (page, other):
        tab.evaluate("ahead => sessionStorage.setItem('ahead', ahead)", ahead)
        tab.goto(server.url + path_of(task))
        tab.locator("#pill[data-state=live]").wait_for()
    server.say(task, "just now")
    for tab in (page, other):
        appears(tab, "just now")
        assert re.fullmatch(r"\d s", tab.locator(".update time").first.text_content())


def test_days_are_the_readers(server, visit, task):
    """Somewhere it is another day than in UTC."""
    said = datetime.datetime.fromisoformat(server.say(task, "which day is it")["timestamp"])
    zone, hours = ("Pacific/Kiritimati", 14) if said.hour >= 10 else ("Pacific/Pago_Pago", -11)
    page = visit(path_of(task), timezone_id=zone, locale="en-GB")
    there = said + datetime.timedelta(hours=hours)
    assert there.date() != said.date()
    (heading,) = page.locator(".day").all_inner_texts()
    assert heading.replace(",", "") == f"{there:%A} {there.day} {there:%B} {there.year}"


def test_after_a_burst_the_page_is_fresh_and_was_never_stuck(server, visit, task):
    """Looser than what is asked for (1 s, 4 s, 400 ms; 0.4, 0.9 and 0.06 were measured): CI is slower."""
    for number in range(50):
        server.say(server.new_task(f"task {number}", task["workstream_id"]), "begun")
    page = visit("/dashboard")
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # of the processor, not of the wall
    before = main_thread(session)
    burst(server, task, 1000, 4)
    last = server.say(task, "the last of them")
    appears(page, "the last of them", 5)
    assert main_thread(session) - before < 10
    assert page.evaluate("window.longest") < 1500
    assert page.evaluate("[most, flying]") == [1, 0]
    assert int(page.locator("main").get_attribute("data-seq")) >= last["seq"]
    stays(page)


def main_thread(session) -> float:
    """The seconds that a page's main thread has worked."""
    return {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}["TaskDuration"]


def burst(server: Server, task: dict, rate: int, seconds: int) -> int:
    """Send updates over ten connections, so many a second; returns how many were taken."""
    body = b'{"task_id": "%s", "message": "one of many"}' % task["id"].encode()
    head = b"POST /api/updates/manual HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    request, taken, began = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body), [], time.monotonic()

    def send() -> None:
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            for step in range(seconds * 10):
                time.sleep(max(0.0, began + step / 10 - time.monotonic()))
                connection.sendall(request * (rate // 100))
                text = b""
                while text.count(b"HTTP/1.1 201 ") < rate // 100:
                    text += connection.recv(65536) or pytest.fail("the server hung up")
                taken.append(rate // 100)

    threads = [threading.Thread(target=send) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(taken)


# What the reader does stays -----------------------------------------------------------------------------


def test_typed_text_focus_selection_and_open_details_survive(server, visit, task):
    server.say(task, "with data", data={"a": 1})
    page = visit(path_of(task))
    page.locator("#tags").fill("typed and left")
    page.locator("#level").select_option("warn")
    page.locator(".update .data summary").click()
    page.locator("details:has(#summary-text) summary").click()
    page.locator("#message").fill("half a sentence")
    page.locator("#message").evaluate("area => area.setSelectionRange(5, 9)")
    for number in range(3):
        server.say(task, f"news {number}")
        appears(page, f"news {number}")
    area = page.locator("#message")
    assert area.evaluate("area => [area.value, area.selectionStart, area.selectionEnd]") == [
        "half a sentence",
        5,
        9,
    ]
    assert area.evaluate("area => area === document.activeElement")
    assert (page.locator("#tags").input_value(), page.locator("#level").input_value()) == (
        "typed and left",
        "warn",
    )
    assert page.locator(".update .data[open]").count() == 1
    assert page.locator("details[open]:has(#summary-text)").count() == 1


def test_selected_text_and_the_place_in_the_list_survive(server, visit, task):
    for number in range(60):
        server.say(task, f"line {number}")
    page = visit("/stream")
    row = page.locator(".update", has_text=re.compile(r"line 30\b"))
    row.scroll_into_view_if_needed()
    row.locator(".message").evaluate("node => getSelection().selectAllChildren(node)")
    place = row.bounding_box()["y"]
    for number in range(3):
        server.say(task, f"late news {number}")
        page.locator("#news a:visible", has_text=f"{number + 1} new").wait_for()
    assert abs(row.bounding_box()["y"] - place) < 2
    assert page.evaluate("getSelection().toString()").strip() == "line 30"
    assert page.get_by_text("late news").count() == 0
    page.locator("#news a").click()
    appears(page, "late news 2")
    assert page.get_by_text("late news 2").is_visible() and not page.locator("#news a").is_visible()
    stays(page)


def test_who_goes_back_to_the_top_sees_what_came(server, visit, task):
    for number in range(40):
        server.say(task, f"line {number}")
    page = visit(path_of(task))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    server.say(task, "while it was read")
    page.locator("#news a:visible", has_text="1 new").wait_for()
    page.evaluate("scrollTo(0, 0)")
    appears(page, "while it was read")
    assert not page.locator("#news a").is_visible()


def test_what_a_burst_skipped_is_told_and_loaded(server, visit, task):
    first = server.say(task, "the last that was read")
    page = visit(f"/stream?task_id={task['number']}")
    page.keyboard.press("p")
    for number in range(130):
        server.say(task, f"burst {number}")
    page.keyboard.press("p")
    page.locator("#skipped", has_text="Skipped 30 updates").wait_for()
    server.say(task, "one more")
    page.locator("#skipped", has_text="Skipped 31 updates").wait_for()
    page.locator("#skipped a").click()
    page.locator(f"#u{first['seq']}").wait_for()
    appears(page, "burst 30")
    assert page.get_by_text("burst 31").count() == 0
    stays(page)


def test_lanes_are_live_pinned_by_a_click_and_in_the_address(server, visit, task):
    other = server.new_task("the other lane")
    for one in (task, other):
        server.say(one, f"begun {one['number']}")
    page = visit("/stream")
    page.locator(".views a", has_text="lanes").click()
    page.wait_for_url("**/stream?layout=lanes")
    lane = page.locator(f"#l{task['number']}")
    lane.locator(".pin").click()
    page.wait_for_url(f"**/stream?layout=lanes&pin={task['number']}")
    lane.get_by_text("pinned").wait_for()
    server.say(other, "news of the other")
    appears(page, "news of the other")
    assert page.locator(".lanes > section").first.get_attribute("id") == f"l{task['number']}"
    page.locator(".views a", has_text="by task").click()
    page.locator(f"#s{other['number']}").get_by_text("news of the other").wait_for()
    page.go_back()
    lane.wait_for()
    stays(page)


def test_a_row_leads_to_its_task_wherever_it_is_clicked(server, visit, task):
    server.say(task, "words beside the name")
    page = visit(f"/dashboard?workstream_id={task['workstream_id']}")
    page.locator(f"#t{task['number']} .last").click(force=True)  # the link lies over it
    page.wait_for_url(server.url + path_of(task))


@pytest.mark.parametrize(
    "path", ["/dashboard", "/stream", "/stream?layout=lanes", "TASK", "/docs", "/nothing"]
)
def test_no_page_goes_sideways_on_the_smallest_phone(server, visit, task, path):
    word = "x" * 200
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": word, "summary_text": word})
    server.say(task, word, kind=word[:100], tags=[word[:60]], data={"output": word}, level="error")
    page = visit(path.replace("TASK", path_of(task)), live=False, viewport={"width": 320, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_a_focused_link_keeps_the_focus(server, visit, task):
    page = visit("/dashboard")
    page.locator(f"#t{task['number']} .name").focus()
    server.say(task, "news for the row")
    appears(page, "news for the row")
    assert page.evaluate("document.activeElement.textContent") == task["name"]


def test_a_paused_page_rests_and_counts(server, visit, task):
    page = visit(path_of(task))
    page.keyboard.press("p")
    server.say(task, "while it rests")
    page.wait_for_function("() => document.querySelector('#pill').textContent.includes('paused, 1 new')")
    assert page.get_by_text("while it rests").count() == 0
    page.locator("#pill").click()
    appears(page, "while it rests", 2)


# Back, forward, reload ----------------------------------------------------------------------------------


def test_back_forward_and_reload_show_what_the_address_says(server, visit, task):
    server.say(task, "apples and pears")
    server.say(task, "only plums")
    page = visit("/stream")
    search = page.locator("#q")
    for word, other in (("apples", "plums"), ("plums", "apples")):
        search.fill(word)
        search.press("Enter")
        page.wait_for_url(f"**/stream?q={word}")
        page.wait_for_function(
            "word => !document.querySelector('main').textContent.includes(word)", arg=other
        )
    stays(page)
    search.focus()
    page.go_back()
    appears(page, "apples and pears")
    assert search.input_value() == "apples"
    page.go_forward()
    appears(page, "only plums")
    assert search.input_value() == "plums"
    page.reload()
    appears(page, "only plums")
    assert (search.input_value(), page.get_by_text("apples and pears").count()) == ("plums", 0)


def test_forward_leads_to_the_place_in_a_list_as_back_does(server, visit, task):
    for number in range(101):
        server.say(task, f"a line, {number}")
    page = visit(f"/stream?task_id={task['number']}")
    page.get_by_role("link", name="Older updates").click()
    page.wait_for_url("**before_seq=*")
    page.get_by_role("link", name="Newest updates").click()
    appears(page, "a line, 100")
    page.evaluate("scrollTo(0, 900)")
    page.wait_for_function("() => history.state?.y === 900")
    page.go_back()
    appears(page, "a line, 0")
    page.go_forward()
    page.wait_for_function("() => scrollY === 900")
    stays(page)


def test_chips_and_fields_filter_in_place_and_stay_while_the_page_lives(server, visit, task):
    server.say(task, "a quince", level="error", tags=["fruit"])
    server.say(task, "a leek", level="error", tags=["greens"])
    page = visit("/stream")
    page.locator("#f-task_id").fill(str(task["number"]))
    page.locator("#f-level").select_option("error")
    page.locator("#filters button").click()
    page.wait_for_url(f"**/stream?level=error&task_id={task['number']}")
    page.locator('.tags a[href*="level=error"]', has_text="fruit").click()  # of the filtered page
    page.wait_for_url("**&tag=fruit")
    page.wait_for_function("() => !document.querySelector('main').textContent.includes('a leek')")
    server.say(task, "a medlar", level="error", tags=["fruit"])
    server.say(task, "not an error", tags=["fruit"])
    appears(page, "a medlar")
    assert page.get_by_text("not an error").count() == 0
    page.locator(".chips a", has_text="Level: error").click()
    appears(page, "not an error")
    assert page.locator("#f-level").input_value() == ""
    page.go_back()
    page.wait_for_function("() => !document.querySelector('main').textContent.includes('not an error')")
    assert page.locator("#f-level").input_value() == "error"
    stays(page)


def test_a_dashboard_of_a_view_stays_that_view(server, visit, task):
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "a rare grebe", "status": "blocked"})
    page = visit("/dashboard?q=grebe&group=none")
    page.locator(".chips a", has_text="blocked").click()
    page.wait_for_url("**/dashboard?q=grebe&group=none&status=blocked")
    server.say(task, "news of the grebe")
    appears(page, "news of the grebe")
    assert page.locator(".task").count() == 1
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "active"})
    appears(page, "No task fits these filters")
    page.get_by_text("Clear the filters").click()
    page.wait_for_url("**/dashboard?group=none")
    page.locator(f"#t{task['number']}").wait_for()
    assert page.locator("#find").input_value() == ""
    stays(page)


def test_an_open_fold_stays_open_while_more_calls_come(server, visit, task):
    def call(number: int) -> dict:
        fields = {"source": "claude:folding", "kind": "tool_use", "message": f"call {number}"}
        return server.post("/api/updates", task_id=task["id"], **fields)

    first, *_ = [call(number) for number in range(4)]
    page = visit(path_of(task))
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.locator(f"#u{first['seq']}").wait_for()
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('li').textContent").count("call 2") == 1
    for number in range(4, 7):
        call(number)
        appears(page, f"{number + 1} tool calls")
    assert page.locator(f"#f{first['seq']}[open]").count() == 1
    page.goto(f"{server.url}{path_of(task)}#u{first['seq']}")
    page.locator(f"#u{first['seq']}").wait_for()
    stays_open = page.locator(f"#f{first['seq']}[open]")
    stays_open.wait_for()


def test_a_link_to_an_update_leads_there_when_it_is_long_past(server, visit, task):
    first = server.say(task, "long past")
    for number in range(100):
        server.say(task, f"later {number}")
    page = visit("/login", live=False)
    page.goto(f"{server.url}{path_of(task)}#u{first['seq']}")
    page.locator(f"#u{first['seq']}:target", has_text="long past").wait_for()
    page.go_back()
    assert page.url == server.url + "/login"


def test_a_page_that_one_comes_back_to_is_live(server, visit, task):
    page = visit("/dashboard")
    page.locator(f"#t{task['number']} .name").click()
    page.wait_for_url("**" + path_of(task))
    page.go_back()
    page.wait_for_url("**/dashboard")
    server.say(task, "after coming back")
    appears(page, "after coming back")


# One stream a browser -----------------------------------------------------------------------------------


def test_twelve_tabs_share_one_connection_and_the_next_takes_it_over(fresh, visit):
    server = fresh()
    task = server.new_task()
    tabs = [visit(path_of(task), server) for _ in range(12)]
    assert streams(server) == 1
    server.say(task, "to all tabs")
    for tab in tabs:
        appears(tab, "to all tabs")
    for round_number in range(2):
        tabs.pop(0).close()
        server.say(task, f"after takeover {round_number}")
        for tab in tabs:
            appears(tab, f"after takeover {round_number}")


def test_a_hidden_tab_rests_and_is_right_when_it_is_looked_at(server, visit, task):
    page = visit(path_of(task))
    page.evaluate("hide(true)")
    fetched = []
    page.on("request", lambda request: fetched.append(request.url))
    server.say(task, "nobody looks")
    page.wait_for_timeout(700)
    assert not [url for url in fetched if "/tasks/" in url]
    page.evaluate("hide(false)")
    appears(page, "nobody looks", 2)


def test_a_leader_that_hangs_is_replaced_and_waits_again(server, visit, task):
    leader = visit(path_of(task))
    page = visit(path_of(task))
    leader.evaluate("window.until = performance.now() + 7000")
    leader.evaluate("void setTimeout(() => { while (performance.now() < until); })")
    page.evaluate("window.ahead = 3_600_000")  # it wakes, and asks for a sign of life
    page.wait_for_timeout(3500)
    server.say(task, "who reads now")
    appears(page, "who reads now", 2)
    leader.wait_for_function("navigator.locks.query().then(({pending}) => pending.length === 1)")
    page.close()
    server.say(task, "the first again")
    appears(leader, "the first again")


def test_without_locks_the_stream_closes_while_hidden(server, visit, task):
    page = visit(path_of(task), live=False, locale="en-US")
    page.context.add_init_script("delete Navigator.prototype.locks")
    page.reload()
    page.locator("#pill[data-state=live]").wait_for()
    with page.expect_event("requestfailed", lambda request: "/api/stream?" in request.url):
        page.evaluate("hide(true)")
    server.say(task, "nobody listens")
    page.evaluate("hide(false)")
    appears(page, "nobody listens", 2)


# Cut and asleep -----------------------------------------------------------------------------------------


def test_a_page_goes_on_after_the_server_was_killed(fresh, visit):
    server = fresh()
    task = server.new_task()
    page = visit(path_of(task), server)
    page.locator("#message").fill("half a sentence")
    server.kill()
    page.locator("#pill[data-state=reconnecting]").wait_for()
    server.start()
    server.say(task, "back again")
    appears(page, "back again", 2.5)  # the first of them may be the start of the server
    assert page.locator("#message").input_value() == "half a sentence"
    stays(page)


def test_another_database_behind_the_address_is_shown(fresh, visit, tmp_path):
    server = fresh()
    for number in range(5):
        server.new_task(f"old {number}")
    for number in range(40):
        server.say(server.get("/api/tasks/1"), f"old news {number}")
    page, reading = visit("/dashboard", server), visit("/stream", server)
    reading.evaluate("scrollTo(0, 500)")
    server.kill()
    server.database = tmp_path / "another.db"
    server.start()
    server.say(server.new_task("of the other database"), "its only update")
    appears(page, "of the other database")
    appears(page, "1 open")
    assert page.get_by_text("old 1").count() == 0
    reading.locator("#news a:visible", has_text="1 new").click()
    appears(reading, "its only update")
    assert reading.get_by_text("old news").count() == 0


def test_after_an_hours_sleep_it_is_right_within_two_seconds(server, visit, task):
    """The stream is dead, and nothing told the browser."""
    page = visit(path_of(task), live=False, locale="en-GB")
    page.clock.install()
    page.evaluate("sessionStorage.setItem('deaf', '1')")
    page.reload()
    server.say(task, "while it slept")
    page.wait_for_timeout(1000)
    assert page.get_by_text("while it slept").count() == 0
    page.evaluate("window.deaf = false")
    page.clock.fast_forward("01:00:00")
    appears(page, "while it slept", 2)
    page.locator("#pill[data-state=live]").wait_for()


def test_the_tab_in_view_is_right_after_sleep_also_where_a_hidden_one_reads(server, visit, task):
    """The timers of a hidden tab run once a minute: it does not notice soon that its stream is dead."""
    leader = visit(path_of(task))
    leader.evaluate("sessionStorage.setItem('deaf', '1')")
    leader.reload()
    page = visit(path_of(task), live=False)
    leader.evaluate("hide(true); window.deaf = false")
    page.evaluate("window.ahead = 3_600_000")
    page.locator("#pill[data-state=live]").wait_for(timeout=2000)
    server.say(task, "after it woke")
    appears(page, "after it woke", 2)


def test_a_request_without_an_end_holds_nothing_up(server, visit, task):
    page = visit(path_of(task))
    page.route("**/tasks/*seen=*", lambda route: None, times=1)
    with page.expect_request("**/tasks/*seen=*"):
        server.say(task, "asked for, never answered")
    page.evaluate("dispatchEvent(new Event('online'))")
    appears(page, "asked for, never answered", 2)


def test_when_the_network_is_back_the_page_is_right_within_two_seconds(server, visit, task):
    page = visit(path_of(task), locale="en-GB")
    page.context.set_offline(True)
    server.say(task, "while it was away")
    page.wait_for_timeout(500)
    page.context.set_offline(False)
    appears(page, "while it was away", 2)
    page.locator("#pill[data-state=live]").wait_for()
    stays(page)


# The frame ----------------------------------------------------------------------------------------------


def test_who_needs_you_is_told_on_every_page(fresh, visit):
    server = fresh()
    page = visit("/stream", server)
    assert not page.locator("#needs").is_visible()
    task = ask_permission(server)
    page.locator("#needs[data-count='1']").wait_for()
    page.wait_for_function("() => document.title.startsWith('(1) Stream')")
    assert "favicon-blocked" in page.locator("link[rel=icon]").get_attribute("href")
    page.locator("#needs summary").click()
    assert "git push" in page.locator("#needs .question").inner_text()
    page.locator("#needs a").click()
    page.wait_for_url("**" + path_of(task))


def test_notifications_are_asked_for_by_a_click_and_come_once_a_task_in_the_background(fresh, visit):
    server = fresh()
    page = visit("/dashboard", server)
    ask_permission(server, "seen")
    page.locator("#needs[data-count='1']").wait_for()
    assert page.evaluate("[asked, shown.length]") == [0, 0]
    page.locator(".tools [data-do=notify]").click()
    page.wait_for_function("() => asked === 1")
    assert not page.locator(".tools [data-do=notify]").is_visible()
    other = visit("/stream", server)
    page.evaluate("hide(true)")
    ask_permission(server, "in view of the other tab")
    page.wait_for_function("() => document.title.startsWith('(2) ')")
    page.evaluate("navigator.locks.query()")  # answered after the page's own: it knows of the tab in view
    other.evaluate("hide(true)")
    task = ask_permission(server, "hidden")
    page.wait_for_function("() => shown.length === 1")
    page.wait_for_function("() => document.title.startsWith('(3) ')")
    server.say(task, "more of it")
    page.wait_for_timeout(2000)
    assert page.evaluate("shown")[0][1] == f"n{task['number']}"
    assert page.evaluate("shown.length") == 1


def test_keys_lead_through_rows_and_pages(server, visit, task):
    server.new_task("another row", task["workstream_id"])
    server.say(task, "a row")
    page = visit("/dashboard")
    page.keyboard.press("j")
    first = page.evaluate("document.activeElement.closest('li').id")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('li').id") != first
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.closest('li').id") == first
    page.keyboard.press("Enter")
    page.wait_for_url("**/tasks/*")
    page.keyboard.type("gs")
    page.wait_for_url("**/stream")
    page.keyboard.type("gd")
    page.wait_for_url("**/dashboard")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("?")
    page.keyboard.press("j")
    assert page.locator("#help").is_visible()
    page.keyboard.press("?")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("gs?jp")
    assert page.locator("#q").input_value() == "gs?jp"
    assert page.url.endswith("/dashboard") and not page.locator("#help").is_visible()


@pytest.mark.parametrize("path", ["/dashboard", "/stream", "TASK"])
def test_everything_is_reached_by_tab_with_a_visible_focus(server, visit, task, path):
    server.say(task, "a row", level="error", tags=["a"], data={"output": "b"})
    page = visit(path.replace("TASK", path_of(task)) + f"?q={task['number']}")
    every = "[...document.querySelectorAll('a, button, input, select, textarea, summary, pre')]"
    every += ".filter((one) => one.tabIndex >= 0 && one.type !== 'hidden' && one.checkVisibility())"
    wanted, reached = page.evaluate(f"(window.every = {every}).length"), set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        place, outline, shown = page.evaluate(
            "[every.indexOf(document.activeElement), getComputedStyle(document.activeElement).outlineStyle,"
            " document.activeElement.getBoundingClientRect().width > 0]"
        )
        assert (outline, shown) == ("solid", True), place
        reached.add(place)
    assert reached == set(range(wanted))


def test_x_changes_the_task_of_a_row_without_leaving(server, visit, task):
    page = visit("/dashboard")
    row = page.locator(f"#t{task['number']}")
    row.locator(".name").focus()
    page.keyboard.press("x")
    page.locator("#sheet button", has_text="blocked").click()
    row.locator(".status.blocked").wait_for()
    assert not page.locator("#sheet").is_visible()
    row.locator(".name").focus()
    page.keyboard.press("x")
    page.locator("#sheet [name=name]").fill("named by x")
    page.locator("#sheet [name=name]").press("Enter")
    row.get_by_text("named by x").wait_for()
    row.hover()
    row.locator(".act").click()
    page.locator("#sheet button", has_text="Hide").click()
    row.wait_for(state="detached")
    stays(page)


def test_x_on_a_tasks_own_page_leads_to_its_buttons(server, visit, task):
    page = visit(path_of(task))
    page.keyboard.press("x")
    page.keyboard.press("Enter")
    page.locator(".head .status.done").wait_for()


def test_why_a_change_was_refused_is_said_in_its_dialog(server, visit, task):
    page = visit("/dashboard")
    page.locator(f"#t{task['number']} .name").focus()
    page.keyboard.press("x")
    page.locator("#sheet [name=name]").fill(" ")
    page.locator("#sheet [name=name]").press("Enter")
    page.locator("#sheet #said", has_text="name must not be empty").wait_for()
    page.keyboard.press("Escape")
    page.context.set_offline(True)
    page.keyboard.press("x")
    page.locator("#said", has_text="The server does not answer").wait_for()


def test_a_task_is_copied_as_markdown(server, visit, task):
    server.say(task, "to be copied")
    page = visit(path_of(task), permissions=["clipboard-read", "clipboard-write"])
    page.locator("[data-do=copy]").click()
    page.locator("#said", has_text="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"# #{task['number']} a task") and "to be copied" in copied


def test_where_a_token_is_needed_a_browser_logs_in_and_is_live(fresh, visit):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="s3cret")
    page = visit("/stream?level=warn", server, live=False)
    page.locator("#token").fill("s3cret")
    page.locator("#token").press("Enter")
    page.wait_for_url("**/stream?level=warn")
    page.locator("#pill[data-state=live]").wait_for()
    page.evaluate("window.mark = 'the same document'")
    server.session.headers["Authorization"] = "Bearer s3cret"
    server.say(server.new_task(), "for members only", level="warn")
    appears(page, "for members only")
    stays(page)


def test_a_page_whose_session_ends_rests_until_the_next_login(fresh, visit):
    server = fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="s3cret")
    server.session.headers["Authorization"] = "Bearer s3cret"
    task = server.new_task()

    def log_in(page) -> None:
        page.locator("#token").fill("s3cret")
        page.locator("#token").press("Enter")
        page.locator("#pill[data-state=live]").wait_for()

    page = visit("/dashboard", server, live=False)
    log_in(page)
    page.context.clear_cookies()
    asked = []
    page.on("request", lambda request: asked.append(request.url.partition("?")[0]))
    server.say(task, "behind the door")
    page.locator("#pill", has_text="log in").wait_for()
    page.wait_for_timeout(2500)
    assert asked.count(server.url + "/dashboard") == 1
    page.locator(".task .name").focus()
    page.keyboard.press("x")
    page.locator("#said", has_text="You are logged out").wait_for()
    log_in(visit("/stream", server, live=False))
    appears(page, "behind the door")
    page.locator("#pill[data-state=live]").wait_for()


def test_pages_ask_nobody_but_their_server(server, visit, task):
    page = visit("/dashboard", locale="fr-FR")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    for path in ("/dashboard", path_of(task), "/stream", "/stream?layout=lanes", "/login", "/nothing"):
        page.goto(server.url + path)
        page.wait_for_load_state()
    assert len(asked) > 12
    assert [url for url in asked if not url.startswith((server.url + "/", "data:"))] == []


def test_the_palette_leads_to_tasks_workstreams_and_actions(server, visit, task):
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "paint the fence"})
    page = visit("/stream")
    page.keyboard.press("Control+k")
    page.locator("#palette-list li").first.wait_for()
    page.keyboard.type("theme")
    page.keyboard.press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert not page.locator("#palette").is_visible()
    page.keyboard.press("Control+k")
    page.locator("#palette-list li").first.wait_for()
    page.keyboard.type("fence paint")
    page.locator("#palette-query").dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    assert page.locator("#palette").is_visible()  # an input method's Enter is not ours
    page.keyboard.press("Escape")
    assert not page.locator("#palette").is_visible()
    page.keyboard.press("Control+k")
    page.keyboard.type("fence paint")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url("**" + path_of(task))


def test_the_theme_is_chosen_kept_and_the_same_in_every_tab(server, visit, task):
    page, other = visit("/dashboard", color_scheme="light"), visit("/stream", color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    for wanted in ("light", "dark"):
        page.locator("#theme").click()
        other.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=wanted)
    assert page.evaluate(ground) == other.evaluate(ground) != light
    page.reload()
    assert page.evaluate(ground) != light
    page.locator("#theme").click()
    assert page.evaluate(ground) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(fresh, visit, scheme):
    if not REQUIRED:
        pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    from axe_playwright_python.sync_playwright import Axe

    server = fresh()
    empty = visit("/dashboard", server, color_scheme=scheme, bypass_csp=True)
    found = {"empty": serious(Axe().run(empty))}
    task = ask_permission(server)
    server.say(task, "an error", level="error", tags=["a"], data={"b": 1}, kind="test_result")
    server.say(task, "a warning", level="warn")
    page = empty
    for _ in range(3):
        server.post(
            "/api/updates",
            task_id=task["id"],
            source="claude:x",
            kind="tool_failure",
            level="error",
            message="x",
        )
    thread = path_of(task) + "?around=" + str(server.get("/api/updates")["items"][-1]["seq"])
    views = ("/dashboard?group=status&status=active", "/stream?q=error&level=error", thread)
    views += (
        "/stream?layout=lanes&pin=1",
        "/stream?layout=grouped",
        "/stream?seen=0",
        "/dashboard?source=claude",
    )
    for path in ("/dashboard", path_of(task), "/stream", *views, "/login", "/nothing"):
        page.goto(server.url + path)
        found[path] = serious(Axe().run(page))
    page.goto(server.url + "/dashboard")
    page.locator("#needs summary").click()
    found["needs"] = serious(Axe().run(page))
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    for key in ("x", "?", "Control+k"):
        page.keyboard.press(key)
        page.locator("dialog[open]").wait_for()
        page.wait_for_function(
            "() => !document.querySelector('#palette').open || document.querySelector('#palette li')"
        )
        found[key] = serious(Axe().run(page))
        page.keyboard.press("Escape")
    assert {name: faults for name, faults in found.items() if faults} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_the_description_of_the_api(visit, scheme):
    if not REQUIRED:
        pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    from axe_playwright_python.sync_playwright import Axe

    page = visit("/docs#post_api_updates", live=False, color_scheme=scheme, bypass_csp=True)
    page.wait_for_function("() => document.querySelector('#post_api_updates').checkVisibility()")
    page.locator("summary", has_text="TaskFile").click()
    assert page.locator("details.operation[open]").count() == 2
    assert serious(Axe().run(page)) == []


def serious(results) -> list[str]:
    """What axe calls serious or critical, and where."""
    return [
        f"{found['id']}: {found['nodes'][0]['html'][:200]}"
        for found in results.response["violations"]
        if found["impact"] in ("serious", "critical")
    ]


# --- the WebSocket in a browser -------------------------------------------------------------------------

TALK = """
async ([address, protocols, messages, count]) => {
  const socket = new WebSocket(address, protocols), heard = [];
  return await new Promise((done) => {
    socket.onopen = () => messages.forEach((message) => socket.send(JSON.stringify(message)));
    socket.onmessage = ({data}) => {
      if (heard.push(JSON.parse(data)) === count) socket.close(1000);
    };
    socket.onclose = ({code, wasClean}) => done({heard, code, wasClean, protocol: socket.protocol});
  });
}
"""


def test_a_script_of_ours_talks_over_the_socket(visit, server):
    """Opened by a page of the server: its policy lets it, and the handshake is a browser's own."""
    task, page = server.new_task(), visit("/dashboard")
    update = {"task_id": task["id"], "source": "browser", "message": "from a browser, é"}
    messages = [
        {"op": "subscribe", "id": 1, "sub": "s", "filter": {"task_id": task["id"]}},
        {"op": "update", "id": 2, "update": update},
    ]
    address = server.url.replace("http", "ws") + "/api/ws"
    told = page.evaluate(TALK, [address, ["monitor.v1", "bearer.dG9r"], messages, 4])
    assert {name: told[name] for name in ("code", "wasClean", "protocol")} == {
        "code": 1000,
        "wasClean": True,
        "protocol": "monitor.v1",
    }
    assert told["heard"][0] == {"id": 1, "ok": True}
    (event,) = [heard["data"] for heard in told["heard"] if heard.get("event") == "update"]
    assert event["message"] == update["message"]
    assert {"id": 2, "ok": event} in told["heard"]


def test_a_script_of_another_site_gets_no_socket(chromium, server):
    """Nor does one without an origin: browsers ask nobody before they open a WebSocket."""
    context = chromium.new_context()
    page = context.new_page()
    address = server.url.replace("http", "ws") + "/api/ws"
    page.route("http://evil.example/", lambda route: route.fulfill(body="evil", content_type="text/html"))
    for place in ("http://evil.example/", "about:blank", "data:text/html,null"):
        page.goto(place)
        told = page.evaluate(TALK, [address, ["monitor.v1"], [{"op": "ping"}], 1])
        assert (told["heard"], told["code"]) == ([], 1006), place
    context.close()


def test_a_shutdown_is_a_clean_close_to_a_browser(visit, tmp_path):
    with contextlib.ExitStack() as stack:
        going = Server(tmp_path / "monitor.db")
        stack.callback(going.stop)
        page = visit("/dashboard", at=going)
        address = going.url.replace("http", "ws") + "/api/ws"
        page.evaluate(
            "address => { const s = new WebSocket(address); window.opened = new Promise((r) => s.onopen = r);"
            " window.ended = new Promise((r) => s.onclose = (e) => r([e.code, e.wasClean])); }",
            address,
        )
        page.evaluate("window.opened.then(() => true)")
        assert going.stop() == 0
        assert page.evaluate("window.ended") == [3001, True]
