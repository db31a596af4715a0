"""Checks of chapter 13's exercises."""
from collections.abc import Callable

import numpy as np

from checks import examine, expects


def check_before_me(yours: Callable[[np.ndarray, int], np.ndarray]) -> bool:
    """(flat (assignments,), experts) -> (assignments,): how many earlier entries are the same."""
    def case(flat: list[int], experts: int) -> str | None:
        got = yours(np.array(flat), experts)
        wanted = [flat[:n].count(expert) for n, expert in enumerate(flat)]
        if not isinstance(got, np.ndarray) or got.shape != (len(flat),):
            return f"expected an array of shape ({len(flat)},), got {got!r:.60}"
        wrong = next((n for n in range(len(flat)) if got[n] != wanted[n]), None)
        return None if wrong is None else f"of {flat[:12]}, entry {wrong}: expected {wanted[wrong]}, got {got[wrong]}"

    some = np.random.default_rng(0).integers(0, 6, 40).tolist()
    return examine("before_me", {
        "all different: nobody came before": lambda: case([2, 0, 3, 1], 4),
        "all the same: 0, 1, 2, ...": lambda: case([1] * 5, 3),
        "some of each": lambda: case([0, 2, 2, 3, 0, 3, 2, 0], 4),
        "forty, six experts": lambda: case(some, 6),
    })


def _pair(got) -> tuple | str:
    if not isinstance(got, tuple) or len(got) != 2:
        return f"expected two numbers, tiles and share, got {got!r:.60}"
    return tuple(_number(part) for part in got)


def _number(value) -> object:
    return value.item() if isinstance(value, np.generic) else value


def check_tiles_needed(yours: Callable[[np.ndarray, int], tuple[int, float]]) -> bool:
    """(counts (experts,), tile) -> tiles that are needed, and the share of their rows that is padding."""
    def case(counts: list[int], tile: int, tiles: int, padding: float) -> str | None:
        got = _pair(yours(np.array(counts), tile))
        if isinstance(got, str):
            return got
        for name, mine, wanted in zip(("tiles", "padding"), got, (tiles, padding), strict=True):
            if complaint := expects(mine, wanted):
                return f"counts {counts}, tiles of {tile}: {name}: {complaint}"
        return None

    return examine("tiles_needed", {
        "full tiles, no padding": lambda: case([8, 4, 0], 4, 3, 0.0),
        "one row too many costs a tile": lambda: case([5, 4], 4, 3, 0.25),
        "a little of everything": lambda: case([1, 1, 1, 1], 16, 4, 60 / 64),
        "an expert that nobody asks costs nothing": lambda: case([0, 16, 0], 16, 1, 0.0),
        "nobody asks anyone": lambda: case([0, 0], 16, 0, 0.0),
    })


def check_best_tile(yours: Callable[[np.ndarray, list[int], float, float], int]) -> bool:
    """(counts, sizes, reading, row) -> the size of tile for which all needed tiles cost least."""
    def case(counts: list[int], sizes: list[int], reading: float, row: float, wanted: int) -> str | None:
        got = _number(yours(np.array(counts), list(sizes), reading, row))
        if got == wanted and not isinstance(got, bool):
            return None
        return f"counts {counts}, sizes {sizes}, reading {reading}, a row {row}: expected {wanted}, got {got!r:.40}"

    return examine("best_tile", {
        "rows are free: the fewest tiles, so the largest": lambda: case([16, 16], [4, 8, 16], 1.0, 0.0, 16),
        "reading is free: the least padding": lambda: case([5, 3], [1, 4, 16], 0.0, 1.0, 1),
        "a tie goes to the smaller, in whatever order": lambda: case([4], [8, 4], 1.0, 0.0, 4),
        "both cost": lambda: case([5, 9, 1], [2, 4, 8, 16], 6.0, 1.0, 8),
        "both cost, rows more": lambda: case([5, 9, 1], [2, 4, 8, 16], 3.0, 1.0, 4),
    })
