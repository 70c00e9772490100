// The dialog of adapters: what each is, unloading, and uploading a folder.

import { get, post, request } from "./api.js";
import { $, el } from "./dom.js";
import { setColumns } from "./settings.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = ["adapter_model.safetensors", "adapters.safetensors"]; // PEFT's and mlx-lm's: beside them lie other files
const PICKLE = /\.(bin|pt|pth|ckpt|pkl)$/i;
let upload = null; // what the server takes: {limit}, or null
let sending = null; // an AbortController while a folder is uploaded
let chosen = []; // files to upload

export const bytes = (size) => {
  const power = Math.min(3, Math.floor(Math.log10(Math.max(1, size)) / 3));
  return `${(size / 1000 ** power).toLocaleString("en", { maximumFractionDigits: power ? 1 : 0 })} ${["B", "kB", "MB", "GB"][power]}`;
};
const changed = () => document.dispatchEvent(new CustomEvent("adapters-changed"));

// Lets one adapter answer, beside the base.
export function chatWith(name, dialog) {
  changed();
  setColumns([null, name]);
  dialog.close();
  $("question").focus();
}

async function draw() {
  const found = await get("page/adapters");
  ({ upload } = found);
  $("adapter-list").replaceChildren(...found.adapters.map(row));
  $("no-adapters").hidden = found.adapters.length > 0;
  $("upload").hidden = !upload;
  $("no-upload").hidden = Boolean(upload);
}

function row(adapter) {
  const { name, method, ranks, loaded, rows, problem, alone } = adapter;
  const rank = ranks?.length ? `rank ${ranks.length > 1 ? `${ranks[0]} to ${ranks.at(-1)}` : ranks[0]}` : null;
  const facts = [method, rank, adapter.bytes !== undefined ? bytes(adapter.bytes) : null, loaded ? "in memory" : null, rows ? `answering ${rows}` : null];
  return el("li", { className: "card" },
    el("div", { className: "row" },
      el("h3", {}, name),
      problem ? null : el("button", { type: "button", className: "outlined text", "aria-label": `Chat with ${name}`, "data-adapter": name, on: { click: () => chatWith(name, $("adapters")) } }, "Chat"),
      loaded ? el("button", { type: "button", className: "outlined text", "aria-label": `Unload ${name}`, on: { click: () => unload(name) } }, "Unload") : null),
    problem ? el("p", { className: "error lines" }, problem) : el("p", { className: "hint" }, facts.filter(Boolean).join(" · ")),
    alone?.length ? el("p", { className: "hint" }, `Cannot share a batch with other adapters: ${alone.join("; ")}.`) : null);
}

async function unload(name) {
  try {
    await post("v1/unload_lora_adapter", { lora_name: name });
    say(`${name} is no longer in memory. The next request that uses it reads it again.`, false, "adapter-result");
  } catch (error) { say(error.message, true, "adapter-result"); }
  await draw();
  changed();
  $("adapter-list").querySelector(`[data-adapter="${CSS.escape(name)}"]`)?.focus();
}

function say(text, fault = false, where = "upload-result") {
  $(where).textContent = text;
  $(where).className = fault ? "error lines" : "lines";
}

// Uploading.

