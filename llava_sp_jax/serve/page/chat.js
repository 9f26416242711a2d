/**
 * Holds a conversation and gets its answers. A chat is {id, turns, updated}, a turn {question,
 * pictures, answers, shown}: of its answers, the one that is shown belongs to the conversation.
 */

import { complete } from "./client.js";
import { asDataUrl } from "./pictures.js";

export const STOPPED = "stopped"; // the reason of an answer that the user has stopped
const BRIEF = 0.1; // seconds that are too few for a speed
const draw = () => crypto.getRandomValues(new Uint32Array(1))[0];

export const freshChat = () => ({ id: `${Date.now()}-${draw()}`, turns: [] });
export const freshTurn = (question, pictures) => ({ question, pictures, answers: [], shown: -1 });
export const shownAnswer = (turn) => turn.answers[turn.shown];
export const titleOf = ({ turns: [first] }) => first.question.slice(0, 80) || "A picture";

/** Returns the messages that ask the last turn; earlier turns without an answer are left out. */
async function messages(turns, system) {
  const said = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    const last = turn === turns.at(-1);
    const text = shownAnswer(turn)?.text;
    if (!last && !text) continue;
    const urls = await Promise.all(turn.pictures.map(asDataUrl));
    const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
    if (turn.question) parts.push({ type: "text", text: turn.question });
    said.push({ role: "user", content: parts });
    if (!last) said.push({ role: "assistant", content: text });
  }
  return said;
}

/**
 * Adds an answer to the last of `turns`, and fills it while it arrives; calls `changed` after each
 * part. What goes wrong is the answer's `problem`.
 */
export async function answerLast(turns, model, settings, signal, changed) {
  const turn = turns.at(-1);
  const { temperature, topP, maxTokens, seed, key, system } = settings;
  const answer = { text: "", tokens: [], reason: "", problem: null };
  // A seed of its own makes another answer, which can be asked for again.
  if (temperature > 0) answer.seed = seed ?? draw();
  turn.shown = turn.answers.push(answer) - 1;
  changed();
  const clock = { start: performance.now(), first: 0, before: 0 };
  try {
    const body = {
      model,
      messages: await messages(turns, system),
      max_tokens: maxTokens,
      temperature,
      top_p: topP,
      seed: answer.seed,
      stream: true,
      stream_options: { include_usage: true },
      logprobs: true,
      top_logprobs: 2,
    };
    for await (const chunk of complete(body, key, signal)) {
      take(answer, chunk, clock);
      changed();
    }
  } catch (error) {
    if (signal.aborted) answer.reason = STOPPED;
    else answer.problem = { message: error.message, code: error.code };
  }
  answer.done = true;
  changed();
}

/** Adds what a chunk says to the answer, and when it came. */
function take(answer, chunk, clock) {
  if (chunk.usage) {
    answer.promptTokens = chunk.usage.prompt_tokens;
    answer.count = chunk.usage.completion_tokens;
  }
  for (const choice of chunk.choices) {
    const text = choice.delta?.content ?? "";
    const chosen = choice.logprobs?.content ?? [];
    answer.tokens.push(...chosen.map(lead));
    answer.text += text;
    answer.reason = choice.finish_reason ?? answer.reason;
    if (!text && !chosen.length) continue;
    const now = performance.now();
    if (!clock.first) {
      clock.first = now;
      clock.before = answer.tokens.length || 1;
      answer.firstSeconds = (now - clock.start) / 1000;
    }
    const [more, seconds] = [answer.tokens.length - clock.before, (now - clock.first) / 1000];
    if (more && seconds > BRIEF) answer.speed = more / seconds;
  }
}

/** Returns a chosen token with its lead over the best other one. */
function lead({ token, logprob, top_logprobs: likeliest }) {
  const other = likeliest.find((each) => each.token !== token);
  if (!other) return { text: token, logprob };
  return { text: token, logprob, other: other.token, margin: logprob - other.logprob };
}

/** Returns the index of the token with the smallest margin; -1 without margins. */
export function smallest(tokens) {
  let found = -1;
  tokens.forEach(({ margin }, i) => {
    if (margin !== undefined && !(tokens[found]?.margin <= margin)) found = i;
  });
  return found;
}
