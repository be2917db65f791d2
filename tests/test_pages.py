"""The pages as a browser without JavaScript has them: read, followed and filled in over a real server."""

from __future__ import annotations

import datetime
import gzip
import json
import re
import signal
import socket
import subprocess
import threading
import time
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import urljoin

import pytest
from conftest import ROOT, Server, clean_environment, wait_until

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SHAPES = {"circle", "path", "rect", "line", "polyline", "polygon", "use"}  # SVG: closed where they open
BIDI = "\u202e\u2066\u200f"
HOSTILE = (
    """</title></textarea></pre></option><script>alert(1)</script><img src=x onerror=alert(1)>"""
    """ " onmouseover="alert(2)' style='x:y' {{ 7*7 }} {% raw %} &lt;b&gt; &#60;i&#62; """ + BIDI
)


class Element:
    """One element of a page: its tag, attributes, parent, children, and the texts that stand in it."""

    def __init__(self, tag: str, attributes: list[tuple[str, str | None]], parent: Element | None):
        self.tag, self.parent = tag, parent
        self.given, self.attributes = attributes, {name: value or "" for name, value in attributes}
        self.children: list[Element | str] = []

    def __getitem__(self, name: str) -> str:
        return self.attributes.get(name, "")

    def all(self, *tags: str) -> list[Element]:
        """Every element in it, of these tags where some are named, as they come."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                found += ([child] if not tags or child.tag in tags else []) + child.all(*tags)
        return found

    @property
    def text(self) -> str:
        """Its text, blanks folded."""
        return " ".join(self.raw.split())

    @property
    def raw(self) -> str:
        """Its text as it stands."""
        return "".join(child if isinstance(child, str) else child.raw for child in self.children)

    def up(self):
        """Yield it and what it stands in, outwards."""
        yield self
        if self.parent:
            yield from self.parent.up()


class Page(HTMLParser):
    """A page, parsed strictly: what is opened is closed, in order."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.root = self.inside = Element("", [], None)
        self.texts: list[tuple[Element, str]] = []
        self.feed(text)
        self.close()
        assert self.inside is self.root, f"<{self.inside.tag}> is not closed"
        ids = [element["id"] for element in self.all() if element["id"]]
        assert len(ids) == len(set(ids)), f"ids that stand twice: {[id for id in ids if ids.count(id) > 1]}"

    def handle_starttag(self, tag, attrs) -> None:
        element = Element(tag, attrs, self.inside)
        self.inside.children.append(element)
        if tag not in VOID:
            self.inside = element

    def handle_startendtag(self, tag, attrs) -> None:
        assert tag in SHAPES | VOID, f"<{tag}/> closes nothing in HTML"
        self.inside.children.append(Element(tag, attrs, self.inside))

    def handle_endtag(self, tag) -> None:
        assert tag == self.inside.tag, f"</{tag}> closes <{self.inside.tag}>"
        self.inside = self.inside.parent

    def handle_data(self, data) -> None:
        self.inside.children.append(data)
        self.texts.append((self.inside, data))

    def all(self, *tags: str) -> list[Element]:
        """Every element, of these tags where some are named."""
        return self.root.all(*tags)

    @property
    def main(self) -> str:
        """What the page says."""
        return self.all("main")[0].text

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every element with the names of its attributes: what stored text must not change."""
        return [(element.tag, tuple(name for name, _ in element.given)) for element in self.all()]

    def form(self, *names: str) -> Element:
        """The form that posts these controls."""
        found = [
            form
            for form in self.all("form")
            if set(names)
            <= {control["name"] for control in form.all("input", "select", "textarea", "button")}
        ]
        assert len(found) == 1, f"{len(found)} forms have {names}"
        return found[0]


def value_of(control: Element) -> str:
    """What a control sends when nobody touches it."""
    if control.tag == "textarea":
        return control.raw.removeprefix("\n")
    if control.tag == "select":
        options = control.all("option")
        chosen = [option for option in options if "selected" in option.attributes] or options[:1]
        return chosen[0].attributes.get("value", chosen[0].text)
    return control["value"]


def filled(form: Element, **entries: str) -> dict[str, str]:
    """What a form sends when these entries are made in it; buttons send only what is pressed."""
    controls = form.all("input", "select", "textarea")
    fields = {control["name"]: value_of(control) for control in controls if control["name"]}
    pressed = {button["name"] for button in form.all("button")}
    assert set(entries) <= set(fields) | pressed
    return fields | entries


def look(server: Server, path: str, status: int = 200) -> Page:
    """The page at a path, asked for as a browser does."""
    response = server.ask("GET", path, headers=BROWSER)
    assert (response.status_code, response.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    return Page(response.text)


def send(server: Server, path: str, fields: dict[str, str], **headers: str):
    """Post a form's fields, urlencoded, as a browser that follows no redirect."""
    headers = BROWSER | {"Origin": server.url, "Sec-Fetch-Site": "same-origin"} | headers
    return server.session.post(
        server.url + path, data=fields, headers=headers, allow_redirects=False, timeout=30
    )


def fill_in(server: Server, path: str, *names: str, **entries: str) -> str:
    """Fill in the form of a page that has these controls, send it, and return where it leads."""
    form = look(server, path).form(*(names or entries))
    assert form["method"] == "post"
    response = send(server, urljoin(path, form["action"]), filled(form, **entries))
    assert response.status_code == 303, response.text
    assert response.headers["Location"].startswith("/")
    return response.headers["Location"]


def in_html(timestamp: str) -> str:
    """A time as a `time` element has it: HTML knows no microseconds."""
    return timestamp[:23] + "Z"


