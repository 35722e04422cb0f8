// How sizes, times and texts are written for people, as the command line writes them. It touches no element.

const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069\ud800-\udfff]/gu; // as core/names.py, with half surrogates

export const plain = (text) => String(text ?? "").replace(UNPRINTABLE, "\ufffd");

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = bytes;
  while (value >= 999.95 && units.length > 1) {
    value /= 1000;
    units.shift();
  }
  return units[0] === "B" ? `${value.toFixed(0)}\u00a0B` : `${value.toFixed(1)}\u00a0${units[0]}`;
}

export function duration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole} s`;
  return hours ? `${hours}:${two(minutes)}:${two(rest)} h` : `${minutes}:${two(rest)} min`;
}

export const left = (seconds) => `${seconds < 60 ? `${Math.max(1, Math.round(seconds))} s` : duration(seconds)} left`;

const UNITS = [[86400, "d"], [3600, "h"], [60, "min"]];

export function distance(moment, now = Date.now()) {
  const seconds = (new Date(moment) - now) / 1000;
  const [length, unit] = UNITS.find(([length]) => Math.abs(seconds) >= length) ?? [];
  if (!length) return seconds > 0 ? "in less than a minute" : "just now";
  const whole = Math.floor(Math.abs(seconds) / length);
  return seconds > 0 ? `in ${whole} ${unit}` : `${whole} ${unit} ago`;
}

export const clock = (moment) => new Date(moment).toLocaleTimeString("en-GB");

export const full = (moment) => new Date(moment).toISOString().replace("T", " ").replace(/\.\d+Z$/, " UTC");

// A fill's progress in one phrase, and as a share of 1; a share only when the total is known.
export function going(progress) {
  if (!progress?.bytes_total) return { share: null, text: "" };
  const { bytes_done: done, bytes_total: total, rate, eta_s: eta } = progress;
  const share = Math.min(1, done / total);
  const parts = [`${Math.floor(100 * share)}%`, `${size(done)} of ${size(total)}`];
  if (rate) parts.push(`${size(rate)}/s`);
  if (eta !== null) parts.push(left(eta));
  return { share, text: parts.join(" · ") };
}

// org/name of a reference, and the revision behind it; other sources keep their scheme.
export function named(model) {
  const ref = model.ref.endsWith(`@${model.revision}`) ? model.ref.slice(0, -model.revision.length - 1) : model.ref;
  return { name: plain(ref.replace(/^hf:\/\//, "")), revision: plain(model.revision.slice(0, 12)) };
}
