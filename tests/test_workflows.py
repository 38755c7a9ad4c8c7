"""What runs on other people's machines, as far as reading it goes: the workflows of GitHub and the Dockerfile."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))


def least(package: str, lines: list[str]) -> str:
    """The lower bound of a package in a list of requirements."""
    (bound,) = (line.partition(">=")[2] for line in lines if line.startswith(f"{package}>="))
    return bound


def extras(text: str) -> set[str]:
    return {name for names in re.findall(r"(?:-e '\.|bilevel-fast)\[([\w,]+)\]", text) for name in names.split(",")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_well_formed(path):
    found = yaml.safe_load(path.read_text())
    assert found["permissions"] == {"contents": "read"}
    assert found[True], "`on`, which YAML 1.1 takes for a truth value: what starts it"
    for name, job in found["jobs"].items():
        assert job["timeout-minutes"] <= 180, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            if "uses" in step:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step
            else:
                script = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
                subprocess.run(["bash", "-n", "-c", script], check=True)
                assert extras(script) <= set(EXTRAS)
                targets = re.findall(r"\bmake ([a-z-]+)", script)
                assert all(
                    re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets
                )


def test_the_nightly_run_has_the_oldest_and_the_newest():
    """The oldest is what pyproject.toml allows, of Python as well; the newest has no pin."""
    job = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text())["jobs"]["test"]
    oldest, newest = job["strategy"]["matrix"]["include"]
    pins = dict(re.findall(r"(\w+)==([\d.]+)\.\*", oldest["pins"]))
    assert pins == {
        "torch": least("torch", PROJECT["dependencies"]),
        "triton": least("triton", PROJECT["dependencies"]),
        "torchvision": least("torchvision", EXTRAS["metrics"]),
    }
    assert f">={oldest['python']}" == PROJECT["requires-python"]
    assert "=" not in newest["pins"]
    assert "constraints.txt" not in str(job["steps"][2]["run"])
    (wanted,) = re.findall(r'pytest (-m "[^"]+")', (ROOT / "Makefile").read_text())
    assert wanted in job["steps"][3]["run"]


def test_the_dockerfile():
    """Pinned images of the CUDA release of torch's pins, nobody is root, and no licence that was not asked for."""
    text = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, flags=re.MULTILINE))
    images = re.findall(r"^FROM (\S+)", text, flags=re.MULTILINE)
    assert [image.split(":")[0] for image in images] == ["nvidia/cuda"] * 2
    assert all("${CUDA}" in image and "${UBUNTU}" in image for image in images)
    assert arguments["CUDA"].split(".")[:2] == PINS["cuda-toolkit"].split(".")[:2]
    last = text.rpartition("\nFROM ")[2]
    assert "devel" not in last.partition("\n")[0]
    assert re.findall(r"^(?:USER|CMD) .*$", last, flags=re.MULTILINE) == [
        "USER bilevel",
        'CMD ["bilevel-fast", "doctor"]',
    ]
    assert extras(text) <= set(EXTRAS) - {"nudity", "test", "dev"}
    assert ".git" in (ROOT / ".dockerignore").read_text().splitlines()
    joined = text.replace("\\\n", " ")
    for script in re.findall(r"^RUN (?:--mount=\S+ +)?(.*)$", joined, flags=re.MULTILINE):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    for copied in re.findall(r"^COPY (\S+) ", text, flags=re.MULTILINE):
        assert (ROOT / copied).exists(), copied
