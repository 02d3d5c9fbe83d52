"""LoRA of peft on a UNet, to compare adapters of gates with: a model that configs can name.

    pip install -c constraints.txt --no-deps peft
    PYTHONPATH=tools asr-downstream train-diffusion tools/bench/unet-w32-lora_cifar10.py --cfg-options model.base=BASE

The base is frozen; of the runs that this trains, `asr-downstream evaluate` measures the adapted model as it is.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
from torch import nn

from asr_downstream.diffusion.models.build import MODELS

__all__ = ['LoRAUNet2DModel']

LAYERS = (nn.Conv2d, nn.Linear)


@MODELS.register_module()
def LoRAUNet2DModel(base: str, rank: int = 4, embedding: bool = False) -> diffusers.UNet2DModel:  # noqa: N802  as a class
    """Load a UNet and add LoRA to its convolutions and linear layers.

    Args:
        base: folder of the pipeline or of the model.
        rank: of the products that are added to the weights; alpha is the same number.
        embedding: whether to adapt the embedding of the timestep too.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an experiment's, and no extra of this package

    folder = Path(base)
    unet = diffusers.UNet2DModel.from_pretrained(folder / 'unet' if (folder / 'unet').is_dir() else folder)
    names = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, LAYERS) and (embedding or not name.startswith('time_embedding'))
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), unet)
    return unet
