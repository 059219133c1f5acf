"""Ranking-based losses for object detection: exact, deterministic, balanced.

aLRP Loss (NeurIPS 2020) and its family, as functions and as modules. Importing this needs torch
alone.
"""

from .boxes import localisation_errors
from .errors import Counts, Errors
from .functional import alrp_loss, ap_loss, error_driven_loss
from .losses import ALRPLoss, ALRPOutput, APLoss, SelfBalance
from .ops import set_backend

__all__ = [
    "ALRPLoss",
    "ALRPOutput",
    "APLoss",
    "Counts",
    "Errors",
    "SelfBalance",
    "alrp_loss",
    "ap_loss",
    "error_driven_loss",
    "localisation_errors",
    "set_backend",
]

__version__ = "0.1.0"
