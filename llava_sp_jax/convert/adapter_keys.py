"""Lists the keys of PEFT's adapter_config.json, read by `keys.read`."""

from __future__ import annotations

from llava_sp_jax.convert.keys import (
  FLAG,
  TEXT,
  Table,
  either,
  honored,
  idle,
  listing,
  maybe,
  never,
  only,
  real,
  rows,
  whole,
)

_NO_BASE = (
  "it changes the base's weights when PEFT loads it; save it as a plain LoRA (PEFT: "
  "save_pretrained(.., path_initial_model_for_weight_conversion=..))"
)
_OTHER_LORA = "another computation than LoRA's"
ADAPTER: Table = {  # adapter_config.json
  "peft_type": only("LoRA is computed", "LORA"),
  "r": honored(whole(1, 65536), "rank"),
  "lora_alpha": honored(real(-1e6, 1e6), "scale is alpha / rank"),
  "lora_dropout": honored(real(0.0, 1.0), "dropout of training"),
  "use_rslora": honored(FLAG, "scale is alpha / sqrt(rank): alpha becomes alpha * sqrt(rank)"),
  "target_modules": honored(maybe(either(TEXT, listing(TEXT, 0))), "which layers have adapters"),
  "exclude_modules": honored(maybe(either(TEXT, listing(TEXT, 0))), "which have none"),
  "layers_to_transform": honored(maybe(either(whole(0, 4096), listing(whole(0, 4096), 0))),
    "which layers have adapters"),
  "layers_pattern": honored(maybe(either(TEXT, listing(TEXT, 0))), "name of the list of layers"),
  "modules_to_save": honored(maybe(listing(TEXT, 0)), "modules that replace the base's"),
  "base_model_name_or_path": honored(maybe(TEXT), "names the base"),
  "init_lora_weights": only(_NO_BASE, True, False, "gaussian", "orthogonal", "eva"),
  "bias": only("biases of the base stay", "none"),
  "fan_in_fan_out": only("kernels are torch's [out, in]", False),
  **rows(never("one rank and one alpha for all modules"), "rank_pattern", "alpha_pattern"),
  **rows(never(_OTHER_LORA), "use_dora", "use_qalora", "use_bdlora", "lora_bias", "kasa_config",
    "monteclora_config", "velora_config", "arrow_config", "alora_invocation_tokens",
    "target_parameters", "trainable_token_indices", "layer_replication", "use_delora",
    "use_mora", "enable_lora", "corda_config", "lora_ga_config", "loftq_config"),
  "eva_config": idle("of a start that is over"),
  **rows(idle("how another program computes, not what"), "megatron_config", "megatron_core",
    "qalora_group_size", "inference_mode", "runtime_config"),
  "ensure_weight_tying": honored(maybe(FLAG),
    "refused where a base ties and one of both was trained"),
  **rows(idle("says who wrote the file"), "peft_version", "auto_mapping", "revision", "task_type",
    "unsloth_fixed", "use_merged", "merge_weights"),
}  # fmt: skip
