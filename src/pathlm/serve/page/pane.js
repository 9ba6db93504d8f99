// One model: its own settings, the text as tokens in colours, and the path of the token that is chosen.

import { paths, writing } from "./api.js";
import { draw, origin } from "./panel.js";
import { number, percent, readable, signed, spelled } from "./words.js";

const SHADES = 6;
const LEADS = { sure: "most energy", close: "as much as another", beaten: "another had more" };
const READ_EVERY = 1500; // milliseconds between two pieces for a screen reader

export class Pane {
  constructor(known, model, place) {
    this.known = known;
    this.place = place;
    this.element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
    this.text = this.part(".text");
    this.field("model").append(...known.map((one) => new Option(one.name)));
    this.field("model").addEventListener("change", () => this.use(known.find((one) => one.name === this.field("model").value)));
    this.field("budget").addEventListener("input", () => this.showBudget());
    this.text.addEventListener("focusin", (event) => this.choose(Number(event.target.dataset.place)));
    this.text.addEventListener("click", (event) => event.target.closest(".token")?.focus());
    this.text.addEventListener("keydown", (event) => this.move(event));
    this.use(model);
  }

  part(selector) {
    return this.element.querySelector(selector);
  }

  field(name) {
    return this.part(`[name=${name}]`);
  }

  /** Offer what this model can be asked. */
  use(model) {
    this.model = model;
    this.part("h2").textContent = `Model ${this.place}: ${model.name}`;
    this.field("model").value = model.name;
    const offer = (name, is) => (this.field(name).closest("label").hidden = !is);
    offer("budget", model.budgets);
    offer("branches", model.branches > 1);
    offer("signal", model.signal_size);
    offer("start", model.kind === "graph" && model.start_token);
    if (model.budgets) {
      [this.field("budget").min, this.field("budget").max] = model.budgets;
      this.field("budget").value = model.budget;
      this.showBudget();
    }
    this.field("branches").max = model.branches;
    this.part(".facts").textContent = facts(model);
    this.clear();
  }

  showBudget() {
    this.part("output").value = percent(this.field("budget").value);
  }

  clear() {
    this.tokens = [];
    this.underlined = [];
    this.chosen = null;
    this.follows = true;
    this.text.replaceChildren();
    this.part(".told").textContent = "";
    this.part(".path").replaceChildren();
    this.part(".scale").replaceChildren();
  }

  /** What only this model is asked; a field that is not offered is not asked about. */
  settings() {
    const given = (name) => (this.field(name).closest("label").hidden || this.field(name).value === "" ? undefined : Number(this.field(name).value));
    const asked = { model: this.model.name, budget: given("budget"), branches: given("branches"), initial_signal: given("signal") };
    if (!this.field("start").closest("label").hidden) asked.start_token = this.field("start").checked;
    return asked;
  }

  /** Show the paths of a text, and nothing more. Throws `Refused`, as `write` does. */
  async read({ prompt }, signal) {
    this.clear();
    if (!this.model.paths) {
      this.part(".told").textContent = "This model tells no paths.";
      return;
    }
    const read = await unlessStopped(paths({ ...this.settings(), input: prompt }, signal));
    if (!read) return;
    this.take(read.paths, { given: true, text: prompt });
    this.part(".told").textContent = this.summary(this.tokens);
    this.choose(this.tokens.length - 1);
  }

