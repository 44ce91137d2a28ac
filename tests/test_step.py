"""The inner step: flat parts, LoRA layers, frozen weights in 8 and 4 bits, against peft and the libraries' optimizers."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.unit
sl = load_script("train_lora_sdxl.py")

KINDS = ("fp8", "int8", "nf4")


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
        return self.proj_out(self.attn(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:]))


def with_lora(model, dtype=torch.float32, targets=("to_q", "to_k", "to_v", "to_out.0"), fused=True, **config):
    """A frozen model with a LoRA that isn't zero, and its part; fused or peft's own."""
    model.requires_grad_(False).to(dtype)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights=False, **config)
    torch.manual_seed(1)
    inject_adapter_in_model(config, model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not fused:
        return model, trained
    part = sl.Part("denoiser", trained, 1e-3, 0.01, 100)
    part.allocate(dtype)
    if dtype == torch.float64:  # the flat buffers are float32 otherwise; here all is exact
        part.weights.data = part.weights.data.double()
        part.gradients = part.micro_gradients = None
    sl.fuse_lora(model)
    return model, part


def exact(model, targets, **config):
    """peft's model and a fused copy of it, both in float64; the fused one's gradients lie in part.micro_gradients."""
    torch.manual_seed(0)
    model = model.double()
    plain, trained = with_lora(copy.deepcopy(model), torch.float64, targets, fused=False, **config)
    fused = copy.deepcopy(plain)
    part = sl.Part("denoiser", {n: p for n, p in fused.named_parameters() if p.requires_grad}, 1e-3, 0.0, 9)
    start = {n: p.detach().clone() for n, p in part.parameters.items()}
    part.allocate(torch.float64)
    for name, view in part.views(part.shadow).items():
        view.copy_(start[name])  # float32 in between has rounded them
    sl.fuse_lora(fused)
    return plain, trained, fused, part


def close(plain, trained, fused, part, *inputs, wrap=lambda model: model, times: int = 1):
    """Outputs and all gradients of the two agree."""
    results = []
    for model in (plain, fused):
        mine = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        for _ in range(times):
            out = wrap(model)(*mine)
            (out.square().mean() + out.sum() * 0.01).backward()
        results.append((out, [x.grad for x in mine]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    views = part.views(part.micro_gradients)
    for name, parameter in trained.items():
        torch.testing.assert_close(views[name], parameter.grad, rtol=1e-9, atol=1e-9)
        assert parameter.grad.abs().max() > 0


def groups(model) -> list:
    """How many layers compute together, largest first."""
    found = {
        id(m.forward.func.__self__): len(m.forward.func.__self__.layers)
        for m in model.modules()
        if "forward" in vars(m)
    }
    return sorted(found.values(), reverse=True)


LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_self_attention_equals_peft(times, needs, config):
    both = exact(Attention(), LAYERS, **config)
    assert groups(both[2]) == [3, 1]
    close(*both, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=needs), times=times)


def test_cross_attention_equals_peft():
    both = exact(Attention(cross=True), LAYERS)
    assert groups(both[2]) == [2, 1, 1]
    x, context = (torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 5))
    close(*both, x, context)
    both = exact(Attention(), LAYERS)  # k and v get another input than q though they were thought to share it
    close(*both, x, context)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_equal_peft(batch, layout):
    both = exact(Pictures().to(memory_format=layout), ("proj_in", "conv", "proj_out", *LAYERS))
    assert groups(both[2]) == [3, 1, 1, 1]  # the 3 x 3 convolution stays peft's
    x = torch.randn(batch, 8, 4, 6, dtype=torch.float64).to(memory_format=layout)
    close(*both, x.requires_grad_())


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_what_is_not_plain_stays_pefts(config):
    both = exact(Attention(), LAYERS, **config)
    assert groups(both[2]) == []
    torch.manual_seed(0)
    if "lora_dropout" not in config:
        close(*both, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))


def test_checkpointing_adds_gradients_once():
    both = exact(Attention(), LAYERS)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    close(*both, x, wrap=lambda m: lambda *a: checkpoint(m, *a, use_reentrant=False, preserve_rng_state=False))


def flux_pair(kind, folder, layers: int = 2):
    """Two equal tiny FLUX.1s in float32, quantised if `kind` says so, and what both are given."""
    torch.manual_seed(0)
    tiny_flux(layers).save_pretrained(folder)

    def load():
        if kind:
            return sl.load_quantized(FluxTransformer2DModel, folder, kind, torch.float32, "cpu")
        return FluxTransformer2DModel.from_pretrained(folder)

    given = {"hidden_states": torch.randn(1, 6, 16), "encoder_hidden_states": torch.randn(1, 4, 32),
             "pooled_projections": torch.randn(1, 32), "guidance": torch.ones(1), "timestep": torch.ones(1) * 0.5,
             "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(4, 3)}  # fmt: skip
    return load(), load(), given


def gradients_of(model, given, part, times: int = 2) -> list:
    """A step's gradients, some times over, with a drawing in between."""
    found = []
    for _ in range(times):
        model(**given).sample.square().mean().backward()
        found.append(part.gradients.clone())
        part.gradients.zero_()
        with torch.no_grad():
            found.append(model(**given).sample)
    return found


