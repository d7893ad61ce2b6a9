"""Partition of the parameters of a model into blocks w_1, ..., w_L (paper, section 2.1).

A tied parameter belongs to one block, under its first name. Frozen parameters are excluded. Names never contain the
prefixes of wrappers ("module.", "_orig_mod.").
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor, nn

from blockhess.problem.shards import whole
from blockhess_ext.arguments import LIMIT, integer

# Note of blocks whose Hessian is zero within the error of its products.
ZERO_NOTE = "zero within HVP error"


@dataclass(frozen=True)
class BlockInfo:
    """Description of a block in a result.

    Args:
        name: name of the parameter, the slice ("attn.qkv[0:64]") or the group.
        shape: of the parameter or slice; (dim,) for several.
        dim: number of scalar parameters.
        parameters: names of the parameters in the block.
        note: remarks joined by "; ": "unused" (the loss does not depend on it), ZERO_NOTE, "tied with NAME".
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    parameters: tuple[str, ...]
    note: str = ""


def block_id(name: str) -> int:
    """Return the random-number key of a block, a hash of its name, so that its probes are the same in any partition."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


def with_note(info: BlockInfo, note: str) -> BlockInfo:
    """Return the info with `note` before its other notes."""
    return replace(info, note="; ".join(filter(None, (note, info.note))))


@dataclass(frozen=True)
class ParameterSlice:
    """The slice `start:stop` of a parameter along dimension `dim`: rows by default, columns with dim=1.

    `nn.Linear` and `nn.MultiheadAttention` store a fused qkv along rows, the Conv1D of GPT-2 along columns.

    Example:
        >>> weight = "attn.in_proj_weight"
        >>> blocks = {"query": ParameterSlice(weight, 0, 64), "key": ParameterSlice(weight, 64, 128)}
    """

    name: str
    start: int
    stop: int
    dim: int = 0

    def __str__(self) -> str:
        return f"{self.name}[{':,' * self.dim}{self.start}:{self.stop}]"


Selection: TypeAlias = "str | ParameterSlice | Sequence[str | ParameterSlice]"
BlockSpec: TypeAlias = "str | Mapping[str, Selection] | list[tuple[str, str]]"


@dataclass(frozen=True)
class Piece:
    """A parameter tensor under its first name, or the slice of it that belongs to a block."""

    name: str
    tensor: Tensor
    aliases: tuple[str, ...] = ()
    part: ParameterSlice | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.tensor.shape)
        if self.part is not None:
            shape[self.part.dim] = self.part.stop - self.part.start
        return tuple(shape)

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of this piece in a tensor (..., *shape of the whole parameter)."""
        if self.part is None:
            return tensor
        leading = tensor.dim() - self.tensor.dim()
        return tensor.narrow(leading + self.part.dim, self.part.start, self.part.stop - self.part.start)


@dataclass(frozen=True)
class Block:
    """A block: its description and its pieces of parameters, in order."""

    info: BlockInfo
    pieces: tuple[Piece, ...]

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in the block."""
        return self.info.parameters

    def spread(self, vectors: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reshape vectors (..., dim) to parameters (..., *shape) by name, zero outside the block.

        The results are views where the block contains the whole parameter.
        """
        spread: dict[str, Tensor] = {}
        lead = vectors.shape[:-1]
        for piece, part in zip(self.pieces, torch.split(vectors, [prod(p.shape) for p in self.pieces], dim=-1)):
            like = parameters[piece.name]
            values = part.reshape((*lead, *piece.shape)).to(like.dtype)
            if piece.part is None:
                spread[piece.name] = values
            else:
                if piece.name not in spread:
                    spread[piece.name] = values.new_zeros(*lead, *like.shape)
                piece.of(spread[piece.name]).copy_(values)
        return spread

    def accumulate(self, tensors: Mapping[str, Tensor | None], into: Tensor, share: float = 1.0) -> None:
        """Add share * parameters (..., *shape), by name, to vectors (..., dim): the adjoint of `spread`."""
        lead = into.shape[:-1]
        for piece, part in zip(self.pieces, torch.split(into, [prod(p.shape) for p in self.pieces], dim=-1)):
            tensor = tensors.get(piece.name)
            if tensor is not None:
                part.view((*lead, *piece.shape)).add_(piece.of(whole(tensor)), alpha=share)


