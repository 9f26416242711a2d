"""Pure flax.linen modules: no config object, mesh, tokenizer, file or torch in here."""
