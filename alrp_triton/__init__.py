"""Ranking-based losses for object detection: exact, deterministic, balanced.

aLRP Loss (NeurIPS 2020) and its family, as functions and as modules, and the metric that they aim
at. Importing this needs torch alone.
"""

from typing import TYPE_CHECKING, Any

from .backend import set_backend
from .boxes import localisation_errors
from .functional import alrp_loss, ap_loss, error_driven_loss, ndcg_loss, rank_sort_loss
from .loss_terms import Counts, Errors
from .losses import ALRPLoss, ALRPOutput, APLoss, NDCGLoss, RankSortLoss, RankSortOutput
from .matching import Matches, match_detections
from .self_balance import SelfBalance

if TYPE_CHECKING:
    from .metrics import (
        COCO_AREAS,
        LRP,
        lower_bound_scores,
        score_iou_correlation,
        upper_bound_scores,
    )

__all__ = [
    "COCO_AREAS",
    "LRP",
    "ALRPLoss",
    "ALRPOutput",
    "APLoss",
    "Counts",
    "Errors",
    "Matches",
    "NDCGLoss",
    "RankSortLoss",
    "RankSortOutput",
    "SelfBalance",
    "alrp_loss",
    "ap_loss",
    "error_driven_loss",
    "localisation_errors",
    "lower_bound_scores",
    "match_detections",
    "ndcg_loss",
    "rank_sort_loss",
    "score_iou_correlation",
    "set_backend",
    "upper_bound_scores",
]

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Load the metrics when they are asked for: torchmetrics, if there, is slow to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import metrics

    return getattr(metrics, name)
