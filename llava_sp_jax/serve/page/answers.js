/** Shows turns: questions, answers while they come, and how sure the model was of each token. */

import { shownAnswer, smallest, STOPPED } from "./chat.js";
import { make, say } from "./dom.js";
import { asUrl } from "./pictures.js";

const WIDE = 4; // the margin, in logits, that fills a bar
const SLIM = 1; // margins below are marked
const LOW = 0.06; // the height of the lowest bar
const NEAR = 8; // characters within which a token's text is looked for
const REASONS = { length: "cut at the most tokens", [STOPPED]: "stopped" };

const quoted = (text) => `“${text.replaceAll("\n", "⏎")}”`;
const percent = (log) => `${(100 * Math.exp(log)).toFixed(1)}%`;

/** Returns list items with buttons that show pictures; `look` is called with one. */
export function pictureItems(pictures, look) {
  return pictures.map((blob, i) => {
    const name = `Picture ${i + 1}, ${blob.name}`;
    const image = make("img", { src: asUrl(blob), alt: "" });
    const button = make("button", { type: "button", className: "picture" }, image);
    button.ariaLabel = `${name}: what the model sees`;
    button.title = "What the model sees";
    button.addEventListener("click", () => look(blob, name));
    return make("li", {}, button);
  });
}

/**
 * Cuts a text into the parts that its tokens wrote, [text, index of the token]. A token that is not
 * found soon, such as a part of a character, has none: its text belongs to the one before the next.
 */
export function cut(text, tokens) {
  const parts = [];
  let at = 0;
  tokens.forEach((token, i) => {
    const found = [token.text, token.text.trim()].filter((word) => {
      const place = word ? text.indexOf(word, at) : -1;
      return place >= 0 && place <= at + NEAR;
    })[0];
    if (!found) return;
    const place = text.indexOf(found, at);
    if (place > at) parts.push([text.slice(at, place), i - 1]);
    at = place + found.length;
    parts.push([found, i]);
  });
  if (at < text.length) parts.push([text.slice(at), tokens.length - 1]);
  return parts;
}

/** One turn on the page. `actions` are {look, again, edit, turned}. */
export class TurnView {
  constructor(turn, actions) {
    this.turn = turn;
    this.actions = actions;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.parts = {};
    for (const part of this.element.querySelectorAll("[class]")) {
      this.parts[part.classList[part.classList.length - 1]] = part;
    }
    const { pictures, question, bars, text } = this.parts;
    pictures.replaceChildren(...pictureItems(turn.pictures, actions.look));
    question.textContent = turn.question;
    question.hidden = !turn.question;
    const click = (name, act) => this.parts[name].addEventListener("click", act);
    click("copy", () => {
      navigator.clipboard.writeText(shownAnswer(turn).text);
      say("Copied.");
    });
    click("again", actions.again);
    click("edit", actions.edit);
    click("before", () => this.turnTo(turn.shown - 1));
    click("after", () => this.turnTo(turn.shown + 1));
    for (const place of [bars, text]) {
      place.addEventListener("pointermove", ({ target }) => {
        if (target.dataset.token) this.light(+target.dataset.token);
      });
      place.addEventListener("pointerleave", () => this.light(this.lowest));
    }
    bars.addEventListener("keydown", (event) => this.step(event));
    this.update(false);
  }

  turnTo(i) {
    this.turn.shown = i;
    this.actions.turned();
  }

  /** Moves among the tokens with the keys of a slider. */
  step(event) {
    const last = shownAnswer(this.turn).tokens.length - 1;
    const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
    const to = { ...by, Home: -last, End: last }[event.key];
    if (!to) return;
    event.preventDefault();
    this.light(Math.min(Math.max(this.lit + to, 0), last));
  }

  /** Shows the answer as it is now; the `last` turn can be asked again. */
  update(last) {
    const answer = shownAnswer(this.turn);
    const { text, problem, facts, actions, copy, again, edit, pager, place } = this.parts;
    const { length } = this.turn.answers;
    const coming = answer !== undefined && !answer.done;
    this.element.classList.toggle("coming", coming);
    text.ariaBusy = coming;
    if (coming) text.textContent = answer.text;
    else if (answer) this.spell(answer);
    text.hidden = !coming && !answer?.text;
    problem.textContent = answer?.problem?.message ?? "";
    problem.hidden = !answer?.problem;
    this.bar(answer);
    facts.replaceChildren(...(answer ? this.facts(answer) : []));
    actions.hidden = !answer?.done;
    copy.hidden = !answer?.text || !navigator.clipboard;
    again.hidden = edit.hidden = !last;
    pager.hidden = length < 2 || !last;
    place.textContent = `${this.turn.shown + 1} of ${length}`;
    this.parts.before.disabled = this.turn.shown < 1;
    this.parts.after.disabled = this.turn.shown >= length - 1;
  }

  /** Writes the text in a span for each token. */
  spell(answer) {
    const spans = cut(answer.text, answer.tokens).map(([text, i]) => {
      const span = make("span", { className: answer.tokens[i]?.margin < SLIM ? "slim" : "" }, text);
      if (i >= 0) span.dataset.token = i;
      return span;
    });
    this.parts.text.replaceChildren(...spans);
  }

  /** Draws a bar for each token; its height is the margin. */
  bar(answer) {
    const { margins, bars } = this.parts;
    const tokens = answer?.tokens ?? [];
    this.lowest = smallest(tokens);
    margins.hidden = this.lowest < 0;
    if (margins.hidden) return;
    if (answer !== this.drawn) bars.replaceChildren();
    this.drawn = answer;
    for (const { margin = WIDE } of tokens.slice(bars.childElementCount)) {
      const bar = make("i", { className: margin < SLIM ? "slim" : "" });
      bar.dataset.token = bars.childElementCount;
      bar.style.setProperty("--margin", Math.min(Math.max(margin / WIDE, LOW), 1));
      bars.append(bar);
    }
    bars.ariaValueMax = tokens.length;
    this.light(this.lowest);
  }

  /** Says what token `i` was chosen over. */
  light(i) {
    this.lit = i;
    const { bars, text, token: line } = this.parts;
    const token = shownAnswer(this.turn)?.tokens[i];
    if (!token) return;
    for (const place of [bars, text]) {
      place.querySelector(".lit")?.classList.remove("lit");
      place.querySelector(`[data-token="${i}"]`)?.classList.add("lit");
    }
    const { logprob, margin, other } = token;
    const next = `, next ${quoted(other ?? "")} ${percent(logprob - margin)}, margin ${margin?.toFixed(2)}`;
    line.textContent = quoted(token.text) + ` ${percent(logprob)}` + (other === undefined ? "" : next);
    bars.ariaValueNow = i + 1;
    bars.ariaValueText = line.textContent;
  }

  facts(answer) {
    const { tokens, count, promptTokens, firstSeconds, speed, seed, reason } = answer;
    const rows = {
      "Smallest margin": tokens[this.lowest]?.margin?.toFixed(2),
      "First token": firstSeconds && `${firstSeconds.toFixed(2)} s`,
      Speed: speed && `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`,
      Tokens: promptTokens && `${promptTokens} read, ${count} written`,
      Seed: seed,
      Ended: REASONS[reason],
    };
    return Object.entries(rows)
      .filter(([, value]) => value || value === 0)
      .map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value)));
  }
}
