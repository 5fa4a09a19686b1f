"""Mixed precision: the number format of the encoders, and the gradient scaler that fp16 needs."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from misc.errors import UserError

FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """A number format on a device. Weights, losses and similarities stay in float32."""

    name: str
    device_type: str

    @classmethod
    def choose(cls, name: str, device: torch.device) -> "Precision":
        """Chooses a format. `auto` is bf16 if the device supports it natively, else fp16 on a GPU and fp32 on a CPU.

        Raises UserError if `name` is fp16 and the device is a CPU.
        """
        if name == "auto" and device.type == "cpu":
            name = "bf16" if _cpu_has_bf16() else "fp32"
        elif name == "auto":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if name == "fp16" and device.type == "cpu":
            raise UserError("misc.precision: fp16 needs a GPU, and this run is on a CPU: set misc.precision=auto")
        return cls(name, device.type)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device_type, dtype=FORMATS[self.name], enabled=self.name != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Returns a scaler that keeps small gradients from vanishing in fp16. It does nothing in the other formats."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def disable_tf32() -> None:
    """Makes float32 exact on GPUs. By default, torch rounds the inputs of float32 convolutions there to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def _cpu_has_bf16() -> bool:
    """Returns whether the CPU has instructions for bf16. Without them, bf16 is slower than fp32."""
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch does not report them
        return False
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
