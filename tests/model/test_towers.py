"""Compares the two encoders with reference values, and their sizes with the paper."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.tbps_clip import count_trainable
from model.transformer import QuickGELU, Transformer
from tests.helpers.golden_models import VIT_B16, assert_close, load, make_model, seeded_model, tiny_model
from tests.helpers.seeded import clip_weights, normal


@torch.no_grad()
def test_tiny_towers_equal_the_reference():
    golden = load("towers_tiny.npz")
    model = tiny_model()
    images = torch.from_numpy(normal("g.tower.image", 5, 3, 64, 32))
    assert_close(model.encode_image(images), golden["image_features"])
    assert_close(model.image_encoder(images, all_tokens=True), golden["image_dense"])
    assert_close(model.encode_text(golden["tokens"]), golden["text_features"])
    assert_close(model.text_encoder(golden["tokens"], all_tokens=True), golden["text_dense"])


@pytest.mark.slow
@torch.no_grad()
def test_vit_b16_equals_the_reference():
    golden = load("towers_vitb16.npz")
    model = seeded_model(VIT_B16, clip_weights())
    images = torch.from_numpy(normal("g.vitb16.image", 2, 3, 224, 224))
    assert_close(model.encode_image(images), golden["image_features_224"])
    assert_close(model.encode_text(golden["tokens"]), golden["text_features_77"])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_last_block_at_one_token_is_the_whole_block_there(causal, checkpointing):
    """Compares outputs and all gradients in float64. In a causal block, later tokens have no effect."""
    torch.manual_seed(0)
    transformer = Transformer(24, 3, 2, activation="quick_gelu").double()
    transformer.grad_checkpointing = checkpointing
    tokens = torch.randn(4, 7, 24, dtype=torch.float64)
    position = torch.tensor([0, 6, 3, 5])
    outcomes = []
    for pooled in (False, True):
        inputs = tokens.clone().requires_grad_()
        if pooled:
            output = transformer.pooled(inputs, position, causal=causal)
        else:
            output = transformer(inputs, causal=causal)[torch.arange(4), position]
        transformer.zero_grad()
        output.square().sum().backward()
        outcomes.append([output, inputs.grad, *(parameter.grad for parameter in transformer.parameters())])
    for whole, at_one_token in zip(*outcomes, strict=True):
        torch.testing.assert_close(at_one_token, whole, rtol=1e-10, atol=1e-12)


def test_the_last_block_computes_little_where_one_token_is_wanted():
    """Keys and values need 4 D² of 24 D² operations per token, so 5/6 of the block is saved."""
    transformer = Transformer(64, 1, 1, activation="quick_gelu")
    tokens, position = torch.randn(2, 50, 64), torch.tensor([3, 4])
    counted = []
    for run in (lambda: transformer(tokens), lambda: transformer.pooled(tokens, position)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            run()
        counted.append(counter.get_total_flops())
    assert counted[1] < 0.25 * counted[0]


def test_quick_gelu_is_x_times_sigmoid_and_keeps_one_tensor():
    """Compares values and gradients with the formula; counts what the backward pass needs besides the output."""
    x = torch.linspace(-8, 8, 1001, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        found = QuickGELU()(x)
    expected = x * torch.sigmoid(1.702 * x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    assert sum(tensor.numel() == x.numel() for tensor in kept) == 1


@torch.no_grad()
def test_padding_changes_nothing():
    golden = load("towers_tiny.npz")
    model = tiny_model()
    longest = int(golden["tokens"].argmax(dim=1).max()) + 1
    assert longest < golden["tokens"].shape[1]
    assert_close(model.encode_text(golden["tokens"][:, :longest]), golden["text_features"])


def test_scale_is_never_above_100_and_its_gradient_passes():
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    scale = model.scale()
    scale.backward()
    assert scale.item() == pytest.approx(100.0)
    assert model.logit_scale.grad > 0


@pytest.mark.parametrize(("simclr_widths", "millions"), [(None, 149.0), ([512, 128, 512], 149.2)])
def test_trainable_parameters_equal_the_paper(simclr_widths, millions):
    with torch.device("meta"):
        model = make_model(**VIT_B16, simclr_widths=simclr_widths)
    assert round(count_trainable(model) / 1e6, 1) == millions
