"""Compares every loss and its gradients with reference values, and checks properties of the losses."""

import pytest
import torch
import torch.nn.functional as F

from model import losses
from model.objectives import Objectives, soft_label_ratio_at
from model.tbps_clip import Features
from tests.helpers.golden_models import assert_close, load

NAMES = {"nitc": "nitc_loss", "ritc": "ritc_loss", "citc": "citc_loss", "ss": "ss_loss"}


def reference_features(golden: dict, rows: slice = slice(None)) -> tuple[dict, Features]:
    """Returns leaf tensors of the reference inputs (all rows), and the features of `rows` of them."""
    names = ("feat.image", "feat.aug1", "feat.ss1", "feat.ss2", "text", "w1", "b1", "w2", "b2", "logit_scale")
    leaves = {name: golden[name].float().clone().requires_grad_() for name in names}

    def project(x):
        return F.linear(F.relu(F.linear(x, leaves["w1"], leaves["b1"])), leaves["w2"], leaves["b2"])

    features = Features(
        image=leaves["feat.image"][rows],
        second_image=leaves["feat.aug1"][rows],
        text=leaves["text"][rows],
        simclr=(project(leaves["feat.ss1"][rows]), project(leaves["feat.ss2"][rows])),
        scale=leaves["logit_scale"].exp(),
    )
    return leaves, features


def gradients_as_stored(leaves: dict) -> dict:
    """Returns gradients under the names of the reference. The gradient of an unused input is zero."""
    gradient = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
    images = [gradient[name] for name in ("feat.image", "feat.aug1", "feat.ss1", "feat.ss2")]
    return {
        "image_table": torch.cat(images),
        "text_table": gradient["text"],
        **{name: gradient[name] for name in ("logit_scale", "w1", "b1", "w2", "b2")},
    }


@pytest.mark.parametrize("name", [*NAMES, "total"])
def test_value_and_gradients_equal_the_reference(name):
    golden = load("losses_w1.npz")
    leaves, features = reference_features(golden)
    objectives = Objectives(gather=lambda rows: rows)
    weighted = objectives(features, golden["ids"], soft_label_ratio=float(golden["alpha"]))
    assert set(weighted) == set(NAMES)
    loss = sum(weighted.values()) if name == "total" else weighted[name]
    loss.backward()
    stored = NAMES.get(name, name)
    assert loss.item() == pytest.approx(float(golden[f"{stored}.value"]), rel=1e-5)
    for key, gradient in gradients_as_stored(leaves).items():
        expected = golden[f"{stored}.grad.{key}"]
        if name == "citc" and key == "logit_scale":
            # C-ITC does not use the scale; the reference has a rounding error of multiplying and dividing by it.
            assert expected.abs() < 1e-8
            continue
        # The scale gradient of R-ITC is 1e-3 of its terms, which cancel, so their rounding error is larger in it.
        tolerance = 1e-3 if (name, key) == ("ritc", "logit_scale") else 1e-5
        assert_close(gradient, expected, tolerance, key)


def test_objectives_that_are_off_compute_nothing():
    golden = load("losses_w1.npz")
    _, features = reference_features(golden)
    features.second_image = features.simclr = None
    objectives = Objectives(gather=lambda rows: rows, mvs_image=False, ss=False, citc=False)
    assert set(objectives(features, golden["ids"], 0.3)) == {"nitc", "ritc"}
    assert not (objectives.needs_second_view or objectives.needs_simclr_views or objectives.needs_masked_captions)


def test_multi_view_is_the_mean_of_the_two_views():
    golden = load("losses_w1.npz")
    _, features = reference_features(golden)
    single = Objectives(gather=lambda rows: rows, mvs_image=False, ritc=False, citc=False, ss=False)
    both = Objectives(gather=lambda rows: rows, mvs_image=True, ritc=False, citc=False, ss=False)
    first = single(features, golden["ids"], 0.3)["nitc"]
    swapped = Features(image=features.second_image, text=features.text, scale=features.scale)
    second = single(swapped, golden["ids"], 0.3)["nitc"]
    assert both(features, golden["ids"], 0.3)["nitc"].item() == pytest.approx(((first + second) / 2).item(), rel=1e-6)


def test_matching_distribution_spreads_evenly_over_the_same_person():
    targets = losses.matching_distribution(torch.tensor([3, 5]), torch.tensor([3, 5, 3, 7]))
    assert torch.equal(targets, torch.tensor([[0.5, 0, 0.5, 0], [0, 1, 0, 0]]))


def test_normalised_contrastive_with_hard_labels_is_cross_entropy():
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    expected = F.cross_entropy(logits, torch.arange(4))
    assert losses.normalised_contrastive(logits, torch.eye(4), 0.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_soft_label_ratio_grows_over_the_first_epoch():
    assert [soft_label_ratio_at(step, 4, 0.5) for step in (0, 1, 3, 4, 9)] == [0, 0.125, 0.375, 0.5, 0.5]


def test_masked_language_without_a_picked_token_is_zero():
    loss = losses.masked_language(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), torch.tensor(0.0))
    assert loss.item() == 0
