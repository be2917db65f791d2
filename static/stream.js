// The stream: one a browser, for HTTP/1.1 gives all its tabs six connections together. The tab that holds the lock
// reads it and tells the others; when it closes, the next one takes over.
export const channel = "locks" in navigator && "BroadcastChannel" in window ? new BroadcastChannel("monitor") : null;
// state: live, reconnecting, logged out; ahead: by how much the server's clock is ahead of ours, in milliseconds
export const stream = { state: "", leading: false, ahead: 0 };

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const listeners = [];
let place = () => ({}); // { seq, stream }: what the page of this tab knows, and of which database
let turn = 0; // which of its times as the leader this tab is in, or was
let heard = Date.now(); // when there was the last sign of the leader
let cut = null; // the AbortController of the stream that this tab reads
let rested = () => {}; // ends the pause between two tries
let claim = null; // the AbortController of its wait for the lock

export const listen = (listener) => listeners.push(listener);

export function tell(message) {
  channel?.postMessage(message);
  hear(message);
}

export function hear(message) {
  heard = Date.now();
  if (message.ask && stream.leading) channel.postMessage({ state: stream.state, ahead: stream.ahead, ...place() });
  if (message.state) stream.state = message.state;
  if (message.ahead !== undefined) stream.ahead = message.ahead;
  if (message.wake || message.state === "logged out") again(); // a session's end does not end its stream
  if (message.ask && stream.state === "logged out") rested(); // who has a page to ask for is logged in
  for (const listener of listeners) listener(message);
}

// Reads the stream anew, and at once.
function again() {
  if (channel && stream.leading) channel.postMessage({});
  cut?.abort();
  rested();
}

// A clock is said in whole seconds: what differs by less is taken for the same.
function clockOf(response) {
  const ahead = Date.parse(response.headers.get("Date")) + 500 - Date.now();
  return Math.abs(ahead) > 2000 ? ahead : 0;
}

async function read() {
  const { seq, stream: database } = place();
  const query = new URLSearchParams({ view: "tick", format: "ndjson", after_seq: seq, stream: database });
  const mine = (cut = new AbortController());
  const response = await fetch(`/api/stream?${query}`, { cache: "no-store", signal: mine.signal });
  if (response.status === 401) tell({ state: "logged out" });
  if (!response.ok) return 5000;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let pause = 15000; // a stream that ends before its hello: the server has too many
  for (;;) {
    const silent = setTimeout(() => mine.abort(), 25000); // a sign of life comes every 15 s
    const { value, done } = await reader.read().finally(() => clearTimeout(silent));
    if (done) return pause;
    channel?.postMessage({}); // a sign of life for the other tabs
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const { event, data } of lines.filter(Boolean).map(JSON.parse)) {
      pause = event === "hello" ? 300 : pause;
      if (event === "hello") tell({ state: "live", hello: true, ahead: clockOf(response), ...data });
      if (event === "tick") tell({ state: "live", seq: data.seq });
    }
  }
}

async function lead() {
  const mine = (turn += 1);
  stream.leading = true;
  for (let tries = 0; mine === turn; tries += 1) {
    const began = performance.now();
    const pause = await read().catch(() => 0);
    if (mine !== turn) break;
    if (stream.state !== "logged out") tell({ state: "reconnecting" });
    tries = performance.now() - began > 5000 ? 0 : tries;
    const backoff = pause || Math.min(1200, 200 * 2 ** tries);
    await Promise.race([wait(backoff * (0.75 + Math.random() / 2)), new Promise((resolve) => (rested = resolve))]);
  }
}

function enter() {
  if (channel) {
    claim = new AbortController();
    wantLead({ signal: claim.signal });
    channel.postMessage({ ask: true });
  } else if (!stream.leading && !document.hidden) lead();
}

// Another tab takes the lock from a leader that gives no sign of life: it hung. It may come back, and waits again.
function wantLead(how) {
  navigator.locks.request("monitor-stream", how, lead).catch(() => {
    if (!stream.leading) return; // it was the wait that ended
    leave();
    enter();
  });
}

function leave() {
  turn += 1;
  stream.leading = false;
  claim?.abort();
  cut?.abort();
  rested();
}

// Reads, or hears of, what comes after the place. `woken` is called when the machine slept, or the network is back:
// what is shown may be old then, and the stream dead without a sign.
export function subscribe(placeNow, woken) {
  place = placeNow;
  const wake = () => {
    document.hidden ? again() : tell({ wake: true });
    heard = Date.now() - 38000; // the leader has two seconds to answer
    woken();
  };
  let last = Date.now();
  setInterval(() => {
    if (Date.now() - last > (document.hidden ? 90000 : 5000)) wake(); // timers of a hidden tab run once a minute
    last = Date.now();
    if (channel && !stream.leading && !document.hidden && last - heard > 40000) {
      heard = last;
      wantLead({ steal: true });
    }
  }, 1000);
  document.addEventListener("visibilitychange", () => {
    last = Date.now();
    if (!channel) document.hidden ? leave() : enter();
  });
  addEventListener("online", wake);
  addEventListener("pagehide", leave);
  addEventListener("pageshow", (event) => {
    if (!event.persisted) return;
    enter();
    woken();
  });
  channel?.addEventListener("message", ({ data }) => hear(data));
  enter();
  setTimeout(() => stream.state || hear({ state: "reconnecting" }), 1500);
}
