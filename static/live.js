// Monitor's pages, live. The server renders every page whole. When its stream says that something changed, this
// module fetches the current page again and morphs what is shown into it: no HTML is made here.
import { Idiomorph } from "./idiomorph.js";

const $ = (selector, root = document) => root.querySelector(selector);
const parse = (html) => new DOMParser().parseFromString(html, "text/html");
const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const main = $("main");
const page = {
  address: location.pathname + location.search,
  stream: main.dataset.stream, // which database it was rendered from; a page without one is not live
  shown: Number(main.dataset.seq), // the newest event that is shown,
  known: Number(main.dataset.seq), // and the newest that was heard of
  paused: false,
};

// Times: how long ago, as the server words it; the exact one, in the reader's zone, in the title. ---------------

const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });

function age(moment) {
  const seconds = Math.max(0, Math.floor((Date.now() - moment) / 1000));
  const [unit, size] = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]].find(([, size]) => seconds >= size) ?? ["s", 1];
  return `${Math.floor(seconds / size)} ${unit}`;
}

function tellTimes(root) {
  for (const time of root.querySelectorAll("time[datetime*=T]")) {
    const moment = new Date(time.dateTime);
    const text = time.firstChild; // changed in place: a selection around it stays
    if (text && text.data !== age(moment)) text.data = age(moment);
    time.title = exact.format(moment);
  }
}

// Showing: what the reader typed, selected, opened and focused stays as it is. ----------------------------------

const edited = new WeakSet(); // controls that the reader has changed
const isControl = (node) => node.matches?.("input, textarea, select");
const isTouched = (node) =>
  isControl(node) && (node === document.activeElement || edited.has(node) || (node.defaultValue ?? node.value) !== node.value);

function morph(shown, fresh, navigating = false) {
  Idiomorph.morph(shown, fresh, {
    morphStyle: "outerHTML",
    ignoreActiveValue: !navigating, // after Back, a focused search box must not keep the text of the page before
    callbacks: {
      beforeNodeMorphed: (old) => navigating || !isTouched(old),
      beforeAttributeUpdated: (name, node) => !(name === "open" && node.matches("details, dialog")),
    },
  });
}

// Made ready to be shown: times are told, and no blanks stand between rows. With blanks idiomorph would carry every
// row below a new one out and in again (it takes them for its landmarks), and the place in the list would be lost.
function prepare(root) {
  tellTimes(root);
  for (const list of root.querySelectorAll("ul, ol")) {
    for (const node of [...list.childNodes]) if (node.nodeType === Node.TEXT_NODE) node.remove();
  }
}

function showNeeds(fresh) {
  prepare(fresh);
  morph($("#needs"), fresh);
  $("link[rel=icon]").href = fresh.dataset.icon;
  const count = Number(fresh.dataset.count);
  document.title = (count ? `(${count}) ` : "") + document.title.replace(/^\(\d+\) /, "");
}

function show(fresh, navigating) {
  const next = $("main", fresh);
  const seq = Number(next.dataset.seq);
  if (!navigating && next.dataset.stream === page.stream && seq < page.shown) return; // older than what is shown
  prepare(next);
  morph(main, next, navigating);
  document.title = fresh.title;
  showNeeds($("#needs", fresh));
  for (const [key] of waiting(document)) seen.add(key);
  if (navigating) $("#q").value = $("#q", fresh).value;
  page.known = next.dataset.stream === page.stream ? Math.max(page.known, seq) : seq;
  Object.assign(page, { stream: next.dataset.stream, shown: seq });
}

// Fetching: one request at a time, the next no sooner than the machine can bear, the last change never left out. -

let request = null; // the AbortController of the one in flight
let timer = 0;
let notBefore = 0;

function schedule() {
  showState();
  if (request || timer || page.paused || document.hidden || !page.stream || page.known <= page.shown) return;
  timer = setTimeout(refresh, Math.max(0, notBefore - performance.now()));
}

