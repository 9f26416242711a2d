/** Finds and makes elements, and tells the user things. */

export const byId = (id) => document.getElementById(id);

/** Makes an element; no text ever becomes markup. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Tells a screen reader what has happened. */
export const say = (text) => (byId("status").textContent = text);

/** Shows what is wrong above the question; nothing without a text. */
export function notice(text = "") {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}
