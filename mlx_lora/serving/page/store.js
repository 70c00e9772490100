// Conversations in the browser's IndexedDB. Each change reads the newest record and writes it in one transaction, so
// that two tabs never overwrite each other's changes. Other tabs are told which conversation has changed.

const channel = new BroadcastChannel("mlx-lora");
let opened = null;

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mlx-lora", 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("turns", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(new Error(`This browser cannot keep conversations: ${request.error?.message}`));
  });
  return opened;
}

// Runs work(store of conversations, store of turns, result) in a transaction. Resolves when it is written.
async function transaction(mode, work) {
  const database = await open();
  return new Promise((resolve, reject) => {
    const made = database.transaction(["conversations", "turns"], mode);
    const result = {};
    made.oncomplete = () => resolve(result.value);
    made.onabort = () => reject(new Error(`The browser did not save the conversation: ${made.error?.message ?? "no reason given"}`));
    work(made.objectStore("conversations"), made.objectStore("turns"), result);
  });
}

export const onChange = (call) => { channel.onmessage = ({ data }) => call(data); };

// All conversations without their turns, the last used first.
export async function conversations() {
  const found = await transaction("readonly", (all, _, result) => {
    all.getAll().onsuccess = (event) => { result.value = event.target.result; };
  });
  return found.sort((a, b) => b.updated - a.updated);
}

// The ids of the conversations that have a text in their title or in a message, in capital letters or not.
export function search(text) {
  const wanted = text.toLowerCase();
  const has = (found) => found.toLowerCase().includes(wanted);
  return transaction("readonly", (all, turns, result) => {
    result.value = new Set();
    all.getAll().onsuccess = ({ target }) => target.result.filter(({ title }) => has(title)).forEach(({ id }) => result.value.add(id));
    turns.openCursor().onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor) return;
      const { conversation, user, answers } = cursor.value;
      if (has(user) || answers.some((answer) => has(answer.text))) result.value.add(conversation);
      cursor.continue();
    };
  });
}

// [conversation, its turns]; the conversation is undefined where it was deleted.
export async function read(id) {
  const found = await transaction("readonly", (all, turns, result) => {
    result.value = [undefined, []];
    all.get(id).onsuccess = (event) => { result.value[0] = event.target.result; };
    turns.index("conversation").getAll(id).onsuccess = (event) => { result.value[1] = event.target.result; };
  });
  found[1].sort((a, b) => a.created - b.created);
  return found;
}

// Adds conversations with their turns: all or, where one cannot be written, none.
export async function add(pairs) {
  await transaction("readwrite", (all, turns) => {
    for (const [conversation, itsTurns] of pairs) {
      all.put(conversation);
      itsTurns.forEach((turn) => turns.put(turn));
    }
  });
  channel.postMessage(pairs.length === 1 ? pairs[0][0].id : null);
}

// Adds a turn to a conversation that still exists, and makes it the one that is shown.
export async function addTurn(turn) {
  await transaction("readwrite", (all, turns) => {
    all.get(turn.conversation).onsuccess = ({ target }) => {
      if (!target.result) return;
      const active = { ...target.result.active, [turn.parent ?? "root"]: turn.id };
      all.put({ ...target.result, active, updated: Date.now() });
      turns.put(turn);
    };
  });
  channel.postMessage(turn.conversation);
}

// Changes a record by a function and resolves to it; to undefined where it was deleted.
async function change(number, id, edit) {
  const found = await transaction("readwrite", (...stores) => {
    const store = stores[number];
    store.get(id).onsuccess = ({ target }) => {
      if (!target.result) return;
      edit(target.result);
      store.put(target.result);
      stores[2].value = target.result;
    };
  });
  if (found) channel.postMessage(found.conversation ?? found.id);
  return found;
}

export const changeConversation = (id, edit) => change(0, id, edit);
export const changeTurn = (id, edit) => change(1, id, edit);

export async function remove(id) {
  await transaction("readwrite", (all, turns) => {
    all.delete(id);
    turns.index("conversation").getAllKeys(id).onsuccess = ({ target }) => target.result.forEach((key) => turns.delete(key));
  });
  channel.postMessage(id);
}
