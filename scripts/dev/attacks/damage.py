"""Damages to files, drawn by a generator: cut, flipped, random, or well-formed with wrong content."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from pathlib import Path

from scripts.dev.attacks.odd_values import odd_values

OTHER_TEXTS = (
    "", "null", "[]", "{}", "[" * 50_000, '{"a": 1}', "a: 1", "\x00" * 100, "text", "\n\n", "- a\n- b\n",
    "&a [*a]", "!!python/name:os.system", "a: &x [*x]", "{a: b",
)  # fmt: skip
OTHER_ROWS = (
    b'"', b'"a', b",,,,,", b"a", b"", b"\0", b"file_name,file_name", b"../x,y", b"a\rb,c", b"x" * 200_000,
    b",a", b'"",""',
)  # fmt: skip


# ---- damages to bytes --------------------------------------------------------------------------------------


def cut(raw: bytes, rng: random.Random) -> bytes:
    lengths = (0, 1, 7, 8, 9, len(raw) // 2, max(0, len(raw) - 1), rng.randrange(len(raw) + 1))
    return raw[: rng.choice(lengths)]


def flip(raw: bytes, rng: random.Random) -> bytes:
    """One to twenty bits, in half of the draws near the beginning."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 20))):
        offset = rng.randrange(min(len(out), rng.choice((64, 4096, 1 << 40)))) if out else 0
        if out:
            out[offset] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwritten(raw: bytes, rng: random.Random) -> bytes:
    size = min(len(raw), rng.choice((1, 8, 100, 5000)))
    offset = rng.randrange(len(raw) - size + 1)
    filling = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b" " * size))
    return raw[:offset] + filling + raw[offset + size :]


def moved(raw: bytes, rng: random.Random) -> bytes:
    """A stretch that is there twice, or missing, or at another place; or something put between."""
    a, b = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    inserted = raw[:a] + rng.randbytes(9) + raw[a:]
    return rng.choice((raw[:b] + raw[a:], raw[:a] + raw[b:], raw[b:] + raw[:b], inserted))


