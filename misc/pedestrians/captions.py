"""Writes the captions of the generated pedestrians: a caption of what an image shows, and its paraphrase.

The captions are written from a `Sight` only, so they cannot name what the image hides. The paraphrase replaces the
English-French-English back-translation.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from misc.pedestrians.people import Item, Sight

# The names of each thing. The paraphrase avoids the words of its caption if there are others.
WORDS: dict[str, tuple[str, ...]] = {
    "man": ("man", "guy", "gentleman"),
    "woman": ("woman", "lady"),
    "person": ("person", "pedestrian"),
    "t-shirt": ("t-shirt", "tee shirt", "short-sleeved shirt", "short-sleeved top"),
    "shirt": ("shirt", "long-sleeved shirt", "button-up shirt"),
    "sweater": ("sweater", "jumper", "pullover"),
    "hoodie": ("hoodie", "hooded sweatshirt", "hooded sweater"),
    "tank top": ("tank top", "sleeveless shirt", "sleeveless top"),
    "jacket": ("jacket", "casual jacket", "zip jacket"),
    "coat": ("coat", "long coat", "overcoat"),
    "dress": ("dress", "short-sleeved dress", "summer dress"),
    "trousers": ("trousers", "pants", "slacks", "long pants"),
    "jeans": ("jeans", "denim jeans", "denim pants"),
    "shorts": ("shorts", "short pants"),
    "skirt": ("skirt", "knee-length skirt", "short skirt"),
    "long skirt": ("long skirt", "ankle-length skirt", "maxi skirt"),
    "leggings": ("leggings", "tights", "tight pants"),
    "sneakers": ("sneakers", "trainers", "sports shoes", "running shoes"),
    "shoes": ("shoes", "leather shoes", "dress shoes"),
    "boots": ("boots", "high boots"),
    "sandals": ("sandals", "open sandals"),
    "heels": ("high heels", "heels", "high-heeled shoes"),
    "backpack": ("backpack", "rucksack", "school bag"),
    "shoulder bag": ("shoulder bag", "satchel", "messenger bag"),
    "handbag": ("handbag", "purse"),
    "shopping bag": ("shopping bag", "carrier bag", "tote bag"),
    "suitcase": ("suitcase", "wheeled suitcase", "trolley case"),
    "cap": ("cap", "baseball cap"),
    "beanie": ("beanie", "knitted hat", "woolly hat"),
    "hat": ("hat", "wide-brimmed hat", "sun hat"),
    "scarf": ("scarf", "neck scarf"),
    "umbrella": ("umbrella", "open umbrella"),
    "glasses": ("glasses", "eyeglasses", "spectacles"),
    "grey": ("grey", "gray"),
    "light blue": ("light blue", "pale blue", "sky blue"),
    "purple": ("purple", "violet"),
    "blond": ("blond", "blonde", "fair"),
    "ginger": ("red", "ginger"),
}
PLURALS = {"trousers", "jeans", "shorts", "leggings", "sneakers", "shoes", "boots", "sandals", "heels"}

PATTERNS = {
    "plain": ("{colour} {noun}",),
    "striped": ("{colour} and {second} striped {noun}", "{colour} {noun} with {second} stripes"),
    "checked": (
        "{colour} and {second} checked {noun}",
        "{colour} and {second} plaid {noun}",
        "{colour} {noun} with {second} checks",
    ),
    "dotted": ("{colour} {noun} with {second} dots", "{colour} {noun} with {second} polka dots"),
    "logo": (
        "{colour} {noun} with a {second} logo on the chest",
        "{colour} {noun} with a {second} print on the front",
        "{colour} {noun} with a {second} logo",
    ),
    "open": ("{colour} {noun} over a {second} shirt", "{colour} {noun} with a {second} shirt underneath"),
}

HEAD = {
    "beard": ("a beard", "a full beard", "facial hair"),
    "hood": ("the hood up", "the hood pulled over the head", "the hood on"),
    "bald": ("a bald head", "no hair"),
    "short": ("short {colour} hair", "{colour} hair cut short"),
    "bob": ("chin-length {colour} hair", "medium-length {colour} hair", "a {colour} bob"),
    "long": ("long {colour} hair", "{colour} long hair", "{colour} hair falling over the shoulders"),
    "curly": ("curly {colour} hair", "{colour} curls", "a {colour} afro"),
    "ponytail": ("a {colour} ponytail", "{colour} hair in a ponytail", "{colour} hair tied in a ponytail"),
    "tied back": ("{colour} hair tied back", "tied-back {colour} hair"),
    "bun": ("a {colour} bun", "{colour} hair in a bun", "{colour} hair tied up in a bun"),
}

ACTIONS = {
    "backpack": ("carrying {item}", "carrying {item} on the back", "travelling with {item}"),
    "shoulder bag": ("carrying {item}", "carrying {item} across the body", "carrying {item} at the hip"),
    "handbag": ("holding {item}", "carrying {item} in one hand", "carrying {item}"),
    "shopping bag": ("holding {item}", "carrying {item} in one hand", "carrying {item}"),
    "suitcase": ("pulling {item}", "travelling with {item}", "dragging {item} along"),
    "umbrella": ("holding {item}", "sheltering under {item}", "holding up {item}"),
    "phone": ("talking on the phone", "holding a phone to the ear", "making a phone call"),
}

MOTION = {
    ("front", "walking"): ("walking towards the camera", "walking forward", "coming towards the viewer"),
    ("back", "walking"): ("walking away from the camera", "walking away", "seen from behind while walking"),
    ("side", "walking"): ("walking past the camera", "walking sideways", "seen from the side while walking"),
    ("front", "standing"): ("facing the camera", "standing in front of the camera", "standing still"),
    ("back", "standing"): ("facing away from the camera", "seen from behind", "standing with the back to the camera"),
    ("side", "standing"): ("standing sideways", "seen from the side", "standing in profile"),
}

# {A} and {a}: "A man"; {The} and {the}: "The man"; {He}: pronoun; {worn}: all clothes; {first} and {others}: the first
# garment and the rest; {having}: hair, beard and hood; {doing}: bag, umbrella, phone, gait and view.
# A part in [] is left out if one of its slots is empty. A template with an empty slot outside [] is not used.
TEMPLATES = (
    "{A}[ with {having}] is wearing {worn}.[ {He} is {doing}.]",
    "{A}[ with {having}] wears {worn}[ and is {doing}].",
    "{The}[ with {having}] is dressed in {worn}.[ {He} is {doing}.]",
    "{The} is wearing {worn}.[ {He} has {having}.][ {He} is {doing}.]",
    "{The} wears {worn}.[ {He} has {having}.][ {The} is {doing}.]",
    "{The} has {having} and is wearing {worn}.[ {He} is {doing}.]",
    "{The} has {having}. {He} wears {worn}[ and is {doing}].",
    "{A} in {worn}[ is {doing}].[ {He} has {having}.]",
    "{A} in {first} is {doing}.[ {He} has {having}.][ {He} also wears {others}.]",
    "{A}, {doing}, wears {worn}[ and has {having}].",
    "{A} {doing} is dressed in {worn}.[ {The} has {having}.]",
    "{A} {doing}, wearing {worn}[, with {having}].",
    "Wearing {worn}, {the}[ with {having}] is {doing}.",
    "Dressed in {worn}, {the} has {having}[ and is {doing}].",
    "{The} is {doing}. {He} wears {worn}[ and has {having}].",
    "There is {a}[ with {having}] who wears {worn}[ and is {doing}].",
    "{A} dressed in {worn}[, {doing}].[ {He} has {having}.]",
)


class Wording:
    """Picks a name for each thing: always the same one within a text, and if possible none that `other` uses."""

    def __init__(self, rng: Random, other: "Wording | None" = None) -> None:
        self.rng = rng
        self.choices: dict[Sequence[str], str] = {}
        self.taken = set(other.choices.values()) if other else set()

    def pick(self, options: Sequence[str]) -> str:
        if options not in self.choices:
            free = [option for option in options if option not in self.taken]
            self.choices[options] = self.rng.choice(free or options)
        return self.choices[options]

    def word(self, key: str) -> str:
        return self.pick(WORDS.get(key, (key,)))


@dataclass(frozen=True)
class Plan:
    """The facts that one caption names, in order."""

    noun: str
    worn: list[Item]
    having: list[Item]
    doing: list[Item | tuple[str, str]]  # bag, umbrella, phone, or (view, gait)


# How often an annotator notices a thing, relative to the others.
NOTICED: dict[str, float] = {"bag": 5, "hat": 5, "umbrella": 6, "scarf": 4, "shoes": 4, "hair": 4}
NOTICED |= {"glasses": 1.5, "beard": 1.5, "phone": 2, "motion": 1.5}


def describe(sight: Sight, rng: Random) -> tuple[str, str]:
    """Returns a caption of what an image shows, and a paraphrase with the same facts in other words and order."""
    plan = _choose_facts(sight, rng)
    wording = Wording(rng)
    caption = paraphrase = _write(plan, wording)
    while paraphrase == caption:
        paraphrase = _write(_shuffle(plan, rng), Wording(rng, other=wording))
    return caption, paraphrase


def _choose_facts(sight: Sight, rng: Random) -> Plan:
    """Chooses the facts of a caption: nearly always the two main garments, and two to five other visible things."""
    noun = sight.gender if rng.random() < 0.9 else "person"
    extras = {name: getattr(sight, name) for name in NOTICED if name != "motion"}
    extras = {name: Item(name, "") if fact is True else fact for name, fact in extras.items() if fact}
    extras["motion"] = (sight.view, sight.gait)
    # Weighted sampling without replacement: the largest u^(1/weight) are chosen (Efraimidis and Spirakis, 2006).
    ranked = sorted(extras, key=lambda name: rng.random() ** (1 / NOTICED[name]), reverse=True)
    chosen = {name: extras[name] for name in ranked[: rng.choices((2, 3, 4, 5), (2, 4, 4, 2))[0]]}

    worn = [_drop_detail(sight.upper, rng)]
    if sight.lower and rng.random() < 0.94:
        worn.append(_drop_detail(sight.lower, rng))
    worn += [chosen[name] for name in ("shoes", "scarf", "hat", "glasses") if name in chosen]
    if rng.random() < 0.2:
        worn.reverse()
    having = [chosen[name] for name in ("hair", "beard") if name in chosen]
    if sight.hat and sight.hat.kind == "hood" and sight.hat in worn:
        worn.remove(sight.hat)
        having.append(sight.hat)
    doing = [chosen[name] for name in ("bag", "umbrella", "phone", "motion") if name in chosen]
    return Plan(noun, worn, having, doing)


def _shuffle(plan: Plan, rng: Random) -> Plan:
    worn = rng.sample(plan.worn, len(plan.worn))
    having = rng.sample(plan.having, len(plan.having))
    doing = rng.sample(plan.doing, len(plan.doing))
    return Plan(plan.noun, worn, having, doing)


def _drop_detail(item: Item, rng: Random) -> Item:
    """Sometimes leaves out the pattern or the colour."""
    if item.pattern != "plain" and rng.random() < 0.15:
        return Item(item.kind, item.colour)
    if item.pattern == "plain" and rng.random() < 0.04:
        return Item(item.kind, "")
    return item


def _write(plan: Plan, wording: Wording) -> str:
    noun = wording.word(plan.noun)
    worn = [_noun_phrase(item, wording) for item in plan.worn]
    slots = {
        "A": f"A {noun}",
        "a": f"a {noun}",
        "The": f"The {noun}",
        "the": f"the {noun}",
        "He": {"man": "He", "woman": "She"}.get(plan.noun, f"The {noun}"),
        "worn": _join_phrases(worn),
        "first": worn[0],
        "others": _join_phrases(worn[1:]),
        "having": _join_phrases([_head_phrase(item, wording) for item in plan.having]),
        "doing": _join_phrases([_action_phrase(fact, wording) for fact in plan.doing]),
    }
    applicable = tuple(template for template in TEMPLATES if _fill(template, slots))
    return _fill(wording.pick(applicable), slots)


def _fill(template: str, slots: dict[str, str]) -> str:
    """Returns the text of a template, or "" if it needs a slot that is empty."""
    empty = [f"{{{name}}}" for name, text in slots.items() if not text]
    template = re.sub(r"\[([^]]*)]", lambda part: "" if any(slot in part[1] for slot in empty) else part[1], template)
    if any(slot in template for slot in empty):
        return ""
    text = " ".join(template.format(**slots).split())
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _noun_phrase(item: Item, wording: Wording) -> str:
    colour, second = wording.word(item.colour), wording.word(item.second_colour)
    phrase = wording.pick(PATTERNS[item.pattern]).format(colour=colour, noun=wording.word(item.kind), second=second)
    if item.kind == "glasses":
        return phrase
    if item.kind in PLURALS:
        return f"a pair of {phrase}" if wording.rng.random() < 0.15 else phrase
    return f"a {phrase}"


def _head_phrase(item: Item, wording: Wording) -> str:
    return wording.pick(HEAD[item.kind]).format(colour=wording.word(item.colour))


def _action_phrase(fact: Item | tuple[str, str], wording: Wording) -> str:
    if not isinstance(fact, Item):
        return wording.pick(MOTION[fact])
    return wording.pick(ACTIONS[fact.kind]).format(item=_noun_phrase(fact, wording))


def _join_phrases(phrases: Sequence[str]) -> str:
    """Joins phrases: ["a", "b", "c"] → "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), *phrases[-1:]]))
