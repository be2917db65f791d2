// Monitor's pages, live. The server renders every page whole. When its stream says that something changed, this
// module fetches the current page again and morphs what is shown into it: no HTML is made here.
import { Idiomorph } from "./idiomorph.js";
import { listen, stream, subscribe, tell } from "./stream.js";

export const $ = (selector, root = document) => root.querySelector(selector);
export const parse = (html) => new DOMParser().parseFromString(html, "text/html");
export const isControl = (node) => node.matches?.("input, textarea, select");

const main = $("main");
export const page = {
  address: location.pathname + location.search,
  stream: main.dataset.stream, // which database it was rendered from; a page without one is not live
  shown: Number(main.dataset.seq), // the newest event that is shown,
  known: Number(main.dataset.seq), // and the newest that was heard of
  paused: false,
  changed: () => {}, // called when the numbers or the state changed
};

// Times: how long ago, as the server words it; the exact one, in the reader's zone, in the title; his days, too. --

const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long" });
const dayName = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long", year: "numeric" });

function age(moment) {
  const seconds = Math.max(0, Math.floor((Date.now() + stream.ahead - moment) / 1000));
  const [unit, size] = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]].find(([, size]) => seconds >= size) ?? ["s", 1];
  return `${Math.floor(seconds / size)} ${unit}`;
}

export function tellTimes(root) {
  for (const time of root.querySelectorAll("time[datetime*=T]")) {
    const moment = new Date(time.dateTime);
    const text = time.firstChild; // changed in place: a selection around it stays
    if (text && text.data !== age(moment)) text.data = age(moment);
    time.title = exact.format(moment);
  }
}

// The server heads the days of UTC: the same headings go where the reader's days begin.
function tellDays(list) {
  const [head, ...others] = list.querySelectorAll(":scope > .day");
  for (const other of others) other.remove();
  let before = "9999"; // only ever older days: times may come in any order
  for (const row of head ? [...list.children].filter((row) => row !== head) : []) {
    const moment = new Date($("time", row).dateTime);
    const day = moment.toLocaleDateString("sv"); // as 2026-11-29
    if (day >= before) continue;
    const heading = before < "9999" ? head.cloneNode(true) : head;
    heading.id = `d${list.dataset.key}-${day}`;
    Object.assign($("time", heading), { dateTime: day, textContent: dayName.format(moment) });
    row.before(heading);
    before = day;
  }
}

// Showing: what the reader typed, selected, opened and focused stays as it is. ----------------------------------

const edited = new WeakSet(); // controls that the reader has changed
document.addEventListener("input", (event) => edited.add(event.target));
const isTouched = (node) =>
  isControl(node) && (node === document.activeElement || edited.has(node) || (node.defaultValue ?? node.value) !== node.value);

const isSameRow = (old, next) => old.tagName === "LI" && old.isEqualNode(next); // most are, and this is native code

export function morph(shown, fresh, navigating = false) {
  const kept = navigating ? null : held();
  const rows = new Set(Array.from(fresh.querySelectorAll("li[id]"), (row) => row.id));
  for (const row of shown.querySelectorAll("li[id]")) {
    if (!rows.has(row.id) && !kept?.contains(row)) row.remove(); // idiomorph compares each with all that come
  }
  Idiomorph.morph(shown, fresh, {
    morphStyle: "outerHTML",
    callbacks: {
      // After Back, a focused search box must not keep the text of the page before.
      beforeNodeMorphed: (old, next) => (navigating || !(isTouched(old) || old === kept)) && !isSameRow(old, next),
      beforeAttributeUpdated: (name, node) => !(name === "open" && node.matches("details, dialog")),
    },
  });
}

// Made ready to be shown: times are told, and no blanks stand between rows. With blanks idiomorph would carry every
// row below a new one out and in again (it takes them for its landmarks), and the place in the list would be lost.
export function prepare(root) {
  tellTimes(root);
  for (const list of root.querySelectorAll("ul, ol")) {
    for (const node of [...list.childNodes]) if (node.nodeType === Node.TEXT_NODE) node.remove();
  }
  for (const list of root.querySelectorAll(".thread")) tellDays(list);
}

