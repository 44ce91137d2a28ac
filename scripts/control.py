"""Asks something of a training that goes on: to draw, to save, to stop, without a signal.

    python scripts/control.py output/mine --sample            # pictures of this step, with the same seeds
    python scripts/control.py output/mine --save              # a checkpoint of this step
    python scripts/control.py output/mine --stop              # a checkpoint, then the end, as by Ctrl-C
    python scripts/control.py output/mine --skip_validation   # no more pictures of this validation

It works on every system and over a shared disk. The run sees it after its step (several processes within
ten) and says so in its log. What is trained stays the same to the bit. Exit status 1: no run has answered.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which has the library

from lora_training.errors import UserError
from lora_training.exits import run_command
from lora_training.report.run_state import has_owner
from lora_training.training.requests import REQUESTS, send_requests, take_requests, waiting_requests


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Asks something of a training that goes on.")
    parser.add_argument("folder", type=Path, help="the output folder of the run")
    for name, about in REQUESTS.items():
        parser.add_argument(f"--{name}", action="append_const", dest="requests", const=name, help=about)
    wait_help = "how long to wait for the run to see it (60; 0: not at all)"
    parser.add_argument("--wait", type=float, default=60, metavar="SECONDS", help=wait_help)
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if not args.requests:
        raise UserError(f"name what is asked for: {', '.join(f'--{name}' for name in REQUESTS)}")
    if args.folder.is_dir() and not has_owner(args.folder):
        raise UserError(f"{args.folder}: no run writes there now")
    send_requests(args.folder, args.requests)
    end = time.monotonic() + args.wait
    while waiting_requests(args.folder) and time.monotonic() < end:
        if not has_owner(args.folder):
            take_requests(args.folder)
            raise UserError(f"{args.folder}: the run has ended before it saw this")
        time.sleep(0.1)
    if waiting := waiting_requests(args.folder):
        print(f"not seen yet: {', '.join(waiting)}; the run sees it after its step")
        return int(args.wait > 0)
    print(f"seen: {', '.join(args.requests)}; {args.folder / 'log.txt'} says more")
    return 0


if __name__ == "__main__":
    sys.exit(main())
