/** Holds the settings of answers, and the dialog that changes them. */

import { byId } from "./dom.js";
import { readSettings, writeSettings } from "./store.js";

const NUMBERS = { temperature: 0, topP: 1, maxTokens: null, seed: null };
const DEFAULTS = { ...NUMBERS, system: "", theme: "", key: "" };

/** The values; `key` is never stored. */
export const settings = { ...DEFAULTS, ...readSettings() };

/** Shows the values in the dialog, and the theme on the page. */
function show() {
  for (const name in DEFAULTS) byId(name).value = settings[name] ?? "";
  tell();
}

function tell() {
  for (const output of document.querySelectorAll("output")) {
    output.value = Number(settings[output.htmlFor.value]).toFixed(2);
  }
  document.documentElement.dataset.theme = settings.theme;
}

/** Takes the values of the dialog; numbers that are out of bounds are the defaults. */
function take() {
  for (const name in DEFAULTS) {
    const { value, validity } = byId(name);
    if (!(name in NUMBERS)) settings[name] = value;
    else settings[name] = value && validity.valid ? Number(value) : DEFAULTS[name];
  }
  writeSettings({ ...settings, key: "" });
  tell();
}

/** Opens the dialog; the field with the id `focus` gets the focus. */
export function openSettings(focus) {
  show();
  byId("settings").showModal();
  if (focus) byId(focus).focus();
}

export function connectSettings() {
  const dialog = byId("settings");
  show();
  dialog.addEventListener("input", take);
  dialog.addEventListener("click", ({ target }) => {
    if (target === dialog || target.closest(".close")) dialog.close();
  });
  dialog.addEventListener("submit", (event) => {
    event.preventDefault();
    dialog.close();
  });
  byId("reset").addEventListener("click", () => {
    Object.assign(settings, DEFAULTS);
    show();
    take();
  });
}
