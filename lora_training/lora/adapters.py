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
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse

    from lora_training.optim.parts import TrainedPart

# attention's layers in the original code, and here
ORIGINAL_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}



def find_target_layers(
    denoiser, args: argparse.Namespace, usual: tuple[str, ...], idle: tuple[str, ...]
) -> list[str]:
    """Full names of the modules that get a LoRA. A name in --lora_layers is a module's last part (`to_q`), a full name, or a
    block prefix (`mid_block`), which means the usual layers inside; idle: beginnings of names of layers
    whose output nothing reads. Errors: UserError for what matches nothing.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = [n for n, m in denoiser.named_modules() if isinstance(m, kinds) and not n.startswith(idle)]

    def ends(name: str, part: str) -> bool:
        return name == part or name.endswith("." + part)

    entries = [e.strip() for text in args.lora_layers or [] for e in text.split(",") if e.strip()]
    entries, chosen = [ORIGINAL_NAMES.get(e, e) for e in entries], []
    prefixes = block_prefixes(denoiser, args.family.block_lists)
    for block in (b.strip() for text in args.lora_blocks or [] for b in text.split(",")):
        if not block.isdecimal():
            entries.append(block)
        elif int(block) >= len(prefixes):
            raise UserError(f"--lora_blocks {block}: the blocks are 0 to {len(prefixes) - 1}")
        else:
            chosen.append(prefixes[int(block)])
    found = set()
    for entry in entries or usual:
        matched = {n for n in modules if ends(n, entry)}
        matched |= {n for n in modules if n.startswith(entry + ".") and any(ends(n, t) for t in usual)}
        if not matched and entries:
            parts = sorted({".".join(n.split(".")[-k:]) for n in modules for k in (1, 2)} | set(prefixes))
            near = difflib.get_close_matches(entry, parts, n=3, cutoff=0.3)
            known = ", ".join(near or parts[:5])
            raise UserError(
                f"--lora_layers {entry} matches no layer of the {args.family.denoiser}; near it are {known}"
            )
        found |= {n for n in matched if not chosen or n.startswith(tuple(f"{p}." for p in chosen))}
    if not found:
        raise UserError("--lora_layers and --lora_blocks together match no layer")
    return sorted(found)


def add_lora(module, targets: list[str], args: argparse.Namespace, start: dict | None = None) -> None:
    """Adds a LoRA of --lora_type to a module; its parameters are float32 whatever the base is. start: weights with peft's keys.

    Every process draws the same start: the seed depends on nothing else.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    from peft.utils import set_peft_model_state_dict

    torch.manual_seed(stable_seed(args.seed, "lora", len(targets)))
    kind, common = args.init_lora_weights, {"r": args.rank, "target_modules": targets}
    alpha = args.lora_alpha * (math.sqrt(args.rank) if args.use_rslora else 1)
    try:
        if args.lora_type == "loha":
            config = LoHaConfig(**common, alpha=alpha)
        elif args.lora_type == "lokr":  # as LyCORIS starts it: the larger factor at zero
            config = LoKrConfig(
                **common, alpha=alpha, decompose_factor=args.lokr_factor, init_weights="lycoris"
            )
        else:
            config = LoraConfig(
                **common,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights={"default": True, "true": True}.get(kind.lower(), kind.lower()),
                use_dora=args.use_dora,
                use_rslora=args.use_rslora,
            )
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(f"--init_lora_weights {kind}: {' '.join(str(error).split())[:200]}") from None
    if start:
        prefix = "text_model." if hasattr(module, "text_model") else ""
        own = {prefix + key.removeprefix("text_model."): value for key, value in start.items()}
        try:
            strays = set_peft_model_state_dict(module, own).unexpected_keys
        except RuntimeError as error:
            raise UserError(
                f"--init_lora {args.init_lora}: its layers are of another size: {one_line(error)}"
            ) from None
        if strays:
            raise UserError(
                f"--init_lora {args.init_lora}: {len(strays)} keys fit no layer trained, such as {strays[0]}"
            )
    cast_training_params(module, torch.float32)


def lora_parameters(module) -> dict:
    """The trainable parameters of a module with a LoRA, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def lora_state(module, parts: list[TrainedPart] = ()) -> dict:
    """A copy of the LoRA's weights with peft's keys, on the CPU in float32; those of `parts` from their own buffers."""
    from peft.utils import get_peft_model_state_dict

    pairs = [(part.parameters, part.views(part.weights.detach())) for part in parts]
    masters = {parameter: views[name] for owned, views in pairs for name, parameter in owned.items()}
    state = {name: masters.get(p, p) for name, p in module.named_parameters() if ADAPTER.search(name)}
    state = get_peft_model_state_dict(module, state_dict=state)
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in state.items()}


def add_denoiser_lora(
    denoiser, args: argparse.Namespace, usual: tuple[str, ...], idle: tuple[str, ...], start: dict | None
) -> None:
    """Adds a LoRA to the denoiser: to the layers that the flags name, else those of `start`, else the usual ones.

    usual, idle: as `find_target_layers` takes them. start: --init_lora's weights with peft's keys.
    """
    started = sorted({ADAPTER.split(key)[0] for key in start or ()})
    named = args.lora_layers or args.lora_blocks
    targets = started if started and not named else find_target_layers(denoiser, args, usual, idle)
    with progress("adding the LoRA"):
        add_lora(denoiser, targets, args, start)
    settings = f"{LORA_TYPES[args.lora_type]} of rank {args.rank}, alpha {args.lora_alpha:g}"
    print_status(f"{settings} on {len(targets)} layers of the {args.family.denoiser}")
