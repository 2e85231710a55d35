"""Schedules that were published for given numbers of steps, by name (``--schedule cache-dit-fast``). Pure data.

Sources: cache-dit's steps masks (its documentation, for 28 steps); L2P's lists (arXiv 2604.26365, tuned by hand, named by the
interval that the paper calls each after); MeanCache's (arXiv 2601.19961, released for Qwen-Image and Z-Image); DisCa's
(arXiv 2602.05449, released for HunyuanVideo). BudCache (arXiv 2606.13496) releases its schedules as pickled files.
"""

from collections.abc import Mapping


def _runs(*lengths: int) -> tuple[int, tuple[int, ...]]:
    """From lengths of runs of computed and cached steps, in turn, as cache-dit has them."""
    computed, begin = list[int](), 0
    for number, length in enumerate(lengths):
        computed += range(begin, begin + length) if number % 2 == 0 else ()
        begin += length
    return begin, tuple(computed)


L2P_STEPS = 50
L2P_LISTS = {
    5: (0, 1, 2, 4, 6, 9, 14, 23, 30, 37, 44),
    6: (0, 1, 2, 4, 7, 14, 23, 31, 38, 45),
    7: (0, 1, 2, 4, 9, 17, 26, 35, 43),
    8: (0, 1, 2, 4, 10, 20, 31, 41),
    10: (0, 1, 2, 4, 12, 24, 38),
    16: (0, 1, 2, 4, 16, 32),
}
PUBLISHED: Mapping[str, tuple[int, tuple[int, ...]]] = {  # number of steps, and those that are computed
    "cache-dit-slow": _runs(8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "cache-dit-medium": _runs(6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "cache-dit-fast": _runs(6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "cache-dit-ultra": _runs(4, 2, 1, 5, 1, 6, 1, 7, 1),
    **{f"l2p-{interval}": (L2P_STEPS, steps) for interval, steps in L2P_LISTS.items()},
    "meancache-25": (50, (*range(17), 24, 32, 40, 43, 45, 47, 48, 49)),
    "meancache-17": (50, (*range(9), 10, 17, 24, 31, 38, 45, 48, 49)),
    "meancache-13": (50, (0, 1, 2, 3, 5, 9, 15, 22, 29, 36, 43, 47, 49)),
    "meancache-10": (50, (0, 1, 3, 7, 14, 21, 28, 35, 42, 49)),
    "disca-10": (20, (0, 1, 2, 5, 9, 11, 13, 15, 17, 19)),
    "disca-8": (20, (0, 1, 2, 5, 9, 13, 17, 19)),
    "disca-4": (8, (0, 2, 4, 7)),
}