async function refresh(navigating = false) {
  clearTimeout(timer);
  timer = 0;
  request?.abort();
  const mine = (request = new AbortController());
  const began = performance.now();
  let failed = false;
  try {
    const response = await fetch(location.href, { headers: { Accept: "text/html" }, cache: "no-cache", signal: mine.signal });
    const fresh = parse(await response.text());
    if (mine !== request) return;
    if (response.redirected || !$("main[data-seq]", fresh)) {
      if (navigating) return location.reload();
      if (new URL(response.url).pathname === "/login") tell({ state: "logged out" });
      else page.shown = page.known; // the page is gone: the next event asks again
    } else show(fresh, navigating);
  } catch (error) {
    failed = true;
    if (navigating && error.name !== "AbortError") location.reload();
  } finally {
    if (mine === request) {
      request = null;
      const took = performance.now() - began;
      notBefore = performance.now() + (failed ? 1000 : Math.min(800, Math.max(400, 3 * took)));
      schedule();
    }
  }
}

// The stream: one a browser. Who holds the lock reads it and tells the other tabs. ------------------------------

const channel = "locks" in navigator && "BroadcastChannel" in window ? new BroadcastChannel("monitor") : null;
let state = ""; // live, reconnecting, logged out
let leading = false;
let leaving = false;
let cut = null; // the AbortController of the stream that this tab reads
let rested = () => {}; // ends the pause between two tries

function tell(message) {
  channel?.postMessage(message);
  hear(message);
}

function hear(message) {
  if (message.ask && leading) channel.postMessage({ state, seq: page.known, stream: page.stream });
  if (message.state) state = message.state;
  if (message.needs) hearNeeds(message.needs);
  if (message.seq !== undefined) {
    const other = message.stream && message.stream !== page.stream;
    if (other || (message.hello && message.seq < page.shown)) page.shown = -1; // another database, or an older copy
    page.known = page.shown < 0 ? message.seq : Math.max(page.known, message.seq);
    if (leading) lookSoon();
  }
  schedule();
}

async function readStream() {
  const query = { view: "tick", format: "ndjson", after_seq: page.known, stream: page.stream };
  cut = new AbortController();
  const response = await fetch(`/api/stream?${new URLSearchParams(query)}`, { cache: "no-store", signal: cut.signal });
  if (response.status === 401) tell({ state: "logged out" });
  if (!response.ok) return 5000;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let pause = 15000; // a stream that ends before its hello: the server has too many
  for (;;) {
    const silent = setTimeout(() => cut.abort(), 25000); // a sign of life comes every 15 s
    const { value, done } = await reader.read().finally(() => clearTimeout(silent));
    if (done) return pause;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const { event, data } of lines.filter(Boolean).map(JSON.parse)) {
      pause = event === "hello" ? 300 : pause;
      if (event === "hello") tell({ state: "live", hello: true, ...data });
      if (event === "tick") tell({ state: "live", seq: data.seq });
    }
  }
}

async function lead() {
  leading = true;
  for (let tries = 0; !leaving; tries += 1) {
    const began = performance.now();
    const pause = await readStream().catch(() => 0);
    if (leaving) break;
    if (state !== "logged out") tell({ state: "reconnecting" });
    tries = performance.now() - began > 5000 ? 0 : tries;
    const backoff = pause || Math.min(1200, 200 * 2 ** tries);
    await Promise.race([wait(backoff * (0.75 + Math.random() / 2)), new Promise((resolve) => (rested = resolve))]);
  }
  leading = false;
}

let claim = null;

function enter() {
  leaving = false;
  if (!page.stream) return;
  if (channel) {
    claim = new AbortController();
    navigator.locks.request("monitor-stream", { signal: claim.signal }, lead).catch(() => {});
    channel.postMessage({ ask: true });
  } else if (!leading && !document.hidden) lead();
  beSeen();
}

function leave() {
  leaving = true;
  claim?.abort();
  cut?.abort();
  rested();
}

function wake() {
  // The machine slept, or the network is back: what is shown may be old, and the stream dead without a sign.
  if (!page.stream || page.paused) return;
  cut?.abort();
  rested();
  if (!document.hidden && !request) refresh();
}

