"""Properties that hold for any flags, files and bytes, by hypothesis: the same examples in every run.

What is tested here all four scripts share, line for line, so one of them stands for all.
"""

import argparse
import json
import math
import random
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import FAMILIES, SAMPLE, load_script, training_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_training.base_model.components import Components
from lora_training.base_model.reading import import_class
from lora_training.cli.parser import config_to_argv
from lora_training.cli.prompt_files import PROMPT_KEYS, read_prompts
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.buckets import cover_size, nearest_bucket, share_cropped
from lora_training.data.captions import as_captions, clean_caption, decode_text, prepend_trigger
from lora_training.data.crops import draw_crop
from lora_training.data.folders import Example
from lora_training.data.image_store import prepare_examples
from lora_training.data.metadata_files import caption_of_row, read_metadata
from lora_training.errors import UserError
from lora_training.files import list_checkpoints, read_config_file, read_metrics
from lora_training.libraries import import_libraries
from lora_training.text.words import insert_tokens
from lora_training.training.checkpoints import check_checkpoint
from lora_training.training.output_folder import FINISHED, read_recorded_settings
from lora_training.training.schedule import validation_schedule
from scripts.parts.training_scripts import bare_script

pytestmark = pytest.mark.faults

script = bare_script("sd15")
often = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=40)

