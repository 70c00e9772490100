// Draws the conversation: turns, answers, and the answer that grows.

import { post } from "./api.js";
import * as chat from "./chat.js";
import { chosen, nameOf, rounds, shownRound } from "./conversation.js";
import { $, copy, el, html, icon, iconButton, notice } from "./dom.js";

const rendered = new Map(); // answer's id -> the HTML of the first `length` characters of its text
let drawn = new Map(); // turn's id -> its element and what it was drawn from
let editing = null; // the id of the turn whose message is being edited
let actions = {};

// compare: opens the difference view of a turn.
export const connect = (calls) => { actions = calls; };

export function draw() {
  const turns = chat.shown();
  const parent = $("flow");
  const focused = document.activeElement?.dataset?.key;
  const old = drawn;
  drawn = new Map();
  const elements = turns.map(({ turn, versions }) => {
    const source = JSON.stringify([turn, versions.map(({ id }) => id), editing === turn.id]);
    const known = old.get(turn.id);
    const element = known?.source === source ? known.element : drawTurn(turn, versions);
    drawn.set(turn.id, { source, element });
    return element;
  });
  const fresh = elements.length ? elements : [empty()];
  [...parent.children].filter((child) => !fresh.includes(child)).forEach((child) => child.remove());
  fresh.forEach((element, index) => { if (parent.children[index] !== element) parent.insertBefore(element, parent.children[index] ?? null); });
  const busy = chat.state.busy !== null;
  parent.querySelectorAll("[data-idle]").forEach((button) => { button.disabled = busy; });
  if (focused && document.activeElement === document.body) parent.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
}

// The end of the conversation stays in view as it grows, until the reader scrolls up.

const pane = $("turns");
let following = true, lastTop = 0;
export function toBottom() {
  following = true;
  pane.scrollTop = pane.scrollHeight;
}
pane.addEventListener("scroll", () => {
  if (pane.scrollTop < lastTop - 2) following = false;
  if (pane.scrollHeight - pane.scrollTop - pane.clientHeight < 40) following = true;
  lastTop = pane.scrollTop;
});
new ResizeObserver(() => { if (following) toBottom(); }).observe($("flow"));

export function edit(turn) {
  editing = turn?.id ?? null;
  draw();
  if (turn) $("turns").querySelector(".user form textarea")?.focus();
}

function empty() {
  return el("div", { className: "empty" }, el("h2", {}, "Ask the model"), el("p", {}, "Choose several models at the top to compare their answers side by side."));
}

function drawTurn(turn, versions) {
  const answers = shownRound(turn);
  const compared = answers.length > 1;
  return el("article", { className: `turn${compared ? " compared" : ""}`, "data-turn": turn.id },
    drawUser(turn, versions),
    el("div", { className: "answers" }, answers.map((answer) => drawAnswer(turn, answer, compared))),
    compared ? el("div", { className: "actions" }, roundActions(turn)) : null);
}

function drawUser(turn, versions) {
  if (editing === turn.id) return el("div", { className: "user" }, editor(turn));
  return el("div", { className: "user" },
    el("h2", { className: "visually-hidden" }, "You"),
    el("p", {}, turn.user),
    el("div", { className: "actions" },
      pager("Version of this message", versions.map(({ id }) => id), turn.id, (id) => chat.show(versions.find((each) => each.id === id))),
      copyButton(() => turn.user, "Copy the message", `copy-${turn.id}`),
      iconButton("edit", "Edit the message", () => edit(turn), { "data-idle": "", "data-key": `edit-${turn.id}` })));
}

function editor(turn) {
  const area = el("textarea", { value: turn.user, rows: Math.min(12, turn.user.split("\n").length + 1), "aria-label": "Edit the message" });
  const save = (event) => {
    event?.preventDefault();
    const text = area.value;
    if (!text.trim() || chat.state.busy) return;
    editing = null;
    if (text === turn.user) draw();
    else chat.edit(turn, text);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); edit(null); }
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save(event);
  });
  return el("form", { on: { submit: save } }, area,
    el("div", { className: "row end" },
      el("button", { type: "button", className: "outlined", on: { click: () => edit(null) } }, "Cancel"),
      el("button", { className: "primary" }, "Send")));
}

function drawAnswer(turn, answer, compared) {
  const live = chat.isGrowing(answer);
  const picked = compared && chosen(turn) === answer;
  const name = nameOf(answer.adapter);
  const body = el("div", { className: `body${live ? " waiting" : ""}` }, el("div", { className: "rendered" }), el("span", { className: "plain" }));
  const element = el("div", { role: "group", className: `answer${picked ? " chosen" : ""}`, "aria-label": `Answer of ${name}`, "data-answer": answer.id },
    el("h3", {}, el("span", { className: "name" }, name), compared ? picker(turn, answer, picked) : null),
    reasoning(answer), body,
    answer.error ? el("p", { className: "error", role: "alert" }, answer.error) : null,
    answer.error && !answer.text ? el("p", { className: "hint" }, "This message is left out of the conversation until it is answered.") : null,
    !answer.done && !live ? el("p", { className: "hint" }, "This answer was not finished.") : null,
    el("div", { className: "actions" }, live ? null : answerActions(turn, answer, compared), el("span", { className: "numbers" }, numbers(answer))));
  fill(element, answer);
  return element;
}

