"""PEFT adapters of rankwise; importing this package registers them with PEFT."""

from rankwise.adapters.attach import adapter_config, attach
from rankwise.adapters.block_diagonal import RaLoraConfig, RaLoraLinear, RaLoraModel
from rankwise.adapters.fuse_lora import fuse_lora_, unfuse_lora_
from rankwise.adapters.registration import register

register("ralora", RaLoraConfig, RaLoraModel)

__all__ = [
    "RaLoraConfig",
    "RaLoraLinear",
    "RaLoraModel",
    "adapter_config",
    "attach",
    "fuse_lora_",
    "unfuse_lora_",
]
