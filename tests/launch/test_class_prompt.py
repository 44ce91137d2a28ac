"""The class prompt of --dreambooth alone."""

from __future__ import annotations

import pytest
from conftest import FAMILIES, SAMPLE
from parsed_starts import parse_start

from lora_training.errors import UserError
from lora_training.launch import environment
from lora_training.launch.class_prompt import add_class_prompt, derive_class_prompt
from lora_training.launch.decision import decide

pytestmark = pytest.mark.unit
TOY = {name: family.base for name, family in FAMILIES.items()}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "gpu_precision", lambda: None)


@pytest.mark.parametrize(
    ("instance", "captions", "trigger", "expected"),
    [
        ("a photo of sks dog", ["never"], None, "a photo of dog"),
        (
            None,
            ["a photo of sks dog", "sks dog playing in the park", "a photo of sks dog"],
            None,
            "a photo of dog",
        ),
        (None, ["sks, a cat", "sks, a cat on a sofa"], None, "a cat"),
        (None, ["my zorg cat"], "zorg", "my cat"),
        ("a photo of my dog", [], None, None),
        (None, ["a dog"], None, None),
        (None, ["a dog"], "sks", "a dog"),
        ("sks", [], None, None),
        ("a photo of [trigger] dog", [], None, "a photo of dog"),
        ("a photo of s_k_s., a dog", [], "s_k_s.", "a photo of a dog"),
        (None, ["a red bike on a red road"], "red bike", "a on a red road"),
        (None, ["sks's dog", "masks"], None, "dog"),
    ],
)
def test_class_prompt_of_dreambooth_alone(instance, captions, trigger, expected):
    assert derive_class_prompt(instance, captions, trigger) == expected


def test_dreambooth_alone_is_prior_preservation_with_a_class_prompt(capsys):
    argv = ["sd15", "-m", TOY["sd15"], "-d", str(SAMPLE), "--dreambooth"]
    start = decide(argv, {})
    start.argv = add_class_prompt(start.argv)
    args = parse_start(start)
    assert args.with_prior_preservation and args.class_prompt.startswith("a circle on a")
    assert "--dreambooth: the class prompt is 'a circle on a" in capsys.readouterr().out
    named = decide([*argv, "--class_prompt", "a dog"], {})
    named.argv = add_class_prompt(named.argv)
    assert parse_start(named).class_prompt == "a dog"
    with pytest.raises(UserError, match="--dreambooth: .* --class_prompt"):
        add_class_prompt([*argv, "--instance_prompt", "a photo of my dog"])
