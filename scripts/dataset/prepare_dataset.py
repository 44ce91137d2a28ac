#!/usr/bin/env python
"""Turns a folder of pictures into a training set for every training script, or says what is wrong with one.

    python scripts/dataset/prepare_dataset.py -d photos -o prepared --family sdxl \\
        --image_filtering remove_duplicates=true --auto_caption trigger_word=sks \\
        --aspect_ratio_bucketing resize_images=true
    python scripts/dataset/prepare_dataset.py --config config/prepare_dataset.yaml
    python scripts/dataset/prepare_dataset.py --doctor -d prepared

The steps run in the order of --help, each on what the one before has left. The input is never written to; the output folder gets the
images, a .txt beside each, metadata.jsonl, buckets.json (which the training scripts follow) and report.html. Run again, it does
only what is missing. A .txt that you edit there stays as you wrote it.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.stopping import answer_signals

if __name__ == "__main__":
    answer_signals()

from PIL import Image

from scripts.dataset.parts import image_steps
from scripts.dataset.parts.image_steps import in_parallel
from scripts.dataset.parts.looks import picture_findings
from scripts.dataset.parts.settings import RESOLUTIONS, STATE, read_settings, source_args
from scripts.parts.files import portable
from scripts.parts.netted import netted
from scripts.parts.training_scripts import load_script

MASK = "-mask"  # the end of a mask's name, as --masked_loss=-mask of the training scripts finds it


def is_inside(name: object) -> bool:
    """Whether a name of a file or a stem can only be one in the output folder, whoever has written it."""
    if not isinstance(name, str) or not name or not name.isprintable() or "\\" in name or ":" in name:
        return False
    return not name.startswith("/") and ".." not in name.split("/")


def is_look(value: object) -> bool:
    """Whether a value is what `measure` has found out of a picture."""
    try:
        (width, height), (bits, sure, colours), facts = value["size"], value["look"], value["facts"]
        base64.b64decode(colours, validate=True)
        return (
            all(isinstance(n, int) for n in (width, height, bits, sure))
            and min(width, height) > 0
            and ({"format", "mode", "turned", "gps", "sharpness"} <= facts.keys())
        )
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


def is_image(value: object) -> bool:
    """Whether a value is what `write` has noted of a file, or None for one that was taken away."""
    if value is None:
        return True
    known = isinstance(value, dict) and {"key", "file", "bytes"} <= value.keys()
    return known and is_inside(value["file"]) and isinstance(value["bytes"], int)


# what a line of the journal may hold, by its kind: a journal that was edited or damaged must lead nowhere else
VALID = {
    "name": is_inside,
    "look": is_look,
    "image": is_image,
    "text": lambda value: isinstance(value, list) and all(isinstance(text, str) for text in value),
    "auto_caption": lambda value: isinstance(value, str),
    "auto_tagging": lambda value: isinstance(value, str),
}


class Journal:
    """What earlier runs have found out and written: one JSON line each, appended at once, so that nothing is done twice.

    A line is [kind, key, value]; the last one with a kind and key counts. One that an interruption cut off is dropped, and so
    is one that this program can't have written; what it was about is done anew.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.known: dict[tuple[str, str], object] = {}
        self.lock = threading.Lock()
        whole = wrong = 0
        if file.exists():
            with open(file, "rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    whole += len(line)
                    try:
                        kind, key, value = json.loads(line)
                        valid = VALID[kind](value) and isinstance(key, str)
                    except (ValueError, TypeError, KeyError, RecursionError):
                        valid = False
                    if valid:
                        self.known[kind, key] = value
                    else:
                        wrong += 1
        if wrong:
            print(f"note: {wrong} lines of {file} are damaged, or not from here: what they were about is done anew")
        self.file = open(file, "ab")  # noqa: SIM115
        self.file.truncate(whole)

    def get(self, kind: str, key: str):
        return self.known.get((kind, key))

    def put(self, kind: str, key: str, value: object) -> None:
        with self.lock:
            if self.known.get((kind, key)) != value:
                self.known[kind, key] = value
                self.file.write((json.dumps([kind, key, value]) + "\n").encode())
                self.file.flush()


class Preparation:
    """One run over one data set; each method is a pass over its pictures."""

    def __init__(self, settings, script) -> None:
        self.settings, self.script = settings, script
        self.steps, self.out = settings.steps, Path(settings.output_dir)
        self.workers = settings.num_workers or os.cpu_count() or 1
        self.journal = Journal(self.out / STATE / "journal.jsonl")
        for partial in self.out.rglob(".*.partial"):  # of a run that was killed
            partial.unlink(missing_ok=True)
        self.rows: list[tuple[str, int, int, int, str]] = []  # step, images, done now, from before, note
        self.pictures: list = []
        self.buckets: list[tuple[int, int]] = []
        self.readable = set(script.IMAGE_SUFFIXES)  # in training
        script.IMAGE_SUFFIXES |= image_steps.PHONE_SUFFIXES

    @property
    def kept(self) -> list:
        """The pictures that no step has left out."""
        return [p for p in self.pictures if p.problem is None]

    def thumbnail(self, picture) -> Path:
        return self.out / STATE / "thumbnails" / f"{picture.digest[:24]}.jpg"

    def find(self) -> None:
        """Lists the pictures and gives each the name that it keeps in the output, whatever is added later."""
        missing: list[str] = []
        examples = self.script.source_examples(source_args(self.settings), missing)
        self.say_links()
        taken = {str(value).lower() for (kind, _), value in self.journal.known.items() if kind == "name"}
        for example in examples:
            name = readable(example.name)
            stem = self.journal.get("name", name)
            if stem is None:
                wanted = portable(Path(re.sub(r"^row (\d+)$", r"row_\1", name)).with_suffix("").as_posix())
                numbered = (f"{wanted}_{n}" for n in itertools.count(2))
                stem = next(s for s in itertools.chain([wanted], numbered) if s.lower() not in taken)
                taken.add(stem.lower())
                self.journal.put("name", name, stem)
            if self.settings.masked_loss and stem.endswith(MASK):
                raise self.script.UserError(f"{name}: a picture's name that ends with {MASK} is a mask's: rename it")
            source = "kept" if example.captions else ""
            picture = image_steps.Picture(name, example.read, example.captions, stem, caption_source=source)
            picture.read_mask = example.read_mask
            self.pictures.append(picture)
        for name in missing:
            self.pictures.append(
                image_steps.Picture(name, None, [], problem="named in the metadata, but there is no such file")
            )

    def say_links(self) -> None:
        """Symbolic links that lead out of the input: a file is read and copied as if it lay there, a folder is not entered."""
        if self.settings.data_dir is None:
            return
        folder = Path(self.settings.data_dir).resolve()
        links = [
            f for f in folder.rglob("*") if f.is_symlink() and not Path(os.path.realpath(f)).is_relative_to(folder)
        ]
        for kind, what in (
            (Path.is_file, "files outside it: read as if they lay there"),
            (Path.is_dir, "folders: left alone"),
        ):
            names = [readable(str(f.relative_to(folder))) for f in links if kind(f)]
            if names:
                print(f"note: in {folder}, {len(names)} symbolic links to {what} ({self.script.listed(names)})")

    def read(self) -> None:
        """Decodes each picture once: size, look, sharpness, thumbnail, or why it can't be used."""

        def work(picture):
            try:
                raw = picture.read()
            except OSError as error:
                return {"problem": error.strerror}, False
            picture.digest = hashlib.sha256(raw).hexdigest()
            known, is_fresh = self.journal.get("look", picture.digest), False
            if known is None:
                known, is_fresh = image_steps.measure(raw, self.script, self.thumbnail(picture)), True
                if "problem" not in known:  # what can't be read now may be readable with another library
                    self.journal.put("look", picture.digest, known)
            return known | self.look_at_mask(picture, known), is_fresh

        fresh = 0
        for picture, (known, is_fresh) in in_parallel(work, self.kept, self.workers, "reading"):
            picture.problem = known.get("problem")
            if picture.problem is None:
                fresh += is_fresh
                bits, sure, colours = known["look"]
                picture.size, picture.facts = tuple(known["size"]), known["facts"]
                picture.look = bits, sure, base64.b64decode(colours)
        self.rows.append(("reading", len(self.pictures), fresh, len(self.kept) - fresh, self.reasons(self.pictures)))

    def look_at_mask(self, picture, known: dict) -> dict:
        """Notes which mask a picture has, and writes the thumbnail of it; {"problem": why it can't be used} or nothing."""
        if picture.read_mask is None or "problem" in known:
            return {}
        try:
            picture.size = tuple(known["size"])
            picture.mask = image_steps.digest_of(picture.digest, picture.read_mask())
            if not self.mask_thumbnail(picture).is_file():
                image_steps.write_whole(self.mask_thumbnail(picture), image_steps.mask_thumbnail(self.mask_of(picture)))
        except (OSError, self.script.UserError) as error:
            return {"problem": str(error).removeprefix("--masked_loss: ")}
        return {}

    def mask_of(self, picture):
        """The mask of a picture, (L) in its size, as the training scripts read it. Errors: their UserError."""
        return self.script.MaskStore([picture], [], "lanczos", 0).decoded(0)

    def mask_thumbnail(self, picture) -> Path:
        return self.out / STATE / "thumbnails" / f"{picture.mask}.png"

    def reasons(self, pictures: list) -> str:
        """How many were left out, by the first words of the reasons."""
        counts = Counter(p.problem.split(":")[0].split(" of ")[0].split(" (")[0] for p in pictures if p.problem)
        return ", ".join(f"{n} {what}" for what, n in counts.most_common()) or "none left out"

    def filter(self) -> None:
        """image_filtering."""
        before = self.kept
        image_steps.leave_out(before, self.steps.image_filtering)
        self.rows.append(("image_filtering", len(before), len(before), 0, self.reasons(before)))

    def describe(self, name: str, wanted: list, make_model, key_fields: tuple[str, ...]) -> tuple[dict, int]:
        """{picture name: text} of a captioner or tagger, from earlier runs or computed in batches; and how many are fresh."""
        step = getattr(self.steps, name)
        chosen = [getattr(step, f) for f in key_fields]
        keys = {p.name: image_steps.digest_of(p.digest, *chosen) for p in wanted}
        todo = [p for p in wanted if self.journal.get(name, keys[p.name]) is None]
        if todo:
            print(f"{name}: loading {step.model_name}", flush=True)
            model, batch = make_model(step), []
            title = "captioning" if name == "auto_caption" else "tagging"
            for number, (picture, image) in enumerate(in_parallel(self.small, todo, self.workers, title), 1):
                batch.append((picture, image))
                if len(batch) == model.batch_size or number == len(todo):
                    for (done, _), text in zip(batch, model([i for _, i in batch]), strict=True):
                        self.journal.put(name, keys[done.name], self.script.clean_caption(text))
                    batch = []
        return {p.name: self.journal.get(name, keys[p.name]) for p in wanted}, len(todo)

    def small(self, picture):
        """The picture for a model to look at, no larger than any reads."""
        image = self.script.decode_image(picture.read())
        image.thumbnail((1024, 1024), reducing_gap=2.0)
        return image

    def caption(self) -> None:
        """auto_caption."""
        from scripts.dataset.parts.caption_models import Captioner

        step = self.steps.auto_caption
        wanted = [p for p in self.kept if step.overwrite or not p.captions]
        fields = ("model_type", "model_name", "prompt", "task", "max_new_tokens")
        texts, fresh = self.describe("auto_caption", wanted, Captioner, fields)
        empty = [p.name for p in wanted if not texts[p.name]]
        for picture in wanted:
            if texts[picture.name]:
                picture.captions, picture.caption_source = [texts[picture.name]], "auto_caption"
        note = f"{len(self.kept) - len(wanted)} kept" + (f", no words for {self.script.listed(empty)}" if empty else "")
        self.rows.append(("auto_caption", len(self.kept), fresh, len(wanted) - fresh, note))

    def tag(self) -> None:
        """auto_tagging."""
        from scripts.dataset.parts.caption_models import Tagger

        step = self.steps.auto_tagging
        wanted = [p for p in self.kept if step.captions != "missing" or not p.captions]
        fields = (
            "model_name",
            *("threshold", "general_threshold", "character_threshold"),
            *("exclude_tags", "replace_underscore", "max_tags"),
        )
        texts, fresh = self.describe("auto_tagging", wanted, Tagger, fields)
        for picture in wanted:
            picture.tags = texts[picture.name]
            if step.captions == "replace" or not picture.captions:
                picture.captions, picture.caption_source = ([picture.tags] if picture.tags else []), "auto_tagging"
            else:
                picture.captions = [with_tags(c, picture.tags) for c in picture.captions]
                picture.caption_source += " + tags"
        note = f"{sum(not p.tags for p in wanted)} without a tag"
        self.rows.append(("auto_tagging", len(self.kept), fresh, len(wanted) - fresh, note))

    def assign(self) -> None:
        """Sizes after image_resizing, and aspect_ratio_bucketing."""
        resizing, bucketing = self.steps.image_resizing, self.steps.aspect_ratio_bucketing
        if bucketing:
            self.buckets = image_steps.make_buckets(bucketing)
        for picture in self.kept:
            picture.resized = image_steps.resized_size(picture.size, resizing) if resizing else picture.size
            if self.buckets:
                picture.bucket = self.script.nearest_bucket(picture.resized, self.buckets)

    def target(self, picture) -> tuple[int, int] | None:
        """The bucket that the picture is cropped to, or None."""
        bucketing = self.steps.aspect_ratio_bucketing
        return self.buckets[picture.bucket] if bucketing and bucketing.resize_images else None

    def shown_target(self, picture) -> tuple[int, int] | None:
        """What the picture is cropped to here or in training."""
        return self.buckets[picture.bucket] if self.buckets else None

    def write(self) -> None:
        """Writes the images, decoded and encoded once whatever the steps; unchanged ones are copied."""
        resizing, bucketing = self.steps.image_resizing, self.steps.aspect_ratio_bucketing
        writer = bucketing if bucketing and bucketing.resize_images else resizing

        def work(picture) -> bool:
            suffix, form = Path(picture.name).suffix.lower(), picture.facts["format"]
            formats = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"}
            plain = suffix if suffix in self.readable and form != "HEIF" else formats.get(form)
            picture.file = f"{picture.stem}{f'.{writer.format}' if writer else plain or '.jpg'}"
            target = self.target(picture)
            how = [resizing and resizing.model_dump(), target, writer and writer.model_dump(), picture.file]
            key = image_steps.digest_of(picture.digest, *how)
            known, file = self.journal.get("image", picture.stem), self.place(picture.file)
            if known and known["key"] == key and file.is_file() and file.stat().st_size:
                return False  # retouched or not
            raw = picture.read()
            if writer:
                raw = image_steps.render(raw, self.script, resizing, target, bucketing, writer.format, writer.quality)
            elif plain is None:  # a format that the training scripts don't read
                raw = image_steps.encode(self.script.decode_image(raw), "jpg", 95)
            if known and known["file"] != picture.file:
                self.place(known["file"]).unlink(missing_ok=True)
            image_steps.write_whole(file, raw)
            self.journal.put("image", picture.stem, {"key": key, "file": picture.file, "bytes": len(raw)})
            return True

        def write_mask(picture) -> bool:
            stem, target = f"{picture.stem}{MASK}", self.target(picture)
            key = image_steps.digest_of(
                picture.mask, resizing and resizing.model_dump(), target, bucketing and bucketing.model_dump()
            )
            known, file = self.journal.get("image", stem), self.place(f"{stem}.png")
            if known and known["key"] == key and file.is_file() and file.stat().st_size:
                return False
            raw = image_steps.encode(image_steps.shaped(self.mask_of(picture), resizing, target, bucketing), "png", 0)
            image_steps.write_whole(file, raw)
            self.journal.put("image", stem, {"key": key, "file": f"{stem}.png", "bytes": len(raw)})
            return True

        done = sum(written for _, written in in_parallel(work, self.kept, self.workers, "writing"))
        name = " + ".join(n for n, s in (("resizing", resizing), ("bucketing", bucketing)) if s) or "copying"
        note = "" if writer else "copied as they are"
        self.rows.append((name, len(self.kept), done, len(self.kept) - done, note))
        if masked := [p for p in self.kept if p.mask]:
            done = sum(written for _, written in in_parallel(write_mask, masked, self.workers, "writing masks"))
            without = f"{len(self.kept) - len(masked)} images without one"
            self.rows.append(("masks", len(masked), done, len(masked) - done, without))

    def place(self, name: str) -> Path:
        """A file of the output folder. Errors: UserError if a link in there leads out."""
        file = self.out / name
        if not file.parent.resolve().is_relative_to(self.out.resolve()):
            raise self.script.UserError(f"--output_dir: {file.parent} is a link that leads out of it: take it away")
        return file

    def text_in(self, file: Path) -> list[str]:
        """The caption in a .txt file of the output, as a list of none or one."""
        return self.script.as_captions(self.script.decode_text(file.read_bytes(), file))

    def write_captions(self) -> None:
        """The .txt files and metadata.jsonl. What a person has changed there since the last run stays."""
        file = self.out / "metadata.jsonl"
        earlier = {}
        if file.is_file():
            earlier = {str(row["file_name"]): row.get("text", "") for _, row in self.script.read_metadata(file)}
        rows, edited, fresh = [], [], 0
        for p in sorted(self.kept, key=lambda p: p.file):
            captions = p.captions or ([""] if self.settings.trigger_word else [])
            p.final = [self.script.with_trigger(c, self.settings.trigger_word) for c in captions]
            beside, last = self.place(p.file).with_suffix(".txt"), self.journal.get("text", p.stem)
            fresh += last != p.final
            by_hand = None
            if last is not None and beside.is_file():
                text = self.text_in(beside)
                listed = self.script.as_captions(earlier.get(p.file, last))
                if text not in (last[:1], p.final[:1]):
                    by_hand = text
                elif listed not in (last, p.final):
                    by_hand = listed
            if by_hand is not None:
                p.final, p.caption_source = by_hand, "by hand"
                edited.append(p.name)
            content = (p.final[0] + "\n").encode() if p.final else b""
            if not p.final and by_hand is None:
                beside.unlink(missing_ok=True)
            elif not beside.is_file() or beside.read_bytes() != content:
                image_steps.write_whole(beside, content)
            size = self.target(p) or p.resized
            rows.append({"file_name": p.file, "text": p.final, "width": size[0], "height": size[1]})
            if self.buckets:
                rows[-1]["bucket"] = "{} x {}".format(*self.buckets[p.bucket])
        if all(
            len(row["text"]) < 2 for row in rows
        ):  # a column of lists or one of texts, for readers that want one type
            rows = [row | {"text": "".join(row["text"])} for row in rows]
        image_steps.write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        for p in self.kept:  # at last, so that an interruption isn't taken for an edit
            if p.caption_source != "by hand":
                self.journal.put("text", p.stem, p.final)
        note = f"{sum(not p.final for p in self.kept)} without" + (
            f", {len(edited)} edited by hand kept" if edited else ""
        )
        self.rows.append(("captions", len(self.kept), fresh, len(self.kept) - fresh, note))

    def write_buckets(self) -> None:
        """buckets.json, which the training scripts follow; none without aspect_ratio_bucketing."""
        file, bucketing = self.out / "buckets.json", self.steps.aspect_ratio_bucketing
        if not bucketing:
            file.unlink(missing_ok=True)
            return
        side = bucketing.base_resolution
        if bucketing.custom_buckets is not None:
            side = round((sum(w * h for w, h in self.buckets) / len(self.buckets)) ** 0.5)
        content = {"resolution": side, "aspect_ratio_buckets": ";".join(f"{h},{w}" for w, h in self.buckets)}
        image_steps.write_whole(file, (json.dumps(content, indent=1) + "\n").encode())

    def remove_stale(self) -> None:
        """Takes away what an earlier run has written for pictures that are gone or left out now; edited captions stay."""
        current, removed = {p.stem for p in self.kept} | {f"{p.stem}{MASK}" for p in self.kept if p.mask}, 0
        for (kind, stem), known in list(self.journal.known.items()):
            if kind != "image" or known is None or stem in current:
                continue
            file, last = self.place(known["file"]), self.journal.get("text", stem)
            beside = file.with_suffix(".txt")
            if file.is_file() and file.stat().st_size == known["bytes"]:  # else it's retouched
                file.unlink()
            if beside.is_file() and self.text_in(beside) == (last or [])[:1]:
                beside.unlink()
            self.journal.put("image", stem, None)
            removed += 1
        if removed:
            print(
                f"{removed} images of an earlier run are gone from the input, or left out now: removed from the output"
            )

    def write_left_out(self) -> None:
        """left_out.jsonl: each file that isn't in the set, and why."""
        rows = [{"file_name": p.name, "reason": p.problem} for p in self.pictures if p.problem]
        content = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        image_steps.write_whole(self.out / "left_out.jsonl", content.encode())

    def examples(self) -> list:
        """The kept pictures for the training scripts' checks, at the sizes that they came in, unless they were padded."""
        resizing = self.steps.image_resizing
        padded = resizing is not None and resizing.mode == "contain" and not image_steps.keeps_shape(resizing)
        return [
            self.script.Example(p.file, p.final, None, p.digest, p.resized if padded else p.size, p.bucket)
            for p in self.kept
        ]


def readable(name: str) -> str:
    """A file's name as text that can be printed and stored: bytes that are no UTF-8 become underscores."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\ufffd", "_")


def with_tags(caption: str, tags: str) -> str:
    """The caption with the tags that it doesn't have yet after it."""
    there = {t.strip().lower() for t in caption.split(",")}
    return ", ".join([caption, *(t for t in tags.split(", ") if t and t.lower() not in there)])


@netted
def main(argv: list[str] | None = None) -> int:
    """Runs the program; what a person can mend ends as one line. Returns the exit code."""
    script = load_script("sd15", libraries=False)
    from scripts.dataset.parts.caption_models import ModelError

    program, settings = Path(__file__).name, None
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # a large picture is no fault
    try:
        settings, args = read_settings(argv, script)
        if args.doctor:
            from scripts.dataset.parts.doctor import diagnose

            trainer = load_script(settings.family, libraries=False)
            try:
                return diagnose(settings, args, trainer)
            except trainer.UserError as error:
                raise script.UserError(error) from None
        return prepare(settings, script)
    except (script.UserError, ModelError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        place = error.filename or (settings and settings.output_dir) or "a file"
        print(f"{program}: error: {readable(str(place))}: {error.strerror or error}", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"{program}: error: the memory does not suffice: lower num_workers or the sizes", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


def prepare(settings, script) -> int:
    """All steps, the output folder's files, and the summary."""
    from scripts.dataset.parts.report import write_report

    started = time.perf_counter()
    run = Preparation(settings, script)
    steps = settings.steps
    run.find()
    run.read()
    if steps.image_filtering:
        run.filter()
    left_out = [p for p in run.pictures if p.problem]
    for p in left_out[:10]:
        print(f"left out: {p.name}: {p.problem}")
    if len(left_out) > 10:
        print(f"left out: {len(left_out) - 10} more, listed in {run.out / 'left_out.jsonl'}")
    if not run.kept:
        run.write_left_out()
        raise script.UserError(
            f"none of {len(run.pictures)} images is left; the reasons are in {run.out / 'left_out.jsonl'}"
        )
    if steps.auto_caption or steps.aspect_ratio_bucketing:
        script.import_logging_quietly()
    if steps.auto_caption:
        run.caption()
    if steps.auto_tagging:
        run.tag()
    run.assign()
    run.write()
    run.remove_stale()
    run.write_captions()
    run.write_buckets()
    run.write_left_out()
    examples = run.examples()
    square = steps.image_resizing.target_resolution if steps.image_resizing else (RESOLUTIONS[settings.family],) * 2
    looks = {p.file: p.look for p in run.kept}
    findings = picture_findings(examples, run.buckets or [square], looks, 1, script)
    findings += script.unvaried_captions(examples)
    bare = [p.file for p in run.kept if not p.captions and p.caption_source != "by hand"]
    what = "images without a caption" + (", but for the trigger word" if settings.trigger_word else "")
    findings += script.found(what, bare, len(examples), "auto_caption describes them, or write a .txt beside each")
    findings = [f for f in findings if f.hurts]
    write_report(run, findings)
    seconds = time.perf_counter() - started
    print(f"\n{'step':<22}{'images':>8}{'done now':>10}{'from before':>13}   note")
    for name, images, now, before, note in run.rows:
        print(f"{name:<22}{images:>8}{now:>10}{before:>13}   {note}")
    print(f"{len(run.pictures)} images in {seconds:.1f} s\n")
    if run.buckets:
        script.print_buckets(examples, run.buckets)
    for finding in findings:
        print(f"warning: {finding.what}; {finding.advice}")
    print(f"\nlook at  {run.out / 'report.html'}")
    wrapper = "run_lora_train.bat" if sys.platform == "win32" else "bash run_lora_train.sh"
    masks = f" --masked_loss={MASK}" if any(p.mask for p in run.kept) else ""
    print(f"train    {wrapper} -m BASE -d {settings.output_dir}{masks}")
    return 0


if __name__ == "__main__":
    # what was printed must not be lost when it ends at once; a name that the console can't show (cp1252) ends nothing
    sys.stdout.reconfigure(line_buffering=True, errors="replace")
    sys.exit(main())
