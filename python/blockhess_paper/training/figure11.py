"""Figure 11: AdamW and SGD on Transformers, each at its best learning rate; see figure10."""

from __future__ import annotations

from pathlib import Path

from blockhess_paper.networks.networks import Selection
from blockhess_paper.results import Result
from blockhess_paper.training.figure10 import compared

TRANSFORMERS = {"vit-2": "ViT", "bert-2": "BERT", "gpt-1": "GPT2-nano", "gpt-2": "GPT2"}


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Train the Transformers; arguments as of figure10.run."""
    subjects = {"gpt-1": "GPT2-nano"} if quick else TRANSFORMERS
    claim = "Figure 11: SGD performs significantly worse than AdamW on Transformers."
    return compared("fig11", claim, subjects, True, seed, quick, folder, selection or Selection())
