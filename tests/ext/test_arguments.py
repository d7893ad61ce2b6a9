"""Invalid arguments of batched_slq raise one error that names the argument and its value."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext import batched_slq


def identity(v: torch.Tensor) -> torch.Tensor:
    return v


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dims": []}, ValueError, "dims must have at least one entry, got none"),
        ({"dims": [3, 0]}, ValueError, r"dims\[1\] must be an integer at least 1, got 0"),
        ({"dims": [2.5]}, TypeError, r"dims\[0\] must be an integer at least 1, got 2.5"),
        ({"dims": 7}, TypeError, "dims must be a sequence of integers, got 7"),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer at least 1, got 0"),
        ({"num_steps": True}, ValueError, "num_steps must be an integer at least 1, got True"),
        ({"num_probes": -1}, ValueError, "num_probes must be an integer at least 1, got -1"),
        ({"seed": -1}, ValueError, "seed must be an integer in 0"),
        ({"seed": "x"}, TypeError, "seed must be an integer in 0 ... 9223372036854775807, got 'x'"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of .*, got torch.float16"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of gaussian, rademacher, got 'cauchy'"),
        (
            {"reorthogonalize": "partly"},
            ValueError,
            "reorthogonalize must be one of none, full, partial, auto, got 'partly'",
        ),
        ({"reorthogonalize": ["full"]}, ValueError, "reorthogonalize must have n_blocks = 2 entries, got 1"),
        (
            {"reorthogonalize": ["full", "auto"]},
            ValueError,
            r"reorthogonalize\[1\] must be one of none, full, partial, got",
        ),
        ({"first_probe": -1}, ValueError, "first_probe must be an integer at least 0, got -1"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of raise, mark, got 'ignore'"),
        ({"hvp": None}, TypeError, "hvp must be a function, got None"),
        ({"device": "foo"}, ValueError, "device must be cpu or cuda, got 'foo'"),
        ({"check": 1}, ValueError, "check must be one of True, False, None, got 1"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph must be one of True, False, got 'yes'"),
        (
            {"cuda_graph": True},
            ValueError,
            "cuda_graph must be False unless device is a CUDA device, got device cpu",
        ),
        ({"block_ids": 5}, TypeError, "block_ids must be a sequence of integers, got 5"),
        ({"block_ids": [1]}, ValueError, "block_ids must have n_blocks = 2 entries, got 1"),
        ({"block_ids": [1, -2]}, ValueError, r"block_ids\[1\] must be an integer in 0"),
        ({"device": "meta"}, ValueError, "device must be cpu or cuda, got meta"),
        ({"probes": [1.0]}, TypeError, "probes must be a tensor, got list"),
        ({"probes": torch.ones(2, 4)}, ValueError, r"probes must have shape .* = \(n_probes, 5\), got \(2, 4\)"),
        ({"probes": torch.ones(2, 5).half()}, ValueError, "dtype of probes must be one of"),
        ({"probes": torch.tensor([[1.0, 1, 1, 0, 0]])}, ValueError, "got largest magnitude 0.0 in block 1 of probe 0"),
        ({"probes": torch.ones(1, 5), "dtype": torch.float64}, ValueError, "dtype must be that of probes"),
        ({"probes": torch.ones(1, 5).to("meta"), "device": "cpu"}, ValueError, "device must be that of probes, meta"),
        ({"hvp": lambda v: v[:, :-1]}, ValueError, r"must return shape \(n_probes, n\) = \(10, 5\), got \(10, 4\)"),
        ({"hvp": lambda v: v.double()}, ValueError, "must return dtype torch.float32, got torch.float64"),
        ({"hvp": lambda v: v.to("meta")}, ValueError, "must return device cpu, got meta"),
        ({"hvp": lambda v: v.mul_(3)}, ValueError, "hvp must not change its argument in place"),
        ({"hvp": lambda v: v.long()}, ValueError, "must return dtype torch.float32, got torch.int64"),
        ({"hvp": lambda v: v.numpy()}, TypeError, "must return a tensor, got ndarray"),
        (
            {"hvp": lambda v: torch.nested.as_nested_tensor(list(v), layout=torch.jagged)},
            TypeError,
            "must return a tensor, got a nested tensor",
        ),
        ({"hvp": lambda v: v.to_sparse()}, ValueError, "must return layout torch.strided, got torch.sparse_coo"),
        ({"hvp": lambda v: None}, TypeError, "must return a tensor, got NoneType"),
    ],
)
def test_bad_input_is_one_clear_error(options, error, text):
    options = {"hvp": identity, "dims": [3, 2], **options}
    with pytest.raises(error, match=text) as caught:
        batched_slq(**options)
    assert str(caught.value).startswith("batched_slq: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tol": 0.0}, ValueError, r"tol must be above 0 and at most 1 .*, got 0.0"),
        ({"tol": -1}, ValueError, r"tol must be above 0 and at most 1 .*, got -1"),
        (
            {"tol": math.nan},
            ValueError,
            r"tol must be above 0 and at most 1 .*, got nan",
        ),
        (
            {"tol": math.inf},
            ValueError,
            r"tol must be above 0 and at most 1 .*, got inf",
        ),
        ({"tol": "small"}, TypeError, "tol must be None or a number above 0 and at most 1, got 'small'"),
        ({"tol": 0.1, "sigma": 0.0}, ValueError, "sigma must be above 0 and at most 1 .*, got 0.0"),
        ({"tol": 0.1, "sigma": 1.5}, ValueError, r"sigma must be .* \(a fraction of the spectral range\), got 1.5"),
        ({"tol": 1.5}, ValueError, "tol must be above 0 and at most 1 .*, got 1.5"),
        ({"tol": 2.5, "sigma": 0.1}, ValueError, r"tol must be above 0 and at most 2 \(an L1 distance of densities\)"),
        ({"sigma": 0.1}, ValueError, "tol must be given with sigma, got sigma=0.1 alone"),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=f"batched_slq: {text}"):
        batched_slq(lambda v: v, [3], **options)
