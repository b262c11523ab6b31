// The live strip: what the engine does now, and did in the last minute.

import { call } from "./api.js";

const INTERVAL_MS = 1000;
const NUM_SAMPLES = 60;
const SVG = "http://www.w3.org/2000/svg";

const round = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));
const FORMATS = {
  throughput: round,
  kv_usage: (value) => `${round(value * 100)} %`,
  running: (value) => value.toFixed(0),
  waiting: (value) => value.toFixed(0),
};

/** A figure with its history as a line; `ceiling` is its greatest value, if it has one. */
class Series {
  constructor(node, ceiling) {
    this.format = FORMATS[node.dataset.series];
    this.ceiling = ceiling;
    this.samples = [];
    this.figure = document.createElement("span");
    this.figure.textContent = "–";
    this.line = document.createElementNS(SVG, "polyline");
    const chart = document.createElementNS(SVG, "svg");
    chart.setAttribute("viewBox", `0 0 ${NUM_SAMPLES - 1} 20`);
    chart.setAttribute("preserveAspectRatio", "none");
    chart.setAttribute("aria-hidden", "true");
    chart.append(this.line);
    node.append(this.figure, chart);
  }

  add(value) {
    this.samples = [...this.samples, value].slice(-NUM_SAMPLES);
    this.figure.textContent = this.format(value);
    const top = this.ceiling ?? Math.max(1, ...this.samples);
    const start = NUM_SAMPLES - this.samples.length;
    const points = this.samples.map((sample, i) => `${start + i},${19 - (18 * sample) / top}`);
    this.line.setAttribute("points", points.join(" "));
  }

  forget() {
    this.figure.textContent = "–";
  }
}

/**
 * Read the server's figures each second while the page is visible, and draw them.
 *
 * `onChange` hears "online", or the error that took the server away, once each time that changes.
 * A server that wants a key is asked again when the returned function is called.
 */
export function watchEngine(strip, onChange) {
  const series = {};
  for (const node of strip.querySelectorAll("[data-series]")) {
    const name = node.dataset.series;
    series[name] = new Series(node, name === "kv_usage" ? 1 : undefined);
  }
  let before = null;
  let status = null;

  function show(stats) {
    const now = performance.now();
    if (before && stats.generation_tokens >= before.tokens) {
      const seconds = (now - before.now) / 1000;
      series.throughput.add((stats.generation_tokens - before.tokens) / seconds);
    }
    before = { now, tokens: stats.generation_tokens };
    series.kv_usage.add(stats.kv_cache_usage);
    series.running.add(stats.num_running);
    series.waiting.add(stats.num_waiting);
  }

  /** Draw the figures; resolve to whether the server lets us ask again. */
  async function poll() {
    let news = "online";
    try {
      show(await (await call("metrics.json")).json());
    } catch (error) {
      news = error;
      before = null;
      Object.values(series).forEach((each) => each.forget());
    }
    const name = news.message ?? news;
    if (name !== status) onChange(news);
    status = name;
    return news.status !== 401;
  }

  let timer = null;
  async function loop() {
    clearTimeout(timer);
    if (document.hidden) return;
    const goesOn = await poll();
    clearTimeout(timer);
    if (goesOn) timer = setTimeout(loop, INTERVAL_MS);
  }
  document.addEventListener("visibilitychange", loop);
  loop();
  return loop;
}
