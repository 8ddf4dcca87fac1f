"""The run config: typed, strict and documented. YAML file + command line -> one Config. No torch.

Every field has its default in `fields` or `objective_fields` and nowhere else. The text under it is
its documentation, its `--help` and its description in the JSON schema.
"""

from finetune.config import base, paths
from finetune.config.command_line import Check, note_repeats, parse
from finetune.config.fields import (
    PADDED_ATTENTION,
    Adapter,
    Config,
    Data,
    Full,
    Lora,
    Model,
    Optimizer,
    QLora,
    Quantized,
    Schedule,
    accumulation_steps,
    usual_lr,
)
from finetune.config.objective_fields import (
    Cpo,
    CrossEntropy,
    Distill,
    Dpo,
    Kto,
    MaskedLm,
    Orpo,
    ProcessReward,
    Reward,
    Seq2Seq,
    SequenceClassification,
    Simpo,
    SpanCorruption,
    TextInfilling,
    TokenClassification,
)
from finetune.config.own import OwnObjective, code_identity, own_codes
from finetune.config.reader import (
    PUT_BACK,
    differences,
    flatten,
    from_dict,
    json_schema,
    own_names,
    read_resolved,
    to_yaml,
)
from finetune.config.rules import conflicts
from finetune.config.yaml_text import from_yaml, read_yaml

__all__ = [
    "PADDED_ATTENTION", "PUT_BACK", "Adapter", "Check", "Config", "Cpo",
    "CrossEntropy", "Data", "Distill",
    "Dpo", "Full", "Kto", "Lora", "MaskedLm", "Model", "Optimizer", "Orpo",
    "OwnObjective", "ProcessReward", "QLora", "Quantized", "Reward", "Schedule", "Seq2Seq",
    "SequenceClassification", "Simpo",
    "SpanCorruption", "TextInfilling", "TokenClassification",
    "accumulation_steps", "base", "code_identity", "conflicts", "differences", "flatten",
    "from_dict", "from_yaml", "json_schema", "note_repeats", "own_codes", "own_names", "parse",
    "paths", "read_resolved", "read_yaml", "to_yaml", "usual_lr",
]  # fmt: skip
