"""One optimizer step, what a run keeps of it, and what it writes."""
