"""The cases of `make gpu PART=objectives`: what learns from pairs, teachers and rewards.

Needs no torch. Runs of one topology share a process, as most of a small run is its start.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from on_gpu import matrix
from on_gpu.matrix import BF16, FP32, HALF, LAYOUT, LORA, QLORA, Case, Tolerance

# Adam with this epsilon moves a weight in proportion to its gradient: with the usual one it divides
# small gradients by themselves, so that their roundings become steps, and a completion differs at
# the first token whose number lies between two almost equal sums.
BASE = {
    "data.eval_fraction": 0.15, "data.max_length": 256, "optimizer.lr": 1e-2, "optimizer.eps": 1e-2,
    "train.precision": "fp32", "train.epochs": 99, "train.global_batch_size": 8,
    "train.micro_batch_size": 4, "train.max_steps": 4, "evaluation.every_steps": 4,
    "checkpoint.every_steps": 2,
}  # fmt: skip
STEPS = 4
# Two phases of two steps: in the first step of each the policy is the one that has sampled.
ROLLOUTS = {
    "group_size": 4, "max_new_tokens": 16, "shard_size": 2, "steps_per_phase": 2,
    "cut_answers": "learn",
}  # fmt: skip
WORDS = {"kind": "score", "score": "words"}
SAMPLED = {"objective.rollouts": ROLLOUTS, "objective.rewards": [WORDS]}
GRPO = SAMPLED | {"objective.kind": "grpo", "objective.beta": 0.05}
PPO = SAMPLED | {"objective.kind": "ppo", "objective.rollouts": ROLLOUTS | {"group_size": 1}}
TEACHER, TAUGHT, REWARD_MODEL = "TEACHER", "TAUGHT", "REWARD_MODEL"
"""Stand for folders and files that `objectives.make` knows."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "dpo": {"objective.kind": "dpo", "data.packing": True, "objective.sft_weight": 0.5},
    "ppo": PPO,
    "distill": {"objective.kind": "distill", "objective.teacher": TEACHER, "objective.beta": 0.5},
    "reward": {"objective.kind": "reward"},
    "kto": {"objective.kind": "kto", "data.packing": True},
    **{name: {"objective.kind": name} for name in ("orpo", "simpo", "cpo")},
    "taught": {"objective.kind": "distill", "data.train": TAUGHT},
    "process_reward": {"objective.kind": "process_reward"},
    "rloo": SAMPLED | {"objective.kind": "rloo"},
    "gspo": GRPO | {"objective.loss": "gspo", "objective.kl": "in_reward"},
    "on-policy": {
        "objective.kind": "distill", "objective.teacher": TEACHER, "objective.beta": 1.0,
        "objective.rollouts": ROLLOUTS | {"group_size": 1}, "objective.rewards": [WORDS],
    },
    "rewarded-by-model": GRPO | {
        "objective.rewards": [{"kind": "reward_model", "model": REWARD_MODEL}],
    },
}  # fmt: skip
ROWS = {
    **dict.fromkeys(("dpo", "orpo", "simpo", "cpo", "reward"), "pairs"), "kto": "judged",
    "process_reward": "steps",
    "distill": "questions",
}  # fmt: skip
HALVES = {"bf16": {"train.precision": "bf16"}, "fp16": {"train.precision": "fp16"}}

SAME = Tolerance(
    1e-3, 2e-2, "float32 by other kernels; with a large epsilon roundings do not grow into steps"
)
FACTS = Tolerance(
    0.0, 0.0, "other completions: only the facts of a run by itself"
)  # what is sampled in 16 bits differs from what is sampled in 32

# What must hold of a run that samples, by itself. The gap is between the log-probabilities of the
# sampler, which keeps keys and values of padded batches, and those of the update, nats a token.
# float32: 5e-6 at most was seen on a CPU. 16 bits: 0.2 at most was seen, 0.01 on average.
GAPS = {"fp32": (1e-4, 1e-3), "bf16": (0.03, 0.5), "fp16": (0.01, 0.2)}
# The policy is the one before the first step, and so is what it is compared with: the divergence of
# the first step is 0. In 16 bits other kernels may round each of its two log-probabilities.
FIRST_KL = {"fp32": 1e-6, "bf16": 1e-3, "fp16": 1e-3}


@dataclass(frozen=True)
class ObjectiveCase(Case):
    """A run. `settings`: on top of BASE. `rows`: a kind of helper.make_rows."""

    rows: str = "questions"
    process: str = "single"
    """Runs of one name share a process."""

    @property
    def samples(self) -> bool:
        return bool(self.settings.get("objective.rollouts"))

    @property
    def precision(self) -> str:
        return str({**BASE, **self.settings}["train.precision"])


def cases() -> list[ObjectiveCase]:
    """Return all, the most telling of each process first."""
    found = [*_on_cpu(), *_single(), *_half(), *_resumed(), *_shared()]
    return [replace(each, needs=each.needs | _needs(each)) for each in found]


