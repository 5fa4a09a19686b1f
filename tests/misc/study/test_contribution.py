"""The contribution of each module: cases computed by hand, an explicit forward pass, and the whole command."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from misc.commands import contribution as contribution_command
from misc.data.annotations import read_annotations
from misc.errors import UserError
from misc.retrieval.evaluation import Evaluator
from misc.retrieval.metrics import QueryResults
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.log import RunLog
from misc.study.contribution import Contribution, ModuleContribution, measure_contribution, write_contribution
from misc.study.contribution_chart import draw_contribution_chart
from misc.system.distributed import Ranks
from misc.system.precision import Precision
from model.transformer import ResidualBlock, Transformer
from tests.helpers.golden_models import TINY_MODEL, assert_close, make_model, tiny_model
from tests.helpers.runs import ARCHITECTURE, QUICK, of_dataset, only_error, start_forked
from tests.helpers.seeded import TINY, clip_weights, normal
from tests.helpers.tiny_dataset import TinyDataset, write_tiny_dataset
from text_utils.tokenizer import Tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))
KINDS = ("self_attention", "feed_forward", "layer")
PARTS = {"self_attention": ("ln_1", "attn"), "feed_forward": ("ln_2", "mlp"), "layer": ("ln_1", "attn", "ln_2", "mlp")}


@pytest.fixture(autouse=True)
def single_thread():
    """Uses one thread: with so little work, several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TinyDataset:
    """A dataset in which the tiny model finds some people, and loses some without each kind of module."""
    return write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", identities={"train": 12, "test": 5})


# ---- the two measures, computed by hand ---------------------------------------------------------------------------


class Sizes:
    """A split without images: only the sizes that `measure_contribution` reads."""

    def __init__(self, images: int, captions: int):
        self.image_paths = [f"{number}.jpg" for number in range(images)]
        self.captions = captions

    def __len__(self) -> int:
        return self.captions


class Shown(nn.Module):
    """An encoder whose "features" show the state of its modules: attention and feed-forward of each layer.

    The feature of a module is 0 if its last layer is 0, else the mean of its parameters, including its norm.
    """

    def __init__(self):
        super().__init__()
        self.transformer = Transformer(width=2, layers=2, heads=1, activation="gelu")
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = []
        for block in self.transformer.resblocks:
            for norm, branch, output in (
                (block.ln_1, block.attn, block.attn.out_proj),
                (block.ln_2, block.mlp, block.mlp.c_proj),
            ):
                values = torch.cat([p.flatten() for p in (*norm.parameters(), *branch.parameters())])
                silent = not (output.weight.any() or output.bias.any())
                rows.append(torch.tensor(0.0) if silent else values.mean())
        return torch.stack(rows)


class ShownModel(nn.Module):
    embed_dim = 4

    def __init__(self):
        super().__init__()
        self.image_encoder, self.text_encoder = Shown(), Shown()
        self.encode_image, self.encode_text = self.image_encoder, self.text_encoder


class HandMade:
    """An evaluator of 1,000 queries: R@1 drops by a module's `points` without it, and by a part of them with a part of
    it."""

    def __init__(self, base_hits: int, image_points: list[float], text_points: list[float]):
        self.split = Sizes(images=1, captions=1000)
        self.ranks = ALONE
        self.base_hits, self.points = base_hits, torch.tensor(text_points + image_points)
        self.encodings = {"image": 0, "text": 0}

    def encode_images(self, encoders, width, damaged=None):
        return self._encode("image", encoders)

    def encode_captions(self, encoders, width):
        return self._encode("text", encoders)

    def _encode(self, name, encoders):
        self.encodings[name] += len(encoders)
        return [encoder(torch.zeros(1)) for encoder in encoders]

    def rank(self, own_queries, gallery):
        lost = (self.points * (1 - torch.cat([own_queries, gallery]))).sum()
        hits = self.base_hits - round(10 * float(lost))
        first_match = torch.tensor([1] * hits + [2] * (1000 - hits))
        return QueryResults(first_match, torch.zeros(1000), torch.zeros(1000))


