// The list of conversations: opening, searching, renaming, deleting.

import * as chat from "./chat.js";
import { $, ask, el, iconButton } from "./dom.js";
import * as store from "./store.js";
import { toBottom } from "./view.js";

let drawings = 0;
export async function draw() {
  const number = ++drawings, text = $("search").value.trim();
  const [all, found] = await Promise.all([store.conversations(), text ? store.search(text) : null]);
  if (number !== drawings) return; // a newer call draws
  const shown = found ? all.filter(({ id }) => found.has(id)) : all;
  const focused = document.activeElement?.dataset?.key;
  $("conversations").replaceChildren(...shown.map(row));
  $("no-match").hidden = !found || shown.length > 0;
  if (focused && document.activeElement === document.body) $("conversations").querySelector(`[data-key="${focused}"]`)?.focus();
}

function row(conversation) {
  const { id, title } = conversation;
  const current = id === chat.state.conversation.id;
  return el("li", { className: current ? "current" : "" },
    el("button", { type: "button", title, dir: "auto", "aria-current": current ? "page" : null, "data-key": `open-${id}`, on: { click: () => open(id) } }, title),
    chat.answering().includes(id) ? el("span", { className: "answering", role: "img", "aria-label": "is being answered" }) : null,
    iconButton("edit", `Rename ${title}`, () => rename(conversation), { "data-key": `rename-${id}` }),
    iconButton("trash", `Delete ${title}`, () => remove(conversation), { "data-key": `delete-${id}` }));
}

$("search").addEventListener("input", () => draw());
$("rename-cancel").addEventListener("click", () => $("rename").close());

export function toggle(open) {
  $("sidebar").classList.toggle("open", open);
  $("open-sidebar").setAttribute("aria-expanded", String(open));
  if (open) $("new").focus();
}

export async function open(id) {
  toggle(false);
  await chat.open(id);
  toBottom();
  await draw();
}

async function rename({ id, title }) {
  $("rename-to").value = title;
  const answer = ask($("rename"));
  $("rename-to").select();
  const fresh = await answer && $("rename-to").value.trim();
  if (!fresh) return;
  const change = (each) => { each.title = fresh; };
  await store.changeConversation(id, change);
  if (chat.state.conversation.id === id) {
    change(chat.state.conversation);
    chat.redraw();
  }
  await draw();
}

async function remove({ id, title }) {
  $("delete-what").textContent = title;
  if (!await ask($("delete"))) return;
  chat.stop(id);
  if (chat.state.conversation.id === id) chat.startNew();
  await store.remove(id);
  await draw();
}
