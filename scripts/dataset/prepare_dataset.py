#!/usr/bin/env python
"""Turns a folder of pictures into a training set for every training script, or says what is wrong with one.

    python scripts/dataset/prepare_dataset.py -d photos -o prepared --family sdxl \\
        --image_filtering remove_duplicates=true --auto_caption trigger_word=sks \\
        --aspect_ratio_bucketing resize_images=true
    python scripts/dataset/prepare_dataset.py --config config/prepare_dataset.yaml
    python scripts/dataset/prepare_dataset.py --doctor -d prepared

The steps run in the order of --help, each on what the one before has left. The input is never written to; the
output folder gets the images, a .txt beside each, metadata.jsonl, buckets.json (which the training scripts
follow) and report.html. Run again, it does only what is missing. A .txt that you edit there stays as you
wrote it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training.signals import end_at_once_on_signals

if __name__ == "__main__":  # before libraries are imported
    end_at_once_on_signals("the same command goes on where it stopped")

from lora_training import prepare
from lora_training.errors import UserError, is_out_of_memory
from lora_training.exits import exit_code


def main(argv: list[str] | None = None) -> int:
    """Prepares a data set, or says what is wrong with one. Returns the exit code."""
    with exit_code("prepare_dataset.py", user_errors=(OSError,)) as outcome:
        outcome.crash_log = "prepare_dataset-crash.log"
        settings = prepare.read_settings(argv)
        if settings.doctor:
            outcome.code = prepare.diagnose(settings)
            return outcome.code
        outcome.output_dir = Path(settings.output_dir)
        try:
            prepare.prepare_data_set(settings)
        except KeyboardInterrupt:  # where it was called by another program
            print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
            outcome.code = 130
        except Exception as error:
            if is_out_of_memory(error):
                advice = "lower num_workers or the sizes"
                raise UserError(f"the memory does not suffice: {advice}") from None
            raise
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
