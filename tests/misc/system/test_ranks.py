"""One, two and four ranks compute the same: losses and their gradients, gathers, and the evaluation."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from misc.data.annotations import read_annotations
from misc.data.split import Split
from misc.retrieval.evaluation import Evaluator, Retrieval
from misc.system.distributed import Ranks, gather, gather_strided, mean_over_ranks
from misc.system.precision import Precision
from model.objectives import Objectives
from model.tbps_clip import Features
from tests.helpers.golden_models import TINY_MODEL, assert_close, load, tiny_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.tiny_dataset import TinyDataset, write_tiny_dataset
from tests.model.test_losses import NAMES, gradients_as_stored, reference_features
from text_utils.masking import IGNORED_LABEL
from text_utils.tokenizer import Tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))
LOSSES = (*NAMES, "total")
TOTALS = range(10)
"""Numbers of items for `gather_strided`: zero, fewer than ranks, divisible by the number of ranks, not divisible."""
PICKED_TOKENS = [3, 0, 5, 1, 0, 0, 0, 0, 1, 0, 0, 0]
"""Number of picked tokens in each row: ranks pick different numbers, and the last of four ranks picks none."""
VOCABULARY, IDENTITIES = 11, 7
SIZES = {"uneven": (5, 9), "one": (1, 1)}
"""Images and captions of evaluated splits: not divisible by two or four, and fewer than ranks."""


# Computations of each rank; the results of a rank are one nested dict.


def measure(ranks: Ranks, data: TinyDataset) -> dict:
    golden = load(f"losses_w{ranks.world_size}.npz")
    return {
        "losses": {name: measure_loss(ranks, golden, name) for name in LOSSES},
        "heads": measure_heads(ranks, golden["ids"]),
        "gather": measure_gather(ranks),
        "strided": measure_gather_strided(ranks),
        "retrieval": {name: evaluate(ranks, data, *sizes) for name, sizes in SIZES.items()},
    }


def rows_of(ranks: Ranks, total: int = 12) -> slice:
    size = total // ranks.world_size
    return slice(ranks.rank * size, (ranks.rank + 1) * size)


def measure_loss(ranks: Ranks, golden: dict, name: str) -> dict[str, Tensor]:
    """Returns the loss and its gradients under the reference's names, averaged over ranks."""
    leaves, features = reference_features(golden, rows_of(ranks))
    objectives = Objectives(gather=gather, rank=ranks.rank)
    weighted = objectives(features, golden["ids"][rows_of(ranks)], soft_label_ratio=float(golden["alpha"]))
    loss = sum(weighted.values()) if name == "total" else weighted[name]
    loss.backward()
    results = {"value": loss, **gradients_as_stored(leaves)}
    return {key: mean_over_ranks(result.detach()) for key, result in results.items()}


