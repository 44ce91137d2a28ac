"""Flags that can't be meant are refused in one line, before anything heavy is imported."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
from conftest import FAMILIES, ROOT, SAMPLE, load_script, quick_flags
from toy_parts import arguments

from lora_training.errors import UserError

pytestmark = pytest.mark.faults

HEAVY = ("accelerate", "datasets", "diffusers", "numpy", "peft", "PIL", "torch", "transformers", "yaml")
WRONG = [  # flags, and what the line says
    (["--lerning_rate", "1"], "did you mean --learning_rate"),
    (["--train_data_dir", "nowhere"], "--train_data_dir nowhere: no such folder"),
    (["-d", ".", "--rank", "0"], "--lora_r/-r: 0 is below 1"),
    (["-d", ".", "--rank", "x"], "invalid count value: 'x'"),
    (["-d", ".", "--resolution", "63"], "--resolution 63 is not divisible by"),
    (["-d", ".", "--caption_dropout", "1.5"], "not between 0 and 1"),
    (["-d", ".", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    (["-d", ".", "--with_prior_preservation"], "needs --class_prompt"),
    (
        ["-d", ".", "--class_prompt", "a dog"],
        "--class_prompt has no effect without --with_prior_preservation",
    ),
    (["-d", ".", "--train_text_encoder", "--train_text_encoder_ti"], "exclude each other"),
    (["-d", ".", "--train_transformer_frac", "0"], "needs --train_text_encoder_ti"),
    (["-d", ".", "--cache_latents", "--color_jitter"], "--cache_latents can't be combined"),
    (["-d", ".", "--huber_c", "0.2"], "--huber_c has no effect without --loss_type huber"),
    (["-d", ".", "--huber_schedule", "snr"], "--huber_schedule has no effect without --loss_type huber or"),
    (["-d", ".", "--loss_type", "smooth_l1", "--huber_c", "0"], "--huber_c 0 leaves --loss_type smooth_l1"),
    (["-d", ".", "--ema_decay", "0.9"], "--ema_decay has no effect without --use_ema"),
    (["-d", ".", "--blocks_to_swap", "4", "--compile"], "--blocks_to_swap can't be combined with --compile"),
    (["-d", ".", "--cuda_graphs"], "--cuda_graphs needs --cache_latents"),
    (["-d", ".", "--report_to", "nothing"], "--report_to nothing: unknown"),
    (
        ["-d", ".", "--push_to_hub", "--hub_token", "x", "--report_to", "wandb"],
        "--hub_token is refused with wandb",
    ),
    (["-d", ".", "--instance_data_dir", "."], "exclude each other"),
    (["--instance_data_dir", "."], "--instance_data_dir needs --instance_prompt"),
    ([], "no data"),
    (["-d", ".", "--optimizer", "sgd"], "sgd is none of adamw, "),
    (["-d", ".", "--aspect_ratio_buckets", "512"], 'is no "height,width"'),
]
ANSWERS = """
import contextlib, importlib, io, json, pathlib, sys
script = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(script.parent))
recipe = importlib.import_module(script.stem)
answers = []
for flags in [*json.loads(sys.argv[2]), ["--help"]]:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = recipe.main(["-m", "base", *flags])
        except SystemExit as end:
            code = end.code or 0
    modules = {name: sys.modules[name] for name in json.loads(sys.argv[3]) if name in sys.modules}
    heavy = [name for name, module in modules.items() if "Lazy" not in type(module).__name__]
    answers.append((code, out.getvalue(), err.getvalue(), heavy))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Gives a function: what a script answers to each of WRONG and to --help, in a process of its own."""
    folder = tmp_path_factory.mktemp("wrong")

    @functools.cache
    def answers_of(name: str) -> list[tuple[int, str, str, list[str]]]:
        flags = json.dumps([flags for flags, _ in WRONG])
        argv = [str(ROOT / FAMILIES[name].script), flags, json.dumps(HEAVY)]
        command = [sys.executable, "-c", ANSWERS, *argv]
        result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
        return json.loads(result.stdout)

    return answers_of


@pytest.mark.xdist_group("refused flags")
@pytest.mark.parametrize("number", range(len(WRONG)), ids=[reason for _, reason in WRONG])
def test_wrong_arguments_are_one_line_before_anything_heavy_is_imported(number, answers):
    """What is tested is why a script answers within half a second, and not how fast the machine is."""
    code, printed, line, heavy = answers("sdxl")[number]
    assert (code, printed, heavy) == (2, "", [])
    assert len(line.strip().splitlines()) == 1 and WRONG[number][1] in line


@pytest.mark.xdist_group("refused flags")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_help_imports_nothing_heavy(name, answers):
    """Nor do the errors before it."""
    *refusals, (code, printed, line, heavy) = answers(name)
    assert (code, line, heavy) == (0, "", []) and "--learning_rate" in printed
    assert all(code == 2 and not heavy for code, _, _, heavy in refusals)


@pytest.fixture
def refusal(recipe, capsys):
    """Gives a function that parses flags and returns the one line with which they are refused."""

    def line(*flags):
        base = FAMILIES["sdxl"].base
        try:
            recipe.parse_args(["-m", base, "-d", str(SAMPLE), *map(str, flags)])
        except UserError as error:
            return str(error)
        except SystemExit:
            return capsys.readouterr().err
        pytest.fail(f"{flags} were taken")

    return line


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--adam_beta1", "1"), "not from 0 up to, but without, 1"),
        (("--adam_beta2", "1.0"), "without, 1"),
        (("--use_ema", "--ema_decay", "1"), "without, 1"),
        (("--lora_dropout", "1"), "without, 1"),
        (("--learning_rate", "1e38"), "not between 0 and 100"),
        (("--learning_rate", "nan"), "not between 0 and 100"),
        (("--learning_rate", "1e-8", "--lr_scheduler", "polynomial"), "must be higher"),
        (("--adam_weight_decay", "inf"), "is not a number from 0 to"),
        (("--shuffle_tags", "--tag_separator", ""), "--tag_separator is empty"),
        (("--train_text_encoder_ti", "--initializer_concept", " \t"), "--initializer_concept is blank"),
        (("--init_lora_weights", "loftq"), "use one of gaussian"),
        (("--init_lora_weights", "eva"), "use one of gaussian"),
        (("--init_lora_weights", "pissa_niter_x"), "use one of gaussian"),
        (("--init_lora_weights", "pissa", "--use_dora"), "can't be combined"),
        (("--aspect_ratio_buckets", "6²,64"), 'is no "height,width"'),
        (("--rank", "1²"), "invalid count value"),
        (("--rank", "9" * 30), "beyond what any run needs"),
        (("--optimizer", "adafactor", "--adam_beta1", "0.5"), "no effect with --optimizer adafactor"),
        (("--revision", "main"), "no effect with a base on this machine"),
        (("--logging_dir", "other"), "no effect without a tracker"),
        (("--resume_anyway",), "no effect without --resume_from_checkpoint"),
        (("--trigger_word", os.fsdecode(b"\xff")), "has bytes that are no text"),
        (("--run_name", "a\0b"), "has bytes that are no text"),
        (("--train_text_encoder_ti", "--preserve_class", "a TOK"), "has a word of --token_abstraction in it"),
    ],
)
def test_flags_that_cannot_be_meant(refusal, flags, reason):
    assert reason in refusal("--report_to", "none", *flags)


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("sd3", ("--weighting_scheme", "mode", "--mode_scale", "1000"), "between 0 and 1.75"),
        ("flux", ("--weighting_scheme", "mode", "--mode_scale", "2"), "between 0 and 1.75"),
        ("sd3", ("--logit_mean", "nan"), "between -100 and 100"),
        ("flux", ("--logit_mean", "inf"), "between -100 and 100"),
        ("flux", ("--max_sequence_length", "513"), "512 tokens"),
    ],
)
def test_flags_of_a_family_that_cannot_be_meant(name, flags, reason, capsys):
    with pytest.raises(SystemExit):
        arguments(load_script(FAMILIES[name].script), *flags)
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("strays", [("", ""), (" ",), ("\t", "x")])
def test_words_that_belong_to_no_flag(recipe, tmp_path, capsys, strays):
    with pytest.raises(SystemExit) as end:
        recipe.parse_args(quick_flags(FAMILIES["sdxl"], tmp_path / "x", "-d", SAMPLE, "--dry_run", *strays))
    assert end.value.code == 2 and "unknown flag" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["--masked_loss", "--validation_prompts_file", "--init_lora", "--trigger_word", "--config"]
)
def test_an_empty_value_is_off(recipe, flag):
    from lora_training.data.examples import load_examples

    args = arguments(recipe, f"{flag}=")
    assert vars(args)[flag[2:]] is None and load_examples(args)


@pytest.mark.parametrize("argument", ["eps=1e-6", "decay_rate='a'", "clip_threshold=()"])
def test_an_argument_that_only_an_optimizers_step_refuses(tmp_path, capsys, argument):
    from conftest import QUICKEST, run_here

    flags = ("-d", SAMPLE, "--optimizer", "adafactor", "--optimizer_args", argument)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 2
    assert "--optimizer_args" in capsys.readouterr().err
