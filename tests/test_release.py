"""Version, changelog, citation, licenses and the picture of the architecture agree with the files of a release."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from setuptools import find_packages

from blockhess.cli.main import main
from tests import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = re.compile(r"\d+\.\d+\.\d+")


def tracked(*paths: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("this is no git checkout")
    return done.stdout.split()


def test_every_folder_of_python_is_a_package() -> None:
    folders = {str(Path(name).parent) for name in tracked("python", "blockhess_ext") if name.endswith(".py")}
    found = sorted(folder.removeprefix("python/").replace("/", ".") for folder in folders)
    find = PROJECT["tool"]["setuptools"]["packages"]["find"]
    packages = [p for where in find["where"] for p in find_packages(str(ROOT / where), include=find["include"])]
    assert found == sorted(packages)


def test_every_file_beside_the_modules_is_packaged() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    held: set[str] = set()
    for package, patterns in setuptools["package-data"].items():
        (folder,) = (path for path in (ROOT / "python" / package, ROOT / package) if path.is_dir())
        held |= {str(path.relative_to(ROOT)) for pattern in patterns for path in folder.glob(pattern)}
    others = {name for name in tracked("python", "blockhess_ext") if not name.endswith(".py")}
    assert others == others & held and len(others) > 10


def test_the_changelog_keeps_its_convention() -> None:
    """Newest first: "Unreleased", then "VERSION - DATE"; the project's version is the newest released or the next."""
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased"
    dated = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(dated)
    versions = [tuple(map(int, match.groups()[:3])) for match in dated if match]
    assert versions == sorted(versions, reverse=True)
    current = tuple(map(int, PROJECT["project"]["version"].split(".")))
    assert not versions or current >= versions[0]


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    version = PROJECT["project"]["version"]
    assert VERSION.fullmatch(version)
    pattern = re.compile(rf"\b(version|__version__)\b\W{{1,5}}{re.escape(version)}\b")
    assert [n for n in tracked("*.py", "*.toml", "*.cff") if pattern.search((ROOT / n).read_text())] == [
        "pyproject.toml"
    ]
    assert main(["--version"]) == 0
    assert re.fullmatch(r"blockhess (\d+\.\d+\.\d+.*|0\+source)\n", capsys.readouterr().out)


def test_the_citation() -> None:
    yaml = pytest.importorskip("yaml", reason="pyyaml comes with transformers")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["license"] == PROJECT["project"]["license"] == "MIT"
    (paper,) = citation["references"]
    assert paper["title"] == "Why Transformers Need Adam: A Hessian Perspective" and len(paper["authors"]) == 6
    assert "2402.16788" in paper["url"]


@pytest.mark.parametrize("folder", ["python/blockhess/data", "python/blockhess_paper/data"])
def test_every_file_of_data_has_a_license(folder: str) -> None:
    table = (ROOT / folder / "README.md").read_text()
    rows = dict(re.findall(r"^\| (`.*?) \| `([\w.-]+)` \|", table, flags=re.MULTILINE))
    said = {name for names in rows for name in re.findall(r"`(.*?)`", names)}
    assert said == {Path(name).name for name in tracked(folder)} - {"README.md"}
    assert set(rows.values()) <= {"MIT", "LicenseRef-public-domain"}


def test_the_picture_shows_folders_that_are_there() -> None:
    svg = ElementTree.parse(ROOT / "docs/architecture.svg")
    drawn = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "folder"]
    rooms = {path.parent.name for path in (ROOT / "python/blockhess").glob("*/__init__.py")}
    sources = {f"csrc/{folder.name}" for folder in (ROOT / "csrc").iterdir()}
    others = {"python/blockhess", "blockhess_paper", "blockhess_ext", "tests", "bench", "docs", ".ci"}
    assert sorted(map(str, drawn)) == sorted(rooms | sources | others)
    assert all((ROOT / name).is_dir() or (ROOT / "python" / name).is_dir() for name in others)
