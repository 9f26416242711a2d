"""Serves a checkpoint through OpenAI's protocol; needs the extra `serve`."""
