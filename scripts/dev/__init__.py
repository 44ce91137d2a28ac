"""What only those who work on the project need: toy bases, planted faults, attacks, benchmarks."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
