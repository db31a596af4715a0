"""The README says what data/results holds."""
import pytest

from minillama import report
from minillama.results import Row

pytestmark = pytest.mark.host


def test_the_readme_and_the_result_files_agree():
    text = report.README.read_text(encoding="utf-8")
    assert report.with_section(text) == text, "run `make results`"


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        report.with_section("# minillama\n")


@pytest.mark.parametrize(("nanoseconds", "text"), ((1234560, "1,235"), (26040, "26.0")))
def test_a_number_keeps_what_can_be_read(nanoseconds, text):
    assert report.number(Row("tg1", tokens=1, samples_ns=[nanoseconds])) == text


def test_a_rung_that_a_machine_has_not_measured_has_no_number():
    assert report.number(None) == "–"