FLUX_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_swapped_blocks_give_the_same_gradients(tmp_path, kind, checkpointing):
    """Whether autograd keeps weights or not, whatever the order: one block, some, all; and two places hold all of them."""
    plain, swapped, given = flux_pair(kind, tmp_path)
    with_lora_and_checkpoints = []
    for number, model in ((0, plain), *((n, copy.deepcopy(swapped)) for n in (1, 3, 4))):
        if number:
            sl.swap_blocks(model, number, torch.device("cpu"))
        model, part = with_lora(model.train(), targets=FLUX_TARGETS)
        if checkpointing:
            sl.enable_checkpointing(model, dropout=False)
        with_lora_and_checkpoints.append((number, model, gradients_of(model, given, part)))
    expected = with_lora_and_checkpoints[0][2]
    assert expected[0].abs().max() > 0 and torch.equal(expected[0], expected[2])
    for number, model, found in with_lora_and_checkpoints[1:]:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        away = [m for m in model.modules() if isinstance(m, sl.FrozenLinear) and m.stored.numel() == 0]
        assert len({id(m.fetch.func.__self__) for m in away}) == 1
        swap = away[0].fetch.func.__self__
        assert len(swap.copies) == number
        places = {views[1 + p].untyped_storage().data_ptr() for block in swap.copies for views in block for p in (0, 1)}
        assert len(places) == 2


def test_swapped_blocks_are_fetched_once_a_pass(tmp_path):
    """Of N blocks a step copies 2 (N - 2): each forwards and each backwards, but for those that are still there."""
    model, _, given = flux_pair(None, tmp_path)
    sl.swap_blocks(model, 4, torch.device("cpu"))
    swap = next(m for m in model.modules() if isinstance(m, sl.FrozenLinear)).fetch.func.__self__
    model, part = with_lora(model.train(), targets=FLUX_TARGETS)
    sl.enable_checkpointing(model, dropout=False)
    model(**given).sample.sum().backward()
    numbers, copied = [], swap.copy
    swap.copy = lambda number, place: numbers.append(number) or copied(number, place)
    model(**given).sample.sum().backward()
    assert numbers == [2, 3, 1, 0]


