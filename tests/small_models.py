"""Models that are small, a LoRA on them, and comparisons with peft's."""

from __future__ import annotations

import copy

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode

from lora_training.base_model.quantized import load_quantized
from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.parts import TrainedPart

KINDS = ("fp8", "int8", "nf4")
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
FLUX_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")


class Attention(torch.nn.Module):
    """q, k, v of one input, and an output layer; or k and v of another one."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.is_cross_attention = cross
        self.to_q, self.to_k, self.to_v = (torch.nn.Linear(16, 32, bias=b) for b in (True, False, True))
        self.to_out = torch.nn.ModuleList([torch.nn.Linear(32, 16), torch.nn.Dropout(0.0)])

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_out[0](torch.tanh(self.to_q(x)) * self.to_k(context) + self.to_v(context))


class Pictures(torch.nn.Module):
    """1 x 1 and 3 x 3 convolutions around an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.conv = torch.nn.Conv2d(8, 16, 1), torch.nn.Conv2d(16, 16, 3, padding=1)
        self.attn, self.proj_out = Attention(), torch.nn.Conv2d(16, 8, 1)

    def forward(self, x):
        x = torch.tanh(self.conv(self.proj_in(x)))
        return self.proj_out(
            self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])
        )


def with_lora(model, dtype=torch.float32, targets=("to_q", "to_k", "to_v", "to_out.0"), fused=True, **config):
    """A frozen model with a LoRA that isn't zero, and its part; fused or peft's own."""
    model.requires_grad_(False).to(dtype)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **config)
    torch.manual_seed(1)
    inject_adapter_in_model(config, model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not fused:
        return model, trained
    part = TrainedPart("denoiser", trained, 1e-3, 0.01, 100)
    part.allocate(dtype)
    if dtype == torch.float64:  # the flat buffers are float32 otherwise; here all is exact
        part.weights.data = part.weights.data.double()
        part.gradients = part.micro_gradients = None
    fuse_lora(model)
    return model, part


def exact(model, targets, **config):
    """peft's model and a fused copy of it, both in float64.

    The fused one's gradients lie in part.micro_gradients.
    """
    torch.manual_seed(0)
    model = model.double()
    plain, trained = with_lora(copy.deepcopy(model), torch.float64, targets, fused=False, **config)
    fused = copy.deepcopy(plain)
    part = TrainedPart(
        "denoiser", {n: p for n, p in fused.named_parameters() if p.requires_grad}, 1e-3, 0.0, 9
    )
    start = {n: p.detach().clone() for n, p in part.parameters.items()}
    part.allocate(torch.float64)
    for name, view in part.views(part.shadow).items():
        view.copy_(start[name])  # float32 in between has rounded them
    fuse_lora(fused)
    return plain, trained, fused, part


def close(plain, trained, fused, part, *inputs, wrap=lambda model: model, times: int = 1):
    """Outputs and all gradients of the two agree."""
    results = []
    for model in (plain, fused):
        copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        for _ in range(times):
            out = wrap(model)(*copies)
            (out.square().mean() + out.sum() * 0.01).backward()
        results.append((out, [x.grad for x in copies]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    views = part.views(part.micro_gradients)
    for name, parameter in trained.items():
        torch.testing.assert_close(views[name], parameter.grad, rtol=1e-9, atol=1e-9)
        assert parameter.grad.abs().max() > 0


def groups(model) -> list:
    """How many layers compute together, largest first."""
    sizes = {
        id(m.forward.func.__self__): len(m.forward.func.__self__.layers)
        for m in model.modules()
        if "forward" in vars(m)
    }
    return sorted(sizes.values(), reverse=True)


def tiny_flux(layers: int = 1):
    """FLUX.1's transformer with so many double and single blocks, of random weights."""
    return FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )  # fmt: skip


def flux_inputs() -> dict[str, torch.Tensor]:
    """Inputs of `tiny_flux`."""
    return {
        "hidden_states": torch.randn(1, 6, 16),
        "encoder_hidden_states": torch.randn(1, 4, 32),
        "pooled_projections": torch.randn(1, 32),
        "guidance": torch.ones(1),
        "timestep": torch.ones(1) * 0.5,
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(4, 3),
    }


def flux_pair(kind, folder, layers: int = 2):
    """Two equal tiny FLUX.1s in float32, quantised if `kind` says so, and inputs of both."""
    torch.manual_seed(0)
    model = tiny_flux(layers).eval()
    if kind:
        model.save_pretrained(folder)
        model = load_quantized(FluxTransformer2DModel, folder, kind, torch.float32, "cpu")

    return model, copy.deepcopy(model), flux_inputs()


def gradients_of(model, inputs, part, times: int = 2) -> list:
    """A step's gradients, some times over, with a drawing in between."""
    results = []
    for _ in range(times):
        model(**inputs).sample.square().mean().backward()
        results.append(part.gradients.clone())
        part.gradients.zero_()
        with torch.no_grad():
            results.append(model(**inputs).sample)
    return results


class Count(TorchDispatchMode):
    """Operations that would start a kernel."""

    FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