function picker(turn, answer, picked) {
  return el("button", {
    type: "button", className: picked ? "quiet" : "outlined", "aria-pressed": String(picked), "data-idle": "",
    "data-key": `pick-${answer.id}`, title: "The conversation goes on with this answer", on: { click: () => chat.choose(turn, answer.id) },
  }, picked ? "Chosen" : "Continue with this");
}

function reasoning(answer) {
  if (!answer.reasoning) return null;
  return el("details", { className: "reasoning" }, el("summary", {}, "Reasoning"), el("div", {}, answer.reasoning));
}

function answerActions(turn, answer, compared) {
  const thumb = (name, label, value) => iconButton(name, label, () => chat.vote(turn, answer.id, value), {
    "aria-pressed": String(answer.vote === value), "data-key": `${name}-${answer.id}`,
  });
  const judged = answer.text ? [
    copyButton(() => answer.text, "Copy the answer", `copy-${answer.id}`),
    thumb("up", "Good answer", 1), thumb("down", "Bad answer", -1),
  ] : [];
  return [...judged, ...(compared ? [] : roundActions(turn))];
}

function roundActions(turn) {
  const firsts = rounds(turn).map((round) => turn.answers.filter((answer) => answer.round === round));
  const ids = firsts.map((answers) => answers[0].id);
  const now = ids[firsts.findIndex((answers) => answers.includes(chosen(turn)))];
  if (shownRound(turn).some(chat.isGrowing)) return [];
  return [
    iconButton("again", "Answer again", () => chat.regenerate(turn), { "data-idle": "", "data-key": `again-${turn.id}` }),
    turn.answers.filter(({ text }) => text).length > 1
      ? iconButton("difference", "Show the difference", () => actions.compare(turn), { "data-key": `difference-${turn.id}` }) : null,
    pager("Answers", ids, now, (id) => chat.choose(turn, id)),
  ];
}

function pager(label, ids, now, go) {
  if (ids.length < 2) return null;
  const at = ids.indexOf(now);
  const step = (name, text, to) => {
    const usable = to >= 0 && to < ids.length ? { "data-idle": "" } : { disabled: true };
    return iconButton(name, text, () => go(ids[to]), { ...usable, "data-key": `${name}-${ids[0]}` });
  };
  return el("span", { className: "pager", role: "group", "aria-label": label }, step("left", "Previous", at - 1), `${at + 1}/${ids.length}`, step("right", "Next", at + 1));
}

function copyButton(text, label, key) {
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

function numbers({ numbers: found, done }) {
  if (!found) return "";
  const speed = found.tokens ? `${found.tokens} tokens, ${found.tokens_per_second.toFixed(1)} a second` : null;
  const first = found.first_token === undefined ? null : `first after ${found.first_token.toFixed(2)} s`;
  const end = { length: "cut off at max tokens", stopped: "stopped" }[found.finish_reason];
  return [speed, first, done ? end : null].filter(Boolean).join(" · ");
}

// The growing answer. Its text is drawn once a frame at most.

const waiting = new Map();

export function grew(answer, cleaned) {
  if (cleaned !== undefined) rendered.set(answer.id, { html: cleaned, length: answer.text.length });
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
function fill(element, answer) {
  const { html: cleaned, length } = rendered.get(answer.id) ?? { html: "", length: 0 };
  const [before, rest] = element.querySelector(".body").children;
  const live = chat.isGrowing(answer);
  if (before.source !== cleaned) {
    html(before, cleaned);
    before.source = cleaned;
  }
  rest.textContent = answer.text.slice(length);
  const old = element.querySelector(".reasoning div");
  if (old) old.textContent = answer.reasoning;
  else if (answer.reasoning) element.querySelector(".body").before(reasoning(answer));
  element.querySelector(".numbers").textContent = numbers(answer);
  if (live) return;
  if (rest.textContent) observer.observe(element);
  else before.querySelectorAll(":not(.code) > pre").forEach(withCopy);
}

function withCopy(pre) {
  const frame = el("div", { className: "code" });
  pre.replaceWith(frame);
  pre.tabIndex = 0; // a wide block is scrolled with the keyboard
  frame.append(pre, copyButton(() => pre.textContent, "Copy the code", null));
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
