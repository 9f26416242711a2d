/** Collects the pictures of the next question: chosen, pasted or dropped. */

import { pictureItems } from "./answers.js";
import { byId, make, notice } from "./dom.js";
import { readPicture } from "./pictures.js";

let attached = [];
let look; // shows what the model sees of a picture
let changed; // is called when there are other pictures

export const attachments = () => attached;

/** Replaces the pictures. */
export function setAttachments(pictures) {
  attached = pictures;
  const items = pictureItems(attached, look);
  items.forEach((item, i) => {
    const remove = make("button", { type: "button", className: "remove" }, "×");
    remove.ariaLabel = `Remove picture ${i + 1}, ${attached[i].name}`;
    remove.addEventListener("click", () => {
      setAttachments(attached.toSpliced(i, 1));
      byId("question").focus();
    });
    item.append(remove);
  });
  byId("attached").replaceChildren(...items);
  changed();
}

/** Adds picture files; says which are none. */
export async function attach(files) {
  notice();
  const read = await Promise.allSettled(files.map(readPicture));
  const failed = read.find((each) => each.reason);
  if (failed) notice(failed.reason.message);
  setAttachments([...attached, ...read.flatMap((each) => each.value ?? [])]);
  const last = attached.at(-1);
  if (last) look(last, last.name, false);
}

export function connectAttachments(onLook, onChange) {
  [look, changed] = [onLook, onChange];
  byId("add").addEventListener("click", () => byId("files").click());
  byId("files").addEventListener("change", async ({ target }) => {
    await attach([...target.files]);
    target.value = "";
    byId("question").focus();
  });
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    attach(files);
  });
  const dropping = (is) => document.body.classList.toggle("dropping", is);
  const on = (name, act) =>
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return;
      event.preventDefault();
      act(event);
    });
  on("dragover", () => dropping(true));
  on("dragleave", ({ relatedTarget }) => dropping(relatedTarget !== null));
  on("drop", ({ dataTransfer }) => {
    dropping(false);
    attach([...dataTransfer.files]);
  });
}
