"""The training state of a checkpoint is checked as a whole before a run continues from it."""

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from misc.builders.architecture import resolve_architecture
from misc.config.loading import load_config, to_plain
from misc.config.rules import ENCODER_KEYS
from misc.errors import UserError
from misc.run.progress import EpochRecord, Progress
from misc.system.distributed import Launch
from misc.training.resume import RunIdentity, find_start, load_state
from misc.training.trainer import Trainer
from tests.helpers.golden_models import TINY_MODEL, load, make_model
from tests.misc.training.test_gradient_cache import trainer_of
from tests.misc.training.test_step import ALONE, PROJECTOR_WIDTHS, reference_batch

EPOCHS, STEPS = 5, 3
SIZES = [name for name in ENCODER_KEYS if name != "activation"]
ODD = [
    None,
    True,
    -1,
    0,
    10**6,
    10**400,
    2.5,
    float("nan"),
    float("inf"),
    "",
    [],
    {},
    [1],
    torch.zeros(2),
    torch.tensor(1),
]
"""Values that fields of a checkpoint may have after a mistake. Some are valid for some fields."""


OVERRIDES = (
    "experiment.input_resolution=[64, 32]",
    "experiment.text_length=24",
    *(f"model.{name}={TINY_MODEL[name]}" for name in SIZES),
)
IDENTITY = RunIdentity(to_plain(resolve_architecture(load_config(overrides=OVERRIDES), None)), 8, "fp32", "a" * 64)


def new_trainer() -> Trainer:
    torch.manual_seed(0)
    return trainer_of(load("step_w1.npz"), make_model(**TINY_MODEL, simclr_widths=PROJECTOR_WIDTHS).train())


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """The content of a checkpoint after the second step of the first epoch."""
    trainer = new_trainer()
    for iteration in range(2):
        trainer.step(reference_batch(ALONE, load("step_w1.npz")), iteration, STEPS)
    record = EpochRecord(losses={"nitc": 2.0}, steps=2, samples=16, seconds=3.5, data_wait=0.5)
    return {
        **trainer.state(),
        "progress": Progress(step=2, record=record, metrics={"r1": 1.0}).state(),
        **IDENTITY.state(),
        "launch": "one",
        "run_id": "b" * 32,
        "config": IDENTITY.config,
        "epoch": 0,
        "metrics": {"r1": 1.0},
    }


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """A trainer that has not made a step."""
    return new_trainer()


@pytest.fixture
def resume(trainer, monkeypatch, tmp_path) -> Callable[[dict], Trainer]:
    """Continues from a checkpoint with this content, as `--resume` does."""
    (tmp_path / "checkpoint_last.pth").touch()

    def go_on(content: dict) -> Trainer:
        monkeypatch.setattr("misc.run.checkpoint.open_archive", lambda path: ("torch.save", content))
        saved = find_start(tmp_path, resume=True, overwrite=False, launch=Launch("two", 0))
        IDENTITY.check(saved, tmp_path / "checkpoint_last.pth")
        load_state(trainer, saved, EPOCHS, STEPS, tmp_path / "checkpoint_last.pth")
        return trainer

    return go_on


def test_a_whole_state_is_restored(content, resume):
    state = resume(content).state()
    assert all(torch.equal(state["model"][name], value) for name, value in content["model"].items())
    for number, values in content["optimizer"]["state"].items():
        assert all(torch.equal(state["optimizer"]["state"][number][name], value) for name, value in values.items())


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Returns the paths of all values of a tree, but of only a few in each large dict."""
    if path:
        yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in [*items[:2], *items[-1:]] if len(items) > 12 else items:
        yield from places(item, (*path, key))


def changed(content: dict, path: tuple, *value: Any) -> dict:
    """Returns a copy with another value at a path, or without it."""
    *parents, last = path
    whole = part = copy.copy(content)
    for key in parents:
        part[key] = copy.copy(part[key])
        part = part[key]
    if value:
        part[last] = value[0]
    else:
        del part[last]
    return whole


def test_a_state_without_a_field_or_with_an_odd_one_is_refused_or_restored(content, resume):
    needed = {"progress", "optimizer", "scaler", "batch", "precision", "training_set", "run_id"}
    accepted, draw = set(), random.Random(0)
    for path in (path for path in places(content) if path[0] not in ("config", "epoch", "metrics", "launch")):
        for value in [(), *((each,) for each in draw.sample(ODD, 3))]:
            try:
                resume(changed(content, path, *value))
                accepted.add((path, repr(value)))
            except UserError as error:
                assert len(str(error).splitlines()) == 1 and "checkpoint_last.pth" in str(error)
    assert not [path for path, value in accepted if value == "()" and (path[0] in needed and len(path) == 1)]
    assert {path for path, _ in accepted if path[0] == "model"} == set()
    assert {path for path, _ in accepted if path[:2] == ("optimizer", "state")} == set()


def test_sizes_of_the_model_that_its_tensors_do_not_have_are_refused(content, resume):
    for name in SIZES:
        for value in (None, "auto", 1_000_000, 10**400, "x", torch.tensor(1), []):
            with pytest.raises(UserError):
                resume(changed(content, ("config", "model", name), value))


@pytest.mark.parametrize(
    ("position", "record"),
    [
        ({"step": 1_000_000}, {"steps": 1_000_000}),
        ({"step": STEPS + 1}, {"steps": STEPS + 1}),
        ({"epoch": EPOCHS + 1, "step": 0}, {"steps": 0}),
        ({"epoch": EPOCHS, "step": 1}, {"steps": 1}),
        ({"step": 2}, {"steps": 1}),
        ({"step": 2}, {"seconds": 0.0}),
        ({"step": 2}, {"samples": 0}),
    ],
)
def test_a_position_that_a_run_cannot_have_is_refused(content, resume, position, record):
    progress = content["progress"] | position | {"record": content["progress"]["record"] | record}
    with pytest.raises(UserError, match=r"checkpoint_last\.pth.*start a new run"):
        resume(content | {"progress": progress})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[None],
        lambda tensor: tensor.double(),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: torch.full_like(tensor, torch.nan),
        lambda tensor: tensor.to("meta"),
        lambda tensor: tensor.tolist(),
    ],
)
def test_a_tensor_of_another_form_is_refused(content, resume, change):
    name = "simclr_projector.0.weight"
    with pytest.raises(UserError, match=rf"checkpoint_last\.pth.*({name}|not a checkpoint)"):
        resume(changed(content, ("model", name), change(content["model"][name])))
    moment = content["optimizer"]["state"][0]["exp_avg"]
    with pytest.raises(UserError, match=r"checkpoint_last\.pth.*the optimizer has tensors.*exp_avg"):
        resume(changed(content, ("optimizer", "state", 0, "exp_avg"), change(moment)))


def test_the_optimizer_may_be_empty_only_before_the_first_step(content, resume):
    empty = changed(content, ("optimizer", "state"), {})
    with pytest.raises(UserError, match="not that of all parameters"):
        resume(empty)
    resume(empty | {"progress": Progress().state()})
