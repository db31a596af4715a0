"""A broken engine is caught: with any of a chapter's deliberate bugs in the package, an `equal` cell of it fails.

course/bugs/chNN.py names the bugs of a chapter. Each is put in place before the notebook's first import, in a process
of its own; then the notebook's `equal` cells run, and the cells that define what they need, and nothing else.
"""
import ast
import importlib.util
import io
import multiprocessing
import os
import symtable
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.host

COURSE = Path(__file__).parent.parent / "course"
NOTEBOOKS = {path.name[:2]: path for path in sorted(COURSE.glob("[0-9A][0-9]_*.ipynb"))}
SECONDS = 800       # for one run of a chapter's cells

# Processes are forked from one that has imported what takes long, but nothing that a bug replaces a part of.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload("pytest nbformat matplotlib.pyplot tinygrad gguf jinja2 tokenizers".split())


# ---- which cells the equal cells need -----------------------------------------------------------------------------


def straight(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements in the order in which they run, with loops and branches taken apart; functions stay whole."""
    for node in body:
        match node:
            case ast.AugAssign():
                yield ast.Assign([node.target], ast.BinOp(node.target, node.op, node.value))
            case ast.For():
                yield ast.Assign([node.target], node.iter)
            case ast.If() | ast.While():
                yield ast.Expr(node.test)
            case ast.With():
                yield from (ast.Assign([item.optional_vars], item.context_expr) if item.optional_vars else
                            ast.Expr(item.context_expr) for item in node.items)
            case ast.ExceptHandler(type=type, name=name):
                yield ast.Assign([ast.Name(name)], type) if name else ast.Expr(type or ast.Constant(None))
            case ast.Try():
                pass
            case _:
                yield node
                continue
        for field in ("body", "handlers", "orelse", "finalbody"):
            yield from straight(getattr(node, field, []))


def loads(scope: symtable.SymbolTable) -> set[str]:
    """The global names that a piece of code reads, in its functions too."""
    outermost = scope.get_type() == "module"
    own = {symbol.get_name() for symbol in scope.get_symbols()
           if symbol.is_referenced() and (outermost or symbol.is_global())}
    return own.union(*map(loads, scope.get_children()))


def names(source: str) -> tuple[set[str], set[str]]:
    """The names that a cell sets, or changes (`name.part = ...`), and those whose values come from other cells."""
    stored, changed, read = set(), set(), set()
    for statement in straight(ast.parse(source).body):
        scope = symtable.symtable(ast.unparse(ast.fix_missing_locations(statement)), "a cell", "exec")
        read |= loads(scope) - stored
        stored |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
        for node in ast.walk(statement):
            if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
                changed |= {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
    return stored | changed, read


def needed(sources: list[str], wanted: list[int]) -> list[int]:
    """The cells, by number and in order, that `wanted` need: for each name read, the last cell before that sets it.

    A function may read a name that is set only after it was defined: then the next cell that sets it is needed.
    """
    known, found, queue = [names(source) for source in sources], set(), list(wanted)
    while queue:
        if (cell := queue.pop()) in found:
            continue
        found.add(cell)
        around = [*range(cell - 1, -1, -1), *range(cell + 1, len(sources))]
        for name in known[cell][1]:
            queue += [other for other in around if name in known[other][0]][:1]
    return sorted(found)


def test_a_cell_needs_the_last_cell_before_it_that_sets_a_name_it_reads():
    cells = ["import numpy as np", "x = np.ones(3)", "x = [name for name in 'abc']", "print(x)", "name = 1",
             "def f():\n    return x, y, z", "y = {}", "y['a'] = 1", "x = 5", "assert f() and name and y", "z = 0"]
    assert names(cells[2]) == ({"x"}, set())
    assert names(cells[5]) == ({"f"}, {"x", "y", "z"})
    assert names(cells[7]) == ({"y"}, {"y"})
    assert names("for x, k in y:\n    if x:\n        k += x") == ({"x", "k"}, {"y"})
    assert names("x += 1\nwith a as b:\n    b.c = 1") == ({"x", "b"}, {"x", "a"})
    assert needed(cells, [9]) == [2, 4, 5, 6, 7, 9, 10]
    assert needed(cells, [1]) == [0, 1]


# ---- one run ------------------------------------------------------------------------------------------------------


def code_cells(number: str) -> list[tuple[str, bool, str]]:
    """(id, whether it is an equal cell, Python) of a chapter's code cells."""
    found = []
    for cell in nbformat.read(NOTEBOOKS[number], as_version=4).cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if not line.startswith(("%", "!"))]
            found.append((cell.id, "equal" in cell.metadata.get("tags", []), "\n".join(lines)))
    return found


