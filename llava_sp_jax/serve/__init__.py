"""Reads and writes OpenAI's protocol, for a server of checkpoints; needs the extra `serve`."""
