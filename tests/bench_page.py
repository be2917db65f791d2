"""How fast the pages are here: `python tests/bench_page.py` prints a table. It needs Chromium and Playwright.

The server's part is measured at 1,000 tasks and 100,000 updates of the last day; the browser's part with 50
tasks while 1,000 updates a second come in for 8 seconds. These are written in the server's own process: who
sends so many requests takes the processor from the browser, and the burst lasts three times as long.
"""

from __future__ import annotations

import datetime
import gzip
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

from bench_load import Server, apart, serving

TASKS, UPDATES = 1000, 100_000
SHOWN, RATE, SECONDS, LAST = 50, 1000, 8, "the last of them"
PAGES = ("/dashboard", "/dashboard?group=none", "/tasks/1", "/stream", "/stream?layout=grouped")
PAGES += ("/stream?layout=lanes", "/stream?q=word7&level=error", "/palette", "/needs")
LIVE = ("/dashboard", "/stream", "/stream?layout=grouped", "/stream?layout=lanes", "/tasks/1")
LONGEST = """
window.longest = 0; window.long = 0;
new PerformanceObserver((list) => {
  window.long += list.getEntries().length;
  for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
}).observe({entryTypes: ['longtask']});
"""


def serve(path: str) -> None:
    """Serve a database; SIGUSR1 starts a burst."""
    import monitor

    def ready(served: monitor.Monitor, address: str, with_gevent: bool) -> None:
        from gevent import signal_handler

        signal_handler(signal.SIGUSR1, lambda: threading.Thread(target=burst, args=(served,)).start())
        print(f"at {address}", flush=True)

    monitor.run_server(monitor.Config.load({"MONITOR_DB": path, "MONITOR_BIND": "127.0.0.1:0"}), False, ready)


def burst(served) -> None:
    """Write updates of ten tasks at the rate for the seconds, some at a time; the last is told apart."""
    import monitor

    rows = served.store.read(lambda q: [q.one(monitor.TASK, str(number)) for number in range(1, 11)])
    began, total = time.monotonic(), RATE * SECONDS

    def add(t: monitor.Transaction, begin: int, end: int) -> None:
        for n in range(begin, end):
            fields = {"source": "claude:1", "kind": "test_result", "level": "info", "tags": ["tests"]}
            fields["message"] = f"one of many: {n}" if n < total - 1 else LAST
            t.insert_update(rows[(n + 1) % 10], fields, monitor.timestamp())

    sent = 0
    while sent < total:
        time.sleep(0.02)
        due = min(total, int(RATE * (time.monotonic() - began)))
        served.store.write(lambda t, begin=sent, end=due: add(t, begin, end))
        sent = due
    print(time.monotonic() - began, flush=True)


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


def live(database: Path, path: str, browser) -> None:
    """What a page's main thread does in a burst, and how late it shows the last update."""
    server, page = Server(database, (__file__,)), browser.new_page()
    try:
        page.add_init_script(LONGEST)
        page.goto(f"http://127.0.0.1:{server.port}{path}")
        page.locator("#pill[data-state=live]").wait_for()
        session = page.context.new_cdp_session(page)
        session.send(
            "Performance.enable", {"timeDomain": "threadTicks"}
        )  # of the processor, whoever shares it
        before = worked(session)
        server.process.send_signal(signal.SIGUSR1)
        took = float(server.process.stdout.readline())
        began = time.monotonic()
        page.get_by_text(LAST).first.wait_for()
        late, busy = time.monotonic() - began, worked(session) - before
        longest, count = page.evaluate("[window.longest, window.long]")
        rows = page.locator("li.task, li.update").count()
    finally:
        page.close()
        server.stop()
    tell(
        f"{path}: {RATE * SECONDS:,} updates in {took:.1f} s, {rows} rows shown",
        f"main thread {busy:.2f} s, {count} long tasks, longest {longest:.0f} ms, fresh after {late:.2f} s",
        "yes" if busy < 4 and longest < 400 and late < 1 else "**no**",
    )


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
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            for path in LIVE:
                shutil.copy(Path(folder) / "some.db", Path(folder) / "one.db")
                live(Path(folder) / "one.db", path, browser)
            browser.close()


if __name__ == "__main__":
    serve(sys.argv[-1]) if sys.argv[1:2] == ["serve"] else main()
