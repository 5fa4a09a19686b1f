"""Text augmentation of the training captions: back-translation, then random deletion."""

from random import Random


def random_deletion(caption: str, probability: float, random: Random) -> str:
    """Drops each word with `probability`; where none would be left, one of them is kept at random.

    An empty caption stays empty.
    """
    words = caption.split()
    if not words:
        return ""
    kept = [word for word in words if random.random() >= probability]
    return " ".join(kept or [random.choice(words)])


def augment_caption(
    caption: str,
    back_translation: str | None,
    *,
    back_translation_probability: float,
    deletion_probability: float,
    random: Random,
) -> str:
    """The training caption of one sample: its back-translation now and then (where there is one), with words deleted.

    All draws come from `random`, so the result depends on the arguments and its state alone.
    """
    # Drawn even where there is no back-translation, so that giving one to a caption changes no other draw.
    if random.random() < back_translation_probability and back_translation is not None:
        caption = back_translation
    return random_deletion(caption, deletion_probability, random)