def page_of(task: dict) -> str:
    """The path of a task's page."""
    return f"/tasks/{task['id']}"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of our own: pages show everything there is, and all their links are followed."""
    running = Server(tmp_path_factory.mktemp("pages") / "monitor.db")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in running.output


@pytest.fixture(scope="module")
def story(server):
    """A task with all there is to show about it."""
    workstream = server.post("/api/workstreams", name="Payments of pages")["id"]
    task = server.post(
        "/api/tasks", workstream_id=workstream, name="Refunds of pages", metadata={"branch": "fix-1"}
    )
    changes = {"status": "blocked", "summary_text": "Waits for the bank", "summary_source": "anna"}
    server.ask("PATCH", f"/api/tasks/{task['id']}", changes)
    server.say(task, "first words")
    details = {"kind": "decision", "level": "warn", "tags": ["api", "two words"], "data": {"depth": [1, 2]}}
    update = server.say(task, "last words\nin two lines", **details)
    return {"workstream": workstream, "task": task, "update": update}


# What they show ----------------------------------------------------------------------------------------


def test_the_home_page_leads_to_the_dashboard(server):
    response = server.ask("GET", "/", headers=BROWSER, allow_redirects=False)
    assert response.status_code in (302, 303, 307, 308)
    assert response.headers["Location"] == "/dashboard"


def test_the_dashboard_shows_workstreams_with_their_tasks_and_newest_words(server, story):
    page = look(server, "/dashboard")
    (group,) = [
        section for section in page.all("section") if "Payments of pages" in section.all("h2")[0].text
    ]
    (row,) = [item for item in group.all("li") if "Refunds of pages" in item.text]
    for words in (f"#{story['task']['number']}", "blocked", "Waits for the bank", "last words", "warn"):
        assert words in row.text
    assert page_of(story["task"]) in [link["href"] for link in row.all("a")]
    assert "first words" not in row.text


def test_the_dashboard_leaves_out_what_is_hidden_or_archived(server):
    hidden, archived = server.new_task("a hidden task"), server.new_task("a task of the archive")
    server.ask("PATCH", f"/api/tasks/{hidden['id']}", {"hidden": True})
    server.ask("PATCH", f"/api/workstreams/{archived['workstream_id']}", {"status": "archived"})
    shown = look(server, "/dashboard").main
    assert "a hidden task" not in shown and "a task of the archive" not in shown
    assert "hidden" in look(server, page_of(hidden)).main
    assert "a task of the archive" in look(server, page_of(archived)).main


def test_an_empty_dashboard_says_how_to_begin(fresh):
    running = fresh()
    page = look(running, "/dashboard")
    assert "monitor workstream create" in page.main
    assert running.url in page.main
    assert fill_in(running, "/dashboard", name="the first") == "/dashboard"
    assert "the first" in look(running, "/dashboard").main
    assert "monitor workstream create" not in look(running, "/dashboard").main


def test_a_task_page_shows_where_it_stands(server, story):
    shown = look(server, page_of(story["task"])).main
    number = f"#{story['task']['number']}"
    for words in (
        number,
        "Refunds of pages",
        "Payments of pages",
        "blocked",
        "Waits for the bank",
        "anna",
        "fix-1",
    ):
        assert words in shown
    assert story["task"]["id"] in shown


def test_a_task_page_shows_where_its_agents_work(server, task, tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/fix-7\n")
    hook = {"hook_event_name": "SessionStart", "session_id": "5a5a5a5a-3", "cwd": str(tmp_path)}
    server.ask("POST", f"/api/hooks/claude?task_id={task['number']}", hook)
    page = look(server, page_of(task))
    assert "claude:5a5a5a5a" in page.main
    assert {"fix-7", str(tmp_path)} <= {code["title"] or code.text for code in page.all("code")}


def test_a_task_page_shows_its_updates_newest_first(server, story):
    page = look(server, page_of(story["task"]))
    rows = [item for item in page.all("li") if item["id"].startswith("u")]
    assert rows[0]["id"] == f"u{story['update']['seq']}"
    assert "first words" in rows[-1].text
    for words in ("last words", "in two lines", "decision", "warn", "api", "two words", "manual", '"depth"'):
        assert words in rows[0].text
    assert in_html(story["update"]["timestamp"]) in [moment["datetime"] for moment in rows[0].all("time")]


def test_a_task_page_is_found_by_number_and_by_the_first_digits(server, story):
    for reference in (story["task"]["number"], story["task"]["id"][:13]):
        assert "Refunds of pages" in look(server, f"/tasks/{reference}").main


def test_the_stream_page_shows_updates_of_all_tasks_newest_first(server, story):
    other = server.new_task("another task of pages")
    newest = server.say(other, "words of another task")
    page = look(server, "/stream")
    rows = [item for item in page.all("li") if item["id"].startswith("u")]
    assert (rows[0]["id"], "another task of pages" in rows[0].text) == (f"u{newest['seq']}", True)
    assert page_of(other) in [link["href"].partition("?")[0] for link in rows[0].all("a")]
    numbers = [int(row["id"][1:]) for row in rows]
    assert numbers == sorted(numbers, reverse=True)
    assert story["update"]["seq"] in numbers


def test_the_stream_page_searches(server, task):
    server.say(task, "a kingfisher was seen")
    server.say(task, "nothing was seen")
    page = look(server, "/stream?q=kingfisher")
    assert "a kingfisher was seen" in page.main and "nothing was seen" not in page.main
    (form,) = [form for form in page.all("form") if form["role"] == "search"]
    assert (form["action"], form["method"], value_of(form.all("input")[0])) == (
        "/stream",
        "get",
        "kingfisher",
    )
    assert look(server, "/stream?q=%22%20OR%20*%20NEAR(").main
    assert look(server, "/stream?q=nosuchwordanywhere").main
    assert look(server, "/stream?q=").main


def test_a_long_message_is_there_to_the_last_letter(server, task):
    message = "\n".join(f"line {count} " + "x" * 40 for count in range(200)) + " the end"
    seq = server.say(task, message)["seq"]
    (row,) = [item for item in look(server, page_of(task)).all("li") if item["id"] == f"u{seq}"]
    parts = [part.raw for part in row.all("div") if part["class"] == "message"]
    assert "".join(parts) == message


@pytest.fixture(scope="module")
def long_thread(server):
    """A task with more updates than a page holds, and their numbers."""
    task = server.new_task("a long thread")
    return task, [server.say(task, f"word {count}")["seq"] for count in range(130)]


@pytest.mark.parametrize("of_task", [True, False], ids=["task", "stream"])
def test_older_updates_are_a_link_away(server, long_thread, of_task):
    task, numbers = long_thread
    path, seen = page_of(task) if of_task else "/stream", []
    while path and not set(numbers) <= set(seen):
        page = look(server, path)
        seen += [int(item["id"][1:]) for item in page.all("li") if item["id"].startswith("u")]
        path = next((urljoin(path, link["href"]) for link in page.all("a") if "Older" in link.text), None)
    assert set(numbers) <= set(seen)
    assert seen == sorted(set(seen), reverse=True)
    if of_task:
        assert (seen[::-1], path) == (numbers, None)


def strip_of(row: Element) -> str:
    """What the strip in a row says."""
    return " ".join(strip["aria-label"] for strip in row.all("svg"))


def test_rows_show_the_activity_of_the_last_hour_and_for_how_long_a_state_lasts(server):
    task, quiet = server.new_task("a busy task"), server.new_task("a quiet task")
    for level in ("info", "error", "info"):
        server.say(task, "at work", level=level)
    changed = server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "blocked"}).json()
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"name": "a busy one"})
    rows = {item["id"]: item for item in look(server, "/dashboard").all("li")}
    row, other = rows[f"t{task['number']}"], rows[f"t{quiet['number']}"]
    assert strip_of(row) == "The last hour: 3 updates, 1 error"
    assert [path["class"] for path in row.all("svg")[0].all("path")] == ["base", "", "bad"]
    assert strip_of(other) == ""
    assert row.all("time")[0]["datetime"] == in_html(changed["updated_at"])
    assert other.all("time")[0]["datetime"] == in_html(quiet["created_at"])
    times = [each["datetime"] for each in look(server, page_of(task)).all("time")]
    assert in_html(changed["updated_at"]) in times


def test_the_strip_of_a_task_leads_to_the_newest_update_of_each_hour(server, task):
    server.say(task, "early", level="error")
    newest = server.say(task, "late")
    (strip,) = [svg for svg in look(server, page_of(task)).all("svg") if svg["class"] == "day-strip"]
    link = strip.all("a")[-1]
    assert link["href"] == f"{page_of(task)}?around={newest['seq']}#u{newest['seq']}"
    assert "this hour" in link["aria-label"] and "update" in link["aria-label"]
    assert "late" in look(server, link["href"].partition("#")[0]).main


def test_what_was_done_to_a_task_stands_in_its_thread(server, task):
    server.say(task, "before")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "done"})
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"summary_text": "not told"})
    home = server.post("/api/workstreams", name="its new home")["id"]
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"workstream_id": home, "name": "its new name"})
    server.say(task, "after", tags=["t"])
    page = look(server, page_of(task))
    rows = [item for item in page.all("li") if item["id"][:1] in ("u", "c")]
    assert [row["class"].strip() for row in rows] == ["update", "change", "change", "update"]
    assert "active → ✓ done" in rows[2].text
    assert "renamed, was a task" in rows[1].text
    assert "moved from a workstream to its new home" in rows[1].text
    assert "not told" not in [row.text for row in rows]
    (_, first) = [row["id"][1:] for row in rows if row["class"].strip() == "update"]
    older = look(server, f"{page_of(task)}?before_seq={int(first) + 1}")
    assert "change" not in [item["class"] for item in older.all("li")]
    filtered = look(server, page_of(task) + "?tag=t")
    assert "change" not in [item["class"] for item in filtered.all("li")]


def test_a_change_stands_on_one_page_of_a_long_thread_only(server):
    task = server.new_task("a thread of two pages")
    for number in range(120):
        server.say(task, f"word {number}")
        if number == 10:
            server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "done"})
    page = look(server, page_of(task))
    assert "change" not in [item["class"] for item in page.all("li")]
    (older,) = [link["href"] for link in page.all("a") if "Older" in link.text]
    assert [item["class"] for item in look(server, older).all("li")].count("change") == 1


def test_of_many_tasks_those_with_news_are_shown_and_a_link_leads_to_all(fresh):
    server = fresh()
    task = server.new_task()
    tasks = [task] + [server.new_task(f"task {n}", task["workstream_id"]) for n in range(209)]
    server.say(task, "news of the oldest")
    page = look(server, "/dashboard")
    rows = [item for item in page.all("li") if "task" in item["class"].split()]
    assert len(rows) == 200 and rows[0]["id"] == f"t{task['number']}"
    (link,) = [link for link in page.all("a") if link.text == "10 more tasks"]
    shown = look(server, link["href"])
    assert len([item for item in shown.all("li") if "task" in item["class"].split()]) == len(tasks)


# The layouts of the stream -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A server with eight tasks, each with three updates of its own, the last with 30 more."""
    running = Server(tmp_path_factory.mktemp("busy") / "monitor.db")
    workstream = running.post("/api/workstreams", name="busy")["id"]
    tasks = [running.new_task(f"task of lane {n}", workstream) for n in range(1, 9)]
    for task in tasks:
        for level in ("info", "warn", "info"):
            running.say(task, f"{level} of lane {task['number']}", level=level)
    for number in range(30):
        running.say(tasks[-1], f"flood {number}")
    yield running
    running.stop()


