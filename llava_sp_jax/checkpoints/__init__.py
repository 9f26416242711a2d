"""Reads and writes run folders, opens any checkpoint, and makes initial parameters."""