let last = Date.now();
setInterval(() => {
  if (Date.now() - last > (document.hidden ? 90000 : 5000)) wake(); // timers of a hidden tab run once a minute
  last = Date.now();
}, 1000);

document.addEventListener("visibilitychange", () => {
  last = Date.now();
  if (!channel) document.hidden ? leave() : enter();
  beSeen();
  tellTimes(document);
  schedule();
});
addEventListener("online", wake);
addEventListener("pagehide", leave);
addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  enter();
  if (page.stream) refresh();
});
channel?.addEventListener("message", ({ data }) => hear(data));

// Needs you: the leader looks who waits, for the titles of hidden tabs and for notifications. -------------------

const waiting = (root) => [...root.querySelectorAll("#needs li")].map((item) => [`${item.id} ${item.dataset.since}`, item]);
const seen = new Set(waiting(document).map(([key]) => key));
let looking = 0;
let unseen = () => {};

function lookSoon() {
  looking ||= setTimeout(async () => {
    looking = 0;
    const response = await fetch("/needs", { cache: "no-cache" }).catch(() => null);
    if (response?.ok && !response.redirected) tell({ needs: await response.text() });
  }, 1500);
}

function hearNeeds(html) {
  const fresh = parse(html);
  const added = waiting(fresh).filter(([key]) => !seen.has(key));
  for (const [key] of added) seen.add(key);
  if (leading) notify(added.map(([, item]) => item));
  if (document.hidden) showNeeds($("#needs", fresh));
}

async function notify(items) {
  if (!("Notification" in window) || Notification.permission !== "granted" || !channel) return;
  const { held } = await navigator.locks.query();
  if (held.some((lock) => lock.name === "monitor-seen")) return; // a tab is in view: it shows it
  for (const item of items.filter((item) => ["blocked", "failed"].includes(item.dataset.state))) {
    const link = $("a", item);
    const shown = new Notification(link.textContent.trim(), { body: $(".question", item).textContent, tag: item.id });
    shown.onclick = () => open(link.getAttribute("href"), "monitor-task");
  }
}

function beSeen() {
  unseen();
  if (channel && !document.hidden) {
    navigator.locks.request("monitor-seen", { mode: "shared" }, () => new Promise((resolve) => (unseen = resolve)));
  }
}

// Going from one view of a page to another: its links and its GET forms are followed in place. ------------------

function samePage(url) {
  return page.stream && url.origin === location.origin && url.pathname === location.pathname && !url.hash;
}

async function go(url) {
  history.replaceState({ y: scrollY }, "");
  history.pushState(null, "", url);
  page.address = url.pathname + url.search;
  await refresh(true);
  scrollTo(0, 0);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[href]");
  const plain = !event.button && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
  if (!link || !plain || link.target || link.closest("dialog, header") || !samePage(new URL(link.href))) return;
  event.preventDefault();
  go(new URL(link.href));
});

document.addEventListener("submit", (event) => {
  const url = new URL(event.target.action);
  if (event.target.method !== "get" || !samePage(url)) return;
  event.preventDefault();
  url.search = new URLSearchParams([...new FormData(event.target)].filter(([, value]) => value));
  go(url);
});

addEventListener("popstate", async ({ state }) => {
  if (page.address === location.pathname + location.search) return; // only the #place changed
  page.address = location.pathname + location.search;
  await refresh(true);
  scrollTo(0, state?.y ?? 0);
});

// The frame: pill, theme, dialogs, keys. ------------------------------------------------------------------------

function showState() {
  const pill = $("#pill");
  const news = page.known - page.shown;
  const shown = page.paused ? "paused" : state;
  pill.hidden = !page.stream || !shown;
  pill.dataset.state = shown;
  pill.setAttribute("aria-pressed", page.paused);
  $("#pill-word").textContent = page.paused && news > 0 ? `paused, ${news} new` : shown;
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("#theme").setAttribute("aria-label", `Theme: ${theme}`);
}

