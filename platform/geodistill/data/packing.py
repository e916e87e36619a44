"""Which questions of an image go together, and which images share a row: sizes in, numbers out. No torch.

A piece is an image with some of its questions; a row holds one piece or more. Padding costs as much as tokens do, and attention
grows with the square of a row's length: so of the ways to make rows that keep padding low, the one with the shortest rows.
"""

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

PADDING_SHARE = 0.1  # of the tokens of a batch: more is not accepted where images may share rows
TRIES = 32  # numbers of rows that are tried, about


class Size(NamedTuple):
    """Tokens of a piece: its image and prompts; its known answers; all of it, with the longest answers that there may be."""

    prompt: int
    answer: int
    most: int


def cut(image: int, sizes: Sequence[int], questions: int, budget: int, evenly: bool) -> list[int]:
    """The numbers of questions, in order, in as few pieces as `questions` and `budget` tokens in each allow.

    image: its tokens, in every piece; sizes: tokens of each question. evenly: the longest piece is as short as can be; else each
    is as full as can be. A question that passes the budget is alone. budget 0: none.
    """

    def filled(capacity: int) -> list[int]:
        counts: list[int] = []
        room = 0
        for size in sizes:
            if counts and counts[-1] < questions and size <= room:
                counts[-1] += 1
            else:
                counts.append(1)
                room = capacity - image
            room -= size
        return counts

    whole = image + sum(sizes)
    most = min(budget, whole) if budget else whole
    full = filled(most)
    if not evenly:
        return full
    return filled(bisect_left(range(most), True, key=lambda capacity: len(filled(capacity)) <= len(full)))


def deal(weights: Sequence[int], rows: int) -> list[list[int]]:
    """Numbers of weights in `rows` rows, the longest as short as may be: the heaviest first, each to the lightest row (LPT)."""
    found: list[list[int]] = [[] for _ in range(rows)]
    heap = [(0, r) for r in range(rows)]
    for i in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        weight, r = heap[0]
        heapq.heapreplace(heap, (weight + weights[i], r))
        found[r].append(i)
    return sorted(sorted(row) for row in found)


def padded(rows: Sequence[Sequence[int]], sizes: Sequence[Size]) -> float:
    """Share of padding in the prompts, or in prompts and known answers together, whichever is more."""
    prompts = [sum(sizes[i].prompt for i in row) for row in rows]
    answers = [sum(sizes[i].answer for i in row) for row in rows]
    prompt, answer = len(rows) * max(prompts), len(rows) * max(answers)
    return max(1 - sum(prompts) / prompt, 1 - (sum(prompts) + sum(answers)) / (prompt + answer))


def group(sizes: Sequence[Size], budget: int, share: bool) -> tuple[float, list[list[int]]]:
    """(share of padding, numbers of the pieces of each row): the most rows with little padding, else those with the least.

    share: may pieces share a row? They do so within `budget` tokens (0: any number).
    """
    best = padded([[i] for i in range(len(sizes))], sizes), [[i] for i in range(len(sizes))]
    weights = [size.prompt + size.answer for size in sizes]
    for rows in range(len(sizes) - 1, 0, -(1 + len(sizes) // TRIES)) if share else ():
        if best[0] <= PADDING_SHARE:
            break
        found = deal(weights, rows)
        if budget and any(len(row) > 1 and sum(sizes[i].most for i in row) > budget for row in found):
            continue
        best = min(best, (padded(found, sizes), found), key=lambda one: one[0])
    return best
