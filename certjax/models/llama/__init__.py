"""The LLaMA family: LLaMA 2 and 3, TinyLlama, SmolLM2 and whatever else Hugging Face calls `LlamaForCausalLM`."""

from certjax.models.llama.config import LlamaConfig, RopeScaling
from certjax.models.llama.modeling import Attend, decode_step, forward, init_params, unembed

__all__ = ["LlamaConfig", "RopeScaling", "Attend", "forward", "unembed", "decode_step", "init_params"]
