"""The shape of the package: one direction of imports, small files and functions, and the public names."""

import ast
import importlib
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel

import safespec_hf
from safespec_hf import DraftHead, GuardedModel, SafetyHead, _moved
from safespec_hf.engine.private_names import OF_HEADS

PACKAGE = Path(safespec_hf.__file__).parent
# Each module or package may import from those before it, never from those after it.
ORDER = [
    "errors",
    "checks",
    "config",
    "outputs",
    "engine",
    "heads",
    "answer",
    "drafting",
    "decoding",
    "modeling",
    "exporting",
    "defaults",
    "_moved",
    "__init__",
    "training",
    "distilling",
    "evaluation",
    "vllm",
    "cli",
]
UNITS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})
PUBLIC_NAMES = [
    "DEFAULT_TARGET_ID",
    "DraftHead",
    "DraftHeadConfig",
    "GuardedModel",
    "HeadFileError",
    "HeadMismatchError",
    "Provenance",
    "SafeSpecCandidateGenerator",
    "SafeSpecConfig",
    "SafeSpecError",
    "SafeSpecEvent",
    "SafeSpecLogitsProcessor",
    "SafeSpecOutput",
    "SafeSpecSegment",
    "SafeSpecStatistics",
    "SafetyHead",
    "SafetyHeadConfig",
    "UnsupportedRequestError",
    "__version__",
    "attach_safety_head",
    "carried_risk",
    "detach_safety_head",
    "export_guarded",
    "load_default",
    "load_default_draft",
    "load_default_head",
    "load_default_target",
    "load_eagle3_draft",
    "load_truncated_draft",
    "target_binding",
]


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(unit):
    folder = PACKAGE / unit
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{unit}.py"]


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """Our own modules that a file imports, anywhere in it, relative to the package; `__init__` is the package."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            full = [*base, *(node.module or "").split(".")] if node.module else base
            if not node.level:
                if full[0] != "safespec_hf":
                    continue
                full = full[1:]
            dotted = ".".join(full)
            found = [f"{dotted}.{alias.name}".lstrip(".") for alias in node.names]
            yield from {name if name in MODULES else dotted or "__init__" for name in found}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "safespec_hf"]
            yield from [name.partition(".")[2] or "__init__" for name in names]


def own_imports(unit):
    """Units, modules or folders, that another one imports."""
    found = {name.split(".")[0] for path in sources(unit) for name in imports_of(path)}
    return found - {unit}


def functions(path):
    return [node for node in ast.walk(parse(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in SOURCES]


def test_the_order_names_every_module_and_package_and_no_other():
    assert sorted(ORDER) == UNITS


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != "__init__"])  # which names where others live
def test_imports_point_one_way(unit):
    assert own_imports(unit) <= set(ORDER[: ORDER.index(unit)])


def test_no_module_imports_itself_by_a_detour():
    sorter = TopologicalSorter({name: set(imports_of(path)) - {name} for name, path in MODULES.items()})
    sorter.prepare()  # raises a CycleError that shows the circle


def test_the_root_of_the_package_holds_seven_modules_at_most():
    assert len(list(PACKAGE.glob("*.py"))) <= 7


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "checks",
        "config",
        "answer/pooling",
        "answer/recovery",
        "decoding/verification",
        "drafting/draft_length",
        "drafting/ngrams",
        "engine/token_tree",
    ],
)
def test_decisions_and_errors_know_no_model(module):
    assert set(imports_of(PACKAGE / f"{module}.py")) <= {"checks"}


def test_the_public_names_are_these():
    assert sorted(safespec_hf.__all__) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_exists(name):
    assert getattr(safespec_hf, name) is not None


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_files_stay_within_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_functions_stay_within_60_lines(path):
    def length(node):
        # the docstring is for the reader of the interface, not of the code
        has_doc = ast.get_docstring(node) is not None
        doc = node.body[0].end_lineno - node.body[0].lineno + 1 if has_doc else 0
        return node.end_lineno - node.lineno + 1 - doc

    assert {node.name: length(node) for node in functions(path) if length(node) > 60} == {}


def is_private(name):
    return name.isidentifier() and name.startswith("_") and name.strip("_") != "" and not name.startswith("__")


def private_names_in(path):
    """Names that a file reads, asks for by a string, or imports. What an object calls its own may share a name."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            is_own = ast.unparse(node.value) in ("self", "cls") and node.attr in OWN_NAMES
            yield from [] if is_own else [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from [*(node.module or "").split("."), *(alias.name for alias in node.names)]


def own_names():
    """What this package defines itself, anywhere but in the module for the names of others."""
    for path in SOURCES:
        for node in ast.walk(parse(path)) if path.name != "private_names.py" else ():
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield node.attr


OWN_NAMES = {name for name in own_names() if is_private(name)}
LIBRARY_CLASSES = (
    nn.Module,
    PreTrainedModel,
    GenerationMixin,
    GenerationConfig,
    PreTrainedConfig,
    DynamicCache,
    Tensor,
)
LIBRARY_NAMES = {name for each in LIBRARY_CLASSES for name in (*dir(each), *each.__annotations__)}
LIBRARY_NAMES |= {name for each in (nn.Module(), PreTrainedConfig(), GenerationConfig()) for name in vars(each)}
OF_NAMED_TUPLES = {"_asdict", "_replace", "_fields"}  # underscored, but public


@pytest.mark.parametrize("path", SOURCES, ids=NAMES)
def test_private_names_of_other_libraries_stand_in_one_module(path):
    if path.name == "private_names.py":
        pytest.skip("this is the module")
    used = {name for name in private_names_in(path) if is_private(name)} - OF_NAMED_TUPLES
    assert used & LIBRARY_NAMES | used - OWN_NAMES == set(), "move them to engine/private_names.py, which says how"


@pytest.mark.parametrize("cls", [GuardedModel, SafetyHead, DraftHead])
def test_private_methods_of_other_libraries_are_overridden_in_one_module(cls):
    assert {name for name in vars(cls) if is_private(name) and name in LIBRARY_NAMES} <= {*OF_HEADS}


@pytest.mark.parametrize(("old", "new"), _moved.HOMES.items())
def test_old_import_paths_lead_to_the_same_module(old, new):
    assert importlib.import_module(f"safespec_hf.{old}") is importlib.import_module(f"safespec_hf.{new}")
    assert sys.modules[f"safespec_hf.{new}"].__spec__.name == f"safespec_hf.{new}"


def test_the_config_of_a_head_is_still_found_where_it_was():
    assert importlib.import_module("safespec_hf.config").SafetyHeadConfig is safespec_hf.SafetyHeadConfig
    with pytest.raises(AttributeError, match="SafetyHeadConfigs"):
        importlib.import_module("safespec_hf.config").SafetyHeadConfigs  # noqa: B018


def test_what_is_loaded_lazily_is_what_type_checkers_are_told():
    tree = parse(PACKAGE / "__init__.py")
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    told = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert told == safespec_hf._HOME_OF
    assert sorted([*told, "__version__"]) == sorted(safespec_hf.__all__)
