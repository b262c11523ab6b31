// Speech: the request, the voices, and a player for sound that is still being made.

import { call, ServerError } from "./api.js";

const LEAD_SECONDS = 0.08; // what must be there before it starts, so that it does not stutter

/** The body of a request for `text` as raw samples. */
export function speechRequest(model, text, voice) {
  const body = { model, input: text, response_format: "pcm" };
  return { path: "v1/audio/speech", body: voice ? { ...body, voice } : body };
}

/** Ask for an exchange's prompt as speech, and play it as it comes; resolves when it is over. */
export async function speak(exchange, { path, body }, signal, onNews) {
  const started = performance.now();
  const response = await call(path, { body, signal });
  const player = new Player(Number(response.headers.get("X-Audio-Sample-Rate")));
  signal.addEventListener("abort", () => player.close());
  try {
    let firstAt = null;
    for await (const samples of samplesOf(response)) {
      firstAt ??= performance.now();
      player.play(samples);
      const ttfa = Math.round(firstAt - started);
      const rtf = (performance.now() - started) / 1000 / player.seconds;
      const figures = [`first sound ${ttfa} ms`, `${player.seconds.toFixed(2)} s`];
      exchange.ending = [...figures, `RTF ${rtf.toFixed(2)}`].join("  ·  ");
      onNews();
    }
    await player.end();
    signal.throwIfAborted();
  } finally {
    player.close();
  }
}

/** The float samples of a streamed body of 16-bit ones. */
async function* samplesOf(response) {
  const reader = response.body.getReader();
  let rest = new Uint8Array(0);
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The connection broke off before the speech was complete.");
    });
    if (done) return;
    const bytes = new Uint8Array(rest.length + value.length);
    bytes.set(rest);
    bytes.set(value, rest.length);
    const size = bytes.length - (bytes.length % 2); // a sample may come in two pieces
    rest = bytes.slice(size);
    const view = new DataView(bytes.buffer, 0, size);
    if (size) yield Float32Array.from({ length: size / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
  }
}

/** Plays pieces one after the other without a gap, as long as they come in time. */
class Player {
  constructor(sampleRate) {
    this.context = new AudioContext({ sampleRate });
    this.at = 0;
    this.seconds = 0;
    this.closed = new Promise((resolve) => (this.onClose = resolve));
  }

  play(samples) {
    const buffer = this.context.createBuffer(1, samples.length, this.context.sampleRate);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    this.at = Math.max(this.at, this.context.currentTime + LEAD_SECONDS);
    source.start(this.at);
    this.at += buffer.duration;
    this.seconds += buffer.duration;
    this.last = source;
  }

  /** Wait until the last piece has been played, or the player is closed. */
  async end() {
    if (!this.last) return;
    const played = new Promise((resolve) => this.last.addEventListener("ended", resolve));
    await Promise.race([played, this.closed]);
  }

  close() {
    this.onClose();
    if (this.context.state !== "closed") this.context.close();
  }
}

// --- Voices

const byId = (id) => document.getElementById(id);

export const readVoice = () => byId("voice").value;

/** Fill the list of voices with what the server has. */
export async function loadVoices(chosen = readVoice()) {
  const { data } = await (await call("v1/audio/voices")).json();
  const options = data.map(({ id, name }) => new Option(name, id));
  byId("voice").replaceChildren(new Option("The model's own", ""), ...options);
  byId("voice").value = data.some(({ id }) => id === chosen) ? chosen : "";
}

/** Send the recording that the reader chose as a new voice. */
async function addVoice() {
  const [file] = byId("voice-file").files;
  if (!file) return;
  const [text, name] = [byId("voice-text").value.trim(), file.name.replace(/\.[^.]*$/, "")];
  const body = { name, audio: await base64Of(file), ...(text && { text }) };
  const { id } = await (await call("v1/audio/voices", { body })).json();
  await loadVoices(id);
}

const base64Of = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new ServerError("The file cannot be read."));
    reader.readAsDataURL(file);
  });

/** Wire the voices up; `say` shows the reader what went wrong. */
export function start(say) {
  byId("add-voice").addEventListener("click", () => {
    say("");
    addVoice().catch((error) => say(error.message));
  });
}
