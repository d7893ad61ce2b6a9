"""The shipped data: what it is, batches as pure functions of their arguments, bad requests."""

from __future__ import annotations

import pytest
import torch

from blockhess.datasets import CharText, fashion_mnist, shakespeare


def test_shakespeare_is_the_text_it_says() -> None:
    text = shakespeare()
    assert len(text.vocabulary) == 76
    assert len(text.tokens) == 1_036_489
    assert text.decode(text.tokens[:25]) == "HAMLET, PRINCE OF DENMARK"


def test_batches_are_windows_of_the_text_with_shifted_targets() -> None:
    text = CharText("abcdefghijklmnopqrstuvwxyz")
    [(x, y), _] = text.batches(2, batch_size=5, context=10)
    assert x.shape == y.shape == (5, 10)
    assert x.dtype == y.dtype == torch.int64
    # Here the vocabulary index is the position in the text.
    assert (x[:, 1:] == x[:, :-1] + 1).all()
    assert (y == x + 1).all()


def test_batches_depend_on_the_seed_alone() -> None:
    text = shakespeare()
    torch.manual_seed(1)
    first = text.batches(2, seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = text.batches(2, seed=3)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], text.batches(seed=4)[0][0])
    torch.manual_seed(1)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_longest_window_uses_the_whole_text() -> None:
    [(x, y)] = CharText("abcd").batches(batch_size=1, context=3)
    assert x.tolist() == [[0, 1, 2]]
    assert y.tolist() == [[1, 2, 3]]


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="context must be below the text's length 4, got 4"):
        CharText("abcd").batches(context=4)


@pytest.mark.parametrize("name", ["num_batches", "batch_size", "context"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"CharText.batches: {name} must be at least 1, got 0"):
        CharText("abcd").batches(**{name: 0})


def test_empty_text_and_unknown_characters_are_refused() -> None:
    with pytest.raises(ValueError, match="CharText: text must not be empty"):
        CharText("")
    with pytest.raises(ValueError, match="must be in the vocabulary, got 'z'"):
        CharText("abc").encode("abz")


@pytest.mark.parametrize("split, total", [("train", 4096), ("test", 1024)])
def test_fashion_mnist_is_normalized(split: str, total: int) -> None:
    images, labels = fashion_mnist(split=split)
    assert images.shape == (total, 1, 28, 28) and images.dtype == torch.float32
    assert labels.shape == (total,) and labels.dtype == torch.int64
    assert set(labels.tolist()) == set(range(10))
    # Pixels 0 and 255 both occur.
    assert images.min().item() == pytest.approx((0 - 0.2860) / 0.3530, abs=1e-6)
    assert images.max().item() == pytest.approx((1 - 0.2860) / 0.3530, abs=1e-6)
    # The constants are of all 60,000 images; a part of 1,024 differs by about 1 %.
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02


def test_fashion_mnist_gives_the_first_images() -> None:
    images, labels = fashion_mnist(8)
    more_images, more_labels = fashion_mnist(16)
    assert torch.equal(images, more_images[:8])
    assert torch.equal(labels, more_labels[:8])


@pytest.mark.parametrize("num_images", [0, -1, 4097])
def test_fashion_mnist_refuses_images_it_does_not_have(num_images: int) -> None:
    with pytest.raises(ValueError, match=rf"num_images must be in 1\.\.4096, got {num_images}"):
        fashion_mnist(num_images)


def test_fashion_mnist_refuses_another_split() -> None:
    with pytest.raises(ValueError, match="split must be"):
        fashion_mnist(split="validation")