texts = st.text(max_size=40) | st.sampled_from(
    ["1e400", "nan", "-0", "9" * 5000, "１", "²", "1_0", " 1 ", "0x1", "inf", "\0"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
sides = st.integers(1, 5000)
multiples = st.integers(1, 64).map(lambda n: 8 * n)


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Only where these tests run, and not where they are collected."""
    import_libraries()


def parser_of(family: str) -> argparse.ArgumentParser:
    module = bare_script(family)
    parser = module.OneLineParser(allow_abbrev=False)
    module.add_shared_args(parser)
    module.add_family_args(parser.add_argument)
    return parser


FLAGS = {
    s: a
    for family in FAMILIES
    for a in parser_of(family)._actions
    for s in a.option_strings
    if s.startswith("--")
}
PARSER = parser_of("sd15")
CONVERTED = {action.type.__name__: action.type for action in FLAGS.values() if action.type}
LIMITS = {"share": (0, 1), "learning rate": (0, 100), "amount": (0, 1e9), "count": (1, 2**31 - 1)}


def in_a_file(raw: bytes | str, name: str, work):
    """What `work` makes of a folder that holds a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
        return work(file)


def or_refused(work, *errors):
    """What `work` gives, or None where it refuses in one line; any other exception is the test's failure."""
    try:
        return work()
    except (UserError, *errors) as error:
        assert "\n" not in str(error) and str(error).strip()


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(CONVERTED))
@seldom
@given(text=texts | st.floats().map(str) | st.integers().map(str))
def test_a_flags_type_gives_a_value_within_its_limits_or_refuses(name, text):
    try:
        value = CONVERTED[name](text)
    except (argparse.ArgumentTypeError, ValueError):  # which argparse tells in one line
        return
    if isinstance(value, float):
        assert math.isfinite(value)
    low, high = LIMITS.get(name, (None, None))
    assert low is None or low <= value <= high


@seldom
@given(flag=st.sampled_from(sorted(FLAGS)), words=st.lists(texts, max_size=3))
@example(flag="--masked_loss", words=[""])
@example(flag="--initializer_concept", words=["\0"])
@example(flag="--dry_run", words=["", " "])
def test_any_flag_with_any_words_is_taken_or_refused_in_a_line(flag, words):
    argv = ["-m", "nowhere/base", "-d", str(SAMPLE), flag, *words]
    try:
        args = script.parse_args(argv)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as end:
        assert end.code in (0, 2)  # 0: --help
    else:
        assert args.resolution and args.output_dir


@often
@given(key=st.sampled_from(sorted(FLAGS)) | st.text(max_size=12), value=values)
def test_any_value_in_a_configuration_is_taken_or_refused_in_a_line(key, value):
    words = or_refused(lambda: config_to_argv(PARSER, {key.removeprefix("--"): value}, "--config c.yaml"))
    assert words is None or all(isinstance(word, str) for word in words)


@often
@given(raw=st.binary(max_size=60) | values.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass")))
@example(raw=b"[" * 3_000)
@example(raw=b"&a [*a]")
@example(raw=b"!!python/name:os.system")
def test_any_configuration_file_is_a_dictionary_or_refused_in_a_line(raw):
    found = in_a_file(raw, "c.yaml", lambda file: or_refused(lambda: read_config_file(str(file))))
    assert found is None or isinstance(found, dict)


@often
@given(text=st.text(alphabet="ab -nwhdslg0123.\n#x", max_size=60) | st.text(max_size=60))
@example(text="a circle --w 64 --h 64 --d 3 --s 2 --l 2.5")
@example(text="a --n\na --d")
def test_any_prompt_file_gives_prompts_of_the_known_settings_or_is_refused(text):
    entries = in_a_file(text, "p.txt", lambda file: or_refused(lambda: read_prompts(str(file))))
    for entry in entries or []:
        assert entry["prompt"].strip() and entry.keys() <= PROMPT_KEYS.keys()
        assert all(entry.get(side, 8) % 8 == 0 for side in ("width", "height"))


# ---- files and bytes -------------------------------------------------------------------------------------------------

rows = st.dictionaries(st.sampled_from(["file_name", "text", "caption", "x"]), values, max_size=3)


@often
@given(
    raw=st.binary(max_size=80)
    | st.lists(rows, max_size=3).map(lambda r: "\n".join(map(json.dumps, r)).encode())
)
def test_any_metadata_names_files_or_is_refused_in_a_line(raw):
    for name in ("metadata.jsonl", "metadata.csv"):
        found = in_a_file(raw, name, lambda file: or_refused(lambda: read_metadata(file)))
        for _, row in found or []:
            assert row["file_name"].strip() and "\0" not in row["file_name"]
            captions = or_refused(lambda row=row: caption_of_row(row, None, "line 1"))
            assert all("\n" not in caption and caption.strip() for caption in captions or [])


@often
@given(
    raw=st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-16", "surrogatepass"))
)
def test_any_bytes_beside_a_picture_are_captions_of_one_line(raw):
    for text in (decode_text(raw, Path("a.txt")),):
        for caption in as_captions(text):
            assert caption == clean_caption(caption) and caption.splitlines() == [caption]
            caption.encode("utf-8")


@often
@given(
    raw=st.binary(max_size=60)
    | st.lists(values, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
@example(raw=b'{"step": 1}\n{"step": 2, "lo')
@example(raw=b'{"step": 1}\n\xff\xfe\n{"step": 2}')
@example(raw=b'{"step": 1}\n3\n' + b"[" * 20_000)
def test_whole_rows_of_any_metrics_are_read(raw):
    found = in_a_file(raw, "metrics.jsonl", lambda file: read_metrics(str(file.parent)))
    assert all(isinstance(row, dict) for row in found)
    if raw.startswith(b'{"step": 1}\n'):
        assert found[0] == {"step": 1}


@often
@given(
    raw=st.binary(max_size=60)
    | rows.map(lambda row: json.dumps(row).encode())
    | values.map(lambda v: json.dumps(v).encode())
)
@example(
    raw=json.dumps(
        {"files": {"training_state.pt": "x"}, "settings": {}, "step": math.inf, "seed": 1}
    ).encode()
)
@example(raw=json.dumps({"files": {"a\0": "x"}, "settings": {}, "step": 1, "seed": 1}).encode())
def test_any_manifest_is_whole_or_damaged(raw):
    def check(file):
        with pytest.raises(ValueError) as error:  # none of these is one
            check_checkpoint(file.parent)
        assert "\n" not in str(error.value)

    in_a_file(raw, "manifest.json", check)


@often
@given(
    raw=st.binary(max_size=60) | values.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass")),
    end=texts,
)
def test_any_earlier_settings_are_a_dictionary_and_a_step(raw, end):
    content = raw + b"\n" + FINISHED.encode() + end.encode("utf-8", "surrogatepass")
    before, step = in_a_file(content, "config.yaml", lambda file: read_recorded_settings(file.parent))
    assert isinstance(before, dict) and step >= 0


def with_header(header: object, body: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X"]) | values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | values,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)).map(list) | values,
    },
)
names = st.sampled_from(["unet.conv_in.lora.down.weight", "lora_unet_x.alpha", "clip_l", "__metadata__", "x"])


@often
@given(raw=st.binary(max_size=60) | st.dictionaries(names, entries | values, max_size=3).map(with_header))
@example(raw=with_header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}))
def test_any_lora_file_is_tensors_or_refused_in_a_line(raw):
    from lora_training.errors import UserError
    from lora_training.lora.reading import read_lora_tensors

    found = in_a_file(
        raw, "x.safetensors", lambda file: or_refused(lambda: read_lora_tensors(file), UserError)
    )
    assert found is None or all(tensor.numel() >= 0 for tensor in found[0].values())


@seldom
@given(raw=st.binary(max_size=60) | st.dictionaries(names, entries | values, max_size=3).map(with_header))
@example(raw=b"\xff" * 8)
def test_any_single_file_has_a_family_or_is_refused_in_a_line(raw):
    from lora_training.base_model.family_detection import require_family
    from lora_training.errors import UserError

    for name in ("x.safetensors", "x.ckpt"):
        in_a_file(raw, name, lambda file: or_refused(lambda: require_family(str(file)), UserError))


@seldom
@given(key=st.sampled_from(["prompt", "seed", "paths", "resolution", "adapter_scale", "x"]), value=values)
def test_any_value_of_what_is_drawn_is_taken_or_refused_in_a_line(key, value):
    infer = load_script("infer_lora.py")
    text = yaml.safe_dump(
        {"paths": {"base_model_path": "b/c", "lora_weights_path": "nowhere"}} | {key: value}
    )
    with pytest.raises(infer.UserError) as error:  # at the latest, for there is no such LoRA
        in_a_file(text, "c.yaml", lambda file: infer.read_settings(["--config", str(file)]))
    assert "\n" not in str(error.value)


@seldom
@given(
    raw=st.binary(max_size=200),
    place=st.integers(0, 300),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP"]),
)
def test_any_damaged_picture_is_read_or_is_none(raw, place, kind):
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, kind)
    whole = buffer.getvalue()
    files = (raw, whole[:place] + raw + whole[place + len(raw) :], whole[:place])
    examples = [Example(f"{n}.png", ["a"], lambda file=file: file) for n, file in enumerate(files)]
    examples.append(Example("whole.png", ["a"], lambda: whole))
    args = SimpleNamespace(image_interpolation_mode="lanczos", masked_loss=None)
    kept = prepare_examples(examples, [(32, 32)], args).examples
    assert kept[-1].name == "whole.png" and all(min(e.size) > 0 for e in kept)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((160, 64), (64, 64)), ((64, 100), (64, 64)), ((200, 96), (64, 96)), ((64, 64), (64, 64))],
)
def test_the_crop_that_is_told_is_the_one_that_is_seen(tmp_path, size, bucket):
    """Each pixel says where it was in the picture; of a mirrored one it is counted in the mirrored picture."""
    import numpy as np

    rows, columns = np.mgrid[: size[1], : size[0]].astype(np.uint8)
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2)).save(tmp_path / "x.png")
    args = script.parse_args(["-m", "base", "-d", str(SAMPLE), "--seed", "5", "--random_flip"])
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    base = Components(Path(FAMILIES["sd15"].base), args, None, None)
    schedule = import_class("diffusers", script.FAMILY.training_scheduler).from_config(
        base.get("scheduler").config
    )
    store = prepare_examples([example], [bucket], args)
    data, seen = training_data(script, store, None, args, base.config("vae"), schedule), set()
    for epoch in range(12):
        item = data[Slot(0, 0, epoch, 0, 1.0)]
        red, green, _ = item["pixels"][:, 0, 0].tolist()
        mirrored = red > item["pixels"][0, 0, -1].item()
        assert item["crop_top_left"].tolist() == [green, size[0] - 1 - red if mirrored else red]
        seen.add(mirrored)
    assert seen == {True, False}


