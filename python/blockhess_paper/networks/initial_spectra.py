"""Block spectra of the networks at initialization, computed once and shared by Table 1 and Figures 3 and 4.

FOLDER/spectra/NAME-POLICY.npz holds one network under one BatchNorm policy. The file is reused if model, data and
options have the same fingerprints, so the three commands compute each spectrum once. During the computation a run
directory next to it, named after the same fingerprints, allows an interrupted one to resume with bitwise equal results.
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

# BatchNorm policies: that of the paper's code, and that of training.
POLICIES = ("eval", "batch")


@dataclass(frozen=True)
class Effort:
    """Probes and steps of every block, and number of samples; None means that of the scale."""

    num_probes: int
    num_steps: int
    size: int | None = None


EFFORTS = {"quick": Effort(2, 6, 4), "mini": Effort(3, 30), "paper": Effort(10, 100)}


@dataclass(frozen=True)
class Subject:
    """The spectra of one network under one BatchNorm policy.

    Attributes:
        name: a key of NETWORKS, or PACKAGE:NAME.
        policy: "eval" or "batch"; "none" for a network without BatchNorm.
        spectra: the block spectra.
        source: short description of the data.
    """

    name: str
    policy: str
    spectra: Spectra
    source: str

    @property
    def title(self) -> str:
        """Name as in the paper, with the BatchNorm policy if the network has BatchNorm."""
        title = NETWORKS[self.name][0] if self.name in NETWORKS else self.name
        return title if self.policy == "none" else f"{title}, BatchNorm {self.policy}"


def measure_networks(
    folder: Path, selection: Selection, shown: Sequence[str] = (), *, seed: int = 0, quick: bool = False
) -> list[Subject]:
    """Compute the spectra of the networks, or load those computed before.

    Args:
        folder: parent of FOLDER/spectra, which is created if missing.
        selection: the networks.
        shown: networks of the figure, used if the selection names none; empty means all of NETWORKS.
        seed: seed of weights, data and probes.
        quick: few probes, steps and samples.

    Returns:
        One subject per network, or two, one per policy, if it has BatchNorm; in the order of the names.
    """
    effort = EFFORTS["quick" if quick else selection.scale]
    saved = writable_folder(folder / "spectra")
    subjects = []
    for name in selection.models or shown or NETWORKS:
        net = network(name, selection, seed=seed, size=effort.size)
        # Blocks of Figure 4; models of other packages have one block per parameter tensor.
        blocks = net.model.paper_blocks(figure=True) if name in NETWORKS else "parameter"  # type: ignore[operator]
        for policy in POLICIES if has_batchnorm(net.model) else ("none",):
            path = saved / f"{name.replace(':', '-')}-{policy}.npz"
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
    """Load the spectra of one network from a file, or compute and save them if the file has others.

    Raises:
        ValueError: an unfinished computation was started with other threads or another torch.
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
        raise ValueError(f"{other}\n; resume it as it was started, or remove {run_dir}") from None
    spectra.save(path)
    shutil.rmtree(run_dir)
    return spectra


def spectra_settings(subjects: Sequence[Subject], seed: int, selection: Selection) -> dict[str, object]:
    """Return the settings of a Result that describe its spectra."""
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
