"""Build blockhess with CUDA and run all checks and measurements on a GPU, each step with a time limit.

    python -m bench.gpu OUT_DIR [--quick] [--seconds N] [--dry-run [--reuse-build]]

Run by bench/run_gpu.sh in a copy of the sources. After a failed step the next ones run. OUT_DIR gets results.json and
logs.tar.gz, written anew every few seconds, and at the end results.md. The exit code is 1 if a step failed.

Only the standard library is imported here and in bench/harness/files.py, since nothing is built yet.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.files import write_whole

CUDA_TOOLS = ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")
# Step -> seconds of a full run and of a quick one; versions and ceilings run beside the build. A step is ended when its
# seconds and those of all steps before it have passed, so it takes none from a later one, and what is left passes on.
SECONDS = {
    "build": (150, 75),
    "tests": (70, 25),
    "ops": (50, 12),
    "nano": (65, 12),
    "gpt2": (95, 10),
    "resnet": (25, 8),
    "reliability": (20, 8),
    "memcheck": (25, 10),
    "racecheck": (30, 12),
    "ncu": (20, 8),
}
GROUPS = ("ops", "nano", "gpt2", "resnet", "reliability")
KERNELS = "^(residual|coefficient|quadrature)_kernel$"
LAUNCHES = 4  # of these in bench.gpu.profile_case: 1, 2 and 1
STUBS = Path(__file__).parent / "stubs"  # of CUDA's tools, for a dry run
SAVED_EVERY = 5.0  # seconds
REPORT = 25.0  # seconds for the tables, after all steps
PR_SET_PDEATHSIG = 1
# Runs a command, and kills its process group when the other end of stdin is closed, as it is at any end of the driver.
WATCHED = 'exec 3<&0 </dev/null; ({ read -r _ <&3; kill -KILL 0; } & ); exec 3<&-; exec "$@"'


@dataclass
class Driver:
    """Runs steps and records their outcome.

    Attributes:
        out: folder of the results.
        scale: factor of SECONDS.
        settings: environment variables of all steps.
        until: time.monotonic() at which the present step is ended.
    """

    out: Path
    dry: bool
    size: str
    scale: float
    settings: dict[str, str]
    until: float = field(default_factory=time.monotonic)
    logs: Path = Path("gpu_logs")
    results: dict[str, Any] = field(default_factory=dict)
    started: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.logs.mkdir(exist_ok=True)
        self.results = {"size": self.size, "environment": {}, "limits": {}, "steps": {}, "rows": {}}

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def allow(self, name: str) -> None:
        """Add the seconds of a step to those of the steps before it."""
        self.until += self.scale * SECONDS[name][self.size == "quick"]

    def start(self, name: str, command: list[str], **settings: str) -> Step:
        return Step(self, name, command, {**self.settings, **settings})

    def run(self, name: str, command: list[str], **settings: str) -> bool:
        """Run a step to its end or its limit; return whether it passed."""
        return self.start(name, command, **settings).finish()

    def record(self, name: str, outcome: str, seconds: float) -> None:
        self.results["steps"][name] = {"outcome": outcome, "seconds": seconds}
        print(f"{name:<22} {outcome}, {seconds:.0f} s", flush=True)
        self.save()

    def save(self) -> None:
        """Write results.json, with what the steps so far have written, and logs.tar.gz."""
        measured = self.logs / "ceilings.json"
        if measured.exists():
            self.results.update(json.loads(measured.read_text()))
        for group in GROUPS:
            part = self.logs / f"{group}.json"
            if part.exists():
                self.results["rows"].update(json.loads(part.read_text())["rows"])
        write_whole(self.out / "results.json", lambda path: path.write_text(json.dumps(self.results, indent=1) + "\n"))
        write_whole(self.out / "logs.tar.gz", self.archive)

    def archive(self, path: Path) -> None:
        with tarfile.open(path, "w:gz") as archive:
            archive.add(self.logs, "logs")


class Step:
    """A process that writes to a log of its own, in a process group of its own."""

    def __init__(self, driver: Driver, name: str, command: list[str], settings: dict[str, str]) -> None:
        self.driver, self.name, self.begin = driver, name, time.monotonic()
        driver.started.append(self)
        with open(driver.logs / f"{name}.log", "wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", WATCHED, name, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **settings},
                start_new_session=True,
            )

    def finish(self, failure: str = "FAILED") -> bool:
        """Wait for the process until the driver's limit; record and return whether it passed."""
        code = self.wait(self.driver.until)
        self.end()
        outcome = "ok" if code == 0 else f"{failure} ({code}), see {self.name}.log"
        self.driver.record(self.name, outcome, time.monotonic() - self.begin)
        return code == 0

    def wait(self, until: float) -> int | str:
        """Return the exit code, or that the process was killed at time `until`; save what it writes meanwhile."""
        while True:
            left = until - time.monotonic()
            try:
                return self.process.wait(min(SAVED_EVERY, max(0.1, left)))
            except subprocess.TimeoutExpired:
                self.driver.save()
            if time.monotonic() >= until:
                return f"exceeded {time.monotonic() - self.begin:.0f} s"

    def end(self) -> None:
        """Kill what is left of the process and its children; one that the device's driver holds is left behind."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


def cuda_home() -> str | None:
    """Return a CUDA toolkit with headers; nvcc on PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    beside = Path(nvcc).resolve().parents[1] if nvcc else None
    for folder in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda", beside):
        if folder and (Path(folder) / "include/cuda_runtime.h").exists():
            return str(folder)
    return None


