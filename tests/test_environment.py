"""pyproject.toml, constraints.txt, environment.yml and Makefile agree, and say what ails a machine."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import install

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LEFT_OUT = {"all", "eval", "data", "quantized"}
TEN = {
    "jupyterlab", "torch", "transformers", "peft", "nnsight",
    "plotly", "scikit-learn", "numpy", "scipy", "ipywidgets",
}  # fmt: skip


def requirements(*texts):
    return {canonicalize_name(r.name): r.specifier for r in map(Requirement, texts)}


def bounds():
    everything = [text for name, texts in EXTRAS.items() if name not in LEFT_OUT for text in texts]
    return requirements(*PROJECT["dependencies"], *everything)


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_environment_lists_the_ten_packages_with_the_bounds_of_pyproject():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry for entry in conda if isinstance(entry, dict))["pip"]
    listed = requirements(*(line for line in pip if not line.startswith("-")))
    assert set(listed) == TEN
    assert listed == {name: bounds()[name] for name in TEN}
    assert [line for line in pip if line.startswith("-")] == ["-c constraints.txt", "-e .[all]"]


def test_environment_python_is_new_enough_and_pip_is_named():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    python = next(entry for entry in conda if str(entry).startswith("python="))
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.removeprefix("python="))
    assert "pip" in conda


def test_all_is_every_extra_but_those_left_out():
    (text,) = EXTRAS["all"]
    assert Requirement(text).extras == set(EXTRAS) - LEFT_OUT


def test_constraints_pin_every_direct_dependency_inside_its_bounds():
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in pins())}
    outside = {n: pinned.get(n) for n, spec in bounds().items() if n not in pinned or not spec.contains(pinned[n])}
    assert outside == {}
    assert pinned["torch"] == "2.13.0"


def test_constraints_are_exact_and_local_to_no_machine():
    assert [line for line in pins() if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []


def test_every_installed_package_takes_the_oldest_python_that_is_promised():
    """Pins made with a later 3.11 may ask for it: the first one is what some systems ship."""
    for package in distributions():
        needed = package.metadata["Requires-Python"] or ""
        assert SpecifierSet(needed).contains("3.11.0"), f"{package.name} {package.version} needs Python {needed}"


def test_no_registry_host_is_named():
    files = [ROOT / name for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/run")]
    assert [f.name for f in files if re.search(r"pypi\.|pytorch\.org|--(extra-)?index-url", f.read_text())] == []


def test_this_machine_passes_the_check():
    assert install.problem(sys.version_info, free_gb=50) is None


def test_an_old_python_is_refused_with_the_version_needed():
    assert re.search(r"3\.10 is too old.*3\.11", install.problem((3, 10, 4), free_gb=50))


def test_a_python_without_ensurepip_is_told_the_debian_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    assert "apt install python3.12-venv" in install.problem((3, 12), free_gb=50)


def test_a_nearly_full_disk_is_refused_with_both_sizes():
    assert re.search(r"1\.5 GB.*needs 4", install.problem((3, 12), free_gb=1.5))


def test_installer_and_makefile_ask_for_the_python_of_pyproject():
    oldest = ".".join(map(str, install.OLDEST))
    assert PROJECT["requires-python"] == f">={oldest}"
    assert "sys.version_info < ({}, {})".format(*install.OLDEST) in (ROOT / "Makefile").read_text()


def test_the_installer_can_be_read_by_a_python_that_is_too_old():
    tree = ast.parse(Path(install.__file__).read_text())
    modern = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [node for node in ast.walk(tree) if isinstance(node, modern)]
    assert not [f.name for f in functions if f.returns or any(a.annotation for a in f.args.args)]


def test_a_failed_installation_shows_the_end_of_the_log(tmp_path):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: no space left on device'\nexit 1\n")
    pip.chmod(0o755)
    with pytest.raises(SystemExit, match="no space left on device[\\s\\S]*install.log"):
        install.install(str(pip), "dev", str(tmp_path / "install.log"))
    assert "no space left" in (tmp_path / "install.log").read_text()


@pytest.fixture
def checkout(tmp_path):
    """A copy with the Makefile, and a Python that only records what it was asked."""
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    return tmp_path


def make(folder, *args):
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *args], cwd=folder, capture_output=True, text=True, env=environ, check=False)


READY = ".venv/.installed-notebooks"


def test_make_installs_once_and_again_when_the_dependencies_change(checkout):
    for _ in range(2):
        assert make(checkout, READY, "PYTHON=./python").returncode == 0
    assert (checkout / "calls").read_text() == "tools/install.py .venv notebooks\n"
    later = (checkout / READY).stat().st_mtime + 5
    os.utime(checkout / "constraints.txt", (later, later))
    make(checkout, READY, "PYTHON=./python")
    assert (checkout / "calls").read_text().count("install.py") == 2


def test_demo_is_content_with_what_the_tests_installed(checkout):
    (checkout / ".venv/.installed-dev,notebooks,browser,tune,docs").touch()
    assert "install.py" not in make(checkout, "-n", "demo").stdout
    assert "replib demo" in make(checkout, "-n", "demo").stdout


def test_make_says_first_what_it_will_do_and_how_long_it_takes(checkout):
    for target in ("demo", "test"):
        first = make(checkout, target, "PYTHON=./python").stdout.splitlines()[0]
        assert "minutes" in first and "install" in first


def test_make_without_python_says_which_one_to_install(checkout):
    result = make(checkout, READY, "PYTHON=./nowhere")
    assert result.returncode != 0
    assert "./nowhere not found: install Python 3.11 or newer" in result.stderr


def test_make_adds_the_slow_tests_only_in_ci(checkout):
    assert '-m ""' in make(checkout, "-n", "test", "CI=true").stdout
    assert '-m ""' not in make(checkout, "-n", "test", "CI=").stdout


def test_make_tests_numbers_on_each_kind_of_kernels(checkout):
    runs = [line for line in make(checkout, "-n", "test-kernels").stdout.splitlines() if "pytest" in line]
    assert [re.findall(r"ATEN_CPU_CAPABILITY=(\w+)", line) for line in runs] == [[], ["avx2"], ["default"]]
    assert all((ROOT / room).is_dir() for run in runs for room in re.findall(r"tests/\w+", run))


def test_versions_agree():
    import replib

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert Version(citation["version"]) == Version(replib.__version__)
    cited = {paper["identifiers"][0]["value"] for paper in citation["references"]}
    assert cited == {"arXiv:2504.01550", "arXiv:2603.04355"}
