// The server's API: authorised calls, and event streams as async iterators.

const KEY = "nanovllm.api_key";

/** A call that failed, in words for the reader. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export const readKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => sessionStorage.setItem(KEY, key.trim());

/** Call the server, with POST if there is a body; resolve to a response that is no error. */
export async function call(path, { body, signal } = {}) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (readKey()) headers.Authorization = `Bearer ${readKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", body: JSON.stringify(body), headers, signal };
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  if (response.status === 401) {
    return new ServerError("This server wants an API key. Enter it under Settings.", 401);
  }
  const body = await response.json().catch(() => null); // a proxy may answer with something else
  const message = body?.error?.message ?? `The server answered ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  return new ServerError(wait ? `${message} Try again in ${wait} s.` : message, response.status);
}

/** The JSON chunks of a streamed answer, until its [DONE]. */
export async function* stream(path, { body, signal }) {
  const response = await call(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new ServerError("The connection broke off before the answer was complete.");
    const events = (unread + value).split(/\r?\n\r?\n/);
    unread = events.pop();
    for (const event of events) {
      const data = dataOf(event);
      if (data === "[DONE]") return;
      if (data) yield chunkOf(data);
    }
  }
}

/** What an event's data lines say; nothing for a comment that only keeps the connection alive. */
function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

function chunkOf(data) {
  const chunk = JSON.parse(data);
  if (chunk.error) throw new ServerError(chunk.error.message);
  return chunk;
}
