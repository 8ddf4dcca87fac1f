"""Memory and speed of a run, before any weights are loaded."""
