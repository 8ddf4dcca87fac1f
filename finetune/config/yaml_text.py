"""Read YAML strictly, and write it so that it reads back the same. No torch."""

import codecs
import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from finetune import failures, places
from finetune.config import paths
from finetune.errors import ConfigError

MOST_BYTES = 1_000_000  # of a config; PyYAML takes half a minute for as much


class NotText(ValueError):
    """A file that cannot be a config, whatever it holds."""


class _Loader(yaml.SafeLoader):
    """Read numbers as YAML 1.2 does (PyYAML reads 1e-4 as a string), and refuse duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            node = self.anchors.get(event.anchor)
            if node is not None and node.end_mark is None:  # not read to its end: it holds itself
                line, name = event.start_mark.line + 1, event.anchor
                raise yaml.YAMLError(f"line {line}: *{name} refers to itself; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key should be a word; quote {{{{ ... }}}}")
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {line}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quote the strings that _Loader would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


def from_yaml(text: str) -> Any:
    """Read any value. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def dump(value: Any, flow: bool = True) -> str:
    """Write a value: in one line for messages (`flow`), or in lines for a file."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are errors, and 1e-4 is a number. Raises ConfigError."""
    if paths.half_characters(str(path)):
        shown = repr(paths.shown(str(path)))
        what = "holds half a character, or bytes that are not UTF-8; rename it"
        raise ConfigError(f"--config: {shown} {what}")
    try:
        text = _text_of(Path(paths.expanded(str(path))))
    except FileNotFoundError as exc:
        hint = _missing_hint(os.path.expanduser(str(path)))
        raise ConfigError(f"{path}: no such file{hint}") from exc
    except IsADirectoryError as exc:
        why = "it is a folder; name a file in it"
        raise ConfigError(f"{path}: cannot read the config: {why}") from exc
    except (OSError, ValueError) as exc:
        why = getattr(exc, "strerror", None) or str(exc)
        raise ConfigError(f"{path}: cannot read the config: {why}") from exc
    try:
        values = from_yaml(text)
    # Besides YAMLError: a number of 5,000 digits, 1,000 brackets.
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path}: not valid YAML: {failures.parsing_reason(exc)}") from exc
    if not isinstance(values, dict):
        expected = "expected sections such as run: and data:"
        raise ConfigError(f"{path}: {expected}, got {type(values).__name__}")
    return values


def _missing_hint(path: str) -> str:
    """Name the file that may be meant, next to a missing config or in configs/."""
    folder, name = os.path.split(path)
    for place in dict.fromkeys((folder, "configs")):
        if near := places.nearest(place, name):
            return f"; did you mean {paths.shown(near)}?"
    if not folder:
        return f" in {os.getcwd()}"
    return "" if os.path.isdir(folder) else f"; the folder {folder} does not exist"


def _text_of(path: Path) -> str:
    """Return the text of a config; it may be a pipe, as <(...) gives. Raises OSError or NotText."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISDIR(mode)):
        raise NotText("it is a device or a socket; name a file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        limit = f"{MOST_BYTES // 10**6} MB"
        raise NotText(f"it is larger than {limit}, and a config is not; name another file")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NotText("it is UTF-16 (or UTF-32); save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line, byte = content.count(b"\n", 0, exc.start) + 1, f"{content[exc.start]:#04x}"
        raise NotText(f"byte {byte} in line {line} is not UTF-8; save it as UTF-8") from exc
