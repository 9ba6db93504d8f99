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
