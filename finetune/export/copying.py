"""Export a model as it is, or in shards: opened and compared before it is put in place."""

import argparse
import re
import shutil
from pathlib import Path

from finetune import failures
from finetune.config.base import is_adapter
from finetune.errors import ModelError
from finetune.export.load import load, load_tokenizer
from finetune.export.publish import staged
from finetune.export.save import Base, save
from finetune.export.verify import opened, require_weights

_SIZE = re.compile(r"([1-9]\d*)\s*([KMGT]B)", re.IGNORECASE)


def shard_size(text: str) -> str:
    """Parse the size of a shard, such as 2GB; a type for argparse."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise argparse.ArgumentTypeError(
            f"should be a size such as 500MB or 2GB (1GB is 10^9 bytes), got {text!r}"
        )
    return f"{found[1]}{found[2].upper()}"


def copy(
    source: Path, target: Path, max_shard_size: str | None = None,
    trust_remote_code: bool = False, base: str | None = None,
) -> None:  # fmt: skip
    """Write the model of `source` to `target`, full weights in shards if a size is given.

    Raises ModelError for a shard size with an adapter, ExportError if what was written does not
    open with the same weights; then nothing is left at `target` or next to it.
    """
    if max_shard_size is not None and is_adapter(source):
        raise ModelError(
            f"--max-shard-size: {source} is an adapter, one small file; add --merge, or remove it"
        )
    model = load(source, trust_remote_code=trust_remote_code, base=base)
    weights = {name: each.detach().cpu() for name, each in model.state_dict().items()}
    with staged(target) as folder:
        with failures.writing(target):
            if max_shard_size is None and source.is_dir():
                shutil.copytree(source, folder)
            else:
                origin = Base(str(source), trust_remote_code=trust_remote_code)
                tokenizer = load_tokenizer(source, trust_remote_code)
                save(model, weights, tokenizer, None, folder, None, origin, max_shard_size)
        del model
        reloaded = opened(lambda: load(folder, "auto", trust_remote_code, base=base))
        require_weights(folder, reloaded, weights)
