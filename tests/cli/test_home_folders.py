"""`~` where no shell has replaced it, and byte-order marks, which editors on Windows write."""

from __future__ import annotations

import pytest
from conftest import SAMPLE, SD15, run_here
from toy_parts import arguments, captioned_folder

from lora_training.cli.prompt_files import read_prompts
from lora_training.launch.class_prompt import add_class_prompt
from lora_training.launch.env_file import read_env_file

pytestmark = pytest.mark.unit
BOM = "\ufeff"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The home folder, with a folder of pictures."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    captioned_folder(tmp_path / "pics", ["a red thing", "a red thing"])
    return tmp_path


PATHS = {
    "train_data_dir": "pics",
    "output_dir": "out",
    "cache_folder": "cache",
    "cache_dir": "hub",
    "pretrained_model_name_or_path": "base",
    "pretrained_vae_model_name_or_path": "vae",
    "class_data_dir": "class",
    "masked_loss": "pics",
    "init_lora": "pics",
    "resume_from_checkpoint": "out/checkpoint-1",
}


def test_paths_of_a_configuration_begin_at_home(recipe, home):
    lines = [f"{key}: ~/{path}" for key, path in PATHS.items()]
    lines += ["with_prior_preservation: true", "class_prompt: ~ a cat", "cache_latents: true"]
    (home / "c.yaml").write_text("\n".join(lines))
    for config in (("--config", home / "c.yaml"), ("--config=~/c.yaml",)):
        args = recipe.parse_args(list(map(str, config)))
        assert {key: vars(args)[key] for key in PATHS} == {key: str(home / p) for key, p in PATHS.items()}
        assert args.class_prompt == "~ a cat"
    assert arguments(recipe, "--train_data_dir=~/pics").train_data_dir == str(home / "pics")


def test_sets_prompts_and_class_prompts_begin_at_home(recipe, home):
    (home / "sets.yaml").write_text(f"{BOM}- train_data_dir: ~/pics\n")
    args = recipe.parse_args(["-m", "base", "--dataset_config=~/sets.yaml"])
    assert args.sets[0].train_data_dir == str(home / "pics")
    (home / "p.txt").write_text("a cat\n")
    assert arguments(recipe, "--validation_prompts_file=~/p.txt").validation_prompt == ["a cat"]
    (home / "c.yaml").write_text("train_data_dir: ~/pics\ntrigger_word: red\n")
    argv = add_class_prompt(["--dreambooth", "--config", str(home / "c.yaml")])
    assert argv[-2:] == ["--class_prompt", "a thing"]


def test_a_drawings_and_a_preparations_settings_begin_at_home(home):
    from lora_training.inference.settings import Settings, list_adapters
    from lora_training.prepare.settings import Settings as PreparationSettings

    loras = ["~/a", {"path": "~/b", "weight": 0.5}]
    paths = {"base_model_path": "~/base", "lora_weights_path": loras, "infer_path": "~/out"}
    paths["pretrained_vae_model_name_or_path"] = "~/vae"
    settings = Settings(paths=paths, prompt="~ a cat")
    assert settings.paths.base_model_path == str(home / "base") and settings.prompt == "~ a cat"
    assert list_adapters(settings) == [(str(home / "a"), 1.0), (str(home / "b"), 0.5)]
    assert settings.paths.pretrained_vae_model_name_or_path == str(home / "vae")
    assert settings.paths.infer_path == str(home / "out")
    own = PreparationSettings(data_dir="~/pics", output_dir="~/x", masked_loss="-mask", cache_dir="~/hub")
    assert (own.data_dir, own.output_dir) == (str(home / "pics"), str(home / "x"))
    assert (own.cache_dir, own.masked_loss) == (str(home / "hub"), "-mask")


def test_lists_of_an_env_file_begin_at_home(home):
    text = 'TRAIN_ARGS=("--train_data_dir" ~/pics "--cache_folder=~/cache" "$HOME/x" "a ~ b")\nA="~/b"\n'
    (home / ".env").write_text(text)
    values = read_env_file(home / ".env")
    assert values["A"] == f"{home}/b"
    cache = f"--cache_folder={home}/cache"
    assert values["TRAIN_ARGS"] == ["--train_data_dir", f"{home}/pics", cache, f"{home}/x", "a ~ b"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", f"{BOM}a cat --w 64\na dog\n"),
        ("q.txt", f"{BOM}# two\r\na cat --W 64 --ss euler_a\r\na dog\r\n"),
        ("r.yaml", f"{BOM}- {{prompt: a cat, width: 64}}\n- a dog\n"),
        ("s.json", f'{BOM}[{{"prompt": "a cat", "width": 64}}, "a dog"]'),
    ],
)
def test_prompts_behind_a_byte_order_mark(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    first, second = read_prompts(str(tmp_path / name), 8)
    assert (first["prompt"], first["width"], second["prompt"]) == ("a cat", 64, "a dog")


def test_a_configuration_behind_a_byte_order_mark(recipe, tmp_path):
    for name, text in (("c.yaml", "rank: 8"), ("c.json", '{"rank": 8}'), ("c.toml", "rank = 8")):
        (tmp_path / name).write_text(BOM + text, encoding="utf-8")
        assert arguments(recipe, "--config", tmp_path / name).rank == 8
    captioned_folder(tmp_path / "data", ["a"])
    buckets = '{"resolution": 64, "aspect_ratio_buckets": "64,64"}'
    (tmp_path / "data" / "buckets.json").write_text(BOM + buckets, encoding="utf-8")
    assert arguments(recipe, "-d", tmp_path / "data").aspect_ratio_buckets == "64,64"


def test_kohyas_samplers_are_taken_and_said_to_be_the_bases(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a circle --ss euler_a --s 1\na star --ss ddim\n")
    flags = ("--validation_prompts_file", tmp_path / "p.txt", "--num_validation_images", 1)
    flags += ("--validation_inference_steps", 1, "--max_train_steps", 1)
    assert run_here(SD15, tmp_path / "out", "-d", SAMPLE, *flags) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "--ss" in line]
    assert len(lines) == 1 and "euler_a" in lines[0] and "ddim" in lines[0] and "the base's" in lines[0]
