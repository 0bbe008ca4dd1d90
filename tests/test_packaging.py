"""What is installed: every module, the kernels by their import name, torch the one requirement, no compiler needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = ("fastpost", "kernels", "csrc", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A wheel built where no compiler is, and what was printed meanwhile."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("build")
    for name in filter(lambda name: (ROOT / name).exists(), SOURCES):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, folder / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--verbose", "--wheel-dir", "dist")
    done = python("-m", "pip", "wheel", *options, ".", cwd=folder, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel, done.stdout


def test_the_wheel_holds_every_module_under_its_import_name(build):
    names = set(zipfile.ZipFile(build[0]).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "fastpost").rglob("*.py")}
    kernels = {f"fastpost/kernels/{path.name}" for path in (ROOT / "kernels" / "triton").glob("*.py")}
    assert kernels
    assert {name for name in names if name.endswith(".py")} == ours | kernels
    assert {"fastpost/py.typed", "fastpost/report/page.css", "fastpost/report/page.js"} <= names


def test_without_a_compiler_the_install_works_and_says_what_is_missing(build):
    wheel, printed = build
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    if list((ROOT / "csrc").glob("*.cpp")):
        assert "the native extension is not built, for want of a C++ compiler ('no-such-compiler'" in printed


def test_torch_is_the_only_requirement(build):
    with zipfile.ZipFile(build[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    requirements = metadata.get_all("Requires-Dist") or []
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.11"]
    assert {"train", "gpu", "bench", "dev"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_installed_wheel_imports(build, tmp_path):
    zipfile.ZipFile(build[0]).extractall(tmp_path / "site")
    script = "import fastpost, importlib.util as u; print(fastpost.__file__, u.find_spec('fastpost.kernels').origin)"
    done = python("-P", "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.stdout.split() == [
        str(tmp_path / "site" / "fastpost" / "__init__.py"),
        str(tmp_path / "site" / "fastpost" / "kernels" / "__init__.py"),
    ]


def test_the_packages_listed_are_the_packages_there():
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "fastpost").rglob("__init__.py")
        if "kernels" not in path.parts
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"fastpost.kernels"}


def test_no_folder_of_ours_hides_the_package_called_kernels():
    """`import kernels` in this directory must not find ours: Hugging Face's package has that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_command_is_there():
    assert PROJECT["project"]["scripts"] == {"fastpost": "fastpost.cli:main"}
    done = python("-c", "import sys; from fastpost.cli import main; sys.exit(main())", "--help", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "grpo" in done.stdout
