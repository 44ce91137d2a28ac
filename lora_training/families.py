"""Facts about the four model families: names of their parts, and how their files are spelled.

What is a choice rather than a fact (which layers get a LoRA, which encoders train, usual sizes) stands in the
recipes.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """What files, pipeline and parts of a family are called."""

    name: str
    title: str
    training_script: str  # the file of its recipe
    pipeline_class: str
    training_scheduler: str  # the diffusers scheduler whose noise is trained on
    denoiser: str  # the denoiser's name in the pipeline
    block_lists: tuple[str, ...]  # of the denoiser
    text_encoders: dict[str, tuple[str, str]]  # key in embedding files: (tokenizer, encoder) in the pipeline
    kohya_prefixes: dict[str, str]  # part of the pipeline: how its keys begin in kohya's files
    hub_tags: tuple[str, ...]
    usual_base: str  # on the hub
    resolution: int  # side of the pictures that the family was trained on
    pixel_divisor: int  # image sides must be divisible by this
    predicts_flow: bool  # rectified flow, or noise or velocity of a DDPM
    pipeline_options: dict[str, object] = field(default_factory=dict)
    last_products: tuple[str, ...] = ()  # layers of a block whose results are only gated and added
    dropped_parts: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # flag: parts that a run then does without
    diffusers_spelling: tuple[
        tuple[str, str], ...
    ] = ()  # (peft's, diffusers') in keys of the denoiser's LoRA
    vae_float32: bool = False  # whether the base's own VAE overflows in half precision
    loads_embeddings: bool = True  # whether the pipeline has load_textual_inversion
    fused_projections: bool = False  # whether the original checkpoint holds q, k and v as one layer
    text_settings: tuple[str, ...] = ()  # flags that text embeddings depend on
    t5_tokens: int = 0  # that T5 reads unless --max_sequence_length says otherwise; 0: no T5
    scheduler_settings: tuple[str, ...] = ()  # flags that change the base's scheduler


UNET_TEXT_SETTINGS = ("clip_skip", "max_token_length", "prompt_weighting")
UNET_SCHEDULER_SETTINGS = ("prediction_type", "rescale_betas_zero_snr")
UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")
UNET_SPELLING = ((".lora_A.", ".lora.down."), (".lora_B.", ".lora.up."))

SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.x/2.x",
    training_script="train_lora_sd15.py",
    pipeline_class="StableDiffusionPipeline",
    pipeline_options={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    training_scheduler="DDPMScheduler",
    denoiser="unet",
    block_lists=UNET_BLOCKS,
    text_encoders={"clip_l": ("tokenizer", "text_encoder")},
    diffusers_spelling=UNET_SPELLING,
    text_settings=UNET_TEXT_SETTINGS,
    scheduler_settings=UNET_SCHEDULER_SETTINGS,
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te"},
    hub_tags=("stable-diffusion", "stable-diffusion-diffusers"),
    usual_base="stable-diffusion-v1-5/stable-diffusion-v1-5",
    resolution=512,
    pixel_divisor=8,
    predicts_flow=False,
)
SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    training_script="train_lora_sdxl.py",
    pipeline_class="StableDiffusionXLPipeline",
    pipeline_options={"add_watermarker": False},
    training_scheduler="DDPMScheduler",
    denoiser="unet",
    block_lists=UNET_BLOCKS,
    text_encoders={"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")},
    diffusers_spelling=UNET_SPELLING,
    text_settings=UNET_TEXT_SETTINGS,
    scheduler_settings=UNET_SCHEDULER_SETTINGS,
    kohya_prefixes={"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    hub_tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    usual_base="stabilityai/stable-diffusion-xl-base-1.0",
    resolution=1024,
    pixel_divisor=8,
    predicts_flow=False,
    vae_float32=True,
)
SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3",
    training_script="train_lora_sd3.py",
    pipeline_class="StableDiffusion3Pipeline",
    training_scheduler="FlowMatchEulerDiscreteScheduler",  # 1000 sigmas and timesteps, with the base's shift
    denoiser="transformer",
    block_lists=("transformer_blocks",),
    last_products=("ff.net.2", "ff_context.net.2"),
    text_encoders={
        "clip_l": ("tokenizer", "text_encoder"),
        "clip_g": ("tokenizer_2", "text_encoder_2"),
        "t5": ("tokenizer_3", "text_encoder_3"),
    },
    dropped_parts={"drop_t5": ("tokenizer_3", "text_encoder_3")},
    kohya_prefixes={"transformer": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
    hub_tags=("sd3", "sd3-diffusers"),
    usual_base="stabilityai/stable-diffusion-3-medium-diffusers",
    resolution=1024,
    pixel_divisor=16,
    predicts_flow=True,
    fused_projections=True,
    text_settings=("max_sequence_length",),
    t5_tokens=77,
    loads_embeddings=False,
)
FLUX = Family(
    name="flux",
    title="FLUX.1",
    training_script="train_dreambooth_lora_flux_advanced.py",
    pipeline_class="FluxPipeline",
    training_scheduler="FlowMatchEulerDiscreteScheduler",  # before a shift that depends on the size
    denoiser="transformer",
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    last_products=("ff.net.2", "ff_context.net.2", "proj_out"),
    text_encoders={"clip_l": ("tokenizer", "text_encoder"), "t5": ("tokenizer_2", "text_encoder_2")},
    kohya_prefixes={"transformer": "lora_unet", "text_encoder": "lora_te1"},
    hub_tags=("flux", "flux-diffusers"),
    usual_base="black-forest-labs/FLUX.1-dev",
    resolution=1024,
    pixel_divisor=16,
    predicts_flow=True,
    fused_projections=True,
    text_settings=("max_sequence_length",),
    t5_tokens=512,
)
FAMILIES = {family.name: family for family in (SD15, SDXL, SD3, FLUX)}
