"""The model card of an export: what it is, how it scores, what it was trained on, and how."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import files, page
from finetune.config import from_yaml
from finetune.config.base import is_adapter, recorded_base
from finetune.errors import DataError

FILE = "README.md"
RESULTS = Path("evaluation", "results.json")  # of a run directory
SETTINGS = ("objective", "adapter", "optimizer", "train")
LIBRARIES = ("python", "torch", "transformers", "accelerate", "peft")
LABEL_OF_INTERVAL = "95% interval"


def run_of(model: Path) -> Path | None:
    """Return the run directory that a model folder lies in, or that merge wrote it into."""
    for folder in (model.parent, model):
        if (folder / "config.yaml").is_file() and (folder / "receipt.json").is_file():
            return folder
    return None


def card(
    model: Path, name: str, run: Path | None = None, results: Path | None = None,
    merged: Sequence[Path] = (),
) -> str:  # fmt: skip
    """Return the card of a model folder, as Markdown with the metadata that the Hub reads.

    name: OWNER/NAME. run: the run directory, for data, settings and receipt. results: results.json
    of an evaluation. merged: adapters that it has been merged from. Raises DataError for results
    that cannot be read.
    """
    settings = _settings(run)
    base = recorded_base(model) or str((settings.get("model") or {}).get("path") or "")
    kind = "an adapter" if is_adapter(model) else "full weights"
    found = None if results is None else read_results(results)
    lines = [*_metadata(model, base), f"# {name.split('/')[-1]}", ""]
    where = f" of {_base(base)}" if base else ""
    lines += [f"A fine-tuned model{where}: {kind}{', merged' if merged else ''}.", ""]
    lines += _use(model, name)
    if found is not None:
        lines += _scores(found)
    if run is not None:
        receipt, _ = files.read_note(run / "receipt.json")
        lines += _data(receipt, found)
        lines += _training(settings)
        lines += _receipt(receipt)
    return "\n".join(lines).rstrip() + "\n"


def _settings(run: Path | None) -> Mapping[str, Any]:
    if run is None:
        return {}
    found = from_yaml((run / "config.yaml").read_text())
    return found if isinstance(found, dict) else {}


def read_results(path: Path) -> dict[str, Any]:
    """Return results.json of an evaluation. Raises DataError for anything else."""
    found, problem = files.read_note(path)
    if problem or not isinstance(found.get("scores"), list):
        what = problem or "has no scores; is it the results.json of an evaluation?"
        raise DataError(f"--results: {path} {what}")
    return found


def _base(base: str) -> str:
    """Return a base as a link, or the last part of the path of a folder."""
    if os.path.isabs(base) or os.path.exists(base):
        return f"`{Path(base).name}`, a folder on the machine that trained it"
    return f"[{base}](https://huggingface.co/{base})"


def _metadata(model: Path, base: str) -> list[str]:
    library = "peft" if is_adapter(model) else "transformers"
    lines = ["---", f"library_name: {library}", "tags: [finetune]"]
    architecture = _architecture(model)
    if _scores_answers(model):
        lines.append("pipeline_tag: text-classification")
    elif is_adapter(model) or architecture.endswith(("ForCausalLM", "LMHeadModel")):
        lines.append("pipeline_tag: text-generation")
    if base and not os.path.isabs(base) and not os.path.exists(base):
        lines.append(f"base_model: {json.dumps(base)}")
    return [*lines, "---", ""]


def _architecture(model: Path) -> str:
    config, _ = files.read_note(model / "config.json")
    return str((config.get("architectures") or [""])[0])


def _scores_answers(model: Path) -> bool:
    """Return whether a model is one for sequence classification, as reward models are."""
    adapter, _ = files.read_note(model / "adapter_config.json")
    is_one = _architecture(model).endswith("ForSequenceClassification")
    return is_one or adapter.get("task_type") == "SEQ_CLS"


def _use(model: Path, name: str) -> list[str]:
    task = "SequenceClassification" if _scores_answers(model) else "CausalLM"
    opened = f"AutoModelFor{task}"
    start = f"from transformers import {opened}, AutoTokenizer"
    if is_adapter(model):
        opened = f"AutoPeftModelFor{task}"
        start = f"from peft import {opened}\nfrom transformers import AutoTokenizer"
    more = ", num_labels=1" if is_adapter(model) and task != "CausalLM" else ""
    return [
        "## Use", "", "```python", start, "", f"model = {opened}.from_pretrained({name!r}{more})",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})", "```", "",
    ]  # fmt: skip


def _scores(found: Mapping[str, Any]) -> list[str]:
    """Return the numbers of results.json, rounded as everywhere, never computed anew."""
    names = list(found.get("models") or {})
    base, tuned = found.get("base"), found.get("tuned")
    lines = ["## Evaluation", ""]
    sentence = (found.get("verdict") or {}).get("sentence")
    lines += [page.plain(str(sentence)), ""] if sentence else []
    rows = []
    for score in [*found["scores"], *found.get("corpus_scores", []), *found.get("benchmarks", [])]:
        percent = bool(score.get("is_share"))
        means = [_mean(score["means"].get(name), percent) for name in names]
        change = (score.get("changes") or {}).get(tuned)
        rows.append([score["name"], *means, _mean(change, percent, signed=True)])
    lines += _table(["score", *names, f"{tuned} - {base}"], rows)
    return [*lines, f"In brackets: {LABEL_OF_INTERVAL}.", ""]


def _mean(found: Mapping[str, Any] | None, percent: bool, signed: bool = False) -> str:
    if not found:
        return "not measured"
    values = [found["mean"], found.get("low"), found.get("high")]
    sign = "+" if signed else ""
    mean, low, high = (
        None if value is None else (f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.4g}")
        for value in values
    )
    unit = "%" * (percent and not signed)
    within = f" ({low} to {high})" if low is not None and high is not None else ""
    return f"{mean}{unit}{within}"


def _data(receipt: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Data", ""]
    for title, name in (("training", "train_data"), ("evaluation", "eval_data")):
        if data := receipt.get(name):
            sources = ", ".join(f"`{Path(str(each)).name}`" for each in data.get("sources") or [])
            counts = ", ".join(
                f"{data[each]:,} {each}"
                for each in ("rows", "tokens", "truncated", "dropped")
                if isinstance(data.get(each), int)
            )
            lines.append(f"- {title}: {sources}: {counts}; fingerprint `{data['fingerprint']}`")
    data_card = ((found or {}).get("run") or {}).get("data_card")
    lines += ["", page.plain(str(data_card))] if data_card else []
    return [*lines, ""]


def _training(settings: Mapping[str, Any]) -> list[str]:
    rows = [[name, value] for name, value in _flat(settings)]
    return ["## Training", "", *_table(["setting", "value"], rows)]


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for section in SETTINGS:
        for name, value in (settings.get(section) or {}).items():
            if value not in (None, [], {}, False) and not str(value).startswith("/"):
                yield f"{section}.{name}", str(value)


def _receipt(receipt: Mapping[str, Any]) -> list[str]:
    versions, machine = receipt.get("versions") or {}, receipt.get("machine") or {}
    code, gpus = receipt.get("code") or {}, machine.get("gpus") or []
    rows: list[list[object]] = [
        ["seed", receipt.get("seed")],
        ["steps", receipt.get("num_steps")],
        ["topology", f"{receipt.get('topology')}, {receipt.get('num_processes')} processes"],
        ["precision", receipt.get("precision")],
        ["hardware", ", ".join(map(str, gpus)) or f"{machine.get('cpus')} CPUs"],
        [
            "versions",
            ", ".join(f"{each} {versions[each]}" for each in LIBRARIES if each in versions),
        ],
        ["code", code.get("git_revision") or code.get("sha256")],
    ]
    return ["## Receipt", "", *_table(["", ""], rows)]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [_row(head), _row(["---"] * len(head)), *map(_row, rows)]
    return [*lines, ""]


def _row(cells: Sequence[object]) -> str:
    shown = (page.plain(" ".join(str(cell).split())).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(shown)} |"
