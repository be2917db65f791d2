// What stands around a page and acts on it: pill, theme, dialogs, keys, the palette, who needs you, notifications.
import { $, isControl, morph, page, parse, schedule, showNeeds, tellTimes } from "./live.js";
import { channel, listen, stream, tell } from "./stream.js";

// The frame. ----------------------------------------------------------------------------------------------------

page.changed = () => {
  const pill = $("#pill");
  const news = page.known - page.shown;
  const shown = page.paused && stream.state !== "logged out" ? "paused" : stream.state;
  pill.hidden = !page.stream || !shown;
  pill.dataset.state = shown;
  pill.setAttribute("aria-pressed", page.paused);
  const words = { paused: news > 0 && `paused, ${news} new`, "logged out": "logged out: log in" };
  $("#pill-word").textContent = words[shown] || shown;
  if (!document.hidden) for (const [key] of waiting(document)) seen.add(key);
};

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

let silence = 0;

// In a dialog that is open: what stands outside of it is out of reach.
function say(words) {
  clearTimeout(silence);
  ($("dialog[open]") ?? document.body).append($("#said"));
  $("#said").textContent = words;
  silence = setTimeout(() => ($("#said").textContent = ""), 4000);
  return null;
}

// A page that the server answers with; null, and why is said, where it is another than was asked for.
async function ask(path, options) {
  const response = await fetch(path, { headers: { Accept: "text/html" }, cache: "no-cache", ...options }).catch(() => null);
  if (!response) return say("The server does not answer");
  const fresh = parse(await response.text());
  if (response.redirected && $("#token", fresh)) return say("You are logged out");
  return response.ok ? fresh : say($("main p[dir]", fresh)?.textContent ?? response.statusText);
}

async function copy(button) {
  const response = await fetch(button.dataset.href).catch(() => null);
  const written = response?.ok && (await navigator.clipboard?.writeText(await response.text()).then(() => true, () => false));
  say(written ? "Copied as Markdown" : "The browser does not let us copy: take the file");
}

function toggle(dialog) {
  dialog.open ? dialog.close() : dialog.showModal();
}

// Rows: j and k lead through them, Enter opens, x changes. ------------------------------------------------------

const focusedRow = (rows) => rows.findLastIndex((row) => row.contains(document.activeElement));

function move(step) {
  const rows = [...document.querySelectorAll("main li[id]:not(.day, .change), main li.fold")].filter((row) => row.checkVisibility());
  const at = focusedRow(rows);
  const row = rows[at < 0 ? rows.findIndex((row) => row.getBoundingClientRect().top > 40) : at + step];
  const link = row && ($(".name, .task-name", row) ?? $("a, summary", row));
  link?.focus({ preventScroll: true });
  row?.scrollIntoView({ block: "nearest" });
}

// The forms of a task's page that change it, without going there.
async function change(row = document.activeElement.closest("main li[id]")) {
  const link = row && $(".name, .task-name", row);
  if (!link) return $("main .buttons button")?.focus(); // the page is the task's own
  const fresh = await ask(link.href);
  if (!fresh) return;
  $("#sheet-title").textContent = link.textContent;
  $("#sheet-forms").replaceChildren($("main .buttons", fresh), ...$("#change", fresh).parentNode.querySelectorAll("form"));
  $("#sheet").showModal();
}

$("#sheet").addEventListener("submit", async (event) => {
  event.preventDefault();
  const sent = new URLSearchParams(new FormData(event.target, event.submitter));
  if (await ask(event.target.getAttribute("action"), { method: "POST", body: sent })) $("#sheet").close();
});

// The palette. --------------------------------------------------------------------------------------------------

