"""Names and arrays between torch checkpoints and our parameter tree."""
