"""Kinds of adapters (LoRA, LoHa, LoKr), and what peft calls their parameters."""

from __future__ import annotations

import re

LORA_TYPES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}  # https://arxiv.org/abs/2309.14859
# where, in the name of an adapter's parameter, the layer's name ends
ADAPTER = re.compile(r"\.(?=(?:lora|hada|lokr)_)")
# one factor of each kind, to which a layer's update is proportional
LINEAR_FACTORS = (".lora_B.", ".hada_w2_b.", ".lokr_w1.")
