"""Which sequences can be finished together: groups that no pair leaves, packed into chunks of rows, on the host."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Group:
    """Sequences all of whose pairs lie among them. ``one_chunk``: their rows fit one chunk."""

    sequences: list[int]
    one_chunk: bool

    def row_ranges(self, first: list[int]) -> list[tuple[int, int]]:
        """Their rows, as few ranges as possible; sequence s has rows ``first[s] .. first[s + 1]``."""
        ranges: list[tuple[int, int]] = []
        for s in sorted(self.sequences):
            if ranges and ranges[-1][1] == first[s]:
                ranges[-1] = (ranges[-1][0], first[s + 1])
            else:
                ranges.append((first[s], first[s + 1]))
        return [(start, stop) for start, stop in ranges if start < stop]


def _components(pairs: list[list[int]], sequences: int) -> list[Group]:
    """Connected components of the sequences under the pairs, in order of their first sequence."""
    parent = list(range(sequences))

    def find(s: int) -> int:
        while parent[s] != s:
            parent[s] = parent[parent[s]]
            s = parent[s]
        return s

    for i, j in pairs:
        a, b = find(i), find(j)
        parent[max(a, b)] = min(a, b)
    components: dict[int, Group] = {}
    for s in range(sequences):
        components.setdefault(find(s), Group([], one_chunk=False)).sequences.append(s)
    return list(components.values())


def closed_groups(pairs: list[list[int]], lengths: list[int], largest: int) -> list[Group]:
    """Sequences of ``lengths`` rows in groups that no pair leaves: components packed greedily, in order, into chunks of
    at most ``largest`` rows; a component longer than that stands alone, in no one chunk."""
    groups: list[Group] = []
    open_rows = 0
    for component in _components(pairs, len(lengths)):
        rows = sum(lengths[s] for s in component.sequences)
        if rows > largest:
            groups.append(component)
        elif groups and groups[-1].one_chunk and open_rows + rows <= largest:
            groups[-1].sequences += component.sequences
            open_rows += rows
        else:
            component.one_chunk = True
            groups.append(component)
            open_rows = rows
    return groups
