"""Solutions of chapter 13's exercises."""
import numpy as np


def before_me(flat: np.ndarray, experts: int) -> np.ndarray:
    """A column for each expert, counted downwards; my own entry is in the count, so take it off."""
    picked = flat[:, None] == np.arange(experts)                            # (assignments, experts)
    return picked.cumsum(axis=0)[np.arange(len(flat)), flat] - 1


def tiles_needed(counts: np.ndarray, tile: int) -> tuple[int, float]:
    """Every expert rounds up for itself."""
    tiles = int((-(-counts // tile)).sum())
    return tiles, 1 - int(counts.sum()) / (tiles * tile) if tiles else 0.0


def best_tile(counts: np.ndarray, sizes: list[int], reading: float, row: float) -> int:
    """Tiles times what one costs."""
    return min(sorted(sizes), key=lambda tile: (-(-counts // tile)).sum() * (reading + tile * row))
