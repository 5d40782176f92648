"""The cache that a student was evaluated with, by the name that servers have for it."""

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ConfigError


def evaluated_cache(config: CompressConfig, has_plan: bool) -> str:
    """`plan`, or `kAvB` where nothing was fitted; ConfigError for codecs that no server has."""
    if has_plan:
        return "plan"
    bits = (config.key_bits, config.value_bits)
    if not config.is_served_unfitted:
        scalars = (config.key_scalar, config.value_scalar, config.seed)
        raise ConfigError(
            "expected a cache that servers have: a fitted one, or 1 to 5 bits with the scalars and "
            f"the seed that are the default and no recent tokens; found {bits} bits, {scalars}, "
            f"recent={config.recent}; serve with --cache bf16, or deploy with engine: transformers"
        )
    return f"k{bits[0]}v{bits[1]}"
