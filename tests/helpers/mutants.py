"""A module with one bug planted in it: shows that a test fails when the code is wrong."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_NAMESPACE = "bilevel_kernels::"
_number = itertools.count()


def mutated(module_path: str | Path, old: str, new: str, tmp_path: Path) -> ModuleType:
    """Import a copy of a module in which `old`, found exactly once, reads `new`.

    The copy goes by a name of its own, and so do its custom ops: torch registers each name once.
    """
    source = Path(module_path).read_text()
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module_path}, must be once"
    name = f"mutant_{next(_number)}_of_{Path(module_path).stem}"
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(old, new).replace(_NAMESPACE, f"{name}::"))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
