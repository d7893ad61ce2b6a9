"""Run directories that hold what they should not, or not all that they should."""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import blockhess
from blockhess.results import files
from blockhess.run.status import partial, status
from blockhess.run.storage import directory, store
from tests.crash.scenarios import same_bits
from tests.run.test_job import OPTIONS, given, stopped  # noqa: F401


def test_what_another_process_tries_writing_with_is_no_other_content(given, tmp_path):  # noqa: F811
    """A second process, refused by the lock, must not make the first one fail; nor must one that was killed."""
    (tmp_path / ".0123456789abcdef.tmp").touch()
    expected = blockhess.spectrum(*given, **OPTIONS)
    assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds spectra\.npz"):
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)


def test_work_of_another_run_is_not_taken(given, tmp_path):  # noqa: F811
    """Of another seed, so of other bits, but with the same units."""
    expected = blockhess.spectrum(*given, **OPTIONS)
    stopped(given, tmp_path / "this", 9)
    stopped(given, tmp_path / "other", 9, seed=1)
    for name in ("parts/00000.safetensors", "state.safetensors"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "this" / name)
    with pytest.warns(UserWarning, match="belongs to another run; its work is repeated"):
        assert status(tmp_path / "this").parts == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path / "this", **OPTIONS), expected)


def test_work_without_what_it_belongs_to_is_done_again(given, tmp_path):  # noqa: F811
    stopped(given, tmp_path, 20, seed=1)
    for name in ("run.json", "state.safetensors", "state.safetensors.previous"):
        (tmp_path / name).unlink()
    expected = blockhess.spectrum(*given, **OPTIONS)
    stopped(given, tmp_path, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)


def test_files_that_are_no_parts_are_left_alone(given, tmp_path):  # noqa: F811
    stopped(given, tmp_path, 9)
    for name in (".DS_Store", "notes.txt", ".nfs0001"):
        (tmp_path / "parts" / name).touch()
    assert status(tmp_path).parts == 1 and partial(tmp_path).names
    expected = blockhess.spectrum(*given, **OPTIONS)
    assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)


def test_a_part_whose_vectors_were_damaged_is_computed_again(given, tmp_path):  # noqa: F811
    options = OPTIONS | {"keep_vectors": True}
    expected = blockhess.spectrum(*given, **options)
    stopped(given, tmp_path, 20, keep_vectors=True)
    vectors = tmp_path / "vectors/00000.safetensors"
    vectors.write_bytes(vectors.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"vectors/00000.*its work is repeated"):
        resumed = blockhess.spectrum(*given, run_dir=tmp_path, **options)
    assert same_bits(resumed, expected) and len(resumed.vectors) == len(expected.vectors)
    assert same_bits(
        blockhess.extend(tmp_path, *given, num_steps=9), blockhess.extend(expected, *given, num_steps=9)
    )  # fmt: skip
    assert status(tmp_path).parts == 3

    for file in (tmp_path / "vectors").iterdir():
        file.write_bytes(b"")
    with pytest.warns(UserWarning, match="extend cannot add steps to it"):
        more = blockhess.extend(tmp_path, *given, num_probes=4)
    assert more.quadrature.num_probes == 4
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="num_steps needs the vectors"):
        blockhess.extend(tmp_path, *given, num_steps=9)


def test_a_run_that_is_not_finished_is_told_so(given, tmp_path):  # noqa: F811
    stopped(given, tmp_path, 9)
    with pytest.raises(ValueError, match=r"run must be finished, .* is not; resume it"):
        blockhess.extend(tmp_path, *given, num_probes=5)
    with pytest.raises(ValueError, match=r"run must be finished, .* is not; resume it"):
        blockhess.merge([tmp_path, tmp_path])


