"""A tiny CLIP and a few pictures to search."""

from pathlib import Path

import torch
from PIL import Image

from misc.data.images import read_image
from misc.search.encoder import Encoder, load_encoder
from misc.search.gallery import Gallery, default_index, open_gallery
from tests.helpers.seeded import clip_weights

NAMES = ("a.jpg", "b.JPEG", "deep/er/c.png", "deep/d.webp", "deep/e.jpg", "f g.png", "ü.jpg")
COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple")
GELU = "model.activation=gelu"


def write_clip(path: Path, seed: int = 0, embed: int = 32) -> Path:
    """Writes the weights of a CLIP for pictures of 32 × 32 pixels; each seed has other weights."""
    sizes = {"embed": embed, "resolution": (32, 32), "patch": 16, "vision_width": 32, "vision_layers": 1}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in clip_weights(**sizes, text_width=32, text_layers=1).items():
        tensor = torch.as_tensor(value)
        state[name] = tensor + 0.5 * torch.randn(tensor.shape, generator=generator) if seed else tensor
    torch.save(state, path)
    return path


def write_people(folder: Path) -> Path:
    """Writes seven JPEG, PNG and WebP pictures in three folders, and files that must not be indexed."""
    for name, colour in zip(NAMES, COLOURS, strict=True):
        save_picture(folder / name, colour)
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_text("no picture")
    save_picture(folder / ".thumbnails" / "t.jpg", "red")
    return folder


def save_picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 40), colour).save(path)


def gallery_of(folder: Path) -> Gallery:
    """Opens the default index of a folder of pictures."""
    return open_gallery(default_index(folder))


def paths_of(folder: Path) -> list[str]:
    """Returns the paths of all pictures in the default index of a folder."""
    return [picture.path for picture in gallery_of(folder).pictures()]


def encoder_of(clip: Path) -> Encoder:
    return load_encoder(str(clip), [GELU], torch.device("cpu"))


def features_one_by_one(folder: Path, clip: Path, names: list[str]) -> torch.Tensor:
    """Returns the features (names, D) that an index should contain."""
    encoder = encoder_of(clip)
    return torch.cat([encoder.encode_pictures(encoder.view(read_image(folder / name))[None]) for name in names])
