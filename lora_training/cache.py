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
    """safetensors files in a folder, named by a hash of what they were computed from.

    Each has a hash of its key and its tensors in its metadata: one that is damaged, or another's, is computed
    anew. Without a folder nothing is stored.
    """

    def __init__(self, folder: str | None, kind: str) -> None:
        """kind: a folder inside `folder`."""
        self.folder = Path(folder) / kind if folder else None
        self.damaged, self.is_full = 0, False  # damaged: files found so far

    def load(self, *key: object) -> dict | None:
        """The tensors stored under this key, or None; a damaged file counts as missing."""
        if self.folder is None or not (file := self.file(key)).is_file():
            return None
        try:
            tensors, metadata = read_safetensors(file)
            if metadata.get("sha256") == hash_tensors(tensors, key):
                return tensors
        except Exception:  # safetensors has no public base class for damage
            pass
        self.damaged += 1
        if self.damaged <= 3:
            more = "; further ones are not named" if self.damaged == 3 else ""
            print_status(f"warning: cache file {file.name} is damaged and made anew{more}")
        return None

    def store(self, tensors: dict, *key: object) -> None:
        """Writes tensors under this key in one step; where that can't be done, all later ones are skipped."""
        if self.folder is None or self.is_full:
            return
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file(key)) as part:
                save_file(tensors, part, metadata={"sha256": hash_tensors(tensors, key)})
        except (OSError, SafetensorError) as error:
            self.is_full = True
            reason = one_line(error)
            print_status(
                f"warning: {self.folder} can't be written to ({reason}): the rest stays in memory alone"
            )

    def file(self, key: tuple) -> Path:
        """The file of a key."""
        name = hashlib.sha256("|".join(map(str, key)).encode()).hexdigest()
        return self.folder / f"{name}.safetensors"
