"""What machines read of a set of rows: the Hub's front matter, and Croissant's JSON-LD.

Croissant 1.0: https://docs.mlcommons.org/croissant/docs/croissant-spec.html
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import files
from finetune.config.yaml_text import dump
from finetune.data import readers

# The Hub's classes of sizes, by the number of rows below which they end.
SIZES = {
    1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M", 100_000_000: "10M<n<100M", 1_000_000_000: "100M<n<1B",
}  # fmt: skip
ENCODINGS = {
    ".jsonl": "application/jsonlines", ".json": "application/json", ".csv": "text/csv",
    ".tsv": "text/tab-separated-values", ".parquet": "application/x-parquet", ".txt": "text/plain",
}  # fmt: skip
DATA_TYPES = {
    "str": "sc:Text", "int": "sc:Integer", "float": "sc:Float", "bool": "sc:Boolean",
    "date": "sc:Date", "datetime": "sc:Date",
}  # fmt: skip
_TYPED = {"@type": "@vocab"}
CONTEXT: dict[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "cr": "http://mlcommons.org/croissant/",
    "dct": "http://purl.org/dc/terms/", "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/", "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", **_TYPED},
    **{
        name: f"cr:{name}"
        for name in (
            "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format "
            "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex "
            "repeated replace samplingRate separator source subField transform"
        ).split()
    },
}  # fmt: skip


@dataclass(frozen=True)
class Described:
    """What the user and the rows say of a set."""

    name: str
    num_rows: int
    licence: str | None
    source: str | None
    languages: Sequence[str]
    sources: Sequence[str]
    kinds: Mapping[str, set[str]]
    """Column -> the types of its values."""


def front_matter(about: Described) -> str:
    """Return the YAML block that begins a card on the Hub."""
    size = next((name for most, name in SIZES.items() if about.num_rows < most), "n>1B")
    values: dict[str, Any] = {"pretty_name": about.name}
    if about.licence:
        values["license"] = about.licence
    if about.languages:
        values["language"] = list(about.languages)
    values |= {"task_categories": ["text-generation"], "size_categories": [size]}
    names = [os.path.basename(source) for source in about.sources if os.path.isfile(source)]
    if names:
        files_of = [{"split": "train", "path": names}]
        values["configs"] = [{"config_name": "default", "data_files": files_of}]
    return f"---\n{dump(values, flow=False)}---\n\n"


def croissant(about: Described) -> str:
    """Return the description as JSON-LD."""
    found = [source for source in about.sources if os.path.isfile(source)]
    names = [os.path.basename(source) for source in found]
    objects = [  # files of one name in several folders get numbers
        _file_object(source, name if names.count(name) == 1 else f"{number}-{name}")
        for number, (source, name) in enumerate(zip(found, names), 1)
    ]
    values: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": about.name,
        "description": f"{about.num_rows:,} rows to train a language model on",
    }
    if about.licence:
        values["license"] = about.licence
    if about.source:
        values["url" if "://" in about.source else "creditText"] = about.source
    if about.languages:
        values["inLanguage"] = list(about.languages)
    values["distribution"] = objects
    values["recordSet"] = [_record_set(each, about.kinds) for each in objects]
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _file_object(source: str, name: str) -> dict[str, Any]:
    ending = readers.type_of(source)
    return {
        "@type": "cr:FileObject",
        "@id": _id(name),
        "name": name,
        "contentUrl": os.path.basename(source),
        "contentSize": f"{os.path.getsize(source)} B",
        "encodingFormat": ENCODINGS.get(ending, "application/octet-stream"),
        "sha256": files.sha256(Path(source)),
    }


def _id(name: str) -> str:
    """Return a name as part of an identifier, which spaces and slashes would end."""
    return re.sub(r"[^\w.-]", "_", name)


def _record_set(about: dict[str, Any], kinds: Mapping[str, set[str]]) -> dict[str, Any]:
    """Describe the columns of a file: text where a column holds several types, or lists."""
    name = about["@id"]
    by_path = about["encodingFormat"] == "application/json"
    fields = []
    for column, found in sorted(kinds.items()):
        types = {DATA_TYPES.get(kind, "sc:Text") for kind in found - {"NoneType"}}
        extract = {"jsonPath": f"$[*].{column}"} if by_path else {"column": column}
        fields.append({
            "@type": "cr:Field", "@id": f"{name}/{_id(column)}", "name": column,
            "dataType": types.pop() if len(types) == 1 else "sc:Text",
            "source": {"fileObject": {"@id": name}, "extract": extract},
        })  # fmt: skip
    return {"@type": "cr:RecordSet", "@id": f"rows-of-{name}", "name": f"rows-of-{name}",
            "field": fields}  # fmt: skip
