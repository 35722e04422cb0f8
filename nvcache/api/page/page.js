// Keeps the page true: looks at everything, then follows the daemon's events, or asks every two seconds where it has none. It paints nothing itself,
// and asks nothing while it is hidden.

import { Refusal, events, get } from "./stream.js";
import * as view from "./view.js";
import { clock, named } from "./words.js";

const POLL_MS = 2000; // between two looks without events, and at what events do not carry
const LOOK_MS = 15_000; // between two looks at everything while nothing happens
const SILENCE_MS = 25_000; // the daemon gives a sign of life every ten seconds
const FIRST_MS = 1000;
const LONGEST_MS = 30_000;
const TICK_MS = 10_000;
// What is said by a daemon that is not there for anything, or for it by `nvcache ui`.
const GONE = new Set(["daemon-unreachable", "timeout", "stopping", "unauthorized", ""]);

const models = new Map();
let token = null;
let mayList = true; // leases: only an admin may
let heard = Date.now();
let wake = () => {};

// -- waiting

const pause = (ms) =>
  new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    wake = () => (clearTimeout(timer), resolve());
  });

const visible = () =>
  new Promise((resolve) => {
    const look = () => document.hidden || (document.removeEventListener("visibilitychange", look), resolve());
    document.addEventListener("visibilitychange", look);
    look();
  });

// -- looking

const fatal = (problem) => !(problem instanceof Refusal) || problem.status === 401 || GONE.has(problem.code);

// Shows one part of the page; a refusal of that part alone is said in its place. Throws when the daemon is away or wants a token.
async function part(section, path, show) {
  try {
    show(await get(path, token));
    view.refused(section, null);
  } catch (problem) {
    if (fatal(problem)) throw problem;
    view.refused(section, problem);
  }
}

async function lookAtLeases() {
  if (!mayList) return;
  try {
    view.leases((await get("v1/leases", token)).leases);
  } catch (problem) {
    if (fatal(problem)) throw problem;
    mayList = false;
  }
}

// Everything that comes by no event.
async function lookAround() {
  await Promise.all([
    part("space", "v1/space", view.space),
    part("disks", "v1/stripe", view.disks),
    part("jobs", "v1/jobs", ({ jobs }) => view.jobs(jobs)),
    get("readyz", token).then(view.readiness),
    lookAtLeases(),
  ]);
  heard = Date.now();
}

async function look() {
  view.version((await get("version", token)).version);
  await part("models", "v1/models", (found) => {
    const gone = new Set(models.keys());
    for (const model of found.models) {
      gone.delete(model.entry);
      take(model);
    }
    gone.forEach((entry) => models.delete(entry));
    view.models(models);
  });
  await lookAround();
}

// One model as it is now. Who cannot see the page is told of a new state.
function take(model) {
  const before = models.get(model.entry);
  if (model.state === "absent") models.delete(model.entry);
  else models.set(model.entry, model);
  if (before && before.state !== model.state) view.announce(`${named(model).name}: ${model.state}`);
}

// -- following

// Until the daemon ends the stream or the page is hidden; false: it has none, or none just now. Throws when the daemon is away.
async function follow() {
  const control = new AbortController();
  const hide = () => document.hidden && control.abort(null);
  let [changed, looked, silence, frame] = [false, Date.now(), 0, 0];
  const alive = () => {
    heard = Date.now();
    clearTimeout(silence);
    silence = setTimeout(() => control.abort(new Error("it gave no sign of life")), SILENCE_MS);
  };
  const again = setInterval(async () => {
    const all = Date.now() - looked >= LOOK_MS;
    if (!changed && !all) return;
    [changed, looked] = [false, all ? Date.now() : looked];
    await (all ? look() : lookAround()).catch((problem) => control.abort(problem));
  }, POLL_MS);
  document.addEventListener("visibilitychange", hide);
  try {
    for await (const event of events("v1/events", token, control.signal)) {
      alive();
      view.here("Live");
      if (event?.type === "problem") return true;
      if (!event?.data.entry) continue;
      take(event.data);
      changed = true;
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => view.models(models));
    }
  } catch (problem) {
    if (!fatal(problem)) return false;
    if (!control.signal.aborted) throw problem;
    if (control.signal.reason !== null) throw control.signal.reason;
  } finally {
    document.removeEventListener("visibilitychange", hide);
    clearTimeout(silence);
    clearInterval(again);
    control.abort(null);
  }
  return true;
}

// For a while, or until the page is hidden. Throws when the daemon is away.
async function poll() {
  for (const until = Date.now() + LOOK_MS; Date.now() < until; ) {
    view.here("Live, asked every 2 s");
    await pause(POLL_MS);
    if (document.hidden) return;
    await look();
  }
}

async function run() {
  let wait = FIRST_MS;
  for (;;) {
    await visible();
    try {
      await look();
      wait = FIRST_MS;
      if (!(await follow())) await poll();
      else if (!document.hidden) await pause(POLL_MS);
    } catch (problem) {
      if (problem.status === 401) token = await view.askToken(token !== null);
      else {
        view.away(...told(problem));
        await pause(wait * (0.75 + Math.random() / 2));
        wait = Math.min(LONGEST_MS, wait * 2);
      }
    }
  }
}

// What is wrong: its title, why, and what to do.
function told(problem) {
  if (problem.status === 403 || problem.code === "unauthorized") return ["Not let in.", problem.message, problem.hint];
  const since = `Daemon away since ${clock(heard)}.`;
  if (problem instanceof Refusal) return [since, problem.message, problem.hint];
  return [since, `Nobody answers at ${location.host}.`, "Is the daemon running, and if this page came by `nvcache ui`, is that?"];
}

// The link that let this browser in holds a secret that is spent: nobody needs to see it any more.
if (location.search) history.replaceState(null, "", location.pathname);
document.addEventListener("visibilitychange", () => document.hidden || wake());
addEventListener("online", () => wake());
view.onAgain(() => wake());
setInterval(() => document.hidden || view.tick(), TICK_MS);
run();
