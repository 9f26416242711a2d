/** Asks the server: OpenAI's protocol, answers as server-sent events. */

/** Says why there is no answer. */
export class Refusal extends Error {
  constructor(message, code) {
    super(message);
    this.code = code;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const BROKEN = "The connection broke before the answer was complete.";

/**
 * Yields the chunks of a chat completion, as they arrive. Fails with a Refusal; when `signal` is
 * aborted, with another error, and the server's row is free.
 */
export async function* complete(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const request = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await fetch("v1/chat/completions", request).catch((error) => {
    throw signal.aborted ? error : new Refusal(UNREACHABLE, "unreachable");
  });
  if (!response.ok) throw await refusal(response);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Refusal(chunk.error.message, chunk.error.code);
      yield chunk;
    }
  } catch (error) {
    throw signal.aborted || error instanceof Refusal ? error : new Refusal(BROKEN, "broken");
  }
  throw new Refusal(BROKEN, "broken");
}

/** Returns what the server says in place of an answer. */
async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const { message = `The server answers with status ${response.status}.`, code } = body.error ?? {};
  return new Refusal(message, code ?? String(response.status));
}

/** Yields the data of each event of a stream of bytes. */
async function* events(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (held + value).split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Returns what the server says of its model; see `views.py` for the fields. */
export async function describe() {
  const response = await fetch("page/model.json");
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Waits until the server is warm; tells `cold` why. */
export async function warm(cold) {
  for (;;) {
    const response = await fetch("health").catch(() => null);
    if (response?.ok) return;
    cold(response ? "The server is warming up." : UNREACHABLE);
    await new Promise((resume) => setTimeout(resume, 1000));
  }
}
