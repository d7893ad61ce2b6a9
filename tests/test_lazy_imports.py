"""What `import blockhess` and the commands leave alone until needed, and terminals that cannot show everything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.helpers.spectra_cases import make_spectra

HEAVY = (
    "matplotlib",
    "scipy.special",
    "scipy.fft",
    "scipy.stats",
    "scipy.cluster",
    "transformers",
    "pandas",
    "sympy.core",
    "torch._dynamo",
    "typer",
)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, cwd=ROOT, env=os.environ | environment
    )


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules are loaded after some code beyond what torch itself loads."""
    done = python(
        "import sys, json\nif 'torch' not in sys.argv[1]: import torch\nbefore = set(sys.modules)\n" + code + "\n"
        "print(json.dumps([n for n in json.loads(sys.argv[1]) if n in sys.modules and n not in before]))",
        json.dumps(names),
    )
    assert done.returncode == 0, done.stderr.decode()
    found: list[str] = json.loads(done.stdout)
    return found


def test_import_blockhess_loads_nothing() -> None:
    assert loaded("import blockhess", ("torch", "numpy", *HEAVY)) == []
    assert loaded("import blockhess; blockhess.Spectra", ("torch",)) == ["torch"]  # the check would notice


@pytest.mark.parametrize("used", ["spectrum, blockhess.load, blockhess.Spectra, blockhess.plan, blockhess.extend"])
def test_the_science_loads_nothing_heavy(used: str) -> None:
    assert loaded(f"import blockhess; blockhess.{used}", tuple(n for n in HEAVY if "_dynamo" not in n)) == []


def test_products_by_autograd_do_not_load_what_compiles_models() -> None:
    code = (
        "import torch, blockhess\n"
        "data = torch.randn(4, 3), torch.randn(4, 2)\n"
        "options = {'num_probes': 1, 'num_steps': 2, 'engine': ENGINE, 'progress': False}\n"
        "blockhess.spectrum(torch.nn.Linear(3, 2), data, torch.nn.MSELoss(), **options)"
    )
    assert loaded(code.replace("ENGINE", "'autograd'"), ("torch._dynamo",)) == []
    assert loaded(code.replace("ENGINE", "'traced'"), ("torch._dynamo",)) == ["torch._dynamo"]  # the check would notice


def test_integrations_load_no_tool_of_others() -> None:
    code = "from blockhess.integrations import watch, tensorboard, pandas, scipy; import blockhess.report.html"
    names = ("matplotlib", "transformers", "pandas", "lightning", "pytorch_lightning", "tensorboard")
    assert loaded(code, names) == []


COMMAND = "import sys; from blockhess.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_help_loads_nothing_heavy() -> None:
    code = "import sys\nfrom blockhess.cli.main import main\nmain(['--help'])\nheavy = sys.argv[1].split(',')\n"
    done = python(code + "sys.exit(any(name in sys.modules for name in heavy))", "torch,numpy,scipy,matplotlib,rich")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("latin-1", ["größe".encode("latin-1"), b"\\u0416"]),
        pytest.param("utf-8", ["größe".encode(), "Ж".encode(), b"\\ud800"], marks=pytest.mark.slow),
    ],
)
def test_any_terminal_can_be_told_any_name(encoding: str, shown: list[bytes], tmp_path: Path) -> None:
    names = ["größe", "Ж\ud800"]
    path = make_spectra([[[1.0, 2.0], [1.0, 3.0]]], [[[0.5, 0.5]] * 2], names=names).save(tmp_path / "names.npz")
    done = python(COMMAND, "show", str(path), PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    assert all(text in done.stdout for text in shown)