@dataclass(frozen=True)
class Partition:
    """The blocks of a model.

    Args:
        blocks: the blocks, in the order of their columns in a vector set.
        frozen: names of parameters with requires_grad=False, which are in no block.
        tied: first name of every tied parameter -> its other names.
    """

    blocks: tuple[Block, ...]
    frozen: tuple[str, ...]
    tied: dict[str, tuple[str, ...]]


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def heads(
    model: nn.Module, name: str, num_heads: int, *, dim: int = 0, roles: Sequence[str] = ("head",)
) -> dict[str, ParameterSlice]:
    """Return one block per attention head of a parameter that stores heads of equal size one after the other.

    Args:
        model: the model that owns the parameter.
        name: name of the parameter.
        num_heads: number of heads per role.
        dim: dimension of the heads: 0 for nn.Linear, 1 for the Conv1D of GPT-2.
        roles: names of the fused matrices in order, such as ("q", "k", "v").

    Returns:
        Block name, such as "attn.in_proj_weight[q0]" -> ParameterSlice: a value, or part of one, for `blocks`.

    Raises:
        ValueError: unknown name, or a dimension not divisible by len(roles) * num_heads.
        TypeError: an argument of the wrong type, or a repeated role.

    Example:
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> list(heads(attention, "in_proj_weight", 2, roles=("q", "k", "v")))[:3]
        ['in_proj_weight[q0]', 'in_proj_weight[q1]', 'in_proj_weight[k0]']
    """
    for argument, value, least in (("num_heads", num_heads, 1), ("dim", dim, -LIMIT)):
        integer(argument, value, least, LIMIT, "heads")
    strings = isinstance(roles, Sequence) and not isinstance(roles, str) and all(isinstance(r, str) for r in roles)
    if not isinstance(name, str) or not strings or len(set(roles)) != len(roles):
        raise TypeError(f"heads: name must be a string and roles distinct strings, got {name!r} and {roles!r}")
    found = _lookup(_names(unwrap(model)), name)
    count = len(roles) * num_heads
    size = found.tensor.shape[dim] if -found.tensor.dim() <= dim < found.tensor.dim() else 0
    if count < 1 or size == 0 or size % count:
        raise ValueError(
            f"heads: {name!r} of shape {tuple(found.tensor.shape)} must divide into {count} equal parts "
            f"(num_heads={num_heads}, roles={tuple(roles)}) along dim {dim}"
        )
    dim %= found.tensor.dim()
    labels = [f"{found.name}[{role}{head}]" for role in roles for head in range(num_heads)]
    step = size // count
    return {label: ParameterSlice(found.name, i * step, (i + 1) * step, dim) for i, label in enumerate(labels)}


def partition(model: nn.Module, blocks: BlockSpec = "parameter") -> Partition:
    """Partition the trainable parameters of a model.

    Args:
        model: any module, wrapped or not.
        blocks: "parameter": one block per parameter tensor. "full": one block of all parameters. A dict from block
            name to a parameter name, a `ParameterSlice` or a list of those; blocks may overlap. A list of
            (regex, group) pairs: a parameter joins the group of the first regex that `re.search` finds in its name;
            `group` may refer to groups of the regex, as in (r"h\\.(\\d+)\\.", r"layer \\1"). Parameters that are not
            named, or match no regex, are in no block.

    Raises:
        ValueError: an unknown name, a regex without a match, a frozen parameter, the same entries twice in one block,
            no trainable parameter, or a parameter that is not real floating-point.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"spectrum: model must have run once before, got {_canonical(name)!r} uninitialized")
    named = _names(unwrap(model))
    frozen = {n.name for n in named if not n.tensor.requires_grad}
    trainable = [n for n in named if n.name not in frozen]
    if not trainable:
        raise ValueError(f"spectrum: model must have a parameter with requires_grad=True, got none of {len(named)}")

    if isinstance(blocks, str):
        if blocks not in ("parameter", "full"):
            raise ValueError(
                f"spectrum: blocks must be 'parameter', 'full', a dict of block names or a list of (regex, group) "
                f"pairs, got {blocks!r}"
            )
        groups = {"full": trainable} if blocks == "full" else {n.name: [n] for n in trainable}
    elif isinstance(blocks, Mapping):
        groups = {name: _select(named, frozen, name, selection) for name, selection in blocks.items()}
    elif isinstance(blocks, list):
        groups = _match(trainable, blocks)
    else:
        raise TypeError(f"spectrum: blocks must be a string, a dict or a list of pairs, got {type(blocks).__name__}")
    if not groups:
        raise ValueError(f"spectrum: blocks must name at least one block, got {blocks!r}")

    made = tuple(_block(name, tuple(pieces)) for name, pieces in groups.items())
    tied = {n.name: n.aliases for n in named if n.aliases}
    return Partition(made, tuple(n.name for n in named if n.name in frozen), tied)


def _names(model: nn.Module) -> list[Piece]:
    names: dict[Tensor, list[str]] = {}  # tensors are compared by identity
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(tensor, []).append(_canonical(name))
    return [Piece(first, tensor, tuple(rest)) for tensor, (first, *rest) in names.items()]


def _canonical(name: str) -> str:
    """Remove the path components that torch.compile adds around submodules."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _lookup(named: Sequence[Piece], name: str) -> Piece:
    every = {alias: n for n in named for alias in (n.name, *n.aliases)}
    wanted = _canonical(name)
    for candidate in (wanted, wanted.removeprefix("module.")):
        if candidate in every:
            return every[candidate]
    near = difflib.get_close_matches(wanted, every, n=3, cutoff=0.4)
    hint = f"; the nearest are {', '.join(map(repr, near))}" if near else ""
    raise ValueError(f"spectrum: blocks: the model has no parameter {name!r}{hint}")


