"""Faults in the library: data, caches, tokens, LoRA, optimizers, checkpoints, exports, metadata."""

from __future__ import annotations

from scripts.dev.planted_faults.fault import Fault

BATCH_PLAN = "test_every_image_is_trained_once_per_epoch_whatever_the_batch"
SAMPLES = "test_pixels_sizes_and_crops_belong_together"
PICTURES = "test_pictures_are_read_as_people_see_them"
NOISE = "test_each_repeat_and_epoch_has_its_own_noise"
HELD_OUT = "test_held_out_images_are_never_trained_on"
OPTIMIZERS = "test_optimizers_equal_the_libraries"
PLAIN_LOOP = "test_steps_are_those_of_a_plain_loop"
CLIPPING = "test_all_parts_are_clipped_by_one_norm"
RESUMED = "test_resumed_run_equals_unbroken_run"
DAMAGED = "test_damaged_checkpoint_is_named_and_the_one_before_taken -k sdxl"
METADATA = "test_accumulated_batches_are_averaged"
COUNTS = "test_no_step_needs_more_than_before"

# fmt: off
IN_THE_LIBRARY = (
    # plan, repeats
    ("unweighted batch", "data/batches.py", "weights",
     "self.sets[index].weight / len(group))",
     "self.sets[index].weight)", BATCH_PLAN),
    ("prior weight per image", "data/batches.py", "weights",
     "self.prior_loss_weight / len(batch)",
     "self.prior_loss_weight", "test_prior_preservation_weighs_each_half_on_its_own"),
    ("held-out images trained on", "data/batches.py", "plan",
     "enumerate(examples) if not e.held_out}",
     "enumerate(examples)}", HELD_OUT),
    ("repeats ignored", "data/batches.py", "repeats",
     "for repeat in self.repeats_in(index, round_number)]",
     "for repeat in range(1)]", BATCH_PLAN),
    ("every epoch alike", "data/batches.py", "plan",
     '"order", epoch,',
     '"order", 0,', "test_order_differs_between_epochs_and_seeds"),
    ("every process alike", "data/batches.py", "plan",
     "[process * each : (process + 1) * each]",
     "[:each]", BATCH_PLAN),
    ("repeats drawn alike", "data/samples.py", "noise",
     "example.name, slot.repeat)",
     "example.name)", NOISE),
    ("epochs drawn alike", "data/samples.py", "noise",
     "(self.args.seed, slot.epoch,",
     "(self.args.seed,", NOISE),
    ("one image held out too many", "data/examples.py", "plan",
     "round(len(examples) * args.validation_split)",
     "round(len(examples) * args.validation_split) + 1", HELD_OUT),
    # captions
    ("trigger word behind", "data/captions.py", "captions",
     'return f"{trigger}, {caption}" if caption',
     'return f"{caption}, {trigger}" if caption', "test_trigger_word_stands_once"),
    ("class images with captions dropped", "data/samples.py", "captions",
     "caption_rng.choice(example.captions)",
     "self.draw_caption(example.captions, caption_rng, self.args)", "test_class_images_keep_their_prompt"),
    # crops
    ("always cropped at the top", "data/crops.py", "crops",
     "(cover[1] - target[1]) * v)",
     "(cover[1] - target[1]) * 0)", SAMPLES),
    ("never mirrored", "data/crops.py", "crops",
     "if crop.flip:\n        image",
     "if False:\n        image", SAMPLES),
    ("contained, not covered", "data/buckets.py", "crops",
     "scale = max(bucket[0] / size[0]",
     "scale = min(bucket[0] / size[0]", "test_images_are_covered_and_cropped_never_squashed"),
    ("buckets by area", "data/buckets.py", "crops",
     "abs(width - height), 6)",
     "abs(width + height), 6)", "test_nearest_bucket_goes_by_aspect_ratio"),
    # pixels, tokens
    ("pixels from 0 to 1", "base_model/vae.py", "pixels",
     ".float() / 127.5 - 1",
     ".float() / 255", "test_latents_are_those_that_the_pipeline_decodes"),
    ("EXIF ignored", "data/images.py", "pixels",
     "to_srgb(ImageOps.exif_transpose(image))",
     "to_srgb(image)", PICTURES),
    ("transparency on black", "data/images.py", "pixels",
     'image.size, "white"), image)',
     'image.size, "black"), image)', PICTURES),
    ("channels first in tokens", "base_model/vae.py", "tokens",
     ".permute(0, 2, 4, 1, 3, 5)",
     ".permute(0, 2, 4, 3, 5, 1)", "test_flux_loss_against_its_formula"),
    # time ids
    ("crop coordinates swapped", "data/samples.py", "time ids",
     "torch.tensor((crop.top, left))",
     "torch.tensor((left, crop.top))", SAMPLES),
    ("crop of the unmirrored", "data/samples.py", "time ids",
     "- crop.left if crop.flip else crop.left",
     "- crop.left if not crop.flip else crop.left",
     "test_crop_coordinates_are_those_of_the_picture_as_it_is_seen"),
    ("size as width, height", "data/samples.py", "time ids",
     "(example.size[1], example.size[0])",
     "(example.size[0], example.size[1])", SAMPLES),
    # caches
    ("one latent for both flips", "data/latents.py", "caches",
     "crop.left, crop.top, crop.flip)",
     "crop.left, crop.top)", "test_mirrored_latents_are_those_of_the_mirrored_picture"),
    ("texts of another base", "text/prompts.py", "caches",
     "prompt, *self.identity[key], self",
     "prompt, self", "test_text_of_another_base_is_not_taken_from_the_cache"),
    ("last part of the key lost", "cache.py", "caches",
     '"|".join(map(str, key))',
     '"|".join(map(str, key[:-1]))', "test_cache_entries_belong_to_their_content"),
    # token rows
    ("first token untrained", "text/tokens.py", "token rows",
     "(numbers >= 0)",
     "(numbers > 0)", "test_rows_reach_a_table_that_has_room_already"),
    ("rows of size 1", "text/tokens.py", "token rows",
     "generator=generator) * table.std()",
     "generator=generator)", "test_new_tokens_are_as_large_as_the_table"),
    ("a step past the pivot", "training/run.py", "token rows",
     "and step < part.last_step for part",
     "and step <= part.last_step for part", "test_text_moves_up_to_the_pivot"),
    # LoRA, optimizer, clipping, average, schedule
    ("alpha ignored", "lora/adapters.py", "LoRA",
     "lora_alpha=args.lora_alpha,",
     "lora_alpha=args.rank,", "test_the_update_is_alpha_by_rank"),
    ("betas swapped", "optim/optimizers.py", "optimizer",
     "(args.adam_beta1, args.adam_beta2)",
     "(args.adam_beta2, args.adam_beta1)", OPTIMIZERS),
    ("no weight decay", "optim/optimizers.py", "optimizer",
     '"weight_decay"] = part.weight_decay',
     '"weight_decay"] = 0.0', OPTIMIZERS),
    ("arguments lose", "optim/optimizers.py", "optimizer",
     "flag_settings(optimizer_class, part, args) | args.optimizer_args",
     "args.optimizer_args | flag_settings(optimizer_class, part, args)",
     "test_arguments_that_the_script_passes_itself_win"),
    ("growth unbounded", "optim/nonblocking.py", "optimizer",
     'state["d_max"], first * growth_rate)',
     'state["d_max"], first * math.inf)', "test_every_argument_of_prodigy_does_what_the_librarys_does"),
    ("matrices flat", "optim/optimizers.py", "optimizer",
     "or bool(names & SHAPED_CLASSES)",
     "or False", "test_steps_are_those_on_the_matrices_themselves"),
    ("gradients kept", "optim/parts.py", "optimizer",
     "self.gradients.zero_()\n        if",
     "pass\n        if", PLAIN_LOOP),
    ("norm always the bound", "optim/guard.py", "clipping",
     ".clamp_(max=1.0).nan_to_num_(0.0)",
     ".nan_to_num_(0.0)", CLIPPING),
    ("norm per part", "optim/guard.py", "clipping",
     "torch.linalg.vector_norm(torch.stack(norms))",
     "norms[0]", CLIPPING),
    ("average of the start", "optim/parts.py", "average",
     "self.ema.step([self.weights])",
     "pass", PLAIN_LOOP),
    ("average not shown", "optim/parts.py", "average",
     "part.ema.copy_to([part.weights])",
     "pass", "test_averages_are_swapped_back_exactly"),
    ("schedule stands", "optim/parts.py", "schedule",
     "self.schedule.step()",
     "pass", PLAIN_LOOP),
    ("no warm-up", "optim/optimizers.py", "schedule",
     "num_warmup_steps=args.lr_warmup_steps",
     "num_warmup_steps=0", PLAIN_LOOP),
    ("schedule twice as long", "optim/optimizers.py", "schedule",
     "num_training_steps=part.last_step,",
     "num_training_steps=2 * part.last_step,", PLAIN_LOOP),
    # checkpoints
    ("optimizer not resumed", "optim/parts.py", "checkpoints",
     'self.optimizer.load_state_dict(saved["optimizer"])',
     "pass", f"{RESUMED} -k 'sdxl and (cached or ema)'"),
    ("schedule not resumed", "optim/parts.py", "checkpoints",
     'self.schedule.load_state_dict(saved["schedule"] | {"base_lrs": self.schedule.base_lrs})',
     "pass", f"{RESUMED} -k 'sdxl and prodigy'"),  # its learning rate falls
    ("damage unseen", "training/checkpoints.py", "checkpoints",
     "if sha256_of(folder / name) != digest",
     "if False", DAMAGED),
    ("oldest checkpoint first", "files.py", "checkpoints",
     "sorted(checkpoints, reverse=True)",
     "sorted(checkpoints)", "test_only_our_checkpoints_count"),
    # exports, metadata
    ("alpha of 1 in kohya's file", "lora/formats.py", "exports",
     "torch.tensor(float(alpha))",
     "torch.tensor(1.0)", "test_kohya_keys_carry_each_alpha"),
    ("start added twice", "lora/formats.py", "exports",
     "torch.cat([value, -start], dim=1)",
     "torch.cat([value, start], dim=1)", "test_starts_that_change_the_base_are_taken_out"),
    ("one alpha of three", "lora/kohya_layouts.py", "exports",
     'sum(p["alpha"] for p in there)',
     'there[0]["alpha"]', "test_sd3_fused_keys_give_the_same_update"),
    ("rank as alpha in metadata", "training/weights.py", "metadata",
     '{"lora_alpha": alpha, "r": rank',
     '{"lora_alpha": rank, "r": rank', METADATA),
    ("alpha as ss_network_dim", "training/lora_metadata.py", "metadata",
     '"ss_network_dim": rank',
     '"ss_network_dim": alpha', METADATA),
    ("resolution turned", "training/lora_metadata.py", "metadata",
     '"{}x{}".format(*image_size(run)),',
     '"{}x{}".format(*image_size(run)[::-1]),', METADATA),
    # what a step costs
    ("input copied", "memory/lora_products.py", "cost",
     "hidden = torch.mm(x, group.down.t())",
     "hidden = torch.mm(x.clone(), group.down.t())", COUNTS),
    ("wait for the gradients", "optim/guard.py", "cost",
     "not self.scale.is_cuda else True",
     "not self.scale.is_cuda else bool(self.finite)", COUNTS),
)
# fmt: on

LIBRARY_FAULTS = tuple(
    Fault(name, f"lora_training/{file}", part, old, new, (test,))
    for name, file, part, old, new, test in IN_THE_LIBRARY
)
