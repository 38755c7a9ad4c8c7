"""What is said of packages that are there, old, missing or half there: files that pip would have written."""

from pathlib import Path

import pytest

from bilevel_fast.base.installed import Part, parts, requirements


def put(root: Path, name: str, version: str | None, files: tuple[str, ...] = ()) -> None:
    info = root / f"{name}-{version or 0}.dist-info"
    info.mkdir()
    if version is not None:
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("raise RuntimeError('nobody imports it')\n")


def test_each_state_of_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    put(tmp_path, "zz_whole", "2.11.0+cu130", ("zz_whole/__init__.py",))
    put(tmp_path, "zz_old", "0.9.1", ("zz_old/__init__.py",))
    put(tmp_path, "zz_gone", "1.0", ("zz_gone/__init__.py",))
    (tmp_path / "zz_gone" / "__init__.py").unlink()  # the folder is left, as after an uninstallation that was killed
    put(tmp_path, "zz_half", None)
    lines = ["zz_whole>=2.11", "zz_old>=0.10", 'zz_gone>=1.0 ; extra == "sd"', 'zz_half ; extra == "sd"', "zz_no[x]>=1"]
    assert parts(lines) == [
        Part("zz_whole", None, "2.11.0+cu130", None),
        Part("zz_old", None, "0.9.1", "too old, wanted 0.10 or newer"),
        Part("zz_gone", "sd", "1.0", "half installed: zz_gone is gone"),
        Part("zz_half", "sd", None, "half installed: it has no version"),
        Part("zz_no", None, None, "not installed"),
    ]


def test_what_is_required_is_what_pyproject_says():
    found = {part.name: part for part in parts(requirements())}
    assert {"torch", "tyro", "diffusers", "nudenet"} <= set(found)
    assert not {"bilevel-fast", "pytest", "ruff"} & set(found)
    assert (found["diffusers"].extra, found["torch"].extra) == ("sd", None)
    assert found["torch"].problem is None


@pytest.mark.parametrize("line", ["", "???", "bilevel-fast[sd]"])
def test_what_is_no_requirement(line):
    assert parts([line]) == []
