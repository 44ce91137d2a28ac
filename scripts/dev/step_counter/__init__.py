"""Counts one training step on a CUDA device that doesn't exist; README.md says how, and what to trust."""
