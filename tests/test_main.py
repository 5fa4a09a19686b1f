"""Whole runs on a tiny dataset: their files, their output, and one error line for each mistake of the user."""

import json
import re
import shutil
import socket
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from PIL import Image

from misc.commands import evaluate as evaluate_command
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from misc.run.folder import LOCK, RUN_FILES
from tests.helpers.runs import (
    ARCHITECTURE,
    METRICS,
    QUICK,
    Outcome,
    Run,
    assert_same_run,
    command,
    of_dataset,
    only_error,
    start,
    start_forked,
)
from tests.helpers.seeded import TINY, clip_weights
from tests.helpers.tiny_dataset import IDENTITIES, TinyDataset, spoil, write_tiny_dataset

pytestmark = pytest.mark.slow

KEYS = {
    "epoch",
    "epochs",
    "parameters",
    *METRICS,
    "loss",
    "seconds",
    "samples_per_second",
    "data_wait",
    "peak_memory_gigabytes",
}
STATISTICS = {"train": ["12", "24", "48"], "val": ["4", "8", "16"], "test": ["5", "10", "20"]}
"""Identities, images and captions of the tiny dataset: two images per identity, two captions per image."""


@pytest.fixture
def train(run, data, tmp_path) -> Callable[..., Run]:
    """Trains one epoch on the tiny dataset, in this process."""

    def call(*arguments: str) -> Run:
        folder = tmp_path / "run"
        fixed = (*ARCHITECTURE, *QUICK, *of_dataset(data), f"model.saved_path={folder}", "log.sheet=0")
        outcome = run(*fixed, "schedule.epoch=1", *arguments)
        assert outcome.status == 0, outcome
        return Run(folder, outcome)

    return call


