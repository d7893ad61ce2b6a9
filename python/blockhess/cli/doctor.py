"""`blockhess doctor`: what is installed, whether the extension computes known eigenvalues, and what to do if not.

diag(1 ... 20), all Krylov steps     nodes 1 ... 20, trace 210, log-determinant log 20! = 42.3356164607535
a network of 63 parameters           extreme nodes of every block equal the extreme eigenvalues of its dense Hessian
one traced product of it             v^T H v equals that of autograd on the CPU

On a GPU all three are made there, too.
"""

from __future__ import annotations

import functools
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

from blockhess._text import printable
from blockhess._version import __version__

# Optional package -> the extra that installs it.
OPTIONAL = {"typer": "cli", "tqdm": "cli", "matplotlib": "plot", "pandas": "frames"}
LOG_FACTORIAL_20 = 42.3356164607535
# Largest relative error of a self-test: some hundred roundings in float64.
TOLERANCE = 1e-11

Outcome = tuple[bool, str, str]  # ok, found, advice: see Check


@dataclass(frozen=True)
class Check:
    """One check of the installation."""

    name: str
    ok: bool  # whether it passed
    found: str
    advice: str = ""  # what to do


def examine(device: str | None = None) -> list[Check]:
    """Run all checks, the self-tests last. Exceptions become failed checks.

    Args:
        device: device of the last self-tests; None means the GPU, if there is one.
    """
    checks = dict(CHECKS)
    for name, test in ON_DEVICE.items():
        checks[name] = functools.partial(_on_device, test, device)
    return [_guarded(name, check) for name, check in checks.items()]


