"""The training scripts as the tests know them: a recipe and what it calls, under one roof, until each test imports what it tests."""

from __future__ import annotations

import importlib
import pkgutil
import sys

import lora_training

PLACES = {
    "UserError": ("errors", "UserError"),
    "Interrupted": ("errors", "Interrupted"),
    "brief": ("errors", "one_line"),
    "STOP_SIGNALS": ("signals", "STOP_SIGNALS"),
    "StopSignal": ("signals", "StopSignal"),
    "signals_given_back": ("signals", "default_signals_afterwards"),
    "QUIET": ("console", "QUIET"),
    "printable": ("console", "printable"),
    "listed": ("console", "summarize_names"),
    "say": ("console", "print_status"),
    "waiting": ("console", "progress"),
    "keep_moving": ("console", "refresh_bars"),
    "file_hash": ("files", "sha256_of"),
    "flush": ("files", "flush_to_disk"),
    "rename": ("files", "replace_file"),
    "written": ("files", "atomic_write"),
    "publishing": ("files", "staging_folder"),
    "publish": ("files", "move_result"),
    "checkpoints_in": ("files", "list_checkpoints"),
    "last_good": ("files", "last_checkpoint_note"),
    "read_metrics": ("files", "read_metrics"),
    "read_config": ("files", "read_config_file"),
    "read_text": ("files", "read_text_file"),
    "stable_seed": ("seeds", "stable_seed"),
    "sample_seed": ("seeds", "validation_seed"),
    "torch_dtype": ("tensors", "torch_dtype"),
    "to_device": ("tensors", "move_to_device"),
    "pinned": ("tensors", "pin_memory"),
    "read_safetensors": ("tensors", "read_safetensors"),
    "tensors_hash": ("tensors", "hash_tensors"),
    "DiskCache": ("cache", "DiskCache"),
    "divided": ("processes", "distribute"),
    "import_libraries": ("libraries", "import_libraries"),
    "import_image_libraries": ("libraries", "import_image_libraries"),
    "import_logging_quietly": ("libraries", "import_logging_quietly"),
    "FrozenLinear": ("memory.frozen_linear", "FrozenLinear"),
    "FrozenProduct": ("memory.frozen_linear", "FrozenProduct"),
    "rows_like": ("memory.frozen_linear", "empty_rows_like"),
    "to_fp8": ("memory.frozen_linear", "quantize_fp8"),
    "to_int8": ("memory.frozen_linear", "quantize_int8"),
    "ones": ("memory.frozen_linear", "unit_scales"),
    "frozen": ("memory.frozen_linear", "frozen_linear"),
    "product": ("memory.frozen_linear", "linear_product"),
    "direct": ("memory.frozen_linear", "multiplies_in_fp8"),
    "input_gradient": ("memory.frozen_linear", "input_gradient"),
    "left_out": ("memory.frozen_linear", "skipped_layers"),
    "leaving_out": ("memory.frozen_linear", "skip_layers"),
    "SHARED_INPUT": ("memory.lora_products", "SHARED_INPUT"),
    "LoraGroup": ("memory.lora_products", "LoraGroup"),
    "LoraProducts": ("memory.lora_products", "LoraProducts"),
    "fuse_lora": ("memory.lora_products", "fuse_lora"),
    "adjacent": ("memory.lora_products", "adjacent_in_memory"),
    "GatedGelu": ("memory.activations", "GatedGelu"),
    "JoinedGelu": ("memory.activations", "JoinedGelu"),
    "enable_checkpointing": ("memory.checkpointing", "enable_checkpointing"),
    "last_layers": ("memory.checkpointing", "last_layers"),
    "repeated": ("memory.checkpointing", "repeated_blocks"),
    "compile_blocks": ("memory.checkpointing", "compile_blocks"),
    "BlockSwap": ("memory.block_swap", "BlockSwap"),
    "swap_blocks": ("memory.block_swap", "swap_blocks"),
    "Graphs": ("memory.cuda_graphs", "CudaGraphs"),
    "reading_base": ("base_model.reading", "reading_base"),
    "read_json": ("base_model.reading", "read_json"),
    "Configuration": ("base_model.reading", "Configuration"),
    "library_class": ("base_model.reading", "import_class"),
    "fingerprint": ("base_model.reading", "fingerprint"),
    "resolve_base": ("base_model.sources", "resolve_base"),
    "download": ("base_model.sources", "download"),
    "unpack_single_file": ("base_model.sources", "unpack_single_file"),
    "velocity_marks": ("base_model.sources", "prediction_settings"),
    "parts_with_weights": ("base_model.sources", "parts_with_weights"),
    "load_quantized": ("base_model.quantized", "load_quantized"),
    "place": ("base_model.quantized", "load_tensor"),
    "shard_base": ("base_model.sharding", "shard_base"),
    "block_prefixes": ("base_model.sharding", "block_prefixes"),
    "Components": ("base_model.components", "Components"),
    "latent_shape": ("base_model.vae", "latent_shape"),
    "encode_image": ("base_model.vae", "encode_pixels"),
    "unscaled": ("base_model.vae", "unscale_latents"),
    "ADAPTER": ("adapter_names", "ADAPTER"),
    "LINEAR_FACTORS": ("adapter_names", "LINEAR_FACTORS"),
    "Part": ("optim.parts", "TrainedPart"),
    "prepare_parts": ("optim.optimizers", "prepare_parts"),
    "restored": ("optim.parts", "restored_afterwards"),
    "averaged": ("optim.parts", "averaged_weights"),
    "make_optimizer": ("optim.optimizers", "make_optimizer"),
    "parameter_groups": ("optim.optimizers", "parameter_groups"),
    "waitless_adamw8bit": ("optim.optimizers", "nonblocking_adamw8bit"),
    "waitless_prodigy": ("optim.optimizers", "nonblocking_prodigy"),
    "StepGuard": ("optim.guard", "NonFiniteGuard"),
    "as_captions": ("data.captions", "as_captions"),
    "clean_caption": ("data.captions", "clean_caption"),
    "decode_text": ("data.captions", "decode_text"),
    "with_trigger": ("data.captions", "prepend_trigger"),
    "IMAGE_SUFFIXES": ("data.folders", "IMAGE_SUFFIXES"),
    "CAPTION_COLUMNS": ("data.metadata_files", "CAPTION_COLUMNS"),
    "Example": ("data.folders", "Example"),
    "folder_examples": ("data.folders", "folder_examples"),
    "read_metadata": ("data.metadata_files", "read_metadata"),
    "caption_of_row": ("data.metadata_files", "caption_of_row"),
    "dataset_examples": ("data.hf_datasets", "dataset_examples"),
    "read_cell": ("data.hf_datasets", "read_cell"),
    "builder_dataset": ("data.hf_datasets", "builder_dataset"),
    "load_examples": ("data.examples", "load_examples"),
    "source_examples": ("data.examples", "source_examples"),
    "with_masks": ("data.masks", "attach_masks"),
    "hold_out": ("data.examples", "hold_out"),
    "bucket_sizes": ("data.buckets", "bucket_sizes"),
    "nearest_bucket": ("data.buckets", "nearest_bucket"),
    "print_buckets": ("data.buckets", "print_buckets"),
    "lost_to_crop": ("data.buckets", "share_cropped"),
    "cover_size": ("data.buckets", "cover_size"),
    "decode_image": ("data.images", "decode_image"),
    "to_rgb": ("data.images", "to_rgb"),
    "to_srgb": ("data.images", "to_srgb"),
    "Crop": ("data.crops", "Crop"),
    "draw_crop": ("data.crops", "draw_crop"),
    "cropped": ("data.crops", "crop_and_augment"),
    "COVER_BUDGET": ("data.image_store", "MEMORY_BUDGET"),
    "prepare_examples": ("data.image_store", "prepare_examples"),
    "look_at": ("data.image_store", "measure_example"),
    "ImageStore": ("data.image_store", "ImageStore"),
    "MaskStore": ("data.image_store", "MaskStore"),
    "Finding": ("data.checks", "Finding"),
    "found": ("data.checks", "findings_for"),
    "report_findings": ("data.checks", "report_findings"),
    "examine": ("data.checks", "examine_images"),
    "unvaried_captions": ("data.checks", "unvaried_captions"),
    "truncated_captions": ("data.checks", "truncated_captions"),
    "Slot": ("data.batches", "Slot"),
    "BatchPlan": ("data.batches", "BatchPlan"),
    "TrainingData": ("data.samples", "TrainingData"),
    "collate": ("data.samples", "collate"),
    "batches_ahead": ("data.loader", "batches_ahead"),
    "ready_worker": ("data.loader", "initialize_worker"),
    "pack_batch": ("data.loader", "pack_batch"),
    "unpack_batch": ("data.loader", "unpack_batch"),
    "cache_latents": ("data.latents", "cache_latents"),
    "chunk_ids": ("text.chunks", "chunk_ids"),
    "join_chunks": ("text.chunks", "join_chunks"),
    "abstraction_tokens": ("text.words", "abstraction_tokens"),
    "insert_tokens": ("text.words", "insert_tokens"),
    "class_caption": ("text.words", "class_caption"),
    "TokenRows": ("text.tokens", "TokenRows"),
    "UNSKIPPED": ("text.prompts", "UNSKIPPED"),
    "Prompts": ("text.prompts", "Prompts"),
    "fill_text_cache": ("text.text_cache", "fill_text_cache"),
    "ORIGINAL_NAMES": ("lora.adapters", "ORIGINAL_NAMES"),
    "LORA_TYPES": ("adapter_names", "LORA_TYPES"),
    "lora_targets": ("lora.adapters", "find_target_layers"),
    "add_lora": ("lora.adapters", "add_lora"),
    "lora_parameters": ("lora.adapters", "lora_parameters"),
    "lora_state": ("lora.adapters", "lora_state"),
    "read_initial_lora": ("lora.initial", "read_initial_lora"),
    "halves_swapped": ("lora.kohya_layouts", "swap_halves"),
    "fuse_projections": ("lora.kohya_layouts", "fuse_projections"),
    "to_diffusers_keys": ("lora.formats", "to_diffusers_keys"),
    "text_encoder_keys": ("lora.formats", "text_encoder_keys"),
    "reference_free": ("lora.formats", "reference_free"),
    "kohya_state": ("lora.formats", "kohya_state"),
    "neighbours_norms": ("lora.formats", "neighbours_norms"),
    "KOHYA_SETTINGS": ("training.lora_metadata", "KOHYA_SETTINGS"),
    "lora_metadata": ("training.lora_metadata", "lora_metadata"),
    "base_versions": ("lora.metadata", "base_versions"),
    "tensor_hashes": ("lora.metadata", "tensor_hashes"),
    "number": ("cli.types", "number"),
    "count": ("cli.types", "count"),
    "natural": ("cli.types", "natural"),
    "share": ("cli.types", "share"),
    "part_of_one": ("cli.types", "part_of_one"),
    "rate": ("cli.types", "rate"),
    "amount": ("cli.types", "amount"),
    "signed": ("cli.types", "signed"),
    "mode_scale": ("cli.types", "mode_scale"),
    "tokens": ("cli.types", "tokens"),
    "OPTIMIZERS": ("cli.types", "OPTIMIZERS"),
    "optimizer_name": ("cli.types", "optimizer_name"),
    "key_and_value": ("cli.types", "key_and_value"),
    "yes_or_no": ("cli.types", "yes_or_no"),
    "add_shared_args": ("cli.flags", "add_shared_args"),
    "TIMESTEP_SAMPLING": ("cli.flags", "TIMESTEP_SAMPLING"),
    "RESUME_FLAGS": ("cli.flag_groups", "RESUME_FLAGS"),
    "FREE_FLAGS": ("cli.flag_groups", "FREE_FLAGS"),
    "NAMES_ELSEWHERE": ("cli.flag_groups", "NAMES_ELSEWHERE"),
    "SET_KEYS": ("cli.flag_groups", "SET_KEYS"),
    "PRIOR": ("cli.flag_groups", "PRIOR"),
    "TOKENS": ("cli.flag_groups", "TOKENS"),
    "NO_LORA": ("cli.flag_groups", "NO_LORA"),
    "LORA_STARTS": ("cli.flag_groups", "LORA_STARTS"),
    "TRACKERS": ("cli.flag_groups", "TRACKERS"),
    "RULES": ("cli.rules", "RULES"),
    "check_args": ("cli.rules", "check_args"),
    "is_off": ("cli.rules", "is_off"),
    "data_holding": ("cli.rules", "data_holding"),
    "trains_text": ("cli.rules", "trains_text"),
    "text_frac": ("cli.rules", "text_frac"),
    "optimizer_of": ("cli.defaults", "optimizer_of"),
    "check_trackers": ("cli.rules", "check_trackers"),
    "fill_defaults": ("cli.defaults", "fill_defaults"),
    "use_prepared_buckets": ("cli.defaults", "use_prepared_buckets"),
    "check_sizes": ("cli.defaults", "check_sizes"),
    "parse_args": ("cli.parsing", "parse_args"),
    "OneLineParser": ("cli.parser", "OneLineParser"),
    "config_words": ("cli.parser", "config_to_argv"),
    "set_entries": ("cli.data_sets", "set_entries"),
    "read_set": ("cli.data_sets", "read_set"),
    "PROMPT_KEYS": ("cli.prompt_files", "PROMPT_KEYS"),
    "read_prompts": ("cli.prompt_files", "read_prompts"),
    "Run": ("training.run", "Run"),
    "on_main": ("training.run", "on_main_process"),
    "stop_requested": ("training.run", "received_signal"),
    "start_accelerator": ("training.machine", "start_accelerator"),
    "heed_launcher": ("training.machine", "read_launcher_environment"),
    "choose_precision": ("training.capabilities", "choose_precision"),
    "try_kernels": ("training.capabilities", "try_kernels"),
    "peak_memory": ("training.machine", "peak_memory"),
    "settle_seed": ("training.machine", "choose_seed"),
    "Meter": ("training.metrics", "MetricsLogger"),
    "start_trackers": ("training.metrics", "start_trackers"),
    "GradientWitness": ("training.gradient_check", "GradientCheck"),
    "check_results": ("training.gradient_check", "check_weights_changed"),
    "save_checkpoint": ("training.checkpoints", "save_checkpoint"),
    "training_state": ("training.checkpoints", "training_state"),
    "load_checkpoint": ("training.checkpoints", "load_checkpoint"),
    "resume_settings": ("training.checkpoints", "resume_settings"),
    "find_checkpoint": ("training.checkpoints", "find_checkpoint"),
    "check_checkpoint": ("training.checkpoints", "check_checkpoint"),
    "save_weights": ("training.weights", "save_weights"),
    "write_weights": ("training.weights", "write_weights"),
    "write_diffusers_file": ("training.weights", "write_diffusers_file"),
    "save_merged": ("training.weights", "save_merged"),
    "RESULTS": ("training.summary", "RESULTS"),
    "FINISHED": ("training.output_folder", "FINISHED"),
    "temporary_output": ("training.output_folder", "temporary_output"),
    "locked_output": ("training.output_folder", "locked_output"),
    "takes_lock": ("training.output_folder", "acquire_lock"),
    "finished_before": ("training.output_folder", "is_finished"),
    "kept_settings": ("training.output_folder", "recorded_settings"),
    "earlier_settings": ("training.output_folder", "read_recorded_settings"),
    "clear_output": ("training.output_folder", "clear_output_folder"),
    "summarise": ("training.summary", "print_summary"),
    "command": ("training.summary", "command_line"),
    "fail": ("exits", "report_error"),
    "rehearse": ("training.dry_run", "perform_dry_run"),
    "open_base": ("training.base", "open_base"),
    "validation_schedule": ("training.schedule", "validation_schedule"),
    "is_due": ("training.schedule", "validation_is_due"),
    "default_prompts": ("validation.prompts", "sample_prompts"),
    "draw_samples": ("validation.sample_images", "draw_samples"),
    "weakened": ("validation.drawing", "scaled_lora"),
    "save_sample": ("validation.sample_images", "save_sample"),
    "log_samples": ("validation.sample_images", "draw_and_log_samples"),
    "sample_images": ("validation.drawing", "draw_images"),
    "decoded": ("validation.drawing", "decode_latents"),
    "sampled_latents": ("validation.drawing", "draw_latents"),
    "evaluating": ("validation.drawing", "evaluation_mode"),
    "generate_class_images": ("validation.class_images", "generate_class_images"),
    "load_class_examples": ("validation.class_images", "load_class_examples"),
    "QUANTILES": ("validation.probes", "QUANTILES"),
    "NEUTRAL_PROMPTS": ("validation.prompts", "NEUTRAL_PROMPTS"),
    "Probe": ("validation.probes", "Probe"),
    "probed_images": ("validation.probes", "choose_probed_images"),
    "draw_control": ("validation.sample_images", "draw_control_images"),
    "control_prompts": ("validation.prompts", "control_prompts"),
    "base_alone": ("validation.drawing", "initial_weights"),
    "verdict": ("validation.verdicts", "make_verdict"),
    "comparison_sheet": ("validation.comparison", "comparison_image"),
    "save_results": ("report.results", "save_results"),
    "model_card": ("report.results", "model_card"),
    "embedding_lines": ("report.results", "embedding_lines"),
    "push_to_hub": ("report.results", "push_to_hub"),
    "write_run_files": ("report.run_files", "write_run_files"),
    "unpack": ("base_model.vae", "unpack_latents"),
    "pack": ("base_model.vae", "pack_latents"),
    "unpack_output": ("base_model.vae", "unpack_output"),
    "lighten": ("memory.activations", "save_activation_memory"),
}
FACTS = {
    "FAMILY": "name",
    "FAMILY_TITLE": "title",
    "HUB_TAGS": "hub_tags",
    "PIPELINE_CLASS": "pipeline_class",
    "PIPELINE_OPTIONS": "pipeline_options",
    "TRAINING_SCHEDULER": "training_scheduler",
    "DENOISER": "denoiser",
    "BLOCKS": "block_lists",
    "LAST_PRODUCTS": "last_products",
    "TEXT_ENCODERS": "text_encoders",
    "DROPPED_PARTS": "dropped_parts",
    "DIFFUSERS_SPELLING": "diffusers_spelling",
    "KOHYA_PREFIXES": "kohya_prefixes",
    "PIXEL_DIVISOR": "pixel_divisor",
    "VAE_FLOAT32": "vae_float32",
    "LOADS_EMBEDDINGS": "loads_embeddings",
    "PREDICTS_FLOW": "predicts_flow",
}


