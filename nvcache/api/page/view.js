// Paints what the daemon says. Every text goes in as text, never as markup; rows stay the same elements, so that focus and selection stay where
// they are. It asks nothing.

import { count, distance, duration, full, going, named, plain, size } from "./words.js";

const at = (id) => document.getElementById(id);
const SHOWN = ["backend", "array", "filesystem", "mount", "path"]; // of the stripe
const QUIET = {
  directory: "The store is a directory that nvcache was given.",
  md: "A RAID 0 of the node's disks.",
  lvm: "An LVM stripe of the node's disks.",
  single: "One disk of the node.",
};
const RANK = { degraded: 0, failed: 0, unknown: 0, fetching: 1, verifying: 1, queued: 1, evicting: 1 };
const rank = (state) => RANK[state] ?? 2;

// -- small things

function say(element, text, shown = text !== "") {
  if (element.textContent !== text) element.textContent = text;
  if (element.hidden === shown) element.hidden = !shown;
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// A moment as its age, which `tick` keeps true; the moment itself is its title.
function age(moment, before = "") {
  return element("time", `${before}${distance(moment)}`, { datetime: moment, title: full(moment), "data-before": before });
}

export function tick() {
  for (const time of document.querySelectorAll("time")) say(time, `${time.dataset.before}${distance(time.dateTime)}`);
}

// Put `children` into `parent` unless they say what is there already.
function fill(parent, children) {
  const same = parent.children.length === children.length && children.every((child, i) => child.isEqualNode(parent.children[i]));
  if (!same) parent.replaceChildren(...children);
  parent.hidden = children.length === 0;
}

const items = (texts) => texts.map((text) => (typeof text === "string" ? element("li", text) : wrap("li", text)));

function wrap(name, ...inside) {
  const made = document.createElement(name);
  made.append(...inside);
  return made;
}

const pairs = (list) => list.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", name), wrap("dd", value)]);

const isolated = (text) => element("bdi", plain(text));

function state(element, text, tone = text) {
  element.dataset.state = tone;
  say(element, text);
}

function progress(row, { share, text }) {
  const bar = row.querySelector("progress");
  bar.hidden = share === null;
  if (share !== null) bar.value = share;
  bar.ariaLabel = "progress";
  say(row.querySelector(".going"), text);
}

function trouble(row, error) {
  const where = row.querySelector(".trouble");
  where.hidden = !error;
  say(where.querySelector("bdi"), plain(error?.detail), true);
  say(where.querySelector(".hint"), plain(error?.hint), true);
}

// The rows of a list by key: made from a template, kept, moved only where they must be, dropped.
function rows(list, template, things, keyOf, paint) {
  const known = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const wanted = things.map((thing) => {
    const row = known.get(keyOf(thing)) ?? at(template).content.firstElementChild.cloneNode(true);
    known.delete(keyOf(thing));
    row.dataset.key = keyOf(thing);
    if (row.shows !== thing) paint(row, thing); // an unchanged model is the same object
    row.shows = thing;
    return row;
  });
  for (const row of known.values()) row.remove();
  const focused = document.activeElement;
  wanted.forEach((row, i) => list.children[i] !== row && list.insertBefore(row, list.children[i] ?? null));
  if (focused !== document.activeElement && list.contains(focused)) focused.focus({ preventScroll: true });
}

// -- models

let held = []; // the leases, where the caller may know them

export function leases(all) {
  held = all;
  at("models").querySelectorAll("details[open]").forEach(paintDetails);
}

export function models(byEntry) {
  const sorted = [...byEntry.values()].sort((a, b) => rank(a.state) - rank(b.state) || a.ref.localeCompare(b.ref));
  rows(at("models"), "model-row", sorted, (model) => model.entry, paintModel);
  at("models").hidden = sorted.length === 0;
  sum(sorted);
  sayWhyNone();
}

function sum(list) {
  const good = list.filter((model) => model.state === "ready").length;
  const rate = list.reduce((sum, model) => sum + (model.progress?.rate ?? 0), 0);
  const wrong = list.filter((model) => rank(model.state) === 0).length;
  const words = list.length ? [`${good} of ${count(list.length, "model")} ready`] : [];
  if (wrong) words.push(`${wrong} in trouble`);
  if (rate) words.push(`${size(rate)}/s`);
  say(at("sum"), words.join(" · "));
  title = list.length ? `${good}/${list.length} ready · nvcache` : "nvcache";
}

let ready = true;
let title = "nvcache"; // of the tab, while the node is ready

function sayWhyNone() {
  const none = at("models").children.length === 0;
  at("no-models").hidden = !none || !ready;
  at("no-models-now").hidden = !none || ready;
  document.title = ready ? title : "not ready · nvcache";
}

export function readiness(told) {
  ready = told.ready;
  at("not-ready").hidden = ready;
  fill(at("not-ready").querySelector("ul"), told.problems.map((text) => wrap("li", isolated(text))));
  sayWhyNone();
}

function paintModel(row, model) {
  const { name, revision } = named(model);
  say(row.querySelector(".name"), name);
  say(row.querySelector(".revision"), revision);
  state(row.querySelector(".state"), model.state);
  progress(row, model.error ? { share: null, text: "" } : going(model.progress));
  fill(row.querySelector(".facts"), items(facts(model)));
  trouble(row, model.error);
  fill(row.querySelector(".warnings"), [model.note, ...model.warnings].filter(Boolean).map((text) => wrap("li", isolated(text))));
  const details = row.querySelector("details");
  details.model = model;
  details.ontoggle = () => paintDetails(details);
  paintDetails(details);
}

function paintDetails(details) {
  if (details.open) fill(details.querySelector("dl"), pairs(more(details.model)));
}

function facts(model) {
  const under = model.progress?.bytes_total && !model.error;
  const found = [under ? `${model.progress.files_done} of ${count(model.files, "file")}` : `${size(model.bytes)} in ${count(model.files, "file")}`];
  const checked = [model.checked_at, model.verified_at].filter(Boolean).sort().at(-1);
  if (checked) found.push(age(checked, "verified "));
  if (model.last_used) found.push(age(model.last_used, "used "));
  if (model.leases) found.push(count(model.leases, "lease"));
  if (model.in_use) found.push("in use");
  if (model.pinned) found.push("pinned");
  if (model.unproven) found.push(`${count(model.unproven, "file")} without a published digest`);
  return found;
}

function more(model) {
  const moment = (text) => text && wrap("span", `${full(text)}, `, age(text));
  const ours = held.filter((lease) => lease.entry === model.entry);
  const holders = ours.map((lease) => wrap("div", isolated(lease.holder), age(lease.expires, " · ends ")));
  return [
    ["Reference", isolated(model.ref)],
    ["Directory", model.path && isolated(model.path)],
    ["HF_HUB_CACHE", model.hub_cache && isolated(`${model.hub_cache} as ${model.hub_id}`)],
    ["Verified", moment(model.verified_at)],
    ["Checked again", moment(model.checked_at)],
    ["Last used", moment(model.last_used)],
    ["Fetched", model.seconds ? `${size(model.fetched_bytes)} in ${duration(model.seconds)}` : null],
    ["Held by", holders.length ? wrap("div", ...holders) : null],
  ];
}

// -- space

export function space(room) {
  const kept = room.min_free ?? 0; // an older daemon tells neither this nor its marks
  const free = Math.max(0, Math.min(room.limit - room.used, room.free - kept) - room.reserved);
  const missing = Math.max(0, room.limit - room.used - room.reserved - free);
  const shares = [
    ["used", "Used", room.used - room.quarantined],
    ["promised", "Promised to fills", room.reserved],
    ["quarantined", "Quarantined", room.quarantined],
    ["free", "Free", free],
    ["others", "Lacking on the disk", missing],
  ].filter(([name, , bytes]) => bytes > 0 || name !== "others");
  const bar = at("bar");
  const said = [...shares.map(([, label, bytes]) => `${label} ${size(bytes)}`), `Limit ${size(room.limit)}`].join(", ");
  if (bar.ariaLabel !== said) {
    bar.ariaLabel = said;
    bar.replaceChildren(...shares.filter(([, , bytes]) => bytes > 0).map(([name, , bytes]) => segment(name, bytes)));
    const told = shares.map(([name, label, bytes]) => wrap("div", element("dt", label, { "data-share": name }), element("dd", size(bytes))));
    fill(at("shares"), [...told, wrap("div", element("dt", "Limit"), element("dd", size(room.limit)))]);
  }
  at("gauge").hidden = at("shares").hidden = room.total === 0;
  marks(room);
  const others = kept ? `, and ${size(kept)} stay free for others` : "";
  say(at("file-system"), room.total ? `The file system has ${size(room.free)} of ${size(room.total)} free${others}.` : "There is no store just now.");
}

function marks({ limit, used, reserved, high_mark: high, low_mark: low }) {
  for (const [name, bytes] of [["high", high], ["low", low]]) {
    at(name).hidden = !bytes;
    at(name).style.left = `${(100 * bytes) / limit}%`;
  }
  const now = used + reserved > high ? "It is above that now." : "";
  say(at("marks"), high ? `Above ${size(high)} the models used longest ago make way, down to ${size(low)}. ${now}`.trim() : "");
}

function segment(name, bytes) {
  const part = element("span", "", { "data-share": name });
  part.style.flexGrow = String(bytes); // by the object model: a style in markup would be against the page's own policy
  return part;
}

// -- jobs

export function jobs(list) {
  const newest = [...list].sort((a, b) => b.created_at.localeCompare(a.created_at));
  const [running, ended] = [newest.filter((job) => !job.ended_at), newest.filter((job) => job.ended_at)];
  const paint = (into, some) => rows(into, "job-row", some, (job) => job.id, paintJob);
  paint(at("jobs"), running);
  paint(at("ended").querySelector("ul"), ended);
  at("no-jobs").hidden = running.length > 0;
  at("ended").hidden = ended.length === 0;
  say(at("ended").querySelector("summary"), `${count(ended.length, "job")} ended in the last hour`);
}

function paintJob(row, job) {
  say(row.querySelector(".kind"), plain(job.kind));
  say(row.querySelector(".name"), plain(job.ref.replace(/^hf:\/\//, "").replace(/@([0-9a-f]{12})[0-9a-f]+$/, " $1")));
  state(row.querySelector(".state"), job.state);
  progress(row, job.ended_at ? { share: null, text: "" } : going(job.progress));
  const told = [age(job.created_at, "begun ")];
  if (job.ended_at) told.push(`took ${duration(job.seconds)}`, `${size(job.progress.bytes_fetched)} fetched`);
  if (job.repaired_chunks) told.push(`${count(job.repaired_chunks, "chunk")} repaired`);
  if (job.bad_files.length) told.push(isolated(`bad: ${job.bad_files.join(", ")}`));
  if (job.note) told.push(isolated(job.note));
  fill(row.querySelector(".facts"), items(told));
  trouble(row, job.error);
}

// -- disks

export function disks(stripe) {
  const sheet = at("stripe");
  state(sheet.querySelector(".state"), stripe.state);
  const words = [stripe.code, stripe.reason].filter(Boolean).map(plain).join(": ");
  say(sheet.querySelector(".said"), words || QUIET[stripe.backend] || "", true);
  const told = SHOWN.map((name) => [name[0].toUpperCase() + name.slice(1), stripe[name] && isolated(stripe[name])]);
  const members = (stripe.members ?? []).join(", ");
  fill(sheet.querySelector("dl"), pairs([...told, ["Members", members && isolated(members)], ["Health", stripe.health && isolated(stripe.health)]]));
  fill(sheet.querySelector(".warnings"), (stripe.warnings ?? []).map((text) => wrap("li", isolated(text))));
  const refusedFirst = (disk) => (disk.verdict === "refused" ? 0 : 1);
  const sorted = [...(stripe.disks ?? [])].sort((a, b) => refusedFirst(a) - refusedFirst(b) || a.name.localeCompare(b.name));
  rows(at("disks"), "disk-row", sorted, (disk) => disk.name, paintDisk);
  at("disks").hidden = sorted.length === 0;
}

function paintDisk(row, disk) {
  say(row.querySelector(".name"), plain(disk.name));
  state(row.querySelector(".state"), plain(disk.verdict));
  const told = [disk.model, disk.serial && `serial ${disk.serial}`].filter(Boolean).map(isolated);
  if (disk.size) told.push(size(disk.size));
  fill(row.querySelector(".facts"), items(told));
  say(row.querySelector(".why bdi"), [disk.code, disk.reason].filter(Boolean).map(plain).join(": "));
}

// -- the daemon itself

export const version = (text) => say(at("version"), plain(text), true);

// Why a section cannot be shown just now; null: it can.
export function refused(name, problem) {
  const section = document.querySelector(`section[aria-labelledby="${name}-title"]`);
  section.toggleAttribute("data-refused", problem !== null);
  say(section.querySelector(".refused"), problem ? plain(`${problem.message}. ${problem.hint}`) : "");
  if (name !== "models" || !problem) return;
  say(at("sum"), "");
  title = document.title = "nvcache";
}

export function here(how) {
  at("away").hidden = true;
  at("node").hidden = at("ways").hidden = false;
  delete at("node").dataset.old;
  at("link").dataset.link = "here";
  say(at("link"), how);
}

export function away(title, why, hint) {
  at("away").hidden = false;
  at("node").dataset.old = "";
  at("old").hidden = at("node").hidden;
  at("link").dataset.link = "away";
  say(at("link"), "Away");
  say(at("away-title"), title);
  say(at("away-why"), plain(why));
  say(at("away-hint"), plain(hint));
}

// What somebody who does not see the page may want to hear.
export const announce = (text) => say(at("news"), plain(text), true);

// Resolves with the token that is typed in.
export function askToken(wrong) {
  const [door, input] = [at("door"), at("token")];
  at("away").hidden = true;
  at("link").dataset.link = "asking";
  say(at("link"), "Asks for a token");
  door.hidden = false;
  say(at("token-wrong"), wrong ? "The daemon does not know this token." : "");
  input.focus();
  return new Promise((resolve) => {
    door.onsubmit = (event) => {
      event.preventDefault();
      door.hidden = true;
      resolve(input.value);
      input.value = "";
    };
  });
}

export const onAgain = (act) => at("again").addEventListener("click", act);
