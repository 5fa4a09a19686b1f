"""English stop words. WordNet's synonyms do not fit them, such as "inch" and "indium" for "in"."""

_GROUPS = (
    "a an the this that these those each every either neither another other some any no all both such same own",
    "few more most much many one",
    "i me my mine myself we us our ours ourselves you your yours yourself he him his himself she her hers herself",
    "it its itself they them their theirs themselves who which what",
    "am is are was were be been being have has had having do does did doing",
    "can could may might must should will would",
    "and or but nor if because although though while since than as whether",
    "of at by for with without about against between among into onto through during before after above below to",
    "toward towards from up down in out on off over under across along around behind beside within near",
    "not only just so too very also then there here now again when where why how",
)

STOP_WORDS = frozenset(word for group in _GROUPS for word in group.split())
"""The lower-case words that text augmentation does not replace."""