def lanes_of(page: Page) -> list[int]:
    """The numbers of the tasks that have a lane, as they stand."""
    return [int(part["id"][1:]) for part in page.all("section") if re.fullmatch(r"l\d+", part["id"])]


def test_a_lane_a_task_at_most_six_the_latest_first(busy):
    page = look(busy, "/stream?layout=lanes")
    assert lanes_of(page) == [8, 7, 6, 5, 4, 3]
    rows = [len([li for li in lane.all("li") if li["id"][:1] == "u"]) for lane in page.all("section")]
    assert rows == [20, 3, 3, 3, 3, 3]


def test_lanes_are_pinned_and_keep_their_places(busy):
    page = look(busy, "/stream?layout=lanes&pin=1,5")
    assert lanes_of(page) == [1, 5, 8, 7, 6, 4]
    (pinned,) = [link for link in page.all("a") if link["aria-label"] == "Unpin #1"]
    assert "pin=5" in pinned["href"]
    (pin,) = [link for link in page.all("a") if link["aria-label"] == "Pin #8"]
    assert lanes_of(look(busy, pin["href"])) == [1, 5, 8, 7, 6, 4]
    assert lanes_of(look(busy, "/stream?layout=lanes&pin=1&fixed=true")) == [1, 4, 5, 6, 7, 8]
    assert lanes_of(look(busy, "/stream?layout=lanes&pin=99999,zz")) == [8, 7, 6, 5, 4, 3]


def test_lanes_and_groups_hold_what_the_filters_leave(busy):
    page = look(busy, "/stream?layout=lanes&level=warn&pin=2")
    assert lanes_of(page)[0] == 2
    assert "warn of lane 2" in page.main and "info of lane 2" not in page.main
    grouped = look(busy, "/stream?layout=grouped&level=warn")
    heads = [part.all("h2")[0].text for part in grouped.all("section")]
    assert heads == [f"#{n} task of lane {n}" for n in range(8, 0, -1)]
    assert "info of lane" not in grouped.main


def test_what_came_since_is_counted_and_what_a_page_skips_is_linked(busy):
    seqs = [update["seq"] for update in busy.get("/api/updates", limit=200)["items"]]
    first = busy.get("/api/updates", limit=1)["items"][0]["seq"]
    page = look(busy, f"/stream?seen={first}")
    (news,) = [part for part in page.all("p") if part["id"] == "news"]
    assert news["data-count"] == str(len(seqs) - 1)
    assert not [part for part in page.all("p") if part["id"] == "skipped"]
    task = busy.get("/api/tasks")["items"][-1]
    for number in range(120):
        busy.say(task, f"burst {number}", tags=["burst"])
    (skipped,) = [part for part in look(busy, f"/stream?seen={seqs[-1]}").all("p") if part["id"] == "skipped"]
    assert skipped.text.startswith("Skipped 20 updates")
    rest = look(busy, skipped.all("a")[0]["href"])
    assert (
        "burst 19" in rest.main and "burst 20" not in rest.main and "seen" not in skipped.all("a")[0]["href"]
    )
    (few,) = [
        part for part in look(busy, f"/stream?tag=none&seen={seqs[-1]}").all("p") if part["id"] == "news"
    ]
    assert few["data-count"] == "0"


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("?layout=lanes&before_seq=99999", ""),
        ("?task_id=8&level=warn&source=manual&kind=&fixed=true", " --task 8 --source manual --level warn"),
        ("?tag=two+words&tag=it%27s", " --tag 'two words' --tag 'it'\"'\"'s'"),
        ("?workstream_id=1234abcd&kind=$(reboot)", " --workstream 1234abcd --kind '$(reboot)'"),
    ],
)
def test_the_stream_page_tells_the_command_that_follows_the_same(busy, query, line):
    shown = look(busy, "/stream" + query).all("pre")[0].raw.splitlines()
    assert shown[0] == f"monitor watch --server {busy.url}{line}"
    assert shown[1].startswith("curl -s ") and "layout" not in shown[1] + shown[2]


def test_a_search_is_followed_by_no_command(busy):
    assert "monitor watch" not in look(busy, "/stream?q=flood").main


# What they filter --------------------------------------------------------------------------------------


def chips(page: Page, label: str) -> dict[str, Element]:
    """The chips of a list, by their text."""
    (found,) = [each for each in page.all("ul") if each["aria-label"] == label]
    return {link.text.replace("✓ ", ""): link for link in found.all("a")}


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A server with two workstreams and a task of every status, one that asks, one hidden, one archived."""
    running = Server(tmp_path_factory.mktemp("crowd") / "monitor.db")
    api, app = (running.post("/api/workstreams", name=name)["id"] for name in ("The API", "The app"))
    tasks = {}
    names = {"open pears": api, "stuck plums": api, "eaten figs": api, "open plums": app, "hidden nuts": app}
    for name, workstream in names.items():
        tasks[name] = running.post("/api/tasks", workstream_id=workstream, name=name)
    for name, change in {
        "stuck plums": {"status": "blocked"},
        "eaten figs": {"status": "done"},
        "hidden nuts": {"hidden": True},
    }.items():
        running.ask("PATCH", f"/api/tasks/{tasks[name]['id']}", change)
    old = running.new_task("archived peas")
    running.ask("PATCH", f"/api/workstreams/{old['workstream_id']}", {"status": "archived"})
    hook = {
        "hook_event_name": "PermissionRequest",
        "session_id": "5a5a5a5a-1",
        "cwd": "/tmp/x",
        "tool_name": "Bash",
    }
    hook["tool_input"] = {"command": "git push"}
    running.ask("POST", f"/api/hooks/claude?task_id={tasks['open pears']['number']}", hook)
    yield running, tasks, {"api": api, "app": app}
    assert running.stop() == 0


def test_a_question_stands_there_verbatim_with_who_asks_and_since_when(fresh):
    server, command = (
        fresh(),
        "make deploy " + "\n".join(f"step {number} " + "x" * 60 for number in range(60)),
    )
    hook = {"session_id": "5a5a5a5a-2", "cwd": "/tmp/x", "hook_event_name": "PermissionRequest"}
    hook |= {"tool_name": "Bash", "tool_input": {"command": command}}
    server.ask("POST", "/api/hooks/claude", hook)
    asked = server.get("/api/tasks")["items"][0]["attention"]
    (row,) = [item for item in look(server, "/dashboard").all("li") if item["id"] == "a1"]
    parts = [part.raw for part in row.all("div") if part["class"] == "message"]
    assert "".join(parts) == asked["message"]
    assert "claude:5a5a5a5a" in row.text
    assert in_html(asked["since"]) in [moment["datetime"] for moment in row.all("time")]


def names_on(page: Page) -> list[str]:
    """The tasks in the dashboard's rows, in order."""
    rows = [item for item in page.all("li") if item["class"].startswith("task ")]
    return [link.text for row in rows for link in row.all("a") if link["class"] == "name"]


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["open pears", "stuck plums", "eaten figs", "open plums"]),
        ("?status=done", ["eaten figs"]),
        ("?q=plums", ["stuck plums", "open plums"]),
        ("?q=plums&status=active", ["open plums"]),
        ("?attention=blocked,failed", ["open pears"]),
        ("?workstream_id={app}", ["open plums"]),
        ("?workstream_id={app}&include_hidden=true", ["open plums", "hidden nuts"]),
        ("?group=none", ["open pears", "stuck plums", "open plums", "eaten figs"]),
        ("?group=status", ["stuck plums", "open pears", "open plums", "eaten figs"]),
        ("?status=&q=&group=", ["open pears", "stuck plums", "eaten figs", "open plums"]),
        (
            "?include_hidden=true&include_archived=true&group=none",
            ["open pears", "stuck plums", "open plums", "hidden nuts", "archived peas", "eaten figs"],
        ),
        ("?source=claude", ["open pears"]),
        ("?source=claud", []),
        ("?q=melons", []),
    ],
)
def test_the_dashboard_shows_what_its_address_says(crowd, query, names):
    server, _, workstreams = crowd
    assert names_on(look(server, "/dashboard" + query.format(**workstreams))) == names


