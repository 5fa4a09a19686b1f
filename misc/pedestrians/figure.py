"""Paints one person in one pose: the body, the garments that follow it, and the layers of the wardrobe over them."""

from collections.abc import Sequence

from misc.pedestrians.canvas import Canvas
from misc.pedestrians.colours import HAIR_COLOURS, Colour, mixed, shaded
from misc.pedestrians.people import Item, Person
from misc.pedestrians.pose import Pose
from misc.pedestrians.shapes import (
    Outline,
    Point,
    Shape,
    arc,
    between,
    box,
    ellipse,
    limb,
    line,
    moved,
    rounded,
    symmetric,
)
from misc.pedestrians.wardrobe import BEARD, DARK, HAIR, HAIR_BEHIND, SKIN, WARDROBE, Tone, Wardrobe

# Height of the lower edge of each garment, cm.
HEM = {"t-shirt": 88, "tank top": 90, "shirt": 85, "sweater": 86, "hoodie": 84, "jacket": 82, "coat": 52, "dress": 54}
HEM |= {"skirt": 50, "long skirt": 16}
FLARE = {"coat": 6, "dress": 9, "jacket": 1.5, "hoodie": 1}  # how much wider each side is at the hem, cm
SLEEVE_END = {"t-shirt": 0.9, "dress": 0.8, "tank top": 0.0}  # share of the upper arm; other garments have long sleeves
BULKY = ("hoodie", "coat", "sweater", "jacket")
LEG_RADII = {"trousers": (10.5, 8.5, 8), "jeans": (10, 8, 7), "leggings": (9, 6.5, 5), "shorts": (10.5, 10, 10)}

PALE = (236, 236, 234)
PHONE_COLOUR = (44, 46, 54)
BROWS_OF_THE_BALD = (84, 62, 48)


