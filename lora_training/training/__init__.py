"""The state of a run, and what a loop needs: machine, metrics, checkpoints, output folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["Run", "on_main_process", "stop_requested"],
        "machine": ["settle_seed", "start_accelerator"],
        "base": ["open_base"],
        "denoiser": ["fuse_layers", "prepare_denoiser"],
        "plan": ["plan_steps", "report_parts", "report_plan", "stop_run"],
        "schedule": ["default_prompts", "is_due"],
        "metrics": ["MetricsLogger", "start_trackers"],
        "gradient_check": ["GradientCheck", "check_results"],
        "checkpoints": ["find_checkpoint", "load_checkpoint", "save_checkpoint"],
        "weights": ["save_weights"],
        "output_folder": ["clear_output", "is_finished", "open_output_folder"],
        "dry_run": ["rehearse"],
        "memory_estimate": ["MemoryEstimate", "estimate_memory"],
    },
)