@pytest.fixture(scope="module")
def full(data, tmp_path_factory) -> Run:
    """Two epochs of the full recipe with `python main.py` and one loader worker, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    own = (f"model.saved_path={folder}", "schedule.epoch=2", "data.num_workers=1", "log.sheet=3", "log.print_period=5")
    return Run(folder, start(*ARCHITECTURE, *QUICK, *of_dataset(data), *own))


def printed_metrics(out: str) -> list[list[float]]:
    """Returns the numbers below each line `R@1 R@5 R@10 mAP mINP`."""
    rows = re.findall(r"R@1 +R@5 +R@10 +mAP +mINP\n(.+)", out)
    return [[float(number) for number in row.split()] for row in rows]


def rounded(record: dict[str, float]) -> list[float]:
    return [float(f"{record[name]:.2f}") for name in METRICS]


def printed_statistics(out: str) -> dict[str, list[str]]:
    return {name: numbers.split() for name, numbers in re.findall(r"^(train|val|test) +([\d, ]+)$", out, re.MULTILINE)}


# ---- a run of the full recipe -------------------------------------------------------------------------------------


def test_a_run_succeeds_and_writes_its_files(full):
    assert full.outcome.status == 0, full.outcome.err
    assert sorted(path.name for path in full.folder.iterdir()) == sorted({*RUN_FILES, LOCK} - {"trace.json"})
    assert full.log == full.outcome.out


def test_a_run_shows_the_statistics_of_its_data(full):
    assert printed_statistics(full.outcome.out) == STATISTICS


def test_metrics_jsonl_contains_each_epoch(full):
    assert [record["epoch"] for record in full.records] == [1, 2]
    for record in full.records:
        assert record.keys() >= KEYS
        assert 0 <= record["r1"] <= record["r5"] <= record["r10"] == 100  # there are ten images
        assert 0 <= record["mINP"] <= 100 and 0 < record["mAP"] <= 100
        assert record["steps"] == 12  # 48 captions, in batches of 4
        assert record["seconds"] > 0 and 0 <= record["data_wait"] <= 1 and record["peak_memory_gigabytes"] > 0
        assert record["samples_per_second"] == pytest.approx(48 / record["seconds"], rel=0.01)  # 12 batches of 4
        parts = {name: value for name, value in record.items() if name.startswith("loss_")}
        assert parts.keys() == {"loss_nitc", "loss_ritc", "loss_citc", "loss_ss"}
        assert record["loss"] == pytest.approx(sum(parts.values()))
    assert full.records[1]["loss"] < full.records[0]["loss"]


def test_the_printed_table_equals_metrics_jsonl(full):
    assert printed_metrics(full.outcome.out) == [rounded(record) for record in full.records]


def test_the_images_of_a_run_open(full):
    for name in ("curve.png", "retrieval.png"):
        with Image.open(full.folder / name) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 100


def test_the_saved_configuration_is_the_merged_one(full):
    saved = yaml.safe_load((full.folder / "config.yaml").read_text())
    assert saved["experiment"]["input_resolution"] == [32, 16] and saved["experiment"]["ss"] is True
    assert (saved["model"]["saved_path"], saved["schedule"]["epoch"]) == (str(full.folder), 2)


def test_the_checkpoints_contain_the_last_and_the_best_epoch(full):
    last = read_checkpoint(full.folder / "checkpoint_last.pth")
    best = read_checkpoint(full.folder / "checkpoint_best.pth")
    first_best = max(full.records, key=lambda record: record["r1"])
    for content, record in ((last, full.records[-1]), (best, first_best)):
        assert content["epoch"] == record["epoch"]
        assert content["metrics"] == {name: record[name] for name in METRICS}
    assert last["config"] == yaml.safe_load((full.folder / "config.yaml").read_text())


def test_evaluation_of_the_last_checkpoint_repeats_its_metrics(full, data, run, monkeypatch, tmp_path):
    """The architecture comes from the checkpoint: the configuration specifies ViT-B/16."""
    seen = []
    result_lines = evaluate_command.result_lines

    def record_metrics(title, retrieval):
        seen.append(retrieval.metrics)
        return result_lines(title, retrieval)

    monkeypatch.setattr(evaluate_command, "result_lines", record_metrics)
    monkeypatch.chdir(tmp_path)
    outcome = run("--evaluate", full.folder / "checkpoint_last.pth", *QUICK, *of_dataset(data))
    assert outcome.status == 0
    assert seen == [{name: pytest.approx(full.records[-1][name], abs=1e-6) for name in METRICS}]
    assert printed_metrics(outcome.out) == [rounded(full.records[-1])]
    assert printed_statistics(outcome.out) == {"test": STATISTICS["test"]}
    assert list(tmp_path.iterdir()) == []


def test_weights_whose_features_overflow_have_no_metrics(full, data, run, tmp_path):
    content = read_checkpoint(full.folder / "checkpoint_last.pth")
    for name, what in (("image_encoder.proj", "the image "), ("text_encoder.text_projection", "the caption ")):
        broken = content | {"model": content["model"] | {name: content["model"][name] * 1e20}}
        write_checkpoint(tmp_path / "broken.pth", broken)
        outcome = run("--evaluate", tmp_path / "broken.pth", *QUICK, *of_dataset(data))
        assert outcome.status == 2 and f"error: {what}" in outcome.err and "has an invalid feature" in outcome.err
        assert printed_metrics(outcome.out) == []
        export = ("--export", "openclip", tmp_path / "out", f"model.checkpoint={tmp_path / 'broken.pth'}")
        assert "has an invalid feature" in run(*export, "device=cpu").err and not (tmp_path / "out").exists()


def test_evaluation_needs_only_its_own_split(full, run, tiny_dataset):
    """Neither the entries nor the images of the others, nor the back-translations."""
    entries = annotation(tiny_dataset)
    for entry in entries:
        if entry["split"] != "test":
            (tiny_dataset.image_dir / entry["file_path"]).unlink()
    own = (*QUICK, *of_dataset(tiny_dataset), "data.back_translation_file=missing.json")
    for kept in (entries, [entry for entry in entries if entry["split"] == "test"]):
        annotate(tiny_dataset, kept)
        outcome = run("--evaluate", full.folder / "checkpoint_last.pth", *own)
        assert outcome.status == 0 and "back" not in outcome.out, outcome
        assert printed_metrics(outcome.out) == [rounded(full.records[-1])]
    message = only_error(run("--evaluate", full.folder / "checkpoint_last.pth", *own, "data.evaluate_on=val"))
    assert "data.evaluate_on=test" in message and "no val entries, only test" in message


def test_two_ranks_evaluate_a_checkpoint_like_one_rank(full, data):
    outcome = start_forked("--evaluate", full.folder / "checkpoint_last.pth", *QUICK, *of_dataset(data), ranks=2)
    assert outcome.status == 0, outcome.err
    assert "2 process(es)" in outcome.out
    assert printed_metrics(outcome.out) == [rounded(full.records[-1])]


def test_two_ranks_train_without_gathering(data, tmp_path):
    own = ("schedule.epoch=1", "model.use_gather=false", f"model.saved_path={tmp_path / 'run'}", "log.sheet=1")
    outcome = start_forked(*ARCHITECTURE, *QUICK, *of_dataset(data), *own, ranks=2)
    assert outcome.status == 0, outcome.err
    two = Run(tmp_path / "run", outcome)
    assert sorted(path.name for path in two.folder.iterdir()) == sorted({*RUN_FILES, LOCK} - {"trace.json"})
    assert two.log == outcome.out and "2 process(es)" in two.log
    (record,) = two.records
    assert record["samples_per_second"] == pytest.approx(48 / record["seconds"], rel=0.01)  # of both ranks: 6 · 2 · 4


def test_two_machines_train_like_one_machine(data, tmp_path):
    """Two torchruns with one process each, like two machines, and two processes of one machine: bit-identical."""
    folders = {nodes: tmp_path / str(nodes) for nodes in (1, 2)}
    own = (*ARCHITECTURE, *QUICK, *of_dataset(data), "schedule.epoch=1", "log.sheet=1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = ("--master_addr=127.0.0.1", f"--master_port={probe.getsockname()[1]}")
    torchruns = []
    for node in range(2):
        run = command((*own, f"model.saved_path={folders[2]}"), 2)
        at = run["args"].index("--standalone")
        run["args"][at : at + 2] = ["--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", *meeting]
        torchruns.append(subprocess.Popen(**run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for torchrun in torchruns:
        out, _ = torchrun.communicate(timeout=300)
        assert torchrun.returncode == 0, out
    outcome = start_forked(*own, f"model.saved_path={folders[1]}", ranks=2)
    assert outcome.status == 0, outcome.err
    assert_same_run(folders[2], Run(folders[1], outcome))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory) -> dict[int, list[dict]]:
    """Epoch records for each number of ranks, with the same global batch; dropout differs by rank, so it is off."""
    people = {"train": 40, "test": 30}
    dataset = write_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny", identities=people)
    own = ("experiment.dropout=0", "schedule.epoch=4", "schedule.lr=3e-3", "model.lock_bottom=false", "log.sheet=0")
    found = {}
    for ranks, workers in ((1, 0), (2, 1), (4, 0)):
        folder = tmp_path_factory.mktemp("runs") / str(ranks)
        batch = (f"data.batch_size={16 // ranks}", f"data.num_workers={workers}", f"model.saved_path={folder}")
        outcome = start_forked(*ARCHITECTURE, *QUICK, *of_dataset(dataset), *own, *batch, ranks=ranks)
        assert outcome.status == 0, outcome.err
        found[ranks] = Run(folder, outcome).records
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_training_has_the_same_result_on_any_number_of_ranks(on_ranks, ranks):
    assert on_ranks[1][-1]["mAP"] > on_ranks[1][0]["mAP"] + 3, "it did not learn, so the results cannot differ"
    for record, alone in zip(on_ranks[ranks], on_ranks[1], strict=True):
        assert record["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        # One of 120 queries may change its rank if its first two images are almost equal.
        assert record["r1"] == pytest.approx(alone["r1"], abs=100 / 120 + 1e-6)
        assert record["mAP"] == pytest.approx(alone["mAP"], abs=0.1)


# ---- other ways to run --------------------------------------------------------------------------------------------


def test_simplified_trains_with_two_losses(train):
    simplified = train("--simplified")
    assert {name for name in simplified.records[0] if name.startswith("loss_")} == {"loss_nitc", "loss_ritc"}
    assert yaml.safe_load((simplified.folder / "config.yaml").read_text())["misc"]["seed"] == 0
    assert "retrieval.png" not in {path.name for path in simplified.folder.iterdir()}  # log.sheet=0


@pytest.mark.parametrize("mixgen_type", ["ori", "cat"])
def test_mlm_id_and_mixgen_train(train, mixgen_type):
    mixed = train(
        "experiment.mlm=true",
        "experiment.cmt_depth=1",
        "experiment.id=true",
        "experiment.mixgen=true",
        f"experiment.mixgen_type={mixgen_type}",
        "experiment.mixgen_p=1",
        "experiment.mixgen_ratio=0.5",
    )
    assert {"loss_mlm", "loss_id"} <= mixed.records[0].keys()
    assert mixed.records[0]["loss_id"] > 0 and mixed.records[0]["loss_mlm"] > 0


def test_a_trace_of_some_steps_is_written(train):
    traced = train("log.profile=true")
    events = json.loads((traced.folder / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert len(steps) == 3  # of the twelve
    assert any("scaled_dot_product" in event.get("name", "") for event in events)


def test_the_val_split_can_be_evaluated(train, data):
    out = train("data.evaluate_on=val").outcome.out
    assert f"epoch 1, val in {data.anno_dir}: 16 queries, 8 images" in out


def test_bf16_trains_on_a_cpu(train):
    assert "encoders in bf16" in train("misc.precision=bf16").log


def test_training_starts_from_clip_weights(train, tmp_path):
    sizes = {"embed": 32, "resolution": (32, 16), "patch": 16, "vision_width": 64, "vision_layers": 1, "vocab": 49408}
    sizes |= {"context": 77, "text_width": 32, "text_layers": 1}
    weights = {name: torch.as_tensor(value) for name, value in clip_weights(**sizes).items()}
    torch.save(weights, tmp_path / "clip.pt")
    own = ("model.vision_width=64", f"model.checkpoint={tmp_path / 'clip.pt'}", "model.lock_bottom=true")
    trained = train(*own, "model.activation=gelu")
    state = read_checkpoint(trained.folder / "checkpoint_last.pth")["model"]
    assert torch.equal(state["image_encoder.conv1.weight"], weights["visual.conv1.weight"])  # it is locked
    assert not torch.equal(state["image_encoder.proj"], weights["visual.proj"])
    assert str(tmp_path / "clip.pt") in trained.log
    assert "activation: gelu (given as model.activation)" in trained.log


def test_training_starts_from_a_saved_checkpoint_and_writes_beside_it(train, full, tmp_path):
    start_file = tmp_path / "start.pth"
    shutil.copy(full.folder / "checkpoint_best.pth", start_file)
    frozen = ("schedule.lr=1e-30", "schedule.lr_start=0", "schedule.lr_end=0")  # keeps the weights
    train("model.ckpt_type=saved", f"model.saved_path={start_file}", *frozen)
    own = Run(tmp_path / "start", Outcome(0, "", ""))
    assert start_file.read_bytes() == (full.folder / "checkpoint_best.pth").read_bytes()
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "metrics.jsonl"} <= {p.name for p in own.folder.iterdir()}
    began = read_checkpoint(start_file)
    assert [own.records[0][name] for name in METRICS] == pytest.approx([began["metrics"][name] for name in METRICS])
    ended = read_checkpoint(own.folder / "checkpoint_last.pth")["model"]
    for name, tensor in began["model"].items():
        torch.testing.assert_close(ended[name], tensor)


def test_a_gpu_that_is_not_there_is_replaced_with_a_warning(full, data, run, monkeypatch):
    """Published configurations contain `device: 5`."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    outcome = run("--evaluate", full.folder / "checkpoint_last.pth", *QUICK, *of_dataset(data), "device=5")
    assert outcome.status == 0 and re.search(r"^warning: device: 5 .* cpu", outcome.out, re.MULTILINE)


