"""Pages of a run and of several, and the other files that show what came out of a training."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "ending": ["finish"],
        "run_files": ["write_run_files"],
        "run_page": ["write_report", "write_run_page"],
        "comparison_page": ["write_comparison_page"],
    },
)
