"""."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from llama_index_lora_embed.data.dataset import normalise


def groups_sharing(texts1: Sequence[str], texts2: Sequence[str]) -> list[list[int]]:
    """Indices of pairs in groups that share a text, directly or through other pairs."""
    parent: dict[str, str] = {}

    def find(item: str) -> str:
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for first, second in zip(texts1, texts2, strict=True):
        parent[find(normalise(first))] = find(normalise(second))
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts1):
        groups[find(normalise(text))].append(index)
    return list(groups.values())


def draw_groups(groups: list[list[int]], strata: list[int], fraction: float) -> set[int]:
    """Pairs to hold out: whole groups, so that each stratum comes near to its share and none is used up."""
    total, held = Counter(strata), Counter[int]()
    wanted = {stratum: max(2 / len(total), fraction * count) for stratum, count in total.items()}  # two pairs in all
    found: set[int] = set()
    counted = [(group, Counter(strata[i] for i in group)) for group in groups]

    def fits(counts: Counter[int]) -> bool:
        return all(held[stratum] + count < total[stratum] for stratum, count in counts.items())

    def off(added: Counter[int]) -> float:
        return sum((wanted[stratum] - held[stratum] - added[stratum]) ** 2 for stratum in total)

    for group, counts in counted:
        if fits(counts) and off(counts) < off(Counter()):
            held.update(counts)
            found.update(group)
    for stratum in total:  # a group too large to be near its share, where no other has this stratum
        fitting = [(group, counts) for group, counts in counted if counts[stratum] and fits(counts)]
        if fitting and not held[stratum]:
            group, counts = min(fitting, key=lambda item: len(item[0]))
            held.update(counts)
            found.update(group)
    return found
