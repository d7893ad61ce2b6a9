"""The examples in docstrings run and give what they show, in a folder that holds results and with names to work on.

An example that shows no output may print anything. What needs files or packages of its own is named in NOT_RUN.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import pkgutil
from typing import Any

import pytest
import torch
from torch import nn

import blockhess
import blockhess_ext
import blockhess_paper
from blockhess.problem.blocks import BlockInfo

NOT_IMPORTED = ("blockhess_ext._C", "blockhess.integrations.lightning", "blockhess.integrations.transformers")


class Shown(doctest.OutputChecker):
    """Compares what is shown, if anything is."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def modules() -> list[str]:
    packages = ((package, f"{package.__name__}.") for package in (blockhess, blockhess_ext, blockhess_paper))
    found = [name for package, prefix in packages for _, name, _ in pkgutil.walk_packages(package.__path__, prefix)]
    return [name for name in found if name not in NOT_IMPORTED]


TESTS = {
    test.name: test
    for name in modules()
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    if test.examples
}
# They need files or packages that are not here, or minutes.
NOT_RUN = {
    "blockhess.cli.demo.run", "blockhess_paper.datasets.image_files.idx_images",
    "blockhess.integrations.checkpoints.spectra_of_checkpoints", "blockhess.integrations.pandas.block_dataframe",
    "blockhess.integrations.pandas.pair_dataframe", "blockhess.integrations.tensorboard.log_spectra",
    "blockhess_paper.datasets.image_files.ImageFolder", "blockhess_paper.datasets.image_files.cifar10",
    "blockhess_paper.datasets.image_files.image_folder", "blockhess_paper.datasets.text_files.TokenFile",
    "blockhess_paper.datasets.text_files.cornell_dialogs", "blockhess_paper.scaled_mlp.table3.js0",
}  # fmt: skip


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What examples take for granted."""
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    batch = torch.randn(32, 4), torch.randint(3, (32,))
    spectra = blockhess.spectrum(model, batch, loss_fn, num_probes=3, num_steps=10)
    later = copy.deepcopy(model)
    loss_fn(later(batch[0]), batch[1]).backward()
    torch.optim.SGD(later.parameters(), 0.1).step()
    trained = blockhess.spectrum(later, batch, loss_fn, num_probes=3, num_steps=10)
    four_blocks = [BlockInfo(name, (1,), 1, (name,)) for name in "abcd"]
    given = {"model": model, "loss_fn": loss_fn, "batch": batch, "spectra": spectra, "trained": trained}
    packages = {"torch": torch, "blockhess": blockhess, "blockhess_ext": blockhess_ext}
    return {**packages, **given, "four_blocks": four_blocks}


@pytest.mark.parametrize("name", sorted(TESTS.keys() - NOT_RUN))
def test_example(name, names, tmp_path, monkeypatch):
    test, told = TESTS[name], []
    monkeypatch.chdir(tmp_path)
    names["spectra"].save("gpt.npz")
    torch.manual_seed(0)
    test.globs = names | {"folder": tmp_path} | test.globs
    runner = doctest.DocTestRunner(Shown(), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    failed, _ = runner.run(test, out=told.append)
    assert not failed, "".join(told)


def test_what_is_not_run_is_there():
    assert TESTS.keys() > NOT_RUN