def measured_by_hand(base_hits: int, image_points: list[float], text_points: list[float]):
    """Measures a case in which all trained parameters are 1 and all initial ones 0, so a module's feature is its α."""
    model = ShownModel()
    initial = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    evaluator = HandMade(base_hits, image_points, text_points)
    return measure_contribution(evaluator, model, initial, RunLog(None)), evaluator


def table(layers: list[dict[str, ModuleContribution]], measure: str) -> list[list[float]]:
    assert all(tuple(layer) == KINDS for layer in layers)
    return [[getattr(layer[kind], measure) for kind in KINDS] for layer in layers]


def test_both_measures_of_a_case_computed_by_hand():
    """The lists are the points lost without attention and feed-forward of layer 1, then of layer 2. A layer loses both.

    With α, the share 1 - α of them is lost. A drop of exactly 3 points is too much: 10 points at α = 0.7 and 5 at
    α = 0.4. As percentages, 57 - 54 would be slightly below 3.
    """
    found, evaluator = measured_by_hand(570, [10, 0, 4, -2], [20, 5, 40, 0])
    assert found.r1 == pytest.approx(57)
    assert table(found.image, "r1_removed") == [pytest.approx([47, 57, 47]), pytest.approx([53, 59, 55])]
    assert table(found.text, "r1_removed") == [pytest.approx([37, 52, 32]), pytest.approx([17, 57, 17])]
    assert table(found.image, "c1") == [pytest.approx([0.25, 0, 0.25]), pytest.approx([0.1, -0.05, 0.05])]
    assert table(found.text, "c1") == [pytest.approx([0.5, 0.125, 0.625]), pytest.approx([1, 0, 1])]
    assert table(found.image, "c2") == [[0.8, 0.0, 0.8], [0.3, 0.0, 0.0]]
    assert table(found.text, "c2") == [[0.9, 0.5, 0.9], [1.0, 0.0, 1.0]]
    # Once unchanged, 6 times without a module, then with each α up to the sufficient one; α = 1 is not measured.
    assert evaluator.encodings == {"image": 1 + 6 + 9 + 1 + 9 + 4 + 1 + 1, "text": 1 + 6 + 10 + 6 + 10 + 10 + 1 + 10}


@pytest.mark.parametrize("points", [0, -2], ids=["the same", "better"])
def test_c1_is_0_if_no_module_is_needed(points):
    found, _ = measured_by_hand(500, [points] * 4, [points] * 4)
    assert table(found.image, "c1") == table(found.text, "c1") == [[0, 0, 0], [0, 0, 0]]
    expected = pytest.approx([50 - points, 50 - points, 50 - 2 * points])
    assert table(found.text, "r1_removed") == [expected, expected]


# ---- the encoding, against an explicit forward pass ---------------------------------------------------------------