def bugs(number: str) -> dict[str, tuple]:
    """A chapter's bugs: what is wrong, in words -> (module, attribute, original -> broken)."""
    spec = importlib.util.spec_from_file_location(f"bugs_of_{number}", COURSE / "bugs" / f"ch{number}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BUGS


def put_in(module: str, attribute: str, replacement) -> None:
    """Break the package: `module.attribute` (a function, a class or a class's method) becomes what replaces it."""
    owner = importlib.import_module(module)
    *way, name = attribute.split(".")
    for part in way:
        owner = getattr(owner, part)
    setattr(owner, name, replacement(getattr(owner, name)))


def run(number: str, bug: str) -> str:
    """In a fresh process: put the bug in ("" for none), run the cells. Says what happened: passed, caught, or else."""
    sys.path.insert(0, str(COURSE))
    os.chdir(COURSE)
    assert "minillama" not in sys.modules, "the package was imported before it was broken"
    if bug:
        put_in(*bugs(number)[bug])
    cells, namespace = code_cells(number), {"__name__": "__main__"}
    wanted = [place for place, (_, equal, _) in enumerate(cells) if equal]
    for place in needed([source for *_, source in cells], wanted):
        name, equal, source = cells[place]
        try:
            with redirect_stdout(io.StringIO()):
                exec(compile(source, f"cell {name}", "exec"), namespace)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            if equal and isinstance(error, AssertionError) and where == f"cell {name}":
                return f"caught in cell {name}"
            return f"not judged: cell {name} raised\n{traceback.format_exc()}"
    return "passed"


@pytest.fixture(scope="module")
def outcomes(request):
    """(number, bug) -> what happened, for all tests that were asked for: two runs at a time, a fresh process each."""
    asked = [item.callspec.params for item in request.session.items if "outcomes" in item.fixturenames]
    with PROCESSES.Pool(2, maxtasksperchild=1) as pool:
        pending = [(params["number"], params.get("bug", "")) for params in asked]
        running = {this: pool.apply_async(run, this) for this in pending}
        yield lambda number, bug="": running[number, bug].get(timeout=SECONDS)


# ---- the bugs -----------------------------------------------------------------------------------------------------

ALL = [(number, bug) for number in NOTEBOOKS if (COURSE / "bugs" / f"ch{number}.py").exists() for bug in bugs(number)]


def test_every_chapter_has_a_bug_to_catch():
    assert set(NOTEBOOKS) == {number for number, _ in ALL}


@pytest.mark.slow
@pytest.mark.parametrize("number", NOTEBOOKS)
def test_without_a_bug_the_equal_cells_pass(number, outcomes):
    happened = outcomes(number)
    assert happened == "passed", f"chapter {number}, nothing broken: {happened}"


@pytest.mark.slow
@pytest.mark.parametrize("number, bug", ALL, ids=[f"{number}-{bug.replace(' ', '-')}" for number, bug in ALL])
def test_an_equal_cell_catches_the_bug(number, bug, outcomes):
    happened = outcomes(number, bug)
    assert happened.startswith("caught"), f"chapter {number} does not catch that {bug}: {happened}"
