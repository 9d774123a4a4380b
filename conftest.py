"""What pytest leaves out of `--doctest-modules src`: modules that can't be imported where vLLM is not installed."""

import re
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent


def _needs_vllm(path: Path) -> bool:
    return re.search(r"^(from|import) vllm\b", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


_found = find_spec("vllm")
# a folder of that name that is no package, as tests/vllm, has no origin
_has_vllm = _found is not None and _found.origin is not None
_modules = sorted(HERE.glob("src/safespec_hf/vllm/*.py"))
collect_ignore = [] if _has_vllm else [str(path) for path in _modules if _needs_vllm(path)]
