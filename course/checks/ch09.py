"""Checks of chapter 09's exercises."""
from collections.abc import Callable
from dataclasses import dataclass

from checks import examine, expects


def check_graphs(yours: Callable[[list[int], tuple[int, ...]], tuple[int, int]]) -> bool:
    """(prompt lengths, batch sizes) -> graphs captured: with batches of these sizes, and with one for each length."""
    def case(lengths: list[int], sizes: tuple[int, ...], wanted: tuple[int, int]) -> str | None:
        got = yours(list(lengths), sizes)
        if not isinstance(got, tuple) or len(got) != 2:
            return f"expected a pair of numbers, got {got!r:.60}"
        said = f"{lengths}" if len(lengths) < 10 else f"{lengths[0]}, {lengths[1]}, … {lengths[-1]}"
        return None if got == wanted else f"prompts of {said}, sizes {sizes}: expected {wanted}, got {got}"
    return examine("graphs", {
        "one prompt that fills a batch": lambda: case([64], (512, 64, 8, 1), (1, 1)),
        "the same length twice": lambda: case([64, 64], (512, 64, 8, 1), (1, 1)),
        "65 = 64 + 1": lambda: case([65], (512, 64, 8, 1), (2, 1)),
        "more than half full": lambda: case([5, 6, 7], (8, 1), (1, 3)),
        "half full is not more": lambda: case([4], (8, 1), (1, 1)),
        "every length to 100": lambda: case(list(range(1, 101)), (64, 8, 1), (3, 100)),
    })


def check_finished(yours: Callable[[int, int, float, float], float]) -> bool:
    """(kernels, first, encode, run) -> when the last kernel has finished, if the first ones are handed over early."""
    return examine("finished", {
        "everything in the first part: no overlap": lambda: expects(yours(10, 10, 1.0, 2.0), 30.0),
        "running is slow: the GPU never waits again": lambda: expects(yours(10, 4, 1.0, 2.0), 24.0),
        "encoding is slow: the GPU waits for the rest": lambda: expects(yours(10, 2, 2.0, 1.0), 28.0),
        "half and half": lambda: expects(yours(10, 5, 1.0, 2.0), 25.0),
        "encoding costs nothing": lambda: expects(yours(8, 3, 0.0, 1.5), 12.0),
    })


@dataclass(frozen=True)
class Kernel:
    reads: frozenset[str]
    writes: frozenset[str]


def check_groups(yours: Callable[[list], list[int]]) -> bool:
    """Kernels with `reads` and `writes` -> sizes of groups that may run at once, greedily, in order."""
    def case(text: str, wanted: list[int]) -> str | None:
        pairs = [part.split("->") for part in text.split(";")]
        got = yours([Kernel(frozenset(reads.split()), frozenset(writes.split())) for reads, writes in pairs])
        return None if got == wanted else f"of [{text}] expected the list {wanted}, got {got!r:.60}"
    return examine("groups", {
        "three that share nothing": lambda: case("a -> x; b -> y; c -> z", [3]),
        "all read the same": lambda: case("a -> x; a -> y; a -> z", [3]),
        "a chain": lambda: case("a -> b; b -> c; c -> d", [1, 1, 1]),
        "reads what the group writes": lambda: case("a -> q; a -> k; q k -> s; a -> v", [2, 2]),
        "writes what the group reads": lambda: case("m -> y; x -> m", [1, 1]),
        "writes what the group writes": lambda: case("a -> t; b -> t", [1, 1]),
        "what an earlier group wrote is there": lambda: case("a -> b; b -> c; b -> d; a -> e", [1, 3]),
    })
