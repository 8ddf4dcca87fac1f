"""Rows: from files to the micro-batches of a step."""
