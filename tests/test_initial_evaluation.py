"""`log.initial_evaluation`: the initial weights are evaluated once, and the training stays the same."""

import pytest

from misc.run.checkpoint import read_checkpoint
from tests.helpers.runs import ARCHITECTURE, METRICS, QUICK, at_step, finished, of_dataset

SETTINGS = (*ARCHITECTURE, *QUICK, "schedule.epoch=1", "log.checkpoint_period=2", "log.sheet=0")
ON = "log.initial_evaluation=true"


@pytest.mark.slow
def test_weights_that_hardly_change_have_the_metrics_of_the_initial_ones(run, data, tmp_path):
    still = ("schedule.lr=1e-12", "schedule.lr_start=0", "schedule.lr_end=0")
    outcome = run(*SETTINGS, *of_dataset(data), *still, ON, f"model.saved_path={tmp_path / 'run'}")
    assert outcome.status == 0 and f"initial weights, test in {data.anno_dir}: 20 queries, 10 images" in outcome.out
    (record,) = finished(tmp_path / "run").records
    assert {name: record[f"initial_{name}"] for name in METRICS} == pytest.approx(
        {name: record[name] for name in METRICS}
    )


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_it_and_the_weights_are_the_same(run, data, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash() -> None:
        raise Crash

    assert run(*SETTINGS, *of_dataset(data), f"model.saved_path={tmp_path / 'without'}").status == 0
    arguments = (*SETTINGS, *of_dataset(data), ON, f"model.saved_path={tmp_path / 'with'}")
    with monkeypatch.context() as patch:
        at_step(patch, 4, crash)
        with pytest.raises(Crash):
            run(*arguments)
    outcome = run(*arguments, "--resume")
    assert outcome.status == 0 and "initial weights" not in outcome.out
    (record,) = finished(tmp_path / "with").records
    assert all(f"initial_{name}" in record for name in METRICS)
    weights = [read_checkpoint(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("with", "without")]
    assert all(weights[0][name].equal(tensor) for name, tensor in weights[1].items())
