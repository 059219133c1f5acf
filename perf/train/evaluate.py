"""Detections of a trained detector, and what they are worth: COCO AP, oLRP, rank correlation."""

from __future__ import annotations

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor
from torchvision.models.detection import RetinaNet

from alrp_triton import LRP, match_detections, score_iou_correlation
from perf.train.digits import CANVAS, NUM_CLASSES

Boxes = list[dict[str, Tensor]]  # per image: boxes (T, 4) xyxy, labels (T,), and scores if detected


@torch.inference_mode()
def detect(model: RetinaNet, images: list[Tensor], device: torch.device, batch: int = 50) -> Boxes:
    """Return the model's detections on the CPU: up to 100 an image, by descending score."""
    model.eval()
    detections = []
    for start in range(0, len(images), batch):
        outputs = model([image.to(device) for image in images[start : start + batch]])
        detections += [{key: value.cpu() for key, value in output.items()} for output in outputs]
    return detections


def evaluate(detections: Boxes, truths: Boxes) -> dict[str, float]:
    """Return COCO's AP, AP50, AP75, AP90 and oLRP, in [0, 1], and rho, in [-1, 1].

    oLRP is that of `LRP`, and rho that of `score_iou_correlation` over the true positives, both at
    IoU 0.5 as COCO matches; rho is NaN where there is nothing to correlate.
    """
    ground_truth = COCO(_coco_dataset(truths))
    coco = COCOeval_faster(ground_truth, ground_truth.loadRes(_coco_results(detections)), "bbox")
    coco.evaluate()
    coco.accumulate()
    precision = coco.eval["precision"][..., 0, -1]  # (IoUs, recalls, classes): all areas, 100 dets
    metrics = {"AP": _mean_precision(precision)}
    for percent in (50, 75, 90):
        at_iou = np.isclose(coco.params.iouThrs, percent / 100)
        metrics[f"AP{percent}"] = _mean_precision(precision[at_iou])
    lrp = LRP(tau=0.5)
    lrp.update(detections, truths)
    metrics["oLRP"] = lrp.compute()["olrp"].item()
    matches = match_detections(detections, truths, tau=0.5)
    true_positives = (matches.scores, matches.ious, matches.labels)
    metrics["rho"] = score_iou_correlation(*(part[matches.true] for part in true_positives)).item()
    return metrics


def _mean_precision(precision: np.ndarray) -> float:
    present = precision > -1  # -1: no ground truth of the class
    return float(precision[present].mean()) if present.any() else float("nan")


def _coco_dataset(truths: Boxes) -> dict:
    annotations: list[dict] = []
    for image_id, truth in enumerate(truths):
        for (x1, y1, x2, y2), label in zip(
            truth["boxes"].tolist(), truth["labels"].tolist(), strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,  # COCO's matching takes 0 for "no match"
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": i, "width": CANVAS, "height": CANVAS} for i in range(len(truths))],
        "categories": [{"id": label} for label in range(NUM_CLASSES)],
        "annotations": annotations,
    }


def _coco_results(detections: Boxes) -> list[dict]:
    return [
        {
            "image_id": image_id,
            "category_id": label,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, found in enumerate(detections)
        for (x1, y1, x2, y2), label, score in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]
