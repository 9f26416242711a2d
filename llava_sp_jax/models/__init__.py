"""Defines the model as pure flax.linen modules; only `build` and `flops` read the config."""