def test_a_chip_says_how_many_it_leaves_and_keeps_the_other_filters(crowd):
    server, _, _ = crowd
    page = look(server, "/dashboard?q=plums&group=none")
    found = chips(page, "Status")
    assert set(found) == {"● active 1", "■ blocked 1"}
    assert set(chips(page, "Workstream")) == {"The API 1", "The app 1"}
    page = look(server, urljoin("/dashboard", found["■ blocked 1"]["href"]))
    assert names_on(page) == ["stuck plums"]
    assert set(chips(page, "Workstream")) == {"The API 1", "The app 0"}
    chip = chips(page, "Status")["■ blocked 1"]
    assert chip["aria-current"] == "true"
    assert chip["href"] == "/dashboard?q=plums&group=none"
    (clear,) = [link["href"] for link in page.all("a") if link.text == "Clear the filters"]
    assert clear == "/dashboard?group=none"
    form = next(form for form in page.all("form") if form["class"] == "find")
    assert filled(form) == {"q": "plums", "group": "none", "status": "blocked"}


def test_who_asks_is_named_with_the_time_since_when(crowd):
    server, tasks, _ = crowd
    page = look(server, "/dashboard")
    (strip,) = [item for item in page.all("li") if item["id"] == f"a{tasks['open pears']['number']}"]
    assert "git push" in strip.text and "claude:5a5a5a5a" in strip.text and strip.all("time")
    (row,) = [item for item in page.all("li") if item["id"] == f"t{tasks['open pears']['number']}"]
    assert [each.all("time") != [] for each in row.all("span") if each["class"] == "asks"] == [True]
    (state,) = [each.text for each in row.all("span") if each["class"] == "state"]
    assert "waiting for you" in state and "active" not in state
    page = look(server, page_of(tasks["open pears"]))
    (box,) = [each for each in page.all("section") if "attention-box" in each["class"]]
    assert "claude:5a5a5a5a" in box.text
    folder = server.get("/api/sessions", task_id=tasks["open pears"]["id"])["items"][0]["folder"]
    assert f"in {folder}" in " ".join(box.text.split())  # which of his terminals to go to
    run, said = box.all("a")
    assert run["href"][1:] in [item["id"] for item in page.all("li")]
    assert said["href"].partition("#")[2] in [item["id"] for item in look(server, said["href"]).all("li")]


def test_of_what_is_over_a_row_tells_the_outcome_and_not_the_last_word(server):
    task = server.new_task("it is over")
    server.say(task, "the last word")
    server.ask("PATCH", f"/api/tasks/{task['id']}", {"status": "done", "summary_text": "the outcome"})
    (row,) = [item for item in look(server, "/dashboard").all("li") if item["id"] == f"t{task['number']}"]
    assert "the outcome" in row.text and "the last word" not in row.text


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/dashboard?status=finished", "status"),
        ("/dashboard?group=colour", "group"),
        ("/dashboard?workstream_id=00000000", "workstream"),
        ("/stream?level=fatal", "level"),
        ("/tasks/1?around=x", "around"),
    ],
)
def test_a_wrong_filter_is_told(crowd, path, word):
    assert word in look(crowd[0], path, 404 if "0000" in path else 400).main


@pytest.fixture(scope="module")
def worked(server):
    """A task whose thread holds tool calls of two runs, between words."""
    task = server.new_task("much was done")
    kinds = ["tool_use", "file_change", "tool_failure", "tool_use"]
    for source in ("claude:one", "claude:two"):
        for kind in kinds:
            level = "error" if kind == "tool_failure" else "info"
            fields = {
                "source": source,
                "kind": kind,
                "level": level,
                "tags": [kind, "a b"],
                "message": f"{kind} run",
            }
            server.post("/api/updates", task_id=task["id"], **fields)
    said = server.say(task, "words between")
    for _ in range(2):
        server.post("/api/updates", task_id=task["id"], source="claude:one", kind="tool_use", message="after")
    return task, said


def test_tool_calls_of_one_run_in_a_row_are_folded(server, worked):
    task, said = worked
    page = look(server, page_of(task))
    folds = [item for item in page.all("li") if item["class"].startswith("fold")]
    assert [fold.all("b")[0].text for fold in folds] == ["4 tool calls", "4 tool calls"]
    assert all("1 error" in fold.all("summary")[0].text for fold in folds)
    rows = [int(item["id"][1:]) for item in page.all("li") if item["id"].startswith("u")]
    assert len(rows) == 11 and rows == sorted(rows, reverse=True)
    inner = [row["id"] for fold in folds for row in fold.all("li") if row["id"]]
    assert f"u{said['seq']}" not in inner and len(inner) == 8
    (details,) = [each for each in folds[0].all("details") if each["id"]]
    assert details["id"] == "f" + inner[3][1:] and "open" not in details.attributes
    opened = look(server, f"{page_of(task)}?around={inner[1][1:]}")
    assert [each["id"] for each in opened.all("details") if "open" in each.attributes] == [details["id"]]


def test_what_a_command_put_out_reads_as_it_stood_there(server, task):
    output = "line 1\n  line 2: 'quoted' <b>"
    seq = server.say(task, "make: exit status 2", level="error", data={"output": output})["seq"]
    quiet = server.say(task, "make: exit status 0", data={"output": "all is well"})["seq"]
    page = look(server, page_of(task))
    rows = {item["id"]: item for item in page.all("li") if item["id"]}
    assert rows[f"u{seq}"].all("pre")[0].raw == output
    folds = [next(iter(rows[f"u{n}"].all("details"))) for n in (seq, quiet)]
    assert [fold.all("summary")[0].text for fold in folds] == ["output", "output"]
    assert ["open" in fold.attributes for fold in folds] == [True, False]  # of a failure it is what one wants


def test_a_tag_leads_to_the_updates_that_have_it(server, worked):
    task, _ = worked
    page = look(server, page_of(task))
    (lead, *_) = [link["href"] for link in page.all("a") if link.text == "tool_failure"]
    page = look(server, lead)
    rows = [item for item in page.all("li") if item["id"].startswith("u")]
    assert len(rows) == 2 and all("tool_failure" in row.text for row in rows)
    assert [link["href"] for link in page.all("a") if "take it off" in link.text] == [page_of(task)]
    assert "No update fits" in look(server, page_of(task) + "?tag=nothing").main


def test_a_task_is_kept_as_markdown_and_as_json(server, story):
    path = page_of(story["task"])
    markdown, whole = (server.ask("GET", f"{path}.{style}", headers=BROWSER) for style in ("md", "json"))
    number = story["task"]["number"]
    for response, style in ((markdown, "md"), (whole, "json")):
        assert response.headers["Content-Disposition"] == f'attachment; filename="task-{number}.{style}"'
    assert markdown.headers["Content-Type"] == "text/markdown; charset=utf-8"
    lines = markdown.text.splitlines()
    assert lines[0] == f"# #{number} Refunds of pages"
    assert lines.index("  first words") < lines.index("  last words") == lines.index("  in two lines") - 1
    found = whole.json()
    assert found["task"] == server.get("/api" + path)
    assert found["updates"] == server.get("/api/updates", task_id=story["task"]["id"])["items"]
    for style in ("md", "json"):
        assert server.ask("GET", f"/tasks/00000000.{style}").status_code == 404


