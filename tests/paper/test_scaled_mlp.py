"""The scaled MLP: batched training against torch.optim, idx files, JS0 in every definition."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from blockhess_paper.datasets.image_files import idx_images
from blockhess_paper.scaled_mlp.mlp import (
    BATCH_SIZE,
    Images,
    batched_parameters,
    load_images,
    logits,
    scaled_mlp,
    train,
)
from blockhess_paper.scaled_mlp.table3 import DEFINITIONS, PAPER, distance_to_paper, js0, layer_spectra


@pytest.fixture(scope="module")
def images() -> Images:
    return load_images()


def test_batched_logits_are_those_of_each_mlp(images):
    x = images.train[0][:5]
    scales = torch.tensor([1.0, 3.0])[:, None, None]
    found = logits(batched_parameters(2, 4, images.train[0].device), scales, x)
    for k, scale in enumerate((1.0, 3.0)):
        torch.testing.assert_close(found[k], scaled_mlp(scale, seed=4)(x), rtol=1e-4, atol=1e-5)


def test_scaling_layers_scales_weights():
    """relu(c (W x + b)) is the plain network with c W and c b."""
    scaled, plain = scaled_mlp(2.0, seed=0), scaled_mlp(1.0, seed=0)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(2)
    x = torch.randn(3, 784)
    torch.testing.assert_close(scaled(x), plain(x))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_training_is_torch_optim(images, optimizer):
    """Accuracies on 128 images of its own batch order, model by model."""
    small = Images((images.train[0][:BATCH_SIZE], images.train[1][:BATCH_SIZE]), images.test, "one batch")
    found = train(small, [1.0, 2.0], [1e-3, 1e-2], optimizer, num_steps=6, points=3, seed=2)
    assert found.steps.tolist() == [2, 4, 6]
    for i, scale in enumerate((1.0, 2.0)):
        for j, rate in enumerate((1e-3, 1e-2)):
            model = scaled_mlp(scale, seed=2)
            options = {"momentum": 0.9} if optimizer == "SGD" else {}
            steps = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **options)
            accuracy = []
            for step in range(1, 7):
                steps.zero_grad()
                nn.functional.cross_entropy(model(small.train[0]), small.train[1]).backward()
                steps.step()
                if step % 2 == 0:
                    accuracy.append((model(images.test[0]).argmax(1) == images.test[1]).double().mean().item())
            # A tie or two may fall the other way by rounding.
            assert found.accuracy[i, j].tolist() == pytest.approx(accuracy, abs=5 / 1024)
    assert not torch.equal(found.accuracy[0, 0], found.accuracy[1, 1])


def test_diverged_models_are_marked_and_leave_the_others_alone(images):
    found = train(images, [1.0], [1e-2, 1e30], "SGD", num_steps=4, points=1)
    assert found.diverged.tolist() == [[False, True]] and found.accuracy[0, 1, 0] == 0
    alone = train(images, [1.0], [1e-2], "SGD", num_steps=4, points=1)
    assert found.accuracy[0, 0, 0].item() == pytest.approx(alone.accuracy[0, 0, 0].item(), abs=5 / 1024)


def test_bad_training(images):
    with pytest.raises(ValueError, match='optimizer must be "SGD" or "Adam"'):
        train(images, [1.0], [1e-3], "LBFGS", num_steps=1)
    few = Images((images.train[0][:5], images.train[1][:5]), images.test, "few")
    with pytest.raises(ValueError, match="at least 128, got 1, 1 and 5"):
        train(few, [1.0], [1e-3], "SGD", num_steps=1, points=1)


def write_idx(path: Path, array: np.ndarray, packed: bool = False) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for stem, count, packed in (("train", 6, True), ("t10k", 4, False)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", pixels, packed)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8), packed)
    return tmp_path


def test_idx_files(idx_folder):
    images, labels = idx_images(idx_folder)
    assert images.shape == (6, 1, 28, 28) and labels.tolist() == list(range(6))
    assert abs(images.mean().item()) < 1e-5 and images.std().item() == pytest.approx(1, abs=1e-5)
    loaded = load_images(idx_folder)
    assert loaded.test[0].shape == (4, 784) and loaded.name == str(idx_folder)


def test_broken_idx_files(idx_folder):
    with pytest.raises(ValueError, match="cannot read"):
        idx_images(idx_folder / "nowhere")
    with pytest.raises(ValueError, match="split"):
        idx_images(idx_folder, split="valid")
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match="idx file of bytes with 1 dimensions"):
        idx_images(idx_folder, split="test")
    write_idx(labels, np.arange(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="got 4 and 3"):
        idx_images(idx_folder, split="test")
    labels.write_bytes(b"")
    with pytest.raises(ValueError, match="idx file"):
        idx_images(idx_folder, split="test")
    write_idx(idx_folder / "t10k-images-idx3-ubyte", np.zeros((3, 5, 5), np.uint8))
    write_idx(labels, np.arange(3, dtype=np.uint8))
    with pytest.raises(ValueError, match="784 pixels"):
        load_images(idx_folder)


def test_js0_is_finite_in_every_definition_for_extreme_scales(images):
    batch = images.train[0][:32], images.train[1][:32]
    for scale in (1, 15):
        spectra = layer_spectra(scale, batch, num_probes=1, num_steps=5, seed=0)
        assert spectra.names == ("layer 1", "layer 2", "layer 3", "layer 4")
        assert spectra.dims == (784 * 300 + 300, 300 * 128 + 128, 128 * 64 + 64, 64 * 10 + 10)
        for definition in DEFINITIONS:
            assert 0 <= js0(spectra, definition) < np.inf


def test_js0_without_normalization_is_that_of_the_spectra(images):
    spectra = layer_spectra(1, (images.train[0][:32], images.train[1][:32]), num_probes=1, num_steps=5, seed=0)
    assert js0(spectra, ("divergence", "none", None)) == pytest.approx(
        spectra.js0(kind="divergence", axis="linear").value * np.log(2), rel=1e-9
    )


def test_distance_to_paper():
    assert distance_to_paper(PAPER) == (1.0, 1.0, 1.0)
    assert distance_to_paper([10 * value for value in PAPER]) == (10.0, 1.0, 1.0)
    assert distance_to_paper(PAPER[::-1])[2] == -1.0
    assert distance_to_paper([1.0] * 8)[2] == 0.0