  /** Let the model write, and show each token with its path as it comes. */
  async write(asked, signal, said) {
    this.clear();
    const body = { ...asked, ...this.settings(), paths: this.model.paths };
    const begun = performance.now();
    const pieces = writing(body, signal);
    let [seed, count, unread, read] = ["", 0, "", begun];
    try {
      const first = pieces.next(); // asked at once, shown after the text before it
      first.catch(() => {});
      const read = this.model.paths ? (await paths({ ...this.settings(), input: asked.prompt }, signal)).paths : [];
      this.take(read, { given: true, text: asked.prompt });
      for (let piece = await first; !piece.done; piece = await pieces.next()) {
        const [choice] = piece.value.choices;
        seed = piece.value.seed;
        count += this.take(choice.paths ?? [], { text: choice.text });
        unread += choice.text;
        if (performance.now() - read > READ_EVERY) [read, unread] = [performance.now(), said(unread, this.place) ?? ""];
        this.part(".told").textContent = this.progress(count, begun, seed);
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      this.part(".told").textContent = `${this.progress(count, begun, seed)}, stopped`;
    } finally {
      await pieces.return();
      said(unread, this.place);
    }
  }

  /** Put tokens to the text. A routed model tells a path of each, a graph one path with a step for each. Returns how many came. */
  take(records, { given = false, text } = {}) {
    const found = records.flatMap((path) =>
      path.family === "brillm" ? path.steps.map((step) => ({ name: step.node, step })) : [{ name: path.text, path }],
    );
    if (!found.length && text) found.push({ name: text });
    const shown = given ? spelled(found.map((token) => token.name), text) : found.map((_, index) => (index < found.length - 1 ? "" : text));
    for (const [index, token] of found.entries()) this.add({ ...token, given, shown: shown[index] });
    return found.length;
  }

  add(token) {
    if (!token.given && this.tokens.at(-1)?.given) this.text.append(begins());
    token.place = this.tokens.push(token) - 1;
    const span = document.createElement("span");
    span.className = "token";
    span.dataset.place = token.place;
    span.setAttribute("role", "button");
    press(span, false);
    if (!token.place) span.tabIndex = 0;
    token.name = token.shown || token.name; // what is no whole character alone may make one with those before
    span.append(visible(token));
    token.span = span;
    this.colour(token);
    this.text.append(span);
    if (!this.follows) return;
    this.text.scrollTop = this.text.scrollHeight;
    if (token.path || token.step) this.choose(token.place, { following: true });
  }

  /** Colour a token by its depth or its lead, and say the same in words. */
  colour(token) {
    let said = "";
    if (token.path && this.model.kind === "routed") {
      const depth = route(token.path).length;
      const deepest = this.model.route_steps[1];
      token.span.classList.add(shade(depth, deepest));
      said = `, ${depth} route step${depth === 1 ? "" : "s"}`;
      this.scale(range(deepest).map((step) => [shade(step, deepest), step]), "route steps");
    } else if (token.step && token.place) {
      token.span.classList.add(lead(token.step));
      said = `, margin ${signed(margin(token.step))}`;
      this.scale(Object.entries(LEADS), "");
    }
    token.span.setAttribute("aria-label", readable(token.name) + said);
  }

  /** Say what the colours mean, once. */
  scale(meanings, unit) {
    if (this.part(".scale").childElementCount) return;
    for (const [kind, meaning] of meanings) {
      const swatch = document.createElement("span");
      swatch.className = `swatch ${kind}`;
      swatch.textContent = meaning;
      this.part(".scale").append(swatch);
    }
    this.part(".scale").append(unit);
  }

  choose(place, { following = false } = {}) {
    const token = this.tokens[place];
    if (!token || place === this.chosen) return;
    this.follows = following;
    for (const one of [this.tokens[0], this.tokens[this.chosen]]) if (one) press(one.span, false);
    press(token.span, true);
    this.chosen = place;
    this.showShares(token.step);
    draw(this.part(".path"), token, this.tokens, this.model);
  }

  /** Underline the tokens that the energy of a step is made of, by how much. */
  showShares(step) {
    for (const span of this.underlined) span.style.removeProperty("--share");
    this.underlined = [];
    for (const [name, share] of step?.parts ?? []) {
      const span = this.tokens[origin(name)]?.span;
      if (!span) continue;
      span.style.setProperty("--share", share / step.score);
      this.underlined.push(span);
    }
  }

  move(event) {
    const to = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!to) return;
    event.preventDefault();
    const place = Math.min(Math.max((this.chosen ?? 0) + to, 0), this.tokens.length - 1);
    this.tokens[place]?.span.focus();
  }

  progress(count, begun, seed) {
    const seconds = (performance.now() - begun) / 1000;
    const mine = this.summary(this.tokens.filter((token) => !token.given));
    return [`${count} tokens in ${number(seconds, 1)} s`, mine, seed === "" ? "" : `seed ${seed}`].filter(Boolean).join(" · ");
  }

  /** What the paths of some tokens have in common. */
  summary(tokens) {
    const mean = (numbers) => numbers.reduce((sum, one) => sum + one, 0) / numbers.length;
    const paths = tokens.flatMap((token) => token.path ?? []);
    const steps = tokens.flatMap((token) => (token.step && token.place ? token.step : []));
    if (paths.length && this.model.kind === "routed") {
      const blocks = paths.map((path) => path.steps.flatMap((step) => step.node.split("+")).filter((node) => node.startsWith("block:")).length);
      return `${number(mean(paths.map((path) => route(path).length)))} route steps, ${number(mean(blocks))} of ${this.model.blocks} blocks per token`;
    }
    return steps.length ? `margin ${signed(mean(steps.map(margin)))} on average` : "";
  }
}

/** The steps of a token that its router chose, without leaving. */
export function route(path) {
  const end = path.steps.findIndex((step, place) => place >= path.first && step.node === "exit");
  return end < 0 ? [] : path.steps.slice(path.first, end);
}

function margin(step) {
  return step.rivals.length ? step.score - step.rivals[0][1] : step.score;
}

function lead(step) {
  return ["beaten", "close", "sure"][Math.sign(margin(step)) + 1];
}

function shade(depth, deepest) {
  return `d${Math.round((depth / deepest) * (SHADES - 1))}`;
}

function range(last) {
  return Array.from({ length: last }, (_, place) => place + 1);
}

/** A token as it can be seen: line ends and tabs as signs, special and unfinished ones in small. */
function visible({ name, shown, given }) {
  if (!shown || (given && /^<\|.+\|>$/.test(name))) return small(readable(name) || "◌");
  return shown.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥\t").replaceAll("\ufffd", "◌");
}

function press(span, is) {
  span.setAttribute("aria-pressed", String(is));
  span.tabIndex = is ? 0 : -1;
}

/** The mark between what was given and what is written. */
function begins() {
  const mark = document.createElement("span");
  mark.className = "begins";
  return mark;
}

function small(text) {
  const sign = document.createElement("small");
  sign.textContent = text;
  return sign;
}

function facts(model) {
  const kinds = { graph: "Signal graph", routed: "Routed decoder", plain: "Plain decoder" };
  const parts = [kinds[model.kind] ?? model.family, `${compact(model.parameters)} parameters`];
  if (model.pool) parts.push(`${model.blocks} blocks, B${model.pool[0]} to B${model.pool[1]} in the pool`);
  else if (model.blocks) parts.push(`${model.blocks} blocks`);
  parts.push(model.context ? `reads ${model.context.toLocaleString("en")} tokens` : "reads texts of any length");
  if (!model.paths) parts.push("tells no paths");
  return parts.join(" · ");
}

function compact(count) {
  return new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(count);
}

async function unlessStopped(promise) {
  return promise.catch((error) => {
    if (error.name !== "AbortError") throw error;
  });
}