// files: [path, File] pairs. Takes an adapter's files of the outermost folder, or says why there is none.
function choose(files, folder) {
  const depth = Math.min(...files.map(([path]) => path.split("/").length));
  const top = files.filter(([path]) => path.split("/").length === depth).map(([, file]) => file);
  const named = (test) => top.filter(({ name }) => test(name));
  const all = named((name) => name.endsWith(".safetensors")), usual = named((name) => WEIGHTS.includes(name));
  const weights = usual.length ? usual : all, config = named((name) => name === CONFIG);
  const pickles = named((name) => PICKLE.test(name));
  chosen = [];
  $("send-adapter").disabled = true;
  const total = [...config, ...weights].reduce((sum, { size }) => sum + size, 0);
  if (!weights.length && pickles.length) say(`${pickles[0].name} is a pickle file, and reading one can run code. Convert the folder with: mlx-lora convert FOLDER NEW_FOLDER --to peft`, true);
  else if (!config.length || !weights.length) say(`An adapter's folder has ${CONFIG} and a .safetensors file; there is no ${config.length ? ".safetensors file" : CONFIG} here.`, true);
  else if (total > upload.limit) say(`The adapter has ${bytes(total)}; this server accepts at most ${bytes(upload.limit)}. Start it with a larger --upload-limit, or put the folder into its --adapters-dir.`, true);
  else {
    chosen = [...config, ...weights];
    const left = top.length - chosen.length;
    say(`${chosen.map(({ name }) => name).join(", ")}: ${bytes(total)}.${left ? ` ${left} other ${left > 1 ? "files are" : "file is"} not needed.` : ""}`);
    if (folder) $("adapter-name").value = folder.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 100);
    $("send-adapter").disabled = false;
    $("adapter-name").focus();
  }
}

function picked({ target }) {
  const files = [...target.files].map((file) => [file.webkitRelativePath || file.name, file]);
  if (files.length) choose(files, files[0][0].includes("/") ? files[0][0].split("/")[0] : "");
}

const fileOf = (entry) => new Promise((resolve, reject) => entry.file(resolve, reject));

// A folder can be dropped anywhere on the page: it opens the dialog.
async function dropped(event) {
  event.preventDefault();
  $("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  if (!entries.length) return;
  if (!document.querySelector("dialog[open]")) await open();
  if (!upload || !$("adapters").open) return;
  const folder = entries.length === 1 && entries[0].isDirectory ? entries[0] : null;
  const inside = folder ? [] : entries;
  if (folder) {
    const reader = folder.createReader();
    for (let more; (more = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) inside.push(...more); // 100 at a time
  }
  const files = await Promise.all(inside.filter((entry) => entry.isFile).map(async (entry) => [entry.name, await fileOf(entry)]));
  if (files.length) choose(files, folder?.name ?? "");
  else say("Drop one adapter's folder, or its files.", true);
}

async function send(event) {
  event.preventDefault();
  if (!chosen.length || sending) return;
  const name = $("adapter-name").value.trim();
  const query = new URLSearchParams([["name", name], ...chosen.map((file) => ["file", `${file.name}:${file.size}`])]);
  sending = new AbortController();
  busy(true);
  say(`Uploading ${name}.`);
  try {
    await request(`page/adapters?${query}`, { method: "POST", body: new Blob(chosen), signal: sending.signal });
    say(`${name} is uploaded and fits this model.`);
    chosen = [];
    for (const field of ["adapter-name", "adapter-folder", "adapter-files"]) $(field).value = "";
    changed();
    await draw();
  } catch (error) {
    say(error.name === "AbortError" ? "The upload was cancelled, and no files were kept." : error.message, error.name !== "AbortError");
  }
  sending = null;
  busy(false);
}

function busy(now) {
  $("upload-progress").hidden = $("cancel-upload").hidden = !now;
  $("send-adapter").hidden = now;
  $("send-adapter").disabled = !chosen.length;
}

async function open() {
  for (const where of ["upload-result", "adapter-result"]) say("", false, where);
  $("adapters").showModal();
  await draw().catch((error) => say(error.message, true, "adapter-result"));
}

$("open-adapters").addEventListener("click", open);
for (const input of [$("adapter-folder"), $("adapter-files")]) {
  input.addEventListener("click", () => { input.value = ""; }); // so that the same folder can be chosen again
  input.addEventListener("change", picked);
}
$("upload").addEventListener("submit", send);
$("cancel-upload").addEventListener("click", () => sending?.abort());
$("drop").addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("dragover", (event) => event.preventDefault()); // so that a drop does not replace the page
addEventListener("drop", (event) => dropped(event).catch((error) => say(error.message, true)));
