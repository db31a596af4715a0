"""The house: small, readable, and honest about itself."""
import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent
MEGABYTES = 48
LINES, COLUMNS = 350, 120
ENGINE_LINES, KERNEL_LINES = 3200, 5200        # without kernels, and these


def ours() -> list[Path]:
    """The project's files: what git tracks or would track; without git, what lies outside environments and caches."""
    try:
        names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                               capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*")]
    skipped = re.compile(r"(^|/)(\.venv|\.git|__pycache__|\.\w+_cache|[^/]*\.egg-info|\.hypothesis|local)/")
    return [ROOT / name for name in names if name and not skipped.search(name) and (ROOT / name).is_file()]


def python() -> list[Path]:
    return [path for path in ours() if path.suffix == ".py"]


def test_the_project_stays_small_enough_to_clone_and_to_carry():
    sizes = {path: path.stat().st_size for path in ours()}
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    total = sum(sizes.values())
    assert total < MEGABYTES * 1e6, f"{total} bytes; the largest: {[(str(p), s) for p, s in largest]}"


def test_files_are_one_idea_long_and_lines_fit_a_screen():
    for path in python():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= LINES, f"{path.relative_to(ROOT)} has {len(lines)} lines"
        wide = [number for number, line in enumerate(lines, 1) if len(line) >= COLUMNS]
        assert not wide, f"{path.relative_to(ROOT)}: lines {wide} have {COLUMNS} characters or more"


def leads_to(path: Path) -> set[Path]:
    """The package's files that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        files = (ROOT / (name.replace(".", "/") + ".py") for name in names if name.startswith("minillama."))
        found |= {file for file in files if file.exists()}
    return found


def test_the_engine_can_be_read_in_an_evening_and_its_kernels_in_another():
    engine, new = set(), {ROOT / "minillama" / "engine.py"}     # the engine is what engine.py leads to
    while new:
        engine |= new
        new = set().union(*map(leads_to, new)) - engine
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in engine}
    kernels = {name: count for name, count in lines.items() if "kernels" in name}
    assert sum(kernels.values()) <= KERNEL_LINES and sum(lines.values()) - sum(kernels.values()) <= ENGINE_LINES, lines
    assert len(lines) - len(kernels) > 10 < len(kernels), f"the walk found only {sorted(lines)}"


def test_every_module_says_what_it_is():
    for path in python():
        text = path.read_text(encoding="utf-8")
        said = not text.strip() or text.lstrip().startswith(('"""', 'r"""'))
        assert said, f"{path.relative_to(ROOT)} has no docstring"


def test_the_readme_names_the_two_commands_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in ("lab", "test"):
        assert f"make {command}" in readme and command in targets
    for document in [ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "CONTRIBUTING.md", ROOT / "course" / "README.md"]:
        for link in re.findall(r"\]\(([^)#\s]+)\)", document.read_text(encoding="utf-8")):
            assert "://" in link or (document.parent / link).exists(), f"{document.name}: {link} leads nowhere"


def test_tinygrad_is_pinned_and_the_command_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "tinygrad==0.14.0" in project["dependencies"]
    assert project["scripts"]["minillama"] == "minillama.cli:main"


def test_nothing_in_the_project_leans_on_the_machine_it_was_made_on():
    for path in ours():
        if path.suffix in {".py", ".md", ".toml", ".ipynb", ".cfg"} or path.name == "Makefile":
            text = path.read_text(encoding="utf-8")
            found = re.findall(r"/work/\w+|/root/\w+|/home/\w+", text) if path != Path(__file__) else []
            assert not found, f"{path.relative_to(ROOT)}: {found}"
