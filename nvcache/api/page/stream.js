// Asks the daemon: one answer, or its stream of events. It shows nothing and decides nothing.
//
// The stream is read by fetch and not by EventSource, which could not send the bearer token.

const ANSWER_MS = 10_000;

export class Refusal extends Error {
  constructor(status, document) {
    super(document.detail ?? `the answer was HTTP status ${status}`);
    this.status = status;
    this.code = document.code ?? "";
    this.hint = document.hint ?? "";
  }
}

const headers = (token) => (token === null ? {} : { Authorization: `Bearer ${token}` });

async function refusal(response) {
  try {
    return new Refusal(response.status, await response.json());
  } catch {
    return new Refusal(response.status, {}); // no problem document: something else answers here
  }
}

// GET `path`, its JSON back. 503 of /readyz is an answer as well. Throws Refusal; TypeError or a DOMException when nobody answers.
export async function get(path, token) {
  const response = await fetch(path, { headers: headers(token), cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  if (!response.ok && path !== "readyz") throw await refusal(response);
  return response.json();
}

// The events of `path` as they come, {type, data}, and null for a sign of life; until the stream ends or `signal` says so. Throws as `get`.
export async function* events(path, token, signal) {
  const response = await fetch(path, { headers: { ...headers(token), Accept: "text/event-stream" }, cache: "no-store", signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const frames = (text + value).split("\n\n");
    text = frames.pop();
    yield* frames.map(event);
    if (frames.length === 0) yield null;
  }
}

function event(frame) {
  const fields = frame.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trimStart()]);
  const data = fields.filter(([name]) => name === "data").map(([, value]) => value).join("\n");
  return data ? { type: fields.find(([name]) => name === "event")?.[1] ?? "message", data: JSON.parse(data) } : null;
}
