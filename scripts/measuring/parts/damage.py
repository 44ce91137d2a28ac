"""Damages to files, drawn by a generator: cut, flipped, random, of another kind, or well-formed with wrong content."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path

ODD_JSON = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        float("nan"),
        float("inf"),
        2**70,
        "",
        "x",
        "\ud800",
        "a\u0000b",
        "../../x",
        "/",
        [],
        {},
    ),
    *(
        [[]],
        [None],
        {"a": {}},
        {"": 1},
        [1, "a"],
        "x" * 5000,
        "0",
        "-1",
        "1e999",
        ["a", "b"],
        "{",
        "None",
        "null",
        "\u2028",
        "...",
    ),
)


def cut(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.choice((0, 1, 7, 8, 9, len(raw) // 2, max(0, len(raw) - 1), rng.randrange(len(raw) + 1)))]


def flip(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 20))):
        place = rng.randrange(min(len(out), rng.choice((64, 4096, 1 << 40)))) if out else 0
        if out:
            out[place] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwritten(raw: bytes, rng: random.Random) -> bytes:
    size = min(len(raw), rng.choice((1, 8, 100, 5000)))
    place = rng.randrange(len(raw) - size + 1)
    filling = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), b" " * size))
    return raw[:place] + filling + raw[place + size :]


def moved(raw: bytes, rng: random.Random) -> bytes:
    """A stretch that is there twice, or missing, or at another place; or something put between."""
    a, b = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
    return rng.choice((raw[:b] + raw[a:], raw[:a] + raw[b:], raw[b:] + raw[:b], raw[:a] + rng.randbytes(9) + raw[a:]))


def replaced(raw: bytes, rng: random.Random) -> bytes:
    """Something else altogether."""
    texts = (
        "",
        "null",
        "[]",
        "{}",
        "[" * 50_000,
        '{"a": 1}',
        "a: 1",
        "\x00" * 100,
        "text",
        "\n\n",
        "- a\n- b\n",
        "&a [*a]",
        "!!python/name:os.system",
        "a: &x [*x]",
        "{a: b",
    )
    other = (
        rng.randbytes(rng.choice((1, 8, 300))),
        raw.decode("latin-1").encode("utf-16")[:100_000],
        b"\xef\xbb\xbf" + raw,
        raw.replace(b"\n", b"\r"),
    )
    return rng.choice((*[t.encode() for t in texts], *other))


BYTES = (cut, flip, overwritten, moved, replaced)


def nodes(value: object, path: tuple = ()) -> list[tuple]:
    """Paths to everything inside lists and dictionaries."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for k, v in inside for p in nodes(v, (*path, k))]


def wrong_content(value: object, rng: random.Random) -> object:
    """The same lists and dictionaries, with one to three values or keys that are wrong or missing."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = nodes(value)
        if not places:
            return rng.choice(ODD_JSON)
        *way, last = rng.choice(places)
        holder = value
        for key in way:
            holder = holder[key]
        how = rng.random()
        if how < 0.65:
            holder[last] = rng.choice(ODD_JSON)
        elif how < 0.9 or isinstance(holder, list):
            del holder[last]
        else:
            holder[str(last) + rng.choice(("x", " ", ".0", "\u00e9"))] = holder.pop(last)
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

    return yaml.safe_dump(wrong_content(yaml.safe_load(raw), rng), allow_unicode=rng.random() < 0.5).encode(
        "utf-8", "surrogatepass"
    )


def csv_content(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.split(b"\n")
    number = rng.randrange(len(lines))
    lines[number] = rng.choice(
        (
            b'"',
            b'"a',
            b",,,,,",
            b"a",
            b"",
            b"\0",
            b"file_name,file_name",
            b"../x,y",
            b"a\rb,c",
            b"x" * 200_000,
            b",a",
            b'"",""',
        )
    )
    return b"\n".join(lines)


def tensors(raw: bytes, rng: random.Random) -> bytes:
    """A well-formed safetensors file whose header or tensors are wrong."""
    size = struct.unpack("<Q", raw[:8])[0]
    header, body = json.loads(raw[8 : 8 + size]), bytearray(raw[8 + size :])
    names = [n for n in header if n != "__metadata__"]
    how, name = rng.randrange(8), rng.choice(names)
    entry = header[name]
    begin, end = entry["data_offsets"]
    if how == 0:  # a number that is none, in one place or all
        width = {"F32": 4, "F64": 8}.get(entry["dtype"], 2)
        odd = {
            4: struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38))),
            8: struct.pack("<d", 1e308),
            2: b"\x80\x7f",
        }[width]
        stop = rng.choice((begin + width, end))
        body[begin:stop] = odd * ((stop - begin) // width)
    elif how == 1:
        body[begin:end] = bytes(end - begin)
    elif how == 2:  # the same numbers in another shape
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][:1] + [0])
        )
    elif how == 3:
        entry["dtype"] = rng.choice(("F16", "BF16", "I32", "F64", "BOOL", "U8", "F8_E4M3", "X", None, 3))
    elif how == 4:
        header[
            rng.choice(
                ("x", "", name + ".y", name.replace(".", "_"), name.replace("lora", "lokr"), "lora_unet_" + name)
            )
        ] = header.pop(name)
    elif how == 5:
        header["__metadata__"] = rng.choice(
            (
                wrong_content(header.get("__metadata__") or {"a": "b"}, rng),
                {"lora_adapter_metadata": rng.choice(("{", "[]", "null", '{"a": 1}', '{"unet.r": "x"}'))},
                {},
                3,
                {"ss_network_dim": "x", "ss_tag_frequency": "[1]"},
            )
        )
    elif how == 6:
        entry["data_offsets"] = rng.choice(([end, begin], [0, 10**15], [-1, 5], [begin], None, [begin, end + 4]))
    else:  # a tensor less, and its place
        del header[name]
        body[begin:end] = b""
        for other in header.values():
            if isinstance(other, dict) and "data_offsets" in other and other["data_offsets"][0] >= end:
                other["data_offsets"] = [o - (end - begin) for o in other["data_offsets"]]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + bytes(body)


CONTENT = {
    ".json": json_lines, ".jsonl": json_lines, ".yaml": yaml_content, ".csv": csv_content, ".safetensors": tensors,
}  # fmt: skip


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file, which may be a link; returns how. Rarely the file is gone, a folder, or a link to nothing."""
    raw, how = file.read_bytes(), rng.random()
    if how < 0.06:
        file.unlink()
        kind = rng.choice(("gone", "a folder", "a link to nothing", "a link to itself"))
        if kind == "a folder":
            file.mkdir()
        elif kind != "gone":
            file.symlink_to("nowhere" if kind == "a link to nothing" else file.name)
        return kind
    work = CONTENT.get(file.suffix, cut) if how < 0.5 else rng.choice(BYTES)
    try:
        changed = work(raw, rng)
    except (ValueError, IndexError):  # what is empty or has been damaged already has no content
        work = replaced
        changed = replaced(raw, rng)
    file.unlink()
    file.write_bytes(changed)
    return work.__name__


def linked_copy(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are links, until they are damaged."""
    shutil.copytree(source, target, copy_function=lambda a, b: Path(b).symlink_to(Path(a).resolve()))
    return target
