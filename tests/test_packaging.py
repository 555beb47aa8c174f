"""What is shipped: one top-level name, and a base install that is enough for a robot."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    return out


def test_the_wheel_has_one_top_level_name(archives):
    names = zipfile.ZipFile(next(archives.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names} == {"openpi_like", "openpi_like-0.1.0.dist-info"}
    assert {"openpi_like/serve/client.py", "openpi_like/models/pi0.py", "openpi_like/data/loader.py"} <= set(names)


def test_the_sdist_has_the_library_alone(archives):
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    assert {name.split("/")[1] for name in names} <= {
        "openpi_like",
        "README.md",
        "LICENSE",
        "pyproject.toml",
        "PKG-INFO",
        ".gitignore",
    }


def test_every_dependency_is_pinned_with_hashes():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line and not line.startswith((" ", "#"))}
    for requirement in asked:
        name = re.split(r"[;\[<>=]", requirement)[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement
    assert {"gym-pusht", "gym-aloha", "openpi-client"} <= pinned
    assert sum("--hash=sha256:" in line for line in lines) > len(pinned)
    assert not [line for line in lines if "://" in line]


def test_a_robot_needs_three_packages():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert sorted(r.split(">")[0] for r in project["dependencies"]) == ["msgpack", "numpy", "websockets"]
