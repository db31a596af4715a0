"""The README says what data/results holds."""
import pytest

from minillama import report

pytestmark = pytest.mark.host


def test_the_readme_and_the_result_files_agree():
    text = report.README.read_text(encoding="utf-8")
    assert report.with_section(text) == text, "run `make results`"


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        report.with_section("# minillama\n")


def test_a_number_keeps_what_can_be_read():
    assert report.number(1234.56) == "1,235" and report.number(26.04) == "26.0"
