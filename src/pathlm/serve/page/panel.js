// The path of one token: a routed one's choices as a map, a signal's energies and what they are made of as bars, both with their numbers.

import { block, number, percent, readable, signed } from "./words.js";

const PARTS = 8; // of an energy, at most
const FAINT = 0.01; // of the largest part: what is smaller is summed up
const WIDE = 54; // a choice on the map
const HIGH = 22;
const LEFT = 46; // names of blocks
const TOP = 20; // numbers of steps

/** Put what is known of a token's path in `place`. */
export function draw(place, token, tokens, model) {
  const own = token.step?.node ?? token.path?.text ?? token.name; // the last bytes, of what it completes
  const title = element("h3", "", "Path of ", element("q", "", readable(token.name)));
  if (own !== token.name) title.append(" (", element("q", "", readable(own)), ")");
  const rest = token.path ? routed(token.path, model) : token.step ? signal(token, tokens) : [element("p", "quiet", "This model tells no paths.")];
  place.replaceChildren(title, ...rest);
}

function routed(path, model) {
  const end = path.steps.findIndex((step, number) => number >= path.first && step.node === "exit");
  if (end < 0) {
    const names = path.steps.map((step) => block(step.node));
    const told = `A plain decoder: every token visits ${names[0]} to ${names.at(-1)} in order, and there is nothing to choose.`;
    return [element("p", "quiet", told)];
  }
  const choices = path.steps.slice(path.first, end + 1);
  const before = path.steps.slice(0, path.first).map((step) => block(step.node));
  const after = path.steps.slice(end + 1).map((step) => block(step.node));
  return [
    element("p", "way", ...way(path, end)),
    scrolls(map(choices, actions(choices, model), before, after)),
    element("p", "quiet", "A column for each choice of the router; probabilities in per cent."),
    numbers(
      ["step", "went to", "probability", "almost"],
      choices.map((step, place) => [place + 1, block(step.node), alone(step) ? "no choice" : percent(step.score), almost(step.rivals)]),
    ),
  ];
}

/** The whole path in a line, dim where nobody chose. */
function way(path, end) {
  return path.steps.flatMap((step, place) => {
    const chosen = place >= path.first && place <= end;
    return [place ? " → " : "", element("span", chosen ? "" : "quiet", block(step.node))];
  });
}

/** Every action that could be chosen: the pool's blocks, then leaving. */
function actions(choices, model) {
  const [from, to] = model.pool ?? [Infinity, -Infinity];
  const blocks = new Set(Array.from({ length: Math.max(to - from + 1, 0) }, (_, place) => `block:${from + place}`));
  for (const step of choices) for (const [node] of [[step.node], ...step.rivals]) for (const one of node.split("+")) if (one !== "exit") blocks.add(one);
  return [...[...blocks].sort((one, other) => Number(one.slice(6)) - Number(other.slice(6))), "exit"];
}

/** A column for each choice, a row for each action, darker the likelier; the path goes through what was chosen. */
function map(choices, rows, before, after) {
  const x = (step) => LEFT + WIDE * (step + 0.5);
  const y = (node) => TOP + HIGH * (rows.indexOf(node) + 0.5);
  const width = LEFT + WIDE * choices.length + LEFT;
  const high = TOP + HIGH * rows.length + 4;
  const said = choices.map((step) => `${block(step.node)}${alone(step) ? "" : ` with ${percent(step.score)}`}`).join(", then ");
  const picture = shape("svg", { viewBox: `0 0 ${width} ${high}`, width, height: high, role: "img", "aria-label": `The router chose ${said}.` });
  for (const node of rows) picture.append(shape("text", { x: LEFT - 8, y: y(node) + 4, class: "name" }, block(node)));
  for (const [place, step] of choices.entries()) {
    picture.append(shape("text", { x: x(place), y: TOP - 7, class: "count" }, String(place + 1)));
    const taken = step.node.split("+");
    const likely = new Map([...step.rivals, ...taken.map((node) => [node, step.score])]);
    for (const node of rows) {
      const share = likely.get(node) ?? 0;
      const box = { x: x(place) - WIDE / 2 + 1.5, y: y(node) - HIGH / 2 + 1.5, width: WIDE - 3, height: HIGH - 3, rx: 2 };
      const cell = shape("rect", { ...box, class: taken.includes(node) ? "cell taken" : "cell" });
      cell.style.setProperty("--likely", share);
      picture.append(cell);
    }
  }
  const through = choices.flatMap((step, place) => step.node.split("+").slice(0, 1).map((node) => `${x(place)},${y(node)}`));
  picture.append(shape("polyline", { points: through.join(" "), class: "route" }));
  for (const [place, step] of choices.entries()) {
    const taken = step.node.split("+");
    for (const node of taken) picture.append(shape("circle", { cx: x(place), cy: y(node), r: 3.2, class: "stop" }));
    for (const [node, share] of [...step.rivals, ...taken.map((one) => [one, step.score])]) {
      if (rows.includes(node) && share >= 0.05 && !alone(step)) {
        const lower = taken.includes(node) ? 15 : 0;
        picture.append(shape("text", { x: x(place) + lower, y: y(node) + 3.5, class: "share" }, String(Math.round(100 * share))));
      }
    }
  }
  if (before.length) picture.append(shape("text", { x: 2, y: TOP - 7, class: "end" }, `${short(before)} →`));
  if (after.length) picture.append(shape("text", { x: width - 2, y: y("exit") + 4, class: "end last" }, `→ ${short(after)}`));
  return picture;
}

