"""Answers that the policy samples, what they are worth, and the phases that learn from them."""
