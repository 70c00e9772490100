// The list of conversations: opening, renaming, deleting.

import * as chat from "./chat.js";
import { $, ask, el, iconButton } from "./dom.js";
import * as store from "./store.js";

export async function draw() {
  const all = await store.conversations();
  const focused = document.activeElement?.dataset?.key;
  $("conversations").replaceChildren(...all.map((conversation) => {
    const { id, title } = conversation;
    const current = id === chat.state.conversation.id;
    return el("li", { className: current ? "current" : "" },
      el("button", { type: "button", title, "aria-current": current ? "page" : null, "data-key": `open-${id}`, on: { click: () => open(id) } }, title),
      iconButton("edit", `Rename ${title}`, () => rename(conversation), { "data-key": `rename-${id}` }),
      iconButton("trash", `Delete ${title}`, () => remove(conversation), { "data-key": `delete-${id}` }));
  }));
  if (focused && document.activeElement === document.body) $("conversations").querySelector(`[data-key="${focused}"]`)?.focus();
}

$("rename-cancel").addEventListener("click", () => $("rename").close());

export function toggle(open) {
  $("sidebar").classList.toggle("open", open);
  $("open-sidebar").setAttribute("aria-expanded", String(open));
  if (open) $("new").focus();
}

async function open(id) {
  toggle(false);
  await chat.open(id);
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
  if (chat.state.conversation.id === id) {
    chat.stop();
    chat.startNew();
  }
  await store.remove(id);
  await draw();
}
