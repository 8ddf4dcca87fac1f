"""Answers to prompts, by a model here or at a server."""
