"""Take a model away: `finetune export`.

finetune export RUN --output FOLDER                    as it is, or with --merge full weights
finetune export RUN --output FOLDER --merge --max-shard-size 2GB --gguf q8_0 --modelfile
finetune export RUN --merge --output FOLDER --push OWNER/NAME
finetune export RUN RUN --weights 0.7 0.3 --output FOLDER
finetune export MERGED --unmerge RUN --output FOLDER
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from finetune.config import paths
from finetune.config.base import is_adapter, model_argument, recorded_base, require_model
from finetune.console import visible
from finetune.errors import ModelError, UserError
from finetune.export import combine, copying, gguf, hub, merge, model_card, ollama
from finetune.export.load import load_tokenizer, require_base

# Of an adapter: less adds nothing but rounding, and more than one over it leaves nothing else.
LEAST_WEIGHT = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    merge.add_arguments(parser, needs_output=False)
    add = parser.add_argument
    add("--merge", action="store_true", help="merge adapters into their base")
    what = "largest file of full weights, such as 2GB (10^9 bytes each)"
    add("--max-shard-size", type=copying.shard_size, default=None, metavar="SIZE", help=what)
    what = "also write model.gguf by llama.cpp's converter, in this type"
    add("--gguf", choices=gguf.TYPES, default=None, help=what)
    what = "folder of llama.cpp, if its converter is not on PATH"
    add("--llama-cpp", type=paths.argument, default=None, metavar="FOLDER", help=what)
    add("--modelfile", action="store_true", help="also write a Modelfile for Ollama")
    what = "combine adapters into one, each with its weight"
    add("--weights", type=_weight, nargs="+", default=None, metavar="W", help=what)
    what = "take this adapter out of a model that it was merged into: the base again"
    add("--unmerge", type=model_argument, default=None, metavar="RUN", help=what)
    what = "upload to the Hub with a model card, into a private repository"
    add("--push", default=None, metavar="OWNER/NAME", help=what)
    add("--public", action="store_true", help="with --push: a public repository")
    what = "with --push: results.json for the card (default: RUN/evaluation/results.json)"
    add("--results", type=paths.argument, default=None, metavar="FILE", help=what)


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST_WEIGHT <= abs(value) <= 1 / LEAST_WEIGHT:
        raise argparse.ArgumentTypeError(
            f"should be a number from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}, or one below 0 of "
            f"that size, got {text!r}"
        )
    return value


def main(arguments: argparse.Namespace) -> None:
    """Check everything that can be checked first, then write, convert and push."""
    sources = _checked(arguments)
    program = gguf.converter(arguments.llama_cpp) if arguments.gguf else None
    results = _results(arguments, sources[0]) if arguments.push else None
    folder = _written(arguments, sources)
    if program is not None:
        _log(f"converting {folder} to GGUF")
        print(f"{gguf.convert(program, folder, arguments.gguf)}: written")
    if arguments.modelfile:
        tokenizer = load_tokenizer(folder, arguments.trust_remote_code)
        weights = "./model.gguf" if program is not None else "."
        ollama.write(folder, tokenizer, weights, _ends(folder, tokenizer), _log)
        print(f"{folder / ollama.FILE}: written; ollama create NAME -f {folder / ollama.FILE}")
    if arguments.push:
        run = model_card.run_of(sources[0])
        merged = sources if arguments.merge else []
        card = model_card.card(folder, arguments.push, run, results, merged)
        print(f"pushed to {hub.push(folder, arguments.push, card, arguments.public, _log)}")


def _checked(arguments: argparse.Namespace) -> list[Path]:
    """Return the models. Raise UserError for what is missing or would be ignored."""
    if not arguments.model:
        raise ModelError("name a model, such as runs/my_run")
    for name in arguments.model:
        require_model(name, "--model")
    require_base(arguments.base)
    kinds = [name for name in ("merge", "weights", "unmerge") if getattr(arguments, name)]
    if len(kinds) > 1:
        raise UserError(f"--{kinds[0]} and --{kinds[1]}: two exports; run one after the other")
    if len(arguments.model) > 1 and not kinds:
        raise UserError("several adapters need --merge, or --weights to combine them into one")
    if arguments.output is None and (not arguments.push or kinds or arguments.gguf):
        raise UserError("--output: name a folder to write; only --push of a model does without")
    _require_used(arguments)
    if arguments.push:
        hub.require_name(arguments.push)
        _require_open_base(arguments)
    return list(map(Path, arguments.model))


def _require_used(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that would be ignored."""
    whole = arguments.merge or not is_adapter(arguments.model[0])
    needs = {
        "dtype": (arguments.dtype != "auto", arguments.merge, "--merge"),
        "max-shard-size": (
            arguments.max_shard_size,
            whole and not arguments.weights and not arguments.unmerge,
            "full weights: add --merge",
        ),
        "gguf": (arguments.gguf, whole, "full weights: add --merge"),
        "modelfile": (arguments.modelfile, whole, "full weights: add --merge"),
        "llama-cpp": (arguments.llama_cpp, arguments.gguf, "--gguf"),
        "public": (arguments.public, arguments.push, "--push"),
        "results": (arguments.results, arguments.push, "--push"),
    }
    for name, (is_given, is_used, with_what) in needs.items():
        if is_given and not is_used:
            raise UserError(f"--{name} is only for {with_what}; or remove it")
    if arguments.modelfile and arguments.output is None:
        raise UserError("--modelfile: needs --output, the folder to write it into")


