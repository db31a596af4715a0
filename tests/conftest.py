"""What all tests share: a device that is always named, figures without a screen, property tests that repeat."""
import os

os.environ.setdefault("DEV", "CPU")     # with PoCL installed, tinygrad's own default would be OpenCL
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings  # noqa: E402

settings.register_profile("minillama", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("minillama")


def pytest_report_header() -> str:
    return f"tinygrad device: {os.environ['DEV']}"


# What takes longest comes first, so that no process works on it alone at the end (make test: --no-loadscope-reorder).
LONGEST = ("test_bugs", "test_oracle", "test_train", "test_kernels", "test_speculate", "test_render", "test_count",
           "test_delta_net", "test_recipe", "test_state")


def pytest_collection_modifyitems(items: list) -> None:
    place = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
