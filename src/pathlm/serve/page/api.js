// What the server offers: its models, the paths of a text, and new tokens as they are written.

let key = "";

/** Send this key with every request from now on. */
export function useKey(given) {
  key = given;
}

/** What the server, or the way to it, says against a request, in words for a reader. */
export class Refused extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Return what is known of every model. */
export async function models() {
  const response = await ask("v1/models");
  return (await response.json()).data.map((model) => ({ name: model.id, ...model.pathlm }));
}

/** Return the tokens of a text and their paths. */
export async function paths(body, signal) {
  const response = await ask("v1/paths", { body, signal });
  return (await response.json()).data[0];
}

/** Yield the pieces of an answer as they are written. Leaving the loop, or aborting, makes the server stop writing. */
export async function* writing(body, signal) {
  const response = await ask("v1/completions", { body: { ...body, stream: true }, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Refused("The server broke off in the middle of its answer.");
      held += value;
      for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
        const data = held.slice("data: ".length, end);
        held = held.slice(end + 2);
        if (data === "[DONE]") return;
        const told = JSON.parse(data);
        if (told.error) throw new Refused(plain(told.error));
        yield told;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken off already
  }
}

async function ask(path, { body, signal } = {}) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  const error = told?.error ?? { message: `the server answered with ${response.status} and no explanation` };
  throw new Refused(plain(error), response.status);
}

/** An error as a sentence, in the words of the page where it names a field of a request. */
function plain({ message, param }) {
  if (["prompt", "input"].includes(param)) message = message.replace(`${param}: `, "the text ");
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}
