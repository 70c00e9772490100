// Who answers and how: the columns, the options of sampling. Both are kept in the browser for all conversations.

import { get } from "./api.js";
import { $, el, notice } from "./dom.js";
import { nameOf } from "./conversation.js";

export let server = { base: "", adapters: [], options: [], most_columns: 1 };
const kept = (name, otherwise) => {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
let wanted = kept("columns", [null]);
let options = kept("options", {});

let loaded;
export const ready = new Promise((resolve) => { loaded = resolve; }); // the first load has ended, also by an error

// Reads what the server offers. Call it again where adapters have changed.
export async function load() {
  try {
    server = await get("page/settings");
    forgetMissing();
    drawColumns();
    drawOptions();
  } finally { loaded(); }
}

function forgetMissing() {
  const missing = wanted.filter((adapter) => adapter !== null && !server.adapters.includes(adapter));
  if (!missing.length) return;
  notice(`${missing.join(", ")} ${missing.length > 1 ? "are" : "is"} not among this server's adapters.`);
  setColumns(wanted.filter((adapter) => !missing.includes(adapter)));
}

// The adapters that answer, in the server's order; null is the base.
export function columns() {
  const found = [null, ...server.adapters].filter((adapter) => wanted.includes(adapter));
  return found.length ? found.slice(0, server.most_columns) : [null];
}

export function setColumns(adapters) {
  wanted = adapters;
  localStorage.setItem("columns", JSON.stringify(wanted));
  drawColumns();
}

// The options that differ from the server's defaults, as GenerateConfig has them.
export const given = () => Object.fromEntries(server.options.filter(({ name }) => name in options).map(({ name }) => [name, options[name]]));

function drawColumns() {
  const now = columns();
  $("open-models").textContent = now.map(nameOf).join(" | ");
  $("open-models").setAttribute("aria-label", `Who answers: ${now.map(nameOf).join(", ")}`);
  const boxes = new Map([...$("columns").querySelectorAll("input")].map((box) => [box.dataset.adapter, box]));
  const drawn = [null, ...server.adapters].map((adapter) => {
    const key = adapter ?? "";
    const known = boxes.get(key);
    const box = known ?? el("input", { type: "checkbox", "data-adapter": key, on: { change: () => toggle(adapter) } });
    box.checked = now.includes(adapter);
    box.disabled = box.checked ? now.length === 1 : now.length >= server.most_columns;
    const text = adapter === null ? `base (${server.base})` : adapter;
    if (!known) return el("label", {}, box, text);
    known.nextSibling.data = text; // the base's name is not known at first
    return known.parentElement;
  });
  const old = [...$("columns").querySelectorAll("label")];
  if (old.length !== drawn.length || old.some((label, index) => label !== drawn[index])) $("columns").replaceChildren($("columns").firstElementChild, ...drawn);
}

function toggle(adapter) {
  const now = columns();
  setColumns(now.includes(adapter) ? now.filter((each) => each !== adapter) : [...now, adapter]);
}

// How a value of each kind is written in a field and read from it. read raises an Error that says what is wrong.
const number = (text) => {
  if (!Number.isFinite(Number(text))) throw new Error("Write a number.");
  return Number(text);
};
const KINDS = {
  float: { write: String, read: number, mode: "decimal" },
  int: { write: String, read: number, mode: "numeric" },
  tuple: { write: (lines) => lines.join("\n"), read: (text) => text.split("\n").filter(Boolean), hint: "One text a line." },
  dict: {
    write: (value) => JSON.stringify(value),
    read: (text) => {
      try { return JSON.parse(text); } catch { throw new Error('Write a JSON object such as {"name": 1}.'); }
    },
  },
};

function drawOptions() {
  $("options").replaceChildren(...server.options.map((option) => {
    const { name, kind, help } = option;
    const { write, read, mode, hint } = KINDS[kind];
    const id = `option-${name}`;
    const fault = el("p", { className: "error", id: `${id}-fault`, hidden: true });
    const input = el(kind === "tuple" ? "textarea" : "input", {
      id, rows: 2, inputMode: mode ?? "text", autocomplete: "off", "aria-describedby": `${id}-help ${id}-fault`,
      value: name in options ? write(options[name]) : "",
      placeholder: option.default === null || option.default.length === 0 ? "none" : write(option.default),
      on: { input: () => {
        try {
          const { [name]: _, ...rest } = options;
          options = input.value.trim() === "" ? rest : { ...rest, [name]: read(input.value) };
          localStorage.setItem("options", JSON.stringify(options));
          fault.hidden = true;
        } catch (error) {
          fault.textContent = error.message;
          fault.hidden = false;
        }
        input.setAttribute("aria-invalid", String(!fault.hidden));
      } },
    });
    const limit = name === "max_tokens" ? `At most ${server.max_tokens_limit} on this server.` : hint;
    const text = [help.replace(/; repeat the option for several/, ""), limit].filter(Boolean).join(" ");
    return el("div", {}, el("label", { htmlFor: id }, name.replaceAll("_", " ")), input, fault, el("p", { className: "hint", id: `${id}-help` }, text));
  }));
}

export function reset() {
  options = {};
  localStorage.removeItem("options");
  drawOptions();
}