@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
@pytest.mark.parametrize("trained", ["attention", "gates", "pooled"])
def test_checkpointing_leaves_the_last_products_out(tmp_path, monkeypatch, kind, trained):
    """The same gradients with fewer products; with all of them where gates are trained, or made of what is."""
    monkeypatch.setattr(sl, "LAST_PRODUCTS", load_script("train_dreambooth_lora_flux_advanced.py").LAST_PRODUCTS)
    targets = (*FLUX_TARGETS, *["norm1.linear"] * (trained == "gates"))
    given, found, products = flux_pair(kind, tmp_path)[2], [], []
    for ways in ({}, {"whole": True}, {"whole": False}):  # of computing again: not at all, all, what is needed
        model, part = with_lora(flux_pair(kind, tmp_path)[0].train(), targets=targets)
        if ways:
            sl.enable_checkpointing(model, dropout=False, **ways)
        pooled, count = given["pooled_projections"].clone().requires_grad_(trained == "pooled"), Count()
        count.names = []
        with count:
            model(**given | {"pooled_projections": pooled}).sample.square().mean().backward()
        found.append((part.gradients.clone(), pooled.grad))
        products.append(sum(name in ("mm", "addmm", "addmm_") for name in count.names))
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-5, atol=1e-8)
    assert found[0][0].any() and (found[0][1] is not None) == (trained == "pooled")
    # 2 double and 2 single blocks: 6 last products, of which 2 (ff.net.2) add a LoRA's
    assert products[1] - products[2] == (6 + 2 if trained == "attention" else 0) and not sl.left_out


def test_more_blocks_than_there_are(tmp_path):
    with pytest.raises(sl.UserError, match="--blocks_to_swap 9: the unet has 4 blocks"):
        sl.swap_blocks(tiny_flux(2), 9, torch.device("cpu"))


