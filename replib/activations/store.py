"""Activations with their provenance, in memory and on disk.

A folder holds ``shard-00000.safetensors``, … and, once complete, ``activations.json``. A shard covers consecutive
prompts and records its recipe and checksums, so a capture resumes at the first missing shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replib.core.errors import ReplibError
from replib.core.storage import replacing, write_tensors, write_text
from replib.models.tokens import Position

_INDEX = "activations.json"
SHARD = 1024


@dataclass(frozen=True)
class Activations:
    """Vectors of prompts at layers, with their provenance."""

    values: Float[Tensor, "layers vectors ... dim"]
    """One vector per prompt, ``[layers, prompts, dim]``; with several positions ``[layers, prompts, positions, dim]``;
    with ``pool="none"`` one vector per token, ``[layers, tokens, dim]``, prompt after prompt."""
    layers: tuple[int, ...]
    positions: Position | tuple[Position, ...]
    site: str
    provenance: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    """One per prompt, or empty."""
    prompt: Int[Tensor, " vectors"] | None = None
    """Prompt index of each vector, for ``pool="none"`` and ``short="leave_out"``; else None."""

    def __getitem__(self, layer: int) -> Float[Tensor, "vectors ... dim"]:
        """Vectors of one block, by its index; a negative index counts from the last captured block."""
        if layer < 0:
            return self.values[layer]
        if layer not in self.layers:
            raise ReplibError(f"Layer {layer} was not captured; captured: {list(self.layers)}.")
        return self.values[self.layers.index(layer)]

    def __len__(self) -> int:
        """Number of vectors per layer."""
        return self.values.shape[1]

    def at(self, position: Position) -> Activations:
        """Activations at one of several positions."""
        if not isinstance(self.positions, tuple) or position not in self.positions:
            raise ReplibError(f"Position {position!r} is not one of several captured; captured: {self.positions!r}.")
        return replace(self, values=self.values[:, :, self.positions.index(position)], positions=position)

    def where(self, label: str) -> Activations:
        """Activations of the prompts with a label."""
        if label not in self.labels:
            raise ReplibError(f"No prompt is labelled {label!r}; labels: {sorted(set(self.labels))}.")
        return self.of([i for i, found in enumerate(self.labels) if found == label])

    def of(self, prompts: Sequence[int]) -> Activations:
        """Activations of some prompts, by index, in the given order."""
        labels = tuple(self.labels[i] for i in prompts) if self.labels else ()
        if self.prompt is None:
            return replace(self, values=self.values[:, list(prompts)], labels=labels)
        picked = [(self.prompt == i).nonzero()[:, 0] for i in prompts]
        owner = torch.arange(len(picked)).repeat_interleave(torch.tensor([len(p) for p in picked]))
        return replace(self, values=self.values[:, torch.cat(picked)], labels=labels, prompt=owner)

    def save(self, folder: Path | str, *, shard: int = SHARD) -> Path:
        """Write a folder of shards, ``shard`` prompts each, in place of earlier activations.

        Raises ReplibError if the folder holds anything else, or cannot be written.
        """
        folder = Path(folder)
        _check_replaceable(folder)
        count = len(self) if self.prompt is None else int(self.prompt.max()) + 1
        with replacing(folder) as partial:
            shards = Shards(partial, {})
            for number, start in enumerate(range(0, count, shard)):
                part = self.of(range(start, min(start + shard, count)))
                owner = {} if part.prompt is None else {"prompt": part.prompt}
                values = {f"{self.site}.{layer}": v for layer, v in zip(self.layers, part.values, strict=True)}
                shards.write(number, values | owner, {"n": min(start + shard, count) - start})
            shards.finish(self.layers, self.positions, [self.site], self.provenance, self.labels)
        return folder

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        site: str | None = None,
        layers: Sequence[int] | None = None,
        prompts: range | None = None,
    ) -> Activations:
        """Read a folder, or some layers and a range of prompts of it.

        Args:
            folder: folder written by ``save`` or ``capture_to``.
            site: the site to read, if the folder holds several.
            layers: block indices, default all in the folder.
            prompts: a range of consecutive prompts, default all.

        Raises:
            ReplibError: an unfinished folder, a layer or site absent from it, or a damaged shard.
        """
        shards = Shards(Path(folder), {})
        about = shards.index()
        site = _one_site(site, about["sites"], shards.folder)
        missing = [i for i in layers or () if i not in about["layers"]]
        if missing:
            raise ReplibError(f"Layer {missing[0]} is not in {folder}: it holds {about['layers']}.")
        layers = list(about["layers"] if layers is None else layers)
        prompts = range(sum(about["prompts"])) if prompts is None else prompts
        values, owner = shards.read(site, layers, prompts, about["prompts"])
        positions = about["positions"]
        return cls(
            values,
            tuple(layers),
            tuple(positions) if isinstance(positions, list) else positions,
            site,
            about["provenance"],
            tuple(about["labels"][i] for i in prompts) if about["labels"] else (),
            owner,
        )


def _one_site(site: str | None, sites: Sequence[str], folder: Path) -> str:
    if site is None and len(sites) == 1:
        return sites[0]
    if site not in sites:
        raise ReplibError(f"{folder} holds {', '.join(sites)}: choose one of them with site=…, not {site!r}.")
    return str(site)


class Shards:
    """Files of one capture. ``recipe`` holds everything but the prompts that determines their bytes."""

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        self.folder, self.recipe = folder, recipe

    def path(self, number: int) -> Path:
        """File of one shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def files(self) -> list[Path]:
        """Existing shards, in order."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def has(self, number: int, prompts: Sequence[str]) -> bool:
        """Whether a shard of exactly these prompts exists.

        Raises ReplibError if the existing one has another recipe or other prompts.
        """
        if not self.path(number).exists():
            return False
        about = _about(self.path(number))
        if about["recipe"] != self.recipe:
            differs = sorted(
                k for k in {*about["recipe"], *self.recipe} if about["recipe"].get(k) != self.recipe.get(k)
            )
            raise ReplibError(
                f"{self.folder} holds another capture (its {', '.join(differs)} differ): choose another folder "
                "(--name), or delete that one."
            )
        if about["texts"] != _hashes(prompts)[: about["n"]]:
            raise ReplibError(
                f"{self.folder} holds activations of other prompts: choose another folder (--name), delete that one, "
                "or give the earlier prompts first (a longer list is appended)."
            )
        return about["n"] == len(prompts)

    def write(self, number: int, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Write one shard by ``storage.replacing``."""
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        hashes = {name: _digest(t) for name, t in tensors.items()}
        text = json.dumps(about | {"recipe": self.recipe, "sha256": hashes}, sort_keys=True)
        write_tensors(self.path(number), tensors, {"replib": text})

    def finish(
        self,
        layers: Sequence[int],
        positions: Position | Sequence[Position],
        sites: Sequence[str],
        provenance: dict[str, str],
        labels: Sequence[str] = (),
    ) -> Path:
        """Write the index of the shards, which makes the folder readable."""
        about = {
            "layers": list(layers),
            "positions": positions,
            "sites": list(sites),
            "prompts": [_about(file)["n"] for file in self.files()],
            "provenance": provenance,
            "labels": list(labels),
        }
        write_text(self.folder / _INDEX, json.dumps(about, sort_keys=True) + "\n")
        return self.folder

    def index(self) -> dict[str, Any]:
        """Index written by ``finish``; raises ReplibError if the capture is unfinished."""
        file = self.folder / _INDEX
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
        unfinished = f"only {len(self.files())} shards of an unfinished capture: run it again, it goes on there."
        state = unfinished if self.files() else "no activations. Capture first, then save."
        raise ReplibError(f"{self.folder} holds {state}")

    def read(
        self, site: str, layers: Sequence[int], prompts: range, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Values of a range of prompts; prompt index of each vector, if stored."""
        found: list[Tensor] = []
        owners: list[Tensor] = []
        start = 0
        for number, size in enumerate(sizes):
            wanted = range(max(prompts.start, start) - start, min(prompts.stop, start + size) - start)
            if wanted:
                values, owner = self._stretch(number, [f"{site}.{layer}" for layer in layers], wanted)
                found.append(values)
                owners += [] if owner is None else [owner + start + wanted.start - prompts.start]
            start += size
        if not found:
            raise ReplibError(f"{self.folder} holds {sum(sizes)} prompts, none of them in {prompts}.")
        return torch.cat(found, dim=1), torch.cat(owners) if owners else None

    def _stretch(self, number: int, names: Sequence[str], wanted: range) -> tuple[Tensor, Tensor | None]:
        tensors = _checked(self.path(number), names)
        owner = tensors.pop("prompt", None)
        values = torch.stack(list(tensors.values()))
        if owner is None:
            return values[:, wanted.start : wanted.stop], None
        inside = (owner >= wanted.start) & (owner < wanted.stop)
        return values[:, inside], owner[inside] - wanted.start


def _check_replaceable(folder: Path) -> None:
    """Raise ReplibError if a folder holds anything but activations."""
    files = folder.iterdir() if folder.is_dir() else ()
    if foreign := [f.name for f in files if f.name != _INDEX and not f.name.startswith("shard-")]:
        raise ReplibError(f"{folder} holds {foreign[0]}, which is not part of any activations: choose another folder.")


def texts_of(prompts: Sequence[str]) -> dict[str, Any]:
    """Number and hashes of the prompts, for the metadata of a shard."""
    return {"n": len(prompts), "texts": _hashes(prompts)}


def _hashes(prompts: Iterable[str]) -> list[str]:
    """Eight hex digits per prompt, to detect a changed list."""
    return [hashlib.sha256(p.encode()).hexdigest()[:8] for p in prompts]


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()


def _about(path: Path) -> dict[str, Any]:
    with _opened(path) as file:
        return json.loads(file.metadata()["replib"])


def _checked(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a shard, each with its checksum verified."""
    hashes = _about(path)["sha256"]
    with _opened(path) as file:
        found = {name: file.get_tensor(name) for name in [*names, *(["prompt"] if "prompt" in hashes else [])]}
    for name, values in found.items():
        if _digest(values) != hashes[name]:
            raise ReplibError(
                f"{path} is damaged: the checksum of {name} is wrong. Delete that file and capture again."
            )
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (SafetensorError, FileNotFoundError) as error:
        raise ReplibError(f"{path} cannot be read ({error}). Delete that file and capture again.") from error
