"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const tell = () => button.setAttribute("aria-pressed", String(dark()));
  button.hidden = false;
  tell();
  system.addEventListener("change", tell);
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; tell(); });
  if (matchMedia("(max-width: 62rem)").matches) document.querySelector(".contents details").open = false;

  // Everything that comes from a run is put into the page as text, never as markup.
  const make = (name, kind, ...inside) => {
    const it = document.createElement(name);
    if (kind) it.className = kind;
    it.append(...inside);
    return it;
  };
  const told = (value, digits) => (value === null ? "–" : value.toFixed(digits).replace(/^-([0.]+)$/, "$1")); // no -0.00
  const percent = (share) => (share === null ? "–" : told(100 * share, 0) + " %");
  const meter = (share, kind) => {
    const bar = make("i");
    bar.style.width = Math.max(0, Math.min(1, share || 0)) * 100 + "%";
    const it = make("span", "meter " + (kind || ""), bar);
    it.setAttribute("aria-hidden", "true");
    return it;
  };
  const value = (number, digits, share, kind) => make("span", "number", meter(share === undefined ? number : share, kind), told(number, digits));
  const heading = (text) => { const it = make("th", "", text); it.scope = "col"; return it; };
  const rowHead = (text) => { const it = make("th", "", text); it.scope = "row"; return it; };
  const table = (caption, heads, rows) => make("div", "scroll", make("table", "",
    make("caption", "", caption), make("thead", "", make("tr", "", ...heads.map(heading))),
    make("tbody", "", ...rows.map((row) => make("tr", "", rowHead(row[0]), ...row.slice(1).map((cell) => make("td", "", cell)))))));

  const showRoute = (token) => {
    const chance = token.steps.reduce((product, step) => product * (step[1] === null ? NaN : step[1]), 1);
    const taken = token.steps.slice(token.first, token.first + token.chosen);
    const depth = taken.filter((step) => step[0] !== "OUT").length;
    const way = make("ol", "way", ...token.steps.map((step, place) =>
      make("li", "", make("span", place >= token.first && place < token.first + token.chosen ? "chosen" : "", step[0]))));
    way.setAttribute("aria-label", "Path");
    const rows = taken.map((step, place) => {
      const rivals = step[2].filter((rival) => rival[1] >= 0.005).map((rival) => make("span", "", meter(rival[1], "other"), rival[0] + " " + told(rival[1], 2)));
      return [String(place + 1), step[0], value(step[1], 2), make("span", "rivals", ...(rivals.length ? rivals : ["–"]))];
    });
    const summary = [`“${token.t}” `, make("span", "", `${depth} route step${depth === 1 ? "" : "s"}, ${token.blocks} blocks run, path probability ${Number.isFinite(chance) ? chance.toFixed(3) : "–"}`)];
    const detail = [way];
    if (rows.length) detail.push(table("What the router chose at each step, and what almost happened", ["step", "went to", "probability", "almost"], rows));
    return [summary, detail];
  };

  const showSignal = (token, place) => {
    if (!token.rivals.length && !token.parts.length) return [[`“${token.t}” `, make("span", "", "The initial signal starts here.")], []];
    const ahead = token.e - (token.rivals.length ? token.rivals[0][1] : 0);
    const verdict = !token.rivals.length ? "" : ahead > 0 ? `, ${ahead.toFixed(2)} ahead of the best rival` : ahead < 0 ? `, ${(-ahead).toFixed(2)} behind the best rival` : ", level with a rival";
    const most = Math.max(token.e, ...token.rivals.map((rival) => rival[1] || 0));
    const all = [[token.t, token.e, true], ...token.rivals.map((rival) => [...rival, false])].sort((a, b) => b[1] - a[1]);
    const energies = all.map(([name, energy, own]) => [name + (own ? " (the text)" : ""), value(energy, 2, energy / most, own ? "" : "other")]);
    const detail = [table("Where the energy was", ["node", "energy"], energies)];
    if (token.parts.length) {
      const rival = token.rivals.length && token.theirs.length ? token.rivals[0] : null;
      const largest = Math.max(...token.parts.map((part) => Math.abs(part[1] || 0)), 1e-9);
      const heads = ["sent by", "energy", "share"].concat(rival ? [`of ${rival[0]}`] : []);
      const rows = token.parts.map(([name, part], i) => [name, value(part, 2, Math.abs(part) / largest, part < 0 ? "less" : ""),
        percent(token.e ? part / token.e : null)].concat(rival ? [told(token.theirs[0][i], 2)] : []));
      detail.push(table("What this energy is the sum of, and the same for the best rival", heads, rows));
    }
    return [[`“${token.t}” `, make("span", "", `step ${place}, energy ${told(token.e, 2)}${verdict}`)], detail];
  };

  for (const box of document.querySelectorAll(".passages")) {
    const data = JSON.parse(document.getElementById(box.dataset.from).textContent);
    const show = box.dataset.kind === "signals" ? showSignal : showRoute;
    const panel = box.querySelector(".panel");
    const summary = make("p", "summary");
    const detail = make("div", "detail");
    panel.append(summary, detail);
    const sentences = [...box.querySelectorAll(".sentence")];
    const tokens = [];
    let chosen = null;
    const choose = (it) => {
      if (chosen) { chosen.tabIndex = -1; chosen.setAttribute("aria-pressed", "false"); }
      chosen = it;
      it.tabIndex = 0;
      it.setAttribute("aria-pressed", "true");
      const [sentence, place] = it.dataset.at.split(" ").map(Number);
      const [head, rest] = show(data[sentence][place], place);
      if (panel.previousElementSibling !== sentences[sentence]) sentences[sentence].after(panel);
      panel.hidden = false;
      summary.replaceChildren(...head);
      detail.replaceChildren(...rest);
    };
    sentences.forEach((sentence, i) => [...sentence.querySelectorAll(".token")].forEach((it, place) => {
      it.dataset.at = i + " " + place;
      it.setAttribute("role", "button");
      it.setAttribute("aria-label", it.dataset.said);
      it.setAttribute("aria-pressed", "false");
      it.tabIndex = -1;
      tokens.push(it);
    }));
    // The first sentence's deepest or hardest token is shown at once, so that the panel explains itself.
    const weight = (it) => (it.steps ? it.steps.length : it.rivals.length ? it.rivals[0][1] - it.e : -Infinity);
    const opening = data[0].reduce((best, it, place) => (weight(it) > weight(data[0][best]) ? place : best), 0);
    choose(tokens[opening]);
    summary.setAttribute("role", "status"); // said aloud from now on
    const go = (it) => { if (it) { choose(it); it.focus(); } };
    box.addEventListener("click", (event) => go(event.target.closest(".token")));
    box.addEventListener("keydown", (event) => {
      const it = event.target.closest(".token");
      if (!it || event.ctrlKey || event.metaKey || event.altKey) return;
      const at = tokens.indexOf(it);
      const first = (sentence) => sentences[sentence] && sentences[sentence].querySelector(".token");
      const sentence = Number(it.dataset.at.split(" ")[0]);
      const next = {
        ArrowRight: tokens[at + 1], ArrowLeft: tokens[at - 1], Home: tokens[0], End: tokens[tokens.length - 1],
        ArrowDown: first(sentence + 1), ArrowUp: first(sentence - 1), Enter: it, " ": it,
      };
      if (!(event.key in next)) return;
      event.preventDefault();
      go(next[event.key]);
    });
  }
})();
