// Numbers and names as readers see them.

export function number(value, digits = 2) {
  return Number(value).toFixed(digits);
}

export function signed(value, digits = 2) {
  const shown = Math.abs(value).toFixed(digits);
  return (value < 0 && Number(shown) ? "−" : "+") + shown;
}

export function percent(share) {
  const whole = 100 * share;
  return whole > 0 && whole < 1 ? "< 1 %" : `${Math.round(whole)} %`;
}

/** A block in short: B3, B3+B5, or OUT. */
export function block(node) {
  return node === "exit" ? "OUT" : node.replaceAll("block:", "B");
}

/** A token on one line, with its spaces to be seen. */
export function readable(text) {
  const shown = text.replaceAll("\ufffd", "◌").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
  return shown.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

/** What each token of a text spells, as far as the text bears it out: where tokens share a character, the last one has it. */
export function spelled(names, text) {
  const bytes = new TextEncoder().encode(text);
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let place = 0;
  return names.map((name) => {
    const own = [new TextEncoder().encode(name), unescaped(name)].find((some) => some.every((byte, at) => byte === bytes[place + at]));
    if (!own) return name;
    place += own.length;
    return decoder.decode(own, { stream: true });
  });
}

/** The bytes of a name in which those of no whole character are written as \xE6. */
function unescaped(name) {
  const parts = name.split(/\\x([0-9a-f]{2})/);
  return Uint8Array.from(parts.flatMap((part, at) => (at % 2 ? parseInt(part, 16) : [...new TextEncoder().encode(part)])));
}
