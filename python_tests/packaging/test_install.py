"""Every way to install the package, in a copy of the source: what comes out, that it runs, what is left behind."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from .conftest import PACKAGE

ROOT = PACKAGE.parent
PIP = ("-m", "pip", "--disable-pip-version-check")
HOW = ("--no-index", "--no-build-isolation", "--no-deps")
USE = (
    "import fgvc_ext, torch; print(fgvc_ext.__file__); print(fgvc_ext.info()['backend']); "
    "print(fgvc_ext.ops.global_k_max_pool(torch.arange(6.).reshape(1, 1, 2, 3), 2).item())"
)
FOR_BUILDING = ("pip", "setuptools", "_distutils_hack", "wheel", "packaging", "pybind11")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here"),
    pytest.mark.xdist_group("install"),
]


def run(
    python: Path, *arguments: str, folder: Path, path: Path | None = None, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a Python, without the CUDA library; PYTHONPATH is `path` or nothing."""
    programs = [str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FGVC_EXT_", "PYTHON"))}
    settings = {"FGVC_EXT_CUDA": "0", "PATH": os.pathsep.join(programs), "PYTHONPATH": str(path or ""), **environment}
    result = subprocess.run(
        [str(python), *arguments], cwd=folder, env={**inherited, **settings}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert not check or result.returncode == 0, result.stdout
    return result


def new_environment(folder: Path) -> Path:
    """The Python of a fresh environment, which sees the packages of this one after its own."""
    venv.create(folder, with_pip=False)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n" + sysconfig.get_path("platlib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist, under git, so that what a build leaves shows. All tests build in it: it compiles once."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).exists():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "tree" / name)
    run(Path(sys.executable), "-m", "build", "--sdist", "--no-isolation", "-o", str(folder), folder=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else file.extractall(folder)
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    shutil.copy(ROOT / ".gitignore", unpacked)
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=unpacked, check=True)
    return unpacked


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    result = run(Path(sys.executable), *PIP, "wheel", *HOW, "-w", "dist", ".", folder=source)
    wheels = list(source.glob("dist/*.whl"))
    assert len(wheels) == 1, result.stdout
    return wheels[0]


def test_the_sdist_holds_what_builds_and_tests_it(source: Path) -> None:
    for name in (
        "CMakeLists.txt",
        "cmake/exports.map",
        "csrc/library.cpp",
        "LICENSE",
        "python_tests/ops/specs/diversify.py",
    ):
        assert (source / name).exists(), name
    assert list(source.rglob("*.so")) == []


def test_the_wheel_installs_and_runs_compiled(wheel: Path, tmp_path: Path) -> None:
    assert "none-any" not in wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if name.startswith("fgvc_ext/")}
    libraries = {name.split("/", 1)[1].split(".")[0] for name in names if name.endswith(".so")}
    assert libraries == {"_C", "lib/libfgvc_ext_cpu"}
    assert "fgvc_ext/py.typed" in names
    python = new_environment(tmp_path / "environment")
    run(python, *PIP, "install", "--no-index", "--no-deps", str(wheel), folder=tmp_path)
    place, backend, value = run(python, "-c", USE, folder=tmp_path).stdout.splitlines()
    assert place.startswith(str(tmp_path))
    assert (backend, value) == ("compiled", "4.5")
    command = subprocess.run([str(python.parent / "fgvc-ext"), "info"], capture_output=True, text=True, check=True)
    assert "cpu library                 loaded" in command.stdout


def test_an_unchanged_build_compiles_nothing(wheel: Path, source: Path) -> None:
    objects = {path: path.stat().st_mtime_ns for path in (source / "build").rglob("*.o")}
    assert objects
    output = run(Path(sys.executable), "setup.py", "build_ext", folder=source).stdout
    assert {path: path.stat().st_mtime_ns for path in (source / "build").rglob("*.o")} == objects
    assert "no work to do" in output or "Building" not in output


@pytest.mark.parametrize(
    "command", [("setup.py", "develop"), (*PIP, "install", *HOW, "-e", ".")], ids=["develop", "pip"]
)
def test_an_editable_install(wheel: Path, source: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    stale = source / "fgvc_ext" / "lib" / "libfgvc_ext_cuda.so"  # of an earlier build with CUDA
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"")
    python = new_environment(tmp_path / "environment")
    run(python, *command, folder=source)
    assert run(python, "-c", USE, folder=tmp_path).stdout.splitlines() == [
        str(source / "fgvc_ext" / "__init__.py"), "compiled", "4.5",
    ]  # fmt: skip
    assert [path.name for path in (source / "fgvc_ext" / "lib").iterdir()] == ["libfgvc_ext_cpu.so"]
    assert (source / "compile_commands.json").exists()


def test_the_python_only_wheel_is_pure_also_where_libraries_were_built_in_place(source: Path, tmp_path: Path) -> None:
    library = source / "fgvc_ext" / "lib" / "libfgvc_ext_cpu.so"
    library.parent.mkdir(exist_ok=True)
    if not library.exists():
        library.write_bytes(b"")
    command = (*PIP, "wheel", *HOW, "-w", str(tmp_path), ".")
    run(Path(sys.executable), *command, folder=source, FGVC_EXT_BUILD="0")
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        assert [name for name in file.namelist() if ".so" in name] == []
        file.extractall(tmp_path / "unpacked")
    reference = run(Path(sys.executable), "-W", "ignore", "-c", USE, folder=tmp_path, path=tmp_path / "unpacked")
    place, backend, value = reference.stdout.splitlines()
    assert place.startswith(str(tmp_path))
    assert (backend, value) == ("reference", "4.5")


def test_a_build_without_torch_says_how(source: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "environment", with_pip=False)
    packages = tmp_path / "packages"  # all that an isolated build would see
    packages.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for found in Path(folder).iterdir():
            if found.name.split("-")[0] in FOR_BUILDING and not (packages / found.name).exists():
                (packages / found.name).symlink_to(found)
    python = tmp_path / "environment" / "bin" / "python"
    command = (*PIP, "wheel", *HOW, "-w", str(tmp_path), ".")
    result = run(python, *command, folder=source, path=packages, check=False)
    assert result.returncode != 0
    assert "No module named 'torch'" in result.stdout
    assert "pip install --no-build-isolation ." in result.stdout


def test_builds_leave_nothing_that_git_does_not_ignore(wheel: Path, source: Path) -> None:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=source, capture_output=True, text=True, check=True)
    assert [line for line in status.stdout.splitlines() if not line.startswith("A  ")] == []
