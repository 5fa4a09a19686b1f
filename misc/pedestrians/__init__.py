"""Draws the demo dataset: synthetic pedestrians, on disk in the raw form of CUHK-PEDES.

A `Person` (`people.py`) is what stays the same over all images of an identity, a `Shot` is what changes from image to
image. `see` says what a shot shows of a person, for the captions (`captions.py`), and `draw_pedestrian` draws it: a
scene (`scene.py`) and in it a figure (`figure.py`) in a pose (`pose.py`), dressed from the wardrobe (`wardrobe.py`).
Figures are drawn in centimetres: x to the right, y up, (0, 0) on the ground between the feet.
"""

from misc.pedestrians.captions import describe
from misc.pedestrians.dataset import draw_dataset, imagine_identity
from misc.pedestrians.people import Item, Person, Shot, Sight, imagine_person, see, take_shot
from misc.pedestrians.scene import draw_pedestrian

__all__ = [
    "Item",
    "Person",
    "Shot",
    "Sight",
    "describe",
    "draw_dataset",
    "draw_pedestrian",
    "imagine_identity",
    "imagine_person",
    "see",
    "take_shot",
]
