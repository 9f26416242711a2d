/** Keeps chats (IndexedDB) and settings (localStorage) in this browser; nothing leaves it. */

const NAME = "llava-sp";

const opened = new Promise((done, failed) => {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
  request.onsuccess = () => done(request.result);
  request.onerror = () => failed(request.error);
});
opened.catch(() => {}); // who stores is told

async function run(mode, operation) {
  const transaction = (await opened).transaction("chats", mode);
  const request = operation(transaction.objectStore("chats"));
  return new Promise((done, failed) => {
    transaction.oncomplete = () => done(request.result);
    transaction.onabort = () => failed(transaction.error);
  });
}

/** Returns all chats, the latest first. */
export async function allChats() {
  const chats = await run("readonly", (store) => store.getAll());
  return chats.sort((a, b) => b.updated - a.updated);
}

export const saveChat = (chat) => run("readwrite", (store) => store.put(chat));
export const deleteChat = (id) => run("readwrite", (store) => store.delete(id));
export const deleteAllChats = () => run("readwrite", (store) => store.clear());

/** Returns the stored settings, {} without any. */
export function readSettings() {
  try {
    return JSON.parse(localStorage.getItem(NAME)) ?? {};
  } catch {
    return {};
  }
}

export function writeSettings(values) {
  try {
    localStorage.setItem(NAME, JSON.stringify(values));
  } catch {
    // They are kept until the page is left.
  }
}