def test_counts_that_differ_from_the_published_ones_cause_a_warning(full, data, run):
    own = ("data.dataset=CUHK-PEDES", "data.evaluate_on=test")
    outcome = run("--evaluate", full.folder / "checkpoint_last.pth", *QUICK, *of_dataset(data), *own)
    assert outcome.status == 0
    assert "warning: CUHK-PEDES test: 5 identities here, 1,000 published" in outcome.out
    assert "CUHK-PEDES train" not in outcome.out  # it is not evaluated


def test_a_folder_that_contains_a_run_is_only_replaced_with_overwrite(train, run, data, tmp_path):
    old = train()
    before = {path.name: path.read_bytes() for path in old.folder.iterdir()}
    again = (*ARCHITECTURE, *QUICK, *of_dataset(data), f"model.saved_path={old.folder}", "schedule.epoch=1")
    message = only_error(run(*again))
    assert str(old.folder) in message and "--overwrite" in message
    assert {path.name: path.read_bytes() for path in old.folder.iterdir()} == before

    new = train("--overwrite", "experiment.citc=false")
    assert len(new.records) == 1 and "loss_citc" not in new.records[0]


# ---- mistakes -----------------------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """Wrong arguments, and words that the message must contain."""

    arguments: list[str]
    words: list[str]


