"""build_info, the errors of setup.py for a build that cannot succeed, and those of importing what does not fit."""

from __future__ import annotations

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

import blockhess_ext
from tests import ROOT


def setup_py(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `setup.py --version`, which configures the build without compiling."""
    env = {**os.environ, **environment}
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def fake_module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)


def test_build_info():
    info = blockhess_ext.build_info()
    assert TorchVersion(info["torch"]) >= (2, 10)  # any: the ABI is stable
    assert info["cuda"] is None or info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
    assert (info["cuda_architectures"] is None) == (info["cuda"] is None)
    assert info["instruction_set"] and info["compiler"]


def test_a_build_is_decided(tmp_path):
    done = setup_py(tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.slow
def test_cuda_that_cannot_be_met_is_refused(tmp_path):
    done = setup_py(tmp_path, BLOCKHESS_CUDA="1")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("blockhess: BLOCKHESS_CUDA=1 cannot be met: ")


def test_the_toolkit_with_headers_is_taken(tmp_path):
    """nvcc on PATH is a wrapper in a folder without headers, from which torch takes its CUDA_HOME."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "cuda/include").mkdir(parents=True)
    (tmp_path / "cuda/include/cuda_runtime.h").touch()
    (tmp_path / "cuda/bin").mkdir()
    for nvcc, text in ((tmp_path / "bin/nvcc", ""), (tmp_path / "cuda/bin/nvcc", "echo release 13.0, V13.0\n")):
        nvcc.write_text(f"#!/bin/sh\n{text}")
        nvcc.chmod(0o755)
    # As in a build of torch with CUDA, so far as setup.py asks.
    fake_module(tmp_path, "sitecustomize", "import torch\ntorch.version.cuda = '13.0'")
    settings = {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    for given, taken in (({"CUDA_PATH": str(tmp_path / "cuda")}, tmp_path / "cuda"), ({"CUDA_HOME": "/none"}, None)):
        command = [sys.executable, str(ROOT / "setup.py"), "--version"]
        env = {**environment, **settings, **given}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        said = f"blockhess: CUDA of {taken}" if taken else "blockhess: no CUDA: "
        assert said in done.stderr, done.stderr


@pytest.mark.slow
def test_a_wrong_switch_is_refused(tmp_path):
    done = setup_py(tmp_path, BLOCKHESS_CUDA="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "blockhess: BLOCKHESS_CUDA must be 0, 1 or auto, got 'yes'"


@pytest.mark.slow
def test_no_compiler_is_refused(tmp_path):
    done = setup_py(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr.strip().startswith("blockhess: no C++ compiler: 'no-such-compiler' is not on PATH")


def test_no_torch_is_refused_with_what_to_type(tmp_path):
    fake_module(tmp_path, "torch", "raise ImportError('hidden')")
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "pip install ." in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_old_torch_is_refused(tmp_path):
    fake_module(tmp_path, "sitecustomize", "import torch\ntorch.__version__ = '2.9.1'")
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("blockhess: torch >= 2.10 is needed, got 2.9.1.")


def test_an_old_setuptools_is_refused_where_there_is_a_pyproject(tmp_path):
    fake_module(tmp_path, "sitecustomize", "import setuptools\nsetuptools.__version__ = '70.2.0'")
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    told = "setuptools >= 77 is needed, got 70.2.0. Type: pip install 'setuptools>=77'"
    assert done.stderr.strip() == f"blockhess: {told}"
    shutil.copy(ROOT / "setup.py", tmp_path)  # as bench/run_gpu.sh does
    command = [sys.executable, "setup.py", "--version"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert told not in done.stderr


@pytest.mark.slow
def test_missing_python_headers_are_refused(tmp_path):
    text = "import sysconfig\npaths = sysconfig.get_paths()\n"
    fake_module(tmp_path, "sitecustomize", text + "sysconfig.get_paths = lambda: paths | {'include': '/none'}")
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("blockhess: /none/Python.h does not exist. Install the headers of this Python")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("nvcc", "found"), [("release 12.8, V12.8", "12"), ("", "none"), (None, "none"), ("release 13.0, V13.0", None)]
)
@pytest.mark.slow
def test_cuda_of_another_major_version_is_refused(nvcc, found, tmp_path):
    text = f"import torch.utils.cpp_extension\ntorch.version.cuda, home = '13.0', {str(tmp_path)!r}\n"
    fake_module(tmp_path, "sitecustomize", text + "torch.utils.cpp_extension.CUDA_HOME = home")
    (tmp_path / "include").mkdir()
    (tmp_path / "include/cuda_runtime.h").touch()
    (tmp_path / "bin").mkdir()
    if nvcc is not None:
        (tmp_path / "bin/nvcc").write_text(f"#!/bin/sh\necho Cuda compilation tools, {nvcc}\n")
        (tmp_path / "bin/nvcc").chmod(0o755)
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path), BLOCKHESS_CUDA="1")
    if found is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"blockhess: BLOCKHESS_CUDA=1 cannot be met: torch {torch.__version__} needs nvcc of CUDA 13, got {found} in "
        f"{tmp_path}: export CUDA_HOME=/path/to/cuda"
    )


def import_error(folder: Path, before: str = "") -> str:
    """Return the error of importing a blockhess_ext that consists of what is in the folder and of its Python files."""
    package = folder / "blockhess_ext"
    package.mkdir(exist_ok=True)
    for path in Path(blockhess_ext.__file__).parent.glob("*.py"):
        shutil.copy(path, package)
    # Disable an editable install, which would provide a missing module.
    lone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
    command = [sys.executable, "-c", lone + before + "import blockhess_ext"]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_an_import_without_a_build_says_what_to_run(tmp_path):
    assert import_error(tmp_path) == (
        f"ImportError: blockhess_ext: {tmp_path}/blockhess_ext must hold the module compiled for this Python, and does "
        "not; in blockhess' source folder run: pip install ."
    )


def test_an_import_with_an_old_torch_says_what_to_run(tmp_path):
    before = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1+cpu')\n"
    assert import_error(tmp_path, before) == (
        "ImportError: blockhess_ext: torch must be 2.10 or newer, got 2.9.1+cpu; run: pip install 'torch>=2.10'"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the linker's options are those of Linux")
def test_an_import_without_the_cuda_libraries_of_the_build_says_what_to_run(tmp_path):
    """As a build with CUDA does where torch is one without: a library that it links against is missing."""
    package = tmp_path / "blockhess_ext"
    package.mkdir()
    library = tmp_path / "libc10_cuda_of_the_build.so"
    compiler = [*os.environ.get("CXX", "c++").split(), "-shared", "-x", "c++", "/dev/null", "-o"]
    subprocess.run([*compiler, library], check=True)
    module = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    subprocess.run([*compiler, module, "-x", "none", "-Wl,--no-as-needed", library.name], check=True, cwd=tmp_path)
    library.unlink()
    found = import_error(tmp_path)
    text = f"ImportError: blockhess_ext: the compiled module does not load with torch {torch.__version__} "
    assert found.startswith(f"{text}({library.name}: cannot open shared object file")
    assert found.endswith("pip install setuptools pybind11 ninja && pip install --no-build-isolation .")


def test_the_source_folder_does_not_hide_what_is_installed(tmp_path):
    """The folder in which Python is started comes first; without a compiled module there, the installed one is used."""
    sources, installed = tmp_path / "sources", tmp_path / "installed"
    own = Path(blockhess_ext.__file__).parent
    for folder in (sources, installed):
        shutil.copytree(own, folder / "blockhess_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for library in own.glob("_C*.so"):
        (installed / "blockhess_ext" / library.name).symlink_to(library)
    env = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", "import blockhess_ext; print(blockhess_ext.ops.__file__)"]
    done = subprocess.run(command, cwd=sources, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(installed / "blockhess_ext/ops.py"), done.stderr
