"""What is wrong with a data set: prepare_dataset.py --doctor. Changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import statistics
from collections import Counter
from pathlib import Path

from scripts.dataset.parts import image_steps
from scripts.dataset.parts.caption_models import ModelError, local_folder
from scripts.dataset.parts.image_steps import in_parallel
from scripts.dataset.parts.looks import look_of, picture_findings
from scripts.dataset.parts.settings import source_args
from scripts.parts.clip_vocabulary import clip_tokenizer

FEW = 5  # images


class PieceCounter:
    """Stands in for CLIP's tokenizer where none is at hand: counts words, digits and signs, each a token at least."""

    model_max_length = 77

    def __call__(self, captions: list[str], truncation: bool = False):
        pieces = [["<start>", *re.findall(r"[^\W\d_]+|\d|[^\s\w]+|_", c), "<end>"] for c in captions]
        return argparse.Namespace(input_ids=pieces)


def clip_tokenizers(base: str | None, script) -> dict:
    """CLIP's tokenizers by key: the base's; without a base, from open_clip_torch or the hub's cache, else a lower bound."""
    from transformers import AutoTokenizer

    if base is not None:
        names = {key: pair[0] for key, pair in script.TEXT_ENCODERS.items() if key.startswith("clip")}
        folder = local_folder(base, "--pretrained_model_name_or_path", [f"{name}/*" for name in names.values()])
        try:
            return {key: AutoTokenizer.from_pretrained(folder / name) for key, name in names.items()}
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"--pretrained_model_name_or_path {base}: no tokenizer there ({reason})") from None
    tokenizer = clip_tokenizer()
    if tokenizer is None:
        with contextlib.suppress(OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained("openai/clip-vit-large-patch14", local_files_only=True)
    return {"clip": tokenizer} if tokenizer is not None else {"clip (words and signs counted)": PieceCounter()}


def training_args(settings, args) -> argparse.Namespace:
    """The flags of the training scripts that the checks depend on."""
    out = source_args(settings)
    out.aspect_ratio_buckets, out.resolution = args.aspect_ratio_buckets, args.resolution
    out.validation_split, out.seed = args.validation_split or 0.0, 0 if args.seed is None else args.seed
    return out


def file_findings(folder: Path, script) -> list:
    """Files that don't belong together: captions without image, images that share one, formats that aren't read."""
    files = [f for f in sorted(folder.rglob("*")) if f.is_file()]
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    images = [f for f in files if f.suffix.lower() in script.IMAGE_SUFFIXES]
    stems = Counter(f.with_suffix("") for f in images)
    name = {f: str(f.relative_to(folder)) for f in files}
    phone = [name[f] for f in files if f.suffix.lower() in (".heic", ".heif")]
    advice = "scripts/dataset/prepare_dataset.py converts them"
    advice += "" if image_steps.PHONE_SUFFIXES else " (pip install pillow-heif)"
    findings = script.found("HEIC files, which are not read in training", phone, None, advice)
    orphans = [name[f] for f in files if f.suffix.lower() in (".txt", ".caption") and f.with_suffix("") not in stems]
    findings += script.found(
        "caption files without an image", orphans, None, "give it the image's name, or take it away"
    )
    shared = [
        name[f]
        for f in images
        if stems[f.with_suffix("")] > 1 and any(f.with_suffix(s).is_file() for s in (".txt", ".caption"))
    ]
    advice = "they differ in their suffix alone; rename one, and give it a caption of its own"
    return findings + script.found("images that share a caption file", shared, None, advice)


def caption_findings(examples: list, settings, args, script) -> list:
    """Missing and unvaried captions, the trigger word, and ends that are not read."""
    findings, total = [], len(examples)
    bare = [e.name for e in examples if not any(e.captions)]
    if not args.instance_prompt:
        advice = "describe them (auto_caption), or train with --instance_prompt or --default_caption"
        findings += script.found("images without a caption", bare, total, advice)
    captioned = [e for e in examples if any(e.captions)]
    captions = [c for e in captioned for c in e.captions]
    if not args.instance_prompt:
        findings += script.unvaried_captions(captioned)
    word = settings.trigger_word
    if word:
        lacking = [e.name for e in captioned if any(script.with_trigger(c, word) != c for c in e.captions)]
        advice = f"write it there, or train with --trigger_word {word}, which puts it first"
        findings += script.found(f"captions without the trigger word {word!r}", lacking, len(captioned), advice)
    elif not word and len(captioned) > 1 and not args.instance_prompt:
        words = [{w.strip(".,:;!?\"'()") for w in c.lower().split()} for c in captions]
        if not set.intersection(*words) - {"a", "an", "the", "of", "in", "on", "with", "and", "is"}:
            advice = "--trigger_word gives the LoRA a name to call it by, unless it's for a style that is always on"
            findings.append(script.Finding("no word stands in all captions", advice, hurts=False))
    if captions:
        captions = [script.with_trigger(c, word) for c in captions]
        findings += script.truncated_captions(captions, clip_tokenizers(args.pretrained_model_name_or_path, script))
    return findings


def diagnose(settings, args, script) -> int:
    """Prints what is known of the data set and what is wrong with it. Returns 1 if something will hurt, else 0."""
    training = training_args(settings, args)
    findings, broken, missing = [], [], []
    script.use_prepared_buckets(training)
    training.resolution = training.resolution or [script.DEFAULT_RESOLUTION]
    script.check_sizes(training)
    if training.aspect_ratio_buckets is not None:
        script.import_logging_quietly()  # diffusers makes the buckets
    buckets = script.bucket_sizes(training)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            examples = script.source_examples(training, missing)
    except script.UserError as error:
        print(f"HURTS  {error}\n       -> training stops at this; mend it first")
        return 1
    findings += [
        script.Finding(line.removeprefix("warning: "), "", hurts=False) for line in said.getvalue().splitlines()
    ]
    facts, looks = {}, {}

    def look(example) -> str | None:
        try:
            looks[example.name] = look_of(script.look_at(example, buckets))
            facts[example.name] = image_steps.header_facts(example.read())
        except (ValueError, OSError) as error:
            return str(error)
        return None

    for example, problem in in_parallel(look, examples, os.cpu_count() or 1, "looking"):
        if problem is not None:
            broken.append(f"{example.name}: {problem}")
    examples = [e for e in examples if e.name in facts]
    advice = "training stops at this; put them back, or take their lines out of the metadata"
    findings += script.found("images named in the metadata that are not there", missing, None, advice)
    findings += script.found("images that can't be read", broken, None, "training leaves them out; replace them")
    folder = Path(settings.data_dir or settings.dataset_name)
    if folder.is_dir():
        findings += file_findings(folder, script)
    if not examples:
        print("\n".join(render(findings)))
        return 1
    if training.validation_split:
        script.hold_out(examples, training)
    total = len(examples)
    if total < FEW:
        advice = "10 to 50 that differ in light, place and angle are usual"
        findings.append(script.Finding(f"only {total} image{'s' if total > 1 else ''}", advice, hurts=False))
    findings += picture_findings(examples, buckets, looks, args.train_batch_size or 1, script)
    if training.validation_split and args.seed is None and any("look the same" in f.what for f in findings):
        findings.append(
            script.Finding(
                "which images are held out depends on --seed", "give the one that you train with", hurts=False
            )
        )
    disguised = [n for n, f in facts.items() if f["format"] == "HEIF"]
    advice = "scripts/dataset/prepare_dataset.py converts them"
    findings += script.found("HEIC files under another suffix, which are not read in training", disguised, None, advice)
    turned, located = ([n for n, f in facts.items() if f[key]] for key in ("turned", "gps"))
    advice = "training puts them upright; other tools may not (image_resizing writes them upright)"
    findings += script.found("images turned by EXIF", turned, total, advice, hurts=False)
    advice = "take it out before you publish the set (image_resizing does)"
    findings += script.found("images that tell the place where they were taken", located, total, advice, hurts=False)
    findings += caption_findings(examples, settings, args, script)
    print("\n".join(overview(settings, examples, facts, broken, buckets, training)))
    script.print_buckets(examples, buckets)
    print("\n".join(["", *render(findings)]))
    return int(any(f.hurts for f in findings))


def overview(settings, examples: list, facts: dict, broken: list, buckets: list, training) -> list[str]:
    """Counts and sizes, a line each."""
    by_area = sorted((e.size for e in examples), key=lambda s: s[0] * s[1])
    words = [len(c.split()) for e in examples for c in e.captions if c]
    shapes = Counter("square" if w == h else "wide" if w > h else "tall" for w, h in by_area)
    modes = Counter(f"{f['format']} {f['mode']}" for f in facts.values())
    sizes = " to ".join("{} x {}".format(*s) for s in (by_area[0], by_area[-1]))
    length = f", of {min(words)} to {max(words)} words (median {statistics.median(words):g})" if words else ""
    target = f"{len(buckets)} buckets" if len(buckets) > 1 else "{} x {} alone".format(*buckets[0])
    return [
        f"data set   {settings.data_dir or settings.dataset_name}, for {settings.family} at {target}",
        f"images     {len(examples)}{f', and {len(broken)} that can not be read' if broken else ''}",
        f"sizes      {sizes} pixels; {', '.join(f'{n} {what}' for what, n in shapes.most_common())}",
        f"files      {', '.join(f'{n} {what}' for what, n in modes.most_common())}",
        f"captions   {sum(any(e.captions) for e in examples)} of {len(examples)} images{length}",
    ]


def render(findings: list) -> list[str]:
    """What hurts first, each with what to do."""
    lines = []
    for f in sorted(findings, key=lambda f: not f.hurts):
        lines.append(f"{'HURTS' if f.hurts else 'note '}  {f.what}")
        if f.advice:
            lines.append(f"       -> {f.advice}")
    hurting = sum(f.hurts for f in findings)
    lines.append(f"{hurting} thing{'s' if hurting > 1 else ''} will hurt" if hurting else "nothing that will hurt")
    return lines
