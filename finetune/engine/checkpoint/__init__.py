"""Checkpoints: written whole or not at all, found only if whole, gone on from exactly."""
