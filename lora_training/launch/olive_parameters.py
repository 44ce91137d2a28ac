"""Sections of an Olive workflow, read by the rows of `olive_tables`; unknown names are errors."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from lora_training.errors import UserError
from lora_training.launch.olive_tables import NO_EFFECT

if TYPE_CHECKING:
    from collections.abc import Collection

    Rows = tuple[tuple[str, str | None, object], ...]  # (Olive's name, our flag, the default)


def section(values: dict, name: str, file: str) -> dict:
    """A section of a workflow. Errors: UserError if there is none, or another kind of value."""
    if not isinstance(values.get(name), dict):
        raise UserError(f"{file}: {name} is missing, or not a section of names and values")
    return values[name]


def component_parameters(component: dict) -> dict:
    """The parameters of a data component, which stand in its `params` or beside its type."""
    beside = {name: value for name, value in component.items() if name not in ("type", "name", "params")}
    return beside | (component.get("params") or {})


def translate_parameters(
    rows: Rows, values: dict, where: str, other_names: tuple[str, ...] = ()
) -> dict[str, object]:
    """{Olive's name: value} -> {our flag: value}, with the defaults of the rows; None is left out.

    other_names: names that may stand in `values`, too. Errors: UserError for an unknown one.
    """
    check_names(values, (*(name for name, _, _ in rows), *other_names), where)
    flags = {flag: values.get(name, default) for name, flag, default in rows if flag is not NO_EFFECT}
    return {flag: value for flag, value in flags.items() if value is not None}


def ineffective_names(rows: Rows, values: dict) -> list[str]:
    """The names in `values` that mean nothing here.

    output_dir and overwrite are not among them: where results are written is decided here, whatever they say.
    """
    ineffective = {name for name, flag, _ in rows if flag is NO_EFFECT} - {"output_dir", "overwrite"}
    return [name for name in values if name in ineffective]


def check_names(values: dict, known_names: Collection[str], where: str) -> None:
    """Errors: UserError that says where a name stands that isn't known, and which known one is nearest."""
    for name in values:
        if name not in known_names:
            near = difflib.get_close_matches(str(name), list(known_names), n=1, cutoff=0)[0]
            raise UserError(f"{where}: unknown name {name!r}; the nearest is {near!r}")