def format_checks(checks: list[Check]) -> str:
    """Return the checks as text, one per line, each followed by its advice."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name.ljust(width)}  {printable(check.found)}")
        if check.advice:
            lines.append(f"      {' ' * width}  -> {check.advice}")
    failed = sum(not check.ok for check in checks)
    return "\n".join([*lines, "", f"{failed} of {len(checks)} checks failed." if failed else "All checks passed."])


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """Return the checks as a JSON value."""
    return {"ok": all(check.ok for check in checks), "checks": [asdict(check) for check in checks]}


def _guarded(name: str, check: Callable[[], Outcome]) -> Check:
    try:
        return Check(name, *check())
    except Exception as error:
        advice = "report it with this whole output"
        if isinstance(error, ImportError):
            advice = "in blockhess' source folder: pip install --no-build-isolation ."
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}", advice)


def _python() -> Outcome:
    ok = sys.version_info >= (3, 10)
    found = f"{platform.python_version()} on {platform.platform()}"
    return ok, found, "" if ok else "Python 3.10 or newer is needed"


def _packages() -> Outcome:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy")}
    ok = tuple(int(part) for part in versions["torch"].split("+")[0].split(".")[:2]) >= (2, 10)
    advice = "" if ok else "torch 2.10 or newer is needed: pip install 'torch>=2.10'"
    versions = {"blockhess": __version__, **versions}
    return ok, ", ".join(f"{name} {version}" for name, version in versions.items()), advice


def _optional() -> Outcome:
    found, missing = [], {}
    for name, extra in OPTIONAL.items():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing[name] = extra
    extras = ",".join(sorted(set(missing.values())))
    advice = f'for {", ".join(missing)}: pip install "blockhess[{extras}]"' if missing else ""
    return True, ", ".join(found) or "none", advice


def _compiler() -> Outcome:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return True, f"none: {compiler!r} is not on PATH", "only building needs one (Debian: apt install g++)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout
    return True, version.splitlines()[0] if version else compiler, ""


def _extension() -> Outcome:
    import blockhess_ext

    info = blockhess_ext.build_info()
    return True, ", ".join(f"{key} {value}" for key, value in info.items() if value not in (None, "")), ""


def _cuda() -> Outcome:
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


def _terminal() -> Outcome:
    encoding = getattr(sys.stdout, "encoding", None) or "unknown"
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    return True, encoding, "" if is_utf8 else "characters it lacks are printed as \\x..: export PYTHONUTF8=1"


def _on_device(test: Callable[[str], Outcome], device: str | None) -> Outcome:
    import torch

    import blockhess_ext

    if device is None and not (torch.cuda.is_available() and blockhess_ext.build_info()["cuda"]):
        return True, "not run: no GPU, or no kernels for it", ""
    return test(device or "cuda")


def _known_operator(device: str) -> Outcome:
    import torch

    import blockhess_ext

    eigenvalues = torch.arange(1, 21, dtype=torch.float64, device=device)
    q = blockhess_ext.batched_slq(lambda v: v * eigenvalues, [20], num_probes=4, dtype=torch.float64, device=device)
    largest, logarithm = float(q.nodes.max()), float((q.nodes[0, 0]).log().sum())
    error = max(float((q.nodes - eigenvalues).abs().max()) / 20, abs(logarithm - LOG_FACTORIAL_20) / LOG_FACTORIAL_20)
    return _compared(f"largest eigenvalue {largest:.12g} (20), log-determinant {logarithm:.12g} (42.3356164608)", error)


def _network(device: str) -> dict[str, Any]:
    """Return a small network in float64 on a device, its data and loss, as arguments of `spectrum`."""
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 1)).double()
    sizes = [p.numel() for p in model.parameters()]
    with torch.no_grad():
        for p, values in zip(
            model.parameters(), torch.split(torch.linspace(0, 40, sum(sizes), device="cpu").sin(), sizes)
        ):
            p.copy_(values.view_as(p))
    x = torch.linspace(-2, 2, 32, dtype=torch.float64, device="cpu").cos().view(8, 4)
    batch = x.to(device), x.sum(1, keepdim=True).to(device)
    return {"model": model.to(device), "data": batch, "loss_fn": nn.MSELoss(), "progress": False, "seed": 0}


def _known_product(device: str) -> Outcome:
    import blockhess

    moments = []
    for engine, where in (("traced", device), ("autograd", "cpu")):
        spectra = blockhess.spectrum(**_network(where), engine=engine, num_probes=1, num_steps=1)
        moments.append(spectra.quadrature.alpha[0, :, 0].cpu())
    error = float((moments[0] - moments[1]).abs().max() / moments[1].abs().max())
    return _compared(f"v^T H v of {len(moments[0])} blocks on {device} against autograd on the CPU", error)


def _known_network(device: str) -> Outcome:
    import torch
    from torch.func import functional_call

    import blockhess

    spectra = blockhess.spectrum(**_network(device), num_probes=2, engine="autograd" if device == "cpu" else "traced")
    of_cpu = _network("cpu")
    model, (x, y), loss = of_cpu["model"], of_cpu["data"], of_cpu["loss_fn"]
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradient = torch.func.grad(lambda p: loss(functional_call(model, p, (x,)), y))
    hessian = torch.func.jacrev(gradient)(parameters)
    error, largest = 0.0, 0.0
    for number, (name, dim) in enumerate(zip(spectra.names, spectra.dims)):
        eigenvalues = torch.linalg.eigvalsh(hessian[name][name].reshape(dim, dim))
        scale = float(eigenvalues.abs().max())
        block = spectra[name]
        found = torch.tensor([block.lambda_min, block.lambda_max, block.trace / dim], dtype=torch.float64, device="cpu")
        expected = torch.stack([eigenvalues[0], eigenvalues[-1], eigenvalues.mean()])
        count = 3 if spectra.quadrature.is_exact(number) else 2  # the trace of an estimated block is random
        error = max(error, float((found - expected)[:count].abs().max()) / scale)
        largest = max(largest, scale)
    return _compared(f"{len(spectra)} blocks against dense Hessians, largest |eigenvalue| {largest:.9g}", error)


def _compared(text: str, error: float) -> Outcome:
    ok = math.isfinite(error) and error <= TOLERANCE
    advice = "" if ok else "the kernels return wrong numbers: build again, or report it with this whole output"
    return ok, f"{text}, relative error {error:.1e}", advice


CHECKS: dict[str, Callable[[], Outcome]] = {
    "python": _python,
    "packages": _packages,
    "optional": _optional,
    "compiler": _compiler,
    "extension": _extension,
    "CUDA": _cuda,
    "terminal": _terminal,
    "self-test: operator": lambda: _known_operator("cpu"),
    "self-test: product": lambda: _known_product("cpu"),
    "self-test: network": lambda: _known_network("cpu"),
}
ON_DEVICE: dict[str, Callable[[str], Outcome]] = {
    "on the device: operator": _known_operator,
    "on the device: product": _known_product,
    "on the device: network": _known_network,
}