class Figure:
    """One person in one pose; `paint` paints the whole figure."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose) -> None:
        self.canvas, self.person, self.pose = canvas, person, pose
        self.hooded = person.hat is not None and person.hat.kind == "hood"
        self.hair_colour = HAIR_COLOURS.get(person.hair.colour, BROWS_OF_THE_BALD)

    def paint(self) -> None:
        """Paints everything, from back to front."""
        person, pose = self.person, self.pose
        if person.bag and person.bag.kind == "suitcase":
            self._wear(person.bag, flip=pose.flip(pose.bag_arm))
        self._paint_hair(HAIR_BEHIND)
        if pose.side:
            self._paint_arm(0)
        self._paint_legs()
        self._paint_torso()
        if not pose.side:
            self._paint_arm(0)
            self._paint_arm(1)
        self._paint_bag_on_body()
        self._paint_head()
        self._wear(person.scarf)
        self._wear(person.umbrella, flip=pose.flip(1 - pose.bag_arm))
        if pose.side:
            self._paint_arm(1)

    # --- colours and layers ---

    def _colour(self, item: Item, tone: float = 1.0) -> Colour:
        return shaded(self.person.tints[item.colour], tone)

    def _skin(self, tone: float = 1.0) -> Colour:
        return shaded(self.person.skin, tone)

    def _limb_tone(self, index: int) -> float:
        """Returns the tone of a limb: the one on the far side is darker."""
        return 0.86 if self.pose.side and index == 0 else 1.0

    def _wear(self, item: Item | None, at: Point = (0, 0), flip: int = 1) -> None:
        """Paints the layers of an item, if there is one, with their origin at a point, mirrored if flip is -1."""
        if item:
            self._paint_layers(WARDROBE, item.kind, self._colour(item), at, flip)

    def _paint_layers(self, wardrobe: Wardrobe, kind: str, colour: Colour, at: Point = (0, 0), flip: int = 1) -> None:
        views = wardrobe.get(kind, {})
        for shape, tone in views.get("any", []) + views.get(self.pose.view, []):
            self.canvas.paint(moved(shape, at, flip), self._layer_colour(tone, colour))

    def _layer_colour(self, tone: Tone, colour: Colour) -> Colour:
        if tone == SKIN:
            return self._skin(0.93)
        return tone if isinstance(tone, tuple) else shaded(colour, tone)

    # --- legs ---

    def _paint_legs(self) -> None:
        lower, legs = self.person.lower, self.pose.legs
        # The far leg first: from the front and the back, the leg whose foot is higher in the image.
        order = (0, 1) if self.pose.side else sorted((0, 1), key=lambda index: -legs[index][2][1])
        trousers = lower if lower and lower.kind in LEG_RADII else None
        for index in order:
            self.canvas.paint(limb(legs[index], (8.5, 6.3, 4.5)), self._skin(self._limb_tone(index)))
            self._paint_shoe(index)
            if trousers and self.pose.side and index == 0:
                self.canvas.paint(self._trouser_leg(trousers, index), self._colour(trousers, self._limb_tone(index)))
        if trousers:
            self._paint_trousers(trousers, order)
        for index in order:
            self._paint_cuff_and_boot(index)
        if lower and lower.kind in ("skirt", "long skirt"):
            self._paint_skirt(lower)

    def _paint_trousers(self, trousers: Item, order: Sequence[int]) -> None:
        """Paints the seat and the legs in one piece, without the far leg of a side view."""
        half = 9.5 if self.pose.side else self.pose.hip
        whole = rounded(symmetric([(half - 1, 100), (half + 1, 90), (half, 80), (3, 74)]))
        for index in (1,) if self.pose.side else order:
            whole += self._trouser_leg(trousers, index)
        self.canvas.paint(whole, self._colour(trousers))
        if not self.pose.side:
            self.canvas.paint(line([(0, 90), (0, 73)], 1), self._colour(trousers, 0.7))

    def _trouser_leg(self, trousers: Item, index: int) -> Shape:
        hip, knee, ankle = self.pose.legs[index]
        radii = LEG_RADII[trousers.kind]
        if trousers.kind == "shorts":
            return limb([hip, between(hip, knee, 0.5), between(hip, knee, 0.95)], radii)
        return limb([hip, knee, between(knee, ankle, 0.93)], radii)

    def _paint_cuff_and_boot(self, index: int) -> None:
        """Paints the cuff of jeans and the shaft of boots, which go over the trousers."""
        lower, shoes, tone = self.person.lower, self.person.shoes, self._limb_tone(index)
        _, knee, ankle = self.pose.legs[index]
        if lower and lower.kind == "jeans":
            cuff = line([between(knee, ankle, 0.86), between(knee, ankle, 0.95)], 14.6)
            self.canvas.paint(cuff, self._colour(lower, 1.35 * tone))
        if shoes.kind == "boots":
            self.canvas.paint(limb([between(knee, ankle, 0.45), ankle], (8.8, 7)), self._colour(shoes, tone))

    def _paint_skirt(self, skirt: Item) -> None:
        half = 10 if self.pose.side else self.pose.hip
        left, right = self._skirt_edges(half, 6, HEM[skirt.kind])
        self.canvas.paint([[(-half + 1, 100), (half - 1, 100), *right, *reversed(left)]], self._colour(skirt))
        for share in (0.25, 0.5, 0.75):
            fold = [between(*ends, share) for ends in zip(left, right, strict=True)]
            self.canvas.paint(line(fold, 1.1), self._colour(skirt, 0.78))

    def _skirt_edges(self, half: float, flare: float, hem: float) -> tuple[Outline, Outline]:
        """Returns the left and right edges, from the hip down, of cloth that flares and is wide enough to walk in."""
        left, right = [(-half - 1, 86.0)], [(half + 1, 86.0)]
        for y in (50, hem) if hem < 50 else (hem,):
            legs = [between(knee, ankle, min(1, max(0, (knee[1] - y) / 40)))[0] for _, knee, ankle in self.pose.legs]
            hang = half + flare * (86 - y) / (86 - hem)
            left.append((min(min(legs) - 8, -hang), y))
            right.append((max(max(legs) + 8, hang), y))
        return left, right

    def _paint_shoe(self, index: int) -> None:
        kind, paint, tone = self.person.shoes.kind, self.canvas.paint, self._limb_tone(index)
        colour = self._colour(self.person.shoes, tone)
        ankle = self.pose.legs[index][2]
        x, y = ankle[0], ankle[1] - 7
        if self.pose.side:
            heel, toe, lift = x - 7, x + 15, 4 if kind == "heels" else 0
            outline: Outline = [(-7, lift), (-7, 10), (3, 11), (8, 7), (17, 5), (18, -1)]
        else:
            heel, toe = x - 6.5, x + 6.5
            outline = symmetric([(5.5, 11), (9, 2), (7, -2.5)])
        foot = rounded([(x + ahead, y + up) for ahead, up in outline])
        if kind == "sandals":
            paint(foot, self._skin(tone))
            for height in (1, 6):
                paint(line([(heel, y + height), (toe - height / 2, y + height)], 3.4), colour)
            return
        paint(foot, colour)
        if kind == "heels" and self.pose.side:
            paint([[(heel, y - 1), (heel, y + 6), (heel + 4, y + 6), (heel + 2, y - 1)]], colour)
        elif kind in ("sneakers", "shoes"):
            stands_out = kind == "sneakers" and sum(colour) <= 640
            sole = PALE if stands_out else shaded(colour, 0.55)
            paint(line([(heel, y - 0.5), (toe, y - 0.5)], 2.6), sole)

    # --- torso and arms ---

    def _paint_upper(self, shape: Shape, tone: float = 1.0) -> None:
        """Paints a shape in the cloth of the upper garment."""
        upper = self.person.upper
        second = self.person.tints.get(upper.second_colour, (0, 0, 0))
        self.canvas.paint(shape, self._colour(upper, tone), upper.pattern, shaded(second, tone))

    def _paint_torso(self) -> None:
        upper, pose = self.person.upper, self.pose
        hem = HEM[upper.kind]
        self.canvas.paint(limb([(0, 140), (0, 152)], (6, 5.5)), self._skin(0.85))
        if upper.kind == "tank top" and not pose.side:
            self.canvas.paint(self._torso(), self._skin())
            straps = [(5, 137), (pose.shoulder - 6, 145), (pose.shoulder - 7, 132), (pose.waist + 1, 118)]
            self._paint_upper([symmetric([*straps, (pose.waist, 106), (pose.hip + 1, hem)])])
        else:
            self._paint_upper(self._torso())
        if upper.kind in ("sweater", "hoodie"):
            half = 9.5 if pose.side else pose.hip
            self.canvas.paint(line([(-half, hem + 2), (half, hem + 2)], 3.4), self._colour(upper, 0.78))
        if upper.kind == "jacket":
            self._wear(Item("inner shirt", self.person.inner_colour))
        self._wear(upper)
        if upper.kind == "hoodie" and not self.hooded:
            self._wear(Item("hood down", upper.colour))
        if upper.pattern == "logo":
            self._wear(Item("logo", upper.second_colour))

    def _torso(self) -> Shape:
        """Returns the upper garment without sleeves, from the neck to the hem."""
        kind, pose = self.person.upper.kind, self.pose
        hem, flare = HEM[kind], FLARE.get(kind, 0)
        waist = pose.waist + (2 if kind in BULKY else 0)
        if pose.side:
            half: Outline = [(5, 148), (9, 141), (11.5, 127), (waist * 0.68, 105), (10.5, 90)]
        else:
            half = [(6, 149), (pose.shoulder - 5, 144.5), (pose.shoulder, 138), (pose.shoulder - 2, 126)]
            half += [(waist, 106), (pose.hip + (3 if hem < 60 else 1), 90)]
        half = [point for point in half if point[1] > hem + 1]
        width = half[-1][0]
        if hem < 60:
            left, right = self._skirt_edges(width, flare, hem)
        else:
            left, right = [(-width - flare, hem)], [(width + flare, hem)]
        # The corners of the hem appear twice, so that they are rounded less.
        return rounded([*half, *right, right[-1], left[-1], *reversed(left), *[(-x, y) for x, y in reversed(half)]])

    def _paint_arm(self, index: int) -> None:
        shoulder, elbow, wrist = self.pose.arms[index]
        kind, action, tone = self.person.upper.kind, self.pose.actions.get(index), self._limb_tone(index)
        self.canvas.paint(limb([shoulder, elbow, wrist], (5.5, 4.8, 4)), self._skin(tone))
        self.canvas.paint(ellipse(*between(elbow, wrist, 1.14), 4.8, 4.8), self._skin(tone))
        if action in ("handbag", "shopping bag"):
            self._wear(self.person.bag, at=between(elbow, wrist, 1.2))
        if action == "phone":
            self.canvas.paint(moved(box(-2.5, 2.5, -3, 11), to=wrist), PHONE_COLOUR)
        if kind not in SLEEVE_END:
            thick = 7 if kind in BULKY else 6.4
            self._paint_upper(limb([shoulder, elbow, wrist], (thick, thick - 0.8, thick - 1.4)), tone)
        elif SLEEVE_END[kind] > 0:
            self._paint_upper(limb([shoulder, between(shoulder, elbow, SLEEVE_END[kind])], (7, 7.4)), tone)

    def _paint_bag_on_body(self) -> None:
        bag, pose = self.person.bag, self.pose
        on_far_side = pose.side and pose.bag_arm == 0
        if bag and bag.kind == "backpack":
            self._wear(bag)
        elif bag and bag.kind == "shoulder bag" and not on_far_side:
            flip = pose.flip(pose.bag_arm)
            self._wear(bag, flip=flip)
            self._wear(Item("satchel", bag.colour), at=(-4 if pose.side else flip * (pose.hip + 7), 84))

    # --- head ---

    def _paint_head(self) -> None:
        if self.hooded:
            self._wear(self.person.hat)
        elif self.pose.side:
            self.canvas.paint(ellipse(2, 164, 12.5, 15) + rounded([(13, 167), (19, 161), (13, 158)]), self._skin())
        else:
            ears = ellipse(-12.5, 163, 2.6, 3.6) + ellipse(12.5, 163, 2.6, 3.6)
            self.canvas.paint(ellipse(0, 164, 12.5, 15) + ears, self._skin())
        if self.pose.view != "back":
            self._paint_face()
        self._paint_hair(HAIR)
        if not self.hooded:
            self._wear(self.person.hat)

    def _paint_hair(self, wardrobe: Wardrobe) -> None:
        if not self.hooded:
            self._paint_layers(wardrobe, self.person.hair.kind, self.hair_colour)

    def _paint_face(self) -> None:
        person, side, paint = self.person, self.pose.side, self.canvas.paint
        if person.beard:
            self._paint_layers(BEARD, "beard", self.hair_colour)
        smile = [(8.5, 157), (11, 155.2), (14, 155.2)] if side else arc(0, 157.5, 4.8, 3.2, 200, 340)
        paint(line(smile, 1.6), (196, 62, 72) if person.gender == "woman" else (160, 80, 70))
        for eye in (10,) if side else (-5, 5):
            paint(ellipse(eye, 166, 1.9, 2.6), DARK)
            paint(line([(eye - 2.5, 171), (eye + 2.5, 171.3)], 1.3), self.hair_colour)
            if not side:
                paint(ellipse(eye * 1.65, 160, 2.3, 1.7), mixed(person.skin, (235, 100, 90), 0.3))
            if person.glasses:
                paint(line(arc(eye, 166, 4.4, 4), 1.5), DARK)
        if not side:
            paint(line([(0, 164), (1.2, 160.6), (-0.4, 160.4)], 1), self._skin(0.8))
        if person.glasses:
            paint(line([(5, 167), (-4, 168)] if side else [(-1, 167), (1, 167)], 1.5), DARK)
