"""Block spectra of the networks at initialisation, measured once and kept: what Table 1 and Figures 3 and 4 share.

FOLDER/spectra/NAME-POLICY.npz holds one network under one BatchNorm policy. A file is taken instead of measuring again
if model, data and options are the same by their fingerprints; so the three commands measure once between them. While it
is measured there is a run directory beside it, named after the same fingerprints, so that an interrupted measurement
goes on within a network's spectra, to the same bits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import blockhess
from blockhess.problem import fingerprint
from blockhess.problem.batches import as_batches
from blockhess.problem.blocks import BlockSpec
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import has_batchnorm
from blockhess.results.files import writable_folder
from blockhess.run.storage.directory import RunMismatch
from blockhess.spectra import Spectra
from blockhess_paper.networks.networks import NETWORKS, Network, Selection, network

# BatchNorm policies: of the paper's code, and of training.
POLICIES = ("eval", "batch")


@dataclass(frozen=True)
class Effort:
    """How much is spent on every block: probes, steps; and samples, None for the scale's own number."""

    num_probes: int
    num_steps: int
    size: int | None = None


EFFORTS = {"quick": Effort(2, 6, 4), "mini": Effort(3, 30), "paper": Effort(10, 100)}


@dataclass(frozen=True)
class Subject:
    """The spectra of one network under one BatchNorm policy.

    Attributes:
        name: of NETWORKS or PACKAGE:NAME.
        policy: "eval" or "batch"; "none" for a network without BatchNorm.
        spectra: of the blocks.
        source: the data in words.
    """

    name: str
    policy: str
    spectra: Spectra
    source: str

    @property
    def title(self) -> str:
        """Name as in the paper, with the policy where there is a choice."""
        title = NETWORKS[self.name][0] if self.name in NETWORKS else self.name
        return title if self.policy == "none" else f"{title}, BatchNorm {self.policy}"


def measured(
    folder: Path, selection: Selection, shown: Sequence[str] = (), *, seed: int = 0, quick: bool = False
) -> list[Subject]:
    """Measure the networks, or take what was measured before.

    Args:
        folder: where FOLDER/spectra is, or is made.
        selection: of the networks.
        shown: those of the figure, for a selection that names none; none means all of NETWORKS.
        quick: few probes, steps and samples.

    Returns:
        One subject a network and, where it has BatchNorm, policy; in the order of the names.
    """
    effort = EFFORTS["quick" if quick else selection.scale]
    kept = writable_folder(folder / "spectra")
    subjects = []
    for name in selection.models or shown or NETWORKS:
        net = network(name, selection, seed=seed, size=effort.size)
        # Figure 4 and Table 1 are of the figure's blocks; of a model of another package every tensor is a block.
        blocks = net.model.paper_blocks(figure=True) if name in NETWORKS else "parameter"  # type: ignore[operator]
        for policy in POLICIES if has_batchnorm(net.model) else ("none",):
            path = kept / f"{name.replace(':', '-')}-{policy}.npz"
            spectra = measure_once(path, net, policy, effort, seed, blocks=blocks, precision=selection.precision)
            subjects.append(Subject(name, policy, spectra, net.source))
    return subjects


def measure_once(
    path: Path,
    net: Network,
    policy: str,
    effort: Effort,
    seed: int,
    *,
    blocks: BlockSpec = "parameter",
    precision: str = "highest",
) -> Spectra:
    """Return the spectra of one network, from the file where it holds the same, else measured and saved there.

    Raises:
        ValueError: what was measured in part was begun with other threads, or another torch: says what differs.
    """
    batches = as_batches(net.data, pairs=make_loss(net.loss_fn).pairs)
    asked: dict[str, Any] = {
        "fingerprints": {"model": fingerprint.of_model(net.model), "data": fingerprint.of_data(batches)},
        "batchnorm": policy,
        "num_steps": effort.num_steps,
        "seed": seed,
        "matmul_precision": precision,
    }
    if path.exists():
        before = blockhess.load(path)
        if before.quadrature.num_probes == effort.num_probes and asked.items() <= before.provenance.items():
            return before
    digest = blake2b(repr((asked, effort, blocks)).encode(), digest_size=4).hexdigest()
    run_dir = path.with_name(f"{path.stem}-{digest}")
    try:
        spectra = blockhess.spectrum(
            net.model,
            net.data,
            net.loss_fn,
            blocks=blocks,
            num_probes=effort.num_probes,
            num_steps=effort.num_steps,
            seed=seed,
            batchnorm="eval" if policy == "none" else policy,
            matmul_precision=precision,
            run_dir=run_dir,
        )
    except RunMismatch as other:
        raise ValueError(f"{other}\n; go on with what is there as it was begun, or remove {run_dir}") from None
    spectra.save(path)
    shutil.rmtree(run_dir)
    return spectra


def settings(subjects: Sequence[Subject], seed: int, selection: Selection) -> dict[str, object]:
    """What a result must say about its spectra."""
    first = subjects[0].spectra.quadrature
    sources: Mapping[str, str] = {subject.title: subject.source for subject in subjects}
    return {
        "seed": seed,
        "scale": selection.scale,
        "device": selection.device,
        "precision": selection.precision,
        "num_probes": first.num_probes,
        "num_steps": first.num_steps,
        "parameters": {s.title: sum(s.spectra.dims) for s in subjects},
        "data": sources,
    }