def test_encoders_whose_blocks_come_in_one_by_one():
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = t.CLIPTextModel(t.CLIPTextConfig(**sizes, vocab_size=99, projection_dim=32))
    t5 = t.T5EncoderModel(t.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=99))
    ids = torch.randint(0, 90, (2, 7))
    for encoder in (clip, t5):
        encoder.requires_grad_(False).eval()
        before = encoder(ids)[0]
        sl.swap_blocks(encoder, None, torch.device("cpu"))
        away = [m for m in encoder.modules() if isinstance(m, sl.FrozenLinear)]
        assert len(away) >= 18 and not any(m.stored.numel() for m in away)
        torch.testing.assert_close(encoder(ids)[0], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
def test_captions_are_computed_once(streamed, monkeypatch):
    """Alone, so that none depends on another; together where the weights have to come in for each pass."""
    prompts, asked = sl.Prompts.__new__(sl.Prompts), []
    prompts.args, prompts.known = SimpleNamespace(captions_vary=False), {}
    prompts.altered, prompts.streamed, prompts.disk = set(), {"t5"} if streamed else set(), sl.DiskCache(None, "text")

    def compute(key, group):
        asked.append(group)
        return {"hidden": torch.stack([torch.full((4, 2), float(len(text))) for text in group])}

    monkeypatch.setattr(prompts, "compute", compute)
    monkeypatch.setattr(prompts, "text_encoder", lambda key: None)
    for _ in range(2):
        rows = prompts.encode("t5", ["a", "bbb", "a", "cc"])
        assert [row["hidden"].tolist() for row in rows] == [[[[n, n]] * 4] for n in (1.0, 3.0, 1.0, 2.0)]
    assert asked == ([["a", "bbb", "cc"]] if streamed else [["a"], ["bbb"], ["cc"]])


def test_a_batch_is_a_copy_for_each_type():
    def item(k: int) -> dict:
        values = {"pixels": torch.full((3, 2, 5), k, dtype=torch.uint8), "noise": torch.randn(4, 2)}
        return values | {"weight": torch.tensor(0.5), "size": torch.tensor((k, 7)), "caption": f"picture {k}"}

    items = [item(k) for k in range(3)]
    packed = sl.pack_batch(items)
    assert len(packed["buffers"]) == 3
    whole, expected = sl.unpack_batch(packed, torch.device("cpu")), sl.collate(items)
    assert whole.keys() == expected.keys() and whole["captions"] == ["picture 0", "picture 1", "picture 2"]
    assert all(torch.equal(whole[k], expected[k]) for k in expected if k != "captions")


class Recorder(TorchDispatchMode):
    """A CUDA graph on the CPU: notes what is computed, and computes it again with the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tape.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.tape:
            if func.is_view:
                continue
            again = func(*args, **kwargs)
            for first, second in zip(torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(again)):
                if torch.is_tensor(first) and first.data_ptr() != second.data_ptr():
                    first.copy_(second)

    def pool(self):
        return "the graphs' memory"


def test_graphs_give_the_same_gradients(monkeypatch):
    """A graph for each shape, with memory in common; the passes before a recording add nothing; micro-batches add up."""
    model, part = with_lora(Attention())
    pools = []
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)

    @contextlib.contextmanager
    def capture(graph, pool):  # only records: what it computes while it does so must not be seen
        pools.append(pool)
        before = part.gradients.clone()
        with graph:
            yield
        part.gradients.copy_(before)

    monkeypatch.setattr(torch.cuda, "graph", capture)

    def work(given):
        loss = (model(given["x"]) * given["weight"]).square().mean()
        loss.backward()
        part.accumulate_gradients()
        return loss.detach()

    batches = [{"x": torch.randn(2, n, 16), "weight": torch.rand(1), "captions": ["a"]} for n in (5, 3, 5, 3, 5)]
    plain = [(work(batch), part.gradients.clone()) for batch in batches]
    part.gradients.zero_()
    graphs = sl.Graphs([part])
    for (loss, gradients), batch in zip(plain, batches, strict=True):
        kept = {name: value.clone() for name, value in batch.items() if torch.is_tensor(value)}
        torch.testing.assert_close(graphs.run(work, batch), loss)
        torch.testing.assert_close(part.gradients, gradients)
        assert all(torch.equal(batch[name], value) for name, value in kept.items())
    assert pools == [None, "the graphs' memory"]


def test_compiled_blocks(tmp_path, monkeypatch):
    """A kind of block is compiled once, and once more for the first, whose input needs no gradient, however many there are;
    gradients stay; what is drawn meanwhile runs eagerly.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    plain, compiled, given = flux_pair(None, tmp_path, layers=3)
    (plain, part), (compiled, other) = (
        with_lora(m.train(), targets=FLUX_TARGETS, fused=False) for m in (plain, compiled)
    )
    sl.compile_blocks(compiled)
    counters.clear()
    for model in (plain, compiled):
        model(**given).sample.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 4
    for name, parameter in part.items():
        torch.testing.assert_close(other[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    run = SimpleNamespace(denoiser=compiled, lora_modules={}, args=SimpleNamespace(offload=False))
    run.components, run.prompts = SimpleNamespace(vae=torch.nn.Identity), SimpleNamespace(forget=lambda: None)
    run.accelerator = SimpleNamespace(device="cpu")
    with sl.evaluating(run), torch.no_grad():
        compiled(**given | {"hidden_states": torch.randn(1, 8, 16), "img_ids": torch.zeros(8, 3)})
    assert counters["stats"]["unique_graphs"] == 4


def test_adapters_off_on_and_frozen():
    plain, _, fused, part = exact(Attention(), LAYERS)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for model in (plain, fused):
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    torch.testing.assert_close(fused(x), plain(x))
    off = fused(x)
    for model in (plain, fused):
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(True)
    torch.testing.assert_close(fused(x), plain(x))
    assert not torch.allclose(fused(x), off)
    for parameter in part.parameters.values():
        parameter.requires_grad_(False)
    fused(x.requires_grad_()).sum().backward()
    assert not part.micro_gradients.any() and x.grad.any()


def test_half_precision_part():
    """The modules see a bfloat16 shadow; weights and gradients are float32; micro-batches add up."""
    model, part = with_lora(Attention(), torch.bfloat16)
    assert part.weights.dtype == part.gradients.dtype == torch.float32 and part.shadow.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 and p.grad.dtype == torch.bfloat16 for p in part.parameters.values())
    part.weights.data.add_(1.0)
    part.update_shadow()
    assert torch.equal(
        model.to_q.lora_A["default"].weight, part.views(part.weights)["to_q.lora_A.default.weight"].bfloat16()
    )
    sums = torch.zeros_like(part.gradients)
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(2, 5, 16, dtype=torch.bfloat16)).float().square().mean().backward()
        sums += part.micro_gradients
        part.accumulate_gradients()
        assert not part.micro_gradients.any()
    assert torch.equal(part.gradients, sums) and sums.any()


ARGS = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, lr_warmup_steps=0, prodigy_beta3=None)
ARGS.loraplus_lr_ratio, ARGS.optimizer_args = 1.0, {}
ARGS.prodigy_decouple, ARGS.prodigy_use_bias_correction, ARGS.prodigy_safeguard_warmup = True, True, True


