// Starts the page and connects its parts.

import { onKeyNeeded, setKey } from "./api.js";
import { grew } from "./answer.js";
import * as chat from "./chat.js";
import { nameOf } from "./conversation.js";
import * as difference from "./difference.js";
import { $, ask, download, notice, sends } from "./dom.js";
import { exported, imported } from "./files.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import * as view from "./view.js";

const question = $("question");
const failed = (error) => notice(error.message, { lasting: true });
addEventListener("unhandledrejection", ({ reason }) => failed(reason));

// What the address asks for: ?columns=base,pirate chooses who answers, ?prompt=... fills the message box.
const asked = new URLSearchParams(location.search);

// Drawing.

let listed = "";
function draw() {
  const { conversation, stored } = chat.state;
  $("title").textContent = conversation.title;
  document.title = stored ? `${conversation.title} · mlx-lora` : "mlx-lora chat";
  $("send").hidden = chat.busy();
  $("stop").hidden = !chat.busy();
  view.draw();
  const now = JSON.stringify([conversation.id, conversation.title, stored, chat.answering()]);
  if (now !== listed) sidebar.draw().catch(failed);
  listed = now;
  address();
}

// The address names the conversation, so that Back and Forward lead from one to the other.
let addressed = null; // the conversation of the present entry of the history; null where it is not known yet
function address() {
  const { conversation, stored } = chat.state;
  const hash = stored ? `#${conversation.id}` : "", same = addressed === null || addressed === conversation.id;
  addressed = conversation.id;
  if (location.hash !== hash) history[same ? "replaceState" : "pushState"](null, "", location.pathname + hash);
}

async function followAddress() {
  const id = location.hash.slice(1);
  addressed = null;
  if (id) await sidebar.open(id);
  else chat.startNew();
}
addEventListener("popstate", () => followAddress().catch(failed));

function ended(answers) {
  draw();
  if (!answers.some(({ id }) => chat.shown().some(({ turn }) => turn.answers.some((each) => each.id === id)))) return;
  const told = answers.map((answer) => `${nameOf(answer.adapter)}: ${answer.error ?? answer.text.slice(0, 2000)}`);
  $("announce").textContent = told.join("\n");
}

chat.connect({ draw, grew, ended });
view.connect({ compare: difference.open });
store.onChange((id) => {
  sidebar.draw().catch(failed);
  if (chat.state.stored && id === chat.state.conversation.id) chat.open(id).catch(failed);
});

// Writing. What is being written survives a reload of this tab.

function startNew() {
  sidebar.toggle(false);
  $("search").value = ""; // the list shows the new chat too
  chat.startNew();
  question.focus();
}

let sent = -Infinity; // when a message was sent last; a double click on Send must not press Stop, which replaces it
const keepDraft = () => sessionStorage.setItem("draft", question.value);
question.addEventListener("input", keepDraft);

$("composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = question.value;
  if (!text.trim() || chat.busy()) return;
  sent = event.timeStamp;
  question.value = "";
  keepDraft();
  const asking = chat.send(text);
  view.toBottom();
  await asking;
});
question.addEventListener("keydown", (event) => {
  if (sends(event)) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !question.value && !chat.busy()) {
    const last = chat.shown().at(-1);
    if (!last) return;
    event.preventDefault();
    view.edit(last.turn);
  }
});
$("stop").addEventListener("click", (event) => {
  if (event.timeStamp - sent < 500) return;
  chat.stop();
  question.focus();
});
$("new").addEventListener("click", startNew);
$("to-bottom").addEventListener("click", () => { view.toBottom(); question.focus(); });
$("close-notice").addEventListener("click", () => { notice(""); question.focus(); });
$("open-sidebar").addEventListener("click", () => sidebar.toggle(true));
$("close-sidebar").addEventListener("click", () => { sidebar.toggle(false); $("open-sidebar").focus(); });
$("chat").addEventListener("pointerdown", () => sidebar.toggle(false));

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  const writing = /^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName);
  const held = event.ctrlKey || event.metaKey;
  const calls = {
    Escape: !held && (() => ($("sidebar").classList.contains("open") ? $("close-sidebar").click() : chat.stop())),
    k: held && startNew,
    ",": held && openSettings,
    "/": !held && !writing && (() => question.focus()),
    "?": !held && !writing && (() => $("help").showModal()),
  };
  if (!calls[event.key]) return;
  event.preventDefault();
  calls[event.key]();
});

// Dialogs. A press beside one closes it, but not the one that asks for the key.

for (const dialog of document.querySelectorAll("dialog:not(#key)")) dialog.addEventListener("pointerdown", ({ target, clientX: x, clientY: y }) => {
  const { left, right, top, bottom } = dialog.getBoundingClientRect();
  if (target === dialog && (x < left || x > right || y < top || y > bottom)) dialog.close("");
});

function openSettings() {
  $("system").value = chat.state.conversation.system;
  $("settings").showModal();
}
$("open-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", () => {
  if ($("system").value !== chat.state.conversation.system) chat.setSystem($("system").value).catch(failed);
});
$("reset").addEventListener("click", settings.reset);
$("open-models").addEventListener("click", () => $("models").showModal());
$("open-help").addEventListener("click", () => $("help").showModal());
$("open-files").addEventListener("click", () => { $("import-result").textContent = ""; $("files").showModal(); });
for (const kind of ["one", "all", "pairs", "labels"]) $(`export-${kind}`).addEventListener("click", async () => {
  try {
    const [name, text, rows] = await exported(kind, chat.state.conversation.id);
    download(name, text);
    $("import-result").textContent = `${name}: ${rows} ${rows === 1 ? "row" : "rows"}.`;
  } catch (error) { $("import-result").textContent = error.message; }
});
$("import").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  try {
    const number = await imported(await file.text());
    $("import-result").textContent = `${number} ${number === 1 ? "conversation" : "conversations"} imported.`;
    await sidebar.draw();
  } catch (error) { $("import-result").textContent = error.message; }
  target.value = "";
});
onKeyNeeded(async (again) => {
  if (again) $("key-text").textContent = "The server does not accept this key.";
  $("key-value").value = "";
  if (!await ask($("key"))) return false;
  setKey($("key-value").value);
  return true;
});

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("theme", theme);
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
  $("theme").title = `Theme: ${theme}`;
}
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % 3]));
setTheme(THEMES.includes(document.documentElement.dataset.theme) ? document.documentElement.dataset.theme : "auto");

// The server goes away and comes back.

let waiting = false;
document.addEventListener("server-away", async () => {
  if (waiting) return;
  waiting = true;
  $("away").textContent = "The server cannot be reached. The page continues when the server is back.";
  $("away").hidden = false;
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 2000));
    if (await fetch("health").then((response) => response.ok, () => false)) break;
  }
  waiting = false;
  $("away").hidden = true;
  settings.load().catch(failed);
});
document.addEventListener("adapters-changed", () => settings.load().catch(failed)); // said by what changes them

async function start() {
  question.value = asked.get("prompt") ?? sessionStorage.getItem("draft") ?? "";
  if (asked.has("columns")) settings.setColumns(asked.get("columns").split(",").map((name) => (name === "base" ? null : name)));
  keepDraft();
  if (location.search) history.replaceState(null, "", location.pathname + location.hash); // what it asks for is done
  await followAddress();
  question.focus();
  await settings.load();
  draw();
}
start().catch(failed);