def _needs(case: ObjectiveCase) -> frozenset[str]:
    found = matrix.needs(case.settings)
    if (case.topology or "").startswith("zero"):
        found.add("deepspeed")
    return frozenset(found)


def _case(name: str, objective: str, more: dict[str, Any], **fields: Any) -> ObjectiveCase:
    own = OBJECTIVES[objective]
    rows = ROWS.get(own["objective.kind"], "prompts")
    if "objective.rollouts" in own:
        rows = "prompts"
    return ObjectiveCase(name, FP32 | own | more, rows=rows, **fields)


METHODS = {"full": {}, "lora": LORA, "qlora": QLORA}
# Of each objective: the methods beside the CPU. With all weights the reference of grpo is a second
# model, with adapters it is the base without them.
BESIDE_CPU = (
    ("grpo", "lora"), ("grpo", "full"), ("dpo", "full"), ("ppo", "full"), ("distill", "full"),
    ("reward", "full"), ("kto", "lora"), ("taught", "lora"), ("rewarded-by-model", "lora"),
    ("process_reward", "full"),
)  # fmt: skip
MORE = (
    ("gspo", "lora"), ("rloo", "lora"), ("on-policy", "full"), ("ppo", "lora"), ("dpo", "lora"),
    ("reward", "lora"), ("orpo", "full"), ("simpo", "lora"), ("cpo", "full"),
)  # fmt: skip


def _on_cpu() -> Iterable[ObjectiveCase]:
    for process, pairs in (("cpu", BESIDE_CPU), ("cpu-more", MORE)):
        for objective, method in pairs:
            name = f"cpu-{objective}-{method}"
            yield _case(name, objective, METHODS[method], on_cpu=True, process=process)


def _single() -> Iterable[ObjectiveCase]:
    for process, pairs in (("single", BESIDE_CPU), ("more", MORE)):
        for objective, method in pairs:
            name, more = f"{objective}-{method}", METHODS[method]
            beside = f"cpu-{name}"
            yield _case(name, objective, more, beside=beside, within=SAME, process=process)


def _half() -> Iterable[ObjectiveCase]:
    """16 bits: what is sampled by its facts, all else beside float32."""
    made = (
        ("bf16", "grpo", "lora"), ("bf16", "grpo", "qlora"), ("bf16", "dpo", "full"),
        ("bf16", "grpo", "full"), ("bf16", "ppo", "full"), ("bf16", "distill", "full"),
        ("fp16", "grpo", "lora"), ("bf16", "reward", "full"), ("bf16", "kto", "lora"),
        ("fp16", "dpo", "lora"), ("bf16", "taught", "lora"), ("bf16", "on-policy", "full"),
    )  # fmt: skip
    for half, objective, method in made:
        more = METHODS[method] | HALVES[half]
        beside = None if "objective.rollouts" in OBJECTIVES[objective] else f"{objective}-{method}"
        within = None if beside is None else HALF if half == "fp16" else LAYOUT
        name = f"{half}-{objective}-{method}"
        yield _case(name, objective, more, beside=beside, within=within, process="half")
    weights = HALVES["bf16"] | {"model.dtype": "bfloat16"}
    yield _case("bf16-weights-grpo-full", "grpo", weights, process="half")
    compiled = HALVES["bf16"] | {"train.compile": True}
    yield _case("compiled-grpo-full", "grpo", compiled, process="compiled")


def _resumed() -> Iterable[ObjectiveCase]:
    """Interrupted while a phase is sampled, or between steps; then the same command again."""
    within = matrix.resumed()
    for objective, method in (("grpo", "lora"), ("dpo", "full"), ("ppo", "full")):
        name = f"{objective}-{method}"
        yield _case(
            f"resumed-{name}", objective, METHODS[method], beside=name, within=within,
            is_interrupted=True, process="resumed",
        )  # fmt: skip
    half = LORA | HALVES["bf16"]
    yield _case(
        "resumed-bf16-grpo-lora", "grpo", half, is_interrupted=True, process="resumed",
        beside="bf16-grpo-lora", within=BF16,
    )  # fmt: skip


def _shared() -> Iterable[ObjectiveCase]:
    shared = {
        "fsdp2": ("grpo-full", "dpo-full", "distill-full", "grpo-lora", "reward-full", "ppo-full"),
        "zero3": ("grpo-full", "dpo-full", "distill-full", "ppo-full", "reward-full"),
        "zero2": ("grpo-lora", "dpo-full", "grpo-full"),
    }  # fmt: skip
    for topology, names in shared.items():
        for name in names:
            objective, method = name.rsplit("-", 1)
            yield _case(
                f"{topology}-{name}", objective, METHODS[method], topology=topology, beside=name,
                within=SAME, process=topology,
            )  # fmt: skip
        for name in ("grpo-full", "grpo-qlora"):
            objective, method = name.rsplit("-", 1)
            more = METHODS[method] | HALVES["bf16"]
            if topology != "zero2":
                yield _case(
                    f"{topology}-bf16-{name}", objective, more, topology=topology, process=topology
                )
