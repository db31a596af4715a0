"""Checks of appendix A1's exercises."""
from collections.abc import Callable

from checks import examine


def _same(got, wanted) -> str | None:
    return None if got == wanted and type(got) is type(wanted) else f"expected {wanted!r:.60}, got {got!r:.60}"


def check_places(yours: Callable[[int, int], list[int]]) -> bool:
    """Block, thread -> the four neighbours that it copies, of blocks of 256 threads."""
    def all_of_them() -> str | None:
        found = sorted(place for block in range(3) for thread in range(256) for place in yours(block, thread))
        if found == list(range(3 * 1024)):
            return None
        missing = sorted(set(range(3 * 1024)) - set(found))
        return f"{len(found)} numbers copied, {len(missing)} of 3072 never, first {missing[:3]}"

    return examine("places", {
        "the very first thread": lambda: _same(yours(0, 0), [0, 1, 2, 3]),
        "its neighbour": lambda: _same(yours(0, 1), [4, 5, 6, 7]),
        "block 2, thread 255": lambda: _same(yours(2, 255), [3068, 3069, 3070, 3071]),
        "three blocks copy each of 3072 numbers once": all_of_them,
    })


def check_block_sum(yours: Callable[[list[float]], tuple[float, int]]) -> bool:
    """Numbers of a block's threads -> their sum and the barriers on the way to it."""
    def case(values: list[float], barriers: int) -> str | None:
        given = list(values)
        got = yours(given)
        if not isinstance(got, tuple) or len(got) != 2:
            return f"expected (total, barriers), got {got!r:.60}"
        if given != values:
            return "your function changed the list that it was given"
        if got[0] != sum(values):
            return f"the total: expected {sum(values)}, got {got[0]!r:.40}"
        return None if got[1] == barriers else f"barriers: expected {barriers}, got {got[1]!r:.40}"

    return examine("block_sum", {
        "one thread waits for nobody": lambda: case([3.0], 0),
        "two threads": lambda: case([1.0, 2.0], 1),
        "eight threads": lambda: case([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0], 3),
        "256 threads": lambda: case([float(n) for n in range(256)], 8),
    })


def check_refused(yours: Callable[[int, int, int], list[str]]) -> bool:
    """Buffers, threads, shared float32 numbers -> what Metal refuses."""
    return examine("refused", {
        "a small kernel": lambda: _same(yours(4, 128, 128), []),
        "all at the limit": lambda: _same(yours(31, 1024, 8192), []),
        "one buffer too many": lambda: _same(yours(32, 1024, 8192), ["buffers"]),
        "one thread too many": lambda: _same(yours(31, 1025, 0), ["threads"]),
        "bytes, not numbers": lambda: _same(yours(2, 32, 8193), ["shared"]),
        "everything": lambda: _same(yours(40, 2048, 1 << 20), ["buffers", "threads", "shared"]),
    })