def test_the_stream_page_filters(server, worked):
    task, _ = worked
    query = f"/stream?task_id={task['number']}&source=claude:two&level=error&kind=&tag=&q="
    page = look(server, query)
    rows = [item for item in page.all("li") if item["id"].startswith("u")]
    assert ["tool_failure run" in row.text for row in rows] == [True]
    form = page.form("level", "kind")
    wanted = {
        "task_id": str(task["number"]),
        "source": "claude:two",
        "level": "error",
        "kind": "",
        "tag": "",
        "q": "",
    }
    assert filled(form) == wanted
    (off,) = [link for link in page.all("a") if link.text.startswith("Level: error")]
    assert off["href"] == f"/stream?task_id={task['number']}&source=claude%3Atwo"
    assert "Clear all" in page.main


def test_the_words_that_were_searched_for_are_marked(server, task):
    server.say(task, "Quokka-like <b> quokkas, a QUOKKA like no other: caf\u00e9")
    page = look(server, "/stream?q=quokka+like+caf\u00e9+%28+.*")
    assert [mark.text for mark in page.all("mark")] == ["Quokka", "like", "QUOKKA", "like", "caf\u00e9"]
    page = look(server, "/stream?q=quokka-like")
    assert [mark.text for mark in page.all("mark")] == ["Quokka-like", "QUOKKA like"]
    assert "Quokka-like <b> quokkas" in page.main
    assert look(server, "/stream?q=%28").all("mark") == []


def test_a_filtered_stream_is_there_as_a_file_and_for_curl(server, worked):
    task, _ = worked
    page = look(server, f"/stream?task_id={task['id']}&level=error&before_seq=999999")
    (file,) = [link["href"] for link in page.all("a") if "Download" in link.text]
    response = server.ask("GET", file)
    assert response.headers["Content-Type"].partition(";")[0] == "application/x-ndjson"
    listed = server.get("/api/updates", task_id=task["id"], level="error")["items"]
    assert [json.loads(line) for line in response.text.splitlines()] == listed and listed
    command, follow = re.findall(r"'(http[^']+)'", page.all("pre")[-1].text)
    assert command == server.url + file
    assert follow.startswith(server.url + "/api/stream?") and "level=error" in follow


def test_a_row_of_the_stream_leads_into_its_thread(server, long_thread):
    task, numbers = long_thread
    wanted = numbers[70]
    page = look(server, f"/stream?task_id={task['id']}&before_seq={wanted + 1}")
    (lead,) = [link["href"] for link in page.all("a") if link["href"].endswith(f"#u{wanted}")]
    page = look(server, lead)
    rows = [int(item["id"][1:]) for item in page.all("li") if item["id"].startswith("u")]
    assert rows[0] > wanted > rows[-1] and len(rows) == 100
    assert numbers.index(rows[0]) - 70 in (49, 50)
    assert [link["href"] for link in page.all("a") if link.text == "Newest updates"] == [page_of(task)]


# What they do ------------------------------------------------------------------------------------------


def test_a_workstream_and_a_task_are_made_by_form(server):
    page = look(server, "/dashboard")
    (form,) = [form for form in page.all("form") if form["action"] == "/workstreams"]
    assert send(server, "/workstreams", filled(form, name="made by form")).headers["Location"] == "/dashboard"
    page = look(server, "/dashboard")
    (group,) = [
        section for section in page.all("section") if "made by form" in section.text.partition("0 open")[0]
    ]
    (form,) = [form for form in group.all("form") if form["action"] == "/tasks"]
    response = send(server, form["action"], filled(form, name="a task by form"))
    assert response.status_code == 303
    task = server.get("/api" + response.headers["Location"])
    assert (task["name"], task["status"]) == ("a task by form", "active")
    assert "a task by form" in look(server, response.headers["Location"]).main


def test_a_workstream_is_renamed_archived_and_taken_back_by_form(fresh):
    server = fresh()
    task = server.new_task()
    place = f"/workstreams/{task['workstream_id']}"

    def fill(path: str, **entries: str) -> Page:
        forms = [form for form in look(server, path).all("form") if form["action"] == place]
        (form,) = [
            form for form in forms if entries.keys() <= {one["name"] for one in form.all("input", "button")}
        ]
        assert send(server, place, filled(form, **entries)).headers["Location"] == "/dashboard"
        return look(server, "/dashboard")

    assert "a better name" in fill("/dashboard", name="a better name").main
    assert "a better name" not in fill("/dashboard", status="archived").main
    assert "a better name" in fill("/dashboard?include_archived=true", status="active").main


@pytest.mark.parametrize("status", ["blocked", "done", "cancelled"])
def test_the_status_is_changed_by_a_button_and_back(server, task, status):
    path = page_of(task)
    buttons = [button["value"] for button in look(server, path).form("status").all("button")]
    assert sorted(buttons) == ["blocked", "cancelled", "done"]
    assert fill_in(server, path, status=status) == path
    assert server.get("/api" + path)["status"] == status
    assert fill_in(server, path, status="active") == path
    assert server.get("/api" + path)["status"] == "active"


def test_the_summary_is_written_kept_and_cleared(server, task):
    path = page_of(task)
    fill_in(server, path, summary_text="\r\nHalf <done>\r\n& more")
    assert server.get("/api" + path)["summary_text"].strip() == "Half <done>\n& more"
    assert server.get("/api" + path)["summary_source"] == "manual"
    before = server.get("/api" + path)["summary_text"]
    fill_in(server, path, "summary_text")
    assert server.get("/api" + path)["summary_text"] == before
    fill_in(server, path, summary_text="")
    assert "summary_text" not in server.get("/api" + path)


def test_a_task_is_renamed(server, task):
    assert fill_in(server, page_of(task), name='new "name" &amp;') == page_of(task)
    assert server.get("/api" + page_of(task))["name"] == 'new "name" &amp;'
    assert value_of(look(server, page_of(task)).form("name").all("input")[0]) == 'new "name" &amp;'


def test_a_task_is_moved(server, task):
    target = server.post("/api/workstreams", name="the new home")["id"]
    form = look(server, page_of(task)).form("workstream_id")
    assert value_of(form.all("select")[0]) == task["workstream_id"]
    fill_in(server, page_of(task), workstream_id=target)
    assert server.get("/api" + page_of(task))["workstream_id"] == target


def test_a_task_is_hidden_and_shown_again(server, task):
    for value in ("true", "false"):
        (button,) = look(server, page_of(task)).form("hidden").all("button")
        assert button["value"] == value
        fill_in(server, page_of(task), hidden=value)
        assert ("hidden_at" in server.get("/api" + page_of(task))) == (value == "true")


def test_an_update_is_added_with_all_its_fields(server, task):
    details = {
        "message": "one\r\ntwo \u20ac",
        "level": "error",
        "kind": "decision",
        "tags": " api, , release x,",
    }
    lead = fill_in(server, page_of(task), **details)
    (update,) = server.get("/api/updates", task_id=task["id"])["items"]
    assert lead == f"{page_of(task)}#u{update['seq']}"
    assert (update["message"], update["source"], update["level"]) == ("one\ntwo \u20ac", "manual", "error")
    assert (update["kind"], update["tags"]) == ("decision", ["api", "release x"])


def test_an_update_needs_nothing_but_a_message(server, task):
    fill_in(server, page_of(task), message="just this")
    (update,) = server.get("/api/updates", task_id=task["id"])["items"]
    assert (update["message"], update["tags"]) == ("just this", [])
    assert {"level", "data"} & set(update) == set()


def test_a_form_takes_the_longest_message_that_the_api_takes(server, task):
    longest = "\u20ac" * 65536
    response = send(server, page_of(task) + "/updates", {"message": longest})
    assert response.status_code == 303, response.text
    assert server.get("/api/updates", task_id=task["id"])["items"][0]["message"] == longest


# What they refuse --------------------------------------------------------------------------------------

