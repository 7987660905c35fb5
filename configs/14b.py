"""Qwen3-14B fine-tuned with the authors' recipe; arguments as in refusion_jax/recipe.py."""

from refusion_jax.recipe import recipe


def get_config(argument: str = ""):
    return recipe("14b", argument)
