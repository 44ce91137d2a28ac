"""What makes a step small and fast: frozen and quantised layers, fused LoRA products, block swap, checkpointing, graphs."""
