"""Result files (.npz) under fuzz: damaged archives, arrays with wrong headers, numbers and names that cannot be."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockhess.report.text import describe
from blockhess.spectra import Spectra, load
from tests.fuzz.mutations import FLOATS, NUMBERS, changed, damaged, text_of
from tests.fuzz.targets import Reader, printable, require
from tests.helpers.spectra_cases import make_spectra, random_spectra
from tests.results.test_files import same

Arrays = dict[str, "np.ndarray[Any, Any]"]

NPY_HEADERS = (
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -3, -1), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (4611686018427387904, 4, 4), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 3, 2), }",
    "{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (2, 3, 2), }",
    "{'descr': ('<f8', (2,)), 'fortran_order': False, 'shape': (2, 3), }",
    "{'descr': '<f8', 'fortran_order': 0, 'shape': (2, 3, 2)}",
    "{'descr': '<f8', 'shape': (2, 3, 2)}",
    "{'descr': '<c16', 'fortran_order': False, 'shape': (2, 3, 1)}",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (2, 3, 2)}",
    "__import__('os')",
    "(" * 300,
    "[" + "1," * 4000 + "]",
    "",
    "\x00",
    "None",
)


class ResultFiles(Reader):
    """blockhess.load."""

    name = "result"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cases = (
            random_spectra(
                n_probes=2, n_blocks=3, m=4, batchnorm="eval", loss_value=0.1, tied={"a": ["b"]},
                gradient_norms={"block0": 1.0, "block1": 0.0, "block2": 1e-3}, slices={"block0": [["w", 0, 2, 0]]},
            ),
            random_spectra(
                n_probes=1, n_blocks=2, m=1, hvp_error={"block0": 1e-3}, seconds=1.0, hvps=3, hvps_saved=2, tol=0.1,
                ghosts={"block0": 1}, loss_value=math.inf,
            ),
            make_spectra(
                [[[-0.0, 5e-324], [math.nan, math.inf]]], [[[0.5, 0.5], [0.0, 0.0]]],
                steps=[[2, 0]], nonfinite=[[False, True]], names=["a.b[0:3]", "ü "], notes=["unused", "zero"],
            ),
        )  # fmt: skip
        self.data = [case.save(self.path).read_bytes() for case in self.cases]
        self.arrays = [dict(np.load(io.BytesIO(data))) for data in self.data]

    def make(self, rng: random.Random) -> tuple[bytes, Any]:
        number = rng.randrange(len(self.cases))
        data = self.data[number]
        kind = rng.randrange(5)
        if kind == 0:
            return damaged(rng, data, rng.choice(self.data)), self.cases[number]
        arrays = {name: array.copy() for name, array in self.arrays[number].items()}
        if kind == 1:
            header = json.loads(arrays["header"].tobytes())
            arrays["header"] = np.frombuffer(text_of(rng, changed(rng, header)), np.uint8)
        elif kind == 2:
            change_array(rng, arrays)
        entries = {f"{name}.npy": npy(array) for name, array in arrays.items()}
        if kind == 3:
            name = rng.choice(list(entries))
            entries[name] = changed_npy(rng, entries[name], arrays[name.removesuffix(".npy")])
        return archive(rng, entries, plain=kind != 4), None

    def read(self) -> Spectra:
        return load(self.path)

    def check(self, content: Spectra, expected: Spectra | None) -> None:
        if expected is not None:
            require(same(content, expected), "damaged bytes were taken for a result")
        check_sound(content)
        require(same(load(content.save(self.folder / "again")), content), "what was loaded does not survive a save")


def change_array(rng: random.Random, arrays: Arrays) -> None:
    """Change an array's numbers, shape or type."""
    name = rng.choice([name for name in arrays if name != "header"])
    array = arrays[name]
    kind = rng.randrange(6)
    if kind <= 2 and array.size:
        flat = array.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            value = rng.choice((*FLOATS, *NUMBERS[:12])) if array.dtype.kind == "f" else rng.choice(NUMBERS[:7])
            flat[rng.randrange(array.size)] = value
    elif kind == 3:
        arrays[name] = rng.choice((array[:1], array[..., :1], array[:0], array.T, array[None], array.reshape(-1)))
    elif kind == 4:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays[name] = array.astype(rng.choice(("<f4", ">f8", "<i8", "|b1", "|u1", "<c16", "<U4")))
    else:
        other = rng.choice(list(arrays))
        arrays[name] = arrays[other]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    return file.getvalue()


