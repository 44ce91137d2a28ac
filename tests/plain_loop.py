"""A plain LoRA loop for comparison: what a short example script does, all of it in every step.

Written for the benchmark, after the public structure of the field's example scripts: every model stays on the
device, the VAE and the text encoder run in each step, accelerate wraps model, optimizer and loader. It is no
copy of any of them.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import load_dataset
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pretrained_model_name_or_path", required=True)
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train_batch_size", type=int, default=1)
    parser.add_argument("--max_train_steps", type=int, default=10)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", default=None)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    torch.manual_seed(args.seed)
    base = args.pretrained_model_name_or_path
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
    for model in (text_encoder, vae, unet):
        model.requires_grad_(False)
        model.to(accelerator.device, dtype=dtype)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=targets)
    )
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=1e-2)
    table = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")

    def transform(rows):
        pixels = []
        for image in rows["image"]:
            image = image.convert("RGB").resize((args.resolution, args.resolution), Image.Resampling.LANCZOS)
            raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels.append(raw.view(args.resolution, args.resolution, 3).permute(2, 0, 1).float() / 127.5 - 1)
        ids = tokenizer(rows["text"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"pixels": pixels, "ids": list(ids)}

    loader = torch.utils.data.DataLoader(
        table.with_transform(transform), batch_size=args.train_batch_size, shuffle=True
    )
    schedule = get_scheduler("constant", optimizer)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    step = 0
    while step < args.max_train_steps:
        for batch in loader:
            with accelerator.accumulate(unet):
                latents = vae.encode(batch["pixels"].to(dtype)).latent_dist.sample()
                latents = latents * vae.config.scaling_factor
                noise = torch.randn_like(latents)
                timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
                hidden = text_encoder(batch["ids"])[0]
                prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, hidden).sample
                loss = F.mse_loss(prediction.float(), noise.float())
                accelerator.gather(loss.repeat(args.train_batch_size)).mean().item()
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            step += 1
            if step == args.max_train_steps:
                break
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
    StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=layers)


if __name__ == "__main__":
    main()
