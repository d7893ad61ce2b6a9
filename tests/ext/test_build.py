"""build_info, and the errors of setup.py for a build that cannot succeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    assert info["torch"] == torch.__version__
    assert info["cuda"] is None or info["cuda"] == torch.version.cuda
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
    wrapper = tmp_path / "bin/nvcc"
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
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
    assert "pip install --no-build-isolation ." in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_an_old_torch_is_refused(tmp_path):
    fake_module(tmp_path, "sitecustomize", "import torch\ntorch.__version__ = '2.9.1'")
    done = setup_py(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("blockhess: torch >= 2.10 is needed, got 2.9.1.")


def test_an_import_without_a_build_says_what_to_run(tmp_path):
    package = tmp_path / "blockhess_ext"
    package.mkdir()
    for path in (ROOT / "blockhess_ext").glob("*.py"):
        (package / path.name).write_text(path.read_text())
    # Disable an editable install, which would provide the missing module.
    lone = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
    command = [sys.executable, "-c", lone + "import blockhess_ext"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "pip install --no-build-isolation -e ." in done.stderr.strip().splitlines()[-1]
