"""What a run learns from text, besides the next token."""

from jaxref.train.objectives.blanks import codegen_mixture, glm_blank
from jaxref.train.objectives.electra import electra
from jaxref.train.objectives.frame import next_token
from jaxref.train.objectives.tokens import emo, goldfish, prior, reweighted

__all__ = [
    "next_token",
    "goldfish",
    "emo",
    "reweighted",
    "prior",
    "electra",
    "codegen_mixture",
    "glm_blank",
]
