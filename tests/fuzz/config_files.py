"""Configurations under fuzz: damaged TOML, and values of every kind in the place of every other."""

from __future__ import annotations

import random
import re
from typing import Any

from blockhess.cli.config import OPTIONS, Config, load_config
from tests.cli.test_config import GPT_RUN, RESNET_RUN
from tests.fuzz.mutations import damaged
from tests.fuzz.targets import Reader, require

VALUES = (
    "0", "-1", "1", "true", "nan", "-inf", "1e400", "9223372036854775808", "9" * 400, "1979-05-27", "07:32:00", "''",
    "'gpt'", "'fashion_mnist'", "'float64'", "'\\u0000'", '"\\u001b[2J"', "[]", "[[]]", "[['a', 'b']]", "[1, 'a']",
    "{}", "{a = 'b'}", "{a = ['b']}", "{a = {b = 1}}", "[" * 50 + "]" * 50, "[" * 5000, "'''\n\n'''",
    "0x7fffffffffffffff", "{a.b = 1}",
)  # fmt: skip
KEYS = (
    *OPTIONS,
    "job",
    "model",
    "data",
    "spectrum",
    "name",
    "width",
    "bias",
    "blocks_per_stage",
    "a.b",
    "''",
    '"\\u202e"',
)


class ConfigFiles(Reader):
    """blockhess.cli.config.load_config."""

    name = "config"

    def make(self, rng: random.Random) -> tuple[bytes, Any]:
        text = rng.choice((GPT_RUN, RESNET_RUN, "job = 'module:function'\n"))
        for _ in range(rng.choice((1, 1, 2, 3))):
            lines = text.split("\n")
            at = rng.randrange(len(lines))
            kind = rng.randrange(4)
            if kind == 0:
                lines[at] = re.sub(r"=.*", lambda _: f"= {rng.choice(VALUES)}", lines[at])
            elif kind == 1:
                lines.insert(at, f"{rng.choice(KEYS)} = {rng.choice(VALUES)}")
            elif kind == 2:
                lines.insert(at, rng.choice(("[model]", "[[data]]", "[spectrum.blocks]", "[]", "[job]", "[a.b]")))
            else:
                del lines[at]
            text = "\n".join(lines)
        data = text.encode()
        return damaged(rng, data) if rng.random() < 0.2 else data, None

    def read(self) -> Config:
        return load_config(self.path)

    def check(self, content: Config, expected: Any) -> None:
        require(content.spectrum.keys() <= OPTIONS.keys(), "an unknown option")
        require((content.job is None) == (content.model is not None and content.data is not None), "no job, no model")
        for name in ("num_probes", "num_steps", "seed"):
            require(type(content.spectrum.get(name, 1)) is int, f"{name} is no integer")
        if content.model is not None:
            require(content.model["name"] in ("gpt", "resnet"), "an unknown model")