def changed_npy(rng: random.Random, data: bytes, array: np.ndarray[Any, Any]) -> bytes:
    """An entry that is damaged, or whose header says something else than its bytes."""
    if rng.random() < 0.4:
        return damaged(rng, data)
    text = rng.choice(NPY_HEADERS).encode("latin1") + b" \n"
    version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\xff\x00"))
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + array.tobytes()


def archive(rng: random.Random, entries: dict[str, bytes], plain: bool) -> bytes:
    """A zip archive of the entries; if not plain, with entries packed, missing, twice, renamed or in another order."""
    names = list(entries)
    compression = dict.fromkeys(names, zipfile.ZIP_STORED)
    if not plain:
        kind, name = rng.randrange(5), rng.choice(names)
        if kind == 0:
            compression[name] = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        elif kind == 1:
            names.remove(name)
        elif kind == 2:
            names.append(name)
        elif kind == 3:
            rng.shuffle(names)
        else:
            new = rng.choice(("../../x.npy", "nodes", "x.npy", "/etc/x", "\x1b[2J.npy", "NODES.npy"))
            names[names.index(name)], entries[new], compression[new] = new, entries[name], zipfile.ZIP_STORED
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as result:
        warnings.simplefilter("ignore")
        for name in names:
            entry = zipfile.ZipInfo(name)  # which has a date of its own: by name it would be that of today
            result.writestr(entry, entries[name], compression[name])
    return file.getvalue()


def check_sound(spectra: Spectra) -> None:
    """What every loaded result must be good for."""
    q = spectra.quadrature
    shape = (q.num_probes, len(spectra), q.nodes.shape[-1])
    require(all(getattr(q, name).shape == shape for name in ("nodes", "weights", "alpha", "beta")), "shapes")
    require(q.steps.shape == q.nonfinite.shape == shape[:2] and min(shape) >= 1, "shapes")
    require(len(set(spectra.names)) == len(spectra), "two blocks of one name")
    steps = q.steps
    require(bool(((steps >= 0) & (steps <= torch.tensor(q.dims).clamp(max=shape[2]))).all()), "steps")
    valid = torch.arange(shape[2]) < steps[..., None]
    for name in ("nodes", "weights", "alpha", "beta"):
        require(bool(getattr(q, name)[valid].isfinite().all()), f"{name} not finite")
    weights = torch.where(valid, q.weights, 0.0)
    require(bool((weights >= 0).all()), "negative weights")
    require(bool(((weights.sum(-1) - (steps > 0).double()).abs() < 1e-5).all()), "weights do not sum to 1")

    known = (steps > 0).any(0)
    require(printable(describe(spectra)) and printable(repr(spectra)), "terminal escapes")
    _, share = spectra.cdf()
    share = share[known]
    require(bool(((share >= 0) & (share <= 1)).all()), "cdf outside 0 ... 1")
    require(bool((share.diff(dim=1) >= 0).all()), "cdf descends")
    low, high = spectra.eigenvalue_range()
    require(bool((low <= high)[known].all()), "an empty range")
    require(not bool(spectra.negative_mass()[known].isnan().any()), "negative mass unknown")
    try:
        grid, density = spectra.density()
    except ValueError:
        return
    require(bool(density.isfinite().all()) and bool((density >= 0).all()), "density not finite or negative")
    mass = torch.trapezoid(density, grid)[known]
    require(bool(((mass - 1).abs() < 1e-2).all()), f"mass of the density: {mass.tolist()}")
