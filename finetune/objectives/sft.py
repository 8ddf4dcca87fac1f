"""Supervised fine-tuning: the answers, given the prompts."""

from finetune.objectives.clm import loss

__all__ = ["loss", "supervises"]  # the loss is the same sum; what differs is which tokens are in it


def supervises(loss_on: str) -> str:
    """Which part of a row is learned: what data.loss_on says."""
    return loss_on
