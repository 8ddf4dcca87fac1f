"""The run config: typed, strict and documented. YAML file + command line -> one Config. No torch.

Every field has its default in `fields` and nowhere else, and the line of text under it is at once
its documentation, its `--help` and its description in the JSON schema.
"""

from finetune.config import base, paths
from finetune.config.fields import (
    PADDED_ATTENTION,
    Adapter,
    Config,
    Data,
    Model,
    Optimizer,
    Schedule,
    accumulation_steps,
    usual_lr,
)
from finetune.config.reader import (
    PUT_BACK,
    differences,
    flatten,
    from_dict,
    from_yaml,
    json_schema,
    note_repeats,
    parse,
    read_resolved,
    read_yaml,
    to_yaml,
)
from finetune.config.rules import conflicts

__all__ = [
    "PADDED_ATTENTION", "PUT_BACK", "Adapter", "Config", "Data", "Model", "Optimizer", "Schedule", "accumulation_steps", "base", "conflicts",
    "differences", "flatten", "from_dict", "from_yaml", "json_schema", "note_repeats", "parse", "paths", "read_resolved", "read_yaml", "to_yaml", "usual_lr",
]  # fmt: skip
