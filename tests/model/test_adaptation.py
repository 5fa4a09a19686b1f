"""CoOp, CLIP-Adapter, and frozen or dropped text layers: what is computed, trained and saved."""

import pytest
import torch
from torch import Tensor

from misc.data.annotations import read_annotations
from misc.data.split import few_shot
from misc.run.checkpoint import read_checkpoint
from model.adaptation import ContextPrompt, ImageAdapter
from model.pretrained.weights import read_weights
from tests.helpers.golden_models import assert_close, tiny_model
from tests.helpers.runs import ARCHITECTURE, METRICS, QUICK, Run, at_step, finished, of_dataset, only_error
from tests.helpers.tiny_dataset import write_tiny_dataset
from text_utils.tokenizer import END, START, Tokenizer

STILL = ("schedule.lr=1e-12", "schedule.lr_start=0", "schedule.lr_end=0")
"""No weight changes by more than rounding."""
PLAIN = ("experiment.ss=false", "experiment.mvs_image=false", "experiment.citc=false")


# ---- CoOp -----------------------------------------------------------------------------------------------------------


def test_a_context_is_read_as_words_in_front_of_the_caption():
    """A context of three words' vectors gives the feature of the caption with these words."""
    tower, tokenizer = tiny_model().text_encoder, Tokenizer()
    words = tokenizer.encode("a red coat")[1:-1]
    prompt = ContextPrompt(len(words), tower.token_embedding.weight.shape[1])
    with torch.no_grad():
        prompt.context.copy_(tower.token_embedding.weight[words])
    captions = ["a man", "someone walks by"]
    without_context = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokenizer.encode(c)) for c in captions], batch_first=True
    )
    for row, caption in enumerate(captions):
        expected = tower(torch.tensor([tokenizer.encode(f"a red coat {caption}")]))
        assert_close(tower(without_context, prompt=prompt)[row : row + 1], expected, 1e-6)


@pytest.mark.parametrize("words", [1, 2, 3, 4, 9])
def test_a_caption_that_is_too_long_is_truncated_like_the_tokenizer_does(words):
    tokenizer, text_length = Tokenizer(), 8
    prompt = ContextPrompt(3, 4)
    captions = [" ".join(["red"] * words), "red"]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(tokenizer.encode(caption, text_length)) for caption in captions], batch_first=True
    )
    cut = prompt.truncate(ids, text_length)
    for row, caption in zip(cut, captions, strict=True):
        expected = tokenizer.encode(caption, text_length - 3)
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
    assert cut.shape[1] <= 5 and (cut[:, 0] == START).all() and (cut == END).sum() == 2


def test_only_the_context_gets_gradients():
    tower = tiny_model().text_encoder
    tower.requires_grad_(False)
    prompt = ContextPrompt(4, tower.token_embedding.weight.shape[1])
    tower(torch.tensor([Tokenizer().encode("a man")]), prompt=prompt).sum().backward()
    assert prompt.context.grad.norm(dim=1).min() > 0


# ---- CLIP-Adapter ---------------------------------------------------------------------------------------------------


def test_the_adapter_is_a_share_of_two_layers_on_the_feature():
    adapter, features = ImageAdapter(8, 0.4), torch.randn(3, 8)
    first, second = adapter.mlp[0].weight, adapter.mlp[2].weight
    assert first.shape == (2, 8) and second.shape == (8, 2)  # a quarter as wide in its middle
    expected = 0.4 * ((features @ first.T).relu() @ second.T).relu() + 0.6 * features
    assert_close(adapter(features), expected, 1e-6)


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def train(run, data, tmp_path):
    def call(*arguments: str, name: str = "run") -> Run:
        folder = tmp_path / name
        fixed = (*ARCHITECTURE, *QUICK, *of_dataset(data), "schedule.epoch=1", "log.sheet=0", *PLAIN)
        outcome = run(*fixed, f"model.saved_path={folder}", *arguments)
        assert outcome.status == 0, outcome
        return Run(folder, outcome)

    return call


