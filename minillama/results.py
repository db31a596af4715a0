"""Result files: what was measured, on what, with which versions; written and checked here, drawn by the course.

A file is one run on one machine: data/results/{kind}-{model}-{device}.json; the weights' format follows the model in
kinds that are run for several. The project's own runs lie there and are kept in git; yours go to data/results/local/,
which git ignores, under the same names.
"""
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tinygrad import Device as TinyDevice

from minillama.measure import Counts

SCHEMA = 1
RESULTS = Path(__file__).parent.parent / "data" / "results"
SHIPPED = "minillama-coder"         # the name of the shipped model
BY_FORMAT = ("bench", "copies")     # kinds that are measured for several formats of a model, each in a file of its own
PACKAGES = ("minillama", "tinygrad", "numpy")


class ResultError(ValueError):
    """A result file that is not one; the message is one line that names the file and what is wrong."""


@dataclass(frozen=True)
class Device:
    """name: of the hardware; backend: tinygrad's word for it (CPU, CL, CUDA, METAL); driver: with its version."""
    name: str
    backend: str
    driver: str


@dataclass(frozen=True)
class Model:
    """name, weight format (Q4_0, F16, ...) and number of layers that were run."""
    name: str
    format: str
    layers: int


@dataclass(frozen=True)
class ClockTimes:
    """Nanoseconds that one call spent building its graph, compiling and running kernels."""
    build: int
    compile: int
    run: int


@dataclass(frozen=True)
class Row:
    """One thing measured. `tokens` is how many one sample handles; `samples_ns` are the raw times; `values` holds the
    figures of kinds that measure something else than time (accuracy, bandwidth); `simulated` marks what was not run
    for real (accepted drafts drawn by chance, say)."""
    name: str
    recipe: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    samples_ns: list[int] = field(default_factory=list)
    clocks: ClockTimes | None = None
    counts: Counts | None = None
    simulated: bool = False
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A result file. `created` is UTC; a commit that ends in + had uncommitted changes."""
    schema: int
    kind: str
    created: str
    commit: str
    device: Device
    host: str
    versions: dict[str, str]
    model: Model | None
    rows: list[Row]

    @classmethod
    def here(cls, kind: str, model: Model | None, rows: list[Row]) -> "Result":
        """A result of this moment on this machine's default device."""
        created = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(SCHEMA, kind, created, this_commit(), this_device(), this_host(), this_versions(), model, rows)

    @property
    def filename(self) -> str:
        model = (self.model.name, self.model.format if self.kind in BY_FORMAT else "") if self.model else ()
        parts = (self.kind, *model, self.device.backend, self.device.name)
        return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-") for part in parts if part) + ".json"


# ---- this machine -----------------------------------------------------------------------------------------------


def _said(*command: str) -> str:
    """What a command prints, without its ends; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=RESULTS.parent)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@cache
def cpu_name() -> str:
    """The processor's own name for itself."""
    if platform.system() == "Darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def this_device(name: str | None = None) -> Device:
    """Hardware, backend and driver of a tinygrad device, by default of the default one."""
    backend = (name or TinyDevice.DEFAULT).split(":")[0]
    if backend == "CL":
        device = TinyDevice["CL"]
        return Device(device.device_name.strip("\0 "), backend, "OpenCL " + device.driver_version.strip("\0 "))
    if backend == "CUDA":
        said = _said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "unknown, unknown"
        gpu, _, driver = said.splitlines()[0].partition(", ")
        return Device(gpu, backend, f"NVIDIA {driver}")
    if backend == "METAL":
        return Device(cpu_name(), backend, "macOS " + platform.mac_ver()[0])
    compiler = _said(os.environ.get("CC", "clang"), "--version") or "unknown"
    return Device(cpu_name(), backend, compiler.splitlines()[0])


def this_host() -> str:
    """Processor, cores, memory and system, in one line."""
    memory = ""
    if hasattr(os, "sysconf"):
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    return f"{cpu_name()}, {os.cpu_count()} cores{memory}, {platform.system()} {platform.machine()}"


def this_commit() -> str:
    """The commit that is checked out; with a + where files differ from it; empty outside of git."""
    commit = _said("git", "rev-parse", "--short", "HEAD")
    return commit + ("+" if commit and _said("git", "status", "--porcelain") else "")


def this_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


# ---- files ------------------------------------------------------------------------------------------------------


def write_result(result: Result, local: bool = True) -> Path:
    """Check a result and write it to data/results/local/, or with `local=False` to data/results/; returns the path."""
    path = (RESULTS / "local" if local else RESULTS) / result.filename
    data = asdict(result)
    _checked(Result, data, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return path


def beside_stored(result: Result, part: Callable[[str], str] = str) -> Result:
    """The result behind what its stored file holds besides: rows of other names, or of names with another `part`."""
    path, measured = RESULTS / result.filename, {part(row.name) for row in result.rows}
    before = [row for row in read_result(path).rows if part(row.name) not in measured] if path.exists() else []
    return replace(result, rows=before + result.rows)


def read_result(path: str | Path) -> Result:
    """Read a result file and check every field. Raises ResultError, in one line."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ResultError(f"{path}: not JSON ({error})") from error
    if isinstance(data, dict) and data.get("schema") != SCHEMA:
        raise ResultError(f"{path}: schema {data.get('schema')!r}, this version reads {SCHEMA}")
    return _checked(Result, data, str(path))


def read_results(kind: str, local: bool = True) -> list[Result]:
    """The stored results of a kind, in the order of their names; with `local`, a learner's own come after them."""
    folders = (RESULTS, RESULTS / "local") if local else (RESULTS,)
    return [read_result(path) for folder in folders for path in sorted(folder.glob(f"{kind}-*.json"))]


def _checked(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the type `kind`; raises ResultError naming the place `where` it does not fit."""
    if isinstance(kind, UnionType):
        some = next(part for part in get_args(kind) if part is not NoneType)
        return None if value is None else _checked(some, value, where)
    if is_dataclass(kind):
        return _checked_record(kind, _checked(dict, value, where), where)
    if get_origin(kind) is list:
        return [_checked(get_args(kind)[0], v, f"{where}[{i}]") for i, v in enumerate(_checked(list, value, where))]
    if get_origin(kind) is dict:
        entries = _checked(dict, value, where).items()
        return {key: _checked(get_args(kind)[1], v, f"{where}.{key}") for key, v in entries}
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ResultError(f"{where}: should be {kind.__name__}, is {value!r:.40}")
    return value


def _checked_record(kind: Any, value: dict, where: str) -> Any:
    names = {f.name for f in fields(kind)}
    for problem, odd in (("missing", names - set(value)), ("unknown", set(value) - names)):
        if odd:
            raise ResultError(f"{where}: {problem} {', '.join(sorted(odd))}")
    hints = get_type_hints(kind)
    return kind(**{name: _checked(hints[name], value[name], f"{where}: {name}") for name in value})
