"""--queue: what its files ask for, and runs one after another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import FAMILIES, ROOT, SAMPLE, losses

from lora_training.errors import UserError
from lora_training.queue.jobs import problem_of, read_queue

pytestmark = pytest.mark.run
BASE = FAMILIES["sd15"].base
QUICK = {
    "pretrained_model_name_or_path": str(BASE),
    "train_data_dir": str(SAMPLE),
    "resolution": 64,
    "max_train_steps": 3,
    "checkpointing_steps": 1,
    "num_validation_images": 0,
    "report_to": "none",
    "seed": 3,
}


def write_yaml(file, values):
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_runs_take_defaults_their_own_settings_and_the_products_of_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {
        "defaults": QUICK | {"rank": 2},
        "runs": [
            {"name": "my dog", "rank": 8, "random_flip": True},
            {"config": "presets/small.yaml", "family": "sdxl"},
        ],
        "sweep": {"learning_rate": [1e-4, 3e-4], "validation_prompt": [["a", "b"]]},
    }
    jobs, folder = read_queue([write_yaml(tmp_path / "night.yaml", values)])
    assert str(folder) == "output/night"
    names = [job.name for job in jobs]
    assert len(set(names)) == 4 and names[0] == "my-dog_learning_rate-0.0001_validation_prompt-a-b"
    assert names[3].startswith("small_learning_rate-0.0003")
    argv = jobs[1].argv
    assert "--rank=8" in argv and "--rank=2" not in argv and "--random_flip" in argv
    assert "--learning_rate=0.0003" in argv and argv[argv.index("--validation_prompt") :][:3][1:] == [
        "a",
        "b",
    ]
    assert f"--output_dir=output/night/{names[1]}" in argv and "--resume_from_checkpoint=latest" in argv
    assert jobs[2].argv[:2] == ["sdxl", "--config=presets/small.yaml"]


def test_configurations_by_name_are_a_queue_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = write_yaml(tmp_path / "one.yaml", QUICK)
    two = write_yaml(tmp_path / "two.yaml", QUICK | {"output_dir": "elsewhere/two"})
    jobs, _ = read_queue([one, two])
    assert [(job.name, str(job.output)) for job in jobs] == [("one", "output/one"), ("two", "elsewhere/two")]
    assert read_queue([one])[0][0].argv == jobs[0].argv


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runs": [{"name": "a"}, {"name": "a"}]}, "two runs write to .*output/night/a: give each a name"),
        ({"runs": [{"name": "a"}], "sweeps": {}}, "unknown key 'sweeps'; there are defaults, runs, sweep"),
        ({"runs": {"a": 1}}, "runs is a list"),
        ({"runs": [3]}, "run 1 is a file or names and values, not 3"),
        ({"runs": [{"rank": {"a": 1}}]}, "run-1: rank is a value or a list"),
    ],
)
def test_mistakes_in_a_queues_file_are_one_line(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_queue([write_yaml(tmp_path / "night.yaml", values)])


def test_what_will_fail_is_known_before_the_first_run(tmp_path):
    values = {
        "defaults": QUICK,
        "runs": [{"name": "good"}, {"name": "typo", "rnak": 4}, {"name": "gone", "config": "nowhere.yaml"}],
    }
    jobs, _ = read_queue([write_yaml(tmp_path / "night.yaml", values)])
    problems = [problem_of(job, {}) for job in jobs]
    assert problems[0] == ""
    assert "unknown flag --rnak; did you mean --rank?" in problems[1] and "nowhere.yaml" in problems[2]


def test_flags_beside_the_queue_are_an_error_that_says_where_they_belong(tmp_path):
    command = [sys.executable, ROOT / "scripts/start/train.py", "--queue", "night.yaml", "--rank", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "flags belong into its file, under defaults" in result.stderr


def start_queue(file, folder):
    """The queue as a process that leads a group of its own; its output goes to queue.log."""
    command = [sys.executable, ROOT / "scripts/start/train.py", "--queue", file]
    if not (folder / "config").exists():
        (folder / "config").symlink_to(ROOT / "config")  # the wrapper starts in the project's folder
    with (folder / "queue.log").open("a") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            start_new_session=True,
            env=os.environ | {"MODEL_NAME": ""},
        )


def test_five_runs_one_broken_killed_in_the_middle_end_with_four_results(tmp_path):
    names = ["first", "second", "third", "fourth"]
    runs = [{"name": name, "rank": rank} for rank, name in enumerate(names, 2)]
    runs.insert(1, {"name": "broken", "learning_rate": "fast"})
    runs[2]["max_train_steps"] = 40
    output = tmp_path / "output" / "night"
    file = write_yaml(tmp_path / "night.yaml", {"defaults": QUICK | {"output_dir": None}, "runs": runs})
    queue = start_queue(file, tmp_path)
    end = time.monotonic() + 120
    while not list(output.glob("second/checkpoint-[2-9]")):
        assert queue.poll() is None and time.monotonic() < end, (tmp_path / "queue.log").read_text()
        time.sleep(0.05)
    os.killpg(queue.pid, signal.SIGKILL)
    queue.wait()
    first = (output / "first" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert start_queue(file, tmp_path).wait(timeout=240) == 1
    log = (tmp_path / "queue.log").read_text()
    table = log.rpartition("run  ")[2]
    states = dict(
        re.findall(r"^([a-z]+) +(finished|failed|stopped|not begun)", log.rpartition("advised step")[2], re.M)
    )
    assert states == dict.fromkeys(names, "finished") | {"broken": "failed"}, table
    assert (
        "warning: broken will fail" in log
        and "the queue goes on" in log
        and "going on from checkpoint" in log
    )
    assert (output / "first" / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == first
    assert [len(losses(output / name)) for name in names] == [3, 40, 3, 3]
    assert "Loss" in (output / "compare.html").read_text()


def test_ctrl_c_ends_the_run_with_a_checkpoint_and_then_the_queue(tmp_path):
    runs = [{"name": "one", "max_train_steps": 400}, {"name": "two"}]
    file = write_yaml(
        tmp_path / "night.yaml", {"defaults": QUICK | {"checkpointing_steps": 500}, "runs": runs}
    )
    queue = start_queue(file, tmp_path)
    end = time.monotonic() + 120
    metrics = tmp_path / "output/night/one/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert queue.poll() is None and time.monotonic() < end, (tmp_path / "queue.log").read_text()
        time.sleep(0.05)
    os.killpg(queue.pid, signal.SIGINT)
    assert queue.wait(timeout=60) == 130
    log = (tmp_path / "queue.log").read_text()
    assert list((tmp_path / "output/night/one").glob("checkpoint-*")) and "the same command goes on" in log
    assert re.search(r"^one +stopped", log, re.M) and re.search(r"^two +not begun", log, re.M)