def trained_by(name: str, make, steps: int = 6):
    """The weights after some steps with an optimizer over the flat buffer, and over the matrices (or one vector)."""
    out = []
    for flat in (True, False):
        torch.manual_seed(0)
        model, part = with_lora(Attention())
        ARGS.optimizer = name
        if flat:
            part.allocate()
            sl.fuse_lora(model)
            optimizer = sl.make_optimizer(part, ARGS)
        else:
            optimizer = make(part)
        for seed in range(steps):
            torch.manual_seed(seed)
            model(torch.randn(2, 5, 16)).square().mean().backward()
            optimizer.step()
            part.gradients.zero_()
        assert not torch.equal(part.weights.detach(), part.initial)
        out.append(part.weights.detach().clone())
    return out


def test_optimizers_equal_the_libraries():
    from bitsandbytes.optim import AdamW8bit
    from prodigyopt import Prodigy
    from transformers.optimization import Adafactor

    common = {"lr": 1e-3, "weight_decay": 0.01}

    def separate(part):
        values = list(part.parameters.values())
        return torch.optim.AdamW(values, betas=(0.9, 0.99), eps=1e-8, **common)

    torch.testing.assert_close(*trained_by("adamw", separate))
    torch.testing.assert_close(
        *trained_by(
            "prodigy",
            lambda p: Prodigy(
                [p.weights], betas=(0.9, 0.99), eps=1e-8, use_bias_correction=True, safeguard_warmup=True, **common
            ),
        )
    )
    torch.testing.assert_close(
        *trained_by("adamw8bit", lambda p: AdamW8bit([p.weights], betas=(0.9, 0.99), eps=1e-8, **common))
    )
    torch.testing.assert_close(
        *trained_by(
            "adafactor",
            lambda p: Adafactor(
                p.parameters.values(), scale_parameter=False, relative_step=False, warmup_init=False, **common
            ),
        )
    )


def test_prodigy_finds_the_same_step_size_from_a_small_start():
    """d grows over many steps as the library's does, and a part without gradients stays."""
    from prodigyopt import Prodigy

    found = []
    for own in (True, False):
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(64))
        optimizer = (sl.waitless_prodigy(Prodigy) if own else Prodigy)([weights], lr=1.0, weight_decay=0.01)
        for step in range(60):
            weights.grad = (weights.detach() - 1) * (step > 0)
            optimizer.step()
        found.append((weights.detach(), float(optimizer.param_groups[0]["d"])))
    assert found[1][1] > 1e-3
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert abs(found[0][1] / found[1][1] - 1) < 1e-4


def test_guard():
    model, part = with_lora(Attention())
    guard = sl.StepGuard("cpu", half=False)
    alone = SimpleNamespace(num_processes=1)
    part.gradients.fill_(1.0)
    norm = guard.apply([part], alone, 0.5)
    torch.testing.assert_close(norm, torch.tensor(part.gradients.numel() ** 0.5))
    torch.testing.assert_close(torch.linalg.vector_norm(part.gradients), torch.tensor(0.5), rtol=1e-4, atol=0)
    for bad in (float("nan"), float("inf")):
        for clip in (0.0, 1.0):
            part.gradients.fill_(1.0)[3] = bad
            guard.apply([part, part], alone, clip)
            assert not part.gradients.any()
    assert guard.bad_total == guard.bad_run == 4
    part.gradients.fill_(1.0)
    guard.apply([part], alone, 0.0)
    assert guard.bad_run == 0 and part.gradients.eq(1).all()