@often
@given(
    tags=st.lists(st.text("abc", min_size=1, max_size=3), max_size=6),
    keep=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_shuffled_tags_are_the_same_tags_and_the_trigger_stays_in_front(tags, keep, seed):
    args = SimpleNamespace(
        tag_separator=", ", trigger_word="sks", keep_tokens=keep, tag_dropout=0.0, caption_dropout=0.0
    )
    args.captions_vary = args.shuffle_tags = True
    drawn = script.draw_caption([", ".join(["sks", *tags])], random.Random(seed), args).split(", ")
    assert drawn[0] == "sks" and sorted(drawn[1:]) == sorted(tags)
    assert drawn[: max(1, keep)] == ["sks", *tags][: max(1, keep)]


# ---- sizes, plan, captions -------------------------------------------------------------------------------------------


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
    assert (
        abs(scales[0] - scales[1]) <= max(1 / size[0], 1 / size[1]) + 1e-9
    )  # and not squashed, but for rounding
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
    given = {"seed": 1, "repeats": repeats, "train_batch_size": batch, "prior_loss_weight": 0.5}
    args = SimpleNamespace(**given, compile=False, cuda_graphs=False, weight=1.0)
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
            assert (
                len({(len(s), len({slot.bucket for slot in s})) for s in shares}) == 1
            )  # processes do the same work
            slots = [slot for share in shares for slot in share if slot.weight]
            assert math.isclose(sum(s.weight for s in slots if not s.is_class), 1)
            assert not classes or math.isclose(sum(s.weight for s in slots if s.is_class), 0.5)
            seen.update((s.index, s.repeat) for s in slots if not s.is_class)
            class_places.update((s.index, s.repeat) for s in slots if s.is_class)
        trained = [i for i, e in enumerate(examples) if not e.held_out]
        assert seen == Counter((i, r) for i in trained for r in range(repeats))
        assert class_places.total() == (seen.total() if classes else 0) and set(class_places.values()) <= {1}


@often
@given(caption=st.text(max_size=20), trigger=st.text(min_size=1, max_size=6))
def test_a_trigger_word_is_put_in_front_once(caption, trigger):
    caption, trigger = clean_caption(caption), clean_caption(trigger)
    once = prepend_trigger(caption, trigger)
    assert once.endswith(caption) and (not trigger or trigger.lower() in once.lower())


@often
@given(
    words=st.lists(st.text("as<>0", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    text=st.text("as <>01", max_size=12),
)
@example(words=["a", "s"], text="a s")
def test_new_tokens_stand_for_words_and_not_for_parts_of_tokens(words, text):
    tokens = {word: [f"[{n}]"] if n % 2 else [f"<s{n}>"] for n, word in enumerate(words)}
    marks = {word: [chr(0x4E00 + n)] for n, word in enumerate(words)}  # characters that no word has
    expected = insert_tokens(text, marks)
    for word in words:
        expected = expected.replace(marks[word][0], tokens[word][0])
    assert insert_tokens(text, tokens) == expected


@often
@given(
    steps=st.integers(1, 400),
    every=st.none() | st.integers(1, 500),
    epochs=st.none() | st.integers(1, 50),
    length=st.floats(0.1, 300),
)
def test_validation_is_due_within_the_run_and_at_its_end(steps, every, epochs, length):
    args = SimpleNamespace(validation_steps=every, validation_epochs=None if every else epochs)
    due = validation_schedule(args, steps, length)
    assert steps in due and min(due) >= 1 and max(due) == steps
    assert not every or all(step % every == 0 for step in due - {steps})


@often
@given(names=st.sets(st.text("0123456789-²１ab", max_size=8), max_size=6))
def test_only_folders_with_whole_numbers_are_checkpoints(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(folder, f"checkpoint-{name}").mkdir()
        found = list_checkpoints(Path(folder))
    numbers = [int(p.name.removeprefix("checkpoint-")) for p in found]
    assert numbers == sorted(numbers, reverse=True)
    assert {p.name for p in found} == {f"checkpoint-{n}" for n in names if n and set(n) <= set("0123456789")}
