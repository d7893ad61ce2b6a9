"""What the loss of a batch is and how much a batch weighs: split data must give what the whole gives."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockhess.problem.batches import batch_size
from blockhess.problem.losses import TransformersLoss, checked, checked_weight, make_loss

C = 4
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0])
TARGETS = torch.tensor([0, 1, 2, 3, 3, 1])
IGNORING = torch.tensor([0, 1, -100, 3, -100, -100])


def of_all(loss_fn: Any, batches: list[Any], model: nn.Module) -> tuple[float, float]:
    """Loss and weight of all data, from those of the batches."""
    loss = make_loss(loss_fn)
    parts = [loss(model, batch) for batch in batches]
    rows = [batch_size(loss.averaged_over(batch)) for batch in batches]
    weights = [float(row if weight is None else weight) for (_, weight), row in zip(parts, rows)]
    return sum(value.item() * w for (value, _), w in zip(parts, weights)) / sum(weights), sum(weights)


@pytest.mark.parametrize(
    ("criterion", "targets", "weight"),
    [
        (nn.CrossEntropyLoss(), TARGETS, 6),
        (nn.CrossEntropyLoss(), IGNORING, 3),
        (nn.CrossEntropyLoss(ignore_index=1), TARGETS, 4),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), TARGETS, 1 + 2 + 3 + 4 + 4 + 2),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1), TARGETS, 1 + 3 + 4 + 4),
        (nn.CrossEntropyLoss(), torch.arange(24.0).view(6, 4) / 100, 6),
        (F.cross_entropy, IGNORING, 3),
        (functools.partial(F.cross_entropy, ignore_index=1, weight=CLASS_WEIGHTS), TARGETS, 1 + 3 + 4 + 4),
        (nn.NLLLoss(weight=CLASS_WEIGHTS), IGNORING, 1 + 2 + 4),
        (F.nll_loss, TARGETS, 6),
        (nn.MSELoss(), torch.arange(24.0).view(6, 4), 6),
        (F.smooth_l1_loss, torch.arange(24.0).view(6, 4), 6),
    ],
)
def test_a_criterions_batches_weigh_what_its_mean_divides_by(criterion: Any, targets: Tensor, weight: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(C, C), torch.randn(6, C)
    split, total = of_all(criterion, list(zip(x.split([4, 2]), targets.split([4, 2]))), model)
    if targets is IGNORING:  # the second batch has no target left
        split, total = of_all(criterion, list(zip(x.split([2, 4]), targets.split([2, 4]))), model)
    assert split == pytest.approx(criterion(model(x), targets).item(), rel=1e-6)
    assert total == weight


def test_targets_of_more_dimensions() -> None:
    loss = make_loss(nn.CrossEntropyLoss())
    logits = nn.Identity()
    targets = torch.zeros(2, 3, 5, dtype=torch.int64)
    targets[0, 0] = -100
    assert loss(logits, (torch.zeros(2, C, 3, 5), targets))[1] == 25
    assert loss(logits, (torch.zeros(2, C, 3, 5), torch.zeros(2, C, 3, 5)))[1] == 30
    assert loss(logits, (torch.zeros(C), torch.zeros(C)))[1] == 1


def test_reduction_sum_is_not_averaged() -> None:
    for criterion in (nn.MSELoss(reduction="sum"), functools.partial(F.mse_loss, reduction="sum")):
        assert not make_loss(criterion).averaged
    assert make_loss(nn.MSELoss()).averaged


def test_reduction_none() -> None:
    with pytest.raises(ValueError, match="must return one number, got CrossEntropyLoss with reduction='none'"):
        make_loss(nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match="got mse_loss with reduction='none'"):
        make_loss(functools.partial(F.mse_loss, reduction="none"))


def test_a_function_of_model_and_batch() -> None:
    def squares(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()

    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    value, weight = make_loss(squares)(model, x)
    assert value == squares(model, x) and weight is None
    assert make_loss(lambda m, b: (squares(m, b), 17))(model, x)[1] == 17
    assert make_loss(squares).name.endswith("squares")


def test_a_criterion_needs_pairs() -> None:
    loss = make_loss(nn.MSELoss())
    for batch, got in ((torch.ones(3), "a Tensor"), ((1, 2, 3), "a tuple of length 3"), ({"x": 1}, "a dict")):
        with pytest.raises(ValueError, match=rf"pairs \(inputs, targets\) for MSELoss, got {got}"):
            loss(nn.Identity(), batch)


def test_not_callable() -> None:
    with pytest.raises(TypeError, match="loss_fn must be callable or None, got str"):
        make_loss("mse")


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (None, "return a tensor, got None for batch 3; return the mean loss, or"),
        (0.5, r"got a float for batch 3; return the tensor, without item\(\)"),
        ({"loss": torch.ones(())}, r"got a dict with keys \['loss'\] for batch 3; return its entry 'loss'"),
        (types.SimpleNamespace(loss=torch.ones(())), "got a SimpleNamespace for batch 3; return its attribute loss"),
        ((torch.ones(()), 1, 2), r"got a tuple \(a tensor of shape \(\), an int, an int\) for batch 3"),
        (torch.ones(1), r"got shape \(1,\) for batch 3; return loss.squeeze\(\)"),
        (torch.ones(4), r"got shape \(4,\) for batch 3; take the mean"),
        (torch.ones((), dtype=torch.complex64), "return a real number, got torch.complex64"),
        (torch.ones(()), "requires no gradient for batch 3; is there a detach"),
    ],
)
def test_what_to_return_instead(result: Any, text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^spectrum: loss_fn must .*{text}"):
        checked(result, 3)


def test_a_second_loss_is_no_weight() -> None:
    for pair in (lambda m, b: (m(b), m(b).mean()), lambda m, b: (m(b).mean(), m(b).sum())):
        with pytest.raises(TypeError, match="whose second depends on the parameters; return the loss alone"):
            make_loss(pair)(nn.Linear(3, 2), torch.ones(5, 3))
    with pytest.raises(TypeError, match=r"a number as weight, got a dict with keys \['accuracy'\] for batch 0; return"):
        checked_weight({"accuracy": 0.5}, 0, 1)  # type: ignore[arg-type]


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


def test_a_criterion_that_cannot_take_the_outputs() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Output:
            return Output(x)

    with pytest.raises(TypeError, match=r"MSELoss must take what the model returns, got an Output .* takes logits of"):
        make_loss(nn.MSELoss())(Model(), (torch.ones(3), torch.ones(3)))

    class TakesOutputs(nn.Module):
        def forward(self, output: Output, y: Tensor) -> Tensor:
            return (output.logits - y).mean()

    assert make_loss(TakesOutputs())(Model(), (torch.ones(3), torch.ones(3)))[0] == 0

    class Wrapper(nn.Module):
        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return model(batch[0]).mean()

    with pytest.raises(TypeError, match=r"Wrapper is a module, called as .* pass loss_fn.forward"):
        make_loss(Wrapper())(nn.Identity(), (torch.ones(3), torch.ones(3)))
    wrapper = Wrapper()
    loss = make_loss(wrapper.forward)
    assert loss.module is wrapper and loss(nn.Identity(), (torch.ones(3), None))[0] == 1


def test_weights() -> None:
    assert checked_weight(torch.tensor(3), 0, 2) == 3.0
    assert checked_weight(None, 0, 1) == 1.0
    with pytest.raises(ValueError, match=r"must return \(mean loss, weight\), since batch 1 has no tensor"):
        checked_weight(None, 1, 2)


# Transformers


def test_a_transformers_loss_needs_mappings_and_labels() -> None:
    loss = make_loss(None)
    with pytest.raises(
        ValueError, match=r"must hold mappings for loss_fn=None, .* got a tuple of length 2; pass loss_fn="
    ):
        loss(nn.Linear(2, 2), (torch.ones(2), torch.ones(2)))

    class NoLoss(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(ValueError, match=r"got Tensor from a batch with keys \['x'\] .*'labels'"):
        loss(NoLoss(), {"x": torch.ones(2)})


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


TINY = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def padded(labels: Tensor) -> Tensor:
    labels = labels.clone()
    labels[0, 3:] = -100
    labels[1, :2] = -100
    return labels


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("GPT2LMHead", (3 - 1) + (5 - 2) + 2 * (5 - 1)),  # labels are shifted: the first of a row is not looked at
        ("BertForMaskedLM", 3 + 3 + 2 * 5),
        ("T5ForConditionalGeneration", 3 + 3 + 2 * 5),
        ("BertForSequenceClassification", 4),
    ],
)
def test_transformers_models_weigh_by_the_labels_they_look_at(transformers: Any, kind: str, count: int) -> None:
    torch.manual_seed(0)
    ids = torch.randint(2, 11, (4, 5))
    batch = {"input_ids": ids, "labels": padded(ids)}
    if kind == "GPT2LMHead":
        config = transformers.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, n_positions=8)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "T5ForConditionalGeneration":
        config = transformers.T5Config(
            vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        model = getattr(transformers, kind)(transformers.BertConfig(**TINY))
    if kind == "BertForSequenceClassification":
        batch["labels"] = torch.tensor([0, 1, 1, 0])
    model.eval()
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    split, weight = of_all(None, halves, model)
    assert weight == count
    assert split == pytest.approx(model(**batch).loss.item(), rel=1e-6)


def test_a_first_batch_whose_labels_are_all_ignored_decides_nothing(transformers: Any) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=9, n_positions=8, attn_pdrop=0.0)
    model, loss = transformers.GPT2LMHeadModel(config).eval(), TransformersLoss()
    ids = torch.randint(9, (2, 6))
    loss(model, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    assert loss(model, {"input_ids": ids, "labels": ids})[1] == 2 * 5


@pytest.mark.parametrize("weight", ["a", torch.ones(3)])
def test_a_weight_is_a_number(weight: Any) -> None:
    with pytest.raises(TypeError, match=r"spectrum: loss_fn must return a number as weight, got .* for batch 4"):
        checked_weight(weight, 4, 5)
