"""Converts names and arrays between torch checkpoints and the parameter tree."""
