"""Trains the toy bases in assets/ from nothing: data, autoencoder, tokenizers, text encoders, denoiser.

    python scripts/dev/toys/train_toy_base.py --family sd15
    python scripts/dev/toys/train_toy_base.py --family sd15 --continue_from assets/toy_sd15 --steps 3000
    python scripts/dev/toys/train_toy_base.py --family flux --continue_from assets/toy_flux --own_drawings \\
        --steps 2000

One command per family does everything, on a CPU (under 45 minutes on two cores) or a GPU. It saves its state
in --work_dir every few hundred steps and continues there when it is started again. The autoencoder is made
once and serves all families. What it writes is a pipeline folder of diffusers with float16 weights.

--continue_from trains a finished base's denoiser alone. How the pieces are made stands in parts/:
toy_autoencoder.py, toy_text.py, toy_models.py, toy_loss.py, toy_drawings.py, toy_training.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# toys are too small for threads, which wait in a spin beside other work
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.dev import ROOT
from scripts.dev.toys.parts.toy_autoencoder import make_autoencoder
from scripts.dev.toys.parts.toy_families import TOY_FAMILIES
from scripts.dev.toys.parts.toy_models import save_base
from scripts.dev.toys.parts.toy_scores import scores, table
from scripts.dev.toys.parts.toy_training import state_file_of, train_base


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Trains a toy base from nothing, or trains one on.")
    add = parser.add_argument
    add("--family", choices=sorted(TOY_FAMILIES), required=True)
    add("--steps", type=int, help="of the denoiser; default: the family's own")
    add("--autoencoder_steps", type=int, default=1600)
    add("--work_dir", type=Path, default=ROOT / "build" / "toy")
    add("--output_dir", type=Path, help="default: assets/toy_FAMILY")
    continue_help = "a base whose denoiser is trained on; default: everything is trained from nothing"
    add("--continue_from", type=Path, help=continue_help)
    drawings_help = "with --continue_from: half of what it is trained on are its own drawings, put right"
    add("--own_drawings", action="store_true", help=drawings_help)
    add("--evaluate_only", action="store_true", help="only score what stands in --output_dir")
    return parser


def train(args: argparse.Namespace) -> None:
    """Trains and writes the base."""
    from diffusers import AutoencoderKL

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.continue_from:
        vae = AutoencoderKL.from_pretrained(args.continue_from / "vae", dtype=torch.float32)
    else:
        vae = make_autoencoder(args.work_dir / "autoencoder", args.autoencoder_steps, device)
    steps = args.steps or TOY_FAMILIES[args.family].steps
    base = train_base(args.family, vae, args.work_dir, steps, device, args.continue_from, args.own_drawings)
    save_base(base, args.output_dir, vae.cpu())
    if args.continue_from:  # what was made may be trained on in its turn
        state_file_of(args.work_dir, args.family, True, args.own_drawings).unlink()


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    args.output_dir = args.output_dir or ROOT / "assets" / f"toy_{args.family}"
    if args.own_drawings and not args.continue_from:
        parser.error("--own_drawings: only with --continue_from, for a base that draws already")
    for folder in filter(None, (args.continue_from, args.output_dir if args.evaluate_only else None)):
        if not (folder / "model_index.json").exists():
            parser.error(f"{folder}: not a base's folder, it has no model_index.json")
    if not args.evaluate_only:
        train(args)
    print(table({args.family: scores(args.output_dir, count=128)}))


if __name__ == "__main__":
    main()
