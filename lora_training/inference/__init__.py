"""Pictures drawn with what a training left: settings, base, adapters, files. infer_lora.py has the order."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "settings": ["Settings", "list_prompts"],
        "checks": ["check_family", "check_infer_path", "check_settings"],
        "trainings": ["Training", "read_trainings", "settings_of_training"],
        "base": ["family_of_base", "find_base_folder"],
        "pipeline": [
            "change_scheduler",
            "device_and_dtype",
            "load_base",
            "load_vae",
            "place_pipeline",
            "quantization_config",
            "report_cut_prompts",
            "silence_libraries",
        ],
        "adapters": ["fuse_adapters", "load_adapter", "load_embeddings", "set_scale"],
        "pictures": ["draw_grid", "new_run_folder", "save_picture", "save_settings"],
    },
)
