"""Data: what is trained on, made or changed, as pure functions with explicit keys."""

from jaxref.data.in_context import InContextPrompts, linear_regression_prompts

__all__ = [
    "InContextPrompts",
    "linear_regression_prompts",
]