def measure_heads(ranks: Ranks, identities: Tensor) -> dict[str, Tensor]:
    """Returns MLM and ID and their gradients with respect to all logits, averaged over ranks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((12, 6), IGNORED_LABEL)
    for row, count in enumerate(PICKED_TOKENS):
        labels[row, :count] = torch.randint(VOCABULARY, (count,), generator=generator)
    token_logits = torch.randn(12, 6, VOCABULARY, generator=generator, requires_grad=True)
    image_logits, text_logits = (torch.randn(12, IDENTITIES, generator=generator, requires_grad=True) for _ in range(2))

    own = rows_of(ranks)
    features = Features(
        image=torch.ones(12 // ranks.world_size, 2),
        text=torch.ones(12 // ranks.world_size, 2),
        scale=torch.tensor(1.0),
        masked_logits=token_logits[own][labels[own] != IGNORED_LABEL],
        identity_logits=(image_logits[own], text_logits[own]),
    )
    off = {"nitc_ratio": 0.0, "ritc": False, "citc": False, "ss": False, "mvs_image": False}
    objectives = Objectives(gather=gather, rank=ranks.rank, mlm=True, id=True, id_ratio=0.5, **off)
    weighted = objectives(features, identities[own], soft_label_ratio=0.0, masked_labels=labels[own])
    sum(weighted.values()).backward()
    gradients = {"token": token_logits.grad, "image": image_logits.grad, "text": text_logits.grad}
    return {key: mean_over_ranks(result.detach()) for key, result in (weighted | gradients).items()}


def measure_gather(ranks: Ranks) -> dict[str, Tensor]:
    rows = (10.0 * ranks.rank + torch.arange(6.0).reshape(3, 2)).requires_grad_()
    gathered = gather(rows)
    # Each rank weights the gathered elements differently: coefficients are (rank + 1) * (number of the element + 1).
    coefficients = (ranks.rank + 1) * torch.arange(1.0, gathered.numel() + 1).reshape(gathered.shape)
    (gathered * coefficients).sum().backward()
    return {"rows": gathered.detach(), "gradient": rows.grad, "whole": gather(torch.tensor([ranks.rank, 7]))}


def measure_gather_strided(ranks: Ranks) -> dict[int, tuple[Tensor, Tensor]]:
    """Returns for each total the gathered integers (total,) and pairs of floats (total, 2)."""
    results = {}
    for total in TOTALS:
        own = torch.arange(total)[ranks.rank :: ranks.world_size]
        pairs = torch.stack([own, -own], dim=1).double() / 2
        results[total] = gather_strided(own, total), gather_strided(pairs, total)
    return results


def evaluate(ranks: Ranks, data: TinyDataset, images: int, captions: int) -> Retrieval:
    split = shortened(read_annotations(*data)["test"], images, captions)
    evaluator = Evaluator(
        split=split,
        image_dir=data.image_dir,
        tokenizer=Tokenizer(),
        text_length=TINY_MODEL["text_length"],
        resolution=TINY_MODEL["resolution"],
        batch_size=2,
        workers=0,
        ranks=ranks,
        precision=Precision.choose("fp32", ranks.device),
    )
    return evaluator(tiny_model())


def shortened(split: Split, images: int, captions: int) -> Split:
    """Keeps the first images and captions; the captions must be of these images."""
    assert max(split.caption_images[:captions]) < images
    return dataclasses.replace(
        split,
        image_paths=split.image_paths[:images],
        image_identities=split.image_identities[:images],
        captions=split.captions[:captions],
        back_translations=split.back_translations[:captions],
        caption_images=split.caption_images[:captions],
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyDataset:
    folder: Path = tmp_path_factory.mktemp("data") / "dataset"
    return write_tiny_dataset(folder, identities={"train": 1, "test": 5}, images_per_identity=1)


@pytest.fixture(scope="module")
def alone(data) -> dict:
    return measure(ALONE, data)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, data, tmp_path_factory) -> list[dict]:
    """The results of each of two or four ranks."""
    return run_on_ranks(request.param, measure, tmp_path_factory.mktemp("ranks"), data)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_the_reference(ranks, name):
    golden = load(f"losses_w{len(ranks)}.npz")
    stored = NAMES.get(name, name)
    for key, found in ranks[0]["losses"][name].items():
        expected = golden[f"{stored}.value" if key == "value" else f"{stored}.grad.{key}"]
        if name == "citc" and key == "logit_scale":
            assert found == 0 and expected.abs() < 1e-8  # C-ITC does not use the scale
            continue
        # The terms of R-ITC's scale gradient cancel to 1e-3 of their size, but their rounding errors remain.
        tolerance = 1e-3 if (name, key) == ("ritc", "logit_scale") else 1e-5
        assert_close(found, expected, tolerance, f"{name} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_those_of_one_rank(alone, ranks, name):
    for key, found in ranks[0]["losses"][name].items():
        tolerance = 1e-3 if (name, key) == ("ritc", "logit_scale") else 1e-5
        assert_close(found, alone["losses"][name][key], tolerance, f"{name} {key}")


@pytest.mark.slow
def test_head_losses_and_gradients_equal_those_of_one_rank(alone, ranks):
    """MLM is the mean over all picked tokens, even if ranks have different numbers of them."""
    assert set(alone["heads"]) == {"mlm", "id", "token", "image", "text"}
    for key, expected in alone["heads"].items():
        assert_close(ranks[0]["heads"][key], expected, 1e-6, key)


@pytest.mark.slow
def test_gather_stacks_ranks_in_order_and_sums_their_gradients(ranks):
    world_size = len(ranks)
    expected = torch.cat([10.0 * rank + torch.arange(6.0).reshape(3, 2) for rank in range(world_size)])
    sum_of_ranks = world_size * (world_size + 1) / 2
    gradients = (sum_of_ranks * torch.arange(1.0, 6 * world_size + 1)).reshape(world_size, 3, 2)
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gather"]["rows"], expected)
        assert torch.equal(found["gather"]["gradient"], gradients[rank])
        assert found["gather"]["whole"].tolist() == [value for other in range(world_size) for value in (other, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("total", TOTALS)
def test_gather_strided_restores_the_order(ranks, total):
    for found in ranks:
        numbers, pairs = found["strided"][total]
        assert numbers.dtype == torch.int64 and numbers.tolist() == list(range(total))
        assert pairs.dtype == torch.float64 and pairs.tolist() == [[i / 2, -i / 2] for i in range(total)]


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_evaluation_equals_that_of_one_rank(alone, ranks, size):
    expected = alone["retrieval"][size]
    images, captions = SIZES[size]
    assert expected.gallery.shape == (images, 32) and expected.queries.shape == (captions, 32)
    for found in (rank["retrieval"][size] for rank in ranks):
        assert_close(found.queries, expected.queries)
        assert_close(found.gallery, expected.gallery)
        assert torch.equal(found.results.first_match, expected.results.first_match)
        assert_close(found.results.average_precision, expected.results.average_precision)
        assert_close(found.results.inverse_negative_penalty, expected.results.inverse_negative_penalty)
        assert found.metrics == pytest.approx(expected.metrics)
        assert found.without_match == expected.without_match == 0


def test_in_one_process_a_gather_is_the_identity(alone):
    assert torch.equal(alone["gather"]["rows"], torch.arange(6.0).reshape(3, 2))
    assert torch.equal(alone["gather"]["gradient"], torch.arange(1.0, 7).reshape(3, 2))
    for total, (numbers, _) in alone["strided"].items():
        assert numbers.tolist() == list(range(total))


def test_masked_language_loss_is_the_mean_over_all_picked_tokens(alone):
    gradient = alone["heads"]["token"]  # of each picked token: (softmax - one-hot) / number of them
    picked = gradient.abs().amax(dim=-1) > 0
    assert picked.sum(dim=1).tolist() == PICKED_TOKENS
    off_label = gradient[picked].clamp(min=0).sum(dim=1)
    assert (off_label <= 1 / sum(PICKED_TOKENS)).all()
