"""Every chapter has the anatomy that the course promises, and every exercise can be failed and passed."""
import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.host

COURSE = Path(__file__).parent.parent / "course"
CHAPTERS = tomllib.loads((COURSE / "chapters.toml").read_text(encoding="utf-8"))["chapter"]
WRITTEN = [chapter for chapter in CHAPTERS if "file" in chapter]
EACH = pytest.mark.parametrize("chapter", WRITTEN, ids=lambda chapter: chapter["number"])

HEADINGS = ("You will", "Why it matters", "The idea", "Equal?", "Predict", "Measure", "Compare", "The ledger",
            "Exercises", "When it loses", "What changed in the engine", "Further reading")
ANYWHERE = ("Equal?", "Predict", "Measure", "Compare")      # these come as often and where they are needed
QUESTIONS = ("must stay true", "should it be faster", "does it win", "does it lose", "fall back to", "deceive")
TAGS = {"figure", "equal", "predict", "measure", "compare", "ledger", "exercise", "starter", "check"}
FACT = "nbval-check-output"
LINES, WORDS, KILOBYTES = 15, 120, 300


def cells(chapter: dict, kind: str = "") -> list:
    """The cells of a chapter's notebook, of one kind (code, markdown) or all."""
    notebook = nbformat.read(COURSE / chapter["file"], as_version=4)
    return [cell for cell in notebook.cells if not kind or cell.cell_type == kind]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def headings(chapter: dict) -> list[str]:
    text = "\n".join(cell.source for cell in cells(chapter, "markdown"))
    return [found.strip() for found in re.findall(r"^#+ (.+)$", text, re.M)]


def code(cell) -> str:
    """A cell's Python, without IPython's own lines."""
    return "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))


def imports(source: str) -> set[str]:
    """The modules a cell imports, by full name (`from a import b` counts as a.b where that is a module)."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# ---- the course as a whole ----------------------------------------------------------------------------------------


def test_every_notebook_is_a_chapter_and_every_chapter_that_claims_a_notebook_has_one():
    assert {path.name for path in COURSE.glob("*.ipynb")} == {chapter["file"] for chapter in WRITTEN}
    numbers = [chapter["number"] for chapter in CHAPTERS]
    assert len(set(numbers)) == len(numbers)
    for chapter in WRITTEN:
        assert chapter["file"].startswith(chapter["number"] + "_"), chapter["file"]
        assert chapter["minutes"] > 0 and chapter["introduces"] and chapter["measures"]


def test_the_syllabus_lists_every_chapter_and_calls_the_unwritten_ones_coming():
    rows = [line for line in (COURSE / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for chapter in CHAPTERS:
        row = next((row for row in rows if row.startswith(f"| {chapter['number']} |")), None)
        assert row and chapter["title"] in row, f"chapter {chapter['number']} is not in the syllabus"
        if "file" in chapter:
            assert f"({chapter['file']}) | {chapter['minutes']} | {chapter['measures']}" in row, row
        else:
            assert "*coming*" in row, row


# ---- the anatomy of a chapter -------------------------------------------------------------------------------------


@EACH
def test_a_chapter_opens_with_its_title_minutes_and_prerequisites(chapter):
    opening = cells(chapter)[0].source
    assert opening.startswith(f"# {chapter['number']} · {chapter['title']}\n"), opening[:80]
    assert f"*{chapter['minutes']} minutes." in opening and "You need" in opening
    outcomes = opening.partition("## You will")[2]
    assert len(re.findall(r"^- ", outcomes, re.M)) == 3, outcomes


@EACH
def test_a_chapter_has_all_its_parts_in_order(chapter):
    found = headings(chapter)
    missing = [heading for heading in HEADINGS if not any(h.startswith(heading) for h in found)]
    assert not missing, f"no heading {missing}"
    fixed = [heading for heading in HEADINGS if heading not in ANYWHERE]
    assert [h for h in found if h in fixed] == fixed, found


@EACH
def test_a_chapter_names_the_pull_request_and_its_published_figure(chapter):
    why = next(cell.source for cell in cells(chapter, "markdown") if "## Why it matters" in cell.source)
    assert re.search(r"github\.com/\S+/pull/\d+", why) and re.search(r"\d+\.\d+", why), why


@EACH
def test_a_chapter_draws_shows_equality_predicts_measures_and_compares(chapter):
    used = [tag for cell in cells(chapter) for tag in tags(cell)]
    assert set(used) <= TAGS | {FACT}, set(used) - TAGS
    for tag in ("figure", "equal", "predict", "measure", "compare"):
        assert tag in used, f"no cell is tagged {tag}"
    order = [tag for tag in used if tag in ("predict", "measure", "compare")]
    assert order == ["predict", "measure", "compare"] * (len(order) // 3), order
    for cell in cells(chapter, "code"):
        if "equal" in tags(cell):
            assert FACT in tags(cell) and "assert " in cell.source, cell.source
        if "predict" in tags(cell):
            assert "= None" in cell.source, f"the learner's number is not theirs to write: {cell.source}"


@EACH
def test_a_chapter_answers_the_six_questions_of_the_ledger(chapter):
    answers = " ".join(cell.source for cell in cells(chapter, "markdown") if "ledger" in tags(cell))
    missing = [question for question in QUESTIONS if question not in answers]
    assert not missing, missing


@EACH
def test_cells_are_short(chapter):
    for cell in cells(chapter):
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= LINES, cell.source
            assert max(map(len, cell.source.splitlines())) < 120, cell.source
        else:
            words = len(re.sub(r"\]\(\S+\)", "]", cell.source).split())
            assert words <= WORDS, f"{words} words:\n{cell.source}"


@EACH
def test_a_notebook_is_committed_with_its_outputs_and_stays_small(chapter):
    size = (COURSE / chapter["file"]).stat().st_size
    assert size <= KILOBYTES * 1000, f"{size} bytes"
    run = [cell.execution_count for cell in cells(chapter, "code")]
    assert run == list(range(1, len(run) + 1)), f"run all cells once, from the top: {run}"
    for cell in cells(chapter, "code"):
        assert not any(output.output_type == "error" for output in cell.outputs), cell.source
        if "figure" in tags(cell):
            assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
        if FACT in tags(cell):
            assert cell.outputs, f"nothing to compare:\n{cell.source}"


@EACH
def test_a_notebook_uses_only_what_its_chapter_and_the_ones_before_introduced(chapter):
    known = set(sys.stdlib_module_names)
    for earlier in WRITTEN[:WRITTEN.index(chapter) + 1]:
        known |= set(earlier["introduces"])
    for cell in cells(chapter, "code"):
        for module in imports(code(cell)):
            parts = module.split(".")
            prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
            assert prefixes & known, f"{module} was not introduced by chapter {chapter['number']} or before"


# ---- exercises ----------------------------------------------------------------------------------------------------


def exercises(chapter: dict) -> list[tuple]:
    """(task, starter, check) cells, in order."""
    marked = [cell for cell in cells(chapter) if tags(cell) & {"exercise", "starter", "check"}]
    return [tuple(marked[i:i + 3]) for i in range(0, len(marked), 3)]


def namespace(chapter: dict) -> dict:
    """What a starter finds when it is reached: the chapter's imports."""
    names: dict = {}
    for cell in cells(chapter, "code"):
        for node in ast.parse(code(cell)).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), names)
    return names


