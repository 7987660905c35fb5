"""The methods of decoding by name, and which of them can decode a model that was trained with which objective."""

import dataclasses
from typing import Any

from refusion_jax.errors import UserError
from refusion_jax.sampling.autoregressive import AutoregressiveConfig
from refusion_jax.sampling.block import BlockConfig
from refusion_jax.sampling.config import SamplerConfig
from refusion_jax.sampling.masked import MaskedConfig
from refusion_jax.sampling.plan_and_infill import PlanAndInfillConfig
from refusion_jax.sampling.speculative import SpeculativeConfig
from refusion_jax.settings import build

METHODS: dict[str, type[SamplerConfig]] = {
    "plan_and_infill": PlanAndInfillConfig,
    "autoregressive": AutoregressiveConfig,
    "speculative": SpeculativeConfig,
    "block": BlockConfig,
    "masked": MaskedConfig,
}
# By the objective's kind; the first is what it was made for. A model without a record of its training can be decoded
# in any way.
SUITED = {
    "refusion": ("plan_and_infill", "autoregressive", "speculative"),
    "autoregressive": ("autoregressive", "speculative", "plan_and_infill"),
    "block": ("block",),
    "masked": ("masked",),
    "sedd": ("masked",),
}


def config_class(method: str) -> type[SamplerConfig]:
    """The settings' dataclass of a method; a UserError if there is no such method."""
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    return METHODS[method]


def sampler_config(method: str, **settings: Any) -> SamplerConfig:
    """The settings of a method.

    Raises:
      UserError: there is no such method, or it has no such setting, or not of this value.
    """
    names = lambda method: [field.name for field in dataclasses.fields(config_class(method))]
    for name in settings:
        if name not in names(method):
            having = [other for other in METHODS if name in names(other)]
            raise UserError(
                f"The method {method} has no setting {name!r}; "
                + (f"it is one of {', '.join(having)}." if having else f"it has {', '.join(names(method))}.")
            )
    return build(config_class(method), settings, method)


def suited(objective: Any, method: str | None) -> str:
    """The method that decodes a model trained with an objective (None: unknown): the given one, or what suits it.

    Raises:
      UserError: the model cannot be decoded so.
    """
    fitting = SUITED[objective.kind] if objective else tuple(METHODS)
    if method is None:
        return fitting[0]
    if objective and method not in fitting:
        raise UserError(
            f"A model of the objective {objective.kind!r} cannot be decoded with the method {method}: decode it with "
            f"{' or '.join(fitting)}."
        )
    return method