def test_a_result_that_the_disk_refuses_is_written_by_the_next_call(given, tmp_path, monkeypatch):  # noqa: F811
    def full(*_: object) -> None:
        raise ValueError("save: cannot write spectra.npz: No space left on device")

    expected = blockhess.spectrum(*given, **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"the run is complete, but .*No space left"):
        patch.setattr(files, "write", full)
        blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS)
    assert not status(tmp_path).finished
    with monkeypatch.context() as patch:
        patch.setattr(directory, "write_part", None)  # no part is left to do
        assert same_bits(blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS), expected)


def test_the_working_directory_may_change(given, tmp_path, monkeypatch):  # noqa: F811
    class Elsewhere(nn.CrossEntropyLoss):
        def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            os.chdir(tmp_path / "elsewhere")
            return super().forward(logits, targets)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    blockhess.spectrum(*given[:2], Elsewhere(), run_dir="run", **OPTIONS)
    assert (tmp_path / "run/spectra.npz").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_integers_of_numpy_are_integers(given, tmp_path):  # noqa: F811
    options = OPTIONS | {"num_probes": np.int64(3)}
    expected = blockhess.spectrum(*given, seed=5, **OPTIONS)
    assert same_bits(blockhess.spectrum(*given, seed=np.int64(5), run_dir=tmp_path, **options), expected)
    assert same_bits(blockhess.spectrum(*given, seed=5, run_dir=tmp_path, **OPTIONS), expected)


def test_an_extension_counts_the_products_that_it_has_to_make(given, tmp_path):  # noqa: F811
    first = blockhess.spectrum(*given, **OPTIONS)
    options = {"num_probes": 4, "memory_budget": OPTIONS["memory_budget"]}  # the same batches
    longer = blockhess.extend(first, *given, **options, run_dir=tmp_path)
    made = longer.provenance["hvps"] - first.provenance["hvps"]
    assert status(tmp_path).hvps == made > 0 and f"{made} of at most {made} products (100.0 %)" in str(status(tmp_path))


def test_a_file_is_extended_too(given, tmp_path):  # noqa: F811
    first = blockhess.spectrum(*given, **OPTIONS)
    first.save(tmp_path / "first.npz")
    assert same_bits(
        blockhess.extend(tmp_path / "first.npz", *given, num_probes=4), blockhess.extend(first, *given, num_probes=4)
    )


def test_an_earlier_directory_is_resumed(given, tmp_path):  # noqa: F811
    """Directories from before names in run.json and in states changed."""
    options = {"tol": 0.01, "keep_vectors": True}
    stopped(given, tmp_path, 9, **options)
    run = store.read_json(tmp_path / "run.json")
    run["identity"]["sigma"] = run["identity"].pop("tol_sigma")
    store.write_json(tmp_path / "run.json", run)
    for path in (tmp_path / "state.safetensors", *(tmp_path / "vectors").iterdir()):
        tensors, header = store.read(path)
        tensors["calm"] = tensors.pop("converged")
        store.write(path, tensors, header)
    expected = blockhess.spectrum(*given, **OPTIONS | options)
    resumed = blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS | options)
    assert same_bits(resumed, expected) and resumed.provenance["same_bits_on_resume"]
    assert same_bits(blockhess.extend(resumed, *given, num_steps=9), blockhess.extend(expected, *given, num_steps=9))


@pytest.mark.parametrize("engine", ["autograd", "traced"])
def test_a_directory_from_before_plans_counted_traces_is_resumed(given, tmp_path, engine):  # noqa: F811
    options = {"engine": engine, "memory_budget": "1 MiB"}
    expected = blockhess.spectrum(*given, **OPTIONS | options)
    stopped(given, tmp_path, 5, **options)
    run = store.read_json(tmp_path / "run.json")
    for name in ("traced", "checked", "check_bytes"):
        del run["plan"][name]
    run["plan"]["compiled"] = False
    store.write_json(tmp_path / "run.json", run)
    resumed = blockhess.spectrum(*given, run_dir=tmp_path, **OPTIONS | options)
    assert torch.equal(resumed.quadrature.nodes, expected.quadrature.nodes) and resumed.blocks == expected.blocks
    assert set(resumed.provenance["hvp_error"]) == set(resumed.names)  # as then, all blocks are checked
