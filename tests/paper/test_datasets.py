"""Loaders of the user's own files, on tiny files made here: contents, repeatability, layouts that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blockhess_paper.datasets.image_files import CIFAR10_MEAN, CIFAR10_STD, ImageFolder, cifar10, image_folder
from blockhess_paper.datasets.sentence_pairs import CLS, MASK, SEP, SPECIAL, line_pairs, masked_pairs
from blockhess_paper.datasets.text_files import BytePairs, TokenFile, cornell_dialogs, read_text
from blockhess_paper.models.bert import IGNORED

LINES = (
    "L1 +++$+++ u0 +++$+++ m0 +++$+++ ANNA +++$+++ Where are you?\n"
    "L2 +++$+++ u1 +++$+++ m0 +++$+++ BEN +++$+++ Here I am.\n"
    "L3 +++$+++ u0 +++$+++ m0 +++$+++ ANNA +++$+++ Caf\xe9?\n"
    "L4 +++$+++ u1 +++$+++ m0 +++$+++ BEN +++$+++\n"
)
CONVERSATIONS = "u0 +++$+++ u1 +++$+++ m0 +++$+++ ['L1', 'L2', 'L3']\nu0 +++$+++ u1 +++$+++ m0 +++$+++ ['L3', 'L4']\n"


def corpus(folder: Path, lines: str = LINES, conversations: str = CONVERSATIONS) -> Path:
    (folder / "movie_lines.txt").write_text(lines, encoding="latin-1")
    (folder / "movie_conversations.txt").write_text(conversations, encoding="latin-1")
    return folder


def test_token_files_are_read_as_nanogpt_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    np.arange(1000, 1100, dtype=np.uint16).tofile(path)
    tokens = TokenFile(path, 50_304)
    [(x, y)] = tokens.batches(batch_size=4, context=16, seed=1)
    assert x.dtype == torch.int64 and x.shape == (4, 16)
    assert (x[:, 1:] == x[:, :-1] + 1).all() and (y == x + 1).all()
    assert int(x.min()) >= 1000 and int(y.max()) <= 1099
    assert torch.equal(x, tokens.batches(batch_size=4, context=16, seed=1)[0][0])


def test_token_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prepare\.py writes train\.bin"):
        TokenFile(tmp_path / "none.bin", 10)
    path = tmp_path / "odd.bin"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="must hold uint16 tokens, got 3 bytes"):
        TokenFile(path, 10)
    np.arange(20, dtype=np.uint16).tofile(path)
    with pytest.raises(ValueError, match="below vocab_size = 10"):
        TokenFile(path, 10).batches(batch_size=50, context=4)
    with pytest.raises(ValueError, match=r"TokenFile.batches: context must be below the text's length 20, got 20"):
        TokenFile(path, 100).batches(context=20)


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read_text: cannot read"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"must be UTF-8, got byte 0xe9"):
        read_text(tmp_path / "latin.txt")


def test_byte_pairs_join_what_is_frequent_and_lose_nothing() -> None:
    pytest.importorskip("tokenizers")
    text = "the cat and the dog and the bird " * 20
    pairs = BytePairs([text], 270)
    assert 256 < pairs.vocab_size <= 270
    assert len(pairs.encode("the the")) < len("the the")
    assert pairs.decode(pairs.encode("Jürgen's cat")) == "Jürgen's cat"
    [(x, y)] = pairs.batches(text, batch_size=2, context=8)
    assert x.shape == (2, 8) and torch.equal(x[:, 1:], y[:, :-1])
    with pytest.raises(ValueError, match="at least 256, got 255"):
        BytePairs([text], 255)


def test_cornell_dialogs_pairs_lines_that_follow_each_other(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    pairs, vocab_size = cornell_dialogs(corpus(tmp_path), 300)
    # L4 is empty, so that L3, L4 is no pair.
    texts = BytePairs(["Where are you?", "Here I am.", "Café?", "Café?", ""], 300)
    assert [tuple(map(texts.decode, pair)) for pair in pairs] == [
        ("Where are you?", "Here I am."),
        ("Here I am.", "Café?"),
    ]
    assert vocab_size == texts.vocab_size


def test_cornell_dialogs_of_another_layout(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(
        ValueError, match=r"must hold movie_lines.txt and movie_conversations.txt .* got no movie_lines"
    ):
        cornell_dialogs(tmp_path, 300)
    with pytest.raises(ValueError, match=r"5 fields separated by .* got 2 in line 1"):
        cornell_dialogs(corpus(tmp_path, lines="L1 +++$+++ Hello\n"), 300)
    with pytest.raises(ValueError, match="must have every line, got no L9"):
        cornell_dialogs(corpus(tmp_path, conversations="a +++$+++ b +++$+++ c +++$+++ ['L1', 'L9']\n"), 300)


def sentences() -> list[tuple[torch.Tensor, torch.Tensor]]:
    # Sentence k is made of token k alone, 5 to 9 of them.
    return line_pairs([torch.full((5 + k % 5,), k) for k in range(40)])


def test_masked_pairs_are_what_bert_is_trained_on() -> None:
    batches = masked_pairs(sentences(), 40 + SPECIAL, 4, batch_size=250, context=24, seed=3)
    tokens, segments, labels, is_next = (torch.cat(parts) for parts in zip(*batches))
    whole = torch.where(labels == IGNORED, tokens, labels)
    assert tokens.shape == segments.shape == labels.shape == (1000, 24)
    assert whole[:, 0].eq(CLS).all() and (whole == SEP).sum(1).eq(2).all()
    assert torch.equal(segments == 0, whole == 0)
    first = whole.masked_fill(segments != 1, 0).amax(1)
    second = whole.masked_fill(segments != 2, 0).amax(1)
    assert (second[is_next == 1] == first[is_next == 1] + 1).all()
    assert is_next.float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)
    # A random second sentence follows by chance in 1 of 39.
    assert (second[is_next == 0] == first[is_next == 0] + 1).float().mean().item() < 0.1

    asked = labels != IGNORED
    ordinary = whole >= SPECIAL
    assert asked.any(1).all() and (asked <= ordinary).all()
    n = int(ordinary.sum())
    assert asked.sum().item() / n == pytest.approx(0.15, abs=0.03)  # lines without any get one
    shown = tokens[asked]
    assert (shown == MASK).float().mean().item() == pytest.approx(0.8, abs=5 * 0.4 / int(asked.sum()) ** 0.5)
    assert (tokens[~asked] != MASK).all()


def test_masked_pairs_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="context must be at least 5, got 4"):
        masked_pairs(sentences(), 44, context=4)
    with pytest.raises(ValueError, match="below vocab_size = 20"):
        masked_pairs(sentences(), 20, batch_size=50, context=24)
    with pytest.raises(ValueError, match="at least two, got 1"):
        masked_pairs(sentences()[:1], 44)


def image(path: Path, size: tuple[int, int], color: tuple[int, int, int]) -> None:
    Image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_image_folders_number_classes_by_name(tmp_path: Path) -> None:
    image(tmp_path / "b" / "1.png", (40, 20), (255, 0, 0))
    image(tmp_path / "a" / "2.jpeg", (20, 60), (0, 0, 0))
    image(tmp_path / "a" / "3.PNG", (16, 16), (0, 0, 255))
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images, labels = image_folder(tmp_path, 3, side=16)
    assert images.shape == (3, 3, 16, 16) and images.is_contiguous() and sorted(labels.tolist()) == [0, 0, 1]
    red = images[labels == 1][0]
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    torch.testing.assert_close(red, torch.tensor(expected)[:, None, None].expand(3, 16, 16))
    again = image_folder(tmp_path, 3, side=16)[1]
    others = [image_folder(tmp_path, 3, side=16, seed=seed)[1] for seed in range(1, 5)]
    assert torch.equal(labels, again) and not all(torch.equal(labels, other) for other in others)


def test_images_are_cut_from_the_middle(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 48:80] = 255  # a white stripe in the middle
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    images, _ = image_folder(tmp_path, 1, side=56)
    assert (images[0, 0, 28, 28] > 2) and (images[0, 0, 28, 0] < -2)
    assert torch.allclose(images, images.flip(-1), atol=1e-5)


def test_what_is_hidden_is_no_class_and_no_image(tmp_path: Path) -> None:
    for path in ("a/1.png", "a/._1.png", "b/2.png", ".cache/3.png"):
        image(tmp_path / path, (8, 8), (0, 0, 0))
    found = ImageFolder(tmp_path)
    assert (found.num_classes, len(found)) == (2, 2)
    assert found.read([0, 1], side=8)[1].tolist() == [0, 1]


def test_images_lie_channel_by_channel(tmp_path: Path) -> None:
    """Not channels last, in which torch has a broken gradient."""
    image(tmp_path / "a" / "1.png", (8, 8), (0, 0, 0))
    image(tmp_path / "a" / "2.png", (8, 8), (0, 0, 0))
    assert image_folder(tmp_path, 2, side=8)[0].is_contiguous()


def test_a_class_without_images_is_refused(tmp_path: Path) -> None:
    image(tmp_path / "a" / "1.png", (8, 8), (0, 0, 0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"image_folder: every folder of .* must hold images .*got none in 'b'$"):
        ImageFolder(tmp_path)
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="got none in 'b' and 1 more"):
        ImageFolder(tmp_path)


def test_image_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a folder of images for every class"):
        image_folder(tmp_path / "none", 1)
    image(tmp_path / "a" / "1.png", (8, 8), (0, 0, 0))
    with pytest.raises(ValueError, match="num_images must be at most 1, got 2"):
        image_folder(tmp_path, 2)
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        image_folder(tmp_path, 1, side=0)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png must be an image"):
        image_folder(tmp_path, 1)


def test_cifar10_is_read_in_its_binary_version(tmp_path: Path) -> None:
    record = np.zeros(3073, np.uint8)
    record[0], record[1 : 1 + 1024], record[-1] = 7, 255, 51  # all red; the last pixel 0.2 blue
    np.concatenate([record, record]).tofile(tmp_path / "test_batch.bin")
    images, labels = cifar10(tmp_path, split="test")
    assert images.shape == (2, 3, 32, 32) and labels.tolist() == [7, 7]
    red = (1 - CIFAR10_MEAN[0]) / CIFAR10_STD[0]
    torch.testing.assert_close(images[0, 0], torch.full((32, 32), red))
    assert images[0, 2, -1, -1].item() == pytest.approx((0.2 - CIFAR10_MEAN[2]) / CIFAR10_STD[2])


def test_cifar10_of_another_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"binary version, cifar-10-binary\.tar\.gz"):
        cifar10(tmp_path)
    with pytest.raises(ValueError, match="split must be"):
        cifar10(tmp_path, split="all")
    np.full(3073, 10, np.uint8).tofile(tmp_path / "test_batch.bin")  # label 10
    with pytest.raises(ValueError, match="records of a label"):
        cifar10(tmp_path, split="test")
    np.zeros(3000, np.uint8).tofile(tmp_path / "test_batch.bin")
    with pytest.raises(ValueError, match="got 3000 bytes"):
        cifar10(tmp_path, split="test")
