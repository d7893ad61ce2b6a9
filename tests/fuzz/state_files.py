"""State files under fuzz: damaged ones must be refused, forged ones with a right checksum are what safetensors sees."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from blockhess.run.storage import store, tensor_file
from tests.fuzz.mutations import changed, damaged, nasty, text_of
from tests.fuzz.targets import Reader, require

START = b'{"__metadata__":{"checksum":"'


class StateFiles(Reader):
    """blockhess.run.storage.store.read."""

    name = "state"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        rng = torch.Generator().manual_seed(0)
        self.tensors = {
            "alpha": torch.randn(2, 3, generator=rng, dtype=torch.float64),
            "vectors": torch.randn(2, 5, generator=rng),
            "finished": torch.tensor([True, False, False]),
            "steps": torch.tensor(7),
            "none": torch.empty(0, 3),
        }
        store.write(self.path, self.tensors, {"step": 3, "names": ["a", "ü"]})
        self.data = self.path.read_bytes()

    def make(self, rng: random.Random) -> tuple[bytes, Any]:
        if rng.random() < 0.3:
            return damaged(rng, self.data), "refused unless equal"
        length = int.from_bytes(self.data[:8], "little")
        table, data = json.loads(self.data[8 : 8 + length]), self.data[8 + length :]
        metadata = table.pop("__metadata__")
        kind = rng.randrange(4)
        if kind == 0:
            metadata["header"] = text_of(rng, changed(rng, json.loads(metadata["header"]))).decode("latin1")
        elif kind == 1:
            data = damaged(rng, data)
        elif kind == 2:
            metadata["header"] = nasty(rng)
        else:
            table = changed(rng, table)
        if not isinstance(table, dict):
            table = {"a": table}
        text = text_of(rng, {"__metadata__": metadata, **table}).replace(b'{"__metadata__": {"checksum": "', START, 1)
        return forged(rng, text, data), None

    def read(self) -> Any:
        return store.read(self.path)

    def check(self, content: Any, expected: Any) -> None:
        tensors, header = content
        data = self.path.read_bytes()
        require(expected is None or data == self.data, "damaged bytes were taken for a state")
        require(isinstance(header, dict), "a header that is no mapping")
        try:
            reference = load_safetensors(data)
        except SafetensorError as error:
            raise AssertionError(f"safetensors refuses what was read: {error}") from None
        require(reference.keys() == tensors.keys(), "other tensors than safetensors reads")
        for name, tensor in tensors.items():
            same = tensor.dtype == reference[name].dtype and tensor.shape == reference[name].shape
            flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, reference[name]))
            require(same and torch.equal(*flat), f"{name!r} is not what safetensors reads")
        tensors_again, header_again = self.again(tensors, header)
        require(json.dumps(header_again) == json.dumps(header), "the header does not survive a write")
        require(tensors_again.keys() == tensors.keys(), "the tensors do not survive a write")

    def again(self, tensors: Any, header: Any) -> Any:
        place = self.folder / "again"
        store.write(place, tensors, header)
        return store.read(place)


def forged(rng: random.Random, text: bytes, data: bytes) -> bytes:
    """A file whose checksum is right, whatever it holds."""
    if rng.random() < 0.95:
        text += b" " * (-len(text) % 8)
    length = struct.pack("<Q", len(text))
    after = text[len(START) + tensor_file.DIGITS :]
    return length + START + tensor_file.checksum([length, START, after, data]) + after + data


class StateTexts(Reader):
    """blockhess.run.storage.store.read_json."""

    name = "text"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.content = {"seed": 3, "names": ["ü", "\n"], "loss": 0.1, "none": None}
        store.write_json(self.path, self.content)
        self.data = self.path.read_bytes()

    def make(self, rng: random.Random) -> tuple[bytes, Any]:
        if rng.random() < 0.5:
            return damaged(rng, self.data), "refused unless equal"
        start = b'{"checksum": "'
        rest = b'",\n "content": ' + text_of(rng, changed(rng, self.content)) + b"}\n"
        if rng.random() < 0.2:
            rest = damaged(rng, rest)
        return start + tensor_file.checksum([start, rest]) + rest, None

    def read(self) -> Any:
        return store.read_json(self.path)

    def check(self, content: Any, expected: Any) -> None:
        data = self.path.read_bytes()
        require(expected is None or data == self.data, "damaged bytes were taken for a text")
        require(json.dumps(json.loads(data)["content"]) == json.dumps(content), "another content")
