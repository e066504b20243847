"""PEFT adapters of rankwise; importing this package registers them with PEFT."""

from rankwise.adapters.attach import adapter_config, attach
from rankwise.adapters.block_diagonal import RaLoraConfig, RaLoraLinear, RaLoraModel
from rankwise.adapters.elementwise import LrLoraLinear, LrLoraModel, compile_lr_lora_
from rankwise.adapters.export import Exported, export_lora, export_merged, save_native
from rankwise.adapters.fuse_lora import fuse_lora_, unfuse_lora_
from rankwise.adapters.loading import load_adapter
from rankwise.adapters.lr_lora_config import LrLoraConfig
from rankwise.adapters.param_groups import lr_lora_param_groups
from rankwise.adapters.registration import register
from rankwise.adapters.truncated import Truncated, export_truncated

register("ralora", RaLoraConfig, RaLoraModel)
register("lrlora", LrLoraConfig, LrLoraModel)

__all__ = [
    "Exported",
    "LrLoraConfig",
    "LrLoraLinear",
    "LrLoraModel",
    "RaLoraConfig",
    "RaLoraLinear",
    "RaLoraModel",
    "Truncated",
    "adapter_config",
    "attach",
    "compile_lr_lora_",
    "export_lora",
    "export_merged",
    "export_truncated",
    "fuse_lora_",
    "load_adapter",
    "lr_lora_param_groups",
    "save_native",
    "unfuse_lora_",
]
