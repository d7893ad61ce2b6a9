"""A sharded model is gathered one module and one block at a time, and its plan counts what that takes."""

from __future__ import annotations

import pytest

from tests.helpers import shard_accounts as cases
from tests.helpers.distributed_cases import run

# Cases that run in the same processes.
GROUPS = {
    "held": ("held", "held, gathered in backward"),
    "HSDP": ("HSDP",),
    "others": tuple(name for name in cases.CASES if name.startswith(("sent", "planned"))),
}
# Parameters and gradients of one module, parameters of the next one, and gradients of the one before.
MODULES = 4
# Three Lanczos vectors, and half of the gradient and of the parameters of the block in work.
VECTORS = 4
# Inputs, outputs and other small tensors of a layer, relative to it.
SMALL = 0.1


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    class Worlds(dict):
        def __missing__(self, name):
            names = next(group for group in GROUPS.values() if name in group)
            ranks = run(4 if name == "HSDP" else 2, tmp_path_factory.mktemp("world"), names, cases.__name__)
            self.update({name: [rank[name] for rank in ranks] for name in names})
            return self[name]

    return Worlds()


def test_one_module_and_one_block_are_whole_at_a_time(worlds):
    few, many = cases.LAYERS
    for held in worlds["held"]:
        assert not isinstance(held, str), held
        per_layer = (held[many][0] - held[few][0]) / (many - few) / cases.LAYER_BYTES
        # With two processes, half of the gradients and a copy of half of the parameters.
        assert per_layer == pytest.approx(1, abs=SMALL)
        assert held[many][0] < (many + MODULES + VECTORS + 1) * cases.LAYER_BYTES
    for held in worlds["held, gathered in backward"]:  # all modules are whole
        per_layer = (held[many][0] - held[few][0]) / (many - few) / cases.LAYER_BYTES
        assert per_layer > 1.4  # those of few layers are not the largest of what a run holds
        assert held[many][0] > (2 * many + 1) * cases.LAYER_BYTES


def test_memory_is_that_of_the_plan(worlds):
    for name in ("held", "held, gathered in backward"):
        for held in worlds[name]:
            for peak, planned in held.values():
                assert 0.8 * planned < peak < planned


@pytest.mark.parametrize(
    "name",
    [*(name for name in GROUPS["others"] if name != "planned"), pytest.param("HSDP", marks=pytest.mark.slow)],
)
def test_traffic_is_that_of_the_operations(worlds, name):
    for found in worlds[name]:
        assert not isinstance(found, str), found
        assert len(found) == 4
        for counted, planned in found.values():
            assert counted == planned > 0


def test_modules_that_stay_gathered_send_less(worlds):
    sent = {name: worlds[f"sent, {name}"][0]["0.0.weight"][0] for name in ("freed", "gathered in backward")}
    assert sent["gathered in backward"] < 0.8 * sent["freed"]


def test_the_plan_tells_memory_traffic_and_time(worlds):
    for found in worlds["planned"]:
        assert not isinstance(found, str), found
        text, plan, predicted, forecast, made = found
        products = plan["expected_hvps"]
        assert products == 2 * 5 * 4 and plan["processes"] == 2 and plan["seconds"] > 0
        sent = [counted for counted, _ in worlds["sent"][0].values()]
        assert plan["traffic_bytes"] == pytest.approx(products * sum(sent) / len(sent), rel=1e-9)
        assert plan["gather_traffic_bytes"] == products / 4 * (3 * cases.LAYER_BYTES + 4 * 4 * cases.WIDTH) / 2
        assert plan["copy_bytes"] == plan["shard_bytes"] == (3 * cases.LAYER_BYTES + 4 * 4 * cases.WIDTH) / 2
        assert (
            "shards        of 2 processes: 24.5 KiB of gradients, 66 KiB of parameters and gradients gathered" in text
        )
        assert "traffic       152 KiB between shards sent by every process for a product of" in text
        assert "processes     2: 1 share recurrences x 1 share batches x 2 hold shards" in predicted
        assert forecast["seconds"] > 0 and forecast["plan"]["traffic_bytes"] == plan["traffic_bytes"]
        assert all(made[name] == plan[name] for name in ("shard_bytes", "gathered_bytes", "traffic_bytes"))
