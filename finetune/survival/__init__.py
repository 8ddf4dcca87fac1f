"""How a run outlives signals, spot machines and processes that hang."""
