"""Rules of the project: allowed imports, and what must not be in the repository."""

import ast
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from trees import nodes_of, syntax_tree, walk

from lorakit import config
from lorakit.core import registry
from lorakit.families.spec import EPSILON, FLOW, VELOCITY
from lorakit.formats import compatibility

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lorakit"

# A room may import the rooms in the lines above it, but not the rooms in its own line.
ORDER = [
    {"core"},
    {"config"},
    {"engine", "data"},
    {"families", "adapters"},
    {"formats"},
    {"inference", "runs"},
    {"training"},
    {"ui", "cli"},
]
MAY_IMPORT = {room: set().union(*ORDER[:level]) for level, rooms in enumerate(ORDER) for room in rooms}
# Modules that `check`, `--help` and the front end load. They do not import torch.
LIGHT = [
    "lorakit",
    "lorakit.config.schema",
    "lorakit.cli.main",
    "lorakit.cli.demo",
    "lorakit.cli.doctor",
    "lorakit.cli.terminal",
    "lorakit.families.pocket",
    *(f"lorakit.{room}" for room in MAY_IMPORT),
]
HEAVY = ["torch", "diffusers", "transformers", "peft", "accelerate", "jinja2", "bitsandbytes"]
# Rooms that do not import torch at module level -> their modules that may.
TORCH_FREE = {"core": {"rng"}, "config": set(), "runs": set(), "cli": set(), "ui": set()}


def sources(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "weights" not in path.parts)


def code() -> list[Path]:
    """Return all Python files of the project."""
    return [
        *sources(),
        ROOT / "ui.py",
        *(
            path
            for name in ("tests", "benchmarks", "tools", "scripts", "integrations")
            for path in sources(ROOT / name)
        ),
    ]


def room_of(path: Path) -> str:
    """Return the room of a file. Files in no room (`__init__`, `__main__`, ui.py) are "outside" and may import all."""
    parts = path.relative_to(PACKAGE).parts if path.is_relative_to(PACKAGE) else ()
    return parts[0] if len(parts) > 1 else "outside"


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those under `if TYPE_CHECKING`. Imports for types only are always allowed."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", ""),
            getattr(node.test, "attr", ""),
        ):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


@functools.cache
def imported_rooms(path: Path) -> tuple[str, ...]:
    """Return the rooms of lorakit that a file imports, at module level or inside a function."""
    return tuple(_imported_rooms(path))


def _imported_rooms(path: Path) -> Iterator[str]:
    for node in executed(syntax_tree(path)):
        if isinstance(node, ast.ImportFrom):
            package = list(path.relative_to(ROOT).with_suffix("").parts)[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "lorakit" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                yield parts[1]


def tracked() -> list[Path]:
    """Return the files of the repository. Without git (an unpacked archive), return all files of its folders."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        folders = [ROOT / name for name in ("lorakit", "presets", "tests", "benchmarks", "docs", "tools")]
        return [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for name in listing.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_imports_run_one_way() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in sources()
        for room in imported_rooms(path)
        if room_of(path) != "outside" and room != room_of(path) and room not in MAY_IMPORT[room_of(path)]
    ]
    assert not wrong


def test_imports_for_types_only_do_not_count(tmp_path: Path) -> None:
    path = PACKAGE / "core" / "sample.py"
    tree = ast.parse(
        "if TYPE_CHECKING:\n    import lorakit.ui\nelse:\n    import lorakit.cli\ndef f():\n    import lorakit.data"
    )
    imported = {alias.name for node in executed(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"lorakit.cli", "lorakit.data"} and room_of(path) == "core"


def test_the_table_of_rooms_is_complete() -> None:
    assert {room_of(path) for path in sources()} == {*MAY_IMPORT, "outside"}


def test_each_room_says_what_it_may_import_and_who_uses_it() -> None:
    users: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for path in sources():
        for room in imported_rooms(path):
            users[room].add(room_of(path))
    rooms = [room for rooms in ORDER for room in sorted(rooms)]
    for room in rooms:
        docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
        purpose, blank, imports, callers, *_ = [*docstring.splitlines(), *[""] * 4]
        assert purpose.endswith(".") and not blank, room
        assert _names(imports, "May import: ") == MAY_IMPORT[room], room
        assert _names(callers, "Used by: ") == users[room] - {room, "outside"}, room


def _names(line: str, label: str) -> set[str]:
    """Return the rooms after the label of a docstring's line."""
    assert line.startswith(label) and line.endswith("."), line
    return set(line.removeprefix(label).removesuffix(".").split(", ")) - {"nothing", "the user"}


@pytest.mark.slow
def test_imported_modules_exist() -> None:
    """This includes imports for types, which never run. mypy ignores missing modules."""
    wrong = [
        f"{path.relative_to(ROOT)}: {node.module}"
        for path in code()
        for node in nodes_of(path, ast.ImportFrom)
        if not node.level and (node.module or "").startswith("lorakit.")
        for place in [ROOT.joinpath(*(node.module or "").split("."))]
        if not place.is_dir() and not place.with_suffix(".py").is_file()
    ]
    assert not wrong


@pytest.mark.parametrize("room", sorted(TORCH_FREE))
def test_torch_free_rooms_import_no_torch(room: str) -> None:
    wrong = []
    for path in sources(PACKAGE / room):
        if path.stem not in TORCH_FREE[room]:
            for node in syntax_tree(path).body:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                wrong += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in HEAVY]
    assert not wrong