function nextTheme() {
  const { theme } = document.documentElement.dataset;
  const next = { system: "light", light: "dark" }[theme] ?? "system";
  showTheme(next);
  try {
    localStorage.setItem("monitor-theme", next);
  } catch {} // storage is forbidden: it holds for this page
}

function showBell() {
  const asked = !("Notification" in window) || !channel || Notification.permission !== "default";
  for (const button of document.querySelectorAll("[data-do=notify]")) button.hidden = asked;
}

function move(step) {
  const rows = [...main.querySelectorAll("li[id]:not(.day), li.fold")].filter((row) => row.checkVisibility());
  const at = rows.findLastIndex((row) => row.contains(document.activeElement));
  const row = rows[at < 0 ? rows.findIndex((row) => row.getBoundingClientRect().top > 40) : at + step];
  const link = row && ($(".name, .task-name", row) ?? $("a, summary", row));
  link?.focus({ preventScroll: true });
  row?.scrollIntoView({ block: "nearest" });
}

function toggle(dialog) {
  dialog.open ? dialog.close() : dialog.showModal();
}

async function openPalette() {
  const [dialog, input] = [$("#palette"), $("#palette-query")];
  toggle(dialog);
  if (!dialog.open) return;
  input.value = "";
  const response = await fetch("/palette", { cache: "no-cache" }).catch(() => null);
  if (response?.ok && !response.redirected) morph($("#palette-list"), $("#palette-list", parse(await response.text())));
  showBell();
  filterPalette();
}

const found = () => [...$("#palette-list").querySelectorAll("li:not([hidden])")].map((item) => $("a, button:not([hidden])", item));

function filterPalette() {
  const words = $("#palette-query").value.toLowerCase().split(/\s+/);
  for (const item of $("#palette-list").querySelectorAll("li")) {
    const text = item.textContent.toLowerCase();
    item.hidden = !words.every((word) => text.includes(word)) || !$("a, button:not([hidden])", item);
  }
}

function paletteKey(event) {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const stops = [$("#palette-query"), ...found()];
  const at = stops.indexOf(document.activeElement);
  if (step) stops[(at + step + stops.length) % stops.length].focus();
  else if (event.key === "Enter" && at === 0) stops[1]?.click();
  else return;
  event.preventDefault();
}

const actions = {
  close: (button) => button.closest("dialog").close(),
  help: () => toggle($("#help")),
  notify: () => Notification.requestPermission().then(showBell),
  palette: openPalette,
  search: () => $("#q").select(),
  theme: nextTheme,
  pause: () => {
    page.paused = !page.paused;
    schedule();
  },
};
const keys = {
  "/": actions.search,
  "?": actions.help,
  p: actions.pause,
  j: () => move(1),
  k: () => move(-1),
  gd: () => location.assign("/dashboard"),
  gs: () => location.assign("/stream"),
};
let typed = { key: "", at: 0 };

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    return openPalette();
  }
  if (event.key === "Escape") $("#needs").open = false;
  if (event.ctrlKey || event.metaKey || event.altKey || isControl(event.target) || $("dialog[open]")) return;
  const pair = typed.key === "g" && event.timeStamp - typed.at < 1000 ? "g" + event.key : event.key;
  typed = { key: event.key, at: event.timeStamp };
  if (!keys[pair]) return;
  event.preventDefault();
  keys[pair]();
});

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (!event.target.closest("#needs")) $("#needs").open = false;
  if (event.target.closest("#palette a, #palette button")) $("#palette").close();
  if (button) actions[button.dataset.do](button);
});

document.addEventListener("input", (event) => edited.add(event.target));
$("#palette").addEventListener("keydown", paletteKey);
$("#palette-query").addEventListener("input", filterPalette);
addEventListener("storage", (event) => event.key === "monitor-theme" && showTheme(event.newValue ?? "system"));
setInterval(() => tellTimes(document), 30000);
setTimeout(() => state || hear({ state: "reconnecting" }), 1500);

showTheme(document.documentElement.dataset.theme);
showBell();
prepare(document);
enter();
