"""Adapters on a module's layers: which layers, how they start, their parameters."""

from __future__ import annotations

import difflib
import math
from typing import TYPE_CHECKING

import torch

from lora_training.adapter_names import ADAPTER, LORA_TYPES
from lora_training.base_model.sharding import block_prefixes
from lora_training.console import print_status, progress
from lora_training.errors import UserError, one_line
from lora_training.lora.layer_ranks import (
    describe_ranks,
    differing_ranks,
    is_spatial,
    layer_ranks,
    peft_patterns,
)
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse

    from lora_training.optim.parts import TrainedPart

# attention's layers in the original code, and here
ORIGINAL_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}


def find_target_layers(
    denoiser: torch.nn.Module, args: argparse.Namespace, usual: tuple[str, ...], idle: tuple[str, ...]
) -> list[str]:
    """Full names of the modules that get a LoRA by --lora_layers and --lora_blocks.

    An entry of --lora_layers is a module's last part (`to_q`), a full name, or a block prefix (`mid_block`),
    which means the usual layers inside. --conv_rank adds the convolutions in the blocks that see more than
    one pixel. idle: beginnings of names of layers whose output nothing reads.
    Errors: UserError for what matches nothing.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = [n for n, m in denoiser.named_modules() if isinstance(m, kinds) and not n.startswith(idle)]
    block_names = block_prefixes(denoiser, args.family.block_lists)
    entries = [ORIGINAL_NAMES.get(entry, entry) for entry in split_lists(args.lora_layers) if entry]
    blocks = []
    for block in split_lists(args.lora_blocks):
        if not block.isdecimal():
            entries.append(block)
        elif int(block) >= len(block_names):
            raise UserError(f"--lora_blocks {block}: the blocks are 0 to {len(block_names) - 1}")
        else:
            blocks.append(f"{block_names[int(block)]}.")
    targets = set()
    for entry in entries or usual:
        matches = match_layers(entry, modules, usual)
        if not matches and entries:
            known = similar_names(entry, modules, block_names)
            part = args.family.denoiser
            raise UserError(f"--lora_layers {entry} matches no layer of the {part}; near it are {known}")
        targets |= {name for name in matches if not blocks or name.startswith(tuple(blocks))}
    if vars(args).get("conv_rank"):
        inside = tuple(blocks or (f"{name}." for name in block_names))
        convolutions = (name for name in modules if is_spatial(denoiser.get_submodule(name)))
        targets |= {name for name in convolutions if name.startswith(inside)}
    if not targets:
        raise UserError("--lora_layers and --lora_blocks together match no layer")
    return sorted(targets)


def trained_layers(part: str, layers: list[str], args: argparse.Namespace, start: dict | None = None) -> list:
    """Those of a part's layers that --lr_pattern doesn't leave out. start: --init_lora's weights of the part.

    Errors: UserError for layers of `start` that are left out, and for a denoiser of which none is left.
    """
    rates = args.patterns["lr_pattern"]
    trained = [name for name in layers if rates.value(part, name, 1.0)]
    left_out = set(layers) - set(trained)
    started = {ADAPTER.split(key)[0].removeprefix("text_model.") for key in start or ()}
    lost = sorted(name for name in left_out if name.removeprefix("text_model.") in started)
    if lost:
        advice = "a factor such as 1e-6 keeps them as they are"
        raise UserError(f"--lr_pattern leaves out layers that --init_lora has, such as {lost[0]}: {advice}")
    if left_out and not trained and part == args.family.denoiser:
        raise UserError(f"--lr_pattern leaves out every layer of the {part}")
    return trained


def split_lists(texts: list[str] | None) -> list[str]:
    """The entries of a flag that takes several words, each of which may be a list with commas."""
    return [entry.strip() for text in texts or [] for entry in text.split(",")]


def match_layers(entry: str, modules: list[str], usual: tuple[str, ...]) -> set[str]:
    """The modules that an entry of --lora_layers means: by their last parts, or the usual ones inside of a
    block.
    """

    def ends_with(name: str, part: str) -> bool:
        return name == part or name.endswith("." + part)

    matches = {name for name in modules if ends_with(name, entry)}
    inside = (name for name in modules if name.startswith(entry + "."))
    return matches | {name for name in inside if any(ends_with(name, part) for part in usual)}


def similar_names(entry: str, modules: list[str], block_names: list[str]) -> str:
    """Names that might have been meant by an entry of --lora_layers, for an error."""
    last_parts = {".".join(name.split(".")[-count:]) for name in modules for count in (1, 2)}
    names = sorted(last_parts | set(block_names))
    return ", ".join(difflib.get_close_matches(entry, names, n=3, cutoff=0.3) or names[:5])


def add_lora(
    module: torch.nn.Module,
    targets: list[str],
    args: argparse.Namespace,
    start: dict | None = None,
    part: str | None = None,
) -> None:
    """Adds a LoRA of --lora_type to a module; its parameters are float32 whatever the base is.

    start: weights with peft's keys. part: what the pipeline calls the module (default: the denoiser). Every
    process draws the same start: the seed depends on nothing else.
    """
    from diffusers.training_utils import cast_training_params

    torch.manual_seed(stable_seed(args.seed, "lora", len(targets)))
    differing = differing_ranks(module, part or args.family.denoiser, targets, args)
    try:
        module.add_adapter(adapter_config(targets, args, differing))
    except ValueError as error:
        raise UserError(f"--init_lora_weights {args.init_lora_weights}: {one_line(error)}") from None
    if start:
        load_start(module, start, args.init_lora)
    cast_training_params(module, torch.float32)


def adapter_config(targets: list[str], args: argparse.Namespace, differing: dict[str, tuple[int, float]]):
    """peft's configuration of the adapter that the flags say, on the modules `targets`.

    differing: {layer: (rank, alpha)} of those that have others than --rank and --lora_alpha.
    """
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    is_root = args.use_rslora and args.lora_type != "lora"  # which peft has for plain LoRAs alone
    common = {
        "r": args.rank,
        "target_modules": targets,
        "rank_pattern": peft_patterns({n: rank for n, (rank, _) in differing.items() if rank != args.rank}),
    }
    alphas = {n: alpha * (math.sqrt(rank) if is_root else 1) for n, (rank, alpha) in differing.items()}
    alpha = args.lora_alpha * (math.sqrt(args.rank) if is_root else 1)
    common["alpha_pattern"] = peft_patterns({n: own for n, own in alphas.items() if own != alpha})
    if args.lora_type == "loha":
        return LoHaConfig(**common, alpha=alpha)
    if args.lora_type == "lokr":  # as LyCORIS starts it: the larger factor at zero
        options = {"decompose_factor": args.lokr_factor, "init_weights": "lycoris"}
        return LoKrConfig(**common, alpha=alpha, **options)
    start = args.init_lora_weights.lower()
    return LoraConfig(
        **common,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        init_lora_weights={"default": True, "true": True}.get(start, start),
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
    )


def load_start(module: torch.nn.Module, start: dict[str, torch.Tensor], file: str) -> None:
    """Gives an adapter the weights of --init_lora, with peft's keys. Errors: UserError if they don't fit."""
    from peft.utils import set_peft_model_state_dict

    prefix = "text_model." if hasattr(module, "text_model") else ""
    state = {prefix + key.removeprefix("text_model."): value for key, value in start.items()}
    try:
        strays = set_peft_model_state_dict(module, state).unexpected_keys
    except RuntimeError as error:
        raise UserError(f"--init_lora {file}: its layers are of another size: {one_line(error)}") from None
    if strays:
        raise UserError(f"--init_lora {file}: {len(strays)} keys fit no layer trained, such as {strays[0]}")


def lora_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trainable parameters of a module with a LoRA, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def lora_state(module, parts: list[TrainedPart] = ()) -> dict:
    """A copy of the LoRA's weights with peft's keys, on the CPU in float32.

    parts: trained parts, whose buffers hold the master weights.
    """
    from peft.utils import get_peft_model_state_dict

    pairs = [(part.parameters, part.views(part.weights.detach())) for part in parts]
    masters = {parameter: views[name] for owned, views in pairs for name, parameter in owned.items()}
    state = {name: masters.get(p, p) for name, p in module.named_parameters() if ADAPTER.search(name)}
    state = get_peft_model_state_dict(module, state_dict=state)
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in state.items()}


def add_denoiser_lora(
    denoiser, args: argparse.Namespace, usual: tuple[str, ...], idle: tuple[str, ...], start: dict | None
) -> None:
    """Adds a LoRA to the denoiser: to the layers that flags name, else those of `start`, else the usual ones.

    usual, idle: as `find_target_layers` takes them. start: --init_lora's weights with peft's keys.
    """
    part = args.family.denoiser
    started = sorted({ADAPTER.split(key)[0] for key in start or ()})
    named = args.lora_layers or args.lora_blocks
    targets = started if started and not named else find_target_layers(denoiser, args, usual, idle)
    targets = trained_layers(part, targets, args, start)
    with progress("adding the LoRA"):
        add_lora(denoiser, targets, args, start)
    check_patterns(args, denoiser)
    settings = f"rank {args.rank}, alpha {args.lora_alpha:g}"
    if differing_ranks(denoiser, part, targets, args):
        settings = describe_ranks(layer_ranks(denoiser, part, targets, args))
    print_status(f"{LORA_TYPES[args.lora_type]} of {settings} on {len(targets)} layers of the {part}")


def check_patterns(args: argparse.Namespace, denoiser: torch.nn.Module) -> None:
    """Errors: UserError for an entry of --rank_pattern and its like that no layer trained has matched."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    names = [name for name, module in denoiser.named_modules() if isinstance(module, kinds)]
    for encoder in args.family.text_encoders.values() if args.train_text_encoder else ():
        names.append(encoder[1])
    for patterns in args.patterns.values():
        patterns.check_matched(names)
