"""Values of flags for attack.py: good ones, with which a tiny run goes on to its steps; borderline ones; and hostile ones."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

WORDS = ("a", "circle", "sks", "a red circle", "TOK", "a, b, c")
ODD_WORDS = (
    *(
        "",
        " ",
        "\t",
        "a\nb",
        "a\u2028b",
        "🎉",
        "字" * 50,
        "e\u0301",
        "{flag}",
        "{0}",
        "%s",
        "%",
        "--x",
        "-",
        "a=b",
        "'",
        '"',
    ),
    *("..", ".", "/", "~", "$HOME", "C:\\a", "none", "null", "true", "0", "nan", "word " * 2000, "x" * 300, "a" * 5000),
    *(
        "\u202eabc",
        "\ufeffa",
        "\x7f",
        "\x1b[31m",
        "\udcff",
        "<s0>",
        "<|endoftext|>",
        ",",
        ",,",
        "a,,b",
        "a,a",
        "(",
        "[a",
        "*",
    ),
)
ODD_NUMBERS = (
    "-1",
    "0",
    "-0.0",
    "1e400",
    "-inf",
    "nan",
    "x",
    "",
    " ",
    "1_0",
    "１",
    "1²",
    "9" * 30,
    "1.5",
    "0x10",
    "1,5",
    "1e-320",
)
BY_TYPE = {  # the name of argparse's type: good values, borderline ones
    "count": (("1", "2", "3"), ("1", "2147483647", "2147483648", "+1", " 2")),
    "whole number": (("0", "1", "2"), ("0", "2147483647", "1000", "-0")),
    "share": (("0", "0.25", "0.5", "1"), ("1e-9", "0.9999999", "1.0000001", "1e-320")),
    "learning rate": (("1e-4", "1e-3"), ("0", "100", "1e-12", "1e-45", "99.9")),
    "amount": (("0", "0.1", "1", "5"), ("1e9", "1e-30", "1e5", "1e-9")),
    "number": (("0", "0.5", "1"), ("-100", "100", "-99.9")),
    "scale": (("1.29", "0.5"), ("0", "1.75", "1.7500001")),
    "yes_or_no": (("true", "false"), ("TRUE", "no", "2")),
    "int": (("0", "7"), ("-1", "2147483648", "9223372036854775807", "18446744073709551616", "-9223372036854775809")),
}
CAPPED = (  # legal numbers of these cost time or memory without end
    "resolution train_batch_size num_train_epochs gradient_accumulation_steps dataloader_num_workers num_class_images repeats"
    " num_validation_images validation_inference_steps num_new_tokens_per_abstraction rank max_train_steps sample_batch_size"
)
LEFT_OUT = (
    "help",
    "config",
    "compile",
    "max_train_steps",
    "hub_token",
    "dry_run",
)  # drawn elsewhere, or minutes on a CPU
BUNDLES = (  # that go together, so that a run gets far
    ("--with_prior_preservation", "--class_prompt", "a circle", "--num_class_images", "2"),
    ("--train_text_encoder_ti", "--token_abstraction", "circle"),
    ("--train_text_encoder_ti", "--token_abstraction", "circle", "--train_transformer_frac", "0"),
    ("--train_text_encoder_ti", "--token_abstraction", "circle,red", "--initializer_concept", "a red"),
    ("--train_text_encoder",), ("--cache_latents", "--random_flip"), ("--cache_latents", "--cache_folder", "{folder}/cache"),
    ("--use_ema", "--ema_decay", "0.5"), ("--loss_type", "huber", "--huber_c", "0.2"), ("--aspect_ratio_buckets", "auto"),
    ("--color_jitter",), ("--random_rotation",), ("--shuffle_tags", "--keep_tokens", "1"), ("--tag_dropout", "0.3"),
    ("--validation_split", "0.3", "--keep_best"), ("--optimizer", "prodigy", "--learning_rate", "1"),
    ("--optimizer", "schedulefree"), ("--optimizer", "adafactor"), ("--use_8bit_adam",), ("--quantize_base", "int8"),
    ("--quantize_base", "nf4"), ("--blocks_to_swap", "1"), ("--use_dora",), ("--merge_lora",), ("--init_lora", "{lora}"),
    ("--trigger_word", "sks", "--preserve_class", "circle"), ("--report_to", "tensorboard"), ("--masked_loss", "alpha"),
    ("--lr_scheduler", "polynomial", "--lr_power", "2"), ("--lr_scheduler", "cosine_with_restarts", "--lr_num_cycles", "2"),
    ("--gradient_checkpointing", "--offload"), ("--mixed_precision", "bf16"), ("--train_batch_size", "2", "--repeats", "2"),
    ("--gradient_accumulation_steps", "2", "--scale_lr"), ("--num_validation_images", "1", "--validation_prompt", "a circle"),
    ("--caption_dropout", "0.5"), ("--loraplus_lr_ratio", "16"), ("--init_lora_weights", "pissa"), ("--use_rslora",),
    ("--checkpointing_steps", "1", "--checkpoints_total_limit", "1"), ("--resume_from_checkpoint", "latest"), ("--report",),
    ("--num_validation_images", "1", "--control_prompt", "a red square"), ("--dataloader_num_workers", "1"),
)  # fmt: skip
BY_NAME = {  # good values, others; {folder} is the case's own, {data} pictures, {lora} a trained file, {base} the tiny model
    "pretrained_model_name_or_path": (("{base}",), ("{data}", "{lora}", "nowhere/here", "./x", "", ".", "{folder}")),
    "pretrained_vae_model_name_or_path": (("{base}/vae",), ("{base}", "{lora}", "{data}", "nowhere/x", "./y", "{base}/vae/config.json")),
    "train_data_dir": (("{data}",), ("{folder}", "{base}", "nowhere", "{lora}", "", ".")),
    "dataset_name": (("{data}",), ("nowhere/here", "{base}", "{lora}", "{folder}", "x.py", "a b")),
    "instance_data_dir": (("{data}",), ("{folder}", "nowhere", "{lora}")),
    "resolution": (("64", "32", "64 96"), ("8", "0", "63", "64 64 64", "-64", "128 8", "16 x", "16777216 16777215")),
    "train_batch_size": (("1", "2", "3"), ("12", "13", "64")),
    "num_train_epochs": (("1",), ("2", "1000")), "gradient_accumulation_steps": (("1", "2"), ("30",)),
    "dataloader_num_workers": (("0", "1"), ("2",)), "num_class_images": (("1", "2"), ("5",)), "repeats": (("1", "3"), ("1000",)),
    "sample_batch_size": (("1", "2"), ("1000",)), "num_validation_images": (("0", "1"), ("2",)), "rank": (("1", "4"), ("64", "300")),
    "validation_inference_steps": (("1", "2"), ("1000", "1001")), "num_new_tokens_per_abstraction": (("1", "2"), ("76", "500")),
    "num_new_tokens": (("1",), ()), "aspect_ratio_buckets": (("auto", "64,64;64,96", "32,64"), ("64", "0,0", "64,64;", ";", "a,b", "8,8", "64,-64", "auto;auto", "64,64,64", " 64 , 64 ", "8,8192")),
    "lora_layers": (("to_q", "to_k to_v", "attn"), ("x", "(", "*", "down_blocks.0", "transformer_blocks.0", "to_q to_q", ".", "conv_in", "norm1")),
    "lora_blocks": (("0", "0 1"), ("99", "-1", "x", "0 0", "down_blocks.0", "1.5", "single_0")),
    "init_lora": (("{lora}",), ("{data}", "{base}", "nowhere", "{emb}", "{kohya}", "{data}/smiley_00.png", "{base}/vae/diffusion_pytorch_model.safetensors")),
    "init_lora_weights": (("gaussian", "default", "orthogonal", "pissa_niter_2"), ("olora", "pissa", "PISSA", "loftq", "eva", "pissa_niter_0", "pissa_niter_", "true", "false", "x")),
    "masked_loss": (("alpha",), ("{folder}", "{data}", "-mask", "_m", "-", "x")),
    "optimizer": (("adamw", "AdamW", "torch.optim.RAdam", "torch.optim.SGD"), ("torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Muon", "torch.optim", "torch.nn.Linear", "os.path", "x.y", ".", "..", "torch.optim.", "torch.optim.Optimizer", "builtins.print", "sgd", "torch.optim.Rprop", "torch.optim.ASGD", "torch.optim.lr_scheduler.StepLR")),
    "optimizer_args": (("weight_decay=0.1", "eps=1e-6"), ("lr=x", "betas=3", "betas=(0.9,0.99)", "betas=(1,1)", "params=1", "=", "x", "=1", "momentum=0.9", "foreach=True", "fused=True", "capturable=True", "maximize=True", "lr=1e30", "eps=-1", "weight_decay=nan", "a-b=1", "x=__import__('os')", "lr=[", "nesterov=True", "r=0", "lr=0")),
    "resume_from_checkpoint": (("latest",), ("checkpoint-5", "nowhere", "{data}", "{trained}/checkpoint-2", "{trained}", "checkpoint-", "..")),
    "validation_prompts_file": (("{prompts}",), ("{data}", "nowhere", "{lora}")),
    "dataset_config": (("{sets}",), ("{data}", "nowhere", "{lora}", "{prompts}")),
    "cache_folder": (("{folder}/cache",), ("{lora}", "/dev/null", "{folder}/a/b/c", "", "x" * 300, "/proc/x")),
    "cache_dir": (("{folder}/hub",), ("{lora}", "/dev/null")),
    "class_data_dir": (("{folder}/class",), ("{lora}", "{data}", "{data}/class", "/dev/null", "/proc/x")),
    "output_dir": (("{folder}/x", "{folder}/y/"), ("{lora}", "{data}", "/dev/null", "/dev/null/x", "/proc/x", "", "{folder}/" + "n" * 250, "pytorch_lora_weights", "x/../y", "{base}", "{folder}/a b\u00e9字")),
    "logging_dir": (("logs", "other"), ("../up", "", "/dev/null", "{lora}", "x" * 300)),
    "report_to": (("none", "tensorboard"), ("x", "", ",", "none,tensorboard", "tensorboard,tensorboard", "tensorboard,", "mlflow", "None")),
    "trigger_word": (("sks", "smiley"), ODD_WORDS), "tag_separator": ((", ", " "), ("", "a", "\n", " ,", "a red circle")),
    "token_abstraction": (("circle", "TOK"), ODD_WORDS), "initializer_concept": (("a", "red circle"), ODD_WORDS),
    "caption_column": (("text",), ("x", "file_name", "", "0", "text,caption")), "image_column": (("image",), ("x", "text", "")),
    "class_prompt": (("a circle",), ODD_WORDS), "preserve_class": (("circle",), ODD_WORDS), "local_rank": (("-1", "0"), ("1", "100", "-5")),
    "prodigy_beta3": (("0.9",), ("0", "1", "0.99999")), "color_jitter": (("", "0.1 0.1 0.1 0.05"), ("1", "0 0 0 0", "1e9 0 0 0", "0 0 0 1e9", "0.1 0.1 0.1 x", "1 1 1 0.6")),
    "random_rotation": (("5", ""), ("360", "1e9", "0", "1e-9")), "blocks_to_swap": (("0", "1"), ("2", "100", "2147483647")),
    "clip_skip": (("1",), ("2", "50")), "max_sequence_length": (("77", "16"), ("1", "2", "512", "513", "0")),
    "guidance_scale": (("1", "3.5"), ("0", "1e9")), "hub_model_id": (("a/b",), ("", "a/b/c", "..", "a b")), "run_name": (("a",), ODD_WORDS),
    "revision": (("main",), ("x",)), "variant": (("fp16",), ("x", "../x", "")), "dataset_split": (("train",), ("test", "train[:2]", "train[", "x")),
    "min_timestep": (("0", "10"), ("999", "1000", "500")), "max_timestep": (("1000", "500"), ("1", "1001", "10")),
    "max_train_samples": (("3", "12"), ("1", "1000000")), "lr_warmup_steps": (("0", "1"), ("5", "2147483647")),
    "adam_epsilon": (("1e-8",), ("0", "1e9", "1e-45")), "adam_weight_decay": (("0", "0.01"), ("1e9", "1e5", "100")), "noise_offset": (("0.05",), ("1e9", "1e-30")),
    "snr_gamma": (("5",), ("0", "1e9", "1e-30")), "input_perturbation": (("0.1",), ("1e9",)), "huber_c": (("0.1",), ("0", "1e9", "1e-30")),
}  # fmt: skip
ODD_YAML = (
    [],
    {},
    [[1]],
    {"a": 1},
    None,
    True,
    False,
    1.5,
    -1,
    "",
    [None],
    [True, 1],
    "2001-01-01",
    1e400,
    [[]],
    [1, "a"],
    {1: 2},
)
PROMPTS = (
    *(
        "a circle\n",
        "a circle --n bad --w 64 --h 64 --d 3 --s 1 --l 2\n# x\n",
        "a --w 63\n",
        "--n x\n",
        "",
        "a --q 1\n",
        "a --s 0\n",
    ),
    *(
        "a --d\n",
        "a --n\n",
        "a --s 1 --s 2\n",
        "\n\n",
        "a --w 64 --w\n",
        "a --l nan\n",
        "字 --d 1\n",
        "a -- b\n",
        "a --h 99999999\n",
    ),
)
SETS = (  # of --dataset_config
    '[{"train_data_dir": "{data}"}]', '[{"train_data_dir": "{data}", "repeats": 2, "trigger_word": "sks"}]',
    '[{"train_data_dir": "{data}"}, {"train_data_dir": "{data}", "class_prompt": "a circle"}]', "[]", "[{}]", "{}", "null",
    '[{"train_data_dir": "{data}", "class_prompt": "a circle"}]', '[{"train_data_dir": "{data}", "weight": -1}]', "[[]]",
    '[{"train_data_dir": "{data}", "resolutions": [32, 64]}]', '[{"train_data_dir": "{data}", "resolutions": [[32, 64], 63]}]',
    '[{"train_data_dir": "{data}", "resolutions": 5}]', '[{"train_data_dir": 5}]', '["a"]', '[{"weight": "x"}]', '[{"a": 1}]',
    '[{"train_data_dir": "{data}", "weight": 0}]', '[{"train_data_dir": "{data}", "repeats": [1]}]', "[null]", "[1]", "a",
    '[{"train_data_dir": "{data}", "resolutions": {"a": 1}}]', '[{"instance_data_dir": "{data}", "instance_prompt": ""}]',
    '[{"train_data_dir": "{data}", "class_prompt": [1]}]', '[{"train_data_dir": "{data}", "weight": true}]',
    '[{"train_data_dir": "{data}", "weight": null}]', '[{"train_data_dir": "{data}", "validation_split": 1}]', '[{1: 2}]',
)  # fmt: skip


def kind_of(action: argparse.Action) -> tuple:
    """(good values, others) of a flag."""
    name = action.option_strings[0].removeprefix("--")
    if name in BY_NAME:
        good, odd = BY_NAME[name]
        return good, (*odd, *ODD_NUMBERS) if name in CAPPED.split() else (*odd, *ODD_WORDS[:6])
    if action.choices:
        return tuple(map(str, action.choices)), (*ODD_WORDS, str(action.choices[0]).upper())
    if action.type is None:
        return WORDS, ODD_WORDS
    good, borderline = BY_TYPE[action.type.__name__]
    return good, (*borderline, *borderline, *ODD_NUMBERS)


def draw_flag(action: argparse.Action, rng: random.Random, odd: bool) -> list[str]:
    """A flag with a value, as words."""
    flag = rng.choice(action.option_strings) if odd else action.option_strings[0]
    if action.nargs == 0:
        return [flag]
    good, others = kind_of(action)
    value = rng.choice(others if odd and others else good)
    if action.nargs in ("+", "*", "?"):
        return [flag, *value.split(" ")] if value else [flag]
    return [flag, value] if not value.startswith("-") else [f"{flag}={value}"]


def draw_flags(actions: list[argparse.Action], rng: random.Random) -> list[str]:
    """Words of a command line: some that go together, some that are good by themselves, and in half of them odd ones."""
    words = [word for bundle in rng.sample(BUNDLES, rng.choice((0, 1, 1, 2, 3))) for word in bundle]
    actions = [a for a in actions if a.option_strings and not {o.lstrip("-") for o in a.option_strings} & set(LEFT_OUT)]
    for action in rng.sample(actions, rng.choice((0, 1, 1, 2, 4))):
        words += draw_flag(action, rng, odd=False)
    for action in rng.sample(actions, rng.choice((0, 0, 1, 1, 2))):
        words += draw_flag(action, rng, odd=True)
    return words


def as_config(words: list[str], rng: random.Random) -> dict:
    """The same as a --config file says it, in a third of them with a value of another kind or a key that no flag has."""
    values, key = {}, None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            values[key] = value if equals else True
        elif key is not None:
            try:
                word = json.loads(word) if rng.random() < 0.8 and not word.startswith('"') else word
            except ValueError:
                word = str(word)
            values[key] = (
                word
                if values[key] is True
                else [values[key], word]
                if not isinstance(values[key], list)
                else [*values[key], word]
            )
    if values and rng.random() < 0.33:
        values[rng.choice(list(values))] = rng.choice(ODD_YAML)
    if rng.random() < 0.05:
        values[rng.choice((1, None, "learning_rat", "a b", "help", "", "-m", "_", "sets", "seed "))] = 1
    return values


def fill(text: str, places: dict[str, Path | str]) -> str:
    """A value with the places that it names."""
    for name, place in places.items():
        text = text.replace(f"{{{name}}}", str(place))
    return text
