"""Times a training script against another one: start-up, seconds per step, peak memory.

    python scripts/measuring/benchmark.py --against path/to/train_text_to_image_lora.py --width 64 --resolution 256 \\
        --our_flags="--cache_latents" -- --rank 8 --learning_rate 1e-4

Flags after `--` go to both scripts. The base is built from the real configuration of Stable Diffusion 1.5 at a chosen
width (320 is the real one) with random weights, which cost as much as trained ones; the pictures are drawn. Each round
runs both scripts, one after the other and in turn first, once with few steps and once with more: the difference gives
the seconds per step, what is left is start-up, saving and shut-down. Medians over the rounds, and the ratio, are printed.
Peak memory is that of the process (on a GPU: what nvidia-smi shows for it as well).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.released_models import NOISE, VAE
from scripts.parts.training_scripts import ROOT


def build_base(folder: Path, width: int) -> Path:
    """A diffusers folder of the Stable Diffusion 1.5 architecture with random weights; kept for the next time."""
    if (folder / "model_index.json").is_file():
        return folder
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "toy_sd15" / "tokenizer")
    text_width = max(64, 768 * width // 320 // 64 * 64)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            num_hidden_layers=12,
            num_attention_heads=text_width // 64,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=min(32, width // 2),
    )
    vae_width = max(32, 128 * width // 320 // 32 * 32)
    vae = AutoencoderKL(**VAE | {"block_out_channels": (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width)})
    scheduler = DDPMScheduler(**NOISE, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"base of width {width} in {folder}: UNet with {millions:.0f} million parameters")
    return folder


def draw_pictures(folder: Path, count: int, size: int) -> Path:
    """A folder of captioned pictures for both scripts."""
    from scripts.toys.parts.toy_world import describe, draw, random_scene

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    for i in range(count):
        scene = random_scene(rng)
        draw(*scene, rng, size).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": describe(*scene)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def gpu_memory(pid: int) -> float:
    """MiB that nvidia-smi shows for a process and its children's group, or 0 without a GPU."""
    try:
        command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return 0.0
    rows = [line.split(",") for line in lines if line.strip()]
    return sum(float(memory) for owner, memory in rows if int(owner) == pid)


def measure(command: list[str], log: Path) -> tuple[float, float, float, float]:
    """Runs a command. Returns (wall seconds, CPU seconds, peak process MiB, peak GPU MiB)."""
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)
        peak, over = [0.0], threading.Event()

        def watch() -> None:
            while gpu_memory(process.pid) >= 0 and not over.wait(0.5):
                peak[0] = max(peak[0], gpu_memory(process.pid))

        watcher = threading.Thread(target=watch)
        if Path("/dev/nvidiactl").exists():
            watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        over.set()
        if watcher.is_alive():
            watcher.join()
    if status:
        print(f"failed: {' '.join(command)}\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise SystemExit(1)
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, peak[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training script against another one.")
    parser.add_argument("--script", default="train_lora_sd15.py", help="our script")
    parser.add_argument("--against", required=True, help="the other script")
    parser.add_argument("--width", type=int, default=64, help="of the UNet's first level; 320 is the real one (64)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels (256)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 12), metavar=("FEW", "MORE"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument(
        "--our_flags", default="", help='flags for our script alone, such as --our_flags="--cache_latents"'
    )
    parser.add_argument("--their_flags", default="", help="flags for the other script alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("flags", nargs="*", help="after --: flags for both")
    args = parser.parse_args()
    base = build_base(ROOT / "build" / "benchmark" / f"sd15-{args.width}", args.width)
    rounds: dict[str, list[dict]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as work:
        pictures = draw_pictures(Path(work) / "pictures", args.images, args.resolution)
        both = [
            *("--pretrained_model_name_or_path", str(base), "--train_data_dir", str(pictures)),
            *(
                "--resolution",
                str(args.resolution),
                "--train_batch_size",
                str(args.batch_size),
                "--seed",
                "0",
                *args.flags,
            ),
        ]
        scripts = {
            "ours": (args.script, ["--skip_final_inference", "--report_to", "none", *shlex.split(args.our_flags)]),
            "theirs": (args.against, shlex.split(args.their_flags)),
        }
        for number in range(args.rounds):
            for name in list(scripts)[:: 1 if number % 2 == 0 else -1]:
                script, own = scripts[name]
                results = []
                for steps in args.steps:
                    output = Path(work) / f"{name}-{number}-{steps}"
                    command = [sys.executable, script, *both, *own, "--max_train_steps", str(steps)]
                    results.append(measure([*command, "--output_dir", str(output)], Path(work) / "log"))
                (few, _, _, _), (more, cpu, memory, gpu) = results
                step = (more - few) / (args.steps[1] - args.steps[0])
                row = {"step": step, "start": few - args.steps[0] * step, "cpu": cpu, "memory": memory, "gpu": gpu}
                rounds[name].append(row)
                print(f"round {number + 1} {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in rounds.items()}
    print(f"\n{'':28}{'ours':>10}{'theirs':>10}   theirs/ours")
    labels = {
        "start": "start-up, seconds",
        "step": "seconds per step",
        "cpu": "CPU seconds, all",
        "memory": "peak memory, MiB",
    }
    labels |= {"gpu": "peak GPU memory, MiB"} if medians["ours"]["gpu"] else {}
    for key, label in labels.items():
        ours, theirs = medians["ours"][key], medians["theirs"][key]
        print(f"{label:28}{ours:10.3f}{theirs:10.3f}   {theirs / ours:.2f}")
    if args.json:
        args.json.write_text(
            json.dumps({"settings": vars(args) | {"json": None}, "rounds": rounds, "medians": medians}, indent=1)
        )


if __name__ == "__main__":
    main()
