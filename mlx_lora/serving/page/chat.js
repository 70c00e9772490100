// The conversation that is open: asking, stopping, editing, choosing. What changes is written to the store at once, and
// an answer that grows every second, so that closing the page loses next to nothing.

import { sentence, ServerError, stream } from "./api.js";
import { before, chosen, messages, newAnswer, newConversation, newTurn, path, rounds, title } from "./conversation.js";
import { notice } from "./dom.js";
import { columns, given, ready } from "./settings.js";
import * as store from "./store.js";

// The conversation that is shown. Another one is another object, so that an answer that still grows keeps its own.
export let state = { conversation: newConversation(), turns: [], stored: false };
const asking = new Map(); // AbortController of each conversation that is being answered, by its id
const SAVE_EVERY = 1000; // milliseconds
const growing = new Map(); // answers that this tab receives now, by id
const GROWS = ["text", "reasoning", "done", "error", "numbers"]; // what the stream changes in an answer
let listeners = {};

// draw: the conversation changed. grew: an answer that is shown did. ended: answers are finished.
export const connect = (calls) => { listeners = calls; };
export const redraw = () => listeners.draw();
export const isGrowing = (answer) => growing.has(answer.id);
export const shown = () => path(state.conversation, state.turns);
export const answering = () => [...asking.keys()];
export const busy = () => asking.has(state.conversation.id);

let openings = 0; // counts what was asked to be shown, so that a slow read never shows what was left since
export function startNew(system = "") {
  openings += 1;
  state = { conversation: newConversation("New chat", system), turns: [], stored: false };
  listeners.draw();
}

// Opens a stored conversation, or reads it again. Answers that grow in this tab stay as they are here.
export async function open(id) {
  const number = ++openings;
  const [conversation, turns] = await store.read(id);
  if (number !== openings) return;
  if (!conversation) return startNew();
  for (const turn of turns) turn.answers = turn.answers.map((answer) => growing.get(answer.id) ?? answer);
  const known = id === state.conversation.id ? state : {};
  state = Object.assign(known, { conversation, turns, stored: true });
  listeners.draw();
}

// Changes the conversation or a turn here and in the store.
async function change(kind, record, edit) {
  edit(record);
  listeners.draw();
  if (state.stored) await store[`change${kind}`](record.id, edit);
}

export const setSystem = (system) => change("Conversation", state.conversation, (each) => { each.system = system; });
export const choose = (turn, id) => change("Turn", turn, (each) => { each.chosen = id; });
export const show = (turn) => change("Conversation", state.conversation, (each) => { each.active[turn.parent ?? "root"] = turn.id; });
export const vote = (turn, id, value) => change("Turn", turn, (each) => {
  const answer = each.answers.find((one) => one.id === id);
  if (answer) answer.vote = answer.vote === value ? 0 : value;
});

export function stop(id = state.conversation.id) {
  asking.get(id)?.abort();
}

// Asks a new message at the end of what is shown.
export const send = (text) => exclusively(async (of, signal) => {
  const end = shown().map(({ turn }) => turn).filter((turn) => chosen(turn)).at(-1);
  await answer(of, await added(of, newTurn(of.conversation.id, end ? chosen(end).id : null, text)), signal);
});

// Asks a message again with another text, beside the first one.
export const edit = (turn, text) => exclusively(async (of, signal) => {
  await answer(of, await added(of, newTurn(of.conversation.id, turn.parent, text)), signal);
});

export const regenerate = (turn) => exclusively((of, signal) => answer(of, turn, signal));

// Runs work(state, signal) unless the conversation is being answered already, so that a double click asks once.
async function exclusively(work) {
  const of = state, { id } = of.conversation;
  if (asking.has(id)) return;
  const controller = new AbortController();
  asking.set(id, controller);
  listeners.draw();
  try {
    await work(of, controller.signal);
  } catch (error) {
    notice(error.message, { lasting: true });
  } finally {
    asking.delete(id);
    listeners.draw();
  }
}

async function added(of, turn) {
  const { conversation } = of;
  if (!of.stored) {
    conversation.title = title(turn.user);
    await store.add([[conversation, []]]);
    of.stored = true;
  }
  conversation.active[turn.parent ?? "root"] = turn.id;
  of.turns.push(turn);
  await store.addTurn(turn);
  const here = of.turns.find(({ id }) => id === turn.id); // a change in another tab may have read the turns anew
  if (!here) of.turns.push(turn);
  return here ?? turn;
}

// One request for all columns, which the server computes in one batch.
async function answer(of, turn, signal) {
  await ready; // the adapters are not known before
  const { system } = of.conversation;
  const history = messages(system, before(turn, of.turns));
  const round = Math.max(0, ...rounds(turn)) + 1;
  const adapters = columns();
  const answers = adapters.map((adapter) => newAnswer(round, adapter, system));
  const preferred = answers.find(({ adapter }) => adapter === chosen(turn)?.adapter) ?? answers[0];
  answers.forEach((each) => growing.set(each.id, each));
  turn.answers.push(...answers);
  turn.chosen = preferred.id;
  listeners.draw();
  let saved = performance.now(), saving = null;
  const save = async () => store.changeTurn(turn.id, (each) => {
    for (const one of answers) {
      const known = each.answers.find(({ id }) => id === one.id);
      if (known) GROWS.forEach((name) => { known[name] = one[name]; });
      else {
        each.answers.push({ ...one });
        each.chosen = preferred.id;
      }
    }
  });
  const leaving = () => { save(); };
  addEventListener("pagehide", leaving);
  try {
    await save();
    const body = { messages: [...history, { role: "user", content: turn.user }], adapters, options: given() };
    for await (const event of stream("page/chat", body, signal)) {
      grow(answers[event.column], event);
      if (performance.now() - saved > SAVE_EVERY && !saving) {
        saving = save().catch(() => {}).finally(() => { saved = performance.now(); saving = null; });
      }
    }
  } catch (error) {
    if (error.status === 404) adaptersChanged();
    for (const each of answers.filter((one) => !one.done)) {
      each.done = true;
      if (signal.aborted) each.numbers = { ...each.numbers, finish_reason: "stopped" };
      else each.error = error instanceof ServerError ? error.message : `The page failed: ${error.message}`;
    }
  } finally {
    removeEventListener("pagehide", leaving);
    try {
      await saving;
      await save();
      const other = answers.find(({ text }) => text);
      if (other && !chosen(turn).text) { // the conversation goes on with what was answered
        turn.chosen = other.id;
        await store.changeTurn(turn.id, (each) => { each.chosen = other.id; });
      }
    } finally {
      answers.forEach((each) => growing.delete(each.id));
      listeners.ended(answers);
    }
  }
}

// An adapter that cannot answer may have been removed from the server.
const adaptersChanged = () => document.dispatchEvent(new CustomEvent("adapters-changed"));

function grow(answer, { kind, text, html, column, ...numbers }) {
  if (kind === "error") { // of this column alone
    Object.assign(answer, { error: sentence(text), done: true });
    adaptersChanged();
    return listeners.draw();
  }
  if (kind === "text" || kind === "reasoning") answer[kind] += text;
  else answer.numbers = numbers;
  if (kind === "end") answer.done = true;
  listeners.grew(answer, html);
}
