"""Decoding: many prompts through one compiled loop, by any of the methods (methods.py).

    from refusion_jax.sampling import PlanAndInfillConfig, generate

    config = PlanAndInfillConfig(gen_length=128, slot_size=8, blocks=4, slot_threshold=0.9, token_threshold=0.4)
    for answer in generate(params, model_config, config, prompts, batch_size=8):
        print(tokenizer.decode(answer.tokens), answer.order, answer.rounds, answer.forwards, answer.tokens_per_forward)

`prompts` is a list of lists of ids. `generate` returns a list of `Generation`s in the order of the prompts; `stream`
yields them as they finish, and with `every=n` also unfinished ones (`finished` False) after every n forwards, for
display. Both refill finished rows with waiting prompts. Reports about the batch (steps of the loop, prefills, compile
time) are in the `Report` that may be passed in. `AutoregressiveConfig()` decodes the same weights with
the same cache, step and loop, one token per forward.

Parameters are those of a checkpoint (cast once to bfloat16 with a model config whose dtype is "bfloat16" to decode in
bfloat16; decisions stay in float32). With `mesh=` rows are spread over `data` x `fsdp` and weights over `tensor`:
parameters are then expected where `param_shardings(model_config, mesh, DECODE_RULES)` puts them.
"""

from refusion_jax.sampling.autoregressive import AutoregressiveConfig
from refusion_jax.sampling.batching import Report, generate, stream
from refusion_jax.sampling.block import BlockConfig
from refusion_jax.sampling.config import Generation, SamplerConfig
from refusion_jax.sampling.engine import Engine, Prompt
from refusion_jax.sampling.masked import MaskedConfig
from refusion_jax.sampling.methods import sampler_config
from refusion_jax.sampling.plan_and_infill import PlanAndInfillConfig
from refusion_jax.sampling.speculative import SpeculativeConfig

__all__ = [
    "AutoregressiveConfig",
    "BlockConfig",
    "Engine",
    "Generation",
    "MaskedConfig",
    "PlanAndInfillConfig",
    "Prompt",
    "Report",
    "SamplerConfig",
    "SpeculativeConfig",
    "generate",
    "sampler_config",
    "stream",
]
