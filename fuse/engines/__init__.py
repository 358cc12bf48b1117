"""Generation engines behind one protocol: replay (recorded samples), transformers (the embedded default), and vLLM."""

from __future__ import annotations

from fuse.engines.engine import Evicted, GeneratedToken, GenerationEngine, GenerationRequest, SamplingParams

__all__ = ["Evicted", "GeneratedToken", "GenerationEngine", "GenerationRequest", "SamplingParams"]
