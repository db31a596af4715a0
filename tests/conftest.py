"""What all tests share: a device that is always named, figures without a screen, property tests that repeat."""
import os

os.environ.setdefault("DEV", "CPU")     # with PoCL installed, tinygrad's own default would be OpenCL
os.environ.setdefault("MPLBACKEND", "Agg")

from hypothesis import settings  # noqa: E402

settings.register_profile("minillama", deadline=None, max_examples=25, derandomize=True, print_blob=True)
settings.load_profile("minillama")


def pytest_report_header() -> str:
    return f"tinygrad device: {os.environ['DEV']}"
