"""Starts prepare_dataset.py with the settings of .env: what run_prepare_dataset.sh and run_prepare_dataset.bat do.

    python scripts/start/prepare.py [flags of prepare_dataset.py]

--config may be a workflow of Olive, whose image_lora_preprocess section is then run.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.start.parts import olive
from scripts.start.parts.env_file import export, settings_of
from scripts.start.parts.process import ROOT, complain, program
from scripts.start.parts.words import StartError, read_values, taken


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    export(settings_of(ROOT / ".env", os.environ))
    try:
        (file,), others = taken(words, "--config")
        values = read_values(file) if file else None
        if olive.is_workflow(values):
            workflow = olive.translate(values, file)
            if not workflow.prepare:
                raise StartError(f"{file} has no pre_process_data_config with steps: there is nothing to prepare")
            print("\n".join(workflow.notes), flush=True)
            words = [*workflow.prepare, *others]
    except StartError as error:
        return complain(str(error))
    sys.argv = [program(), *words]
    runpy.run_path(str(ROOT / "scripts" / "dataset" / "prepare_dataset.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
