"""The shape of the package: one direction of imports, small files and functions, and the public names."""

import ast
from pathlib import Path

import pytest

import safespec_hf

PACKAGE = Path(safespec_hf.__file__).parent
# Each module or package may import from those before it, never from those after it.
ORDER = [
    "errors",
    "packing",
    "inference",
    "config",
    "outputs",
    "tap",
    "scoring",
    "draft_tree",
    "verification",
    "recovery",
    "loading",
    "head",
    "draft",
    "draft_length",
    "lookup",
    "rows",
    "monitor",
    "logits",
    "growing",
    "cache",
    "compiling",
    "drafters",
    "candidates",
    "candidate_scores",
    "plan",
    "commit",
    "safety_mode",
    "decoding",
    "request",
    "modeling",
    "gguf_target",
    "default_target",
    "__init__",
    "card",
    "hub",
    "training",
    "evaluation",
    "cli",
]
UNITS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")})
PUBLIC_NAMES = [
    "DEFAULT_TARGET_ID",
    "DraftHead",
    "DraftHeadConfig",
    "HeadFileError",
    "HeadMismatchError",
    "Provenance",
    "SafeSpecCandidateGenerator",
    "SafeSpecConfig",
    "SafeSpecError",
    "SafeSpecEvent",
    "SafeSpecLogitsProcessor",
    "SafeSpecOutput",
    "SafeSpecStatistics",
    "SafetyHead",
    "SafetyHeadConfig",
    "UnsupportedRequestError",
    "__version__",
    "attach_safety_head",
    "detach_safety_head",
    "load_default_draft",
    "load_default_head",
    "load_default_target",
    "load_truncated_draft",
    "target_binding",
]


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def sources(unit):
    folder = PACKAGE / unit
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{unit}.py"]


def own_imports(unit):
    """Modules and packages of ours that a unit imports from the top, anywhere in its files."""
    depth = 2 if (PACKAGE / unit).is_dir() else 1
    for node in [node for path in sources(unit) for node in ast.walk(parse(path))]:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("safespec_hf"):
            yield [*node.module.split("."), "__init__"][1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("safespec_hf")]
            yield from [[*name.split("."), "__init__"][1] for name in names]


def functions(path):
    return [node for node in ast.walk(parse(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


SOURCES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in SOURCES]


def test_every_module_and_package_has_its_place_in_the_order():
    assert set(UNITS) <= set(ORDER)


@pytest.mark.parametrize("unit", UNITS)
def test_imports_point_one_way(unit):
    assert set(own_imports(unit)) <= set(ORDER[: ORDER.index(unit)])


@pytest.mark.parametrize(
    "module", ["errors", "config", "scoring", "verification", "recovery", "draft_length", "lookup"]
)
def test_decisions_and_errors_know_no_model(module):
    assert set(own_imports(module)) == set()


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
