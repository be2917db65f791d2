// The stream: one a browser, for HTTP/1.1 gives all its tabs six connections together. The tab that holds the lock
// reads it and tells the others; when it closes, the next one takes over.
export const channel = "locks" in navigator && "BroadcastChannel" in window ? new BroadcastChannel("monitor") : null;
export const stream = { state: "", leading: false }; // state: live, reconnecting, logged out

const wait = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const listeners = [];
let place = () => ({}); // { seq, stream }: what the page of this tab knows, and of which database
let leaving = false;
let cut = null; // the AbortController of the stream that this tab reads
let rested = () => {}; // ends the pause between two tries
let claim = null; // the AbortController of its wait for the lock

export const listen = (listener) => listeners.push(listener);

export function tell(message) {
  channel?.postMessage(message);
  hear(message);
}

export function hear(message) {
  if (message.ask && stream.leading) channel.postMessage({ state: stream.state, ...place() });
  if (message.state) stream.state = message.state;
  for (const listener of listeners) listener(message);
}

async function read() {
  const { seq, stream: database } = place();
  const query = new URLSearchParams({ view: "tick", format: "ndjson", after_seq: seq, stream: database });
  cut = new AbortController();
  const response = await fetch(`/api/stream?${query}`, { cache: "no-store", signal: cut.signal });
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
  stream.leading = true;
  for (let tries = 0; !leaving; tries += 1) {
    const began = performance.now();
    const pause = await read().catch(() => 0);
    if (leaving) break;
    if (stream.state !== "logged out") tell({ state: "reconnecting" });
    tries = performance.now() - began > 5000 ? 0 : tries;
    const backoff = pause || Math.min(1200, 200 * 2 ** tries);
    await Promise.race([wait(backoff * (0.75 + Math.random() / 2)), new Promise((resolve) => (rested = resolve))]);
  }
  stream.leading = false;
}

function enter() {
  leaving = false;
  if (channel) {
    claim = new AbortController();
    navigator.locks.request("monitor-stream", { signal: claim.signal }, lead).catch(() => {});
    channel.postMessage({ ask: true });
  } else if (!stream.leading && !document.hidden) lead();
}

function leave() {
  leaving = true;
  claim?.abort();
  cut?.abort();
  rested();
}

// Reads, or hears of, what comes after the place. `woken` is called when the machine slept, or the network is back:
// what is shown may be old then, and the stream dead without a sign.
export function subscribe(placeNow, woken) {
  place = placeNow;
  const wake = () => {
    cut?.abort();
    rested();
    woken();
  };
  let last = Date.now();
  setInterval(() => {
    if (Date.now() - last > (document.hidden ? 90000 : 5000)) wake(); // timers of a hidden tab run once a minute
    last = Date.now();
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
