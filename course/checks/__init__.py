"""What all exercise checks share: try cases one by one, say what passed and what did not, never stop the notebook."""
from collections.abc import Callable


def examine(exercise: str, cases: dict[str, Callable[[], str | None]]) -> bool:
    """Try each case and print a line for it; returns whether all passed.

    A case returns None when it is content, else a sentence about what is wrong. What it raises is reported as well.
    """
    print(exercise)
    passed = 0
    for name, case in cases.items():
        try:
            complaint = case()
        except Exception as error:  # noqa: BLE001 - a learner's function may raise anything
            complaint = f"it raised {type(error).__name__}: {error}"
        passed += complaint is None
        print(f"  ✓ {name}" if complaint is None else f"  ✗ {name}: {complaint}")
    print(f"  {passed} of {len(cases)}" + (": done!" if passed == len(cases) else ""))
    return passed == len(cases)


def expects(got, wanted: float, tolerance: float = 1e-6) -> str | None:
    """None when a number is the wanted one (relative tolerance), else a sentence with both."""
    if not isinstance(got, (int, float)) or isinstance(got, bool):
        return f"expected a number, got {got!r}"
    if abs(got - wanted) <= tolerance * max(abs(wanted), 1e-30):
        return None
    return f"expected {wanted:.6g}, got {got:.6g}"
