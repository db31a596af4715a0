"""Solutions of appendix A1's exercises."""


def places(block: int, thread: int) -> list[int]:
    """Blocks lie one after the other, threads within them, neighbours within those."""
    first = block * 256 * 4 + thread * 4
    return [first, first + 1, first + 2, first + 3]


def block_sum(values: list[float]) -> tuple[float, int]:
    """Halve what is left, round by round: log2 of the length barriers, not one a number."""
    barriers = 0
    while len(values) > 1:
        half = len(values) // 2
        values = [mine + partner for mine, partner in zip(values[:half], values[half:], strict=True)]
        barriers += 1
    return values[0], barriers


def refused(buffers: int, threads: int, floats: int) -> list[str]:
    """Each limit by itself: a kernel can break several."""
    broken = {"buffers": buffers > 31, "threads": threads > 1024, "shared": 4 * floats > 32 * 1024}
    return [name for name, over in broken.items() if over]
