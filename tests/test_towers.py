"""The two encoders against reference values, and their sizes against the paper."""

import pytest
import torch

from model.tbps_clip import TBPSCLIP, count_trainable
from tests.golden_models import VIT_B16, assert_close, load, seeded_model, tiny_model
from tests.seeded import clip_weights, normal


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
        model = TBPSCLIP(**VIT_B16, simclr_widths=simclr_widths)
    assert round(count_trainable(model) / 1e6, 1) == millions
