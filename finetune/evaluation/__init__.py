"""Base and tuned model on the same rows: scores, statistics, a verdict, a report."""