WRONG = {
    "an empty name": ("/workstreams", {"name": " "}, 400, "name"),
    "no name": ("/tasks", {"workstream_id": "1"}, 400, "name"),
    "an unknown workstream": ("/tasks", {"workstream_id": "0" * 8, "name": "x"}, 404, "workstream"),
    "an unknown status": ("/tasks/{}", {"status": "finished"}, 400, "status"),
    "an unknown level": ("/tasks/{}/updates", {"message": "x", "level": "fatal"}, 400, "level"),
    "an empty message": ("/tasks/{}/updates", {"message": "  "}, 400, "message"),
    "an unknown task": ("/tasks/00000000", {"name": "x"}, 404, "00000000"),
    "a name of NUL": ("/workstreams", {"name": "\0"}, 400, "NUL"),
    "a name too long": ("/workstreams", {"name": "x" * 501}, 400, "500"),
    "too many tags": (
        "/tasks/{}/updates",
        {"message": "x", "tags": ",".join(map(str, range(101)))},
        400,
        "tags",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_form_is_refused_with_a_page_that_says_why(server, task, name):
    path, fields, status, word = WRONG[name]
    response = send(server, path.format(task["id"]), fields)
    assert (response.status_code, response.headers["Content-Type"]) == (status, "text/html; charset=utf-8")
    assert word in Page(response.text).main
    assert server.get("/api/updates", task_id=task["id"])["total"] == 0


def test_a_form_that_is_too_large_or_not_a_form_is_refused(server, task):
    path = page_of(task) + "/updates"
    assert send(server, path, {"message": "x" * 2_000_000}).status_code == 413
    assert (
        send(server, path, json.dumps({"message": "x"}), **{"Content-Type": "application/json"}).status_code
        == 415
    )
    assert send(server, path, "message=x", **{"Content-Type": "text/plain"}).status_code == 415
    files = {"message": (None, "x")}
    response = server.session.post(server.url + path, files=files, headers=BROWSER, timeout=30)
    assert response.status_code == 415
    assert server.get("/api/updates", task_id=task["id"])["total"] == 0


@pytest.mark.parametrize(
    "raw", [b"message=%FF%FE", b"message=\xff", b"%", b"=&=&", b"message=a;message=b", b""]
)
def test_bytes_that_are_no_form_do_no_harm(server, task, raw):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert send(server, page_of(task) + "/updates", raw, **headers).status_code in (303, 400)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "rebound.example"},
    ],
    ids=str,
)
def test_a_form_of_another_site_is_refused(server, task, headers):
    response = send(server, page_of(task), {"status": "done"}, **headers)
    assert (response.status_code, response.headers["Content-Type"]) == (403, "text/html; charset=utf-8")
    assert server.get("/api" + page_of(task))["status"] == "active"


UNKNOWN = [
    "/nothing",
    "/tasks/00000000",
    "/tasks/99999999",
    "/tasks/x",
    "/static/nothing.css",
    "/tasks/1/nothing",
]


@pytest.mark.parametrize("path", UNKNOWN)
def test_an_unknown_page_is_a_page_for_a_browser_and_json_for_others(server, path):
    page = look(server, path, 404)
    assert "/dashboard" in [link["href"] for link in page.all("a")]
    assert "Not found" in page.main
    for accept in ("*/*", "application/json"):
        response = server.ask("GET", path, headers={"Accept": accept})
        assert (response.status_code, response.json()["error"]) == (404, "not_found")


def test_the_api_answers_a_browser_in_json_too(server):
    response = server.ask("GET", "/api/tasks/00000000", headers=BROWSER)
    assert (response.status_code, response.json()["error"]) == (404, "not_found")


def test_other_errors_are_pages_too(server):
    assert "before_seq" in look(server, "/stream?before_seq=x", 400).main
    response = server.ask("DELETE", "/dashboard", headers=BROWSER | {"Origin": server.url})
    assert response.status_code == 405
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert Page(response.text).main


# Hostile text ------------------------------------------------------------------------------------------


def dressed(server: Server, text: str) -> tuple[dict, str]:
    """A task whose every text is `text`, and the source that its update names."""
    workstream = server.post("/api/workstreams", name=text, metadata={text: text})["id"]
    task = server.post("/api/tasks", workstream_id=workstream, name=text, metadata={text: [text]})
    changes = {"summary_text": text, "summary_source": text[:200]}
    assert server.ask("PATCH", f"/api/tasks/{task['id']}", changes).status_code == 200
    fields = {
        "source": text[:200],
        "kind": text[:200],
        "level": "warn",
        "tags": [text[:200]],
        "data": {text: [text]},
    }
    server.post("/api/updates", task_id=task["id"], message=text, **fields)
    return task, text


DRESSED = ("/dashboard", "/dashboard?group=none", "/tasks/1", "/stream", "/stream?level=warn")


@pytest.fixture(scope="module")
def dressed_pages(tmp_path_factory):
    """The same pages with harmless and with hostile text, each from a server of its own."""
    pages = {}
    for name, text in (("harmless", "x" * len(HOSTILE)), ("hostile", HOSTILE)):
        running = Server(tmp_path_factory.mktemp(name) / "monitor.db")
        dressed(running, text)
        paths = (*DRESSED, "/nothing")
        pages[name] = {path: look(running, path, 404 if path == "/nothing" else 200) for path in paths}
        assert running.stop() == 0
    return pages


@pytest.mark.parametrize("path", DRESSED)
def test_hostile_text_changes_nothing_of_the_markup(dressed_pages, path):
    assert dressed_pages["hostile"][path].shape == dressed_pages["harmless"][path].shape


@pytest.mark.parametrize("path", DRESSED)
def test_hostile_text_is_shown_as_it_is(dressed_pages, path):
    shown = [data for _, data in dressed_pages["hostile"][path].texts]
    assert any(HOSTILE in data for data in shown)


@pytest.mark.parametrize("path", DRESSED)
def test_text_that_turns_the_writing_direction_turns_only_itself(dressed_pages, path):
    for element, data in dressed_pages["hostile"][path].texts:
        if set(BIDI) & set(data):
            around = list(element.up())
            isolated = any(one.tag in ("bdi", "title", "option") or one["dir"] == "auto" for one in around)
            assert isolated, f"<{element.tag} class={element['class']!r}>: {data.strip()[:30]}"


def test_a_hostile_path_or_search_is_shown_as_it_is(server):
    hostile = "%3Cscript%3Ealert(1)%3C/script%3E%22%27"
    plain = """<script>alert(1)</script>"'"""
    page = look(server, f"/stream?q={hostile}")
    assert {value_of(field) for field in page.all("input") if field["name"] == "q"} == {plain}
    for path in (f"/stream?q={hostile}", f"/nothing{hostile}", f"/tasks/{hostile}"):
        page = look(server, path, 200 if "stream" in path else 404)
        assert [script for script in page.all("script") if not script["src"]] == []
    assert [line for line in server.ask("GET", f"/x{hostile}%0d%0aX-Y:z").headers if line == "X-Y"] == []


def test_an_address_from_a_payload_is_a_link_only_to_the_web(server, story):
    for path in ("/dashboard", "/stream", page_of(story["task"])):
        for link in look(server, path).all("a"):
            assert link["href"].startswith(("/", "#", "?", "http://", "https://")), link["href"]


# How they are made -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every_page(server, story):
    """Every kind of page."""
    paths = {
        "/dashboard": 200,
        page_of(story["task"]): 200,
        "/stream": 200,
        "/stream?q=words": 200,
        "/stream?level=warn&tag=api&tag=two+words": 200,
        "/stream?kind=nothing": 200,
        "/dashboard?group=status&include_hidden=true&include_archived=true": 200,
        "/dashboard?group=none&q=pages&status=blocked": 200,
        "/dashboard?q=nothing_like_it": 200,
        page_of(story["task"]) + "?tag=api&around=" + str(story["update"]["seq"]): 200,
        "/login": 200,
        "/docs": 200,
    }
    return {path: look(server, path, status) for path, status in (paths | {"/nothing": 404}).items()}


SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


