"""README.md and RESULTS.md say what data/results holds."""
import pytest

from minillama import report
from minillama.results import Result, Row

pytestmark = pytest.mark.host


@pytest.mark.parametrize("path", report.DOCUMENTS, ids=lambda path: path.name)
def test_a_document_and_the_result_files_agree(path):
    text = path.read_text(encoding="utf-8")
    assert report.with_section(text, report.DOCUMENTS[path](), path.name) == text, "run `make results`"


def test_a_document_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="README.md has lost its markers"):
        report.with_section("# minillama\n", "", "README.md")


@pytest.mark.parametrize(("nanoseconds", "text"), ((1234560, "1,235"), (26040, "26.0")))
def test_a_number_keeps_what_can_be_read(nanoseconds, text):
    assert report.number(Row("tg1", tokens=1, samples_ns=[nanoseconds])) == text


def test_a_rung_that_a_machine_has_not_measured_has_no_number():
    assert report.number(None) == "–"


@pytest.mark.parametrize(("slow", "fast", "text"), (([30, 31, 32, 33], [10, 11, 10, 11], "3.00×"),
                                                    ([10, 11, 10, 11], [30, 31, 32, 33], "0.33×"),
                                                    ([10, 20, 30, 40], [10, 20, 30, 20], "~1.25×")))
def test_a_gain_within_the_spread_of_the_samples_is_marked(slow, fast, text):
    rows = (Row("pp1", tokens=1, samples_ns=[1000 * sample for sample in samples]) for samples in (slow, fast))
    assert report.gain(*rows) == text


def test_bandwidth_tables_have_a_column_a_format_and_a_column_a_number_of_tokens():
    def row(name: str, tokens: int, speed: float) -> Row:
        return Row(name, tokens=tokens, samples_ns=[4000], values={"gigabytes_a_second": speed, "share_of_copy": 0.5})
    result = Result.here("bandwidth", None, [
        Row("copy"), row("linear Q4_0 8x64", 1, 1500), row("linear Q4_K 8x64", 1, 10), row("linear Q4_0 8x64", 2, 7),
        row("experts gate+up Q4_0 2 of 8 2x8x64", 1, 9)])
    assert report.bandwidth_table(result).splitlines() == [
        "| kernel | Q4_0 | Q4_K |", "| --- | --: | --: |", "| linear 8x64 | 1,500 (50 %) | 10 (50 %) |",
        "| experts gate+up 2 of 8 2x8x64 | 9 (50 %) | – |"]
    assert report.tokens_table(result).splitlines() == [
        "| kernel | 1 token | 2 tokens |", "| --- | --: | --: |", "| linear Q4_0 8x64 | 4.0 | 4.0 |"]
