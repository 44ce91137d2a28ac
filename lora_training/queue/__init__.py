"""Several trainings one after another: `run_lora_train --queue night.yaml`."""