def _select(named: Sequence[Piece], frozen: set[str], block: str, selection: Selection) -> list[Piece]:
    if not isinstance(block, str):
        raise TypeError(f"spectrum: blocks must have strings for names, got {block!r}")
    items = [selection] if isinstance(selection, (str, ParameterSlice)) else selection
    if not isinstance(items, Sequence) or not items or not all(isinstance(i, (str, ParameterSlice)) for i in items):
        raise ValueError(
            f"spectrum: blocks[{block!r}] must be a parameter name, a ParameterSlice or a non-empty list of those, "
            f"got {items!r}"
        )
    pieces = []
    for item in items:
        found = _lookup(named, item.name if isinstance(item, ParameterSlice) else item)
        _check_dtype(found)
        if found.name in frozen:
            raise ValueError(f"spectrum: blocks[{block!r}]: parameter {found.name!r} is frozen (requires_grad=False)")
        if isinstance(item, ParameterSlice):
            part, shape = replace(item, name=found.name), found.shape
            if not 0 <= part.dim < len(shape) or not 0 <= part.start < part.stop <= shape[part.dim]:
                raise ValueError(f"spectrum: blocks[{block!r}]: {part!r} must lie within shape {shape}")
            found = replace(found, part=part)
        pieces.append(found)
    _refuse_overlap(block, pieces)
    return pieces


def _refuse_overlap(block: str, pieces: Sequence[Piece]) -> None:
    for i, a in enumerate(pieces):
        for b in pieces[:i]:
            apart = a.tensor is not b.tensor
            if a.part and b.part and a.part.dim == b.part.dim:  # slices along different dimensions always overlap
                apart = apart or a.part.stop <= b.part.start or b.part.stop <= a.part.start
            if not apart:
                raise ValueError(
                    f"spectrum: blocks[{block!r}] must not hold the same entries twice, got "
                    f"{b.part or b.name} and {a.part or a.name}"
                )


def _match(trainable: Sequence[Piece], pairs: Sequence[tuple[str, str]]) -> dict[str, list[Piece]]:
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(s, str) for s in pair):
            raise ValueError(f"spectrum: blocks must be a list of (regex, group) pairs of strings, got {pair!r}")
    groups: dict[str, list[Piece]] = {}
    unmatched = {regex for regex, _ in pairs}
    for n in trainable:
        for regex, template in pairs:
            try:
                found = next(filter(None, (re.search(regex, name) for name in (n.name, *n.aliases))), None)
                group = found.expand(template) if found else ""
            except (re.error, IndexError) as error:
                raise ValueError(f"spectrum: blocks: pair {(regex, template)!r} must be a regex, {error}") from None
            if found:
                groups.setdefault(group, []).append(n)
                unmatched.discard(regex)
                break
    if unmatched:
        names = ", ".join(repr(n.name) for n in trainable[:3])
        raise ValueError(
            f"spectrum: blocks: regex {sorted(unmatched)[0]!r} matches no trainable parameter that an earlier regex "
            f"has not taken; their names are like {names}"
        )
    return groups


def _block(name: str, pieces: tuple[Piece, ...]) -> Block:
    for piece in pieces:
        _check_dtype(piece)
    aliases = {p.name: p.aliases for p in pieces}
    dim = sum(prod(p.shape) for p in pieces)
    if dim == 0:
        raise ValueError(f"spectrum: block {name!r} must have at least one entry, got shape {pieces[0].shape}")
    others = [alias for names in aliases.values() for alias in names]
    note = f"tied with {', '.join(others)}" if others else ""
    shape = pieces[0].shape if len(pieces) == 1 else (dim,)
    return Block(BlockInfo(name, shape, dim, tuple(aliases), note), pieces)


def _check_dtype(piece: Piece) -> None:
    dtype, layout = piece.tensor.dtype, piece.tensor.layout
    if layout != torch.strided:
        raise ValueError(f"spectrum: parameter {piece.name!r} must be dense, got {layout}; use its to_dense()")
    if piece.tensor.is_inference():
        raise ValueError(
            f"spectrum: parameter {piece.name!r} must be made outside torch.inference_mode(), got an inference tensor"
        )
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return
    advice = "it cannot be trained: make it a buffer"
    if dtype.is_complex:
        advice = "give its real and imaginary part as two real parameters"
    raise ValueError(
        f"spectrum: parameter {piece.name!r} must be a real floating-point number, got {dtype}; {advice}, or name the "
        "other parameters in blocks="
    )
