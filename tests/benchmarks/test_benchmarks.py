"""The baseline computes the same as this code, and the benchmarks measure both."""

import dataclasses
import json
import runpy
import sys

import pytest
import torch

from benchmarks import baseline
from benchmarks import suite as benchmarks
from benchmarks.comparison import counted, in_turn
from misc.retrieval import metrics
from misc.system.precision import Precision
from misc.training.optimizer import build_optimizer, parameter_groups
from tests.helpers.golden_models import tiny_model

OVERRIDES = (
    "experiment.input_resolution=[64, 32]",
    "experiment.simclr_mlp=[32, 16, 32]",
    "model.embed_dim=32",
    "model.vision_width=64",
    "model.vision_layers=2",
    "model.vision_heads=2",
    "model.text_width=48",
    "model.text_layers=2",
    "model.text_heads=3",
)
SETUP = benchmarks.Setup(torch.device("cpu"), Precision("fp32", "cpu"), 4, 1, OVERRIDES)


@pytest.mark.parametrize("recipe", benchmarks.RECIPES)
def test_the_baseline_computes_the_same_losses_and_gradients(recipe):
    published, ours, model, published_model = benchmarks.build_steps(SETUP, recipe, 6)
    expected, found = published(), ours()
    for name, loss in expected.items():
        assert found[name].item() == pytest.approx(loss.item(), rel=1e-5), name
    grads = baseline.from_ours({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    parameters = dict(published_model.named_parameters())
    assert grads.keys() == {name for name, p in parameters.items() if p.grad is not None and "simclr" not in name}
    for name, parameter in parameters.items():
        if name in grads and not name.endswith("in_proj_bias"):  # the gradient of its key part is rounding error
            scale = parameter.grad.abs().max()
            assert (grads[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_a_different_step_is_found(monkeypatch):
    monkeypatch.setattr(baseline.losses, "cyclic_contrastive", lambda *_: torch.tensor(1.0))
    contrast = benchmarks.Objectives.contrast
    monkeypatch.setattr(
        benchmarks.Objectives, "contrast", lambda self, *a: contrast(dataclasses.replace(self, citc_ratio=0.2), *a)
    )
    with pytest.raises(AssertionError, match="full: losses differ"):
        benchmarks.check_steps(SETUP, "full")


def test_the_optimizer_of_the_baseline_makes_the_same_step():
    models = [tiny_model(), tiny_model()]
    settings = {"betas": (0.9, 0.98), "eps": 1e-8}
    groups = parameter_groups(models[0], weight_decay=0.02, head_ratio=5.0)
    optimizers = [build_optimizer(groups, **settings), baseline.optimizer(models[1], weight_decay=0.02, **settings)]
    for group in optimizers[0].param_groups:
        group["lr"] = 1e-5
    for model, optimizer in zip(models, optimizers, strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=name)


def test_the_ranking_of_the_baseline_returns_the_same_numbers():
    data = benchmarks.random_retrieval(50, 40)
    expected, found = baseline.rank_metrics(*data), metrics.summarise(metrics.rank_queries(*data))
    assert {name: pytest.approx(value, abs=1e-4) for name, value in expected.items()} == {
        name: found[name] for name in expected
    }


def test_this_code_needs_fewer_flops():
    rows = list(benchmarks.bench_flops(SETUP))
    assert [row.unit for row in rows] == ["GFLOP", "GFLOP"]
    assert rows[0].ratio > 1.2 and rows[1].ratio > 1.4  # ViT-B/16: 1.29 and 1.58


def test_both_run_in_turn_and_the_first_round_does_not_count():
    order = []
    row = in_turn("x", lambda: order.append("baseline"), lambda: order.append("ours"), 3)
    assert order == ["baseline", "ours"] * 4
    assert row.spread[0] <= row.spread[1] and row.unit == "s"
    assert counted("x", 6.0, 3.0, "GB").ratio == 2


@pytest.mark.slow
def test_the_command_starts(monkeypatch, capfd):
    """Also the processes in which it measures memory."""
    monkeypatch.setattr(benchmarks, "RETRIEVALS", ())
    monkeypatch.setattr(benchmarks, "RECIPES", {"full": False})
    arguments = ["--only", "memory", "--batch", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, *OVERRIDES])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("benchmarks", run_name="__main__")
    out, err = capfd.readouterr()
    assert ended.value.code == 0 and "memory of a step, full, batch 2" in out, err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(benchmarks.BENCHMARKS) - {"flops", "memory"}))
def test_each_benchmark_runs_and_is_written_down(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "RETRIEVALS", ((60, 40),))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it would stay for the next tests
    monkeypatch.setattr(torch, "compile", lambda module: module)  # takes a minute, and is not our code
    arguments = [
        "--only",
        name,
        "--batch",
        "2",
        "--rounds",
        "1",
        "--precision",
        "fp32",
        "--json",
        str(tmp_path / "b.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, *OVERRIDES])
    benchmarks.main()
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["machine"]["precision"] == "fp32" and written["rows"]
    out = capsys.readouterr().out
    for row in written["rows"]:
        assert row["benchmark"] == name and row["ratio"] > 0 and row["name"] in out
