"""Prepare rows: from what a user has to a set worth training on, one program for each step."""