@pytest.mark.parametrize("kind,error", [("fp8", 0.0275), ("int8", 0.012), ("nf4", 0.1)])
def test_frozen_weights(kind, error):
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.01
    layer = sl.FrozenLinear(weight, torch.nn.Parameter(torch.randn(96)), kind, torch.float32)
    assert ((layer.weight - weight).norm() / weight.norm()) < error
    layer.to(torch.bfloat16)  # a cast leaves them alone
    assert ((layer.weight - weight).norm() / weight.norm()) < error
    x, saved = torch.randn(3, 7, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert not saved  # nothing but the layer itself
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-4)


def test_fp8_products():
    """What a GPU with fp8 does, on the CPU: forward and input gradient near to those of the dense weights."""
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.01 * torch.logspace(-2, 1, 96)[:, None]
    layer = sl.FrozenLinear(weight, torch.nn.Parameter(torch.randn(96).bfloat16()), "fp8", torch.bfloat16)
    x = torch.randn(70, 256).bfloat16().requires_grad_()
    results = []
    for layer.multiplies_in_fp8 in (False, True):
        out = layer(x)
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]))
    for dense, direct in zip(*results, strict=True):
        assert torch.nn.functional.cosine_similarity(dense.flatten().float(), direct.flatten().float(), 0) > 0.999
        assert (dense - direct).float().norm() / dense.float().norm() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_keeps_rows_of_every_size(dtype):
    """Scales are powers of two, in float32: e4m3's three bits are kept of all rows, and a row of zeros stays one."""
    torch.manual_seed(0)
    x = torch.randn(9, 256) * torch.tensor([0.0, 1e-6, 1e-5, 1e-4, 1e-2, 1, 10, 100, 1000])[:, None]
    x = x.to(dtype)
    rows, scale = sl.to_fp8(x)
    error = (rows.float() * scale - x.float()).norm(dim=1) / x.float().norm(dim=1).clamp(min=1e-30)
    assert rows.float().isfinite().all()
    assert error.max() < 0.03 and not rows[0].float().any()
    assert (scale.frexp().mantissa == 0.5).all() and scale.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_lora_over_frozen_weights_equals_peft(kind, config):
    torch.manual_seed(0)
    model = Attention()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, sl.FrozenLinear(layer.weight.data, layer.bias, kind, torch.float32))
    model, part = with_lora(model, **config)
    assert groups(model) == ([] if config else [3, 1])
    x = torch.randn(2, 5, 16)
    out = model(x)
    out.square().mean().backward()
    mine = part.gradients.clone()
    part.gradients.zero_()
    for module in model.modules():
        vars(module).pop("forward", None)  # peft's again
    theirs = model(x)
    theirs.square().mean().backward()
    torch.testing.assert_close(out, theirs)
    torch.testing.assert_close(mine, part.gradients, rtol=1e-4, atol=1e-6)


def test_only_8_bits_are_kept():
    """With checkpointing or without: no dense weight, no input of a frozen layer without LoRA, survives the forward."""
    weights = [torch.randn(64, 64) for _ in range(4)]
    for kind in KINDS:
        layers = torch.nn.Sequential(*(sl.FrozenLinear(w, None, kind, torch.float32) for w in weights))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            layers(torch.randn(3, 64, requires_grad=True))
        assert not saved


def tiny_flux(layers: int = 1):
    return FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_load_quantized(tmp_path, kind, shards):
    torch.manual_seed(0)
    model = tiny_flux()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1000 if shards > 1 else "10GB")
    loaded = sl.load_quantized(FluxTransformer2DModel, tmp_path, kind, torch.bfloat16, "cpu")
    layers = {n for n, m in loaded.named_modules() if isinstance(m, sl.FrozenLinear)}
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"} <= layers
    assert not any(n in layers for n in ("x_embedder", "context_embedder", "proj_out", "norm_out.linear"))
    assert loaded.dtype == torch.bfloat16 and not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    for name in layers:
        dense = model.get_submodule(name)
        bound = {"fp8": 0.04, "int8": 0.02, "nf4": 0.15}[kind]
        assert (loaded.get_submodule(name).weight.float() - dense.weight).norm() / dense.weight.norm() < bound
    x = {"hidden_states": torch.randn(1, 6, 16), "encoder_hidden_states": torch.randn(1, 4, 32),
         "pooled_projections": torch.randn(1, 32), "guidance": torch.ones(1), "timestep": torch.ones(1) * 0.5,
         "img_ids": torch.zeros(6, 3), "txt_ids": torch.zeros(4, 3)}  # fmt: skip
    with torch.no_grad():
        first, second = model(**x).sample, loaded(**{k: v.bfloat16() for k, v in x.items()}).sample.float()
    assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), 0) > 0.97


