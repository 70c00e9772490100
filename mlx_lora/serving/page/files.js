// Conversations and judgements as JSONL that `mlx-lora train` reads, and conversations from such files.

import { before, chosen, messages, newAnswer, newConversation, newTurn, path, title } from "./conversation.js";
import * as store from "./store.js";

const lines = (rows) => rows.map((row) => `${JSON.stringify(row)}\n`).join("");
const said = (answer) => [{ role: "assistant", content: answer.text, ...(answer.reasoning && { reasoning_content: answer.reasoning }) }];

async function everything() {
  const all = await store.conversations();
  return Promise.all(all.map(({ id }) => store.read(id)));
}

// {"messages": [...]} of each conversation as it is shown. Messages without an answer are left out.
export function chats(pairs) {
  const rows = pairs.map(([conversation, turns]) => {
    const shown = path(conversation, turns).map(({ turn }) => turn).filter((turn) => chosen(turn)?.text);
    const system = shown.length ? chosen(shown.at(-1)).system : "";
    const head = messages(system, []);
    return { messages: [...head, ...shown.flatMap((turn) => [{ role: "user", content: turn.user }, ...said(chosen(turn))])] };
  });
  return rows.filter((row) => row.messages.some(({ role }) => role === "assistant"));
}

// The judged answers of all branches, with the prompt that each was given.
function judged([, turns]) {
  return turns.map((turn) => turn.answers.filter((answer) => answer.vote && answer.text).map((answer) => {
    const prompt = [...messages(answer.system, before(turn, turns)), { role: "user", content: turn.user }];
    return { answer, prompt };
  }));
}

// prompt, chosen and rejected: every good answer with every bad one to the same prompt.
export function preferencePairs(pairs) {
  const rows = [];
  for (const group of pairs.flatMap(judged)) {
    for (const good of group.filter(({ answer }) => answer.vote > 0)) {
      for (const bad of group.filter(({ answer }) => answer.vote < 0)) {
        if (bad.answer.system !== good.answer.system || bad.answer.text === good.answer.text) continue;
        rows.push({ prompt: good.prompt, chosen: said(good.answer), rejected: said(bad.answer) });
      }
    }
  }
  return rows;
}

// prompt, completion and label, of every judged answer.
export function labels(pairs) {
  return pairs.flatMap(judged).flat().map(({ answer, prompt }) => ({ prompt, completion: said(answer), label: answer.vote > 0 }));
}

const KINDS = {
  one: ["conversation.jsonl", chats, "No message of this conversation has an answer yet."],
  all: ["conversations.jsonl", chats, "No conversation has an answer yet."],
  pairs: ["pairs.jsonl", preferencePairs, "There are no pairs yet: give two different answers to the same message one thumbs up and one thumbs down."],
  labels: ["labels.jsonl", labels, "No answer has thumbs up or down yet."],
};

// [file's name, text, rows]. Raises an Error where there is nothing to export.
export async function exported(kind, id) {
  const [name, make, nothing] = KINDS[kind];
  const rows = make(kind === "one" ? [await store.read(id)].filter(([found]) => found) : await everything());
  if (!rows.length) throw new Error(nothing);
  return [name, lines(rows), rows.length];
}

// Adds the conversations of a file, all or none. Resolves to their number; raises an Error that names every bad line.
export async function imported(text) {
  const found = [], faults = [];
  for (const [where, row] of rows(text.replace(/^\uFEFF/, ""))) {
    try { found.push(read(row())); } catch (error) { faults.push(`${where}: ${error.message}.`); }
  }
  if (!found.length && !faults.length) faults.push("The file is empty.");
  if (faults.length) {
    const more = faults.length > 20 ? [`and ${faults.length - 20} more lines.`] : [];
    throw new Error(["Nothing was imported.", ...faults.slice(0, 20), ...more].join("\n"));
  }
  const now = Date.now(); // the file's first conversation is the first of the list
  found.forEach(([conversation], index) => { conversation.updated = now - index; });
  await store.add(found);
  return found.length;
}

// [where it is, a function that gives it or raises an Error] of each row: a JSON array's, or one a line.
function rows(text) {
  try {
    const whole = JSON.parse(text);
    return (Array.isArray(whole) ? whole : [whole]).map((row, index) => [`Row ${index + 1}`, () => row]);
  } catch { // several lines
    return text.split(/\r?\n/).map((line, index) => [`Line ${index + 1}`, () => parsed(line), line]).filter(([, , line]) => line.trim());
  }
}

function parsed(line) {
  try { return JSON.parse(line); } catch (error) { throw new Error(`it is not JSON (${error.message})`); }
}

// ShareGPT's names, as many tools write them.
const ROLES = { human: "user", gpt: "assistant", developer: "system" };
const spelled = ({ role, from, content, value, ...rest }) => ({ role: ROLES[role ?? from] ?? role ?? from, content: content ?? value, ...rest });

function read(row) {
  const given = row?.messages ?? row?.conversations;
  if (!Array.isArray(given)) throw new Error('it has no list "messages"');
  const all = given.map((message, index) => plain(spelled(message ?? {}), index + 1));
  const system = all[0]?.role === "system" ? all.shift().content : "";
  if (!all.length) throw new Error("it has no message of the user");
  const conversation = newConversation(title(all[0].content), system);
  const turns = [];
  all.forEach(({ role, content, reasoning }, index) => {
    const number = index + 1 + (given.length - all.length);
    const expected = index % 2 ? "assistant" : "user";
    if (role !== expected) throw new Error(`message ${number} has the role ${role}; expected ${expected}`);
    if (role === "user") return turns.push(newTurn(conversation.id, turns.length ? turns.at(-1).chosen : null, content));
    const answer = { ...newAnswer(1, undefined, system, content), reasoning, done: true };
    if (!content) throw new Error(`message ${number} is empty`);
    Object.assign(turns.at(-1), { answers: [answer], chosen: answer.id });
  });
  return [conversation, turns];
}

function plain(message, number) {
  const { role, content } = message;
  if (!["system", "user", "assistant"].includes(role)) throw new Error(`message ${number} has the role ${JSON.stringify(role)}; the page shows system, user and assistant`);
  if (message.tool_calls?.length) throw new Error(`message ${number} has tool calls, which the page does not show`);
  if (role === "system" && number > 1) throw new Error(`message ${number} has the role system, which only the first message may have`);
  const parts = Array.isArray(content) ? content.map((part) => (part?.type === "text" ? part.text : undefined)) : [content];
  if (!parts.every((part) => typeof part === "string")) throw new Error(`the content of message ${number} is not text`);
  const reasoning = typeof message.reasoning_content === "string" ? message.reasoning_content : "";
  return { role, content: parts.join(""), reasoning };
}
