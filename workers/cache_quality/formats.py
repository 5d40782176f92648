"""The names of cache formats that can be measured; no torch.

    bf16  fp8  mse:BITS  kAvB  fitted:BITS  prod:BITS  polar  vllm:PRESET  vllm:PRESET:all
    quanto:BITS  hqq:BITS

`mse` is data-oblivious, half bits by a split of the channels, and kAvB is mse with A bits for keys
and B for values; `fitted` is calibrated; `prod` takes the sketch for keys and mse for values.
vLLM's presets leave two layers at each end in 16 bits, `:all` quantises those too. quanto and hqq
are transformers' QuantizedCache.
"""

import re
from dataclasses import dataclass

from stillhouse.errors import ConfigError

DEFAULT_FORMATS = (
    "bf16",
    "fp8",
    *(f"{family}:{bits}" for family in ("mse", "fitted") for bits in ("4", "3.5", "3", "2.5", "2")),
    *(f"prod:{bits}" for bits in (4, 3, 2)),
    "polar",
    *(
        f"vllm:{preset}{layers}"
        for layers in ("", ":all")
        for preset in ("k8v4", "4bit_nc", "k3v4_nc", "3bit_nc")
    ),
    *("quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2"),
)
_PATTERNS = {
    "bf16": r"bf16",
    "fp8": r"fp8",
    "mse": r"mse:(?P<bits>[1-58]|[1-4]\.5)|k(?P<key_bits>[1-58])v(?P<value_bits>[1-58])",
    "fitted": r"fitted:(?P<bits>[1-4](\.[0-9]+)?|5)",
    "prod": r"prod:(?P<bits>[2-5])",
    "polar": r"polar",
    "vllm": r"vllm:(?P<preset>k8v4|4bit_nc|k3v4_nc|3bit_nc)(?P<all>:all)?",
    "quanto": r"quanto:(?P<bits>[24])",
    "hqq": r"hqq:(?P<bits>[1-48])",
}
_SEEDED = ("mse", "fitted", "prod", "polar")


@dataclass(frozen=True, slots=True)
class QualityFormat:
    """A format by name. bits: (keys, values) a coordinate without scalars, where the name says."""

    name: str
    family: str
    bits: tuple[float, float] | None = None
    preset: str | None = None
    all_layers: bool = True

    @property
    def calibrated(self) -> bool:
        """Whether a corpus shaped it."""
        return self.family == "fitted"

    @property
    def seeded(self) -> bool:
        """Whether it draws a rotation or a sketch."""
        return self.family in _SEEDED

    @property
    def curve(self) -> str:
        """The formats it makes a curve with, in a picture."""
        return f"{self.family}, all layers" if self.preset and self.all_layers else self.family


def parse_format(name: str) -> QualityFormat:
    """The format of a name; ConfigError for an unknown one."""
    for family, pattern in _PATTERNS.items():
        if found := re.fullmatch(pattern, name):
            parts = found.groupdict()
            key, value = (parts.get(part) or parts.get("bits") for part in _BITS)
            bits = (float(key), float(value)) if key and value else None
            preset = parts.get("preset")
            return QualityFormat(name, family, bits, preset, not preset or bool(parts["all"]))
    raise ConfigError(
        f"--formats: expected names such as {', '.join(DEFAULT_FORMATS)} or k4v3, "
        f"found {name!r:.60}"
    )


_BITS = ("key_bits", "value_bits")
