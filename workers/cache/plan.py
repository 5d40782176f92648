"""The cache plan: what a calibration found for every layer, as safetensors and JSON.

Shape suffixes: H key/value heads, D head size.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import (
    GROUP_BITS,
    ChannelGroup,
    FittedCodec,
    HalfCodec,
    HeadFit,
    VectorCodec,
    in_columns,
)
from stillhouse.storage.durable import replace_file
from stillhouse.workers.cache.scheme import CACHE_KINDS, CacheKind

PLAN_VERSION = 2
PLAN_FILE = "cache_plan.json"
TENSOR_FILE = "cache_plan.safetensors"
# Of a model's folder: engines load every safetensors file that lies beside the weights.
PLAN_FOLDER = "cache"
_CODING = "coding"
# RuntimeError: a map without an inverse.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, SafetensorError, RuntimeError)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer's keys and values are coded; None keeps them in 16 bits."""

    key: HeadFit | None
    value: HeadFit | None

    def fit(self, kind: CacheKind) -> HeadFit | None:
        """Of the keys or of the values."""
        return self.key if kind == "key" else self.value


@dataclass(frozen=True, slots=True)
class CachePlan:
    """Fits of all layers, windows, and what the calibration says of itself: `facts`, plain JSON."""

    layers: tuple[LayerPlan, ...]
    sinks: int
    recent: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """Write both files; the JSON names the tensors' hash and is written last."""
        tensors: dict[str, Tensor] = {}
        rows = []
        for index, layer in enumerate(self.layers):
            row: dict[str, Any] = {}
            for kind in CACHE_KINDS:
                fit = layer.fit(kind)
                row[kind] = None
                if fit is not None:
                    row[kind] = [[group.channels, group.bits] for group in fit.groups]
                    for name, tensor in _stored(fit).items():
                        tensors[f"layers.{index}.{kind}.{name}"] = tensor.cpu().contiguous()
            rows.append(row)
        coding = {"sinks": self.sinks, "recent": self.recent, "groups": rows}
        # What decides how bytes are read lies under the hash too; facts do not.
        data = save(tensors, metadata={_CODING: json.dumps(coding)})
        plan = {
            "version": PLAN_VERSION,
            **coding,
            "tensors": {"file": TENSOR_FILE, "sha256": hashlib.sha256(data).hexdigest()},
            "facts": dict(self.facts),
        }
        folder.mkdir(parents=True, exist_ok=True)
        paths = (folder / TENSOR_FILE, folder / PLAN_FILE)
        replace_file(paths[0], data)
        replace_file(paths[1], (json.dumps(plan, indent=1) + "\n").encode())
        return paths

    @classmethod
    def load(cls, folder: Path) -> "CachePlan":
        """Read what `save` wrote; ModelError when it is not whole or of another version."""
        try:
            plan = json.loads((folder / PLAN_FILE).read_bytes())
            version = plan["version"]
            if version != PLAN_VERSION:
                raise ModelError(
                    f"{folder / PLAN_FILE}: expected version {PLAN_VERSION}, found {version!r}; "
                    "calibrate again with this version of stillhouse"
                )
            path = folder / plan["tensors"]["file"]
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != plan["tensors"]["sha256"]:
                raise ModelError(
                    f"{path}: expected sha256 {plan['tensors']['sha256']}, found {found}; "
                    "calibrate again"
                )
            tensors, coding = _read(path)
            for name, value in coding.items():
                if plan[name] != value:
                    raise ValueError(f"{name} of {PLAN_FILE} is not that of {path.name}")
            layers = tuple(
                LayerPlan(*(_fit(tensors, index, kind, row[kind]) for kind in CACHE_KINDS))
                for index, row in enumerate(coding["groups"])
            )
            return cls(layers, coding["sinks"], coding["recent"], plan["facts"])
        except _DAMAGE as error:
            raise ModelError(f"{folder}: expected a cache plan, found {error!r}") from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what is coded how."""
    with safe_open(path, framework="pt") as file:
        coding: dict[str, Any] = json.loads(file.metadata()[_CODING])
        names: list[str] = file.keys()  # a method's list: the file itself is no mapping
        return {name: file.get_tensor(name) for name in names}, coding


def _stored(fit: HeadFit) -> dict[str, Tensor]:
    found = {"mean": fit.mean_HD, "map": fit.map_HDD, "weight": fit.weight_HD}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _fit(
    tensors: Mapping[str, Tensor], index: int, kind: str, groups: list[list[int]] | None
) -> HeadFit | None:
    if groups is None:
        return None
    prefix = f"layers.{index}.{kind}"
    mean_HD, weight_HD = tensors[f"{prefix}.mean"], tensors[f"{prefix}.weight"]
    map_HDD = tensors.get(f"{prefix}.map")
    heads, dim = mean_HD.shape
    square = map_HDD is None or map_HDD.shape == (heads, dim, dim)
    if not square or weight_HD.shape != (heads, dim):
        raise ValueError(f"shapes of layer {index}'s {kind}s do not fit each other")
    # The inverse is not stored: it follows from the map.
    inverse_HDD = None if map_HDD is None else torch.linalg.inv(map_HDD.double()).float()
    coded = tuple(ChannelGroup(channels, bits) for channels, bits in groups)
    fits = all(g.channels > 0 and g.channels % 8 == 0 and g.bits in GROUP_BITS for g in coded)
    fits = fits and all(group.bits for group in coded[:-1])  # what is not stored comes last
    if not fits or sum(group.channels for group in coded) != dim:
        raise ValueError(f"groups of layer {index}'s {kind}s do not fit {dim} channels: {groups}")
    map_HDD = None if map_HDD is None else in_columns(map_HDD)
    return HeadFit(mean_HD, map_HDD, inverse_HDD, weight_HD, coded)


class FittedScheme:
    """The codecs of a plan; keys `unbiased`, values `least_squares`."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.sinks, self.recent = plan.sinks, plan.recent
        self._codecs: dict[tuple[int, CacheKind, torch.device], VectorCodec] = {}

    def codec(self, layer: int, kind: CacheKind, sample_BHTD: Tensor) -> VectorCodec:
        """One a layer, kind and device; ValueError for another model's vectors."""
        if layer >= len(self.plan.layers):
            raise ValueError(
                f"expected a model of {len(self.plan.layers)} layers, as the cache plan was made "
                f"for, found a layer {layer}; calibrate for this model"
            )
        key = (layer, kind, sample_BHTD.device)
        if key not in self._codecs:
            self._codecs[key] = self._made(layer, kind, sample_BHTD)
        return self._codecs[key]

    def _made(self, layer: int, kind: CacheKind, sample_BHTD: Tensor) -> VectorCodec:
        heads, dim = sample_BHTD.shape[1], sample_BHTD.shape[3]
        fit = self.plan.layers[layer].fit(kind)
        if fit is None:
            return HalfCodec(dim)
        if fit.mean_HD.shape != (heads, dim):
            raise ValueError(
                f"expected {fit.mean_HD.shape[0]} KV heads of size {fit.mean_HD.shape[1]} in layer "
                f"{layer}, as the cache plan was made for, found {heads} of {dim}; calibrate for "
                "this model"
            )
        fit = fit.to(sample_BHTD.device)
        return FittedCodec(fit, "unbiased" if kind == "key" else "least_squares")
