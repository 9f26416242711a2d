/** Opens and closes the panels at the sides: columns where there is room, popovers elsewhere. */

import { byId } from "./dom.js";

const PANELS = {
  history: matchMedia("(min-width: 1240px)"),
  views: matchMedia("(min-width: 960px)"),
};
const dismissed = new Set(); // panels that the user has closed

export const isColumn = (id) => PANELS[id].matches;

function isOpen(panel) {
  return panel.popover ? panel.matches(":popover-open") : !panel.hidden;
}

/** Opens or closes a panel; `asked`: because the user wants it. */
export function openPanel(id, wanted, asked = true) {
  const panel = byId(id);
  if (!asked && wanted && (panel.popover || dismissed.has(id))) return;
  if (asked) dismissed[wanted ? "delete" : "add"](id);
  if (!panel.popover) panel.hidden = !wanted;
  else if (wanted !== isOpen(panel)) panel.togglePopover(wanted);
  byId(`show-${id}`).ariaExpanded = wanted;
  if (panel.popover && wanted) panel.querySelector(".close").focus();
}

/** `started` are the columns that are open at first. */
export function connectPanels(...started) {
  for (const [id, wide] of Object.entries(PANELS)) {
    const [panel, button] = [byId(id), byId(`show-${id}`)];
    const told = () => (button.ariaExpanded = isOpen(panel));
    const fit = () => {
      const open = isOpen(panel);
      panel.popover = wide.matches ? null : "auto";
      panel.hidden = wide.matches && !open;
      told();
    };
    panel.hidden = !started.includes(id);
    fit();
    wide.addEventListener("change", fit);
    panel.addEventListener("toggle", told);
    let wasOpen = false; // before the press, which itself closes a popover
    button.addEventListener("pointerdown", () => (wasOpen = isOpen(panel)));
    button.addEventListener("click", ({ detail }) => {
      openPanel(id, !(detail ? wasOpen : isOpen(panel)));
    });
    panel.querySelector(".close").addEventListener("click", () => {
      openPanel(id, false);
      button.focus();
    });
  }
}
