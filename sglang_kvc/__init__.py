"""KV-Compress for SGLang: KV cache eviction with a rate per layer and head."""

__version__ = "0.1.0"
