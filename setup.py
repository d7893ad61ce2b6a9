"""Builds blockhess_ext._C, which uses torch's stable ABI of 2.10 and runs with any torch >= 2.10.

BLOCKHESS_CUDA=auto (default) takes CUDA if torch was built with it and CUDA_HOME holds a toolkit of the same major
version; 1 insists on it, 0 declines it. What is compiled with CUDA runs only with CUDA builds of torch of that version.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent
MINIMUM_TORCH = (2, 10)
MINIMUM_SETUPTOOLS = 77  # for the license in pyproject.toml, where there is one


def refuse(reason: str) -> None:
    sys.exit(f"blockhess: {reason}")


try:
    import torch
except ImportError:
    refuse("torch cannot be imported, which compiling needs. Type: pip install .   (without --no-build-isolation)")

from torch.utils import cpp_extension  # noqa: E402

try:
    import pybind11
except ImportError:
    refuse("pybind11 is needed to compile the extension. Type: pip install pybind11 ninja")


def check_torch() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MINIMUM_TORCH:
        refuse(f"torch >= 2.10 is needed, got {torch.__version__}. Type: pip install 'torch>=2.10'")


def check_setuptools() -> None:
    version = setuptools.__version__
    if int(version.split(".")[0]) < MINIMUM_SETUPTOOLS and (ROOT / "pyproject.toml").exists():
        needed = f"setuptools >= {MINIMUM_SETUPTOOLS}"
        refuse(f"{needed} is needed, got {version}. Type: pip install '{needed.replace(' ', '')}'")


def check_compiler() -> None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        refuse(f"no C++ compiler: '{compiler}' is not on PATH. Install one (Debian: apt install g++) or set CXX")


def check_python_headers() -> None:
    folder = Path(sysconfig.get_paths()["include"])
    if not (folder / "Python.h").exists():
        refuse(
            f"{folder}/Python.h does not exist. Install the headers of this Python (Debian: apt install python3-dev)"
        )


def find_cuda() -> None:
    """Set CUDA_HOME to a toolkit with headers, unless torch found one: nvcc on PATH may be a wrapper elsewhere."""
    for folder in (cpp_extension.CUDA_HOME, os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if folder and (Path(folder) / "include" / "cuda_runtime.h").exists():
            os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(folder)
            return


def cuda_obstacle() -> str | None:
    """Why CUDA cannot be built here, or None. A GPU need not be visible: builders and containers have none."""
    if not list(ROOT.glob("csrc/cuda/*.cu")):
        return "this version has no CUDA kernels (csrc/cuda)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit was found: export CUDA_HOME=/path/to/cuda"
    if not (Path(cpp_extension.CUDA_HOME) / "include" / "cuda_runtime.h").exists():
        return (
            f"{cpp_extension.CUDA_HOME}/include/cuda_runtime.h does not exist (nvcc on PATH may be a wrapper): "
            "export CUDA_HOME=/path/to/cuda"
        )
    needed = torch.version.cuda.split(".")[0]
    found = nvcc_major(Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc")
    if found != needed:
        return (
            f"torch {torch.__version__} needs nvcc of CUDA {needed}, got {found} in {cpp_extension.CUDA_HOME}: "
            "export CUDA_HOME=/path/to/cuda"
        )
    return None


def nvcc_major(nvcc: Path) -> str:
    """The major version of a CUDA compiler, such as "13", or "none"."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return "none"
    release = re.search(r"release (\d+)\.", text)
    return release[1] if release else "none"


def use_cuda() -> bool:
    wish = os.environ.get("BLOCKHESS_CUDA", "auto")
    if "CUDA_HOME" not in os.environ:
        find_cuda()
    if wish not in ("0", "1", "auto"):
        refuse(f"BLOCKHESS_CUDA must be 0, 1 or auto, got {wish!r}")
    obstacle = cuda_obstacle()
    if wish == "1" and obstacle:
        refuse(f"BLOCKHESS_CUDA=1 cannot be met: {obstacle}")
    if wish != "0":
        taken = f"CUDA of {cpp_extension.CUDA_HOME}" if obstacle is None else f"no CUDA: {obstacle}"
        print(f"blockhess: {taken}", file=sys.stderr)
    return wish != "0" and obstacle is None


def cuda_architectures() -> str:
    """What nvcc compiles for, in its own names: machine code sm_80,sm_90 and PTX compute_90."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    flags = cpp_extension._get_cuda_arch_flags()  # each ends with code=NAME
    return ",".join(sorted((flag.rpartition("=")[2] for flag in flags), key=lambda name: (name[0] != "s", name)))


def extension():
    cuda = use_cuda()
    folders = ["bindings", "cpu", "cuda"] if cuda else ["bindings", "cpu"]
    sources = sorted(
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / "csrc" / folder).iterdir()
        if path.suffix in (".cpp", ".cu") and (cuda or not path.stem.endswith("_cuda"))
    )
    cxx = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall"]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "blockhess_ext._C",
        sources,
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")),
        # pybind11's own headers stand before torch's copy, which refuses TORCH_TARGET_VERSION.
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("BLOCKHESS_TORCH_VERSION", f'"{torch.__version__}"'),
            ("BLOCKHESS_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
            ("BLOCKHESS_CUDA_ARCHITECTURES", f'"{cuda_architectures() if cuda else ""}"'),
            *([("USE_CUDA", None)] if cuda else []),
        ],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-lineinfo"]} if cuda else cxx,
    )


check_setuptools()
check_torch()
check_compiler()
check_python_headers()
# Python's own flags ask for debug symbols: ten times the size of the code, and nearly half of the time.
os.environ["CFLAGS"] = f"-g0 {os.environ.get('CFLAGS', '')}"
setuptools.setup(ext_modules=[extension()], cmdclass={"build_ext": cpp_extension.BuildExtension})
