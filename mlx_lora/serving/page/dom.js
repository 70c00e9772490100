// Helpers to build elements. Text is always set as text; the only HTML that is parsed is the server's (see html).

export const $ = (id) => document.getElementById(id);

// An element with properties and children. Names with a dash, and "role", are attributes; "on" holds listeners.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "on") for (const [event, call] of Object.entries(value)) made.addEventListener(event, call);
    else if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.classList.add("icon");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

// A button with an icon. Its label is read aloud and shown as a tooltip.
export function iconButton(name, label, click, properties = {}) {
  const classes = `quiet ${properties.className ?? ""}`;
  return el("button", { type: "button", title: label, "aria-label": label, on: { click }, ...properties, className: classes }, icon(name));
}

// Replaces the content of an element by HTML that the server has cleaned. Blocks that stay the same are kept, so that
// a growing answer neither flickers nor loses the reader's selection. Each block is written in its own direction.
export function html(element, cleaned) {
  const template = document.createElement("template");
  template.innerHTML = cleaned.trimEnd();
  template.content.querySelectorAll("p, ul, ol, h1, h2, h3, h4, h5, h6, blockquote, table").forEach((block) => { block.dir = "auto"; });
  const old = [...element.childNodes], fresh = [...template.content.childNodes];
  let same = 0;
  while (same < old.length && same < fresh.length && old[same].isEqualNode(fresh[same])) same += 1;
  old.slice(same).forEach((node) => node.remove());
  element.append(...fresh.slice(same));
}

// Copies text, also where the browser has no clipboard for pages without HTTPS.
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
  const area = el("textarea", { value: text, className: "visually-hidden" });
  const focused = document.activeElement;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!copied) throw new Error("the browser did not copy the text");
}

// Offers a text as a file to save.
export function download(name, text, type = "application/jsonl") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// A button that copies what text() gives.
export function copyButton(text, label, key) {
  const button = iconButton("copy", label, async () => {
    try {
      await copy(text());
      button.replaceChildren(icon("check"));
      $("announce").textContent = "Copied";
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    } catch (error) { notice(`Nothing was copied: ${error.message}`); }
  }, { "data-key": key });
  return button;
}

// Whether a key sends what was written. Enter that ends the input of a Japanese or Chinese word does not; Safari tells
// it by the code 229 alone.
export const sends = ({ key, shiftKey, isComposing, keyCode }) => key === "Enter" && !shiftKey && !isComposing && keyCode !== 229;

// Says something at the bottom of the page, and to screen readers: for a few seconds, or until it is closed.
export function notice(text, { lasting = false } = {}) {
  $("notice-text").textContent = text;
  $("notice").hidden = !text;
  clearTimeout(notice.timer);
  if (!lasting) notice.timer = setTimeout(() => notice(""), 8000);
}

// Asks in a dialog of index.html and resolves to the button's value, or to "" where it was closed otherwise.
export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true }));
}
