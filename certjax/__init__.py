"""certjax: compressed KV caches for LLM decoding, with a certificate for every head of every step."""

from certjax.attention import certified_attention, dense_attention, naive_attention
from certjax.cache import TieredKVCache
from certjax.certificate import Certificate
from certjax.errors import CertjaxError, ContextLengthError, InvalidArgumentError, MissingTier2Error
from certjax.fused.dispatch import pick_backend
from certjax.generate import Generation, generate, stream
from certjax.model import Model, load
from certjax.models.llama.config import LlamaConfig
from certjax.policy import Policy

__version__ = "0.1.0"

__all__ = [
    "load",
    "generate",
    "stream",
    "Generation",
    "Model",
    "LlamaConfig",
    "Policy",
    "TieredKVCache",
    "certified_attention",
    "dense_attention",
    "pick_backend",
    "naive_attention",
    "Certificate",
    "CertjaxError",
    "InvalidArgumentError",
    "ContextLengthError",
    "MissingTier2Error",
    "__version__",
]
