"""bench/ops/layouts.py: layouts have the numbers of parameters of their networks."""

from __future__ import annotations

from bench.ops import layouts


def test_layouts_have_the_known_numbers_of_parameters():
    known = {"GPT-2 124M": 124_439_808, "ResNet18": 11_689_512, "VGG16": 138_357_544, "ViT-base": 86_567_656}
    known |= {"BERT": 109_482_240, "one huge block": 10**8}
    for name, parameters in known.items():
        assert sum(layouts.LAYOUTS[name]()) == parameters
    from blockhess.models import GPT, GPTConfig

    sizes = [p.numel() for p in GPT(GPTConfig()).parameters()]
    assert sorted(layouts.LAYOUTS["GPT2-nano"]()) == sorted(sizes)
    small = layouts.LAYOUTS["150 small blocks"]()
    assert (len(small), small[0], small[-1]) == (150, 64, 65_536)
