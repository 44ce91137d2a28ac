"""Commands for what comes before or after training; what they know is in lora_training."""
