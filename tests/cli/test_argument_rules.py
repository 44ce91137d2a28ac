"""Flags of other families and trainers, and off values."""

from __future__ import annotations

import pytest
from conftest import FAMILIES, load_script
from toy_parts import arguments

from lora_training.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_off_values_of_another_familys_flags_are_taken(name, capsys):
    script = load_script(FAMILIES[name].script)
    off = ("--snr_gamma", "0", "--noise_offset", "0.0", "--prediction_type", "none", "--input_perturbation=0")
    assert arguments(script, *off).train_batch_size == 1
    with pytest.raises(UserError, match="--snr_gamma: rectified flow has none"):
        arguments(script, "--snr_gamma", 5)


def test_names_of_other_trainers_are_known(recipe, tmp_path, capsys):
    pairs = {
        "--network_dim": "--rank",
        "--unet_lr": "--learning_rate",
        "--save_every_n_steps": "--checkpointing_steps",
    }
    for wrong, flag in pairs.items():
        with pytest.raises(SystemExit):
            arguments(recipe, wrong, 4)
        assert f"unknown flag {wrong}; did you mean {flag}?" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("network_alpha: 4\n")
    with pytest.raises(UserError, match="unknown key 'network_alpha'; the nearest is 'lora_alpha'"):
        arguments(recipe, "--config", tmp_path / "c.yaml")
    with pytest.raises(SystemExit):
        arguments(recipe, "--local_rnk", 0)
    assert "local_rank" not in capsys.readouterr().err


def test_text_learning_rate_of_zero_is_given(recipe):
    with pytest.raises(UserError, match="--text_encoder_lr has no effect without --train_text_encoder"):
        arguments(recipe, "--text_encoder_lr", 0)
    with pytest.raises(UserError, match="--text_encoder_lr 0 trains nothing"):
        arguments(recipe, "--text_encoder_lr", 0, "--train_text_encoder")
    assert arguments(recipe, "--validation_prompt", "").validation_prompt is None