def tensors(run: Run) -> dict[str, Tensor]:
    return read_checkpoint(run.folder / "checkpoint_last.pth")["model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adaptation", "trained"),
    [
        ("coop", {"prompt.context"}),
        ("clip_adapter", {"image_adapter.mlp.0.weight", "image_adapter.mlp.2.weight"}),
    ],
)
@pytest.mark.parametrize("chunk", ["null", "2"])
def test_an_adapted_run_changes_its_own_and_is_evaluated_with_it(
    train, run, data, tmp_path, adaptation, trained, chunk
):
    began = train(name="start")
    start = f"model.checkpoint={began.folder / 'checkpoint_last.pth'}"
    adapted = train(
        start, f"model.adaptation={adaptation}", f"data.chunk_size={chunk}", "schedule.lr=0.1", name="adapted"
    )
    before, after = tensors(began), tensors(adapted)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = after.keys() - before.keys()
    assert new - {"image_adapter.ratio"} == trained
    if adaptation == "coop":
        ids = Tokenizer().encode("a pedestrian photo of")[1:-1]
        moved = (after["prompt.context"] - before["text_encoder.token_embedding.weight"][ids]).abs()
        assert 1e-3 < moved.max() < 3  # AdamW moved it away from the words

    source = adapted.folder / "checkpoint_best.pth"
    outcome = run(*QUICK, *of_dataset(data), "--evaluate", source)
    assert outcome.status == 0, outcome
    (record,) = adapted.records
    assert "".join(f"{record[name]:7.2f}" for name in METRICS) in outcome.out
    export = only_error(run("--export", "openclip", tmp_path / "out", f"model.checkpoint={source}"))
    assert "adapted" in export and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapted_checkpoint_starts_another_run(train):
    first = train("model.adaptation=coop", name="first")
    start = f"model.checkpoint={first.folder / 'checkpoint_last.pth'}"
    again = train(start, "model.adaptation=coop", *STILL, name="again")
    assert_close(tensors(again)["prompt.context"], tensors(first)["prompt.context"], 1e-6)
    assert "the context is the one learned in" in again.outcome.out
    shorter = train(start, "model.adaptation=coop", "model.context=a photo", *STILL, name="shorter")
    ids = Tokenizer().encode("a photo")[1:-1]
    words = tensors(shorter)["text_encoder.token_embedding.weight"][ids]
    assert_close(tensors(shorter)["prompt.context"], words, 1e-6)
    other = train(start, name="other")
    assert "warning: prompt of" in other.outcome.out and "prompt.context" not in tensors(other)


@pytest.mark.slow
def test_frozen_layers_stay_as_they_were_and_the_others_do_not(train):
    deep = ("model.text_layers=3", "model.checkpoint=null")
    began = train(*deep, *STILL, name="start")
    frozen = train(*deep, "model.frozen_text_layers=[2]", "schedule.lr=0.01", name="frozen")
    before, after = tensors(began), tensors(frozen)
    block = "text_encoder.transformer.resblocks."
    for name, value in before.items():
        if name.startswith(block) and name.endswith("mlp.c_fc.weight"):
            assert torch.allclose(after[name], value) == name.startswith(f"{block}1."), name


