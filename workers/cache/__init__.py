"""Key/value caches for transformers that hold packed vectors."""

from stillhouse.workers.cache.turboquant import CacheFormat, TurboQuantCache

__all__ = ["CacheFormat", "TurboQuantCache"]
