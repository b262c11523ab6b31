// What the reader sets: system prompt, sampling parameters, key, and looks.

import { keepKey, readKey } from "./api.js";

// Name, label, hint, range [min, max, step], and where the slider rests while nothing is set; without it there is none.
const PARAMETERS = [
  ["temperature", "Temperature", "0 always takes the likeliest token", [0, 2, 0.05], 1],
  ["top_p", "Top p", "Of the likeliest tokens, as many as have this probability together", [0.01, 1, 0.01], 1],
  ["top_k", "Top k", "So many of the likeliest tokens; 0 is all", [0, 200, 1], 0],
  ["min_p", "Min p", "Tokens at least this likely, relative to the likeliest", [0, 1, 0.01], 0],
  ["repetition_penalty", "Repetition penalty", "Above 1, tokens that were there become less likely", [1, 2, 0.01], 1],
  ["max_tokens", "Max tokens", "The answer ends after so many tokens at the latest", [1, 2048, 1], 512],
  ["seed", "Seed", "The same seed and request give the same answer", [0, undefined, 1]],
];
const INITIAL = { max_tokens: 512 };
const THEMES = ["auto", "light", "dark"];
const WIDE = matchMedia("(min-width: 900px)"); // as in playground.css

const byId = (id) => document.getElementById(id);
const inputs = {};

/** A row of name, number and slider; the two inputs follow each other. */
function addParameter([name, label, hint, [min, max, step], neutral]) {
  const row = byId("parameter-template").content.firstElementChild.cloneNode(true);
  const [number, range] = row.querySelectorAll("input");
  row.title = hint;
  number.id = name;
  Object.assign(row.querySelector("label"), { htmlFor: name, textContent: label });
  Object.assign(number, { min, step });
  if (neutral === undefined) {
    range.remove();
  } else {
    range.setAttribute("aria-label", `${label} slider`);
    Object.assign(range, { min, max, step });
    range.addEventListener("input", () => setParameter(name, range.value));
  }
  const follow = () => {
    row.classList.toggle("unset", number.value === "");
    range.value = number.value === "" ? neutral : number.value;
  };
  number.addEventListener("input", follow);
  inputs[name] = { number, range, follow };
  byId("parameters").append(row);
}

function setParameter(name, value) {
  inputs[name].number.value = value;
  inputs[name].follow();
}

/** The parameters that are set, by their names in a request. */
export function readParameters() {
  const set = Object.entries(inputs).filter(([, { number }]) => number.value !== "");
  return Object.fromEntries(set.map(([name, { number }]) => [name, number.valueAsNumber]));
}

/** Set these parameters and no others. */
export function writeParameters(parameters) {
  for (const name of Object.keys(inputs)) setParameter(name, parameters[name] ?? "");
}

/** Let the slider of max_tokens reach as far as the model does. */
export function limitTokens(maxModelLen) {
  inputs.max_tokens.range.max = maxModelLen;
  inputs.max_tokens.follow();
}

export const readSystem = () => byId("system").value;
export const writeSystem = (text) => {
  byId("system").value = text;
};

/** Open or close the settings. */
export function show(open) {
  byId("settings").hidden = !open;
  byId("toggle-settings").setAttribute("aria-expanded", open);
}

/** Whether the settings lie over the conversation, as on a phone. */
export const coverPage = () => !WIDE.matches && !byId("settings").hidden;

/** Open the settings where a key goes. */
export function askForKey() {
  show(true);
  byId("api-key").focus();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("nanovllm.theme", theme);
  byId("theme").textContent = theme;
  byId("theme").setAttribute("aria-label", `Theme: ${theme}`);
}

/** Wire the settings up; `onKey` is called when there is another key. */
export function start(onKey) {
  PARAMETERS.forEach(addParameter);
  writeParameters(INITIAL);
  byId("reset").addEventListener("click", () => writeParameters(INITIAL));

  const kept = localStorage.getItem("nanovllm.theme");
  setTheme(THEMES.includes(kept) ? kept : "auto");
  byId("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme;
    setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  });

  const key = byId("api-key");
  key.value = readKey();
  key.addEventListener("change", () => {
    keepKey(key.value);
    onKey();
  });

  show(WIDE.matches);
  byId("toggle-settings").addEventListener("click", () => show(byId("settings").hidden));
}
