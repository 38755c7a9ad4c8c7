"""What a user of the wheel gets: every import declared, no licence unasked for, a page that stands alone."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

import bilevel_fast
from bilevel_fast import cli
from bilevel_fast.base.errors import UserError, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {"PIL": "pillow", "open_clip": "open_clip_torch", "torch_fidelity": "torch-fidelity"}
NAMES |= {"nvidia": "nvidia-dali-cuda130", "webdataset": "webdataset"}
EXTRAS = PROJECT["optional-dependencies"]
NOT_PUBLISHED = {"xformers", "flash_attn", "pytorch_fid"}  # rivals of benchmarks, used where somebody has them


def declared(lines: list[str]) -> set[str]:
    return {re.split(r"[<>=\[;]", line)[0].strip() for line in lines}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            if not isinstance(node.args[0], ast.Constant):
                continue
            found.add(node.args[0].value.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"bilevel_fast", "bilevel_kernels"}


@pytest.mark.situation
def test_every_import_is_declared():
    """The wheel is installed where torch is a build for the CPU: triton comes along, as all that is imported."""
    files = [*(ROOT / "bilevel_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    names = set().union(*map(imported, files))
    known = declared(PROJECT["dependencies"]) | set().union(*(declared(EXTRAS[name]) for name in EXTRAS))
    assert {NAMES.get(name, name) for name in names} - NOT_PUBLISHED <= known
    assert {"torch", "triton"} <= declared(PROJECT["dependencies"])


@pytest.mark.situation
def test_what_is_under_another_licence_comes_only_by_name():
    """Somebody installs all extras of the metrics: nudenet, which is AGPL-3.0, is not among them."""
    assert declared(EXTRAS["nudity"]) == {"nudenet"}
    page = (ROOT / "docs" / "install.md").read_text()
    assert all(f"| `{name}`" in page or f"`{name}` |" in page for name in EXTRAS)
    for name, lines in EXTRAS.items():
        assert name in ("nudity", "test") or not [line for line in lines if re.search("nudenet|nudity", line)], name
    assert "AGPL-3.0" in (ROOT / "README.md").read_text()
    assert "AGPL-3.0" in (ROOT / PROJECT["readme"]).read_text()


def test_no_entry_point_imports_what_is_agpl_unless_asked(monkeypatch):
    """It is imported where a detector is made, and one is made where `Scorers.load` is asked for it."""
    found = {}
    for path in (ROOT / "bilevel_fast").rglob("*.py"):
        text = path.read_text()
        for what in ("import nudenet", "from nudenet", 'require("nudenet"', "NudeNet("):
            if (
                count := text.replace("from bilevel_fast.metrics.nudenet", "")
                .replace("import interval, nudenet", "")
                .count(what)
            ):
                found[path.relative_to(ROOT / "bilevel_fast").as_posix(), what] = count
    assert found == {("metrics/nudenet.py", 'require("nudenet"'): 1, ("metrics/scorers.py", "NudeNet("): 1}
    from bilevel_fast.metrics.scorers import Scorers

    monkeypatch.setitem(sys.modules, "nudenet", None)
    assert Scorers.load().nudenet is None
    with pytest.raises(UserError, match=r"run: pip install 'bilevel-fast\[nudity\]'"):
        Scorers.load(nudenet=True)


@pytest.mark.situation
def test_a_missing_package_is_said_so_that_a_user_of_the_wheel_can_install_it():
    """An optional package is not there: the command that installs it works without a checkout."""
    with pytest.raises(UserError, match=r"run: pip install 'bilevel-fast\[data\]'$"):
        require("no_such_package", "data")
    text = "".join(path.read_text() for path in (ROOT / "bilevel_fast").rglob("*.py"))
    asked = set(re.findall(r"require\([^()]*, \"(\w+)\"\)", text))
    assert asked
    assert asked <= set(EXTRAS)


def test_the_page_of_the_wheel_stands_alone():
    """No picture and no link that leads to a file which the wheel does not hold."""
    page = (ROOT / PROJECT["readme"]).read_text()
    assert not re.findall(r"\]\((?!https?:)[^)]*\)|<img", page)
    assert set(re.findall(r"bilevel-fast\[(\w+)\]", page)) == set(EXTRAS) - {"test", "dev"}


def test_typed():
    assert (ROOT / "bilevel_fast" / "py.typed").is_file()
    assert (ROOT / "kernels" / "bilevel_kernels" / "py.typed").is_file()
    assert "Typing :: Typed" in PROJECT["classifiers"]


@pytest.mark.situation
def test_version(monkeypatch, capsys):
    """`bilevel-fast --version`: says which release is installed, or that none is."""
    monkeypatch.setattr("sys.argv", ["bilevel-fast", "--version"])
    monkeypatch.setattr("importlib.metadata.version", {"bilevel-fast": "1.2.3"}.__getitem__)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out == "bilevel-fast 1.2.3\n"

    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", nothing)
    assert bilevel_fast.__version__ == "0+unknown"


def test_the_version_is_that_of_git_and_decides_no_rebuild():
    """No number of it stands in the sources, nothing is written into them, and make does not look at the commit."""
    assert PROJECT["dynamic"] == ["version"]
    whole = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert whole["dynamic-metadata"] == [{"provider": "scikit_build_core.metadata.setuptools_scm"}]
    assert set(whole["setuptools_scm"]) == {"fallback_version"}
    assert ".git" not in re.sub(r"\.github|\.gitignore", "", (ROOT / "Makefile").read_text())


def test_json_from_outside_has_one_reader():
    """`json.loads` sets no limits: only `base.files` calls it, and who reads back what it has just dumped."""
    allowed = {"base/files.py", "ops/providers.py", "profiling/profile.py", "scale/team.py", "scale/watch.py"}
    for path in (ROOT / "bilevel_fast").rglob("*.py"):
        if path.relative_to(ROOT / "bilevel_fast").as_posix() in allowed:
            # the reader; a table of ours in the wheel; a trace that was just written; what ranks of one run say
            continue
        calls = re.findall(r"json\.loads?\((?!json\.dumps)", path.read_text())
        assert not calls, path
