"""A small WordNet database in the format of WordNet 3, for tests."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

LICENCE = "  1 This software is provided under a licence.  \n  2 It has index.noun and 00000000 n 01 in it.  \n"


def write_wordnet(folder: Path, synsets: Mapping[str, Sequence[tuple[str, list[str]]]]) -> Path:
    """Writes `index.*` and `data.*` into a new folder, and returns it.

    Args:
        synsets: for each of noun, verb, adj and adv, its synsets: a type, and the words in their spelling.
    """
    folder.mkdir()
    for part, part_synsets in synsets.items():
        data, offsets = LICENCE, defaultdict(list)
        for kind, words in part_synsets:
            offset = f"{len(data.encode()):08d}"
            spelled = " ".join(f"{word} {number % 16:x}" for number, word in enumerate(words))
            data += (
                f"{offset} 03 {kind} {len(words):02x} {spelled} 002 @ 00000042 n 0000 ~ 00000043 n 0000 | a gloss  \n"
            )
            for lemma in {re.sub(r"\(.*\)", "", word).lower() for word in words}:
                offsets[lemma].append(offset)
        index = LICENCE
        for number, (lemma, found) in enumerate(sorted(offsets.items())):
            pointers = " ".join([str(number % 4), *["@", "~", "#m", "+"][: number % 4]])
            index += f"{lemma} {part[0]} {len(found)} {pointers} {len(found)} 0 {' '.join(found)}  \n"
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)
    return folder
