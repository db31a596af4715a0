"""Solutions of chapter 00's exercises."""
from tinygrad import Tensor


def seconds_allowed(bytes_moved: float, operations: float, bandwidth: float, speed: float) -> float:
    """Memory and arithmetic work at the same time, so the slower of the two decides."""
    return max(bytes_moved / bandwidth, operations / speed)


def tokens_per_second(parameters: float, bits: float, bandwidth: float) -> float:
    """Each token reads every active weight once."""
    bytes_per_token = parameters * bits / 8
    return bandwidth / bytes_per_token


def tokens_to_balance(bytes_per_weight: float, bandwidth: float, speed: float) -> float:
    """A weight is read once, and multiplied and added once for each token: 2 * tokens / speed = bytes / bandwidth."""
    return bytes_per_weight * speed / (2 * bandwidth)


def one_kernel(x: Tensor) -> Tensor:
    """Without a realize in between, tinygrad sees the whole expression and makes one kernel of it."""
    y = (x * 2 + 1).relu()
    return (y * y).realize()
