// The dialog of runs: state, losses as they come, time left, the report, and chatting with a run's checkpoint.

import { get, post } from "./api.js";
import { chatWith } from "./adapters.js";
import { $, el } from "./dom.js";

const EVERY = 2000; // milliseconds between polls, while the dialog is open
const STATES = {
  starting: "Starting", running: "Running", finished: "Finished", "ended early": "Ended early", stopped: "Stopped",
  interrupted: "Interrupted", empty: "No lines yet",
};
const cards = new Map(); // by name: {version, points, ...elements}
let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (!$("runs").open) return;
  try {
    if (!document.hidden) await draw();
    $("runs-fault").hidden = true;
  } catch (error) {
    $("runs-fault").textContent = error.message;
    $("runs-fault").hidden = false;
  }
  clearTimeout(timer);
  timer = setTimeout(poll, EVERY);
}

async function draw() {
  const { runs } = await get("page/runs");
  $("no-runs").hidden = Boolean(runs?.length);
  $("no-runs").textContent = runs ? "There is no run in the folder yet. It appears here when it starts." : "Start the server with --runs-dir FOLDER to see fine-tunes here as they go.";
  const names = new Set((runs ?? []).map(({ name }) => name));
  for (const [name, { card }] of cards) if (!names.has(name)) { card.remove(); cards.delete(name); }
  for (const run of runs ?? []) {
    if (!cards.has(run.name)) cards.set(run.name, make(run.name));
    const shown = cards.get(run.name);
    if (shown.version !== run.version || shown.points.length !== run.points) {
      const more = await get(`page/runs/${encodeURIComponent(run.name)}/points?version=${shown.version}&after=${shown.points.length}`);
      shown.points = [...shown.points.slice(0, more.start), ...more.losses];
      shown.version = more.version;
      plot(shown.chart, shown.points);
    }
    update(shown, run);
  }
  const order = (runs ?? []).map(({ name }) => cards.get(name).card);
  if (order.some((card, index) => $("run-list").children[index] !== card)) $("run-list").replaceChildren(...order);
}

function make(name) {
  const state = el("span", { className: "state" }), facts = el("p", { className: "hint" }), fault = el("p", { className: "hint" });
  const chart = node("svg", { viewBox: "0 0 640 150", role: "img", class: "chart" });
  const report = el("a", { target: "_blank", rel: "noopener", "aria-label": `Report of ${name}` }, "Report");
  const buttons = Object.fromEntries(["best", "last"].map((checkpoint) => [checkpoint,
    el("button", { type: "button", className: "outlined text", "aria-label": `Chat with the ${checkpoint} checkpoint of ${name}`, on: { click: () => use(name, checkpoint) } }, `Chat with ${checkpoint}`)]));
  const card = el("li", { className: "card" },
    el("div", { className: "row" }, el("h3", {}, name), state), chart, facts, fault,
    el("div", { className: "row wrap" }, report, ...Object.values(buttons)));
  return { version: "", points: [], card, state, facts, fault, chart, report, buttons };
}

function update({ state, facts, fault, chart, report, buttons, points }, run) {
  const set = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  set(state, STATES[run.state]);
  state.dataset.state = run.state;
  const told = [
    run.iters ? `iteration ${run.iteration.toLocaleString("en")} of ${run.iters.toLocaleString("en")}` : null,
    run.train_loss !== null ? `loss ${run.train_loss.toPrecision(4)}` : null,
    run.val_loss !== null ? `validation loss ${run.val_loss.toPrecision(4)}` : null,
    run.seconds_left !== null ? `about ${duration(run.seconds_left)} left` : null,
  ].filter(Boolean).join(" · ");
  set(facts, told.charAt(0).toUpperCase() + told.slice(1));
  set(fault, run.unreadable ? `${run.unreadable} ${run.unreadable > 1 ? "lines" : "line"} of the log cannot be read.` : "");
  chart.toggleAttribute("hidden", !points.length);
  report.hidden = !run.report;
  if (run.report && report.getAttribute("href") !== run.report) report.href = run.report;
  for (const [checkpoint, button] of Object.entries(buttons)) button.hidden = !run.checkpoints.includes(checkpoint);
}

async function use(name, checkpoint) {
  try {
    const made = await post(`page/runs/${encodeURIComponent(name)}/adapter`, { checkpoint });
    chatWith(made.name, $("runs"));
  } catch (error) {
    $("runs-fault").textContent = error.message;
    $("runs-fault").hidden = false;
  }
}

function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return `${Math.floor(seconds / 3600)} h ${Math.round(seconds % 3600 / 60)} min`;
}

// Drawing.

function node(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// points: [set, iteration, loss]. A loss that was not finite leaves a gap.
function plot(svg, points) {
  const finite = points.filter(([, , loss]) => loss !== null);
  const least = Math.min(...finite.map(([, , loss]) => loss)), most = Math.max(...finite.map(([, , loss]) => loss));
  const end = Math.max(1, ...points.map(([, iteration]) => iteration));
  const left = 124; // room for a label such as 0.0000432 on a phone
  const x = (iteration) => left + (628 - left) * iteration / end;
  const y = (loss) => 12 + 108 * (most === least ? 0.5 : (most - loss) / (most - least));
  const curves = ["training", "validation"].map((set) => [set, thin(points.filter(([of]) => of === set))]);
  const path = (curve) => curve.map(([, iteration, loss], index) => loss === null ? "" : `${index && curve[index - 1][2] !== null ? "L" : "M"}${x(iteration).toFixed(1)} ${y(loss).toFixed(1)}`).join("");
  const text = (at, top, anchor, words) => node("text", { x: at, y: top, "text-anchor": anchor }, words);
  svg.replaceChildren(
    node("line", { x1: left, y1: 124, x2: 628, y2: 124, class: "axis" }),
    ...(finite.length ? [text(left - 6, 17, "end", most.toPrecision(3)), text(left - 6, 124, "end", least.toPrecision(3))] : []),
    text(left, 142, "start", "0"), text(628, 142, "end", end.toLocaleString("en")),
    ...[["training", 215], ["validation", 345]].flatMap(([set, at]) => [
      node("path", { d: `M${at} 137h24`, class: set }),
      text(at + 32, 142, "start", set)]),
    node("circle", { cx: 357, cy: 137, r: 3, class: "validation" }),
    ...curves.map(([set, curve]) => node("path", { d: path(curve), class: set })),
    ...curves[1][1].filter(([, , loss]) => loss !== null).map(([, iteration, loss]) => node("circle", { cx: x(iteration).toFixed(1), cy: y(loss).toFixed(1), r: 3, class: "validation" })));
  const told = curves.map(([set, curve]) => [set, curve.filter(([, , loss]) => loss !== null)]).filter(([, curve]) => curve.length)
    .map(([set, curve]) => `${set} from ${curve[0][2].toPrecision(3)} to ${curve.at(-1)[2].toPrecision(3)}`);
  svg.setAttribute("aria-label", `Loss over ${end} iterations: ${told.join(", ") || "no finite value"}`);
}

// At most 400 points of a curve, and its last.
function thin(curve) {
  const step = Math.ceil(curve.length / 400);
  return curve.filter((_, index) => index % step === 0 || index === curve.length - 1);
}

$("open-runs").addEventListener("click", () => { $("runs").showModal(); poll(); });
$("runs").addEventListener("close", () => clearTimeout(timer));