def _with_draws(kind, recipe):
    class TrainingData(kind):
        def __init__(self, *a):
            super().__init__(*a, recipe.draw_noise, recipe.draw_caption)

    return TrainingData


class ScriptView:
    """A recipe's module; names that it doesn't have are the library's."""

    def __init__(self, module) -> None:
        vars(self)["module"] = module

    def __getattr__(self, name: str):
        if hasattr(self.module, name):
            return getattr(self.module, name)
        if name in FACTS:
            return getattr(self.module.FAMILY, FACTS[name])
        if name in PLACES:
            module, new = PLACES[name]
            found = getattr(importlib.import_module(f"lora_training.{module}"), new)
            recipe = self.module
            if name == "Prompts":
                return lambda *a: found(*a, recipe.encode_prompts, recipe.join_embeds, recipe.negative_embeds)
            if name == "TrainingData":
                return _with_draws(found, recipe)
            if name == "lora_targets":
                return lambda model, args: found(
                    model,
                    args,
                    recipe.LORA_TARGETS,
                    recipe.idle_layers(args.family.denoiser, model.config, args),
                )
            if name == "class_caption":
                return lambda caption, run: found(
                    caption, run.args.preserve_class, (*run.args.triggers, *run.abstractions)
                )
            if name in ("kohya_state",):
                return lambda *a, **k: found(recipe.FAMILY, *a, **k)
            return found
        if name in sys.modules:
            return sys.modules[name]
        raise AttributeError(name)

    def __setattr__(self, name: str, value) -> None:
        """Sets it wherever it is known."""
        originals = vars(self).setdefault("originals", {})
        if hasattr(self.module, name):
            originals.setdefault(name, getattr(self.module, name))
            return setattr(self.module, name, value)
        module, new = PLACES[name]
        before = getattr(importlib.import_module(f"lora_training.{module}"), new)
        originals.setdefault(name, before)
        for info in pkgutil.walk_packages(lora_training.__path__, "lora_training."):
            loaded = sys.modules.get(info.name)
            if loaded is not None and vars(loaded).get(new) is before:
                setattr(loaded, new, value)

    def __delattr__(self, name: str) -> None:
        """Undoes what was set: monkeypatch asks for it where an object hasn't the name itself."""
        setattr(self, name, vars(self)["originals"][name])
