"""`pip install .` brings everything, and it is found from any folder."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, tracked
from packaging.requirements import Requirement

from finetune import extras
from finetune.errors import ConfigError

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def test_every_package_is_installed():
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("finetune/**/*.py")}
    there = {".".join(folder.parts) for folder in folders}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there | {"finetune.shipped"}


# File of pins -> the extras of `pip install` that name the same packages; "": what every run needs.
FILES = {
    "requirements.txt": ["", "gpu", "tracking", "cloud", "eval", "data"],
    "requirements-cuda.txt": ["flash", "kernels"],
    "requirements-dev.txt": ["dev"],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_pin_lies_in_the_range_that_pip_install_takes(name):
    """`pip install .` must not force one torch on an environment that has another."""
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    given = [Requirement(line) for extra in FILES[name] for line in groups[extra]]
    ranges = {wanted.name: wanted.specifier for wanted in given if wanted.name != "finetune"}
    lines = [line for line in (ROOT / name).read_text().splitlines() if "==" in line]
    pinned = map(Requirement, lines)
    pins = {each.name: str(each.specifier).removeprefix("==") for each in pinned}
    assert ranges.keys() == pins.keys()
    for package, pin in pins.items():
        assert ranges[package].contains(pin), package
        assert not any(each.operator == "==" for each in ranges[package]), package


def test_every_optional_package_has_its_extra():
    extras_of = PROJECT["optional-dependencies"]
    names = [*FILES["requirements.txt"][1:], "math", "harness", "gym"]
    named = {Requirement(line).name: extra for extra in names for line in extras_of[extra]}
    assert named == extras.EXTRA


@pytest.mark.parametrize("package", extras.EXTRA)
def test_a_package_that_is_installed_is_found(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    extras.require(package, "this test")


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("bitsandbytes", {"optimizer__kind": "adamw_8bit"}),
        ("bitsandbytes", {"optimizer__kind": "lion_8bit"}),
        ("bitsandbytes", {"optimizer__kind": "paged_adamw_8bit"}),
        ("wandb", {"tracking__trackers": ["wandb"]}),
        ("trackio", {"tracking__trackers": ["trackio"]}),
    ],
)  # fmt: skip
def test_a_missing_package_is_named_with_its_extra(workshop, monkeypatch, package, settings):
    whole = importlib.util.find_spec

    def without(name, *more):
        return None if name == package else whole(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    advice = rf"pip install 'finetune\[{extras.EXTRA[package]}\]'"
    with pytest.raises(ConfigError, match=f"needs the package {package}; {advice}"):
        workshop.check(**settings)


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.14.1"])
def test_the_tested_versions_of_torch_may_stay(version):
    wanted = map(Requirement, PROJECT["dependencies"])
    [torch] = [each for each in wanted if each.name == "torch"]
    assert torch.specifier.contains(version)
    assert not torch.specifier.contains("2.10.0")


@pytest.mark.slow
def test_an_installed_package_works_from_any_folder(tmp_path):
    for name in tracked():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--no-compile"]
    site, source = str(tmp_path / "site"), str(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "install", *alone, "--target", site, source]
    subprocess.run(pip, check=True, capture_output=True)
    shutil.rmtree(tmp_path / "source")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def output(*words: str) -> str:
        process = subprocess.run(
            words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return process.stdout + process.stderr

    finetune = str(tmp_path / "site/bin/finetune")
    assert "train" in output(finetune, "--help")
    assert "--optimizer.lr" in output(finetune, "train", "--help")
    one = ["--config_file", "accelerate_configs/zero2.yaml", "--num_processes", "1"]
    assert "--optimizer.lr" in output(finetune, "launch", *one, "train.py", "--help")
    find = "from finetune.places import found; print(found('ds_configs/zero2.json'))"
    found = output(sys.executable, "-c", find)
    assert found.strip() == str(tmp_path / "site/finetune/shipped/ds_configs/zero2.json")
