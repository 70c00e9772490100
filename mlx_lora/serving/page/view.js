// Draws the conversation: turns, their answers (see answer.js for the text of one), and what can be done with them.

import { fill, numbers, reasoning } from "./answer.js";
import * as chat from "./chat.js";
import { chosen, nameOf, rounds, shownRound } from "./conversation.js";
import { $, copyButton, el, iconButton, sends } from "./dom.js";
import { server } from "./settings.js";

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
  parent.querySelectorAll("[data-idle]").forEach((button) => { button.disabled = chat.busy(); });
  if (focused && document.activeElement === document.body) parent.querySelector(`[data-key="${focused}"]`)?.focus({ preventScroll: true });
}

// The end of the conversation stays in view as it grows, until the reader scrolls up.

const pane = $("turns");
let following = true, lastTop = 0;
function follow(now) {
  following = now;
  $("to-bottom").hidden = now;
}
export function toBottom() {
  follow(true);
  pane.scrollTop = pane.scrollHeight;
}
pane.addEventListener("scroll", () => {
  if (pane.scrollTop < lastTop - 2) follow(false);
  if (pane.scrollHeight - pane.scrollTop - pane.clientHeight < 40) follow(true);
  lastTop = pane.scrollTop;
});
new ResizeObserver(() => { if (following) toBottom(); }).observe($("flow"));

export function edit(turn) {
  editing = turn?.id ?? null;
  draw();
  if (turn) $("turns").querySelector(".user form textarea")?.focus();
}

function empty() {
  const [text, dialog] = server.adapters.length ? ["Compare models", "models"] : ["Add an adapter", "adapters"];
  return el("div", { className: "empty" },
    el("h2", {}, `Ask ${server.base || "the model"}`),
    el("p", {}, "Write a message below. The base model and its adapters can answer side by side. Conversations are kept in this browser only."),
    el("p", {}, "Thumbs up and down on answers make training data: Import and export saves it as files for ", el("code", {}, "mlx-lora train"), "."),
    el("button", { type: "button", className: "outlined", on: { click: () => $(`open-${dialog}`).click() } }, text));
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
    el("p", { dir: "auto" }, turn.user),
    el("div", { className: "actions" },
      pager("Version of this message", versions.map(({ id }) => id), turn.id, (id) => chat.show(versions.find((each) => each.id === id))),
      copyButton(() => turn.user, "Copy the message", `copy-${turn.id}`),
      iconButton("edit", "Edit the message", () => edit(turn), { "data-idle": "", "data-key": `edit-${turn.id}` })));
}

function editor(turn) {
  const area = el("textarea", { value: turn.user, rows: Math.min(12, turn.user.split("\n").length + 1), dir: "auto", "aria-label": "Edit the message" });
  const save = (event) => {
    event?.preventDefault();
    const text = area.value;
    if (!text.trim() || chat.busy()) return;
    editing = null;
    if (text === turn.user) draw();
    else chat.edit(turn, text);
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); edit(null); }
    else if (sends(event)) save(event);
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
    answer.error && !chosen(turn).text ? el("p", { className: "hint" }, "This message is left out of the conversation until it is answered.") : null,
    !answer.done && !live ? el("p", { className: "hint" }, "This answer is not finished. If another tab still receives it, it grows here too.") : null,
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
