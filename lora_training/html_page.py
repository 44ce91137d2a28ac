"""One-file HTML pages from the jinja2 templates in templates/. Nothing on a page is loaded from elsewhere.

What a template shows is escaped. Python gathers the values of a page, its template lays them out.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lora_training.files import atomic_write

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Environment


def write_page(file: Path, template: str, **values: object) -> Path:
    """Writes a page piece by piece, in one step for whoever reads it. Returns the file.

    template: a file of templates/. values: what it shows; iterators are read as they are written.
    """
    page = template_environment().get_template(template)
    with atomic_write(file) as part:
        # names of files need not be text
        page.stream(values).dump(str(part), encoding="utf-8", errors="replace")
    return file


@cache
def template_environment() -> Environment:
    """The templates, wherever the library is: a folder, an installed package or a zip file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        extensions=["jinja2.ext.do"],
        keep_trailing_newline=True,
        loader=PackageLoader("lora_training"),
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["thousands"] = "{:,}".format
    return environment
