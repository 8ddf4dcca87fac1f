"""Models that judge answers: scores by G-Eval, and pairs of answers in both orders."""
