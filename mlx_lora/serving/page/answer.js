// The text of an answer: as it grows, as HTML that the server has rendered, its reasoning and its speed.

import { post } from "./api.js";
import * as chat from "./chat.js";
import { copyButton, el, html } from "./dom.js";

const rendered = new Map(); // answer's id -> the HTML of the first `length` characters of its text
const unfolded = new Set(); // ids of the answers whose reasoning the reader has opened

const reasoningTitle = (answer) => (chat.isGrowing(answer) && !answer.text ? "Thinking…" : "Reasoning");

export function reasoning(answer) {
  if (!answer.reasoning) return null;
  const toggled = ({ target }) => unfolded[target.open ? "add" : "delete"](answer.id);
  return el("details", { className: "reasoning", open: unfolded.has(answer.id), on: { toggle: toggled } },
    el("summary", {}, reasoningTitle(answer)), el("div", { dir: "auto" }, answer.reasoning));
}

// How much an answer is, how fast it came, and why it ended early.
export function numbers({ numbers: found, done }) {
  if (!found) return "";
  const count = found.tokens ? `${found.tokens} ${found.tokens === 1 ? "token" : "tokens"}` : null;
  const speed = found.tokens > 1 ? `${found.tokens_per_second.toFixed(1)} tokens/s` : null; // one alone has none
  const first = found.first_token === undefined ? null : `first token after ${found.first_token.toFixed(2)} s`;
  const end = { length: "cut off at max tokens", stopped: "stopped" }[found.finish_reason];
  return [count, speed, first, done ? end : null].filter(Boolean).join(" · ");
}

// The answer that grows. Its text is drawn once a frame at most.

const waiting = new Map();

export function grew(answer, cleaned) {
  // The space after the last word is not in the HTML. It is shown with the text that follows.
  if (cleaned !== undefined) rendered.set(answer.id, { html: cleaned, length: answer.text.trimEnd().length });
  if (!waiting.size) requestAnimationFrame(() => {
    for (const each of waiting.values()) {
      const element = document.querySelector(`[data-answer="${each.id}"]`);
      if (element) fill(element, each);
    }
    waiting.clear();
  });
  waiting.set(answer.id, answer);
}

// Puts the text of an answer into its element: as HTML as far as it has been rendered, and the rest as it is.
export function fill(element, answer) {
  const { html: cleaned, length } = rendered.get(answer.id) ?? { html: "", length: 0 };
  const [before, rest] = element.querySelector(".body").children;
  const live = chat.isGrowing(answer);
  if (before.source !== cleaned) {
    html(before, cleaned);
    before.source = cleaned;
  }
  rest.textContent = live ? answer.text.slice(length) : answer.text.slice(length).trimEnd();
  const [summary, thoughts] = element.querySelector(".reasoning")?.children ?? [];
  if (thoughts) {
    summary.textContent = reasoningTitle(answer);
    thoughts.textContent = answer.reasoning;
  } else if (answer.reasoning) element.querySelector(".body").before(reasoning(answer));
  element.querySelector(".numbers").textContent = numbers(answer);
  if (live) return;
  if (rest.textContent) observer.observe(element);
  else frame(before);
}

// Code gets its language and a button that copies it. What is wider than the page is scrolled, also with the keyboard.
function frame(block) {
  for (const pre of block.querySelectorAll(":not(.code) > pre")) {
    const language = pre.firstElementChild?.className.replace("language-", "");
    const framed = el("div", { className: "code" }, language ? el("span", { className: "language" }, language) : null);
    pre.replaceWith(framed);
    pre.tabIndex = 0;
    framed.append(pre, copyButton(() => pre.textContent, "Copy the code", null));
  }
  for (const table of block.querySelectorAll(":not(.wide) > table")) {
    const framed = el("div", { className: "wide", role: "region", "aria-label": "Table", tabIndex: 0 });
    table.replaceWith(framed);
    framed.append(table);
  }
}

// Answers from the store are rendered when they come into view, many in one request.

const MOST = 1_000_000; // characters in a request
const observer = new IntersectionObserver(async (entries) => {
  const seen = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
  seen.forEach((element) => observer.unobserve(element));
  const all = new Map(chat.state.turns.flatMap((turn) => turn.answers).map((answer) => [answer.id, answer]));
  const left = seen.map((element) => [element, all.get(element.dataset.answer)]).filter(([, answer]) => answer && answer.text.length < MOST);
  while (left.length) {
    const some = [];
    for (let size = 0; left.length && size + left[0][1].text.length <= MOST; size += some.at(-1)[1].text.length) some.push(left.shift());
    const texts = some.map(([, answer]) => answer.text);
    try {
      const made = await post("page/markdown", { texts });
      some.forEach(([element, answer], index) => {
        rendered.set(answer.id, { html: made.html[index], length: texts[index].length });
        fill(element, answer);
      });
    } catch { return; } // they stay as plain text, and are tried again when they are drawn again
  }
}, { rootMargin: "600px" });
