"""The arrows of docs/architecture.md: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Module (or package, for all in it) -> what it may import of this project. Python's own rule that
# a package's modules see each other is not enough: the order inside data is listed too.
ALLOWED = {
    "finetune.errors": [],
    "finetune.engine.progress": [],
    "finetune.torch_versions": [],
    "finetune.places": [],
    "finetune.console": [],
    "finetune.files": [],
    "finetune.config": ["finetune.config", "finetune.places", "finetune.failures", "finetune.errors"],
    "finetune.data.readers": ["finetune.places", "finetune.files", "finetune.failures", "finetune.errors"],
    "finetune.data.rows": ["finetune.data.readers", "finetune.errors"],
    "finetune.data.templates": ["finetune.data.rows", "finetune.errors"],
    "finetune.data.tokens": [
        "finetune.data.templates", "finetune.data.rows", "finetune.data.readers", "finetune.files", "finetune.failures", "finetune.errors",
    ],
    "finetune.data.packing": [],
    "finetune.data.batches": ["finetune.data.packing", "finetune.data.tokens"],
    "finetune.models": ["finetune.models", "finetune.config", "finetune.torch_versions", "finetune.failures", "finetune.errors"],
    "finetune.models.policy": ["finetune.models.head", "finetune.models.context_parallel", "finetune.data.batches"],
    "finetune.objectives": ["finetune.models.policy", "finetune.data.batches", "finetune.objectives"],
    "finetune.engine": [
        "finetune.data.batches", "finetune.models", "finetune.objectives", "finetune.config", "finetune.engine.progress",
        "finetune.places", "finetune.torch_versions", "finetune.files", "finetune.failures", "finetune.errors", "finetune.engine",
    ],
    "finetune.export": ["finetune.data", "finetune.models", "finetune.config", "finetune.files", "finetune.failures", "finetune.errors"],
    "finetune.preflight": [
        "finetune.data", "finetune.models", "finetune.objectives", "finetune.export", "finetune.engine.topology",
        "finetune.engine.trackers", "finetune.config", "finetune.errors",
    ],
    "finetune.forecast": [
        "finetune.forecast", "finetune.models", "finetune.data.batches", "finetune.engine.optim", "finetune.engine.topology",
        "finetune.config", "finetune.failures", "finetune.errors",
    ],
    "finetune.forecast.command": [
        "finetune.forecast", "finetune.models.parameters", "finetune.engine.topology", "finetune.survival.launcher", "finetune.config",
        "finetune.places", "finetune.errors",
    ],
    "finetune.run": [
        "finetune.preflight", "finetune.forecast", "finetune.models.load", "finetune.models.parameters", "finetune.models.policy", "finetune.objectives", "finetune.engine",
        "finetune.generation.generate",
        "finetune.config", "finetune.places", "finetune.failures", "finetune.errors",
    ],
    "finetune.evaluation": [
        "finetune.data", "finetune.export", "finetune.evaluation", "finetune.config", "finetune.files", "finetune.failures", "finetune.errors",
    ],
    "finetune.chat": ["finetune.data", "finetune.export", "finetune.evaluation", "finetune.config", "finetune.errors"],
    "finetune.curves": ["finetune.config", "finetune.errors"],
    "finetune.failures": ["finetune.errors"],
    "finetune.survival.launcher": ["finetune.survival.launcher", "finetune.engine.rundir", "finetune.places", "finetune.failures", "finetune.errors"],
    "finetune.replay": ["finetune.engine.topology", "finetune.survival.launcher", "finetune.config", "finetune.places", "finetune.files", "finetune.errors"],
    "finetune.__main__": ["finetune.config", "finetune.places", "finetune.failures", "finetune.errors"],
    "data_scripts": ["finetune.data.rows", "finetune.data.templates", "finetune.data.tokens"],
}  # fmt: skip
SHARDING = (
    "deepspeed",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "accelerate",
)
MAY_SHARD = {
    "finetune.engine.topology": SHARDING, "finetune.engine.checkpoint": ("torch.distributed.checkpoint",),
    "finetune.torch_versions": ("torch.distributed.checkpoint",), "finetune.engine.trackers": ("accelerate.tracking",), "finetune.survival.launcher": ("accelerate",),
}  # fmt: skip


def modules():
    for path in sorted([*ROOT.glob("finetune/**/*.py"), *ROOT.glob("data_scripts/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def imports(path: Path) -> set[str]:
    """Everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, packages) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_arrows_point_only_where_the_architecture_says():
    wrong = {}
    for module, path in modules():
        rules = [package for package in ALLOWED if within(module, [package])]
        assert rules or module == "finetune" or not imports(path), (
            f"{module} has no place in the architecture: add it to ALLOWED and to docs/architecture.md"
        )
        allowed = ALLOWED[max(rules, key=len)] if rules else []
        own = {name for name in imports(path) if within(name, ["finetune", "train", "data_scripts"])}
        wrong[module] = {name for name in own if not within(name, allowed)}
    assert not {module: names for module, names in wrong.items() if names}


def test_only_topology_knows_how_processes_share_the_model():
    for module, path in modules():
        used = {name for name in imports(path) if within(name, SHARDING)}
        may = next((names for package, names in MAY_SHARD.items() if within(module, [package])), ())
        assert all(within(name, may) for name in used), (module, used)


def test_nothing_imports_the_script():
    assert not [m for m, path in modules() if within("train", imports(path)) or "train" in imports(path)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["finetune.config", "finetune.engine.progress", "finetune.errors", "train", "finetune.__main__"]
)
def test_importing_it_needs_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.proof
def test_a_run_of_all_weights_does_not_wait_for_adapters():
    """peft brings bitsandbytes, and that PyTorch's compiler: half of a start."""
    code = "import sys, finetune.run, finetune.models.build, finetune.engine.step; sys.exit(bool({'peft', 'bitsandbytes'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
