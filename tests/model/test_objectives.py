"""Compares the losses of the study with plain formulas."""

import dataclasses
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from misc.config.loading import load_config
from misc.system.distributed import Ranks, gather, gather_detached
from model.objectives import Objectives
from model.tbps_clip import Features
from tests.helpers.golden_models import assert_close
from tests.helpers.ranks import run_on_ranks
from tests.helpers.seeded import normal

IDENTITIES = torch.tensor([0, 1, 0, 2, 1, 3, 3, 2])
OFF = {"ritc": False, "citc": False, "ss": False, "mvs_image": False}
ALONE = Objectives(gather=lambda rows: rows, **OFF)
SCALE = 20.0


def rows(name: str) -> Tensor:
    return torch.from_numpy(normal(name, 8, 6)).double()


def features(**more) -> Features:
    return Features(image=rows("image"), text=rows("text"), scale=torch.tensor(SCALE), **more)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def one_hot_itc(image: Tensor, text: Tensor) -> Tensor:
    """Computes CLIP's loss: each image should match its own caption, and each caption its own image."""
    logits = SCALE * unit(image) @ unit(text).T
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_pair_labels_make_clip_s_own_loss():
    objectives = dataclasses.replace(ALONE, nitc_labels="pair")
    (found,) = objectives(features(), IDENTITIES, 0.0).values()
    assert_close(found, one_hot_itc(rows("image"), rows("text")), 1e-6)


def test_soft_labels_are_the_mean_of_belief_and_pair():
    objectives = dataclasses.replace(ALONE, nitc_labels="pair")
    (found,) = objectives(features(), IDENTITIES, 0.5).values()
    logits = SCALE * unit(rows("image")) @ unit(rows("text")).T
    expected = 0
    for direction in (logits, logits.T):
        probabilities = direction.softmax(dim=1)
        labels = 0.5 * probabilities + 0.5 * torch.eye(8)
        expected = expected - (labels * probabilities.log()).sum() / 8 / 2
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(("images", "captions"), [(False, True), (True, False), (True, True)])
def test_multi_view_supervision_is_the_mean_over_the_combinations_of_views(images, captions):
    objectives = dataclasses.replace(ALONE, nitc_labels="pair", mvs_image=images, mvs_text=captions)
    assert (objectives.needs_second_view, objectives.needs_second_caption) == (images, captions)
    own = features(
        second_image=rows("second image") if images else None, second_text=rows("second text") if captions else None
    )
    (found,) = objectives(own, IDENTITIES, 0.0).values()
    image_views = ["image", "second image"] if images else ["image"]
    caption_views = ["text", "second text"] if captions else ["text"]
    each = [one_hot_itc(rows(image), rows(text)) for image, text in product(image_views, caption_views)]
    assert_close(found, sum(each) / len(each), 1e-6)


@pytest.mark.parametrize("captions", [False, True])
def test_soft_labels_come_from_the_captions_with_other_dropout_without_gradient(captions):
    objectives = dataclasses.replace(ALONE, nitc_labels="pair", mvs_image=True, mvs_text=captions)
    names = ["text", "second text"] if captions else ["text"]
    views = {name: rows(name).requires_grad_() for name in ["image", "second image", *names]}
    again = tuple(rows(f"{name} again").requires_grad_() for name in names)
    own = Features(
        image=views["image"],
        text=views["text"],
        scale=torch.tensor(SCALE),
        second_image=views["second image"],
        second_text=views.get("second text"),
        soft_label_texts=again,
    )
    (found,) = objectives(own, IDENTITIES, 0.5).values()
    found.backward()
    expected = []
    for image, name in product(("image", "second image"), names):
        logits = SCALE * unit(rows(image)) @ unit(rows(name)).T
        predicting = SCALE * unit(rows(image)) @ unit(rows(f"{name} again")).T
        for scores, guesses in ((logits, predicting), (logits.T, predicting.T)):
            labels = 0.5 * guesses.softmax(dim=1) + 0.5 * torch.eye(8)
            expected.append(-(labels * scores.log_softmax(dim=1)).sum() / 8)
    assert_close(found.detach(), sum(expected) / len(expected), 1e-6)
    assert all(view.grad.abs().max() > 0 for view in views.values())
    assert all(view.grad is None or not view.grad.any() for view in again)


def test_ss_t_is_nt_xent_of_the_captions():
    objectives = dataclasses.replace(ALONE, nitc_ratio=0.0, ss_text=True)
    assert objectives.needs_simclr_captions and not objectives.needs_simclr_views
    pair = (rows("one"), rows("other"))
    (found,) = objectives(features(simclr_text=pair), IDENTITIES, 0.0).values()
    both = unit(torch.cat(pair))
    total = 0
    for row in range(16):
        partner = (row + 8) % 16
        others = torch.tensor([both[row] @ both[column] / 0.1 for column in range(16) if column != row])
        total = total - (both[row] @ both[partner] / 0.1 - others.logsumexp(0))
    assert_close(found, 0.4 * total / 16, 1e-6)