def _require_open_base(arguments: argparse.Namespace) -> None:
    """Raise UserError for an adapter on a base that only this machine can open."""
    first = arguments.model[0]
    base = recorded_base(first) if is_adapter(first) and not arguments.merge else ""
    if base and Path(base).exists():
        raise UserError(
            f"--push: {first} is an adapter on {base}, a folder of this machine that others cannot "
            "open; add --merge to push full weights, or push the base first and train on it"
        )


def _results(arguments: argparse.Namespace, source: Path) -> Path | None:
    """Return the results for the card, read once to find what is wrong before any upload."""
    run = model_card.run_of(source)
    default = run / model_card.RESULTS if run else None
    found = Path(arguments.results) if arguments.results else default
    if not arguments.results and (found is None or not found.is_file()):
        _log("note: no results.json, so the card has no scores; finetune evaluate RUN writes them")
        return None
    assert found is not None
    model_card.read_results(found)
    return found


def _written(arguments: argparse.Namespace, sources: list[Path]) -> Path:
    """Write what --output asks for and return the folder of the model."""
    given: tuple[Any, ...] = (arguments.trust_remote_code, arguments.base)
    if arguments.merge:
        merge.main(arguments, arguments.max_shard_size)
        return Path(arguments.output)
    if arguments.output is None:
        return sources[0]
    target = Path(arguments.output)
    if arguments.weights:
        difference = combine.combine(sources, arguments.weights, target, *given)
        what = f"one adapter of {len(sources)}; it changes weights as their weighted sum, but for"
        print(f"{target}: {what} {difference:.2g} of the largest change")
    elif arguments.unmerge:
        difference = combine.unmerge(sources[0], Path(arguments.unmerge), target, *given)
        what = "the base again; weights differ from it by at most"
        print(f"{target}: {what} {difference:.2g} of the largest one")
    else:
        merge.require_output(sources, target)
        copying.copy(sources[0], target, arguments.max_shard_size, *given)
        print(f"{target}: written, opened and compared")
    return target


def _ends(folder: Path, tokenizer: Any) -> list[str]:
    """Return the texts of the tokens that end an answer."""
    if not (folder / "generation_config.json").exists():
        return [tokenizer.eos_token] if tokenizer.eos_token else []
    given = GenerationConfig.from_pretrained(folder).eos_token_id
    ids = given if isinstance(given, list) else [given]
    return [str(tokenizer.convert_ids_to_tokens(each)) for each in ids if each is not None]


def _log(text: str) -> None:
    print(visible(text), file=sys.stderr)
