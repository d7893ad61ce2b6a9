"""Configuration of a run: a TOML file that names a model, data and options of `spectrum`, and cannot run code.

    [model]      name = "gpt" or "resnet"; seed of its weights; fields of GPTConfig or ResNetConfig
    [data]       name = "shakespeare" (arguments of CharText.batches) or "fashion_mnist" (of fashion_mnist)
    [spectrum]   options of blockhess.spectrum

or job = "MODULE:FUNCTION" in place of model and data, which is imported only where the command line allows that very
text. Every key and the type of every value is checked before anything is built.
"""

from __future__ import annotations

import dataclasses
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockhess.cli import job_file
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.models.resnet import ResNet, ResNetConfig

MAX_BYTES = 2**20

Names = str | list[str]
Schema = dict[str, Any]  # key -> type

DTYPES = {"float32": torch.float32, "float64": torch.float64}

OPTIONS: Schema = {
    "blocks": str | dict[str, Names] | list[list[str]],
    "num_probes": int,
    "num_steps": int,
    "tol": float,
    "sigma": float,
    "seed": int,
    "distribution": str,
    "reorthogonalize": str,
    "batchnorm": str,
    "engine": str,
    "dtype": str,
    "matmul_precision": str,
    "memory_budget": int | str,
    "first_probe": int,
    "keep_vectors": bool,
    "on_nonfinite": str,
}
MODELS: dict[str, tuple[type, type]] = {"gpt": (GPT, GPTConfig), "resnet": (ResNet, ResNetConfig)}
DATA: dict[str, Schema] = {
    "shakespeare": {"num_batches": int, "batch_size": int, "context": int, "seed": int},
    "fashion_mnist": {"num_images": int, "split": str},
}
# What a model can be run on.
PAIRS = {"gpt": "shakespeare", "resnet": "fashion_mnist"}


@dataclass(frozen=True)
class Config:
    """A checked configuration.

    Attributes:
        path: of its file.
        job: MODULE:FUNCTION or FILE.py:FUNCTION, or None.
        model, data: the tables, or None where there is a job.
        spectrum: options of `blockhess.spectrum`.
    """

    path: Path
    job: str | None = None
    model: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    spectrum: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, allow: Collection[str] = ()) -> dict[str, Any]:
        """Build the model and the data: all arguments of `blockhess.spectrum`.

        Args:
            allow: the jobs that may be imported, as they were named on the command line.

        Raises:
            ValueError: the job is not allowed, or what is asked for cannot be built.

        Example:
            >>> spectra = blockhess.spectrum(**load_config("run.toml").arguments())
        """
        options = dict(self.spectrum)
        if "dtype" in options:
            options["dtype"] = DTYPES[options["dtype"]]
        if isinstance(options.get("blocks"), list):
            options["blocks"] = [tuple(pair) for pair in options["blocks"]]
        if self.job is None:
            return self._built() | options
        if self.job not in allow:
            raise ValueError(
                f"config: job must be allowed on the command line, got {self.job!r} in {self.path}; if you trust that "
                f"code, add: --allow {self.job!r}"
            )
        return job_file.load(self.job) | options

    def _built(self) -> dict[str, Any]:
        assert self.model is not None and self.data is not None
        sizes = {key: _tuples(value) for key, value in self.model.items() if key not in ("name", "seed")}
        chosen = {key: value for key, value in self.data.items() if key != "name"}
        loss: Any = nn.CrossEntropyLoss()
        if self.data["name"] == "shakespeare":
            text = shakespeare()
            data: Any = text.batches(**chosen)
            sizes = {"vocab_size": len(text.vocabulary)} | sizes
            loss = next_token_loss
        else:
            data = fashion_mnist(**chosen)
            sizes = {"num_classes": 10, "in_channels": 1, "stem": "small"} | sizes
        kind, config = MODELS[self.model["name"]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model.get("seed", 0))
            model = kind(config(**sizes))
        return {"model": model, "data": data, "loss_fn": loss}


def load_config(path: str | PathLike[str]) -> Config:
    """Read and check a configuration; nothing is built or imported.

    Raises:
        ValueError: there is no such file, it is no TOML, or a key or value is not what the head of this file says.
        ImportError: on Python 3.10, where tomli is missing.
    """
    path = Path(path)
    table = _toml(path)

    def refuse(text: str) -> typing.NoReturn:
        raise ValueError(f"config: {path}: {text}")

    def check(where: str, values: Mapping[str, Any], schema: Schema) -> None:
        for key, value in values.items():
            if key not in schema:
                refuse(f"{where}{key!r} is no key; there are {', '.join(schema)}")
            if not _fits(value, schema[key]):
                refuse(f"{where}{key} must be {_words(schema[key])}, got {reprlib.repr(value)}")

    check("", table, {"job": str, "model": dict[str, Any], "data": dict[str, Any], "spectrum": dict[str, Any]})
    options = table.get("spectrum", {})
    check("spectrum: ", options, OPTIONS)
    if options.get("dtype", "float32") not in DTYPES:
        refuse(f"spectrum: dtype must be {' or '.join(DTYPES)}, got {reprlib.repr(options['dtype'])}")
    if any(len(pair) != 2 for pair in options["blocks"]) if isinstance(options.get("blocks"), list) else False:
        refuse(f"spectrum: blocks must be pairs of a regex and a group, got {reprlib.repr(options['blocks'])}")
    given = ("job" in table, "model" in table, "data" in table)
    if given not in ((True, False, False), (False, True, True)):
        refuse("it must have either job or both [model] and [data]")
    if given[0]:
        return Config(path, job=table["job"], spectrum=options)

    model, data = table["model"], table["data"]
    for where, part, known in (("model", model, MODELS), ("data", data, DATA)):
        if not isinstance(part.get("name"), str) or part["name"] not in known:
            refuse(f"{where}: name must be one of {', '.join(known)}, got {reprlib.repr(part.get('name'))}")
    if PAIRS[model["name"]] != data["name"]:
        refuse(f"data: name must be {PAIRS[model['name']]} for model {model['name']}, got {data['name']}")
    config = MODELS[model["name"]][1]
    fields = typing.get_type_hints(config)
    check("model: ", model, {"name": str, "seed": int} | {f.name: fields[f.name] for f in dataclasses.fields(config)})
    check("data: ", data, {"name": str} | DATA[data["name"]])
    for where, part in (("spectrum", options), ("model", model), ("data", data)):
        if not 0 <= part.get("seed", 0) < 2**63:
            refuse(f"{where}: seed must be in 0 ... 2^63 - 1, got {reprlib.repr(part['seed'])}")
    return Config(path, model=model, data=data, spectrum=options)


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ImportError(
                'config: reading TOML on Python 3.10 needs tomli; type: pip install "blockhess[runs]"'
            ) from None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"config: cannot read {path}: {error.strerror or error}") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"config: {path}: it must take at most {MAX_BYTES} bytes")
    try:
        table: dict[str, Any] = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config: {path} is no TOML: {reprlib.repr(str(error))}") from None
    return table


def _fits(value: Any, hint: Any) -> bool:
    """Whether a TOML value is of a type; integers are numbers too, truth values are not, arrays stand for tuples."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is Any:
        return True
    return type(value) is hint or (hint is float and type(value) is int)


_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(kind) for kind in arguments if kind is not type(None))
    if origin in (list, tuple):
        return f"an array, each {_words(arguments[0])}"
    if origin is dict:
        return "a table" if arguments[1] is Any else f"a table, each {_words(arguments[1])}"
    return _WORDS[hint]


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
