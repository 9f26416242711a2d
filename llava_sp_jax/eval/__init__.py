"""Tasks, scores and reports over generated text."""
