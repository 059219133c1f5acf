"""The training example: data, evaluation, probe, loop and command. Only what cannot wobble."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("faster_coco_eval")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from matplotlib.figure import Figure

from perf.train import comparison, digits, loop, plots, report
from perf.train.__main__ import LOSSES, main, parse_arguments
from perf.train.detector import RECIPES, small_retinanet
from perf.train.digits import CANVAS, DigitCanvases
from perf.train.evaluate import evaluate
from perf.train.recorder import LossProbe, Stopwatch, gradient_magnitudes

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: many that wait for each other would dominate on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Data


def test_the_same_seed_gives_the_same_canvases():
    one, two, other = (DigitCanvases("train", seed).batch(4) for seed in (3, 3, 4))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    assert not torch.equal(one[0][0], other[0][0])
    assert not torch.equal(one[0][0], DigitCanvases("test", 3).batch(1)[0][0])


def test_canvases_are_images_with_boxes_inside():
    images, targets = DigitCanvases("train", 0).batch(50)
    for image, target in zip(images, targets, strict=True):
        assert image.shape == (1, CANVAS, CANVAS)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        boxes, labels = target["boxes"], target["labels"]
        assert 1 <= len(boxes) == len(labels) <= 4
        assert boxes.min() >= 0
        assert boxes.max() <= CANVAS
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert torch.cat([target["labels"] for target in targets]).unique().tolist() == list(range(10))


def test_boxes_are_tight_on_the_ink(monkeypatch):
    monkeypatch.setattr(digits, "_MAX_FRAGMENTS", 0)
    canvases = DigitCanvases("train", 0)
    canvases.noise[:] = 0
    canvases.clouds[:] = 0  # what is left is digits on plain grey
    single = [
        (image, target["boxes"][0])
        for image, target in zip(*canvases.batch(60), strict=True)
        if len(target["boxes"]) == 1
    ]
    assert len(single) > 5
    for image, box in single:
        contrast = (image[0] - 0.5).abs()
        ys, xs = torch.where(contrast >= digits._INK * contrast.max())
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_no_digit_is_in_both_splits():
    train, test = (digits._glyphs(split)[1] for split in ("train", "test"))
    assert len(train) + len(test) == 1797
    with pytest.raises(ValueError, match="split"):
        DigitCanvases("validation", 0)


# Evaluation


@pytest.fixture(scope="module")
def truths():
    return DigitCanvases("test", 0).batch(40)[1]


def with_scores(truths, boxes=lambda boxes: boxes):
    return [
        {**truth, "boxes": boxes(truth["boxes"]), "scores": torch.rand(len(truth["labels"]))}
        for truth in truths
    ]


def test_perfect_detections(truths):
    measures = evaluate(with_scores(truths), truths)
    assert [measures[name] for name in ("AP", "AP50", "AP75", "AP90", "oLRP")] == [1, 1, 1, 1, 0]
    assert np.isnan(measures["rho"])  # every IoU is 1: there is nothing to correlate


def test_no_detections(truths):
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "scores": torch.zeros(0),
    }
    measures = evaluate([nothing] * len(truths), truths)
    assert [measures[name] for name in ("AP", "AP50", "AP75", "AP90", "oLRP")] == [0, 0, 0, 0, 1]
    assert np.isnan(measures["rho"])


def test_detections_at_a_known_iou(truths):
    def lower_part(boxes):  # of 82 % of the height: true at IoU 0.5, 0.55, ... 0.8
        top = boxes[:, 3] - 0.82 * (boxes[:, 3] - boxes[:, 1])
        return torch.stack([boxes[:, 0], top, boxes[:, 2], boxes[:, 3]], dim=1)

    apart = [{key: value[:1] for key, value in truth.items()} for truth in truths]
    measures = evaluate(with_scores(apart, lower_part), apart)
    expected = {"AP": 0.7, "AP50": 1, "AP75": 1, "AP90": 0, "oLRP": 0.18 / 0.5}
    assert {name: measures[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_rank_correlation_of_scores_and_iou(sign):
    box = torch.tensor([[10.0, 10.0, 50.0, 50.0]])
    truths = [{"boxes": box, "labels": torch.tensor([3])}] * 5
    found = [
        {
            "boxes": box - torch.tensor([[0.0, 0.0, 0.0, shrink]]),
            "labels": torch.tensor([3]),
            "scores": torch.tensor([0.5 - sign * 0.01 * shrink**2]),
        }
        for shrink in (1.0, 2.0, 3.0, 4.0, 5.0)
    ]
    assert evaluate(found, truths)["rho"] == pytest.approx(sign)


# Probe


def test_gradient_magnitudes():
    gradient = torch.tensor([[3.0, -2.0], [0.5, -0.5], [0.0, 0.0]])
    classes = torch.tensor([1, -1, -100])  # the gradient of the positive is -2
    assert gradient_magnitudes(gradient, classes).tolist() == [4.0, 2.0]


@pytest.mark.parametrize("loss", ["alrp", "focal-giou"])
def test_the_probe_changes_nothing(loss):
    images, targets = DigitCanvases("train", 0).batch(2)
    gradients = []
    for probed in (False, True):
        torch.manual_seed(0)
        model = small_retinanet().train()
        RECIPES[loss].install(model)
        if probed:
            LossProbe(model, Stopwatch(CPU))
        sum(model(images, targets).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# Training


@pytest.mark.parametrize("loss", LOSSES)
def test_a_few_steps(loss):
    run = loop.train(loss, seed=0, steps=3, optimizer_name="sgd", device=CPU)
    history = run.history
    assert not run.interrupted
    assert history.loss.shape == history.ratio.shape == history.milliseconds.shape == (3,)
    assert (history.classification < history.loss).all()  # the boxes have their part
    assert np.isfinite(history.loss).all()
    assert (history.loss_milliseconds > 0).all()
    assert (history.loss_milliseconds < history.milliseconds).all()
    balanced = loss in ("alrp", "ap")  # Theorem 2; the others start far from 1
    assert (np.abs(history.ratio - 1) < 1e-4).all() == balanced
    if loss == "alrp":
        cls, loc, weight = history.alrp.T
        np.testing.assert_array_equal(history.classification, cls)
        np.testing.assert_allclose(history.loss, cls + weight * loc, rtol=1e-5)
        assert weight[0] == 50
    else:
        assert history.alrp is None


def test_the_same_seed_gives_the_same_training():
    one, two = (loop.train("alrp", 0, 2, "sgd", CPU).history.loss for _ in range(2))
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_the_learning_rate_warms_up_and_goes_down_to_zero():
    rates = [loop.schedule(step, 100) for step in range(100)]
    assert max(rates) == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert loop.schedule(0, 1) == 1


def test_a_short_training_finds_digits():
    run = loop.train("alrp", seed=0, steps=150, optimizer_name="adamw", device=CPU)
    images, truths = DigitCanvases("test", 0).batch(60)
    measures = evaluate(comparison.detect(run.model, images, CPU), truths)
    assert measures["AP50"] > 0.08  # about 0.2 with seeds 0 and 1


# Command


def test_arguments():
    options = parse_arguments([])
    assert options.losses == ["alrp", "ap", "focal-giou"]
    assert options.seeds == [0]
    quick = parse_arguments(["--quick"])
    assert quick.steps < options.steps
    assert quick.test_images < options.test_images
    own = parse_arguments(["--quick", "--steps", "7", "--losses", "ap", "--seeds", "1", "2"])
    assert (own.steps, own.losses, own.seeds) == (7, ["ap"], [1, 2])
    assert parse_arguments(["--device", "cpu"]).device == CPU
    assert set(LOSSES) == set(RECIPES)


@pytest.mark.parametrize(
    "arguments", ["--losses hinge", "--steps 0", "--opt adam", "--seeds x", "--device abacus"]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments.split())
    assert "error: argument" in capsys.readouterr().err


def run_command(arguments: str, folder) -> int:
    return main(f"--quick --device cpu --out {folder} {arguments}".split())


def test_the_command_writes_its_table_and_pictures(tmp_path, capsys):
    assert run_command("--steps 2 --losses alrp focal-giou --seeds 0 1", tmp_path) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("aLRP (GIoU)", "1.000 to 1.000", "+-"))
    assert (tmp_path / "results.md").read_text().splitlines()[0] in printed
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [run["seed"] for run in runs] == [0, 0, 1, 1]
    for picture in ("curves.png", "detections.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("reached", [0, 2])
def test_ctrl_c_reports_what_has_been_reached(reached, tmp_path, monkeypatch, capsys):
    def interrupt(step, steps):
        if step == reached:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(loop, "schedule", interrupt)
    assert run_command("--steps 5", tmp_path) == 130
    printed = capsys.readouterr().out
    if reached:
        assert "stopped at 2" in printed
        assert (tmp_path / "curves.png").exists()
        assert (tmp_path / "detections.png").exists()
    else:
        assert "Nothing was trained" in printed
    assert "AP + Smooth L1" not in printed  # the runs after it do not start


def test_ctrl_c_while_evaluating_reports_the_runs_before(tmp_path, monkeypatch, capsys):
    evaluations = iter([comparison.evaluate])

    def evaluate_once(*arguments):
        function = next(evaluations, None)
        if function is None:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(comparison, "evaluate", evaluate_once)
    assert run_command("--steps 1", tmp_path) == 130
    printed = capsys.readouterr().out
    assert "aLRP (GIoU)" in printed
    assert "| AP + Smooth L1" not in printed


def test_table_of_missing_values_and_spreads():
    def result(seed, ap):
        return report.Result("A", seed, 9, False, {"AP": ap, "rho": float("nan")}, (0.02, 123.0))

    header, _, row = report.table([result(0, 0.5), result(1, 0.6)]).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    cells = {key.strip(" |"): value.strip(" |") for key, value in cells.items()}
    assert cells["AP"] == "55.0 +- 7.1"
    assert cells["rho"] == cells["oLRP"] == cells["ms/it"] == "-"
    assert cells["neg/pos"] == "0.02 to 1.2e+02"


# Pictures


def test_pictures_show_every_loss(tmp_path, monkeypatch):
    """All that can be trained with at once: a curve and a row of canvases for each."""
    axes = Figure().subplots()
    plots._draw_ratios(axes, {title: np.ones(3) for title in LOSSES})
    assert [line.get_label() for line in axes.get_lines()] == list(LOSSES)

    drawn = []
    monkeypatch.setattr(plots, "_draw_boxes", lambda axes, found, *_: drawn.append(found["title"]))
    rows = {title: [{"title": title}] * 2 for title in LOSSES}
    images = [torch.zeros(1, 4, 4)] * 2
    plots.save_detections(images, [{"title": "truth"}] * 2, rows, {}, tmp_path / "detections.png")
    assert drawn == [title for title in ("truth", *LOSSES) for _ in images]
