"""Properties that hold for any images, captions and metadata, by hypothesis.

The examples are the same in every run.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from properties import in_a_file, often, or_refused, seldom, values

from lora_training.data.batches import BatchPlan
from lora_training.data.buckets import cover_size, nearest_bucket, share_cropped
from lora_training.data.captions import as_captions, clean_caption, decode_text
from lora_training.data.crops import draw_crop
from lora_training.data.folders import Example
from lora_training.data.image_store import prepare_examples
from lora_training.data.metadata_files import caption_of_row, read_metadata

pytestmark = pytest.mark.faults


sides = st.integers(1, 5000)
multiples = st.integers(1, 64).map(lambda n: 8 * n)
rows = st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), values, max_size=3)


@often
@given(
    raw=st.binary(max_size=80)
    | st.lists(rows, max_size=3).map(lambda r: "\n".join(map(json.dumps, r)).encode())
)
def test_any_metadata_names_files_or_is_refused_in_a_line(raw):
    for name in ("metadata.jsonl", "metadata.csv"):
        named_rows = in_a_file(raw, name, lambda file: or_refused(lambda: read_metadata(file)))
        for _, row in named_rows or []:
            assert row["file_name"].strip() and "\0" not in row["file_name"]
            captions = or_refused(lambda row=row: caption_of_row(row, None, "line 1"))
            assert all("\n" not in caption and caption.strip() for caption in captions or [])


@often
@given(
    raw=st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-16", "surrogatepass"))
)
def test_any_bytes_beside_a_picture_are_captions_of_one_line(raw):
    for caption in as_captions(decode_text(raw, Path("a.txt"))):
        assert caption == clean_caption(caption) and caption.splitlines() == [caption]
        caption.encode("utf-8")


@seldom
@given(
    raw=st.binary(max_size=200),
    place=st.integers(0, 300),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]),
)
def test_any_damaged_picture_is_read_or_is_none(raw, place, kind):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, kind)
    whole = buffer.getvalue()
    files = (raw, whole[:place] + raw + whole[place + len(raw) :], whole[:place])
    examples = [Example(f"{n}.png", ["a"], lambda file=file: file) for n, file in enumerate(files)]
    examples.append(Example("whole.png", ["a"], lambda: whole))
    args = SimpleNamespace(image_interpolation_mode="lanczos", masked_loss=None)
    prepared = prepare_examples(examples, [(32, 32)], args).examples
    assert prepared[-1].name == "whole.png" and all(min(e.size) > 0 for e in prepared)


@often
@given(
    size=st.tuples(sides, sides),
    bucket=st.tuples(multiples, multiples),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_crop_lies_in_the_picture_that_covers_its_bucket(size, bucket, seed, data):
    cover = cover_size(size, bucket)
    assert cover[0] >= bucket[0] and cover[1] >= bucket[1]  # covered,
    assert cover[0] == bucket[0] or cover[1] == bucket[1]  # no more than needed,
    scales = cover[0] / size[0], cover[1] / size[1]
    # and not squashed, but for rounding
    assert abs(scales[0] - scales[1]) <= max(1 / size[0], 1 / size[1]) + 1e-9
    args = SimpleNamespace(center_crop=data.draw(st.booleans()), random_flip=data.draw(st.booleans()))
    crop = draw_crop(cover, bucket, random.Random(seed), args)
    assert 0 <= crop.left <= cover[0] - bucket[0] and 0 <= crop.top <= cover[1] - bucket[1]
    assert not args.center_crop or abs(2 * crop.left - (cover[0] - bucket[0])) <= 1
    assert 0 <= share_cropped(size, bucket) < 1


@often
@given(
    size=st.tuples(sides, sides), buckets=st.lists(st.tuples(multiples, multiples), min_size=1, max_size=8)
)
def test_no_bucket_is_nearer_in_shape_than_the_one_that_is_taken(size, buckets):
    def distance(bucket):
        return abs(math.log(bucket[0] / bucket[1] / (size[0] / size[1])))

    taken = buckets[nearest_bucket(size, buckets)]
    assert distance(taken) <= min(map(distance, buckets)) + 1e-5


@seldom
@given(
    images=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    repeats=st.integers(1, 7),
    batch=st.integers(1, 6),
    processes=st.integers(1, 4),
    classes=st.integers(0, 5),
    at_once=st.sampled_from([4, 16, 65536]),
    held_out=st.sets(st.integers(0, 29), max_size=5),
)
def test_every_sample_is_shown_once_per_epoch(images, repeats, batch, processes, classes, at_once, held_out):
    flags = {"seed": 1, "repeats": repeats, "train_batch_size": batch, "prior_loss_weight": 0.5}
    args = SimpleNamespace(**flags, compile=False, cuda_graphs=False, weight=1.0)
    examples = [
        Example(str(i), ["a"], None, bucket=b, held_out=i in held_out and i > 0) for i, b in enumerate(images)
    ]

    class Plan(BatchPlan):
        pass

    Plan.round_limit = at_once
    plan = Plan(examples, args, processes, classes)
    for epoch in (0, 3):
        seen, class_places = Counter(), Counter()
        for number in range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch):
            shares = [plan.share(number, p) for p in range(processes)]
            # processes do the same work
            assert len({(len(s), len({slot.bucket for slot in s})) for s in shares}) == 1
            slots = [slot for share in shares for slot in share if slot.weight]
            assert math.isclose(sum(s.weight for s in slots if not s.is_class), 1)
            assert not classes or math.isclose(sum(s.weight for s in slots if s.is_class), 0.5)
            seen.update((s.index, s.repeat) for s in slots if not s.is_class)
            class_places.update((s.index, s.repeat) for s in slots if s.is_class)
        trained = [i for i, e in enumerate(examples) if not e.held_out]
        assert seen == Counter((i, r) for i in trained for r in range(repeats))
        assert class_places.total() == (seen.total() if classes else 0) and set(class_places.values()) <= {1}