def test_load_quantized_says_what_is_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny_flux().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("transformer_blocks.0.norm1.linear.bias")
    save_file(state, file)
    with pytest.raises(sl.UserError, match=r"norm1\.linear\.bias"):
        sl.load_quantized(FluxTransformer2DModel, tmp_path, "int8", torch.bfloat16, "cpu")


def test_load_quantized_holds_one_file_at_a_time(tmp_path):
    """Resident memory rises by no more than a file, the result and some rows in float32.

    The threshold has freed memory given back, where glibc would keep it for the next tensors.
    """
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=0, num_single_layers=32, attention_head_dim=16, num_attention_heads=32,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    ).to(torch.bfloat16)  # fmt: skip
    size = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // 8)
    del model
    code = f"""
import re, sys
import importlib.util, torch
spec = importlib.util.spec_from_file_location("script", {str(ROOT / "train_lora_sdxl.py")!r})
step_layers = importlib.util.module_from_spec(spec)
sys.modules["script"] = step_layers
spec.loader.exec_module(step_layers)
step_layers.import_libraries()
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.ones(512, 512) @ torch.ones(512, 512)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
folder = step_layers.Path({str(tmp_path)!r})
model = step_layers.load_quantized(FluxTransformer2DModel, folder, "int8", torch.bfloat16, "cpu")
print(status("VmHWM") - before, status("VmRSS") - before)
"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1"}
    peak, after = map(int, subprocess.run([sys.executable, "-c", code], check=True, stdout=-1, env=env).stdout.split())
    print(f"base {size >> 20} MiB, peak {peak >> 20} MiB, after {after >> 20} MiB")
    assert peak < size * (1 / 2 + 1 / 8) + (40 << 20)


def test_averaged_and_state():
    model, part = with_lora(Attention(), torch.bfloat16)
    part.ema = SimpleNamespace(copy_to=lambda ps: [p.data.fill_(0.5) for p in ps])
    before = part.weights.detach().clone()
    with sl.averaged([part]):
        assert part.shadow.eq(0.5).all()
    assert torch.equal(part.weights, before) and torch.equal(part.shadow, before.bfloat16())


def test_lora_state_is_the_float32_one():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), cross_attention_dim=8, norm_num_groups=4, attention_head_dim=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False).to(torch.bfloat16)  # fmt: skip
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    part = sl.Part("denoiser", {n: p for n, p in unet.named_parameters() if p.requires_grad}, 1e-3, 0, 9)
    part.allocate(torch.bfloat16)
    sl.fuse_lora(unet)
    part.weights.data.normal_(std=0.1)
    part.update_shadow()
    state, views = sl.lora_state(unet, [part]), part.views(part.weights.detach())
    assert len(state) == len(views)
    assert all(torch.equal(views[k.replace(".weight", ".default.weight")], v) for k, v in state.items())
    found, inputs = [], (torch.randn(1, 4, 8, 8).bfloat16(), 5, torch.randn(1, 3, 8).bfloat16())
    for checkpointing in (False, True):
        if checkpointing:
            sl.enable_checkpointing(unet.train(), dropout=False)
        unet(*inputs).sample.float().square().mean().backward()
        part.accumulate_gradients()
        found.append(part.gradients.clone())
        part.gradients.zero_()
    assert torch.equal(*found) and all(v.any() for v in part.views(found[0]).values())


class Count(TorchDispatchMode):
    """Operations that would start a kernel."""

    FREE = ("empty", "new_empty", "detach", "alias", "_unsafe_view")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_a_layer(dtype):
    """A LoRA layer is 3 operations forwards and 5 backwards; three of one input are 7 and 11."""
    model, part = with_lora(Attention(), dtype)
    x, count = torch.randn(5, 16, dtype=dtype, requires_grad=True), Count()
    for module, forwards, backwards in ((model.to_out[0], 3, 5), (None, 7, 11)):
        count.names = []
        with count:
            outs = [module(x.repeat(1, 2))] if module else [layer(x) for layer in (model.to_q, model.to_k, model.to_v)]
        assert len([n for n in count.names if n != "repeat"]) == forwards, count.names
        count.names = []
        gradients = [torch.randn_like(out) for out in outs]
        with count:
            torch.autograd.backward(outs, gradients)
        spare = [n for n in count.names if not n.startswith(("mm", "addmm"))]
        assert len(count.names) - len(spare) == backwards, count.names
    count.names = []
    with count:
        part.accumulate_gradients()
        part.update_shadow()
    assert len(count.names) == (3 if dtype != torch.float32 else 0)


def test_queries_and_keys_are_turned_as_the_library_does():
    """In half precision a gradient is nearer to the exact one than the library's, which is rounded on two ways and added."""
    from diffusers.models import embeddings, transformers

    load_script("train_dreambooth_lora_flux_advanced.py").lighten(tiny_flux())
    angles = embeddings.FluxPosEmbed(10000, [4, 6, 6])(torch.arange(15.0).view(5, 3))
    states, gradient = torch.randn(2, 5, 3, 16).bfloat16(), torch.randn(2, 5, 3, 16).bfloat16()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for turn in (embeddings.apply_rotary_emb, transformers.transformer_flux.apply_rotary_emb):
            x, count = states.to(dtype, copy=True).requires_grad_(), Count()
            count.names = []
            with count:
                result = turn(x, angles, sequence_dim=1)
                result.backward(gradient.to(dtype))
            found.setdefault(dtype, []).append((result, x.grad, len(count.names)))
        theirs, ours = found[dtype]
        assert ours[2] < 0.7 * theirs[2]
        torch.testing.assert_close(ours[0], theirs[0])
    (exact, same), (theirs, ours) = found.values()
    torch.testing.assert_close(same[1], exact[1])
    assert (ours[1] - exact[1]).norm() < (theirs[1] - exact[1]).norm()


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v"), ("to_q", "proj_mlp", "proj_out")])
def test_a_single_block_computes_what_the_librarys_does(targets):
    """FLUX.1's: attention first, the MLP's gelu and its gradient in place; checkpointed too, with a LoRA on either side."""
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    plain, trained, fused, part = exact(FluxSingleTransformerBlock(32, 2, 16), targets)
    flux = load_script("train_dreambooth_lora_flux_advanced.py")
    flux.lighten(SimpleNamespace(single_transformer_blocks=[fused]))
    states = [torch.randn(2, n, 32, dtype=torch.float64) for n in (6, 4)]
    temb, gradients = torch.randn(2, 32, dtype=torch.float64), [torch.randn_like(x) for x in states]

    def checkpointed(block, *given):
        return checkpoint(block, *given, use_reentrant=False)

    def found(run, block, trained: dict) -> list:
        given = [x.clone().requires_grad_() for x in states]
        results = run(block, *given, temb)
        torch.autograd.backward(results, gradients[::-1])
        of_weights = [p.grad.clone() for _, p in sorted(trained.items())]
        for parameter in trained.values():
            parameter.grad.zero_()
        return [*results, *(x.grad for x in given), *of_weights]

    wanted = found(torch.nn.Module.__call__, plain, trained)
    assert all(gradient.any() for gradient in wanted)
    for run in (torch.nn.Module.__call__, checkpointed):
        torch.testing.assert_close(found(run, fused, part.parameters), wanted, rtol=1e-6, atol=1e-9)
