"""Lists the fields of requests that `protocol` does not have: without effect, or refused by name.

A field that is in neither is ignored, as clients of this protocol expect. Sources: the `openai`
client to 3.51, and the extensions of vLLM to 0.32.
"""

from __future__ import annotations

from llava_sp_jax.convert.keys import REFUSED, Key, Table, idle, never, only, rows

_TOOLS = never("the model calls no tools")
_FORMAT = never("answers are free text")
_PICTURES = never("the model reads text and pictures, and writes text")

COMMON: Table = {
  **rows(idle("says who asks, or what for"), "user", "metadata", "safety_identifier",
    "request_id", "store"),
  **rows(idle("how a request is computed, not what"), "service_tier", "priority",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "cache_salt",
    "prediction", "kv_transfer_params", "stream_interval"),
  **rows(_FORMAT, "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "structured_outputs", "structural_tag"),
  "response_format": only("answers are free text", {"type": "text"}),
  "use_beam_search": never("beams are for llava-sp generate"),
  "best_of": only("one answer is written for each that is asked for", 1),
  "length_penalty": only("it is for beams", 1, 1.0),
  **rows(never("tokens are chosen by temperature, top_k, top_p, min_p, penalties and logit_bias"),
    "logits_processors", "allowed_token_ids", "bad_words", "typical_p", "no_repeat_ngram_size"),
  "prompt_logprobs": only("the tokens of a prompt have no probabilities here"),
  "include_stop_str_in_output": never("an answer ends before its stop string"),
  "skip_special_tokens": only("marks of the template are no part of an answer", True),
  "spaces_between_special_tokens": only("tokens are joined as the tokenizer does it", True),
  "truncate_prompt_tokens": never("a prompt is read as a whole; send a shorter one"),
  "return_token_ids": never("answers are text"),
  "return_tokens_as_token_ids": never("answers are text"),
  "prompt_embeds": never("prompts are text and pictures"),
}  # fmt: skip

CHAT: Table = {
  **COMMON,
  **rows(idle("the model does not think before it answers"), "reasoning_effort", "verbosity",
    "include_reasoning", "thinking_token_budget"),
  **rows(_TOOLS, "tools", "functions"),
  "web_search_options": only("the model does not search"),
  "tool_choice": only("the model calls no tools", "none", "auto"),
  "function_call": only("the model calls no tools", "none", "auto"),
  "parallel_tool_calls": idle("the model calls no tools"),
  "modalities": only("answers are text", ["text"]),
  "audio": _PICTURES,
  "moderation": never("answers are not moderated here"),
  "echo": never("the question is not repeated in the answer"),
  "add_generation_prompt": only("the last message is a question, and is answered", True),
  "continue_final_message": never("the last message is a question, and is answered"),
  "add_special_tokens": never("the template of the checkpoint says which tokens a prompt has"),
  **rows(never("the template of the checkpoint is used, as in training"),
    "chat_template", "chat_template_kwargs", "documents"),
  **rows(never("pictures are read as the checkpoint says"), "mm_processor_kwargs",
    "media_io_kwargs"),
}  # fmt: skip

COMPLETION: Table = {
  **COMMON,
  "echo": never("the prompt is not repeated in the answer"),
  "suffix": never("text is not inserted"),
  "logprobs": never("/v1/chat/completions gives log probabilities"),
  "add_special_tokens": only("the template of the checkpoint says which tokens a prompt has", True),
}

TOKENIZE: Table = {
  "add_special_tokens": only("the template of the checkpoint says which tokens a prompt has", True),
  "add_generation_prompt": only("the last message is a question, and is answered", True),
  "continue_final_message": never("the last message is a question, and is answered"),
  "return_token_strs": never("tokens are given as ids"),
  **rows(never("the template of the checkpoint is used, as in training"),
    "chat_template", "chat_template_kwargs"),
  "mm_processor_kwargs": never("pictures are read as the checkpoint says"),
  "tools": _TOOLS,
}  # fmt: skip


def refused(table: Table) -> dict[str, Key]:
  """Returns the fields of a table that are refused, all or at some values."""
  return {name: key for name, key in table.items() if key.place == REFUSED}