@pytest.mark.parametrize(
    "path", ["/dashboard", "/tasks/1", "/stream", "/nothing", "/static/style.css", "/api/tasks"]
)
def test_every_answer_has_the_security_headers_once(server, story, path):
    headers = server.ask("GET", path, headers=BROWSER).raw.headers
    for name, value in SECURITY.items():
        assert headers.getlist(name) == [value]
    (policy,) = headers.getlist("Content-Security-Policy")
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["frame-ancestors"] == "'none'"
    assert rules["base-uri"] == "'none'" and rules["form-action"] == "'self'"
    assert "unsafe" not in policy and "*" not in policy and "http" not in policy
    assert "Server" not in headers or not re.search(r"\d", headers["Server"])


def test_no_page_has_script_or_style_of_its_own(every_page):
    for page in every_page.values():
        assert page.all("style") == []
        assert [script for script in page.all("script") if not script["src"].startswith("/static/")] == []
        given = {name for element in page.all() for name in element.attributes}
        assert {name for name in given if name == "style" or name.startswith("on")} == set()


def test_no_html_is_made_in_javascript():
    for name in ("live.js", "page.js", "stream.js"):
        text = (ROOT / "static" / name).read_text()
        assert (
            re.findall(r"innerHTML|outerHTML =|insertAdjacent|createElement|document\.write", text) == []
        ), name


def test_a_page_needs_nothing_from_elsewhere(every_page):
    for page in every_page.values():
        files = page.all("link", "script", "img", "source", "iframe", "object", "embed")
        wanted = [element["href"] or element["src"] for element in files]
        assert wanted and all(re.match(r"/(?!/)", address) for address in wanted)


def test_every_link_within_leads_somewhere(server, every_page):
    found = set()
    for path, page in every_page.items():
        names = {element["id"] for element in page.all() if element["id"]}
        for element in page.all("a", "link", "img", "script"):
            address = element["href"] or element["src"]
            if address.startswith("#"):
                assert address[1:] in names, f"{address} on {path}"
            elif address.startswith(("/", "?")):
                found.add(urljoin(path, address).partition("#")[0])
    assert {address: server.ask("GET", address).status_code for address in found} == dict.fromkeys(found, 200)


def test_every_control_has_a_label_and_every_label_a_control(every_page):
    for path, page in every_page.items():
        controls = [
            one for one in page.all("input", "select", "textarea") if one["type"] not in ("hidden", "submit")
        ]
        labels = {label["for"] for label in page.all("label") if label.text}
        for control in controls:
            wrapped = any(one.tag == "label" for one in control.up())
            assert wrapped or control["id"] in labels or control["aria-label"], f"{control['name']} on {path}"
        assert labels <= {control["id"] for control in controls}, path


def test_every_button_link_and_picture_has_a_name(every_page):
    for path, page in every_page.items():
        for element in page.all("button", "a", "summary"):
            assert element.text or element["aria-label"], f"<{element.tag}> on {path}"
        assert [image for image in page.all("img") if "alt" not in image.attributes] == []
        for form in page.all("form"):
            assert form.all("button") and form["action"].startswith("/"), f"<form> on {path}"


def test_every_id_is_there_once_and_what_is_pointed_at_is_there(every_page):
    for path, page in every_page.items():
        names = [element["id"] for element in page.all() if "id" in element.attributes]
        assert len(names) == len(set(names)), path
        for element in page.all():
            pointed = (
                element["aria-labelledby"] + " " + element["aria-describedby"] + " " + element["list"]
            ).split()
            assert set(pointed) <= set(names), f"{pointed} on {path}"


def test_every_page_has_its_landmarks(every_page):
    for path, page in every_page.items():
        (html,) = page.all("html")
        assert html["lang"] == "en"
        assert len(page.all("head")[0].all("title")) == 1, path  # a picture may have one, too
        assert [len(page.all(tag)) for tag in ("main", "h1")] == [1, 1], path
        assert page.all("title")[0].text.endswith("Monitor")
        levels = [int(heading.tag[1]) for heading in page.all("h1", "h2", "h3", "h4")]
        assert all(after <= before + 1 for before, after in pairwise(levels)), path
    titles = [
        page.all("title")[0].text
        for path, page in every_page.items()
        if "&" not in path and "nothing" not in path
    ]
    assert len(set(titles)) == len(titles)


def test_a_link_does_not_stand_in_a_link(every_page):
    interactive = ("a", "button", "input", "select", "textarea", "label", "summary")
    for path, page in every_page.items():
        for element in page.all("a", "button"):
            assert element.all(*interactive) == [], f"{element.text} on {path}"


def test_no_page_asks_for_a_token_that_is_not_needed(server, every_page):
    assert all("Set-Cookie" not in server.ask("GET", path).headers for path in every_page)


# Logging in --------------------------------------------------------------------------------------------


@pytest.fixture
def closed(fresh):
    """A server that wants a token for everything."""
    return fresh(MONITOR_AUTH_MODE="strict", MONITOR_API_TOKENS="s3cret,other")


def test_a_browser_is_led_to_the_login_and_back(closed):
    response = closed.ask("GET", "/stream?q=a%20b", headers=BROWSER, allow_redirects=False)
    lead = response.headers["Location"]
    assert response.status_code == 303 and lead.startswith("/login?next=")
    form = look(closed, lead).form("token")
    assert "password" in [control["type"] for control in form.all("input")]
    response = send(closed, form["action"], filled(form, token=" s3cret "))
    assert (response.status_code, response.headers["Location"]) == (303, "/stream?q=a%20b")
    cookie = response.headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "s3cret" not in cookie
    assert look(closed, "/stream?q=a%20b").main


def test_a_session_reads_writes_and_ends(closed):
    send(closed, "/login", {"token": "other", "next": "/dashboard"})
    assert fill_in(closed, "/dashboard", name="made in a session") == "/dashboard"
    assert closed.get("/api/workstreams")["total"] == 1
    missing = Page(closed.ask("GET", "/tasks/404", headers=BROWSER).text)
    for page in (look(closed, "/dashboard"), missing):
        (form,) = [form for form in page.all("form") if form["action"] == "/logout"]
    cookies = closed.session.cookies.copy()
    assert send(closed, "/logout", filled(form)).status_code == 303
    assert closed.ask("GET", "/api/workstreams").status_code == 401
    closed.session.cookies = cookies
    assert closed.ask("GET", "/api/workstreams").status_code == 401, "the session has ended for good"


def test_a_session_is_no_use_to_another_site(closed):
    send(closed, "/login", {"token": "s3cret"})
    assert send(closed, "/workstreams", {"name": "x"}, Origin="http://evil.example").status_code == 403
    assert send(closed, "/workstreams", {"name": "x"}, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert closed.get("/api/workstreams")["total"] == 0


def test_a_wrong_token_opens_no_session(closed):
    for token in ("", "s3cre", "s3cret,other", "\u20ac", "\0"):
        response = send(closed, "/login", {"token": token})
        assert (response.status_code, "Set-Cookie" in response.headers) == (401, False)
        assert Page(response.text).form("token")
    assert closed.ask("GET", "/dashboard", headers=BROWSER, allow_redirects=False).status_code == 303


def test_guessing_tokens_is_slow(closed):
    tries = [send(closed, "/login", {"token": f"guess {count}"}).status_code for count in range(15)]
    assert tries[0] == 401 and tries[-1] == 429
    assert closed.ask("GET", "/api/tasks", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_a_login_leads_nowhere_else(closed):
    for lead in ("//evil.example", "/\\evil.example", "https://evil.example", "/\t/evil", "", "x"):
        response = send(closed, "/login", {"token": "s3cret", "next": lead})
        assert (response.status_code, response.headers["Location"]) == (303, "/dashboard")


def test_only_pages_lead_to_the_login(closed):
    response = closed.ask("GET", "/dashboard")
    assert (response.status_code, response.json()["error"]) == (401, "unauthorized")
    assert "Location" not in response.headers
    assert closed.ask("GET", "/api/tasks", headers=BROWSER).status_code == 401
    assert closed.ask("GET", "/static/style.css").status_code == 200


# Files -------------------------------------------------------------------------------------------------

TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "static").iterdir()))
def test_a_file_is_sent_with_its_type_and_an_etag(server, name):
    response = server.ask("GET", f"/static/{name}")
    assert (response.status_code, response.content) == (200, (ROOT / "static" / name).read_bytes())
    wanted = TYPES.get(name.rpartition(".")[2])
    assert not wanted or response.headers["Content-Type"].partition(";")[0] == wanted
    again = server.ask("GET", f"/static/{name}", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", response.headers["ETag"])
    other = server.ask("GET", f"/static/{name}", headers={"If-None-Match": '"another"'})
    assert other.status_code == 200
    head = server.ask("HEAD", f"/static/{name}")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "name",
    [
        "../monitor.py",
        "..%2fmonitor.py",
        "%2e%2e/schema.sql",
        "..",
        "",
        ".",
        "style.css/",
        "x/../style.css",
        "%00",
    ],
)
def test_no_path_leads_out_of_the_folder(server, name):
    request = f"GET /static/{name} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(request.encode())
        with connection.makefile("rb") as answer:
            assert re.match(rb"HTTP/1\.1 (404|400) ", answer.read())


