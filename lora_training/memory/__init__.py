"""What makes a step small and fast: frozen layers, fused LoRA products, block swap, checkpointing, graphs."""