function signal(token, tokens) {
  const step = token.step;
  if (!token.place) return [element("p", "quiet", "The signal starts here.")];
  const arrivals = [[step.node, step.score, true], ...step.rivals.map(([node, energy]) => [node, energy, false])];
  arrivals.sort((one, other) => other[1] - one[1] || other[2] - one[2]);
  const most = arrivals[0][1];
  const ahead = step.rivals.length ? `, ${signed(step.score - step.rivals[0][1])} against “${readable(step.rivals[0][0])}”` : "";
  const found = [
    element("p", "way", `Energy ${number(step.score)}${ahead}`),
    element("h4", "", "Where the signal would arrive"),
    bars(arrivals.map(([node, energy, taken]) => ({ name: readable(node), value: energy / most, told: number(energy), taken }))),
  ];
  if (step.parts?.length) found.push(element("h4", "", "What this energy is the sum of"), ...parts(step, tokens));
  return found;
}

/** The largest parts of an energy in the order of the text, beside those of the first rival. */
function parts(step, tokens) {
  const rival = step.rival_parts?.[0];
  const all = step.parts.map(([name, value], place) => ({ name: source(name, tokens), value, beside: rival?.[place], place }));
  const weight = (part) => Math.max(Math.abs(part.value), Math.abs(part.beside ?? 0));
  const least = FAINT * Math.max(...all.map(weight));
  const largest = all.filter((part) => weight(part) >= least).sort((one, other) => weight(other) - weight(one)).slice(0, PARTS);
  const rest = all.filter((part) => !largest.includes(part));
  const shown = largest.sort((one, other) => one.place - other.place);
  const sum = (of, key) => of.reduce((total, part) => total + (part[key] ?? 0), 0);
  if (rest.length) shown.push({ name: `${rest.length} smaller`, value: sum(rest, "value"), beside: rival && sum(rest, "beside") });
  const most = Math.max(...shown.map(weight));
  const rows = shown.map((part) => ({
    name: part.name, value: part.value / most, beside: rival && part.beside / most, told: signed(part.value), diverging: true,
  }));
  const table = numbers(
    ["part", `in ${readable(step.node)}`, ...(rival ? [`in ${readable(step.rivals[0][0])}`] : [])],
    all.map((part) => [part.name, signed(part.value, 3), ...(rival ? [signed(part.beside, 3)] : [])]),
  );
  const key = rival ? [element("p", "quiet", "The thin bar is the first rival’s. In the text, each token is underlined by its share.")] : [];
  return [bars(rows), ...key, table];
}

/** The place of the token that a part of an energy comes from; -1 for one that comes from none. */
export function origin(name) {
  return name === "signal" ? 0 : name.startsWith("step:") ? Number(name.slice(5)) : -1;
}

function source(name, tokens) {
  const place = origin(name);
  return tokens[place] ? `${readable(tokens[place].name)} (${place})` : name;
}

function bars(rows) {
  return element(
    "ul",
    rows[0].diverging ? "bars diverging" : "bars",
    ...rows.map((row) => {
      const track = element("span", "track", bar("bar", row.value), ...(row.beside === undefined ? [] : [bar("bar beside", row.beside)]));
      return element("li", row.taken ? "taken" : "", element("span", "name", row.name), track, element("span", "told", row.told));
    }),
  );
}

function bar(kind, value) {
  const found = element("span", value < 0 ? `${kind} below` : kind);
  found.style.setProperty("--size", Math.abs(value));
  return found;
}

function numbers(heads, rows) {
  const table = element("table", "", element("thead", "", element("tr", "", ...heads.map((head) => element("th", "", head)))));
  table.append(element("tbody", "", ...rows.map((row) => element("tr", "", ...row.map((cell) => element("td", "", String(cell)))))));
  return element("details", "", element("summary", "", "Numbers"), scrolls(table));
}

function scrolls(...parts) {
  const box = element("div", "scrolls", ...parts);
  box.tabIndex = 0;
  return box;
}

/** What almost happened: the first rival, and others with at least one per cent. */
function almost(rivals) {
  return rivals.filter(([, score], place) => !place || score >= 0.01).map(([node, score]) => `${block(node)} ${percent(score)}`).join(", ");
}

function alone(step) {
  return !step.rivals.length;
}

function short(names) {
  return names.length > 2 ? `${names[0]}…${names.at(-1)}` : names.join(" ");
}

function element(name, kind, ...parts) {
  const found = document.createElement(name);
  if (kind) found.className = kind;
  found.append(...parts);
  return found;
}

function shape(name, attributes, text) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text) found.textContent = text;
  return found;
}
