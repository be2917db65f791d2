"""How fast the pages are here: `python tests/bench_page.py` prints a table. It needs Chromium and Playwright.

The server's part is measured at 1,000 tasks and 100,000 updates of the last day; the browser's part on a
dashboard of 50 tasks and a stream of the newest updates while 1,000 updates a second come in for 8 seconds.
"""

from __future__ import annotations

import datetime
import gzip
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from bench_load import Server, apart, pace, serving, update

TASKS, UPDATES = 1000, 100_000
SHOWN, RATE, SECONDS = 50, 1000, 8
PAGES = ("/dashboard", "/dashboard?group=none", "/tasks/1", "/stream", "/stream?layout=grouped")
PAGES += ("/stream?layout=lanes", "/stream?q=word7&level=error", "/palette", "/needs")
LONGEST = """
window.longest = 0; window.long = 0;
new PerformanceObserver((list) => {
  window.long += list.getEntries().length;
  for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
}).observe({entryTypes: ['longtask']});
"""


def fill(path: Path, tasks: int, updates: int) -> None:
    """Make a database in process: tasks in 20 workstreams, updates spread over the last 24 hours."""
    import monitor

    pick, served = random.Random(1), monitor.Monitor(monitor.Config.load({"MONITOR_DB": str(path)}))
    now = datetime.datetime.now(datetime.UTC)

    def add(t: monitor.Transaction, begin: int, end: int) -> None:
        for number in range(begin, end):
            task = rows[int(len(rows) * pick.random() ** 2)]
            words = " ".join(f"word{pick.randrange(200)}" for _ in range(12))
            level = pick.choices(("info", "warn", "error"), (90, 6, 4))[0]
            kind = pick.choice(("tool_use", "test_result", "assistant_message", "file_change"))
            fields = {"source": f"claude:{number % 40}", "message": words, "level": level, "kind": kind}
            moment = now - datetime.timedelta(days=1) * (1 - number / updates)
            t.insert_update(task, fields | {"tags": ["api"]}, monitor.timestamp(moment))

    make = lambda *what: json.loads(served.create(*what))["id"]  # noqa: E731
    streams = [make(monitor.WORKSTREAM, {"name": f"workstream {number}"}) for number in range(20)]
    fields = [{"workstream_id": streams[n % 20], "name": f"task {n} of many"} for n in range(tasks)]
    ids = [make(monitor.TASK, some) for some in fields]
    rows = served.store.read(lambda q: [q.one(monitor.TASK, id) for id in ids])
    for begin in range(0, updates, 1000):
        served.store.write(lambda t, begin=begin: add(t, begin, min(begin + 1000, updates)))
    served.close()


def first_pages(server: Server) -> None:
    """The server's time for each page, and its size as it goes over the line."""
    import requests

    with requests.Session() as session:
        session.trust_env = False
        for path in PAGES:
            times = []
            for _ in range(12):
                began = time.perf_counter()
                response = session.get(
                    f"http://127.0.0.1:{server.port}{path}", headers={"Accept": "text/html"}
                )
                times.append(1000 * (time.perf_counter() - began))
            assert response.status_code == 200, response.text
            packed = len(gzip.compress(response.content, 5)) / 1000
            size = f"{packed:.0f} kB compressed, {len(response.content) / 1000:,.0f} kB plain"
            reach = "yes" if statistics.median(times) < 150 and packed < 100 else "**no**"
            tell(
                f"{path}: {TASKS:,} tasks, {UPDATES:,} updates",
                f"{statistics.median(times):.0f} ms, {size}",
                reach,
            )


def burst(server: Server, path: str, browser) -> None:
    """What a page's main thread does in a burst, and how late it shows the last update."""
    page = browser.new_page()
    page.add_init_script(LONGEST)
    page.goto(f"http://127.0.0.1:{server.port}{path}")
    page.locator("#pill[data-state=live]").wait_for()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})  # of the processor, whoever shares it
    before = worked(session)
    sent = send_burst(server)
    last = server.ask(update("1", "the last of them"))["seq"]
    began = time.monotonic()
    page.wait_for_function("seq => Number(document.querySelector('main').dataset.seq) >= seq", arg=last)
    late, busy = time.monotonic() - began, worked(session) - before
    longest, count = page.evaluate("[window.longest, window.long]")
    good = busy < 4 and longest < 400 and late < 1
    what = f"{path}: {sent:,} updates in {SECONDS} s, {page.locator('li.task, li.update').count()} rows shown"
    told = f"main thread {busy:.2f} s, {count} long tasks, longest {longest:.0f} ms, fresh after {late:.2f} s"
    tell(what, told, "yes" if good else "**no**")
    page.close()


def send_burst(server: Server) -> int:
    """Send updates at the rate for the seconds, over ten tasks; returns how many were taken."""
    requests = itertools.cycle([update(str(number + 1), "one of many") for number in range(10)])
    senders = [apart(pace, server.port, lambda: next(requests), RATE / 4, SECONDS) for _ in range(4)]
    return sum(times().count for times in senders)


def worked(session) -> float:
    """The seconds that a page's main thread has worked."""
    return {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}[
        "TaskDuration"
    ]


def tell(*cells: str) -> None:
    """Print a row."""
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure the pages on this machine."""
    from playwright.sync_api import sync_playwright

    print("| what | measured | within reach |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="monitor-bench-") as folder:
        apart(fill, Path(folder) / "many.db", TASKS, UPDATES)()
        with serving(Path(folder) / "many.db") as server:
            first_pages(server)
        apart(fill, Path(folder) / "some.db", SHOWN, 200)()
        with serving(Path(folder) / "some.db") as server, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            for path in ("/dashboard", "/stream", "/stream?layout=lanes", "/tasks/1"):
                burst(server, path, browser)
            browser.close()


if __name__ == "__main__":
    main()
