"""Draws the demo dataset: synthetic pedestrians, on disk in the raw form of CUHK-PEDES.

A `Person` (`people.py`) contains what is the same in all images of an identity. A `Shot` contains what differs between
two images. `see` returns what a shot shows of a person, for the captions (`captions.py`). `draw_pedestrian` draws the
shot: a scene (`scene.py`) with a figure (`figure.py`) in a pose (`pose.py`), dressed from the wardrobe (`wardrobe.py`).
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