def test_the_table_of_rooms_has_no_cycle() -> None:
    visited: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        ready = [room for room, needs in left.items() if needs <= visited | {room}]
        assert ready, f"these import each other: {sorted(left)}"
        visited |= set(ready)
        left = {room: needs for room, needs in left.items() if room not in ready}


def test_light_modules_load_neither_torch_nor_any_model_library() -> None:
    script = f"import sys, {', '.join(LIGHT)}; print([m for m in {HEAVY!r} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_is_quick_and_loads_no_model_library(arguments: list[str]) -> None:
    script = (
        "import sys, time\nfrom lorakit.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(time.process_time(), 'torch' in sys.modules, 'diffusers' in sys.modules, 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", script, *arguments]
    for _ in range(4):  # processor time can double while other programs run
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds, *loaded = process.stdout.splitlines()[-1].split()
        assert loaded == ["False", "False", "False"]
        if float(seconds) < 0.3:
            return
    pytest.fail(f"{arguments} took {seconds} s of processor time four times over 0.3")


@pytest.mark.parametrize("command", ["sample", "resume"])
def test_a_path_to_nothing_is_refused_before_torch_is_imported(command: str) -> None:
    script = "import sys\nfrom lorakit.cli.main import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", script, command, "nothing"], capture_output=True, text=True)
    assert process.stdout == "1 False\n" and "nothing" in process.stderr


def test_checking_a_preset_is_quick() -> None:
    config.load("subject-sdxl")
    seconds = []
    for steps in (10, 11, 12):  # processor time can double while other programs run
        start = time.process_time()
        config.load("subject-sdxl", {"train.steps": steps})
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1


def test_no_option_is_declared_twice() -> None:
    keys = [option.key for option in config.options()]
    assert len(keys) == len(set(keys))


def test_every_option_is_read_somewhere() -> None:
    """An option that no code reads has no effect."""
    read = {
        node.attr
        for path in sources()
        if path.name not in ("schema.py", "loading.py")
        for node in nodes_of(path, ast.Attribute)
    }
    assert not [option.key for option in config.options() if option.name not in read]


# File -> why it may compare with a name of a spec.
MAY_COMPARE_NAMES = {
    # It defines the patterns of kohya's, PEFT's and diffusers' tensor names. Other code reads the spelling of `Module`.
    "formats/identify.py": "owns the spellings",
}


def compared_strings(node: ast.expr) -> Iterator[str]:
    """Yield the string constants of one side of a comparison, or of a pattern."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for item in node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else ():
        yield from compared_strings(item)


def name_comparisons(tree: ast.AST, names: set[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of each comparison with one of `names` by ==, !=, in, not in or a `case`."""
    for node in walk(tree):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        for side in sides:
            yield from ((side.lineno, name) for name in compared_strings(side) if name in names)


