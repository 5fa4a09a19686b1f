"""The choice of the number format, and its effects."""

import pytest
import torch

from misc.errors import UserError
from misc.system import distributed
from misc.system.precision import Precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "avx2": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_on_a_cpu_is_bf16_if_it_has_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Precision.choose("auto", CPU).name == expected


def test_auto_on_a_cpu_is_fp32_if_torch_does_not_report_capabilities(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert Precision.choose("auto", CPU).name == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bf16_if_it_supports_it_natively(monkeypatch, native, expected):
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation  # older GPUs emulate it, slowly

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert Precision.choose("auto", GPU) == Precision(expected, "cuda")


@pytest.mark.parametrize(
    ("name", "device"), [("bf16", CPU), ("fp32", CPU), ("bf16", GPU), ("fp16", GPU), ("fp32", GPU)]
)
def test_the_requested_format_is_used(monkeypatch, name, device):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert Precision.choose(name, device) == Precision(name, device.type)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UserError, match=r"misc\.precision: fp16.*misc\.precision=auto"):
        Precision.choose("fp16", CPU)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_format_and_weights_stay_float32(name, dtype):
    layer = torch.nn.Linear(4, 4)
    with Precision(name, "cpu").autocast():
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer(torch.ones(2, 4)).dtype == layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_only_fp16_scales_losses(name):
    scaler = Precision(name, "cpu").scaler()
    assert not scaler.is_enabled() and scaler.scale(torch.tensor(3.0)) == 3


def test_fp16_scales_losses(monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: (device, enabled))
    assert Precision("fp16", "cuda").scaler() == ("cuda", True)


def test_float32_on_a_gpu_is_never_rounded_to_tf32(monkeypatch):
    """torch's default rounds the inputs of convolutions."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    monkeypatch.setattr(distributed, "check_gpu", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        distributed._select(GPU)
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