def annotation(dataset: TinyDataset) -> list[dict]:
    return json.loads((dataset.anno_dir / "reid_raw.json").read_text())


def annotate(dataset: TinyDataset, entries: list[dict]) -> None:
    (dataset.anno_dir / "reid_raw.json").write_text(json.dumps(entries))


def unknown_key(dataset, folder):
    return Mistake(["data.batchsize=4"], ["'data.batchsize'", "'data.batch_size'"])


def missing_annotation_folder(dataset, folder):
    return Mistake([f"anno_dir={folder / 'nowhere'}"], ["anno_dir", str(folder / "nowhere")])


def missing_images(dataset, folder):
    paths = [entry["file_path"] for entry in annotation(dataset)][:7]
    for path in paths:
        (dataset.image_dir / path).unlink()
    return Mistake([], ["7 of 34", *paths[:5], "image_dir"])


def annotation_without_split(dataset, folder):
    entries = [{key: value for key, value in entry.items() if key != "split"} for entry in annotation(dataset)]
    (dataset.anno_dir / "reid_raw.json").unlink()
    (dataset.anno_dir / "caption_all.json").write_text(json.dumps(entries))
    return Mistake([], ["caption_all.json", "split", "reid_raw.json"])


def annotation_with_other_fields(dataset, folder):
    annotate(dataset, [{"split": "train", "person": 1, "image": "a.jpg", "text": "A person."}])
    return Mistake([], ["reid_raw.json", "entry 1", "`id`"])


