"""Starts a training script as `accelerate launch` does, with the script's own exit code and no traceback.

    python scripts/start/launch.py --config_file config/accelerate_config_multi_gpu.yaml SCRIPT [flags]

It takes the flags of `accelerate launch`; what can't work is one line, before anything is started.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from lora_training import exits
from lora_training.launch import accelerate_launcher
from lora_training.launch.env_file import load_env_file
from scripts.start.process import ROOT, become, program


def main(argv: list[str] | None = None) -> int:
    load_env_file(ROOT / ".env")
    parser = accelerate_launcher.launcher_parser(Path(sys.argv[0]).name)
    args = parser.parse_args(argv)
    # ValueError and AssertionError: what accelerate finds wrong with its configuration
    with exits.exit_code(program(), user_errors=(ValueError, OSError, AssertionError)) as outcome:
        outcome.crash_log = f"{program()}-crash.log"
        resolved = accelerate_launcher.resolve_configuration(args)
        accelerate_launcher.check_machine(resolved, accelerate_launcher.count_gpus())
        accelerate_launcher.check_first_machine(resolved)
        if accelerate_launcher.needs_processes(resolved):
            outcome.code = accelerate_launcher.launch_processes(args, resolved.num_machines)
        else:
            outcome.code = become(*accelerate_launcher.single_process_command(resolved))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