def normed(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    deviation = (x.var(dim=-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(dim=-1, keepdim=True)) / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]


def attended(x: Tensor, state: dict[str, Tensor], name: str, heads: int, causal: bool) -> Tensor:
    projected = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    outputs = []
    for query, key, value in zip(*(part.chunk(heads, dim=-1) for part in projected.chunk(3, dim=-1)), strict=True):
        scores = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        if causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        outputs.append(scores.softmax(dim=-1) @ value)
    return torch.cat(outputs, dim=-1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def fed_forward(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    inner = x @ state[f"{name}.c_fc.weight"].T + state[f"{name}.c_fc.bias"]
    return inner * torch.sigmoid(1.702 * inner) @ state[f"{name}.c_proj.weight"].T + state[f"{name}.c_proj.bias"]


def layers(x: Tensor, state: dict[str, Tensor], heads: int, causal: bool, without: tuple[int, str] | None) -> Tensor:
    """Computes two residual blocks; one branch or both branches of the block in `without` are skipped."""
    for number in range(2):
        block = f"transformer.resblocks.{number}"
        if without not in ((number, "self_attention"), (number, "layer")):
            x = x + attended(normed(x, state, f"{block}.ln_1"), state, f"{block}.attn", heads, causal)
        if without not in ((number, "feed_forward"), (number, "layer")):
            x = x + fed_forward(normed(x, state, f"{block}.ln_2"), state, f"{block}.mlp")
    return x


def image_features(state: dict[str, Tensor], images: Tensor, without: tuple[int, str] | None = None) -> Tensor:
    patches = F.conv2d(images, state["conv1.weight"], stride=16).flatten(2).transpose(1, 2)
    x = torch.cat([state["class_embedding"].expand(len(images), 1, -1), patches], dim=1)
    x = normed(x + state["positional_embedding"], state, "ln_pre")
    x = layers(x, state, TINY_MODEL["vision_heads"], False, without)
    return normed(x[:, 0], state, "ln_post") @ state["proj"]


def text_features(state: dict[str, Tensor], token_ids: Tensor, without: tuple[int, str] | None = None) -> Tensor:
    x = state["token_embedding.weight"][token_ids] + state["positional_embedding"][: token_ids.shape[1]]
    x = layers(x, state, TINY_MODEL["text_heads"], True, without)
    ends = x[torch.arange(len(x)), token_ids.argmax(dim=1)]
    return normed(ends, state, "ln_final") @ state["text_projection"]


class Recorder:
    """An evaluator of a few inputs that records their features. Every second query finds its person."""

    def __init__(self):
        self.split = Sizes(images=3, captions=2)
        self.ranks = ALONE
        self.images = torch.from_numpy(normal("contribution", 3, 3, *TINY_MODEL["resolution"]))
        self.token_ids = torch.tensor([[49406, 320, 2308, 49407, 0, 0], [49406, 736, 7356, 593, 1449, 49407]])
        self.kept: dict[str, list[list[Tensor]]] = {"image": [], "text": []}

    def encode_images(self, encoders, width, damaged=None):
        self.kept["image"].append([encoder(self.images) for encoder in encoders])
        return self.kept["image"][-1]

    def encode_captions(self, encoders, width):
        self.kept["text"].append([encoder(self.token_ids) for encoder in encoders])
        return self.kept["text"][-1]

    def rank(self, own_queries, gallery):
        return QueryResults(torch.tensor([1, 2]), torch.zeros(2), torch.zeros(2))


def other_weights() -> dict[str, Tensor]:
    """Returns an initial state in which every value differs from the trained state."""
    return {name: value + 0.1 * torch.ones_like(value).cumsum(0) for name, value in tiny_model().state_dict().items()}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_encoding_equals_an_explicit_forward_pass(tower):
    model, recorder, initial = tiny_model(), Recorder(), {k: 0.5 * v for k, v in tiny_model().state_dict().items()}
    measure_contribution(recorder, model, initial, RunLog(None))
    prefix = f"{tower}_encoder."
    trained, before = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for state in (model.state_dict(), initial)
    )
    forward, inputs = {
        "image": (image_features, recorder.images),
        "text": (text_features, recorder.token_ids),
    }[tower]
    modules = [(layer, kind) for layer in range(2) for kind in KINDS]
    whole, removed, untrained = recorder.kept[tower]  # nothing is lost, so α = 0 is enough for C2
    assert_close(whole[0], forward(trained, inputs))
    for (layer, kind), without, reset in zip(modules, removed, untrained, strict=True):
        assert_close(without, forward(trained, inputs, (layer, kind)), name=f"without {kind} {layer}")
        parts = tuple(f"transformer.resblocks.{layer}.{part}." for part in PARTS[kind])
        mixed = trained | {name: value for name, value in before.items() if name.startswith(parts)}
        assert_close(reset, forward(mixed, inputs), name=f"initial {kind} {layer}")
        for changed in (without, reset):
            assert (changed - whole[0]).abs().max() > 1e-3 * whole[0].abs().max(), "this case shows no difference"


def test_adapter_and_context_are_used():
    torch.manual_seed(0)
    model, recorder = make_model(**TINY_MODEL, adapter_ratio=0.5, context_length=2).eval(), Recorder()
    measure_contribution(recorder, model, model.state_dict(), RunLog(None))
    for name, encode, inputs in (
        ("image", model.encode_image, recorder.images),
        ("text", model.encode_text, recorder.token_ids),
    ):
        expected = encode(inputs)
        whole, _, blended = recorder.kept[name]
        assert all(torch.equal(found, expected) for found in (*whole, *blended))
    assert not torch.equal(model.encode_image(recorder.images), model.image_encoder(recorder.images))
    assert not torch.equal(model.encode_text(recorder.token_ids), model.text_encoder(recorder.token_ids))


# ---- the model afterwards -----------------------------------------------------------------------------------------


def tiny_evaluator(data: TinyDataset) -> Evaluator:
    return Evaluator(
        split=read_annotations(*data)["test"],
        image_dir=data.image_dir,
        tokenizer=Tokenizer(),
        text_length=TINY_MODEL["text_length"],
        resolution=TINY_MODEL["resolution"],
        batch_size=8,
        workers=0,
        ranks=ALONE,
        precision=Precision.choose("fp32", ALONE.device),
    )


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_model_is_bit_identical_afterwards(data):
    model = tiny_model().train()
    before = copy.deepcopy(model.state_dict())
    evaluator = tiny_evaluator(data)
    found = measure_contribution(evaluator, model, other_weights(), RunLog(None))
    assert_equal_states(model.state_dict(), before)
    assert model.training
    assert found.r1 == pytest.approx(evaluator(model).metrics["r1"])
    assert len({module.r1_removed for layer in found.text for module in layer.values()}) > 1, "nothing was changed"


def test_the_model_is_unchanged_if_encoding_fails(data, monkeypatch):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    changed, forward = model.image_encoder.transformer.resblocks[0], ResidualBlock.forward

    def failing(block, *arguments, **options):
        if block is changed and not block.attn.out_proj.weight.any():
            raise MemoryError
        return forward(block, *arguments, **options)

    monkeypatch.setattr(ResidualBlock, "forward", failing)
    with pytest.raises(MemoryError):
        measure_contribution(tiny_evaluator(data), model, other_weights(), RunLog(None))
    assert_equal_states(model.state_dict(), before)


def test_c2_is_0_if_the_initial_weights_are_the_trained_ones(data):
    model = tiny_model()
    found = measure_contribution(tiny_evaluator(data), model, copy.deepcopy(model.state_dict()), RunLog(None))
    assert table(found.image, "c2") == table(found.text, "c2") == [[0, 0, 0], [0, 0, 0]]


# ---- the files ----------------------------------------------------------------------------------------------------


def made_up(c1: float, c2: float) -> list[dict[str, ModuleContribution]]:
    return [{kind: ModuleContribution(10.0, c1, c2) for kind in KINDS} for _ in range(3)]


def yellow(path: Path) -> np.ndarray:
    """Returns for each pixel whether it has the colour of the value 1."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (abs(pixels - (253, 231, 37)) <= 3).all(axis=2)


def test_cells_have_the_colours_of_their_values(tmp_path):
    nothing = {kind: {"c1": 0.0, "c2": 0.0} for kind in KINDS}
    image, text = [nothing] * 3, [nothing] * 3
    draw_contribution_chart(tmp_path / "nothing.png", image, text)
    image[0] = nothing | {"self_attention": {"c1": -0.5, "c2": 1.0}}
    text[2] = nothing | {"layer": {"c1": 1.0, "c2": 0.0}}
    draw_contribution_chart(tmp_path / "two.png", image, text)
    new = yellow(tmp_path / "two.png") & ~yellow(tmp_path / "nothing.png")
    height, width = new.shape
    quarters = new[: height // 2 * 2, : width // 2 * 2].reshape(2, height // 2, 2, width // 2)
    (c1_image, c1_text), (c2_image, c2_text) = quarters.sum(axis=(1, 3)).tolist()
    assert c1_image == c2_text == 0
    assert c1_text > 1000 and c2_image > 1000


def test_the_files_are_complete_or_do_not_exist(tmp_path, full_disk):
    content = Contribution(50.0, 1.5, made_up(0.5, 0.1), made_up(1.0, 0.2))
    write_contribution(tmp_path / "whole", content, RunLog(None))
    found = json.loads((tmp_path / "whole" / "contribution.json").read_text())
    assert (found["r1"], found["seconds"], found["points"]) == (50.0, 1.5, 3)
    assert found["alphas"] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert found["image"] == [dict.fromkeys(KINDS, {"r1_removed": 10.0, "c1": 0.5, "c2": 0.1})] * 3
    assert found["text"] == [dict.fromkeys(KINDS, {"r1_removed": 10.0, "c1": 1.0, "c2": 0.2})] * 3
    full_disk(2000)
    with pytest.raises(UserError, match="half cannot be written"):
        write_contribution(tmp_path / "half", content, RunLog(None))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


# ---- the command --------------------------------------------------------------------------------------------------


CONFIG = {
    "misc": {"seed": 7},
    "experiment": {"input_resolution": list(TINY_MODEL["resolution"])},
    "model": {
        "ckpt_type": "original_clip",
        "checkpoint": None,
        "saved_path": "runs/tiny",
        "vision_heads": TINY_MODEL["vision_heads"],
        "text_heads": TINY_MODEL["text_heads"],
    },
}
"""The configuration of a run that started from random weights, with only the keys that the command reads."""


@pytest.fixture
def checkpoint(tmp_path) -> Callable[..., Path]:
    """Writes the checkpoint of a run into its folder. Arguments are values of the section `model`."""

    def write(**model) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        content = {"model": tiny_model().state_dict(), "config": CONFIG | {"model": CONFIG["model"] | model}}
        write_checkpoint(folder / "checkpoint_best.pth", content)
        return folder / "checkpoint_best.pth"

    return write


@pytest.fixture
def initial(monkeypatch) -> dict[str, Tensor]:
    """The initial weights that the command used; filled when it runs."""
    seen, measure = {}, contribution_command.measure_contribution

    def watched(evaluator, model, state, log):
        seen.update(state)
        return measure(evaluator, model, state, log)

    monkeypatch.setattr(contribution_command, "measure_contribution", watched)
    return seen


def written(folder: Path) -> dict:
    """Checks the files, and returns the contributions without the time."""
    assert sorted(path.name for path in folder.iterdir()) == ["contribution.json", "contribution.png"]
    with Image.open(folder / "contribution.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
    content = json.loads((folder / "contribution.json").read_text())
    assert content.pop("seconds") > 0
    return content


def modules_of(content: dict) -> list[dict[str, float]]:
    return [module for name in ("image", "text") for layer in content[name] for module in layer.values()]


@pytest.mark.slow
def test_the_command_writes_the_same_on_one_and_two_ranks(checkpoint, initial, run, data):
    """Architecture and initial weights are those of the checkpoint, although the configuration specifies ViT-B/16."""
    path = checkpoint()
    folder = path.parent / "checkpoint_best_contribution"
    command = ("--contribution", path, *QUICK, *of_dataset(data))
    outcome = run(*command)
    assert outcome.status == 0, outcome.err
    assert f"written to {folder}" in outcome.out
    alone = written(folder)
    assert alone["r1"] == pytest.approx(tiny_evaluator(data)(tiny_model()).metrics["r1"])
    assert (len(alone["image"]), len(alone["text"])) == (2, 2)
    lost = [alone["r1"] - module["r1_removed"] for module in modules_of(alone)]
    assert max(lost) > 0 and len(set(lost)) > 2, "this case shows no difference"
    assert [module["c1"] for module in modules_of(alone)] == pytest.approx([points / max(lost) for points in lost])

    torch.manual_seed(7)
    assert_equal_states(initial, make_model(**TINY_MODEL).state_dict())

    folder.rename(path.parent / "alone")
    outcome = start_forked(*command, ranks=2)
    assert outcome.status == 0, outcome.err
    assert written(folder) == alone
    assert outcome.out.count("R@1 of the whole model") == 1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["random", "clip", "saved", "dropped"])
def test_the_initial_weights_are_those_that_the_run_started_from(run, data, initial, tmp_path, source):
    """The learning rate is almost 0, so the checkpoint contains the initial weights. The run also draws all heads."""
    common = [*QUICK, *of_dataset(data), "schedule.epoch=1", "log.sheet=0", "misc.seed=5"]
    common += ["schedule.lr=1e-300", "schedule.lr_start=0", "schedule.lr_end=0"]
    architecture = [*ARCHITECTURE, "experiment.mlm=true", "experiment.cmt_depth=1", "experiment.id=true"]
    own = [f"model.saved_path={tmp_path / 'run'}"]
    if source == "clip":  # with another resolution and text length than the run
        sizes = TINY | {"resolution": (64, 64)}
        weights = {name: torch.as_tensor(value) for name, value in clip_weights(**sizes).items()}
        torch.save(weights, tmp_path / "clip.pt")
        architecture = ["experiment.input_resolution=[32, 16]", "--simplified"]
        own += [f"model.checkpoint={tmp_path / 'clip.pt'}", "model.activation=gelu", "model.text_heads=3"]
    elif source == "saved":
        write_checkpoint(tmp_path / "run.pth", {"model": tiny_model().state_dict(), "config": CONFIG})
        architecture = ["experiment.input_resolution=[64, 32]", "--simplified"]
        own = ["model.ckpt_type=saved", f"model.saved_path={tmp_path / 'run.pth'}"]
    elif source == "dropped":
        architecture = [*ARCHITECTURE, "--simplified"]
        own += ["model.text_layers=3", "model.dropped_text_layers=[2]", "model.frozen_text_layers=[3]"]
    assert run(*common, *architecture, *own).status == 0

    path = tmp_path / "run" / "checkpoint_best.pth"
    outcome = run("--contribution", path, *QUICK, *of_dataset(data))
    assert outcome.status == 0, outcome.err
    trained = read_checkpoint(path)
    assert_equal_states(initial, {name: trained["model"][name] for name in initial})
    assert {"image_encoder.proj", "text_encoder.transformer.resblocks.0.mlp.c_fc.weight"} <= initial.keys()
    content = written(path.parent / "checkpoint_best_contribution")
    assert content["r1"] == pytest.approx(trained["metrics"]["r1"])
    assert {module["c2"] for module in modules_of(content)} == {0}


# ---- mistakes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch):
    """Checks that a mistake is found before anything is measured."""
    monkeypatch.setattr(contribution_command, "measure_contribution", lambda *_: pytest.fail("it was measured"))


def bare_weights(write, folder):
    torch.save({name: torch.as_tensor(value) for name, value in clip_weights(**TINY).items()}, folder / "clip.pt")
    return folder / "clip.pt", ["clip.pt", "checkpoint of a run", "initial weights"]


def tag(write, folder):
    return "openai", ["openai", "checkpoint of a run", "No such file"]


def folder_of_a_run(write, folder):
    return write().parent, ["checkpoint of a run", "not a file"]


def run_that_does_not_record_its_initial_weights(write, folder):
    return write(ckpt_type="other"), ["checkpoint of a run", "model.ckpt_type"]


def missing_initial_weights(write, folder):
    path = write(checkpoint=str(folder / "moved.pt"))
    return path, [str(path), "initial weights", str(folder / "moved.pt"), "No such file"]


def initial_weights_of_another_architecture(write, folder):
    weights = clip_weights(**TINY | {"vision_width": 128})
    torch.save({name: torch.as_tensor(value) for name, value in weights.items()}, folder / "clip.pt")
    return write(checkpoint=str(folder / "clip.pt")), ["initial weights", "clip.pt", "vision_width 128"]


def results_that_exist(write, folder):
    path = write()
    (path.parent / "checkpoint_best_contribution").mkdir()
    return path, [str(path.parent / "checkpoint_best_contribution"), "exists", "remove it"]


MISTAKES = [
    bare_weights,
    tag,
    folder_of_a_run,
    run_that_does_not_record_its_initial_weights,
    missing_initial_weights,
    initial_weights_of_another_architecture,
    results_that_exist,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda function: function.__name__)
def test_a_mistake_ends_with_one_line_before_anything_is_measured(run, data, tmp_path, checkpoint, unmeasured, mistake):
    path, words = mistake(checkpoint, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    message = only_error(run("--contribution", path, *QUICK, *of_dataset(data)))
    assert all(word in message for word in words), message
    assert sorted(tmp_path.rglob("*")) == before
