"""Requests over HTTP to tokens of the engine: an OpenAI-compatible server and a chat page."""
