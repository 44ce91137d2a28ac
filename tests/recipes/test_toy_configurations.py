"""The configurations of the toys are those of their recipes."""

import importlib
from pathlib import Path

import pytest
import yaml
from conftest import FAMILIES, ROOT


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_toy_configurations_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = f"config/toy_{name}.yaml"
    recipe = importlib.import_module(Path(FAMILIES[name].script).stem)
    values = yaml.safe_load(Path(file).read_text())
    args = recipe.parse_args(["--config", file])
    assert (args.max_train_steps, args.rank) == (values["max_train_steps"], values["rank"])