def test_code_compares_no_name_of_a_spec() -> None:
    """A new method, optimizer, format, family or prediction type needs one file and one line of the registry.

    Code must compare fields of the spec, not its name, so that a new spec needs no edit elsewhere.
    """
    # "full" is not a name here: it is also a value of memory.base_storage, with which code compares.
    names = {
        *registry.adapter_methods(),
        *registry.OPTIMIZERS,
        *registry.FORMATS,
        *registry.versions(),
        EPSILON,
        VELOCITY,
        FLOW,
    }
    owners = {f"{room}/{name}.py" for room in ("adapters", "formats") for name in names}
    owners |= {"core/registry.py", "families/prediction.py"}
    wrong, excepted = [], set()
    for path in sources():
        file = path.relative_to(PACKAGE).as_posix()
        if file in owners or (file.startswith("families/") and file.count("/") > 1):
            continue
        for line, name in name_comparisons(syntax_tree(path), names):
            if file in MAY_COMPARE_NAMES:
                excepted.add(file)
            else:
                wrong.append(f"{file}:{line}: {name!r}")
    assert not wrong
    assert excepted == MAY_COMPARE_NAMES.keys(), "an exception that nothing needs any more"


def test_a_comparison_with_a_name_is_found() -> None:
    code = """
if a == "lora" or "kohya" in b or c not in ("x", "sd1"):
    d = {"lora": 1}["lora"]
match a:
    case "dora" | "y":
        pass
"""
    names = {name for _, name in name_comparisons(ast.parse(code), {"lora", "kohya", "sd1", "dora"})}
    assert names == {"lora", "kohya", "sd1", "dora"}
    assert not list(name_comparisons(ast.parse('d = {"lora": 1}["lora"]'), {"lora"}))


def test_no_error_is_swallowed() -> None:
    wrong = []
    for path in sources():
        for node in nodes_of(path, ast.ExceptHandler):
            broad = node.type is None or (
                isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            )
            if broad and all(isinstance(statement, ast.Pass) for statement in node.body):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_code_has_no_marks_of_unfinished_work_and_no_utils_module() -> None:
    mark = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X:"]))
    wrong = [str(path.relative_to(ROOT)) for path in code() if mark.search(path.read_text(encoding="utf-8"))]
    assert not wrong
    assert not list(PACKAGE.rglob("utils.py"))


def test_the_repository_contains_no_path_of_a_machine() -> None:
    """Home and build folders reveal their author and do not exist on other machines."""
    pattern = re.compile(r"(?<![\w.])/(?:home|Users|root|work|opt|mnt)/[\w.]")
    wrong = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".jpg", ".webp", ".gif") or path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        wrong += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert not wrong


def test_every_optimizer_of_the_registry_can_be_imported() -> None:
    for spec in registry.OPTIMIZERS.values():
        assert callable(registry.resolve(spec.build))
    with pytest.raises(KeyError):
        _ = registry.OPTIMIZERS["nothing"]


def test_formats_have_all_consumers_and_different_endings() -> None:
    consumers = [key for spec in registry.FORMATS.values() for key in spec.consumers]
    assert set(consumers) == set(compatibility.CONSUMERS)
    endings = [spec.ending for spec in registry.FORMATS.values()]
    assert len(set(endings)) == len(endings)


def test_the_registry_and_the_adapter_sections_name_the_same_methods() -> None:
    for name, spec in registry.METHODS.items():
        assert config.load(None, {"train.steps": 1, "adapter.method": name}).adapter.method == name
        if spec.whole_model:
            assert callable(registry.resolve(spec.whole_model).attach)
        else:
            assert callable(registry.resolve(spec.functions).begin)


@pytest.mark.parametrize("name", config.preset_names())
def test_presets_load_state_their_needs_and_survive_a_round_trip(name: str) -> None:
    loaded = config.load(name)
    assert config.from_tables(tomllib.loads(config.to_toml(loaded))) == loaded
    assert loaded.train.steps_per_image, "length is said per photo"
    assert loaded.data.kind == name.partition("-")[0]
    comment = (config.preset_folder() / f"{name}.toml").read_text(encoding="utf-8").partition("[")[0]
    assert comment.startswith("# A ") and "Memory: " in comment and "Time: " in comment
    assert loaded.memory.gradient_checkpointing == name.endswith("lowmem")


