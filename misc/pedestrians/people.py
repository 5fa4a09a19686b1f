"""People, shots of people, and what a shot shows of a person."""

import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from misc.pedestrians.colours import COLOURS, HAIR_COLOURS, SKIN_COLOURS, Colour, contrasting, tinted

UPPER_KINDS = ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat")
UPPER_KINDS_OF_WOMEN = (*UPPER_KINDS, "tank top", "dress")
LOWER_KINDS = ("trousers", "jeans", "shorts")
LOWER_KINDS_OF_WOMEN = (*LOWER_KINDS, "skirt", "skirt", "long skirt", "leggings")
JEANS_COLOURS = ("blue", "light blue", "black", "grey", "white")
PATTERNED_KINDS = ("t-shirt", "shirt", "sweater", "dress", "tank top")
SHOES = ("sneakers", "shoes", "boots")
SHOES_OF_WOMEN = ("sneakers", "sneakers", "boots", "heels", "sandals")
HAIR = ("short", "short", "short", "long")
HAIR_OF_WOMEN = ("bob", "long", "long", "ponytail", "ponytail", "short")
BAGS = ("", "backpack", "shoulder bag", "handbag", "shopping bag", "suitcase")


class Item(NamedTuple):
    """One thing a person wears, has or carries."""

    kind: str
    colour: str
    pattern: str = "plain"  # plain, striped, checked, dotted, logo, open (over a shirt)
    second_colour: str = ""  # of the stripes, checks, dots, logo or shirt


@dataclass(frozen=True)
class Person:
    """The appearance of an identity, the same in all its images."""

    gender: str  # man, woman
    height: float  # cm
    breadth: float  # 1 is average
    skin: Colour
    upper: Item
    lower: Item | None  # None under a dress with bare legs
    shoes: Item
    inner_colour: str  # of the shirt under a jacket
    hair: Item
    hat: Item | None
    bag: Item | None
    bag_side: str  # left or right; the other hand is free
    scarf: Item | None
    umbrella: Item | None
    glasses: bool
    beard: bool
    tints: dict[str, Colour]  # this person's shade of each colour


@dataclass(frozen=True)
class Shot:
    """One picture of a person: the camera, its direction, and what the person does."""

    camera: str
    view: str  # side of the person that faces the camera: front, back, left, right
    gait: str  # standing, walking
    phase: float  # of the stride, in radians
    arms: str  # hanging, pockets (hands in them), phone (at the ear)
    size: float  # of the figure, as a share of the frame
    shift: tuple[float, float]  # of the figure, as a share of the frame
    tilt: float  # radians
    light: float
    contrast: float
    blur: float  # pixels
    noise: float  # grey levels
    seed: int  # of the background and the noise


@dataclass(frozen=True)
class Sight:
    """The visible attributes of a person in one image; None or False if absent or hidden in this view."""

    gender: str
    view: str  # front, back, side
    gait: str
    upper: Item
    lower: Item | None
    shoes: Item
    hair: Item | None
    hat: Item | None
    bag: Item | None
    scarf: Item | None
    umbrella: Item | None
    glasses: bool
    beard: bool
    phone: bool


def imagine_person(rng: Random) -> Person:
    """Chooses the attributes of one identity at random.

    Colours are nearly uniform, so that few people share a description.
    """
    woman = rng.random() < 0.5
    upper = _imagine_upper(woman, rng)
    lower = _imagine_lower(woman, upper, rng)
    hat = _imagine_hat(upper, rng)
    hair = _imagine_hair(woman, hat, rng)
    bag_kind = rng.choices(BAGS, (8, 5, 4, 4 if woman else 0, 2, 2))[0]
    has_umbrella = bag_kind != "suitcase" and rng.random() < 0.07
    return Person(
        gender="woman" if woman else "man",
        height=rng.gauss(168 if woman else 178, 5),
        breadth=rng.uniform(0.9, 1.12),
        skin=rng.choice(SKIN_COLOURS),
        upper=upper,
        lower=lower,
        shoes=Item(rng.choice(SHOES_OF_WOMEN if woman else SHOES), _any_colour(rng)),
        inner_colour=contrasting(upper.colour, rng),
        hair=hair,
        hat=hat,
        bag=Item(bag_kind, _any_colour(rng)) if bag_kind else None,
        bag_side=rng.choice(("left", "right")),
        scarf=Item("scarf", contrasting(upper.colour, rng)) if rng.random() < 0.13 else None,
        umbrella=Item("umbrella", _any_colour(rng)) if has_umbrella else None,
        glasses=rng.random() < 0.2,
        beard=not woman and rng.random() < 0.25,
        tints={name: tinted(colour, rng) for name, colour in COLOURS.items()},
    )


def _any_colour(rng: Random) -> str:
    return rng.choice(list(COLOURS))


