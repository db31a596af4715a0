"""Checks of chapter 16's exercises."""
import math
from collections.abc import Callable

import numpy as np

from checks import examine, expects


def check_rows_computed(yours: Callable[[int, int, int], list[bool]]) -> bool:
    """(block, blocks, tokens) -> for each token of a prompt, whether the block's output must be computed there."""
    def case(block: int, blocks: int, tokens: int) -> str | None:
        got = yours(block, blocks, tokens)
        if not isinstance(got, list) or len(got) != tokens or not all(isinstance(row, bool) for row in got):
            return f"expected a list of {tokens} Python bools (an array's tolist() gives them), got {got!r:.60}"
        wanted = [block + 1 < blocks or row == tokens - 1 for row in range(tokens)]
        wrong = [row for row in range(tokens) if got[row] != wanted[row]]
        if not wrong:
            return None
        word = "is" if wanted[wrong[0]] else "is not"
        return f"block {block} of {blocks}, {tokens} tokens: the output of row {wrong[0]} {word} read by somebody"
    return examine("rows_computed", {
        "one block, five tokens": lambda: case(0, 1, 5), "one block, one token": lambda: case(0, 1, 1),
        "two blocks, the first": lambda: case(0, 2, 5), "two blocks, the second": lambda: case(1, 2, 5),
        "three blocks, the middle one": lambda: case(1, 3, 4), "three blocks, the last": lambda: case(2, 3, 4)})


def check_block_rows(yours: Callable) -> bool:
    """(ids (tokens,), hidden (tokens, hidden), following: int or None) -> (ids, hidden) that the block can read now,
    or None where there is nothing."""
    def case(tokens: int, following: int | None) -> str | None:
        ids, hidden = np.arange(10, 10 + tokens), np.arange(2.0 * tokens).reshape(tokens, 2)
        got = yours(ids.copy(), hidden.copy(), following)
        next_ids = [*ids[1:].tolist(), *([] if following is None else [following])]
        if not next_ids:
            return None if got is None else f"no token has a successor yet: expected None, got {got!r:.60}"
        if not isinstance(got, tuple) or len(got) != 2:
            return f"expected a pair (ids, hidden), got {got!r:.60}"
        mine, rows = np.asarray(got[0]), np.asarray(got[1])
        if mine.tolist() != next_ids:
            return f"ids {ids.tolist()}, then {following}: expected ids {next_ids}, got {mine.tolist()}"
        if not np.array_equal(rows, hidden[:len(next_ids)]):
            return f"expected the first {len(next_ids)} hidden states, got shape {rows.shape}"
        return None
    return examine("block_rows", {
        "five tokens, the last batch": lambda: case(5, None), "two tokens": lambda: case(2, None),
        "one token, and nothing behind it": lambda: case(1, None),
        "five tokens, another batch follows": lambda: case(5, 99),
        "one token, another batch follows": lambda: case(1, 7),
        "another batch follows, and begins with token 0": lambda: case(3, 0)})


def check_answer_needed(yours: Callable[[int, float, float, float, float], float]) -> bool:
    """(prompt tokens, extra seconds a prompt token, plain seconds a token, seconds a round, drafts accepted a round)
    -> tokens of the answer from which on drafting pays."""
    def case(*given: float) -> str | None:
        prompt, extra, plain, turn, accepted = given
        gain = plain - turn / (1 + accepted)
        got = yours(*given)
        got = float(got) if isinstance(got, np.floating) else got
        if gain <= 0:
            return None if isinstance(got, float) and got == math.inf else f"it never pays: expected inf, got {got!r}"
        return expects(got, prompt * extra / gain)
    return examine("answer_needed", {
        "1,000 tokens at 1 ms more, 10 ms saved a token: 100 tokens": lambda: expects(
            yours(1000, 0.001, 0.030, 0.040, 1.0), 100.0),
        "a prompt that costs nothing more": lambda: case(4000, 0.0, 0.02, 0.024, 0.8),
        "another one": lambda: case(3000, 0.0005, 0.01, 0.014, 0.7),
        "every draft is rejected": lambda: case(100, 0.001, 0.02, 0.024, 0.0),
        "it gains exactly nothing": lambda: case(100, 0.001, 0.5, 1.0, 1.0)})