def image_without_caption(dataset, folder):
    entries = annotation(dataset)
    entries[2]["captions"] = []
    annotate(dataset, entries)
    return Mistake([], ["reid_raw.json", "entry 3", "captions"])


def clip_file(folder: Path, content: bytes, *words: str) -> Mistake:
    (folder / "clip.pt").write_bytes(content)
    return Mistake([f"model.checkpoint={folder / 'clip.pt'}"], [str(folder / "clip.pt"), *words])


def clip_weights_that_are_a_web_page(dataset, folder):
    return clip_file(folder, b"<!DOCTYPE html>\n<html>Log in</html>\n", "web page")


def clip_weights_that_are_a_pointer(dataset, folder):
    return clip_file(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull")


def clip_weights_that_are_cut_off(dataset, folder):
    torch.save({"visual.proj": torch.zeros(300, 300)}, folder / "whole.pt")
    assert zipfile.is_zipfile(folder / "whole.pt")
    return clip_file(folder, (folder / "whole.pt").read_bytes()[:-1000], "incomplete")


def clip_weights_of_another_architecture(dataset, folder):
    weights = clip_weights(**TINY | {"vision_width": 128})
    torch.save({name: torch.as_tensor(value) for name, value in weights.items()}, folder / "clip.pt")
    own = [f"model.checkpoint={folder / 'clip.pt'}", "model.activation=gelu"]
    return Mistake(own, ["does not fit", "vision_width 128", "model.vision_width=auto"])


def clip_weights_of_an_unknown_activation(dataset, folder):
    weights = clip_weights(**TINY)
    torch.save({name: torch.as_tensor(value) for name, value in weights.items()}, folder / "clip.pt")
    return Mistake([f"model.checkpoint={folder / 'clip.pt'}"], ["model.activation=quick_gelu", "model.activation=gelu"])


def clip_weights_of_an_unknown_tag(dataset, folder):
    return Mistake(["model.checkpoint=laion2b_s34b_b88"], ["laion2b_s34b_b88:", "laion2b_s34b_b88k"])


def missing_clip_weights(dataset, folder):
    return Mistake([f"model.checkpoint={folder / 'nowhere.pt'}"], [str(folder / "nowhere.pt"), "No such file"])


def batch_larger_than_the_training_set(dataset, folder):
    return Mistake(["data.batch_size=49"], ["data.batch_size", "49", "48"])


def no_val_split(dataset, folder):
    annotate(dataset, [entry for entry in annotation(dataset) if entry["split"] != "val"])
    return Mistake(["data.evaluate_on=val"], ["data.evaluate_on", "val", "test"])


def fp16_on_a_cpu(dataset, folder):
    return Mistake(["misc.precision=fp16"], ["misc.precision", "fp16", "CPU"])


def broken_checkpoint(dataset, folder):
    (folder / "broken.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    return Mistake(["--evaluate", str(folder / "broken.pth")], [str(folder / "broken.pth")])


def text_for_a_checkpoint(dataset, folder):
    (folder / "train.log").write_text("1 process(es), this one on cpu\n")
    return Mistake(["--evaluate", str(folder / "train.log")], [str(folder / "train.log")])


def missing_checkpoint(dataset, folder):
    return Mistake(["--evaluate", str(folder / "nowhere.pth")], [str(folder / "nowhere.pth"), "No such file"])


def missing_start(dataset, folder):
    path = folder / "run.pth"  # its run would go into the folder `run`
    return Mistake(["model.ckpt_type=saved", f"model.saved_path={path}"], [str(path), "No such file"])


def folder_for_a_start(dataset, folder):
    (folder / "weights").mkdir()
    own = ["model.ckpt_type=saved", f"model.saved_path={folder / 'weights'}"]
    return Mistake(own, [str(folder / "weights"), "is a folder", "model.checkpoint"])


def tensorboard_that_is_not_installed(dataset, folder):
    return Mistake(["log.tensorboard=true"], ["log.tensorboard", "pip install tensorboard"])


def wandb_that_is_not_installed(dataset, folder):
    return Mistake(["log.wandb=true"], ["log.wandb", "pip install wandb"])


MISTAKES = [
    unknown_key,
    missing_annotation_folder,
    missing_images,
    annotation_without_split,
    annotation_with_other_fields,
    image_without_caption,
    clip_weights_that_are_a_web_page,
    clip_weights_that_are_a_pointer,
    clip_weights_that_are_cut_off,
    clip_weights_of_another_architecture,
    clip_weights_of_an_unknown_activation,
    clip_weights_of_an_unknown_tag,
    missing_clip_weights,
    batch_larger_than_the_training_set,
    no_val_split,
    fp16_on_a_cpu,
    broken_checkpoint,
    text_for_a_checkpoint,
    missing_checkpoint,
    missing_start,
    folder_for_a_start,
    tensorboard_that_is_not_installed,
    wandb_that_is_not_installed,
]


@pytest.fixture
def without_loggers(monkeypatch):
    """Hides TensorBoard and wandb if they are installed."""
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in ("tensorboard", "wandb") else find_spec(name))


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda function: function.__name__)
def test_a_mistake_ends_with_one_line_before_anything_is_written(run, tiny_dataset, tmp_path, without_loggers, mistake):
    arguments, words = mistake(tiny_dataset, tmp_path)
    fixed = (*ARCHITECTURE, *QUICK, *of_dataset(tiny_dataset), f"model.saved_path={tmp_path / 'run'}")
    message = only_error(run(*fixed, *arguments))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_captions_and_names_that_no_terminal_or_font_can_show(run, tiny_dataset, tmp_path):
    """Half a surrogate pair, escape sequences, Chinese and emoji, in every caption and in a path."""
    odd = "A man \ud83d in \x1b[31mred\x07, 山 👩‍🦰.\r\n"
    entries = annotation(tiny_dataset)
    for entry in entries:
        entry["captions"] = [odd, odd]
    shutil.move(tiny_dataset.image_dir / entries[-1]["file_path"], tiny_dataset.image_dir / "\x1b[2J山.jpg")
    entries[-1]["file_path"] = "\x1b[2J山.jpg"
    annotate(tiny_dataset, entries)
    folders = [tmp_path / "\x1b[31mone", tmp_path / "two"]
    fixed = (*QUICK, *of_dataset(tiny_dataset))
    for folder in folders:
        own = (f"model.saved_path={folder}", "schedule.epoch=1", "log.sheet=2")
        trained = run(*ARCHITECTURE, *fixed, *own)
        assert trained.status == 0 and trained.err == "", trained
        assert (folder / "retrieval.png").is_file() and "warning: the run" not in trained.out
    one, two = (folder / "checkpoint_best.pth" for folder in folders)
    evaluated = run(*fixed, "--evaluate", one, "--against", two)
    assert evaluated.status == 0 and f"{tmp_path}/\\x1b[31mone" in evaluated.out
    (tiny_dataset.image_dir / "\x1b[2J山.jpg").unlink()
    refused = run(*fixed, "--evaluate", one)
    assert r"\x1b[2J山.jpg" in only_error(refused)
    for shown in (*trained, *evaluated[1:], *refused[1:]):
        assert "\x1b" not in str(shown) and "\ud83d" not in str(shown)