def _imagine_upper(woman: bool, rng: Random) -> Item:
    kind = rng.choice(UPPER_KINDS_OF_WOMEN if woman else UPPER_KINDS)
    colour = _any_colour(rng)
    if kind in PATTERNED_KINDS and rng.random() < 0.5:
        pattern = rng.choice(("striped", "checked", "dotted", "logo"))
        return Item(kind, colour, pattern, contrasting(colour, rng))
    return Item(kind, colour)


def _imagine_lower(woman: bool, upper: Item, rng: Random) -> Item | None:
    kind = rng.choice(LOWER_KINDS_OF_WOMEN if woman else LOWER_KINDS)
    if upper.kind == "coat":
        kind = rng.choice(("trousers", "jeans"))  # a coat would hide anything shorter
    if upper.kind == "dress":
        kind = rng.choice(("leggings", ""))
    colours = [name for name in (JEANS_COLOURS if kind == "jeans" else COLOURS) if name != upper.colour]
    return Item(kind, rng.choice(colours)) if kind else None


def _imagine_hat(upper: Item, rng: Random) -> Item | None:
    kinds = ("", "cap", "beanie", "hat", "hood")
    kind = rng.choices(kinds, (11, 3, 3, 3, 4 if upper.kind == "hoodie" else 0))[0]
    if not kind:
        return None
    return Item(kind, upper.colour if kind == "hood" else _any_colour(rng))


def _imagine_hair(woman: bool, hat: Item | None, rng: Random) -> Item:
    styles: tuple[str, ...] = HAIR_OF_WOMEN if woman else HAIR
    if not hat:  # a hat would hide these styles
        styles += ("bun", "bun", "curly") if woman else ("bald", "curly")
    style = rng.choice(styles)
    return Item(style, "" if style == "bald" else rng.choice(list(HAIR_COLOURS)))


def take_shot(rng: Random, camera: str) -> Shot:
    """Chooses at random everything that differs between two images of one identity."""
    return Shot(
        camera=camera,
        view=rng.choices(("front", "back", "left", "right"), (4, 3, 2, 2))[0],
        gait=rng.choices(("walking", "standing"), (3, 2))[0],
        phase=rng.uniform(0, 2 * math.pi),
        arms=rng.choices(("hanging", "pockets", "phone"), (8, 2, 1))[0],
        size=rng.uniform(0.86, 0.94),
        shift=(rng.uniform(-0.05, 0.05), rng.uniform(-0.012, 0.012)),
        tilt=rng.gauss(0, 0.025),
        light=rng.uniform(0.86, 1.12),
        contrast=rng.uniform(0.88, 1.1),
        blur=max(0.0, rng.uniform(-0.6, 0.45)),
        noise=rng.uniform(1, 4),
        seed=rng.getrandbits(32),
    )


def see(person: Person, shot: Shot) -> Sight:
    """Returns the attributes of the person that this shot shows."""
    back = shot.view == "back"
    return Sight(
        gender=person.gender,
        view="side" if shot.view in ("left", "right") else shot.view,
        gait=shot.gait,
        upper=_visible_upper(person, shot),
        lower=person.lower,
        shoes=person.shoes,
        hair=_visible_hair(person, shot),
        hat=person.hat,
        bag=_visible_bag(person, shot),
        scarf=person.scarf,
        umbrella=person.umbrella,
        glasses=person.glasses and not back,
        beard=person.beard and not back,
        # The free hand holds the phone. The head hides it from behind and on the far side.
        phone=shot.arms == "phone" and not person.umbrella and shot.view not in ("back", person.bag_side),
    )


def _visible_upper(person: Person, shot: Shot) -> Item:
    upper = person.upper
    if upper.pattern == "logo" and shot.view != "front":
        return Item(upper.kind, upper.colour)
    if upper.kind == "jacket" and shot.view != "back":
        return Item(upper.kind, upper.colour, "open", person.inner_colour)
    return upper


def _visible_hair(person: Person, shot: Shot) -> Item | None:
    front, hair, hat = shot.view == "front", person.hair, person.hat
    if front and hair.kind == "ponytail":
        hair = Item("tied back", hair.colour)
    flat = hair.kind in ("short", "tied back")
    if hat and (hat.kind == "hood" or (flat and (front or hat.kind == "beanie"))):
        return None
    return hair


def _visible_bag(person: Person, shot: Shot) -> Item | None:
    bag = person.bag
    if bag is None:
        return None
    if bag.kind == "backpack":
        # From the front only the straps are visible, and only if their colour differs from the garment under them.
        return None if shot.view == "front" and bag.colour == person.upper.colour else bag
    # The body hides a bag on the far side, except a suitcase.
    far = shot.view in ("left", "right") and shot.view != person.bag_side
    return None if far and bag.kind != "suitcase" else bag
