"""muon, lion8bit, ademamix8bit and came by name: the libraries' steps, defaults that suit a LoRA."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import FAMILIES, metrics, run_here, same_weights
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart
from lora_training.optim.trial import try_optimizer, try_steps
from lora_training.training.capabilities import try_kernels
from lora_training.training.memory_estimate import OPTIMIZER_BYTES

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
NAMES = ("muon", "lion8bit", "ademamix8bit", "came")
SHAPES = {  # two layers, and a convolution's two
    "x.lora_A.default.weight": (8, 96),
    "y.lora_A.default.weight": (8, 96),
    "z.lora_A.default.weight": (8, 16, 3, 3),
    "x.lora_B.default.weight": (80, 8),
    "y.lora_B.default.weight": (80, 8),
    "z.lora_B.default.weight": (32, 8, 1, 1),
}


def make_part(recipe, name: str, *flags, part_name="denoiser") -> TrainedPart:
    """A part of three LoRA layers with its optimizer."""
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES if part_name == "denoiser" else {"clip_l": (3, 64)}
    parameters = {key: torch.nn.Parameter(torch.randn(s, generator=generator)) for key, s in shapes.items()}
    part = TrainedPart(part_name, parameters, 1e-2, 0.1, 10)
    prepare_parts([part], arguments(recipe, "--optimizer", name, *flags))
    return part


def library_optimizer(name: str, part: TrainedPart):
    """The library's own class over copies of a part's weights, with the paper's settings; (it, copies)."""
    import bitsandbytes.optim
    import pytorch_optimizer

    weights = [part.weights.detach().clone()]
    if name in ("muon", "came"):
        weights = [view.clone() for view in part.views(part.weights.detach()).values()]
        weights = [weight.flatten(1) for weight in weights]
    weights = [torch.nn.Parameter(weight) for weight in weights]
    common = {"lr": 1e-2, "weight_decay": 0.1}
    make = {
        "muon": lambda: torch.optim.Muon(weights, **common, adjust_lr_fn="match_rms_adamw"),
        "lion8bit": lambda: bitsandbytes.optim.Lion8bit(weights, **common, betas=(0.9, 0.99)),
        "ademamix8bit": lambda: bitsandbytes.optim.AdEMAMix8bit(
            weights, **common, betas=(0.9, 0.999, 0.9999), alpha=5.0
        ),
        "came": lambda: pytorch_optimizer.CAME(weights, **common, betas=(0.9, 0.999, 0.9999)),
    }
    return make[name](), weights


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_the_librarys(recipe, name):
    part = make_part(recipe, name)
    optimizer, weights = library_optimizer(name, part)
    for seed in range(4):
        gradients = torch.randn(len(part.gradients), generator=torch.Generator().manual_seed(seed))
        pieces = gradients.split([weight.numel() for weight in weights])
        for weight, piece in zip(weights, pieces, strict=True):
            weight.grad = piece.view(weight.shape).clone()
        optimizer.step()
        part.gradients.copy_(gradients)
        part.step()
    expected = torch.cat([weight.detach().flatten() for weight in weights])
    moved = (expected - part.initial).abs().mean()
    assert (part.weights.detach() - expected).abs().max() < 0.05 * moved


def test_muon_launches_its_kernels_once_for_each_shape(recipe):
    """Twice as many layers of one shape take no more products."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            self.count += "mm" in str(operation)
            return operation(*arguments, **(options or {}))

    part = make_part(recipe, "muon")
    part.gradients.fill_(1.0)
    with Products() as products:
        part.optimizer.step()
    assert products.count == 4 * 5 * 3  # shapes, iterations, products


def test_a_gradient_of_zero_moves_nothing_and_stays_finite(recipe):
    """A LoRA's A matrices have none at first, while B is zero."""
    for name in NAMES:
        part = make_part(recipe, name, "--adam_weight_decay", 0)
        for group in part.optimizer.param_groups:
            group["weight_decay"] = 0.0
        part.step()
        assert torch.equal(part.weights.detach().cpu(), part.initial), name


