"""Serving: prompts in, pictures out over HTTP, many requests on one set of engines."""
