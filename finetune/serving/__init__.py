"""Answers to other programs and to a page."""
