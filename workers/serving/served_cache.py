"""What a server keeps in its cache: a name for every format, codecs and blocks for every layer.

plan    what a calibration found, layer by layer (`CachePlan`)
kAvB    the paper's Algorithm 1 with A bits for keys and B for values, 1 to 5
fp8     8-bit floats (e4m3)
bf16    16 bits, the engine's own cache
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import ModelError
from stillhouse.kernels.paged_attention import PAGE_TOKENS, PageFormat
from stillhouse.kernels.turboquant import Fp8Codec, HalfCodec
from stillhouse.workers.cache import (
    CACHE_KINDS,
    CacheFormat,
    CachePlan,
    CacheScheme,
    FittedScheme,
    ObliviousScheme,
    SameCodecScheme,
)
from stillhouse.workers.cache.cpu_attention import vector_format
from stillhouse.workers.serving.layout import BlockLayout

PLAN, HALF, FP8 = "plan", "bf16", "fp8"
_SAME = re.compile(r"k([1-5])v([1-5])")


@dataclass(frozen=True)
class ServedCache:
    """format: a name. folder: of the plan. sinks: of a format that is no plan."""

    format: str
    folder: Path | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.format not in (PLAN, HALF, FP8) and not _SAME.fullmatch(self.format):
            raise ModelError(
                f"cache: expected plan, bf16, fp8 or kAvB with 1 to 5 bits, such as k4v4, found "
                f"{self.format!r:.40}"
            )
        if self.format == PLAN and self.folder is None:
            raise ModelError("cache: expected the folder of a plan, found none")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "ServedCache":
        """From what `settings` gave; ModelError for anything else."""
        names = {"format", "folder", "sinks"}
        if "format" not in settings or set(settings) - names:
            raise ModelError(
                f"cache: expected settings of {sorted(names)}, found {settings!r:.200}"
            )
        folder = settings.get("folder")
        return cls(settings["format"], folder and Path(folder), settings.get("sinks", 0))

    def settings(self) -> dict[str, Any]:
        """Plain JSON, for the engine's processes."""
        return {
            "format": self.format,
            "folder": None if self.folder is None else str(self.folder),
            "sinks": self.sinks,
        }

    @cached_property
    def scheme(self) -> CacheScheme:
        """Its codecs. ModelError for a plan that cannot be read, or with a `recent` window."""
        if self.format == PLAN:
            assert self.folder is not None
            plan = CachePlan.load(self.folder)
            if plan.recent:
                raise ModelError(
                    f"{self.folder}: expected a plan without recent tokens in 16 bits, found "
                    f"{plan.recent}: which tokens are recent would depend on how the server cuts "
                    "prompts into chunks; compress again with `recent: 0`"
                )
            return FittedScheme(plan)
        if self.format == FP8:
            return SameCodecScheme(lambda dim, _, device: Fp8Codec(dim, device=device), self.sinks)
        found = _SAME.fullmatch(self.format)
        assert found is not None
        key, value = map(int, found.groups())
        return ObliviousScheme(CacheFormat(key, value, sinks=self.sinks))

    def layer(
        self,
        index: int,
        heads: int,
        dim: int,
        block: int,
        device: torch.device | str = "cpu",
    ) -> "LayerCache | None":
        """Of `heads` heads of `dim` channels, in blocks of `block` tokens; None for 16 bits.

        ModelError for another model's plan, and for what cannot be served.
        """
        if self.format == HALF:
            return None
        if block not in PAGE_TOKENS:
            raise ModelError(
                f"cache: expected blocks of {PAGE_TOKENS} tokens, found {block}; serve with "
                "--block-size 128"
            )
        # An explicit dtype: engines build models under a bfloat16 default dtype.
        sample_BHTD = torch.empty((1, heads, 0, dim), dtype=torch.float32, device=device)
        try:
            key, value = (self.scheme.codec(index, kind, sample_BHTD) for kind in CACHE_KINDS)
        except ValueError as error:
            raise ModelError(f"cache: {error}") from error
        halves = isinstance(key, HalfCodec), isinstance(value, HalfCodec)
        if all(halves):
            return None
        if any(halves):
            raise ModelError(
                f"cache: expected layer {index}'s keys and values both in 16 bits or both coded, "
                "found one of each; calibrate with more bits or fewer"
            )
        pages = PageFormat.of(vector_format(key), vector_format(value), block)
        return LayerCache((key, value), BlockLayout(pages, dim, self.scheme.sinks))


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Codecs of keys and values, and the blocks that they go into."""

    codecs: tuple[Any, Any]
    layout: BlockLayout
