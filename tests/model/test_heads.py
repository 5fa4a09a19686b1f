"""Compares the heads of masked language modelling and identity classification with reference values."""

import torch

from model import losses
from model.heads import MaskedLanguageHead
from tests.helpers.golden_models import assert_close, load
from tests.helpers.seeded import normal, weight


def seeded_head() -> MaskedLanguageHead:
    head = MaskedLanguageHead(width=64, depth=2, vocab_size=49408)
    head.load_state_dict(
        {name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in head.state_dict().items()}
    )
    return head.eval()


@torch.no_grad()
def test_masked_language_head_equals_the_reference():
    golden = load("mlm_id.npz")
    head = seeded_head()
    assert set(head.state_dict()) <= set(golden["state_names"])
    text = torch.from_numpy(normal("g.mlm.text", 2, 9, 64))
    image = torch.from_numpy(normal("g.mlm.image", 2, 5, 64))
    everything = torch.ones(2, 9, dtype=torch.bool)
    logits = head(text, image, valid=everything, picked=everything).unflatten(0, (2, 9))
    assert_close(logits[..., ::997], golden["mlm_logits_slice"])
    picked = golden["labels"] != -100
    loss = losses.masked_language(logits[picked], golden["labels"][picked], picked.sum())
    assert_close(loss, golden["mlm_loss"])


@torch.no_grad()
def test_padding_changes_no_prediction():
    head = seeded_head()
    text, image = torch.from_numpy(normal("g.mlm.text", 2, 9, 64)), torch.from_numpy(normal("g.mlm.image", 2, 5, 64))
    valid = torch.ones(2, 9, dtype=torch.bool)
    alone = head(text, image, valid=valid, picked=valid)
    padded_text = torch.cat([text, torch.full((2, 4, 64), 9.0)], dim=1)
    padded_valid = torch.cat([valid, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    assert_close(head(padded_text, image, valid=padded_valid, picked=padded_valid), alone)


def test_identity_loss_equals_the_reference():
    golden = load("mlm_id.npz")
    identities = golden["identity_labels"]
    classifier_weight = torch.from_numpy(weight("classifier.weight", (13, 64)))
    classifier_bias = torch.from_numpy(weight("classifier.bias", (13,)))
    image, text = (
        torch.from_numpy(normal(name, 6, 64)) @ classifier_weight.T + classifier_bias
        for name in ("g.id.image", "g.id.text")
    )
    assert_close(losses.identity(image, text, identities, rows=len(identities)), golden["id_loss"])
