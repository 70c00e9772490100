// The dialog that shows how two answers to a message differ.

import { post } from "./api.js";
import { nameOf, rounds, shownRound } from "./conversation.js";
import { $, el } from "./dom.js";

const LABELS = { removed: ["del", "− "], added: ["ins", "+ "] };
let answers = [];

export async function open(turn) {
  answers = turn.answers.filter(({ text }) => text);
  const several = rounds(turn).length > 1;
  const label = ({ adapter, round }) => nameOf(adapter) + (several ? ` (${round})` : "");
  for (const id of ["difference-old", "difference-new"]) {
    $(id).replaceChildren(...answers.map((answer) => el("option", { value: answer.id }, label(answer))));
    $(id).onchange = show;
  }
  const now = shownRound(turn).filter(({ text }) => text);
  const two = now.length > 1 ? now : answers.slice(-2);
  [$("difference-old").value, $("difference-new").value] = [two[0].id, two[1].id];
  $("difference").showModal();
  await show();
}

async function show() {
  const [old, fresh] = ["difference-old", "difference-new"].map((id) => answers.find((answer) => answer.id === $(id).value).text);
  const shown = $("difference-text");
  try {
    const { parts } = await post("page/difference", { old, new: fresh });
    const same = parts.every(({ kind }) => kind === "same");
    shown.replaceChildren(...(same ? [el("p", { className: "hint" }, "Both answers are the same.")] : []), ...parts.map(({ kind, text }) => {
      if (kind === "same") return text;
      const [tag, sign] = LABELS[kind];
      const [, blank, words] = text.match(/^(\s*)([^]*)$/);
      return el("span", {}, blank, el(tag, {}, el("span", { className: "visually-hidden" }, `${kind}: `), el("span", { "aria-hidden": "true" }, sign), words));
    }));
  } catch (error) {
    shown.replaceChildren(el("p", { className: "error", role: "alert" }, error.message));
  }
}
