"""What splits have in common: groups of items that stay on one side, and which groups to hold out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from llama_index_lora_embed.core.errors import ConfigError


def check_fraction(fraction: Any, name: str) -> None:
    """Raise a `ConfigError` unless this is a number above 0 and below 1."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ConfigError(f"{name}={fraction!r}", "a number above 0 and below 1", "0.1 holds out a tenth.")


def groups_sharing(keys: Iterable[Iterable[str]]) -> list[list[int]]:
    """Group items by their keys: those that share one, directly or through other items (union-find).

    Returns:
        Indices of the items of each group, ascending, in the order of the groups' first items.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    firsts = []
    for first, *others in keys:
        firsts.append(first)
        for other in others:
            parent[find(other)] = find(first)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, first in enumerate(firsts):
        groups[find(first)].append(index)
    return list(groups.values())


def draw_groups(groups: list[list[int]], strata: list[int], fraction: float) -> set[int]:
    """Draw whole groups to hold out, in their order, so that each stratum comes near its share and none is used up.

    Args:
        groups: Indices of items.
        strata: The stratum of each item.
        fraction: Share of each stratum to hold out.
    """
    total, held = Counter(strata), Counter[int]()
    wanted = {stratum: max(2 / len(total), fraction * count) for stratum, count in total.items()}  # two items in all
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
    for stratum in total:  # the only groups with this stratum may be too large to come near its share
        fitting = [(group, counts) for group, counts in counted if counts[stratum] and fits(counts)]
        if fitting and not held[stratum]:
            group, counts = min(fitting, key=lambda item: len(item[0]))
            held.update(counts)
            found.update(group)
    return found
