"""The position of the limbs in one shot, in centimetres. In the side view the person looks to the right."""

import math
from dataclasses import dataclass

from misc.pedestrians.people import Person, Shot
from misc.pedestrians.shapes import Point, turned

# Elbow and wrist of a busy arm. In the front view, it is the arm on the right of the image.
BUSY_ARMS = {
    "umbrella": {"side": [(13, 116), (23, 134)], "front": [(27, 116), (23, 134)]},
    "phone": {"side": [(15, 126), (9, 153)], "front": [(29, 124), (16, 154)]},
    "pockets": {"side": [(-7, 113), (5, 93)], "front": [(28, 113), (15, 93)]},
    "suitcase": {"side": [(-10, 114), (-27, 90)], "front": [(24, 112), (27, 90)]},
    "handbag": {"side": [(2, 112), (5, 88)], "front": [(24, 112), (26, 88)]},
    "shopping bag": {"side": [(2, 112), (5, 88)], "front": [(24, 112), (26, 88)]},
}


@dataclass(frozen=True)
class Pose:
    """The pose of a body in one shot. Limb 0 is the far one or on the left of the image; limb 1 is the other."""

    view: str  # front, back, side
    shoulder: float  # half the width of the shoulders, cm
    waist: float
    hip: float
    legs: list[list[Point]]  # hip, knee and ankle of each leg
    arms: list[list[Point]]  # shoulder, elbow and wrist of each arm
    actions: dict[int, str]  # what each busy arm does
    bag_arm: int  # which arm carries a bag

    @property
    def side(self) -> bool:
        return self.view == "side"

    def flip(self, arm: int) -> int:
        """Returns -1 if a thing on this arm must be mirrored, otherwise 1: all things are designed for arm 1."""
        return -1 if arm == 0 and not self.side else 1


def take_pose(person: Person, shot: Shot) -> Pose:
    """Returns the pose of a person in a shot."""
    side = shot.view in ("left", "right")
    widths = (20, 15, 15) if person.gender == "man" else (17.5, 12.5, 15.5)
    shoulder, waist, hip = (width * person.breadth for width in widths)
    near = shot.view == person.bag_side if side else (person.bag_side == "left") == (shot.view == "front")
    actions = _actions(person, shot, bag_arm=int(near))
    legs = _grounded(_side_legs(shot) if side else _front_legs(shot))
    arms = _side_arms(legs, actions) if side else _front_arms(shot, shoulder, actions)
    return Pose("side" if side else shot.view, shoulder, waist, hip, legs, arms, actions, bag_arm=int(near))


def _actions(person: Person, shot: Shot, bag_arm: int) -> dict[int, str]:
    """Returns what each busy arm does. Carrying a thing comes before `shot.arms`."""
    free = 1 - bag_arm
    actions = {}
    if shot.arms == "pockets":
        actions = {0: "pockets", 1: "pockets"}
    elif shot.arms == "phone":
        actions = {free: "phone"}
    if person.umbrella:
        actions[free] = "umbrella"
    if person.bag and person.bag.kind in BUSY_ARMS:
        actions[bag_arm] = person.bag.kind
    return actions


def _side_legs(shot: Shot) -> list[list[Point]]:
    walking = shot.gait == "walking"
    legs = []
    for phase in (shot.phase, shot.phase + math.pi):
        thigh = math.radians(23 if walking else 4) * math.sin(phase)
        bend = math.radians(4 + 34 * max(0.0, math.cos(phase))) if walking else 0.0
        knee = turned((0, 88), thigh, 42)
        legs.append([(0, 88), knee, turned(knee, thigh - bend, 40)])
    return legs


def _front_legs(shot: Shot) -> list[list[Point]]:
    legs: list[list[Point]] = []
    for sign in (-1, 1):
        ahead = _ahead(shot, sign)
        lift = 9 * max(0.0, -ahead) - 2 * max(0.0, ahead)
        ankle = (sign * (9 if shot.gait == "walking" else 11), 7 + lift)
        legs.append([(sign * 8, 88), (sign * 9, 48 + lift / 2), ankle])
    return legs


def _ahead(shot: Shot, sign: int) -> float:
    """Returns where the limb on the left (-1) or right (1) swings: 1 is nearest to the camera, -1 farthest from it."""
    return sign * math.sin(shot.phase) if shot.gait == "walking" else 0.0


def _grounded(legs: list[list[Point]]) -> list[list[Point]]:
    """Changes the length of the legs so that the lower foot is on the ground.

    A real stride lowers the body. Here the body stays in place, and the legs become longer.
    """
    sink = min(ankle[1] for _, _, ankle in legs) - 7
    return [[hip, (knee[0], knee[1] - sink / 2), (ankle[0], ankle[1] - sink)] for hip, knee, ankle in legs]


def _side_arms(legs: list[list[Point]], actions: dict[int, str]) -> list[list[Point]]:
    arms = []
    for arm, (_, knee, _) in enumerate(legs):
        forward = -0.9 * math.atan2(knee[0], 42)  # each arm swings in the opposite direction to its leg
        elbow = turned((-1, 137), forward, 27)
        swinging = [elbow, turned(elbow, forward + math.radians(18), 24)]
        arms.append([(-1, 137), *(BUSY_ARMS[actions[arm]]["side"] if arm in actions else swinging)])
    return arms


def _front_arms(shot: Shot, shoulder: float, actions: dict[int, str]) -> list[list[Point]]:
    arms = []
    for arm, sign in enumerate((-1, 1)):
        ahead = _ahead(shot, sign)
        swinging = [(shoulder + 3, 112), (shoulder + 4 + 3 * ahead, 89 + 5 * ahead)]
        joints = [(shoulder - 4, 137), *(BUSY_ARMS[actions[arm]]["front"] if arm in actions else swinging)]
        arms.append([(sign * x, y) for x, y in joints])
    return arms
