"""The arrows of docs/architecture.md: who may import whom."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SHARDING = (
    "deepspeed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "accelerate",
)
MAY_SHARD = {
    "finetune.engine.topology": SHARDING,
    "finetune.engine.checkpoint": ("torch.distributed.checkpoint",),
    "finetune.torch_versions": ("torch.distributed.checkpoint",),
    "finetune.unpickling": ("torch.distributed.checkpoint",),
    "finetune.engine.trackers": ("accelerate.tracking",),
    "finetune.survival.launcher": ("accelerate",),
}  # fmt: skip


@functools.cache
def modules() -> list[tuple[str, Path]]:
    paths = [ROOT / "train.py", *ROOT.glob("finetune/**/*.py"), *ROOT.glob("data_scripts/*.py")]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths))
    return [(name.removesuffix(".__init__"), path) for name, path in zip(names, sorted(paths))]


@functools.cache
def imports(path: Path, for_types: bool = True) -> set[str]:
    """Everything a file imports, wherever in it."""
    found = set()
    tree = ast.parse(path.read_text())
    if not for_types:
        tree.body = [node for node in tree.body if not _is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def arrows() -> dict[str, list[str]]:
    """Module or package -> what it may import, as docs/architecture.md lists them."""
    [listed] = re.findall(
        r"```\n(train +->.*?)```", (ROOT / "docs/architecture.md").read_text(), re.DOTALL
    )
    lines = [line.split("->") for line in listed.splitlines()]
    return {
        importer.strip(): [name.strip() for name in imported.split(",")]
        for importer, imported in lines
    }


ALLOWED = arrows()


def within(name: str, packages) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_arrows_point_only_where_the_architecture_says():
    for module, path in modules():
        own = {
            name for name in imports(path) if within(name, ["finetune", "train", "data_scripts"])
        }
        short = module.removeprefix("finetune.")
        rules = [package for package in ALLOWED if within(short, [package])]
        allowed = ALLOWED[max(rules, key=len)] if rules else []
        wrong = {name for name in own if not within(name.removeprefix("finetune."), allowed)}
        assert not wrong, f"{module}: change it, or docs/architecture.md"


def test_every_arrow_is_used():
    used = {
        (module.removeprefix("finetune."), name.removeprefix("finetune."))
        for module, path in modules()
        for name in imports(path)
    }
    for importer, imported in ALLOWED.items():
        for name in imported:
            assert any(within(a, [importer]) and within(b, [name]) for a, b in used), (
                f"{importer} -> {name}"
            )


def test_no_files_import_each_other_in_a_circle():
    """At whatever depth; imports for type checkers alone do not run."""
    names = {module for module, _ in modules()}
    graph = {module: set() for module in names}
    for module, path in modules():
        for name in imports(path, for_types=False):
            found = name if name in names else name.rpartition(".")[0]
            if found in names - {module}:
                graph[module].add(found)
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, "these import each other, or those that do"


def test_only_topology_knows_how_processes_share_the_model():
    for module, path in modules():
        used = {name for name in imports(path) if within(name, SHARDING)}
        may = next((names for package, names in MAY_SHARD.items() if within(module, [package])), ())
        assert all(within(name, may) for name in used), (module, used)


def test_nothing_imports_the_script():
    assert not [
        m for m, path in modules() if within("train", imports(path)) or "train" in imports(path)
    ]


@pytest.mark.slow
def test_importing_these_needs_no_torch():
    modules = "finetune.config finetune.engine.progress finetune.errors train finetune.__main__"
    code = (
        "import importlib, sys\n"
        f"for name in {modules.split()}:\n"
        "    importlib.import_module(name)\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.proof
def test_full_training_does_not_import_peft():
    """peft brings bitsandbytes, and that PyTorch's compiler: half of a start."""
    code = "import sys, finetune.loop; sys.exit(bool({'peft', 'bitsandbytes'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
