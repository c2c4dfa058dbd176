"""What a user installs: the wheel, in an empty virtual environment, without extras.

Tests need no network, so the wheel's dependencies are linked from the environment that runs the
tests: those that the wheel asks for, those that they ask for, and nothing else. torch is therefore
absent, as it is for a user, and a dependency that the wheel forgets to name is missing here too.
`make smoke` (pytest --index) runs the same tests with a plain `pip install` of the wheel.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
WINDOWS = os.name == "nt"
PYTHON = "python.exe" if WINDOWS else "python"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH would let the checkout in through the back door.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )


def run_ok(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def required(wheel: Distribution) -> list[Distribution]:
    """The distributions, as installed here, that `wheel` needs, directly or through another."""
    found: dict[tuple[str, frozenset[str]], Distribution] = {}
    queue: list[tuple[Distribution, frozenset[str]]] = [(wheel, frozenset())]
    while queue:
        owner, extras = queue.pop()
        for wish in map(Requirement, owner.requires or []):
            if wish.marker and not any(wish.marker.evaluate({"extra": x}) for x in extras | {""}):
                continue
            key = (wish.name, frozenset(wish.extras))
            if key not in found:
                found[key] = distribution(wish.name)
                queue.append((found[key], key[1]))
    return list(found.values())


def link(needed: Distribution, site_packages: Path) -> None:
    """The distribution's packages, modules and metadata, made visible in `site_packages`."""
    for name in {file.parts[0] for file in needed.files or []} - {"..", "__pycache__"}:
        source, target = Path(str(needed.locate_file(name))), site_packages / name
        if target.exists():
            continue
        if not WINDOWS:
            target.symlink_to(source)
        elif source.is_dir():  # a link asks for privileges on Windows
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)


@pytest.fixture(scope="module")
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(folder of the commands, an empty folder to run them from)."""
    folder = tmp_path_factory.mktemp("install")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    run_ok(*build, cwd=folder)
    (wheel,) = folder.glob("fitcheck_rlhf-*.whl")

    home = folder / "venv"
    venv.create(home, symlinks=not WINDOWS)
    commands = home / ("Scripts" if WINDOWS else "bin")
    python = commands / PYTHON
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    if request.config.getoption("--index"):
        run_ok(*pip, "install", wheel, cwd=folder)
    else:
        run_ok(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
        show = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site_packages = Path(run_ok(python, "-c", show, cwd=folder).strip())
        (metadata,) = site_packages.glob("fitcheck_rlhf-*.dist-info")
        for needed in required(PathDistribution(metadata)):
            link(needed, site_packages)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return commands, elsewhere


def test_both_commands_say_the_version_that_was_installed(installed: tuple[Path, Path]) -> None:
    commands, folder = installed
    code = "from importlib.metadata import version; print(version('fitcheck-rlhf'))"
    version = run_ok(commands / PYTHON, "-c", code, cwd=folder).strip()
    for command in ("fitcheck", "fitcheck-rlhf"):
        assert run_ok(commands / command, "--version", cwd=folder).split() == ["fitcheck", version]


def test_check_answers_without_the_checkout(installed: tuple[Path, Path]) -> None:
    commands, folder = installed
    question = ["check", "llama-3.1-8b", "--gpu", "rtx 4090", "--json"]
    done = run(commands / "fitcheck", *question, cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert answer["verdict"] in ("fits", "tight", "does-not-fit")
    assert (done.returncode == 1) == (answer["verdict"] == "does-not-fit")


def test_torch_is_not_there(installed: tuple[Path, Path]) -> None:
    commands, folder = installed
    done = run(commands / PYTHON, "-c", "import torch", cwd=folder)
    assert "No module named 'torch'" in done.stderr


def test_the_whole_catalog_is_in_the_wheel(installed: tuple[Path, Path]) -> None:
    commands, folder = installed
    code = "import fitcheck; print(fitcheck.__path__[0])"
    package = Path(run_ok(commands / PYTHON, "-c", code, cwd=folder).strip())
    shipped = {path.relative_to(package / "catalog") for path in package.glob("catalog/**/*.json")}
    source = {path.relative_to(ROOT / "catalog") for path in ROOT.glob("catalog/**/*.json")}
    assert shipped == source
    assert shipped


def test_every_module_but_bench_imports(installed: tuple[Path, Path]) -> None:
    commands, folder = installed
    files = [*ROOT.glob("fitcheck/*.py"), *ROOT.glob("fitcheck/tui/**/*.py")]
    left = ("__init__", "__main__", "serve")  # serving needs an extra of its own
    files = [file for file in files if file.stem not in left]
    modules = sorted(".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    modules += ["huggingface_hub", "psutil", "pydantic", "pynvml", "textual.app"]
    run_ok(commands / PYTHON, "-c", "import " + ", ".join(modules), cwd=folder)
