"""What the trackers of --report_to need before they start: a package, and a login where there is a server.

It is found out from the environment and from files; nothing is imported, and no server is asked.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from lora_training.console import print_status
from lora_training.errors import UserError

PACKAGES = {  # accelerate's trackers, and the packages that bring them
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    **{name: (name,) for name in ("wandb", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio")},
}
YES, NO = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off")
WANDB_SETTINGS = r"(?m)^\s*(api_key|base_url|mode\s*=\s*(offline|dryrun|disabled))"
HUB_TOKEN = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OAUTH_TOKEN")


class Login(NamedTuple):
    """Where a tracker finds its login, and how it does without."""

    variables: tuple[str, ...]  # each of them is a login
    files: dict[str, str]  # file: what stands in it where it is one, a regular expression
    mode: str  # the variable that says whether the tracker sends anything
    local_values: tuple[str, ...]  # its values without a login
    ways_out: str


LOGINS = {
    "wandb": Login(
        ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
        {
            **dict.fromkeys(("$NETRC", "~/.netrc", "~/_netrc"), "WANDB_HOST"),
            **dict.fromkeys(
                ("$WANDB_CONFIG_DIR/settings", "~/.config/wandb/settings", "wandb/settings"), WANDB_SETTINGS
            ),
        },
        "WANDB_MODE",
        ("offline", "dryrun", "disabled"),
        "`wandb login`, or WANDB_API_KEY; WANDB_MODE=offline keeps the files here",
    ),
    "comet_ml": Login(
        ("COMET_API_KEY",),
        dict.fromkeys(
            (
                *("$COMET_CONFIG", "$COMET_CONFIG/.comet.config", ".comet.config", "~/.comet.config"),
                *(".env", "/content/drive/MyDrive/.comet.config"),
            ),
            r"(?mi)^\s*(comet_)?(api_key|(start_)?online)\s*=",
        ),
        "COMET_START_ONLINE",
        NO,
        "`comet login`, or COMET_API_KEY; COMET_START_ONLINE=0 keeps the files here",
    ),
    "clearml": Login(
        ("CLEARML_API_ACCESS_KEY", "CLEARML_AUTH_TOKEN", "CLEARML_IGNORE_MISSING_CONFIG"),
        dict.fromkeys(("$CLEARML_CONFIG_FILE", "~/clearml.conf", "~/trains.conf"), "access_key|token"),
        "CLEARML_OFFLINE_MODE",
        YES,
        "`clearml-init`, or CLEARML_API_ACCESS_KEY and CLEARML_API_SECRET_KEY; CLEARML_OFFLINE_MODE=1 keeps"
        " the files here",
    ),
    "swanlab": Login(
        ("SWANLAB_API_KEY",),
        {
            f"{folder}/{file}": pattern
            for folder in (".swanlab", "$SWANLAB_ROOT", "$SWANLAB_SAVE_DIR", "~/.swanlab")
            for file, pattern in (
                (".netrc", "password"),
                *((name, "api_key|mode") for name in ("config.yaml", "config.yml")),
            )
        },
        "SWANLAB_MODE",
        ("offline", "local", "disabled"),
        "`swanlab login`, or SWANLAB_API_KEY; SWANLAB_MODE=offline keeps the files here",
    ),
    "trackio": Login(
        HUB_TOKEN,
        dict.fromkeys(("$HF_TOKEN_PATH", "$HF_HOME/token", "~/.cache/huggingface/token"), r"\S"),
        "TRACKIO_SPACE_ID",
        ("",),
        "`hf auth login` for the Space in TRACKIO_SPACE_ID; without that variable the files stay here",
    ),
}


def usable_trackers(report_to: str) -> str:
    """The trackers of --report_to with commas, "none" where there is none; `all` is those that can start.

    Errors: UserError for one that is unknown, isn't installed or has no login, with the ways out.
    """
    names = [name.strip() for name in report_to.split(",")]
    if "all" in names:
        problems = {name: login_problem(name) for name in PACKAGES if is_installed(name)}
        for name, problem in problems.items():
            if problem:
                print_status(f"note: --report_to all leaves out {name}, which has {problem}")
        names = [name for name, problem in problems.items() if not problem]
        return ",".join(names) or "none"
    for name in [] if names == ["none"] else names:
        if name not in PACKAGES:
            raise UserError(
                f"--report_to {name}: unknown; use one of {', '.join(sorted(PACKAGES))}, all, none"
            )
        if not is_installed(name):
            raise UserError(f"--report_to {name}: not installed; `pip install {name}`, or --report_to none")
        if problem := login_problem(name):
            raise UserError(f"--report_to {name} has {problem}, or --report_to tensorboard")
    return ",".join(dict.fromkeys(names))


def is_installed(tracker: str) -> bool:
    """Whether a tracker's package is there; a folder of its name, as W&B leaves one behind, is none."""
    for package in PACKAGES[tracker]:
        try:
            importlib.metadata.version(package)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def login_problem(tracker: str) -> str | None:
    """What is wrong with a tracker's login, with the ways out; None where it can start."""
    login = LOGINS.get(tracker)
    if login is None or os.environ.get(login.mode, "").lower() in login.local_values:
        return None
    if tracker == "wandb" and is_malformed(key := os.environ.get("WANDB_API_KEY", "")):
        return f"a WANDB_API_KEY of {len(key)} characters, which is no key of W&B: {login.ways_out}"
    return None if has_login(tracker) else f"no login: {login.ways_out}"


def has_login(tracker: str) -> bool:
    """Whether a variable or a file has a login of a tracker, or a file says that it needs none."""
    login = LOGINS[tracker]
    if any(os.environ.get(name) for name in login.variables):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    for name, pattern in login.files.items():
        file = Path(os.path.expanduser(os.path.expandvars(name)))
        pattern = re.escape(host) if pattern == "WANDB_HOST" else pattern
        if file.is_file() and re.search(pattern, file.read_text(encoding="utf-8", errors="replace")):
            return True
    return False


def is_malformed(key: str) -> bool:
    """Whether text that is given as W&B's key can't be one: 40 characters, after a server's prefix."""
    is_token = key.count(".") == 2  # a JWT
    return bool(key) and not is_token and not re.fullmatch(r"[\w-]{40,}", key.split("-", 1)[-1])
