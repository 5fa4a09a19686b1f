"""Learning rate and parameter groups against reference values."""

import json

import pytest
import torch

from misc.training.optimizer import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from tests.helpers.golden_models import GOLDEN, VIT_B16, make_model, our_name


def our_name_with_heads(name: str) -> str:
    if name.startswith("classifier."):
        return name.replace("classifier.", "identity_classifier.", 1)
    if name.startswith(("cross_", "ln_pre_", "ln_post.", "mlm_head.")):
        return f"masked_language_head.{name}"
    return our_name(name)


@pytest.mark.parametrize("schedule", json.loads((GOLDEN / "lr_schedule.json").read_text()))
def test_learning_rate_equals_the_reference(schedule):
    steps = schedule["iterations_per_epoch"]
    ours = [
        learning_rate(
            step,
            warmup_steps=schedule["epoch_warmup"] * steps,
            total_steps=schedule["epoch"] * steps,
            lr_start=schedule["lr_start"],
            lr=schedule["lr"],
            lr_end=schedule["lr_end"],
        )
        for step in range(schedule["epoch"] * steps)
    ]
    assert ours == pytest.approx(schedule["lr_at_iteration"], rel=1e-5)


def test_parameter_groups_equal_the_reference():
    golden = json.loads((GOLDEN / "parameter_groups.json").read_text())
    with torch.device("meta"):
        model = make_model(
            **VIT_B16,
            simclr_widths=[512, 128, 512],
            masked_language_depth=4,
            identities=11003,
        )
    groups = parameter_groups(model, weight_decay=0.02, head_ratio=5.0)
    ours = {
        name: {"weight_decay": group["weight_decay"], "lr_ratio": group["lr_ratio"]}
        for group in groups
        for name in group["names"]
    }
    assert len(groups) == 4
    assert ours == {our_name_with_heads(name): values for name, values in golden["trained"].items()}
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {our_name_with_heads(name): shape for name, shape in golden["shapes"].items()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {our_name_with_heads(name) for name in golden["frozen"]}


def test_each_group_has_its_share_of_the_learning_rate():
    slow, fast = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    groups = [
        {"params": [slow], "names": ["slow"], "weight_decay": 0.0, "lr_ratio": 1.0},
        {"params": [fast], "names": ["fast"], "weight_decay": 0.0, "lr_ratio": 5.0},
    ]
    optimizer = build_optimizer(groups, betas=(0.9, 0.98), eps=1e-8)
    set_learning_rate(optimizer, 1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 5e-4])