@pytest.fixture
def in_course(monkeypatch):
    """Checks and solutions as a notebook finds them: from the folder of the course."""
    monkeypatch.syspath_prepend(str(COURSE))


@EACH
def test_exercises_come_as_task_starter_and_check(chapter):
    found = exercises(chapter)
    assert 2 <= len(found) <= 4, f"{len(found)} exercises"
    for group in found:
        assert [sorted(tags(cell) & TAGS) for cell in group] == [["exercise"], ["starter"], ["check"]], group
        task, starter, check = (cell.source for cell in group)
        assert "Hint" in task and re.search(r"About \d+ lines?", task), task
        assert re.search(r"checks\.check_(\w+)\(\1\)", check) and "def " in starter, check


@EACH
def test_a_starter_fails_its_check_and_the_solution_passes(chapter, in_course, capsys):
    checks = importlib.import_module(f"checks.ch{chapter['number']}")
    solutions = importlib.import_module(f"solutions.ch{chapter['number']}")
    for _, starter, check in exercises(chapter):
        name = re.search(r"checks\.check_(\w+)\(", check.source)[1]
        names = namespace(chapter)
        exec(starter.source, names)
        judge = getattr(checks, f"check_{name}")
        assert judge(names[name]) is False, f"{name}: the starter passes"
        complaints = capsys.readouterr().out
        assert "✗" in complaints and "it raised" not in complaints, complaints
        assert judge(getattr(solutions, name)) is True, capsys.readouterr().out


@EACH
def test_a_check_never_stops_the_notebook(chapter, in_course, capsys):
    checks = importlib.import_module(f"checks.ch{chapter['number']}")

    def broken(*_):
        raise KeyError("a slip")

    for _, _, check in exercises(chapter):
        for answer in (broken, lambda *_: None, lambda *_: "text"):
            assert getattr(checks, re.search(r"check_\w+", check.source)[0])(answer) is False
        assert "it raised KeyError" in capsys.readouterr().out
