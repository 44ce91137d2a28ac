"""Tensors kept on disk under a hash of what they were computed from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from lora_training.console import print_status
from lora_training.errors import one_line
from lora_training.files import atomic_write
from lora_training.tensors import hash_tensors, read_safetensors


class DiskCache:
    """safetensors files in a folder, named by a hash of what they were computed from; without a folder,
    nothing.

    Each has a hash of its key and its tensors in its metadata: one that is damaged, or another's, is computed
    anew.
    """

    def __init__(self, folder: str | None, kind: str) -> None:
        self.folder, self.damaged, self.full = Path(folder) / kind if folder else None, 0, False

    def load(self, *place: object) -> dict | None:
        """The tensors stored under this key, or None; a damaged file counts as missing."""
        if self.folder is None or not (file := self.file(place)).is_file():
            return None
        try:
            tensors, metadata = read_safetensors(file)
            if metadata.get("sha256") == hash_tensors(tensors, place):
                return tensors
        except Exception:  # safetensors has no public base class for damage
            pass
        self.damaged += 1
        if self.damaged <= 3:
            more = "; further ones are not named" if self.damaged == 3 else ""
            print_status(f"warning: cache file {file.name} is damaged and made anew{more}")
        return None

    def store(self, tensors: dict, *place: object) -> None:
        """Writes tensors under this key, so that a reader never sees half a file; what can't be written is
        done without.
        """
        if self.folder is None or self.full:
            return
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file(place)) as part:
                save_file(tensors, part, metadata={"sha256": hash_tensors(tensors, place)})
        except (OSError, SafetensorError) as error:
            self.full = True
            print_status(
                f"warning: {self.folder} can't be written to ({one_line(error)}): the rest is kept in memory alone"
            )

    def file(self, place: tuple) -> Path:
        return self.folder / (hashlib.sha256("|".join(map(str, place)).encode()).hexdigest() + ".safetensors")