def tool(name: str, home: str | None) -> str | None:
    """Return the path of a program on PATH or in the toolkit."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([f"{home}/bin", f"{home}/compute-sanitizer"]))


def build(driver: Driver, root: Path, reuse: bool) -> Step:
    """Start the build for the architecture of the device, or the copy of an existing one."""
    if reuse:
        files = list(map(str, (root / "blockhess_ext").glob("_C*.so")))
        return driver.start("build", ["cp", *files, "blockhess_ext/"])
    settings = {"BLOCKHESS_CUDA": "0" if driver.dry else "1", "MAX_JOBS": str(os.cpu_count() or 1)}
    if not driver.dry and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        ask = "import torch; print('%d.%d' % torch.cuda.get_device_capability())"
        with contextlib.suppress(subprocess.SubprocessError):  # else the build is for all architectures of setup.py
            found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=60, check=True)
            settings["TORCH_CUDA_ARCH_LIST"] = found.stdout.strip()
    return driver.start("build", [sys.executable, "setup.py", "build_ext", "--inplace"], **settings)


def tests(driver: Driver) -> None:
    """Run tests/gpu, every file in a process of its own on a GPU."""
    driver.allow("tests")
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    if driver.dry:
        one_dtype = ["-k", "not (test_products and float64)"]
        driver.run("tests", [*pytest, *one_dtype, "tests/gpu"], BLOCKHESS_TEST_DEVICE="cpu")
        return
    files = sorted(map(str, Path("tests/gpu").glob("test_*.py")))
    steps = [driver.start(Path(file).stem, [*pytest, file], BLOCKHESS_REQUIRE_GPU="1") for file in files]
    for step in steps:
        step.finish()


def rows(driver: Driver, where: list[str], limits: str) -> None:
    """Measure the groups of rows, each in a process of its own on a GPU."""
    for groups in [GROUPS] if driver.dry else [(group,) for group in GROUPS]:
        for group in groups:
            driver.allow(group)
        command = [sys.executable, "-m", "bench.gpu.rows", *groups, "--out", str(driver.logs), *where]
        command += ["--seconds", f"{driver.until - time.monotonic():.0f}", "--limits", limits]
        # cuBLAS is deterministic then, which a job that is resumed needs.
        extra = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if groups == ("reliability",) else {}
        driver.run("rows" if driver.dry else groups[0], command, **extra)


def sanitizers(driver: Driver, home: str | None, where: list[str]) -> None:
    """Run all ops on small batches under compute-sanitizer, and three kernels on large ones under ncu."""
    case = [sys.executable, "-m", "tests.gpu.sanitizer_case", *(["--cpu"] if driver.dry else [])]
    sanitizer, profiler = tool("compute-sanitizer", home), tool("ncu", home)
    for check in ("memcheck", "racecheck"):
        driver.allow(check)
        if sanitizer is None:
            driver.record(check, "skipped: no compute-sanitizer", 0.0)
            continue
        command = [sanitizer, "--tool", check, "--error-exitcode", "86", *case]
        driver.run(check, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    driver.allow("ncu")
    if profiler is None:
        driver.record("ncu", "skipped: no ncu", 0.0)
        return
    chosen = ["--kernel-name", f"regex:{KERNELS}", "--launch-count", str(LAUNCHES)]
    chosen += ["--section", "SpeedOfLight", "--section", "Occupancy", "--clock-control", "none"]
    profiled = [sys.executable, "-m", "bench.gpu.profile_case", *where]
    # Profiling may need a permission that the device does not give: that is no failure of blockhess.
    driver.start("ncu", [profiler, *chosen, *profiled]).finish("FAILED" if driver.dry else "not available")


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/run_gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--quick", action="store_true", help="the same in three minutes; targets are not judged")
    parser.add_argument("--seconds", type=float, help="end after so many seconds; default 550, or 180 with --quick")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to check this script")
    parser.add_argument("--reuse-build", action="store_true", help="of the checkout; for --dry-run")
    options = parser.parse_args()
    if options.reuse_build and not options.dry_run:
        parser.error("--reuse-build needs --dry-run")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # also when the script that started this is killed
    begin, root = time.monotonic(), Path(os.environ.get("BLOCKHESS_SOURCE", "."))
    options.out.mkdir(parents=True, exist_ok=True)
    home = cuda_home()
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
    settings |= {"CUDA_HOME": home} if home else {}
    settings |= {"CUDA_VISIBLE_DEVICES": ""} if options.dry_run else {}
    size = "tiny" if options.dry_run else "quick" if options.quick else "full"
    scale = 6.0 if options.dry_run else 1.0  # a CPU may be busy with other programs
    if options.seconds:
        scale = options.seconds / sum(limits[size == "quick"] for limits in SECONDS.values())
    if options.dry_run:
        os.environ["PATH"] = f"{STUBS.resolve()}{os.pathsep}{os.environ['PATH']}"
    driver = Driver(options.out, options.dry_run, size, scale, settings)
    found = {name: tool(name, home) for name in CUDA_TOOLS}
    print(f"blockhess {os.environ.get('BLOCKHESS_COMMIT', 'unknown')}, CUDA_HOME {home}, {found}", flush=True)
    if options.dry_run:
        print("dry run on the CPU: nothing here is proven on hardware", flush=True)
    driver.results["tools"] = {"CUDA_HOME": home, **found}

    # The outcome is that of the last command, which needs no tool.
    ask = "import sys, torch; print(sys.version, torch.__version__, torch.version.cuda); print(torch.__config__.show())"
    atexit.register(lambda: [step.end() for step in driver.started])
    versions = f"nvidia-smi; nvcc --version; exec '{sys.executable}' -c '{ask}'"
    driver.allow("build")
    building = build(driver, root, options.reuse_build)
    where = ["--device", driver.device, "--size", size]
    limits = str(driver.logs / "ceilings.json")
    measuring = driver.start("ceilings", [sys.executable, "-m", "bench.gpu.ceilings", "--out", limits, *where])
    driver.run("versions", ["bash", "-c", versions])
    measuring.finish()
    built = building.finish()
    if built:
        tests(driver)
        rows(driver, where, limits)
        sanitizers(driver, home, where)
    else:
        for name in ("tests", *GROUPS, "memcheck"):
            driver.record(name, "FAILED: needs the build", 0.0)
    driver.save()
    if built:
        command = [sys.executable, "-m", "bench.gpu.report", str(options.out / "results.json")]
        with contextlib.suppress(subprocess.TimeoutExpired):
            table = subprocess.run(
                command,
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
                timeout=REPORT * max(1.0, scale),
            )
            (options.out / "results.md").write_text(table.stdout or table.stderr)
            print(f"\n{table.stdout or table.stderr}")
    failed = [name for name, step in driver.results["steps"].items() if step["outcome"].startswith("FAILED")]
    said = f"STEPS FAILED: {', '.join(failed)}" if failed else "all steps passed"
    print(f"{said}, in {time.monotonic() - begin:.0f} s; results in {options.out}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
