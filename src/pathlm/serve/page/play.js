// The page: what is asked, of which models, and when to stop.

import { Refused, models, useKey } from "./api.js";
import { Pane } from "./pane.js";

const at = (id) => document.getElementById(id);
const panes = [];
let known = [];
let stopping = null;

async function open() {
  try {
    known = await models();
  } catch (error) {
    explain(error);
    return;
  }
  at("locked").hidden = true;
  say("");
  if (!panes.length) addPane();
}

function addPane() {
  const other = known.find((model) => !panes.some((pane) => pane.model === model)) ?? known[0];
  const pane = new Pane(known, other, panes.length + 1);
  panes.push(pane);
  at("panes").append(pane.element);
}

/** What all models are asked alike, or null where a field says what is wrong with it. */
function question() {
  at("tokens").max = Math.min(...panes.map((pane) => pane.model.limits.new_tokens));
  if (!at("ask").reportValidity()) return null;
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return { prompt: at("prompt").value, temperature: number("temperature"), max_tokens: number("tokens"), seed: number("seed") };
}

async function start(how) {
  const asked = question();
  if (!asked || stopping || !panes.length) return;
  stopping = new AbortController();
  busy(true);
  say("");
  const ends = await Promise.allSettled(panes.map((pane) => pane[how](asked, stopping.signal, read)));
  stopping = null;
  busy(false);
  explain(...ends.filter((end) => end.status === "rejected").map((end) => end.reason));
}

function busy(is) {
  at("write").disabled = at("read").disabled = at("compare").disabled = is;
  at("stop").disabled = !is;
}

/** Tell what went wrong; where the server asks for its key there is a field for it. */
function explain(...errors) {
  const mistake = errors.find((error) => !(error instanceof Refused));
  if (mistake) throw mistake;
  if (errors.some((error) => error.status === 401)) at("locked").hidden = false;
  say([...new Set(errors.map((error) => error.message))].join(" "));
}

function say(message) {
  at("trouble").textContent = message;
  at("trouble").hidden = !message;
}

/** Let a screen reader read what the first model has written. */
function read(text, number) {
  if (number === 1) at("said").append(text);
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function theme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  at("theme").setAttribute("aria-pressed", String(dark));
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  at("said").textContent = "";
  start("write");
});
at("read").addEventListener("click", () => start("read"));
at("stop").addEventListener("click", () => stopping?.abort());
at("key").addEventListener("change", () => {
  useKey(at("key").value);
  open();
});
at("compare").addEventListener("change", () => {
  if (at("compare").checked && known.length) addPane();
  else panes.splice(1).forEach((pane) => pane.element.remove());
});
at("theme").addEventListener("click", () => theme(!isDark()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});

at("theme").setAttribute("aria-pressed", String(isDark()));
open();
