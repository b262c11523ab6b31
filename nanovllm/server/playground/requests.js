// What is asked of the server for an exchange, and how the answer is taken in.

import { readKey, ServerError } from "./api.js";

const STREAM = {
  stream: true,
  stream_options: { include_usage: true, continuous_usage_stats: true },
};

/** Path and body of a request for the text that follows `prompt`. */
export function completionRequest(model, prompt, parameters) {
  return { path: "v1/completions", body: { model, prompt, ...parameters, ...STREAM } };
}

/** Path and body of a request for the answer to the last of `messages`. */
export function chatRequest(model, messages, parameters) {
  return { path: "v1/chat/completions", body: { model, messages, ...parameters, ...STREAM } };
}

/** The system prompt and the exchanges as messages; what was never answered has only its prompt. */
export function messagesOf(system, exchanges) {
  const messages = exchanges.flatMap(({ prompt, answer }) => [
    { role: "user", content: prompt },
    ...(answer ? [{ role: "assistant", content: answer }] : []),
  ]);
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** A command for a shell that sends the request; the key stays out of it. */
export function curlOf({ path, body }) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [`curl -N ${quote(new URL(path, document.baseURI).href)}`];
  parts.push("-H 'Content-Type: application/json'");
  if (readKey()) parts.push('-H "Authorization: Bearer $API_KEY"');
  parts.push(`-d ${quote(JSON.stringify(body))}`);
  return parts.join(" \\\n  ");
}

/** Take a streamed answer into its exchange, and call `onNews` for each piece. */
export async function receive(exchange, chunks, onNews) {
  const started = performance.now();
  let firstAt = null;
  let numPieces = 0;
  for await (const { choices, usage } of chunks) {
    const { content, reasoning_content: thought = "" } = choices[0]?.delta ?? {};
    const text = content ?? choices[0]?.text ?? "";
    const grew = text || thought;
    if (grew) {
      exchange.answer += text;
      exchange.thought += thought;
      firstAt ??= performance.now();
      numPieces += 1;
    }
    exchange.ending = endingOf(choices[0]?.finish_reason) ?? exchange.ending;
    if (firstAt !== null) {
      // Most pieces are one token; a server that counts for us knows better.
      const tokens = usage?.completion_tokens ?? numPieces;
      // What comes after the text, such as the final usage, must not stretch the time.
      const seconds = grew ? (performance.now() - firstAt) / 1000 : exchange.figures.seconds;
      exchange.figures = { ttft: firstAt - started, tokens, seconds };
    }
    onNews();
  }
}

/** A word for an ending that is not the model's own. */
function endingOf(finishReason) {
  if (finishReason === "error") throw new ServerError("The server could not finish the answer.");
  return { length: "reached max tokens", abort: "stopped" }[finishReason];
}
