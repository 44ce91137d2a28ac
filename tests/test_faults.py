"""What people get wrong, and the one line that they read then."""

import functools
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, KINDS, ROOT, SAMPLE, losses, quick_flags, run_here
from PIL import Image

from lora_training.data.images import decode_image, to_rgb

pytestmark = pytest.mark.faults


def one_line(capsys) -> str:
    """The single line on stderr, apart from the progress bar."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "training:" not in line
    ]
    assert len(lines) == 1, lines
    return lines[0]


HEAVY = ("accelerate", "datasets", "diffusers", "numpy", "peft", "PIL", "torch", "transformers", "yaml")
WRONG = [  # flags, and words of the line
    (["--lerning_rate", "1"], "did you mean --learning_rate"),
    (["--train_data_dir", "nowhere"], "--train_data_dir nowhere: no such folder"),
    (["-d", ".", "--rank", "0"], "--lora_r/-r: 0 is below 1"),
    (["-d", ".", "--rank", "x"], "invalid count value: 'x'"),
    (["-d", ".", "--resolution", "63"], "--resolution 63 is not divisible by"),
    (["-d", ".", "--caption_dropout", "1.5"], "not between 0 and 1"),
    (["-d", ".", "--config", "nowhere.yaml"], "--config nowhere.yaml: No such file"),
    (["-d", ".", "--with_prior_preservation"], "needs --class_prompt"),
    (
        ["-d", ".", "--class_prompt", "a dog"],
        "--class_prompt has no effect without --with_prior_preservation",
    ),
    (["-d", ".", "--train_text_encoder", "--train_text_encoder_ti"], "exclude each other"),
    (["-d", ".", "--train_transformer_frac", "0"], "needs --train_text_encoder_ti"),
    (["-d", ".", "--cache_latents", "--color_jitter"], "--cache_latents can't be combined"),
    (["-d", ".", "--huber_c", "0.2"], "--huber_c has no effect without --loss_type huber"),
    (["-d", ".", "--ema_decay", "0.9"], "--ema_decay has no effect without --use_ema"),
    (["-d", ".", "--blocks_to_swap", "4", "--compile"], "--blocks_to_swap can't be combined with --compile"),
    (["-d", ".", "--cuda_graphs"], "--cuda_graphs needs --cache_latents"),
    (["-d", ".", "--report_to", "nothing"], "--report_to nothing: unknown"),
    (
        ["-d", ".", "--push_to_hub", "--hub_token", "x", "--report_to", "wandb"],
        "--hub_token is refused with wandb",
    ),
    (["-d", ".", "--instance_data_dir", "."], "exclude each other"),
    (["--instance_data_dir", "."], "--instance_data_dir needs --instance_prompt"),
    ([], "no data"),
    (["-d", ".", "--optimizer", "sgd"], "sgd is none of adamw, "),
    (["-d", ".", "--aspect_ratio_buckets", "512"], 'is no "height,width"'),
]
ANSWERS = """
import contextlib, importlib.util, io, json, sys
spec = importlib.util.spec_from_file_location("asked", sys.argv[1])
script = importlib.util.module_from_spec(spec)
sys.modules["asked"] = script
spec.loader.exec_module(script)
answers = []
for flags in json.loads(sys.argv[2]):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = script.main(["-m", "base", *flags])
        except SystemExit as end:
            code = end.code
    answers.append((code, out.getvalue(), err.getvalue(), [m for m in json.loads(sys.argv[3]) if m in sys.modules]))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Gives a function: what a script says to each of WRONG, one after another in a process of its own."""
    folder = tmp_path_factory.mktemp("wrong")

    @functools.cache
    def of(name: str) -> list[tuple[int, str, str, list[str]]]:
        words = [
            str(ROOT / FAMILIES[name].script),
            json.dumps([flags for flags, _ in WRONG]),
            json.dumps(HEAVY),
        ]
        command = [sys.executable, "-c", ANSWERS, *words]
        return json.loads(
            subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True).stdout
        )

    return of


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("number", range(len(WRONG)), ids=[words for _, words in WRONG])
def test_wrong_arguments_are_one_line_before_anything_heavy_is_imported(name, number, answers):
    """What is tested is why a script answers within half a second, and not how fast the machine is."""
    code, said, line, heavy = answers(name)[number]
    assert (code, said, heavy) == (2, "", [])
    assert len(line.strip().splitlines()) == 1 and WRONG[number][1] in line


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_help_imports_nothing_heavy(name, tmp_path):
    """As a program; its stdout ends with the slow packages that it has imported."""
    code = (
        "import atexit, runpy, sys; sys.argv = sys.argv[1:]\n"
        f"atexit.register(lambda: print('HEAVY', [m for m in {HEAVY} if m in sys.modules], end=''))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / FAMILIES[name].script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.endswith("HEAVY []")


def test_config_file_with_unknown_key(family, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    assert run_here(family, tmp_path / "x", "--config", tmp_path / "c.yaml") == 2
    assert "unknown key 'learning_rat'; the nearest is 'learning_rate'" in one_line(capsys)


def test_command_line_wins_over_config_file(recipe, tmp_path):
    (tmp_path / "c.json").write_text(
        json.dumps({"rank": 8, "resolution": [64, 128], "center_crop": True, "learning_rate": 3e-4})
    )
    args = recipe.parse_args(
        ["--config", str(tmp_path / "c.json"), "-m", "x", "-d", str(SAMPLE), "--rank", "2"]
    )
    assert (args.rank, args.resolution, args.center_crop, args.learning_rate) == (2, [64, 128], True, 3e-4)


@pytest.fixture
def troubled(pictures) -> Path:
    """A folder with everything that goes wrong in a picture folder, beside seven good pictures."""
    good = Image.open(pictures / "0.png").convert("RGB").resize((300, 300))
    (pictures / "no_image.png").write_bytes(b"this is text")
    buffer = io.BytesIO()
    good.save(buffer, "JPEG")
    (pictures / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    exif = Image.Exif()
    exif[0x0112] = 6
    good.crop((0, 0, 300, 100)).save(pictures / "turned.jpg", exif=exif)
    good.convert("CMYK").save(pictures / "cmyk.jpg")
    Image.fromarray(__import__("numpy").full((80, 80), 40000, dtype="uint16")).save(pictures / "deep.png")
    good.convert("RGBA").save(pictures / "clear.png")
    good.convert("P").save(pictures / "palette.gif")
    (pictures / "notes.pdf").write_bytes(b"%PDF")
    (pictures / ".DS_Store").write_bytes(b"\0\0")
    (pictures / "0.txt").write_text("")
    (pictures / "1.txt").write_bytes("un chât noir".encode("latin-1"))
    (pictures / "2.txt").write_bytes("a cat".encode("utf-16"))
    return pictures


@pytest.mark.families("sdxl")
def test_troubled_folder_trains_and_says_what_was_left_out(family, troubled, tmp_path, capsys):
    assert run_here(family, tmp_path / "x", "-d", troubled, "--default_caption", "a thing") == 0
    said = capsys.readouterr().out
    assert "no_image.png is left out: not an image" in said
    assert "truncated.jpg is left out: damaged" in said
    assert "1.txt is not UTF-8; read as Windows-1252" in said
    assert "not images, left alone: 1 x .pdf" in said
    assert "12 images" in said


@pytest.mark.families("sd15")
def test_originals_are_never_changed(family, troubled, tmp_path):
    before = {f: f.read_bytes() for f in troubled.iterdir()}
    assert (
        run_here(
            family, tmp_path / "x", "-d", troubled, "--cache_latents", "--cache_folder", tmp_path / "cache"
        )
        == 0
    )
    assert before == {f: f.read_bytes() for f in troubled.iterdir()}


def test_colour_modes_and_rotation(troubled):
    def load(name):
        return decode_image((troubled / name).read_bytes())

    assert load("turned.jpg").size == (100, 300)
    assert {load(n).mode for n in ("cmyk.jpg", "deep.png", "clear.png", "palette.gif")} == {"RGB"}
    assert load("deep.png").getpixel((0, 0)) == (156, 156, 156)  # 40000 of 65535
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.families("sd15")
def test_huge_picture_is_left_out(family, pictures, tmp_path, capsys):
    Image.new("1", (20000, 20000)).save(pictures / "huge.png")
    assert run_here(family, tmp_path / "x", "-d", pictures) == 0
    assert "huge.png is left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"file_name": "../secret.png", "text": "x"}', "leads out of the data folder"),
        ('{"file_name": "missing.png", "text": "x"}', "there is no such file"),
        ('{"file_name": ', "line 1: not JSON"),
        ('{"text": "x"}', "no file_name"),
    ],
)
def test_metadata_that_lies(family, pictures, tmp_path, capsys, rows, words):
    (pictures.parent / "secret.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "metadata.jsonl").write_text(rows)
    assert run_here(family, tmp_path / "x", "-d", pictures) == 2
    assert words in one_line(capsys)


def test_caption_column_that_is_not_there(family, tmp_path, capsys):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--caption_column", "txt") == 2
    assert "--caption_column txt" in one_line(capsys)


def test_folder_without_images_or_captions(family, tmp_path, pictures, capsys):
    (tmp_path / "empty").mkdir()
    assert run_here(family, tmp_path / "x", "-d", tmp_path / "empty") == 2
    assert "no images in" in one_line(capsys)
    for file in pictures.glob("*.txt"):
        file.unlink()
    assert run_here(family, tmp_path / "x", "-d", pictures) == 2
    assert "no image has a caption" in one_line(capsys)


@pytest.mark.parametrize("flag", ["--lora_layers", "--lora_blocks"])
def test_lora_layer_that_matches_nothing(family, tmp_path, capsys, flag):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, flag, "to_qq") == 2
    assert "matches no layer" in one_line(capsys)


def test_token_that_no_caption_has(family, tmp_path, capsys):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--train_text_encoder_ti") == 2
    assert "--token_abstraction TOK: no caption contains it" in one_line(capsys)


def test_output_that_cannot_be_written(family, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_here(family, tmp_path / "file", "-d", SAMPLE) == 2
    assert "can't be written to" in one_line(capsys)


def test_base_that_is_not_there_or_another_family(family, tmp_path, capsys):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", "./nowhere") == 2
    assert "no such file or folder" in one_line(capsys)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "-m", tmp_path / "base") == 2
    assert "is a OtherPipeline, not" in one_line(capsys)


@pytest.mark.xdist_group("processes")
@pytest.mark.families("flux")
def test_full_disk_while_a_checkpoint_is_written(family, tmp_path):
    """A limit on file sizes stands in for a full disk: the second checkpoint is bigger than what is left."""
    output = tmp_path / "x"
    assert run_here(family, output, "-d", SAMPLE, "--checkpointing_steps", 2, "--max_train_steps", 2) == 0
    from ready_process import start

    more = ("--checkpointing_steps", 1, "--max_train_steps", 3, "--resume_from_checkpoint", "latest")
    flags, log = quick_flags(family, output, "-d", SAMPLE, *more), tmp_path / "log"
    process = start(ROOT / family.script, flags, {}, log, file_limit=100_000)
    process.join(120)
    said = log.read_text()
    assert process.exitcode == 2
    assert "checkpoint-3 could not be written" in said.splitlines()[-1]
    assert "the last good checkpoint is checkpoint-2" in said
    assert "Traceback" not in said
    assert [p.name for p in output.glob("*checkpoint*")] == ["checkpoint-2"]


@pytest.mark.families(*KINDS)
def test_nan_never_reaches_the_weights(family, pictures, tmp_path, script, monkeypatch, capsys):
    original, calls = script.compute_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(script, "compute_loss", poisoned)
    assert run_here(family, tmp_path / "x", "-d", pictures, "--max_train_steps", 4) == 0
    assert "step 2: the loss is nan; the step is left out" in capsys.readouterr().out
    from conftest import metrics, weights

    assert all(w.isfinite().all() for w in weights(tmp_path / "x").values())
    assert metrics(tmp_path / "x")[-1]["skipped_steps"] == 1
    monkeypatch.setattr(script, "compute_loss", lambda *a: original(*a) * float("nan"))
    assert run_here(family, tmp_path / "y", "-d", pictures, "--max_train_steps", 30) == 2
    assert "has not been finite for 10 steps" in capsys.readouterr().err


@pytest.mark.families(*KINDS)
def test_constant_loss_is_an_error(family, pictures, tmp_path, script, monkeypatch, capsys):
    original = script.compute_loss
    monkeypatch.setattr(script, "compute_loss", lambda *a: original(*a) * 0.0)
    assert run_here(family, tmp_path / "x", "-d", pictures, "--max_train_steps", 8) == 2
    assert "no gradient reaches the denoiser" in capsys.readouterr().err


@pytest.mark.families("flux")
def test_a_tracker_without_pictures_runs(family, tmp_path):
    assert (
        run_here(family, tmp_path / "x", "-d", SAMPLE, "--report_to", "tensorboard", "--max_train_steps", 2)
        == 0
    )
    assert len(losses(tmp_path / "x")) == 2


@pytest.mark.families("sd3")
def test_a_fault_of_ours_is_one_line_and_a_crash_log(family, tmp_path, script, monkeypatch, capsys):
    monkeypatch.setattr(script, "train", lambda *_: 1 / 0)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE) == 1
    assert (
        "a fault of this script (ZeroDivisionError: division by zero)" in (line := one_line(capsys))
        and "crash.log" in line
    )
    assert "ZeroDivisionError" in (tmp_path / "x" / "crash.log").read_text()


@pytest.mark.families("sdxl")
def test_half_a_line_of_metrics_blocks_no_resume(family, tmp_path, pictures):
    flags = ("-d", pictures, "--checkpointing_steps", 2, "--max_train_steps", 4)
    assert run_here(family, tmp_path / "x", *flags) == 0
    file = tmp_path / "x" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + '\n{"step": 4, "lo')
    assert run_here(family, tmp_path / "x", *flags, "--resume_from_checkpoint", "checkpoint-2") == 0
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