# Sent once and small -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dashboard", "/stream?kind=decision", "/tasks/1", "/palette", "/needs"])
def test_a_page_that_is_the_same_is_not_sent_again(server, story, path):
    again = server.ask("GET", path, headers=BROWSER)
    for _ in range(20):  # whenever a second has passed for an age on the page, it is another one
        first = again
        again = server.ask("GET", path, headers=BROWSER | {"If-None-Match": first.headers["ETag"]})
        if again.status_code == 304:
            break
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert first.headers["Cache-Control"] == "no-cache"
    assert {"Accept-Encoding", "Cookie"} <= set(first.headers["Vary"].split(", "))


def test_a_page_that_changed_is_sent_again(server, task):
    first = server.ask("GET", page_of(task))
    server.say(task, "something new")
    again = server.ask("GET", page_of(task), headers={"If-None-Match": first.headers["ETag"]})
    assert again.status_code == 200 and "something new" in again.text


@pytest.mark.parametrize("path", ["/dashboard", "/static/live.js", "/static/style.css"])
def test_pages_and_files_are_compressed_for_who_takes_it(server, story, path):
    small = server.ask("GET", path, headers={"Accept-Encoding": "br, gzip"}, stream=True)
    plain = server.ask("GET", path, headers={"Accept-Encoding": "gzip;q=0"}, stream=True)
    assert (small.headers["Content-Encoding"], plain.headers.get("Content-Encoding")) == ("gzip", None)
    packed = small.raw.read(decode_content=False)
    assert len(packed) == int(small.headers["Content-Length"]) < int(plain.headers["Content-Length"]) / 2
    assert gzip.decompress(packed).startswith(plain.raw.read()[:100])


def test_the_stream_is_never_compressed_or_kept(server, task):
    for query in ("?poll=1", "?poll=1&format=ndjson", "?poll=1&view=tick"):
        answer = server.ask("GET", "/api/stream" + query, headers={"Accept-Encoding": "gzip"})
        assert "Content-Encoding" not in answer.headers and "ETag" not in answer.headers
        assert answer.headers["Cache-Control"] == "no-store"


def test_a_page_says_up_to_which_event_it_was_rendered(server, task):
    said = server.say(task, "the newest")
    (main,) = look(server, page_of(task)).all("main")
    hello = server.ask("GET", "/api/stream?poll=1&format=ndjson").json()["data"]
    assert (int(main["data-seq"]), main["data-stream"]) == (said["seq"], hello["stream"])


# The demo ----------------------------------------------------------------------------------------------


class Demo(Server):
    """A `monitor demo` process, with TMPDIR as the only place that it may write to."""

    def start(self) -> None:
        """Start it, and wait until it says where it is."""
        self.before = time.monotonic()
        self.errors = open(f"{self.database}.errors", "w+")  # noqa: SIM115 (closed by stop)
        self.process = subprocess.Popen(
            [*self.command, "demo", *self.options],
            env=clean_environment(TMPDIR=str(self.database), **self.settings),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            cwd=self.database,
            text=True,
        )
        self.output = self.process.stdout.readline()
        self.url = self.output.split()[-1]
        self.port = int(self.url.rpartition(":")[2])
        self.reader = threading.Thread(target=self._keep_output, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def stop(self, number: int = signal.SIGINT) -> int:
        """Stop it; its standard error is kept."""
        status = super().stop(number)
        with self.errors:
            self.errors.seek(0)
            self.said = self.errors.read()
        return status


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, with settings around that it must not listen to, and its story told at once."""
    settings = {"MONITOR_AUTH_MODE": "strict", "MONITOR_API_TOKENS": "t", "MONITOR_DB": "/nowhere/at/all.db"}
    running = Demo(tmp_path_factory.mktemp("demo"), "--speed", "0.01", **settings)
    yield running
    running.stop()


def test_the_demo_says_where_it_is_and_what_to_do(demo):
    wait_until(lambda: "Ctrl-C" in demo.output)
    assert demo.output.startswith("Monitor ")
    assert f"open {demo.url}" in demo.output


def test_the_demo_shows_three_workstreams_and_a_dozen_tasks(demo):
    workstreams = demo.get("/api/workstreams")["items"]
    tasks = demo.get("/api/tasks")["items"]
    assert (len(workstreams), len(tasks)) == (3, 12)
    shown = look(demo, "/dashboard").main
    assert [one["name"] for one in (*workstreams, *tasks) if one["name"] not in shown] == []
    assert {task["status"] for task in tasks} >= {"active", "blocked", "done"}


def test_the_demo_shows_an_agent_that_waits_and_a_build_that_failed(demo):
    asking = demo.get("/api/updates", kind="permission_request", order="desc")["items"]
    (failed, *_) = demo.get("/api/updates", kind="ci_run", level="error", order="desc")["items"]
    shown = look(demo, "/dashboard").main
    for update in (asking[0], failed):
        assert update["message"].partition("\n")[0][:60] in look(demo, f"/tasks/{update['task_id']}").main
    assert asking[0]["message"].partition("\n")[0][:60] in shown


def test_a_task_page_leads_to_its_pull_requests_and_runs_of_ci(demo):
    task = next(task for task in demo.get("/api/tasks")["items"] if "ci" in task and "pull_requests" in task)
    links = {link["href"] for link in look(demo, page_of(task)).all("a")}
    assert {pull["url"] for pull in task["pull_requests"]} | {task["ci"]["url"]} <= links


def test_the_tab_shows_the_worst_of_what_waits(demo):
    (icon,) = [link["href"] for link in look(demo, "/stream").all("link") if link["rel"] == "icon"]
    states = {task.get("attention", {}).get("state") for task in demo.get("/api/tasks")["items"]}
    assert states > {"blocked", "failed"} and "favicon-failed" in icon


def test_the_demos_past_is_past_and_its_pages_hold_together(demo):
    updates = demo.get("/api/updates", limit=200)["items"]
    times = [update["timestamp"] for update in updates]
    assert times == sorted(times) and times[0] < times[-1]
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(times[0])
    assert age > datetime.timedelta(hours=24)
    for task in demo.get("/api/tasks")["items"]:
        assert look(demo, page_of(task)).main
    assert look(demo, "/stream").main


def test_the_demo_is_open_to_try_whatever_the_settings_say(demo):
    lead = fill_in(demo, page_of(demo.get("/api/tasks/1")), message="hello from a visitor")
    assert "hello from a visitor" in look(demo, lead).main


def test_the_demo_goes_on_and_stops_at_once_leaving_nothing(tmp_path):
    running = Demo(tmp_path, "--speed", "1000")
    past = running.get("/api/updates")["total"]
    steps = [json.loads(line) for line in (ROOT / "templates" / "demo.jsonl").read_text().splitlines()]
    last = [step for step in steps if step["do"] == "patch"][-1]
    wait_until(lambda: last["summary_text"] in look(running, "/dashboard").main)
    assert running.get("/api/updates")["total"] > past
    before = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - before < 2
    assert "Traceback" not in running.said + running.output
    assert list(tmp_path.iterdir()) == []
