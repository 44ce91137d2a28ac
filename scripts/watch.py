"""Shows training runs in a browser while they go on, and afterwards; it only reads.

    python scripts/watch.py output/mine              # one run
    python scripts/watch.py output --open            # all runs in the folder, in the usual browser

The page follows the run by itself: step, time left, pictures, curves, warnings, the last lines. It is served
on this machine alone; --host 0.0.0.0 lets others in, by an address with a token. Ctrl-C ends it, and no run.
"""

from __future__ import annotations

import argparse
import sys
import webbrowser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which has the library

from lora_training.exits import run_command
from lora_training.report.page_server import make_server


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shows training runs in a browser while they go on.")
    folder_help = "the output folder of a run, or a folder that has several"
    parser.add_argument("folder", type=Path, nargs="?", default=Path("output"), help=folder_help)
    parser.add_argument("--port", type=int, default=8200, help="of the address (8200; 0: any that is free)")
    host_help = "0.0.0.0: other machines see it, too, by an address with a token (default: this one alone)"
    parser.add_argument("--host", default="127.0.0.1", help=host_help)
    parser.add_argument("--open", action="store_true", help="open it in the usual browser")
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    server, address = make_server(args.folder, args.host, args.port)
    print(f"{address} shows {args.folder}; Ctrl-C ends it", flush=True)
    if args.open:
        webbrowser.open(address)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
