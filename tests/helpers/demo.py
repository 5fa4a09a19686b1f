"""A checkpoint of the demo, without training, and drawn people that were not in its training data.

`demo_weights.npz` contains weights of an earlier demo (128 × 64 pixels, seed 0, R@1 55.35 on its 250 unseen people), so
that tests need not train for minutes. Matrices have eight bits per number and a scale for each row. The token embedding
has only the tokens of the demo's captions. To write the file again, run
`python -m tests.helpers.demo runs/demo/checkpoint_best.pth data/pedestrians`.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from misc.pedestrians.dataset import imagine_identity
from misc.pedestrians.people import Person
from misc.pedestrians.scene import draw_pedestrian
from misc.run.checkpoint import read_checkpoint, write_checkpoint
from text_utils.tokenizer import VOCABULARY_SIZE, Tokenizer

WEIGHTS = Path(__file__).parent / "demo_weights.npz"
TOKEN_TABLE = "text_encoder.token_embedding.weight"
FIRST_UNSEEN = 1601
"""First identity of the test split; lower ones are in the training and validation splits."""
IMAGES, SEED, SIZE = 4, 0, (128, 64)
LARGEST = 127


class Unseen(NamedTuple):
    """A drawn person, with the captions of each picture by its path."""

    person: Person
    captions: dict[str, list[str]]


def write_demo_checkpoint(path: Path) -> None:
    """Writes the checkpoint of the demo in the form of a run's `checkpoint_best.pth`."""
    with np.load(WEIGHTS) as stored:
        config = json.loads(str(stored["config"]))
        model = {}
        for name in stored["names"]:
            value = torch.from_numpy(stored[name].astype(np.float32))
            if f"{name}/scale" in stored:
                value *= torch.from_numpy(stored[f"{name}/scale"].astype(np.float32))[:, None]
            model[str(name)] = value.reshape(tuple(stored[f"{name}/shape"]))
        table = torch.zeros(VOCABULARY_SIZE, model[TOKEN_TABLE].shape[1])
        table[torch.from_numpy(stored["tokens"].astype(np.int64))] = model[TOKEN_TABLE]
    write_checkpoint(path, {"model": model | {TOKEN_TABLE: table}, "config": config, "epoch": 8, "metrics": {}})


def draw_unseen(folder: Path, people: int) -> dict[str, Unseen]:
    """Draws four pictures of each person, in folders named by camera.

    Returns: the people, by the first part of their file names (see `identity_of`).
    """
    drawn = {}
    for identity in range(FIRST_UNSEEN, FIRST_UNSEEN + people):
        person, portraits = imagine_identity(identity, IMAGES, SEED)
        for portrait in portraits:
            path = folder / portrait.file_path
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_pedestrian(person, portrait.shot, *SIZE).save(path, quality=90)
        drawn[f"{identity:04}"] = Unseen(person, {portrait.file_path: portrait.captions for portrait in portraits})
    return drawn


def identity_of(path: str) -> str:
    """Returns the key of `draw_unseen` for the path of a picture."""
    return Path(path).name.partition("_")[0]


def store(checkpoint: Path, dataset: Path) -> None:
    """Writes `demo_weights.npz` from a checkpoint of the demo and its dataset."""
    content = read_checkpoint(checkpoint)
    tokenizer = Tokenizer()
    entries = json.loads((dataset / "reid_raw.json").read_text())
    tokens = sorted({token for entry in entries for text in entry["captions"] for token in tokenizer.encode(text, 77)})
    model: dict[str, Tensor] = content["model"]
    arrays = {"config": np.array(json.dumps(content["config"])), "names": np.array(list(model))}
    arrays["tokens"] = np.array(tokens, dtype=np.uint16)
    for name, tensor in model.items():
        value = tensor[tokens] if name == TOKEN_TABLE else tensor
        arrays[f"{name}/shape"] = np.array(value.shape, dtype=np.int32)
        if value.ndim < 2:
            arrays[name] = value.numpy().astype(np.float16)
            continue
        rows = value.flatten(start_dim=1)
        scale = rows.abs().amax(dim=1, keepdim=True) / LARGEST
        arrays[f"{name}/scale"] = scale[:, 0].numpy().astype(np.float16)
        arrays[name] = (rows / scale).round().to(torch.int8).numpy()
    np.savez_compressed(WEIGHTS, **arrays)


if __name__ == "__main__":
    store(Path(sys.argv[1]), Path(sys.argv[2]))