// A list of updates whose top is out of sight is being read: it stays as it is, and #news counts what comes. Back at
// its top, it is all there, and what went by unseen (more than a page) is told and linked.
const feed = () => $("#feed[data-newest]");
const held = () => (feed()?.getBoundingClientRect().top < 40 ? feed() : null);
const read = { newest: 0, whole: 0 }; // the newest update on the page, and the newest before which none was skipped

function noteRead() {
  read.newest = Number(feed()?.dataset.newest);
  if (!$("#skipped")) read.whole = read.newest;
}

function showNews() {
  const news = $("#news");
  if (news) news.hidden = !(held() && Number(news.dataset.count));
}

let wasHeld = null;
addEventListener("scroll", () => {
  showNews();
  if (wasHeld && !held() && Number($("#news").dataset.count) && !page.paused) refresh();
  wasHeld = held();
}, { passive: true });

export function showNeeds(fresh) {
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
  const kept = !navigating && held();
  prepare(next);
  morph(main, next, navigating);
  if (!kept) noteRead();
  showNews();
  document.title = fresh.title;
  showNeeds($("#needs", fresh));
  if (navigating) $("#q").value = $("#q", fresh).value;
  page.known = next.dataset.stream === page.stream ? Math.max(page.known, seq) : seq;
  Object.assign(page, { stream: next.dataset.stream, shown: seq });
}

// Fetching: one request at a time, the next no sooner than the machine can bear, the last change never left out. -

let request = null; // the AbortController of the one in flight
let timer = 0;
let notBefore = 0;

// A page that is logged out, too: the next login opens the stream, and that leads here.
const rests = () => request || page.paused || document.hidden || !page.stream || stream.state === "logged out";

export function schedule() {
  page.changed();
  if (timer || rests() || page.known <= page.shown) return;
  timer = setTimeout(refresh, Math.max(0, notBefore - performance.now()));
}

function addressToFetch(navigating) {
  const url = new URL(location.href);
  if (!navigating && feed()) url.searchParams.set("seen", held() ? read.newest : read.whole);
  return url;
}

export async function refresh(navigating = false) {
  clearTimeout(timer);
  timer = 0;
  request?.abort();
  const mine = (request = new AbortController());
  setTimeout(() => mine.abort(), 20000); // a network that went away may leave it without an end
  const began = performance.now();
  let failed = false;
  try {
    const options = { headers: { Accept: "text/html" }, cache: "no-cache", signal: mine.signal };
    const response = await fetch(addressToFetch(navigating), options);
    const fresh = parse(await response.text());
    if (mine !== request) return;
    if (response.redirected || !$("main[data-seq]", fresh)) {
      if (navigating) return location.reload();
      if (new URL(response.url).pathname === "/login") tell({ state: "logged out" });
      else page.shown = page.known; // the page is gone: the next event asks again
    } else show(fresh, navigating);
  } catch (error) {
    failed = true;
    if (navigating && mine === request) location.reload();
  } finally {
    if (mine === request) {
      request = null;
      notBefore = performance.now() + (failed ? 1000 : Math.min(2000, Math.max(300, 2 * (performance.now() - began))));
      schedule();
    }
  }
}

listen((message) => {
  if (message.seq !== undefined) {
    const other = message.stream && message.stream !== page.stream;
    if (other || (message.hello && message.seq < page.shown)) page.shown = -1; // another database, or an older copy
    if (page.shown < 0) read.newest = read.whole = 0; // all of it is news
    page.known = page.shown < 0 ? message.seq : Math.max(page.known, message.seq);
  }
  schedule();
});

document.addEventListener("visibilitychange", () => {
  tellTimes(document);
  schedule();
});

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
  if (!link || !plain || link.target || link.closest("dialog, header.site, svg, [data-do]") || !samePage(new URL(link.href))) return;
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

addEventListener("scrollend", () => history.replaceState({ y: scrollY }, "")); // Forward leads back to it, too

addEventListener("popstate", async ({ state }) => {
  if (page.address === location.pathname + location.search) return; // only the #place changed
  page.address = location.pathname + location.search;
  await refresh(true);
  scrollTo(0, state?.y ?? 0);
});

prepare(document);
noteRead();
setInterval(() => {
  tellTimes(document);
  if (!rests() && performance.now() > notBefore + 300000) refresh(); // strips of activity move on, too
}, 5000);
if (page.stream) {
  subscribe(() => ({ seq: page.known, stream: page.stream }), () => document.hidden || page.paused || refresh());
}
