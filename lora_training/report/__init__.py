"""Pages of a run, of several runs, of a data set, and the other files that show what came out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ending": ["finish"],
        "run_files": ["write_run_files"],
        "run_page": ["write_report"],
    },
)
