// Requests to the server. The API key, where one is needed, is kept for this tab's session only.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const UNREACHABLE = "The server cannot be reached. What you wrote is kept; try again when the server runs.";
let keyAsked = null;
let askForKey = async () => false;

// call: asks the user for the key and keeps it with setKey; resolves to whether there is one to try.
export const onKeyNeeded = (call) => { askForKey = call; };
export const setKey = (key) => sessionStorage.setItem("key", key);

function headers(body) {
  const key = sessionStorage.getItem("key");
  return { ...(body && { "content-type": "application/json" }), ...(key && { authorization: `Bearer ${key}` }) };
}

// The response to a request. Asks for the key once for all requests that lack it. options: as fetch's.
export async function request(path, options = {}) {
  let response;
  const used = sessionStorage.getItem("key");
  try {
    response = await fetch(path, { ...options, headers: { ...headers(typeof options.body === "string"), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    document.dispatchEvent(new CustomEvent("server-away"));
    throw new ServerError(UNREACHABLE);
  }
  if (response.status === 401) {
    keyAsked ??= used === sessionStorage.getItem("key") ? askForKey(used !== null).finally(() => { keyAsked = null; }) : null;
    if (keyAsked === null || await keyAsked) return request(path, options);
  }
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    const text = body.error?.message ?? `the server answered with status ${response.status}`;
    const hint = text.startsWith("the body is larger") ? " Start a new chat, or start the server with a larger --body-limit." : "";
    throw new ServerError(sentence(text) + hint, response.status);
  }
  return response;
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, body) => (await request(path, { method: "POST", body: JSON.stringify(body) })).json();

// Server-sent events of a request, each as its parsed data. Ends at "[DONE]"; raises where the stream breaks off.
export async function* stream(path, body, signal) {
  const response = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (signal?.aborted) throw error;
      document.dispatchEvent(new CustomEvent("server-away"));
      throw new ServerError("The connection to the server was lost.");
    }
    if (chunk.done) throw new ServerError("The server ended the answer early.");
    text += chunk.value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ServerError(sentence(parsed.error.message));
      yield parsed;
    }
  }
}

export function sentence(text) {
  const full = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(full) ? full : `${full}.`;
}