def test_defaults_suit_the_optimizer(recipe):
    assert arguments(recipe, "--optimizer", "Lion8bit").learning_rate == 3e-5
    assert arguments(recipe, "--optimizer", "lion8bit", "--learning_rate", 1e-4).learning_rate == 1e-4
    rates = [
        arguments(recipe, "--optimizer", name).learning_rate for name in ("muon", "ademamix8bit", "came")
    ]
    assert rates == [1e-4, 1e-4, 1e-5]
    assert OPTIMIZER_BYTES.keys() >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_state_are_the_estimates(recipe, name):
    part = make_part(recipe, name)
    part.step()
    states = (value for state in part.optimizer.state.values() for key, value in state.items()
              if torch.is_tensor(value) and "qmap" not in key)  # fmt: skip
    size = sum(value.numel() * value.element_size() for value in states) / len(part.gradients)
    assert OPTIMIZER_BYTES[name] / 1.3 < size < OPTIMIZER_BYTES[name] * 1.1


def test_new_tokens_beside_muon_are_trained_by_adamw(recipe):
    part = make_part(recipe, "muon", "--optimizer_args", "ns_steps=4", part_name="embeddings")
    assert type(part.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("muon", "--use_dora"), "--use_dora can't be combined with --optimizer muon"),
        (("muon", "--adam_beta1", 0.8), "no effect with --optimizer muon: give its own"),
        (("lion8bit", "--adam_beta2", 0.8), "no effect with --optimizer lion8bit: give its own"),
        (("came", "--adam_epsilon", 1e-6), "no effect with --optimizer came: give its own"),
    ],
)
def test_settings_without_effect_are_refused(recipe, flags, reason):
    with pytest.raises(UserError, match=reason):
        arguments(recipe, "--optimizer", *flags)


def test_arguments_are_taken_or_refused_by_name(recipe):
    for name, argument in zip(NAMES, ("ns_steps=3", "betas=(0.8,0.9)", "alpha=2.0", "clip_threshold=0.5")):
        try_optimizer(arguments(recipe, "--optimizer", name, "--optimizer_args", argument), CPU)
        with pytest.raises(UserError, match=f"--optimizer_args betass: {name} has no such argument"):
            try_optimizer(arguments(recipe, "--optimizer", name, "--optimizer_args", "betass=1"), CPU)


@pytest.mark.parametrize("name", ["lion8bit", "ademamix8bit"])
def test_a_machine_without_the_kernels_is_told(recipe, monkeypatch, name):
    def no_kernel(*_):
        raise NotImplementedError("no such kernel")

    args = arguments(recipe, "--optimizer", name)
    args.mixed_precision = "no"
    try_steps(args, CPU)
    monkeypatch.setattr("lora_training.training.capabilities.try_steps", no_kernel)
    with pytest.raises(UserError, match=f"--optimizer {name} is not possible on this machine .*no such kern"):
        try_kernels(args, CPU)


@pytest.mark.parametrize("name", ["lion8bit", "ademamix8bit"])
def test_a_step_in_8_bits_does_not_wait_for_each_parameter(recipe, monkeypatch, name):
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda *_: pytest.fail("it waited"))
    part = make_part(recipe, name)
    part.gradients.fill_(1.0)
    part.step()
    assert not torch.equal(part.weights.detach(), part.initial)


@pytest.mark.resume
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_where_it_was_broken_off(tmp_path, pictures, name):
    family = FAMILIES["flux"]
    flags = ("-d", pictures, "--optimizer", name, "--max_train_steps", 4, "--checkpointing_steps", 2)
    whole, broken = tmp_path / "a" / "x", tmp_path / "b" / "x"
    assert run_here(family, whole, *flags) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    for file in broken.glob("*.safetensors"):
        file.unlink()
    assert run_here(family, broken, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(whole, broken)
    assert len([row for row in metrics(whole) if "lr_denoiser" in row]) == 4
