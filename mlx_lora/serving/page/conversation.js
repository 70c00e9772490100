// What a conversation is: a tree of turns. A turn is a message of the user, with the answers to it; its parent is the
// answer that it follows. Editing a message, regenerating and choosing another answer add branches and delete nothing.

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation(title = "New chat", system = "") {
  const now = Date.now();
  return { id: newId(), title, system, created: now, updated: now, active: {} };
}

let last = 0;
export function newTurn(conversation, parent, user) {
  last = Math.max(Date.now(), last + 1e-3); // turns made at once keep their order
  return { id: newId(), conversation, parent, user, created: last, answers: [], chosen: null };
}

// round: answers to the same message that were made together. adapter: null for the base, undefined where imported.
export const newAnswer = (round, adapter, system, text = "") => ({
  id: newId(), round, adapter, system, text, reasoning: "", done: text !== "", error: null, numbers: null, vote: 0,
});

// The answer that the conversation goes on with.
export const chosen = (turn) => turn.answers.find((answer) => answer.id === turn.chosen) ?? turn.answers.at(-1);
export const rounds = (turn) => [...new Set(turn.answers.map((answer) => answer.round))].sort((a, b) => a - b);
export const shownRound = (turn) => {
  const round = chosen(turn)?.round;
  return turn.answers.filter((answer) => answer.round === round);
};

// The turns that are shown, first to last, each with the other versions of its message.
export function path(conversation, turns) {
  const children = new Map();
  for (const turn of turns) children.set(turn.parent, [...(children.get(turn.parent) ?? []), turn]);
  const found = [];
  let parent = null;
  while (children.has(parent)) {
    const versions = children.get(parent);
    const turn = versions.find(({ id }) => id === conversation.active[parent ?? "root"]) ?? versions.at(-1);
    found.push({ turn, versions });
    const answer = chosen(turn);
    if (!answer) break;
    parent = answer.id;
  }
  return found;
}

// The messages of turns as the server and training data have them. A turn without an answer is left out.
export function messages(system, turns) {
  const head = system.trim() ? [{ role: "system", content: system }] : [];
  const answered = turns.filter((turn) => chosen(turn)?.text);
  const pairs = answered.map((turn) => [{ role: "user", content: turn.user }, { role: "assistant", content: chosen(turn).text }]);
  return [...head, ...pairs.flat()];
}

// The turns before one, by its parents.
export function before(turn, turns) {
  const owner = new Map(turns.flatMap((each) => each.answers.map((answer) => [answer.id, each])));
  const found = [];
  for (let each = owner.get(turn.parent), answer = turn.parent; each; answer = each.parent, each = owner.get(answer)) {
    found.unshift({ ...each, chosen: answer });
  }
  return found;
}

export const title = (text) => (text.trim().split("\n")[0].slice(0, 60) || "New chat");
export const nameOf = (adapter) => (adapter === undefined ? "imported" : adapter ?? "base");