def replaced(raw: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    other = (
        rng.randbytes(rng.choice((1, 8, 300))),
        raw.decode("latin-1").encode("utf-16")[:100_000],
        b"\xef\xbb\xbf" + raw,
        raw.replace(b"\n", b"\r"),
    )
    return rng.choice((*[text.encode() for text in OTHER_TEXTS], *other))


BYTE_DAMAGES = (cut, flip, overwritten, moved, replaced)


# ---- wrong content in well-formed files --------------------------------------------------------------------


def paths_inside(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside lists and dictionaries."""
    if isinstance(value, dict):
        inside = value.items()
    else:
        inside = enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, v in inside for p in paths_inside(v, (*path, key))]


def wrong_content(value: object, rng: random.Random) -> object:
    """The same lists and dictionaries, with one to three values or keys that are wrong or missing."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        paths = paths_inside(value)
        if not paths:
            return rng.choice(odd_values("JSON"))
        *parents, last = rng.choice(paths)
        container = value
        for key in parents:
            container = container[key]
        kind = rng.random()
        if kind < 0.65:
            container[last] = copy.deepcopy(rng.choice(odd_values("JSON")))  # which is damaged on, perhaps
        elif kind < 0.9 or isinstance(container, list):
            del container[last]
        else:
            container[str(last) + rng.choice(("x", " ", ".0", "\u00e9"))] = container.pop(last)
    return value


def json_lines(raw: bytes, rng: random.Random) -> bytes:
    """JSON, or a line of JSON lines, with wrong content."""
    try:
        return json.dumps(wrong_content(json.loads(raw), rng)).encode()
    except ValueError:
        lines = raw.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(wrong_content(json.loads(lines[number]), rng)).encode()
        return b"\n".join(lines)


def yaml_content(raw: bytes, rng: random.Random) -> bytes:
    import yaml

    value = wrong_content(yaml.safe_load(raw), rng)
    return yaml.safe_dump(value, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def csv_content(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.split(b"\n")
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(OTHER_ROWS)
    return b"\n".join(lines)


def tensors(raw: bytes, rng: random.Random) -> bytes:
    """A well-formed safetensors file whose header or tensors are wrong."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    names = [name for name in header if name != "__metadata__"]
    change, name = rng.randrange(len(TENSOR_CHANGES)), rng.choice(names)
    TENSOR_CHANGES[change](header, body, name, rng)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(body)


def set_odd_numbers(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    """A number that is none, or too large, in one place or all."""
    begin, end = header[name]["data_offsets"]
    width = {"F32": 4, "F64": 8}.get(header[name]["dtype"], 2)
    odd = {
        4: struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38))),
        8: struct.pack("<d", 1e308),
        2: b"\x80\x7f",
    }[width]
    stop = rng.choice((begin + width, end))
    body[begin:stop] = odd * ((stop - begin) // width)


def set_zeros(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    begin, end = header[name]["data_offsets"]
    body[begin:end] = bytes(end - begin)


def change_shape(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    """The same numbers in another shape."""
    shape = header[name]["shape"]
    header[name]["shape"] = rng.choice((shape[::-1], [*shape, 1], [1, *shape], shape[:1] + [0]))


def change_dtype(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    dtypes = ("F16", "BF16", "I32", "F64", "BOOL", "U8", "F8_E4M3", "X", None, 3)
    header[name]["dtype"] = rng.choice(dtypes)


def change_name(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    respelled = (name + ".y", name.replace(".", "_"), name.replace("lora", "lokr"), "lora_unet_" + name)
    header[rng.choice(("x", "", *respelled))] = header.pop(name)


def change_metadata(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    damaged = wrong_content(header.get("__metadata__") or {"a": "b"}, rng)
    settings = {"lora_adapter_metadata": rng.choice(("{", "[]", "null", '{"a": 1}', '{"unet.r": "x"}'))}
    kohya_settings = {"ss_network_dim": "x", "ss_tag_frequency": "[1]"}
    header["__metadata__"] = rng.choice((damaged, settings, {}, 3, kohya_settings))


def change_offsets(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    begin, end = header[name]["data_offsets"]
    offsets = ([end, begin], [0, 10**15], [-1, 5], [begin], None, [begin, end + 4])
    header[name]["data_offsets"] = rng.choice(offsets)


def remove_tensor(header: dict, body: bytearray, name: str, rng: random.Random) -> None:
    """A tensor less; the others move up."""
    begin, end = header.pop(name)["data_offsets"]
    body[begin:end] = b""
    for entry in header.values():
        if isinstance(entry, dict) and "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]


TENSOR_CHANGES = (
    set_odd_numbers,
    set_zeros,
    change_shape,
    change_dtype,
    change_name,
    change_metadata,
    change_offsets,
    remove_tensor,
)
CONTENT_DAMAGES = {
    ".json": json_lines,
    ".jsonl": json_lines,
    ".yaml": yaml_content,
    ".csv": csv_content,
    ".safetensors": tensors,
}


# ---- files -------------------------------------------------------------------------------------------------


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file, which may be a link; returns how.

    Rarely the file is gone, a folder, or a link to nothing.
    """
    raw, kind = file.read_bytes(), rng.random()
    if kind < 0.06:
        return remove(file, rng)
    apply = CONTENT_DAMAGES.get(file.suffix, cut) if kind < 0.5 else rng.choice(BYTE_DAMAGES)
    try:
        changed = apply(raw, rng)
    except (ValueError, IndexError):  # what is empty or has been damaged already has no content
        apply = replaced
        changed = replaced(raw, rng)
    file.unlink()
    file.write_bytes(changed)
    return apply.__name__


def remove(file: Path, rng: random.Random) -> str:
    """Removes a file, and may put something else there that can't be read; returns what."""
    file.unlink()
    kind = rng.choice(("gone", "a folder", "a link to nothing", "a link to itself"))
    if kind == "a folder":
        file.mkdir()
    elif kind != "gone":
        file.symlink_to("nowhere" if kind == "a link to nothing" else file.name)
    return kind


def linked_copy(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are links, until they are damaged."""

    def link(file: str, copy: str) -> None:
        Path(copy).symlink_to(Path(file).resolve())

    return shutil.copytree(source, target, copy_function=link)
