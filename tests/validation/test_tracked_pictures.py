"""Validation pictures in the trackers of accelerate; TensorBoard and W&B are real, the others stand-ins."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from lora_training.validation.sample_images import log_samples

pytestmark = pytest.mark.unit

PROMPTS = ["a cat", "a dog"]
COLOURS = {"00_00_a-cat.png": (9, 99, 200), "00_01_a-cat.png": (1, 2, 3), "01_00_a-dog.png": (250, 0, 0)}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Pictures as draw_samples leaves them."""
    PartialState()
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 16), colour).save(tmp_path / name)
    return [tmp_path / name for name in COLOURS]


def started(name: str, **attributes: object) -> accelerate.tracking.GeneralTracker:
    """accelerate's own tracker of this name, as if it had been started."""
    kind = accelerate.tracking.LOGGER_TYPE_TO_CLASS[name]
    tracker = object.__new__(kind)
    vars(tracker).update(attributes)
    return tracker


def test_tensorboard_has_each_picture_under_its_own_name(files, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = accelerate.tracking.TensorBoardTracker("run", tmp_path / "logs")
    tracker.start()
    log_samples(tracker, files, PROMPTS, 30)
    tracker.finish()
    events = EventAccumulator(str(tmp_path / "logs" / "run"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == [f"validation/{name[:5]}" for name in sorted(COLOURS)]
    for name, colour in COLOURS.items():
        (event,) = events.Images(f"validation/{name[:5]}")
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            assert event.step == 30 and image.size == (24, 16)
            assert (np.asarray(image.convert("RGB")) == colour).all()


def test_wandb_has_them_in_one_panel_with_their_prompts(files):
    logged = []
    run = SimpleNamespace(log=lambda values, step, **_: logged.append((values, step)))
    log_samples(started("wandb", run=run), files, PROMPTS, 30)
    ((values, step),) = logged
    assert step == 30 and list(values) == ["validation"]
    assert [image._caption for image in values["validation"]] == ["a cat", "a cat", "a dog"]
    assert [image.image.getpixel((0, 0))[:3] for image in values["validation"]] == list(COLOURS.values())


def test_other_trackers_get_what_they_take(files, monkeypatch):
    """What each package gets from accelerate: pictures, with captions where there is a place for them."""
    sent = []
    record = lambda *arguments, **named: sent.append((*arguments, named))  # noqa: E731
    picture = lambda image, caption=None: (image.getpixel((0, 0)), caption)  # noqa: E731
    for package in ("aim", "swanlab"):
        monkeypatch.setitem(sys.modules, package, SimpleNamespace(Image=picture))
    first, _, last = COLOURS.values()
    log_samples(started("aim", writer=SimpleNamespace(track=record)), files, PROMPTS, 30)
    assert len(sent) == 3 and sent[0] == ((first, "a cat"), {"name": "validation/00_00", "step": 30})
    assert sent[2][0] == (last, "a dog")
    sent.clear()
    log_samples(started("swanlab", run=SimpleNamespace(log=record)), files, PROMPTS, 30)
    assert sent[0][0] == {"validation": [(colour, None) for colour in COLOURS.values()]} and len(sent) == 1
    sent.clear()
    logger = SimpleNamespace(report_image=record)
    log_samples(started("clearml", task=SimpleNamespace(get_logger=lambda: logger)), files, PROMPTS, 30)
    assert len(sent) == 3 and all(isinstance(call[-1]["image"], Image.Image) for call in sent)
    assert {call[-1]["iteration"] for call in sent} == {30}


def test_trackio_gets_each_picture_with_its_prompt(files, monkeypatch):
    sent = []
    picture = lambda file, caption: (Path(file).name, caption)  # noqa: E731
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=picture))
    run = SimpleNamespace(log=lambda values, step: sent.append((values, step)))
    log_samples(started("trackio", run=run), files, PROMPTS, 30)
    ((values, step),) = sent
    assert step == 30 and values["validation/01_00"] == ("01_00_a-dog.png", "a dog") and len(values) == 3


@pytest.mark.parametrize("name", ["comet_ml", "mlflow", "dvclive"])
def test_trackers_that_take_no_pictures_get_none(files, name):
    log_samples(started(name), files, PROMPTS, 30)
