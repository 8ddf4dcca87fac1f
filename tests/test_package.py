"""`pip install .` brings everything, and it is found from any folder."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT, tracked


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("finetune/**/*.py")}
    assert set(listed) == there | {"finetune.shipped"}


@pytest.mark.slow
def test_an_installed_package_works_from_any_folder(tmp_path):
    for name in tracked():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run(
        [*pip, "--target", str(tmp_path / "site"), str(tmp_path / "source")], check=True, capture_output=True
    )
    shutil.rmtree(tmp_path / "source")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def said(*words: str) -> str:
        process = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
        return process.stdout + process.stderr

    finetune = str(tmp_path / "site/bin/finetune")
    assert "train" in said(finetune, "--help")
    assert "--optimizer.lr" in said(finetune, "train", "--help")
    launched = said(
        finetune,
        "launch",
        "--config_file",
        "accelerate_configs/zero2.yaml",
        "--num_processes",
        "1",
        "train.py",
        "--help",
    )
    assert "--optimizer.lr" in launched
    found = said(sys.executable, "-c", "from finetune.places import found; print(found('ds_configs/zero2.json'))")
    assert found.strip() == str(tmp_path / "site/finetune/shipped/ds_configs/zero2.json")