def test_ss_it_is_the_sum_of_both():
    pairs = {"simclr": (rows("a"), rows("b")), "simclr_text": (rows("c"), rows("d"))}
    both = dataclasses.replace(ALONE, ss=True, ss_text=True)(features(**pairs), IDENTITIES, 0.0)
    assert list(both) == ["nitc", "ss", "ss_text"]
    alone = dataclasses.replace(ALONE, ss=True)(features(simclr=pairs["simclr"]), IDENTITIES, 0.0)
    assert torch.equal(both["ss"], alone["ss"]) and not torch.equal(both["ss"], both["ss_text"])


def test_sdm_is_irra_s_divergence_at_a_fixed_scale():
    """Expects Σ p · log(p / (q̂ + 1e-8)) of both directions, at 50 times the cosines for every temperature."""
    objectives = dataclasses.replace(ALONE, nitc_ratio=0.0, sdm=True)
    assert not objectives.uses_temperature
    (found,) = objectives(features(), IDENTITIES, 0.0).values()
    expected = 0
    for first, second in (("image", "text"), ("text", "image")):
        p = (50 * unit(rows(first)) @ unit(rows(second)).T).softmax(dim=1)
        q = (IDENTITIES[:, None] == IDENTITIES).double()
        q = q / q.sum(dim=1, keepdim=True)
        expected = expected + (p * (p / (q + 1e-8)).log()).sum(dim=1).mean()
    assert_close(found, expected, 1e-5)


# ---- on two ranks ---------------------------------------------------------------------------------------------------


EVERYTHING = {"nitc_labels": "pair", "mvs_text": True, "ss": False, "ss_text": True, "sdm": True}
TABLES = ("image", "text", "second image", "second text", "one", "other")


def gradients(ranks: Ranks, detached: bool, objectives: Objectives | None = None) -> dict[str, Tensor]:
    """Computes the gradients of this rank's rows, for the mean of the loss over the ranks."""
    size = 8 // ranks.world_size
    own = slice(ranks.rank * size, (ranks.rank + 1) * size)
    leaves = {name: rows(name)[own].clone().requires_grad_() for name in TABLES}
    chosen = objectives or Objectives(gather=gather_detached if detached else gather, rank=ranks.rank, **EVERYTHING)
    weighted = chosen(
        Features(
            image=leaves["image"],
            text=leaves["text"],
            scale=torch.tensor(SCALE),
            second_image=leaves["second image"],
            second_text=leaves["second text"],
            simclr_text=(leaves["one"], leaves["other"]),
        ),
        IDENTITIES[own],
        0.3,
    )
    (sum(weighted.values()) / ranks.world_size).backward()
    return {name: leaf.grad for name, leaf in leaves.items()} | {"loss": sum(weighted.values()).detach()}


def test_two_ranks_compute_the_same_as_one(tmp_path):
    alone = gradients(Ranks(0, 1, torch.device("cpu")), detached=False)
    ranks = run_on_ranks(2, gradients, tmp_path, False)
    assert_close(sum(rank["loss"] for rank in ranks) / 2, alone["loss"], 1e-9)
    for name in TABLES:
        assert_close(torch.cat([rank[name] for rank in ranks]), alone[name], 1e-9)


def test_detached_gathering_gives_the_same_loss_and_no_gradient_to_other_ranks(tmp_path):
    """Compares with an autograd graph in one process, in which the rows of the other rank are constants."""
    ranks = run_on_ranks(2, gradients, tmp_path, True)
    alone = gradients(Ranks(0, 1, torch.device("cpu")), detached=False)
    assert_close(sum(rank["loss"] for rank in ranks) / 2, alone["loss"], 1e-9)
    whole = [unit(rows(name)) for name in TABLES]
    for rank, found in enumerate(ranks):
        own = slice(4 * rank, 4 * rank + 4)

        def with_constants(x: Tensor, own=own, rank=rank) -> Tensor:
            if x.ndim == 1:
                return IDENTITIES
            constants = min(whole, key=lambda table: (table[own] - x.detach()).abs().sum())
            return torch.cat([constants[:4], x] if rank else [x, constants[4:]])

        objectives = Objectives(gather=with_constants, rank=rank, **EVERYTHING)
        expected = gradients(Ranks(rank, 2, torch.device("cpu")), detached=True, objectives=objectives)
        for name in TABLES:
            assert_close(found[name], expected[name], 1e-9)
        assert not torch.allclose(found["image"], alone["image"][own])


def test_the_defaults_are_the_recipe():
    """`Objectives` without settings is the full recipe of config/config.yaml."""
    experiment = load_config().experiment
    names = [field.name for field in dataclasses.fields(Objectives) if field.name not in ("gather", "rank")]
    assert {name: getattr(Objectives(gather=None), name) for name in names} == {
        name: experiment[name] for name in names
    }