async function openPalette() {
  const [dialog, input] = [$("#palette"), $("#palette-query")];
  toggle(dialog);
  if (!dialog.open) return;
  input.value = "";
  const fresh = await ask("/palette");
  if (fresh) morph($("#palette-list"), $("#palette-list", fresh));
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
  if (event.isComposing || event.keyCode === 229) return; // Enter ends a word of an input method
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const stops = [$("#palette-query"), ...found()];
  const at = stops.indexOf(document.activeElement);
  if (step) stops[(at + step + stops.length) % stops.length].focus();
  else if (event.key === "Enter" && at === 0) stops[1]?.click();
  else return;
  event.preventDefault();
}

$("#palette").addEventListener("keydown", paletteKey);
$("#palette-query").addEventListener("input", filterPalette);

// Needs you: the tab that reads the stream looks who waits, for the titles of hidden tabs and for notifications. --

const waiting = (root) => [...root.querySelectorAll("#needs li")].map((item) => [`${item.id} ${item.dataset.since}`, item]);
const seen = new Set(waiting(document).map(([key]) => key));
let looking = 0;
let unseen = () => {};

listen((message) => {
  if (message.needs) hearNeeds(message.needs);
  if (message.ahead !== undefined) tellTimes(document);
  if (message.seq === undefined || !stream.leading) return;
  looking ||= setTimeout(async () => {
    looking = 0;
    const response = await fetch("/needs", { cache: "no-cache" }).catch(() => null);
    if (response?.ok && !response.redirected) tell({ needs: await response.text() });
  }, 1500);
});

function hearNeeds(html) {
  const fresh = parse(html);
  const added = waiting(fresh).filter(([key]) => !seen.has(key));
  for (const [key] of added) seen.add(key);
  if (stream.leading) notify(added.map(([, item]) => item));
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

function showBell() {
  const asked = !("Notification" in window) || !channel || Notification.permission !== "default";
  for (const button of document.querySelectorAll("[data-do=notify]")) button.hidden = asked;
}

function beSeen() {
  unseen();
  if (channel && !document.hidden) {
    navigator.locks.request("monitor-seen", { mode: "shared" }, () => new Promise((resolve) => (unseen = resolve)));
  }
}

// Keys and buttons. ---------------------------------------------------------------------------------------------

const actions = {
  change: (button) => change(button?.closest(".task")),
  close: (button) => button.closest("dialog").close(),
  copy,
  help: () => toggle($("#help")),
  notify: () => Notification.requestPermission().then(showBell),
  palette: openPalette,
  search: () => $("#q").select(),
  show: () => $("#feed").scrollIntoView(),
  theme: nextTheme,
  pause: () => {
    if (stream.state === "logged out") return location.reload();
    page.paused = !page.paused;
    schedule();
  },
};
const keys = {
  "/": actions.search,
  "?": actions.help,
  p: actions.pause,
  x: () => change(),
  j: () => move(1),
  k: () => move(-1),
  gd: () => location.assign("/dashboard"),
  gs: () => location.assign("/stream"),
};
let typed = { key: "", at: 0 };

document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k" && !event.shiftKey) {
    event.preventDefault();
    return openPalette();
  }
  if (event.key === "Escape") $("#needs").open = false;
  const ours = event.key === "?" && $("#help").open; // it closes what it has opened
  if (event.ctrlKey || event.metaKey || event.altKey || isControl(event.target) || ($("dialog[open]") && !ours)) return;
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
  if (!button || event.ctrlKey || event.metaKey) return;
  if (button.matches("a")) event.preventDefault();
  actions[button.dataset.do](button);
});

document.addEventListener("visibilitychange", beSeen);
addEventListener("pageshow", (event) => event.persisted && beSeen());
addEventListener("storage", (event) => event.key === "monitor-theme" && showTheme(event.newValue ?? "system"));

// A link to an update that stood on the newest page when the link was made.
const [place, seq] = /^#u(\d+)$/.exec(location.hash) ?? [];
if (place && $(".thread") && !$(place) && !location.search.includes("around=")) location.replace(`?around=${seq}${place}`);

showTheme(document.documentElement.dataset.theme);
showBell();
beSeen();
schedule();