def test_the_first_five_missing_images_are_named(run, tiny_dataset, tmp_path):
    sixth = annotation(tiny_dataset)[5]["file_path"]
    missing_images(tiny_dataset, tmp_path)
    assert sixth not in only_error(run(*QUICK, *of_dataset(tiny_dataset), f"model.saved_path={tmp_path / 'run'}"))


@pytest.mark.parametrize(
    ("mistake", "begin"),
    [(unknown_key, start_forked), (missing_images, start)],
    ids=lambda function: function.__name__,
)
def test_a_process_reports_a_mistake_in_one_line(tiny_dataset, tmp_path, mistake, begin):
    arguments, words = mistake(tiny_dataset, tmp_path)
    saved_path = f"model.saved_path={tmp_path / 'run'}"
    message = only_error(begin(*ARCHITECTURE, *QUICK, *of_dataset(tiny_dataset), saved_path, *arguments))
    assert all(word in message for word in words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(run, tiny_dataset, tmp_path, workers, split):
    path = next(entry["file_path"] for entry in annotation(tiny_dataset) if entry["split"] == split)
    spoil(tiny_dataset.image_dir / path, "undecodable")
    own = (f"model.saved_path={tmp_path / 'run'}", f"data.num_workers={workers}", "schedule.epoch=1")
    assert path in only_error(run(*ARCHITECTURE, *QUICK, *of_dataset(tiny_dataset), *own))


def test_damaged_images_are_used_counted_and_named(tiny_dataset, tmp_path):
    """Of all loader processes and ranks, each once in the log of the training."""
    paths = {split: [e["file_path"] for e in annotation(tiny_dataset) if e["split"] == split] for split in IDENTITIES}
    for path in (paths["train"][0], paths["train"][9], paths["test"][1]):
        spoil(tiny_dataset.image_dir / path, "cut off")
    own = (f"model.saved_path={tmp_path / 'run'}", "data.num_workers=1", "schedule.epoch=1", "log.print_period=1")
    outcome = start_forked(*ARCHITECTURE, *QUICK, *of_dataset(tiny_dataset), *own, ranks=2)
    assert outcome.status == 0, outcome.err
    warnings = [line for line in Run(tmp_path / "run", outcome).log.splitlines() if "damaged image(s)" in line]
    *in_training, in_evaluation = warnings
    assert sorted(line.rpartition(": ")[2] for line in in_training) in (
        [paths["train"][0], paths["train"][9]],
        [f"{paths['train'][0]}, {paths['train'][9]}"],
        [f"{paths['train'][9]}, {paths['train'][0]}"],
    )
    assert in_evaluation == f"warning: only a part of 1 damaged image(s) can be decoded: {paths['test'][1]}"


def test_an_evaluation_says_which_images_it_leaves_out(full, run, tiny_dataset):
    path = next(entry["file_path"] for entry in annotation(tiny_dataset) if entry["split"] == "test")
    spoil(tiny_dataset.image_dir / path, "undecodable")
    own = ("--evaluate", full.folder / "checkpoint_last.pth", *QUICK, *of_dataset(tiny_dataset))
    outcome = run(*own, "data.skip_unreadable=true")
    assert outcome.status == 0 and path in only_error(run(*own))
    assert f"warning: 1 of 10 annotated images cannot be decoded: '{path}' (" in outcome.out
    assert "warning: test without 1 images and their 2 captions: its results cannot be compared" in outcome.out
    assert f"test in {tiny_dataset.anno_dir}: 18 queries, 9 images" in outcome.out


# ---- mistakes under torchrun --------------------------------------------------------------------------------------


def only_error_of_ranks(outcome: Outcome) -> str:
    """Finds the one error line in the output of torchrun. Every rank ended with it, or was ended by torchrun."""
    assert outcome.status == 1  # torchrun's own
    output = outcome.out + outcome.err
    (line,) = [line for line in output.splitlines() if "error: " in line and not line.lstrip().startswith("error_file")]
    statuses = {int(status) for status in re.findall(r"exitcode *: (-?\d+)", output)}
    assert 2 in statuses and statuses <= {2, -15, 143}, output  # 143: it received SIGTERM
    assert "[rank" not in output, f"a rank printed its traceback: {output}"
    assert line.startswith("error: ")
    return line


def test_ranks_report_the_same_mistake_once(data, tmp_path):
    own = ("data.batch_size=25", f"model.saved_path={tmp_path / 'run'}")
    line = only_error_of_ranks(start(*ARCHITECTURE, *QUICK, *of_dataset(data), *own, ranks=2))
    assert all(word in line for word in ("25 on 2 processes", "48", "24"))
    assert not (tmp_path / "run").exists()


def test_a_mistake_on_one_rank_is_reported_once(tiny_dataset, tmp_path):
    """The other rank loses its partner in the middle of a step, but must not report that."""
    path = annotation(tiny_dataset)[0]["file_path"]  # with seed 1, rank 1 has both its samples
    spoil(tiny_dataset.image_dir / path, "undecodable")
    own = (f"model.saved_path={tmp_path / 'run'}", "schedule.epoch=1")
    outcome = start(*ARCHITECTURE, *QUICK, *of_dataset(tiny_dataset), *own, ranks=2)
    assert path in only_error_of_ranks(outcome)


def test_other_ranks_than_the_first_wait_for_the_launcher(run, monkeypatch):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert only_error(run("nonsense=1")) and waited == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "'nonsense'" in only_error(run("nonsense=1")) and len(waited) == 1
