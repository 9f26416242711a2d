/** Puts the page together: the conversation, its questions and the history. */

import { TurnView } from "./answers.js";
import { attach, attachments, connectAttachments, setAttachments } from "./attachments.js";
import { answerLast, freshChat, freshTurn, shownAnswer, STOPPED, titleOf } from "./chat.js";
import { describe, warm } from "./client.js";
import { byId, make, notice, say } from "./dom.js";
import { connectPanels, openPanel } from "./panels.js";
import { asUrl, drawExample, EXAMPLES } from "./pictures.js";
import { connectSettings, openSettings, settings } from "./settings.js";
import { allChats, deleteAllChats, deleteChat, saveChat } from "./store.js";
import { Viewer } from "./views.js";

const NEAR = 120; // pixels from the end within which a conversation is followed
const SURE = 4000; // ms in which a second click deletes everything

let model = null;
let viewer = null;
let chat = freshChat();
let views = []; // a TurnView for each turn
let running = null; // the AbortController of the answer that is coming
const question = byId("question");
const scroll = byId("scroll");

/** Shows what the model sees of a picture; `asked`: the user wants the panel. */
async function look(blob, name, asked = true) {
  await viewer?.show(blob, name);
  openPanel("views", true, asked);
}

const actions = {
  look,
  again: answer,
  edit() {
    const turn = chat.turns.pop();
    question.value = turn.question;
    setAttachments(turn.pictures);
    showChat();
    keep(chat);
    grow();
    question.focus();
  },
  turned() {
    views.at(-1).update(true);
    keep(chat);
  },
};

function showChat() {
  views = chat.turns.map((turn) => new TurnView(turn, actions));
  views.at(-1)?.update(true);
  byId("turns").replaceChildren(...views.map((view) => view.element));
  byId("welcome").hidden = chat.turns.length > 0;
  scroll.scrollTop = scroll.scrollHeight;
  const picture = chat.turns.flatMap((turn) => turn.pictures).at(-1) ?? attachments().at(-1);
  if (picture) return look(picture, picture.name, false);
  viewer?.clear();
  openPanel("views", false, false);
}

/** Shows the last turn as it is now, and follows it. */
function showLast() {
  views.at(-1).update(!running);
  if (scroll.scrollHeight - scroll.clientHeight - scroll.scrollTop < NEAR) {
    scroll.scrollTop = scroll.scrollHeight;
  }
  // What was clicked may be gone.
  if (!document.activeElement?.checkVisibility()) (running ? byId("stop") : question).focus();
}

function send() {
  if (running || byId("send").disabled) return;
  notice();
  chat.turns.push(freshTurn(question.value.trim(), attachments()));
  question.value = "";
  setAttachments([]);
  grow();
  showChat();
  answer();
}

/** Gets an answer to the last question, another one if it has one. */
async function answer() {
  if (running) return;
  const [current, turn] = [chat, chat.turns.at(-1)];
  const changed = () => current === chat && showLast();
  running = new AbortController();
  ready();
  say("Answering.");
  const coming = answerLast(current.turns, model.model, settings, running.signal, changed);
  keep(current);
  await coming;
  running = null;
  ready();
  changed();
  keep(current);
  const { text, problem } = shownAnswer(turn);
  say(problem ? "" : text || "The answer is empty.");
  if (problem?.code === "invalid_api_key") openSettings("key");
}

/** Shows what can be done now. */
function ready() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  byId("send").disabled = !model || (!question.value.trim() && !attachments().length);
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${Math.min(question.scrollHeight, 200)}px`;
  ready();
}

function connectComposer() {
  question.addEventListener("input", grow);
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", ({ key }) => {
    if (key === "Escape" && !document.querySelector("dialog[open], :popover-open")) running?.abort();
  });
}

async function showExample(example) {
  const [name, text] = example;
  const file = await drawExample(example);
  const image = make("img", { alt: "", src: asUrl(file) });
  const button = make("button", {}, image, make("strong", {}, name), make("span", {}, text));
  button.addEventListener("click", () => {
    setAttachments([]);
    attach([file]);
    question.value = text;
    grow();
    question.focus();
  });
  byId("examples").append(make("li", {}, button));
}

/** Stores a chat as it is now; one without turns is none. */
async function keep(kept) {
  try {
    kept.updated = Date.now();
    await (kept.turns.length ? saveChat(kept) : deleteChat(kept.id));
  } catch (error) {
    notice(`The chat could not be stored: ${error.message}`);
  }
  showHistory();
}

/** Goes on with another chat; an answer that is coming ends. */
function change(to) {
  running?.abort();
  chat = to;
  for (const answer of to.turns.flatMap((turn) => turn.answers)) {
    if (!answer.done) Object.assign(answer, { done: true, reason: STOPPED }); // the page was left
  }
  notice();
  showChat();
  showHistory();
  question.focus();
}

async function showHistory() {
  const chats = await allChats().catch(() => []);
  const items = chats.map((each) => {
    const [title, current] = [titleOf(each), each.id === chat.id];
    const button = make("button", { className: "chat", ariaCurrent: current || null }, title);
    const remove = make("button", { className: "remove", ariaLabel: `Delete ${title}` }, "×");
    button.addEventListener("click", () => {
      if (byId("history").popover) openPanel("history", false);
      if (!current) change(each);
    });
    remove.addEventListener("click", async () => {
      if (current) forget();
      await deleteChat(each.id);
      await showHistory();
      byId("history").querySelector(".chat, .close").focus();
    });
    return make("li", {}, button, remove);
  });
  byId("chats").replaceChildren(...items);
  byId("delete-all").hidden = !items.length;
}

/** Leaves the chat, which is not stored again. */
function forget() {
  chat.turns = [];
  change(freshChat());
}

function connectHistory() {
  byId("new").addEventListener("click", () => change(freshChat()));
  const button = byId("delete-all");
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const sure = button.textContent !== label;
    button.textContent = sure ? label : "Delete them for good?";
    if (!sure) return setTimeout(() => (button.textContent = label), SURE);
    forget();
    await deleteAllChats();
    showHistory();
  });
}

async function start() {
  connectSettings();
  connectPanels("history");
  connectAttachments(look, ready);
  connectComposer();
  connectHistory();
  byId("show-settings").addEventListener("click", () => openSettings());
  showHistory();
  for (const example of EXAMPLES) await showExample(example);
  await warm(notice);
  notice();
  model = await describe();
  byId("model").textContent = `${model.model} · ${model.variant}`;
  document.title = `${model.model} · LLaVA-SP`;
  viewer = new Viewer(model);
  const picture = attachments().at(-1);
  if (picture) look(picture, picture.name, false);
  ready();
}

start().catch((error) => notice(error.message));
