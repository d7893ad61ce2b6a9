"""`blockhess doctor`: what is installed, whether the extension computes what is known by heart, and what to do if not.

diag(1 ... 20), all Krylov steps     nodes 1 ... 20, trace 210, log-determinant log 20! = 42.3356164607535
a network of 63 parameters           the nodes of every block are the eigenvalues of its dense Hessian
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# extra -> package that it brings; all of them optional.
OPTIONAL = {"typer": "cli", "tqdm": "cli", "matplotlib": "plot", "pandas": "frames"}

LOG_FACTORIAL_20 = 42.3356164607535

# Of the self-tests, relative to the largest number in each: some hundred roundings of float64.
TOLERANCE = 1e-11


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: what.
        ok: whether it is as it should be.
        found: what was found.
        advice: what to do, "" where nothing.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """Look at everything, the self-tests last. Nothing is raised: what fails is a check that is not ok."""
    return [_guarded(name, look) for name, look in CHECKS.items()]


def told(checks: list[Check]) -> str:
    """Return the checks as text, one a line, with the advice below those that have any."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name.ljust(width)}  {check.found}")
        if check.advice:
            lines.append(f"      {' ' * width}  -> {check.advice}")
    failed = sum(not check.ok for check in checks)
    lines.append("\nAll is well." if not failed else f"\n{failed} of {len(checks)} checks failed.")
    return "\n".join(lines)


def as_records(checks: list[Check]) -> dict[str, Any]:
    """Return the checks as a JSON value."""
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}


def _guarded(name: str, look: Callable[[], tuple[bool, str, str]]) -> Check:
    try:
        return Check(name, *look())
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}", _advice(error))


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "in blockhess' source folder: pip install --no-build-isolation ."
    return "report it with this whole output"


def _python() -> tuple[bool, str, str]:
    version = platform.python_version()
    ok = sys.version_info >= (3, 10)
    return ok, f"{version} on {platform.platform()}", "" if ok else "Python 3.10 or newer is needed"


def _packages() -> tuple[bool, str, str]:
    import blockhess

    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "scipy")]
    torch_version = tuple(int(part) for part in importlib.metadata.version("torch").split("+")[0].split(".")[:2])
    ok = torch_version >= (2, 10)
    advice = "" if ok else "torch 2.10 or newer is needed: pip install 'torch>=2.10', then build blockhess again"
    return ok, ", ".join([f"blockhess {blockhess.__version__}", *versions]), advice


def _optional() -> tuple[bool, str, str]:
    found, missing = [], []
    for name, extra in OPTIONAL.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append((name, extra))
    extras = sorted({extra for _, extra in missing})
    advice = f'for {", ".join(n for n, _ in missing)}: pip install "blockhess[{",".join(extras)}]"' if missing else ""
    return True, ", ".join(found) or "none", advice


def _compiler() -> tuple[bool, str, str]:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return True, f"none: {compiler!r} is not on PATH", "only building takes one (Debian: apt install g++)"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20)
    return True, done.stdout.splitlines()[0] if done.stdout else compiler, ""


def _extension() -> tuple[bool, str, str]:
    import blockhess_ext

    info = blockhess_ext.build_info()
    return True, ", ".join(f"{key} {value}" for key, value in info.items() if value not in (None, "")), ""


def _cuda() -> tuple[bool, str, str]:
    import torch

    import blockhess_ext

    built = blockhess_ext.build_info()["cuda"]
    if not torch.cuda.is_available():
        return True, f"no GPU is visible; kernels {'for CUDA ' + str(built) if built else 'are not built'}", ""
    device = torch.cuda.get_device_name(0)
    if built:
        return True, f"{device}, kernels for CUDA {built}", ""
    advice = "build again with CUDA_HOME set: BLOCKHESS_CUDA=1 pip install --no-build-isolation ."
    return False, f"{device} is visible, but the extension was built without CUDA", advice


def _terminal() -> tuple[bool, str, str]:
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    return True, encoding, "" if is_utf8 else "other characters are shown as \\x..: export PYTHONUTF8=1"


def _known_operator(device: str) -> tuple[bool, str, str]:
    import torch

    from blockhess_ext import batched_slq

    eigenvalues = torch.arange(1, 21, dtype=torch.float64, device=device)
    q = batched_slq(lambda v: v * eigenvalues, [20], num_probes=4, dtype=torch.float64, device=device)
    largest, logarithm = float(q.nodes.max()), float((q.nodes[0, 0]).log().sum())
    error = max(float((q.nodes - eigenvalues).abs().max()) / 20, abs(logarithm - LOG_FACTORIAL_20) / LOG_FACTORIAL_20)
    return _compared(f"largest eigenvalue {largest:.12g} (20), log-determinant {logarithm:.12g} (42.3356164608)", error)


def _known_network() -> tuple[bool, str, str]:
    import torch
    from torch import nn
    from torch.func import functional_call

    import blockhess

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 1)).double()
    sizes = [p.numel() for p in model.parameters()]
    with torch.no_grad():
        for p, values in zip(model.parameters(), torch.split(torch.linspace(0, 40, sum(sizes)).sin(), sizes)):
            p.copy_(values.view_as(p))
    x = torch.linspace(-2, 2, 32, dtype=torch.float64).cos().view(8, 4)
    batch, loss = (x, x.sum(1, keepdim=True)), nn.MSELoss()
    spectra = blockhess.spectrum(model, batch, loss, num_probes=2, engine="autograd", progress=False)
    error, largest = 0.0, 0.0
    for name, parameter in model.named_parameters():

        def of_block(flat: torch.Tensor, name: str = name, shape: torch.Size = parameter.shape) -> torch.Tensor:
            value: torch.Tensor = loss(functional_call(model, {name: flat.view(shape)}, (x,)), batch[1])
            return value

        flat = parameter.detach().flatten()
        hessian = torch.autograd.functional.hessian(of_block, flat)  # type: ignore[no-untyped-call]
        eigenvalues = torch.linalg.eigvalsh(hessian)
        scale = float(eigenvalues.abs().max())
        block = spectra[name]
        ends = torch.tensor([block.lambda_min, block.lambda_max, block.trace / block.dim], dtype=torch.float64)
        expected = torch.stack([eigenvalues[0], eigenvalues[-1], eigenvalues.mean()])
        # Of blocks that probes estimate, the trace is random.
        exact = spectra.quadrature.is_exact(spectra.names.index(name))
        count = 3 if exact else 2
        error = max(error, float((ends - expected)[:count].abs().max()) / scale)
        largest = max(largest, scale)
    return _compared(f"{len(spectra)} blocks against dense Hessians, largest |eigenvalue| {largest:.9g}", error)


def _compared(text: str, error: float) -> tuple[bool, str, str]:
    ok = math.isfinite(error) and error <= TOLERANCE
    advice = "" if ok else "the kernels compute something else: build again, or report it with this whole output"
    return ok, f"{text}, relative error {error:.1e}", advice


def _known_operator_on_gpu() -> tuple[bool, str, str]:
    import torch

    import blockhess_ext

    if not (torch.cuda.is_available() and blockhess_ext.build_info()["cuda"]):
        return True, "not run: no GPU, or no kernels for it", ""
    return _known_operator("cuda")


CHECKS: dict[str, Callable[[], tuple[bool, str, str]]] = {
    "python": _python,
    "packages": _packages,
    "optional": _optional,
    "compiler": _compiler,
    "extension": _extension,
    "CUDA": _cuda,
    "terminal": _terminal,
    "self-test: operator": lambda: _known_operator("cpu"),
    "self-test: GPU": _known_operator_on_gpu,
    "self-test: network": _known_network,
}
