"""The published methods by name: each is settings of one of the objectives."""

import dataclasses
from typing import Any

from refusion_jax.errors import UserError
from refusion_jax.objective import block, masked
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.refusion import Refusion
from refusion_jax.objective.sedd import Sedd

METHODS = {
    "refusion": Refusion(),
    "autoregressive": Autoregressive(),
    **masked.METHODS,
    **block.METHODS,
    "sedd": Sedd(),
}


def objective_settings(method: str, **overrides: Any) -> dict[str, Any]:
    """The `config.objective` group of a published method, for config files.

    Raises:
      UserError: there is no such method.
    """
    if method not in METHODS:
        raise UserError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
    return dataclasses.asdict(METHODS[method]) | overrides
