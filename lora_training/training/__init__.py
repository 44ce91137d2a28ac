"""The state of a run, and what a loop needs: machine, base, metrics, checkpoints, output folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["Run", "on_main_process", "stop_run"],
        "requests": ["received_requests"],
        "machine": ["choose_seed", "start_accelerator"],
        "base": ["fuse_layers", "open_base", "prepare_denoiser"],
        "schedule": ["plan_steps", "report_parts", "report_plan", "validation_is_due"],
        "metrics": ["MetricsLogger", "start_trackers"],
        "gradient_check": ["GradientCheck", "check_weights_changed"],
        "checkpoints": ["find_checkpoint", "load_checkpoint", "save_checkpoint"],
        "weights": ["save_weights"],
        "output_folder": ["clear_output_folder", "is_finished", "open_output_folder"],
        "dry_run": ["perform_dry_run"],
        "memory_estimate": ["MemoryEstimate", "estimate_memory"],
    },
)
