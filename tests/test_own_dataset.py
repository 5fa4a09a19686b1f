"""The example of "Your own dataset" in docs/training.md trains."""

import re
import shlex

from PIL import Image

from tests.helpers.runs import ARCHITECTURE, QUICK, ROOT, Run, start_forked

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").partition("### Your own dataset\n")[2]
ROWS = re.search(r"```csv\n(.*?)```", TEXT, re.DOTALL)[1]
COMMAND = shlex.split(re.search(r"```\npython main.py (.*)\n```", TEXT)[1])


def test_a_file_of_six_lines_trains(tmp_path):
    assert len(ROWS.splitlines()) == 6
    (tmp_path / "people.csv").write_text(ROWS, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for name in re.findall(r"\w+\.jpg", ROWS):
        Image.new("RGB", (16, 32), "red").save(tmp_path / "photos" / name)
    own = [
        word.replace("=people.csv", f"={tmp_path}/people.csv").replace("=photos", f"={tmp_path}/photos")
        for word in COMMAND
    ]
    assert f"anno_dir={tmp_path}/people.csv" in own and f"image_dir={tmp_path}/photos" in own
    short = ("schedule.epoch=1", "log.sheet=1", f"model.saved_path={tmp_path / 'run'}")
    assert "model.checkpoint=openai" in own
    outcome = start_forked(*QUICK, *own, *ARCHITECTURE, *short)  # the last argument counts: random weights
    assert outcome.status == 0, outcome.err
    (record,) = Run(tmp_path / "run", outcome).records
    assert record["loss"] > 0 and "step 1/1" in outcome.out
    assert f"epoch 1, test in {tmp_path}/people.csv: 2 queries, 2 images" in outcome.out
    again = start_forked("--evaluate", tmp_path / "run" / "checkpoint_best.pth", *QUICK)
    assert f"test in {tmp_path}/people.csv: 2 queries, 2 images" in again.out, again.err