@pytest.mark.slow
def test_dropped_layers_are_gone_from_the_checkpoint_which_resumes_and_is_evaluated(train, run, data):
    began = train("model.text_layers=3", name="start")
    start = f"model.checkpoint={began.folder / 'checkpoint_last.pth'}"
    own = (start, "model.text_layers=auto", "model.dropped_text_layers=[2]")
    dropped = train(*own, *STILL, name="dropped")
    before, after = tensors(began), tensors(dropped)
    block = "text_encoder.transformer.resblocks."
    assert not any(name.startswith(f"{block}2.") for name in after)
    for name, value in after.items():
        origin = name.replace(f"{block}1.", f"{block}2.") if name.startswith(f"{block}1.") else name
        assert_close(value, before[origin], 1e-6)
    source = dropped.folder / "checkpoint_best.pth"
    assert read_weights(source).sizes.text_layers == 2
    outcome = run(*QUICK, *of_dataset(data), "--evaluate", source)
    (record,) = dropped.records
    assert "".join(f"{record[name]:7.2f}" for name in METRICS) in outcome.out

    whole = train(*own, "schedule.epoch=2", name="whole")
    folder = whole.folder.parent / "stopped"
    fixed = (*ARCHITECTURE, *QUICK, *of_dataset(data), "schedule.epoch=2", "log.sheet=0", *PLAIN, *own)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 15, fail)
        with pytest.raises(RuntimeError, match="step 15"):
            run(*fixed, f"model.saved_path={folder}", "log.checkpoint_period=4")
    assert run(*fixed, f"model.saved_path={folder}", "log.checkpoint_period=4", "--resume").status == 0
    found = tensors(finished(folder))
    assert all(torch.equal(found[name], value) for name, value in tensors(whole).items())


@pytest.mark.slow
def test_the_ratio_of_the_adapter_is_that_of_the_configuration(train):
    first = train("model.adaptation=clip_adapter", name="first")
    start = f"model.checkpoint={first.folder / 'checkpoint_last.pth'}"
    again = train(start, "model.adaptation=clip_adapter", "model.adapter_ratio=0.2", name="again")
    assert tensors(again)["image_adapter.ratio"] == pytest.approx(0.2)


def fail() -> None:
    raise RuntimeError("step 15")


def test_wrong_layers_and_adaptations_are_refused(run, data, tmp_path):
    fixed = (*ARCHITECTURE, *QUICK, *of_dataset(data), f"model.saved_path={tmp_path / 'run'}")
    assert "no layer 2" in only_error(run(*fixed, "model.frozen_text_layers=[2]"))
    assert "leaves none" in only_error(run(*fixed, "model.dropped_text_layers=[1]"))
    assert "delete one" in only_error(
        run(*fixed, "model.text_layers=2", "model.dropped_text_layers=[1]", "model.frozen_text_layers=[1]")
    )
    assert "experiment.ss=false" in only_error(run(*fixed, "model.adaptation=coop"))
    long = only_error(run(*fixed, *PLAIN, "model.adaptation=coop", "experiment.text_length=5"))
    assert "model.context" in long and "4 tokens" in long
    assert not (tmp_path / "run").exists()


# ---- few shots ------------------------------------------------------------------------------------------------------


def test_a_share_of_the_images_comes_with_all_its_captions(tmp_path):
    data = write_tiny_dataset(tmp_path, identities={"train": 20, "test": 1})
    whole = read_annotations(*data)["train"]
    part = few_shot(whole, 0.25, seed=3)
    assert (len(part.image_paths), len(part)) == (10, 20)
    assert len(set(part.image_paths)) == 10 and set(part.image_paths) <= set(whole.image_paths)
    found, every = (
        {
            (split.image_paths[image], caption)
            for image, caption in zip(split.caption_images, split.captions, strict=True)
        }
        for split in (part, whole)
    )
    assert found == {pair for pair in every if pair[0] in part.image_paths}
    order = list(dict.fromkeys(part.image_identities))
    assert order == list(range(len(order)))  # renumbered in order of first appearance
    persons = [path.split("_")[0] for path in part.image_paths]
    pairs = set(zip(persons, part.image_identities, strict=True))
    assert len(pairs) == len(order) == len(set(persons))


def test_a_share_is_decided_by_the_seed_and_is_at_least_one_image(tmp_path):
    whole = read_annotations(*write_tiny_dataset(tmp_path, identities={"train": 20, "test": 1}))["train"]
    assert few_shot(whole, 0.5, 1) == few_shot(whole, 0.5, 1)
    assert few_shot(whole, 0.5, 1).image_paths != few_shot(whole, 0.5, 2).image_paths
    assert len(few_shot(whole, 1e-6, 1).image_paths) == 1
