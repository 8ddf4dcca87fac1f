"""Runs that sample what they learn from, small enough for tests."""

from conftest import TINY_LLAMA, write_jsonl

# Spaces are tokens of their own, so a random model has a few words to gain.
WORDS = {"kind": "score", "score": "words"}


def settings(workshop, kind="grpo", rewards=(WORDS,), rollouts=None, **more):
    """The settings of a run; `rollouts` changes some of objective.rollouts."""
    rows = [{"prompt": f"count from {n}", "answer": str(n)} for n in range(12)]
    prompts = write_jsonl(workshop.folder / "prompts.jsonl", rows)
    small = {"group_size": 4, "max_new_tokens": 12, "shard_size": 2, "cut_answers": "learn"}
    return {
        "data__train": str(prompts), "data__max_length": 96, "model__config": TINY_LLAMA,
        "objective__kind": kind, "objective__rollouts": small | (rollouts or {}),
        "objective__rewards": list(rewards), "train__global_batch_size": 16,
        "train__micro_batch_size": 8, "train__max_steps": 4, "train__epochs": 9,
        "optimizer__lr": 1e-2, **more,
    }  # fmt: skip