def test_there_is_a_preset_for_each_kind_and_base() -> None:
    bases = ("pocket", "sd15", "sd15-lowmem", "sdxl", "sdxl-lowmem", "sd3")
    assert config.preset_names() == sorted(f"{kind}-{base}" for kind in ("subject", "style") for base in bases)


def readme_commands() -> list[str]:
    """Return the lines of the first code block in README."""
    block = re.search(r"```(?:bash|sh|console)?\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return [line for line in block[1].splitlines() if line and not line.startswith("#")]


def test_readme_begins_with_the_two_lines_that_set_up() -> None:
    demo, tests = readme_commands()[:2]
    assert demo.endswith(".venv/bin/lorakit demo") and "-c constraints.txt" in demo
    assert tests.endswith(".venv/bin/python -m pytest -n 2 --dist loadfile")
    assert "-c constraints.txt" in tests and "[test,ui]" in tests


def test_ci_runs_the_line_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -m1 '(.*)' README.md", script)
    assert pattern is not None
    names = [line for line in (ROOT / "README.md").read_text().splitlines() if re.search(pattern[1], line)]
    assert names[0] == readme_commands()[1]
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=False).returncode == 0


def test_the_page_of_options_is_up_to_date() -> None:
    """`python -m lorakit options --markdown > docs/options.md` writes the page."""
    from lorakit.cli import main as cli

    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == cli.options_page()


def test_constraints_keep_the_bounds_of_the_dependencies() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["ui"], *extras["test"]]):
        assert exact[canonicalize_name(requirement.name)] in requirement.specifier, requirement


# Core dependencies whose module has another name, and the one that lorakit does not import itself. PEFT imports it, and
# diffusers loads weights with it (`low_cpu_mem_usage`), so lorakit bounds its version.
MODULE_OF = {"pillow": "PIL"}
IMPORTED_BY_PEFT = {"accelerate"}


def test_the_core_has_at_most_ten_dependencies() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {Requirement(requirement).name for requirement in project["dependencies"]}
    assert len(names) <= 10
    imported = {
        (node.module or "" if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for path in sources()
        for node in executed(syntax_tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {name for name in names if MODULE_OF.get(name, name) not in imported} <= IMPORTED_BY_PEFT
    peft = {Requirement(text).name for text in importlib.metadata.requires("peft") or []}
    assert peft >= IMPORTED_BY_PEFT
    # lorakit also imports jinja2 and packaging, which core dependencies install.
    assert {Requirement(text).name for text in importlib.metadata.requires("torch") or []} >= {"jinja2"}
    for package in ("transformers", "peft", "huggingface_hub"):
        assert "packaging" in {Requirement(text).name for text in importlib.metadata.requires(package) or []}


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_ruff_passes(command: list[str]) -> None:
    output_of_tool(*command, ".")


@pytest.mark.slow
def test_mypy_passes_and_sees_the_types_of_public_names(tmp_path: Path) -> None:
    lines = ["import lorakit", "reveal_type(lorakit.train)", "reveal_type(lorakit.Event('step').kind)"]
    lines += ["def show(stop: lorakit.Stopped) -> None:", "    reveal_type(stop.step)"]
    (tmp_path / "use.py").write_text("\n".join(lines), encoding="utf-8")
    output = output_of_tool("mypy", "lorakit", "tools", str(tmp_path / "use.py"))
    types = re.findall(r'Revealed type is "(.*)"', output)
    assert types[0].startswith("def (config: lorakit.config.schema.Config")
    assert types[0].endswith("-> lorakit.training.run.Result") and types[1:] == ["str", "int"]


def output_of_tool(*command: str) -> str:
    """Run a tool, assert that it succeeds, and return its output."""
    environment = os.environ | {"NO_COLOR": "1"}
    process = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    return process.stdout


def test_options_prints_every_option_as_json() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "lorakit", "options", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(json.loads(process.stdout)) == len(config.every_option())
