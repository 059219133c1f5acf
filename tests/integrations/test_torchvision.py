"""torchvision's RetinaNet with a ranking loss: what it computes, and all that must keep working."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

from alrp_triton import ALRPLoss, APLoss, SelfBalance, alrp_loss, ap_loss, localisation_errors
from alrp_triton.integrations.torchvision import anchor_targets, use_alrp, use_ap
from perf.train.detector import small_retinanet
from perf.train.digits import DigitCanvases

EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
USES = {
    "alrp": lambda model: use_alrp(model, ALRPLoss()),
    "ap": lambda model: use_ap(model, APLoss()),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: many that wait for each other would dominate on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return small_retinanet().train()


@pytest.fixture(scope="module")
def batch():
    return DigitCanvases("train", seed=0).batch(3)


def seen_by_the_loss(model, images, targets):
    """Return the arguments of the head's loss in a call: detached outputs that want gradients."""
    seen = {}
    loss = model.head.compute_loss

    def spy(targets, head_outputs, anchors, matched_idxs):
        seen.update(targets=targets, anchors=anchors, matched_idxs=matched_idxs)
        seen["head_outputs"] = {
            key: value.detach().clone().requires_grad_() for key, value in head_outputs.items()
        }
        return loss(targets, head_outputs, anchors, matched_idxs)

    model.head.compute_loss = spy
    model(images, targets)
    model.head.compute_loss = loss
    return seen


def by_hand(seen, box_coder):
    """Return the class of every anchor and the positives' boxes, one anchor after the other."""
    classes, predicted, true = [], [], []
    for image, target in enumerate(seen["targets"]):
        for anchor, match in enumerate(seen["matched_idxs"][image].tolist()):
            if match < 0:
                classes.append({-1: 10, -2: -100}[match])  # 10, not -1: any background will do
                continue
            classes.append(target["labels"][match].item())
            predicted.append(
                box_coder.decode_single(
                    seen["head_outputs"]["bbox_regression"][image, anchor][None],
                    seen["anchors"][image][anchor][None],
                )
            )
            true.append(target["boxes"][match][None])
    return torch.tensor(classes), torch.cat(predicted), torch.cat(true)


def losses_and_gradients(losses, outputs):
    gradients = torch.autograd.grad(sum(losses.values()), outputs, materialize_grads=True)
    return [*(losses[key].detach() for key in sorted(losses)), *gradients]


def test_alrp_equals_the_slow_reference_on_a_training_batch(model, batch):
    criterion = ALRPLoss(delta=1.0, box_loss="giou", tau=0.5, balance=SelfBalance(initial=7.0))
    seen = seen_by_the_loss(use_alrp(model, criterion), *batch)
    outputs = list(seen["head_outputs"].values())
    actual = losses_and_gradients(model.head.compute_loss(**seen), outputs)

    classes, predicted, true = by_hand(seen, model.head.regression_head.box_coder)
    errors = localisation_errors(predicted, true, "giou", 0.5)
    logits = seen["head_outputs"]["cls_logits"].flatten(0, 1)
    cls, loc = alrp_loss(logits, classes, errors, 1.0, impl="torch", algorithm="pairwise")
    expected = losses_and_gradients({"bbox_regression": 7 * loc, "classification": cls}, outputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in actual[2:])


def test_ap_equals_the_slow_reference_on_a_training_batch(model, batch):
    box_loss = model.head.regression_head.compute_loss
    seen = seen_by_the_loss(use_ap(model, APLoss(delta=1.0)), *batch)
    outputs = list(seen["head_outputs"].values())
    actual = losses_and_gradients(model.head.compute_loss(**seen), outputs)

    classes, _, _ = by_hand(seen, model.head.regression_head.box_coder)
    logits = seen["head_outputs"]["cls_logits"].flatten(0, 1)
    losses = {
        "bbox_regression": box_loss(**seen),  # torchvision's own
        "classification": ap_loss(logits, classes, 1.0, impl="torch", algorithm="pairwise"),
    }
    expected = losses_and_gradients(losses, outputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("use", "criterion"), [(use_alrp, ALRPLoss), (use_ap, APLoss)])
def test_anchors_between_the_thresholds_get_no_gradient(model, batch, use, criterion):
    seen = seen_by_the_loss(use(model, criterion()), *batch)
    logits = seen["head_outputs"]["cls_logits"]
    (gradient,) = torch.autograd.grad(model.head.compute_loss(**seen)["classification"], logits)
    between = torch.stack(seen["matched_idxs"]) == -2
    assert between.any()
    assert gradient[between].abs().max() == 0
    assert gradient[~between].abs().max() > 0


def test_anchor_targets_ignore_and_match_per_image():
    targets = [{"labels": torch.tensor([7, 3])}, EMPTY]
    matched = [torch.tensor([1, -1, 0, -2]), torch.full((4,), -1)]
    assert anchor_targets(targets, matched, 10).tolist() == [3, -1, 7, -100, -1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64])
@pytest.mark.parametrize("of_matches", [torch.int32, torch.int64])
def test_anchor_targets_of_any_integers(dtype, of_matches):
    """-100 and -1 are not wrapped around, which would be classes."""
    targets = [{"labels": torch.tensor([7, 3], dtype=dtype)}, {"labels": torch.tensor([])}]
    matched = [torch.tensor([1, -1, 0, -2], dtype=of_matches), torch.tensor([-1, -2])]
    classes = anchor_targets(targets, matched, 200)
    assert classes.dtype == torch.int64
    assert classes.tolist() == [3, -1, 7, -100, -1, -100]
    assert anchor_targets([], [], 10).shape == (0,)
    assert anchor_targets(targets[:1], [matched[0][:0]], 10).shape == (0,)


@pytest.mark.parametrize("match", [-3, -4, -100, -(2**40), 2, 3, 2**40])
def test_a_position_of_no_box_is_named(match):
    targets = [{"labels": torch.tensor([7, 3])}]
    with pytest.raises(ValueError, match=rf"matched_idxs: .*image's 2 boxes, got {match}$"):
        anchor_targets(targets, [torch.tensor([1, match, -1])], 10)


@pytest.mark.parametrize(
    ("targets", "matched", "error", "match"),
    [
        ([EMPTY], [torch.tensor([0, -1])], ValueError, "matched_idxs: .*image's 0 boxes, got 0"),
        ([EMPTY], [], ValueError, "matched_idxs: expected one tensor for each of the 1 images"),
        ([EMPTY], [[-1, -1]], TypeError, "matched_idxs: .*got list"),
        ([EMPTY], [torch.tensor([-1.0])], TypeError, "matched_idxs: .*float32"),
        ([EMPTY], [torch.tensor([True])], TypeError, "matched_idxs: .*bool"),
        ([EMPTY], [torch.tensor([[-1]])], ValueError, r"matched_idxs: .*\(1, 1\)"),
        ([{"labels": torch.ones(1)}], [torch.tensor([0])], TypeError, "targets: .*float32"),
        ([{"labels": torch.ones(1, 1).long()}], [torch.tensor([0])], ValueError, "targets: .*1, 1"),
        ([{"labels": [1]}], [torch.tensor([0])], TypeError, "targets: .*got list"),
    ],
    ids=str,
)
def test_wrong_targets_are_named(targets, matched, error, match):
    with pytest.raises(error, match=match):
        anchor_targets(targets, matched, 10)


@pytest.mark.parametrize("use", USES)
def test_an_own_matcher_is_held_to_the_rules(model, batch, use):
    USES[use](model)
    matcher = model.proposal_matcher
    model.proposal_matcher = lambda quality: matcher(quality).clamp(max=-1) - 2
    with pytest.raises(ValueError, match=r"matched_idxs: .*got -[34]"):
        model(*batch)


def test_boxes_of_images_without_any(model, batch):
    """(0,) instead of (0, 4), and float labels, as conversions from an empty list give them."""
    seen = seen_by_the_loss(use_alrp(model, ALRPLoss()), batch[0], [EMPTY, *batch[1][1:]])
    expected = model.head.compute_loss(**seen)
    seen["targets"][0] = {"boxes": torch.tensor([]), "labels": torch.tensor([])}
    assert model.head.compute_loss(**seen) == expected
    seen["targets"][1] = {**seen["targets"][1], "boxes": seen["targets"][1]["boxes"][:-1]}
    with pytest.raises(ValueError, match="targets: expected as many boxes as labels"):
        model.head.compute_loss(**seen)


def test_only_the_boxes_of_positives_are_decoded(model, batch, monkeypatch):
    seen = seen_by_the_loss(use_alrp(model, ALRPLoss()), *batch)
    coder = model.head.regression_head.box_coder
    decoded = []
    decode = coder.decode_single
    monkeypatch.setattr(coder, "decode_single", lambda d, a: decoded.append(len(d)) or decode(d, a))
    model.head.compute_loss(**seen)
    assert decoded == [sum((matches >= 0).sum().item() for matches in seen["matched_idxs"])]


@pytest.mark.parametrize(("use", "criterion"), [(use_alrp, ALRPLoss), (use_ap, APLoss)])
@pytest.mark.parametrize("empty", [1, 3], ids=["one empty image", "all images empty"])
def test_images_without_boxes(model, batch, use, criterion, empty):
    images, targets = batch
    losses = use(model, criterion())(images, [EMPTY] * empty + targets[empty:])
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.head.classification_head.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (losses["classification"].item() == 0) == (empty == 3)


def test_state_dict_has_the_same_keys(model):
    keys = list(model.state_dict())
    use_alrp(model, ALRPLoss(balance=SelfBalance()))
    assert list(model.state_dict()) == keys


def test_a_copy_trains_on_its_own(model, batch):
    twin = copy.deepcopy(use_alrp(model, ALRPLoss(balance=SelfBalance())))
    sum(twin(*batch).values()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in twin.parameters())
    # The copied loss decodes with the copy's coder: a change there changes its loss alone.
    before = model(*batch)["bbox_regression"].item()
    twin.head.regression_head.box_coder.weights = (1.0, 1.0, 1.0, 1.0)
    assert twin(*batch)["bbox_regression"].item() != before
    assert model(*batch)["bbox_regression"].item() == before


def losses_of(model, batch):
    return {name: loss.item() for name, loss in model(*batch).items()}


@pytest.mark.parametrize("first", USES)
@pytest.mark.parametrize("second", USES)
def test_the_second_call_replaces_the_first(model, batch, first, second):
    plain = losses_of(model, batch)
    expected = losses_of(USES[second](copy.deepcopy(model)), batch)
    assert losses_of(USES[second](USES[first](model)), batch) == expected
    del model.head.compute_loss
    assert losses_of(model, batch) == plain


def a_head(model, num_classes):
    old = model.head.classification_head
    channels = old.cls_logits.in_channels
    return RetinaNetClassificationHead(channels, old.num_anchors, num_classes)


@pytest.mark.parametrize("use", USES)
def test_a_new_classification_head_trains_the_ranking_loss(model, batch, use):
    """As fine-tuning gives it, here with fewer classes; so do a new regression head and a coder."""
    twin = copy.deepcopy(model)
    new = a_head(model, num_classes=4)
    regression = copy.deepcopy(model.head.regression_head)
    regression.box_coder.weights = (1.0, 1.0, 2.0, 2.0)
    images, targets = batch
    targets = [{**target, "labels": target["labels"] % 4} for target in targets]
    losses = []
    for fresh, before in ((model, True), (twin, False)):
        if before:
            USES[use](fresh)
        fresh.head.classification_head = copy.deepcopy(new)
        fresh.head.regression_head = copy.deepcopy(regression)
        if not before:
            USES[use](fresh)
        losses.append(losses_of(fresh, (images, targets)))
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"targets: expected labels in \[0, 4\)"):
        model(*batch)  # the labels of ten classes


@pytest.mark.parametrize("use", USES)
def test_a_new_head_raises_in_training(model, batch, use):
    """It comes with torchvision's loss, which would be trained in silence."""
    USES[use](model)
    old = model.head.classification_head
    model.head = RetinaNetHead(old.cls_logits.in_channels, old.num_anchors, 10)
    model.eval()(batch[0])
    with pytest.raises(RuntimeError, match=r"model\.head: .*call use_alrp or use_ap again"):
        model.train()(*batch)
    assert losses_of(USES[use](model), batch) == losses_of(copy.deepcopy(model), batch)


@pytest.mark.parametrize("use", USES)
def test_a_compiled_head_keeps_the_loss(model, batch, use):
    expected = losses_of(USES[use](model), batch)
    model.head = torch.compile(model.head, backend="eager")
    assert losses_of(model, batch) == expected


@pytest.mark.parametrize("use", USES)
def test_scripting_in_training_mode_raises(model, batch, use):
    USES[use](model)
    for part in (model, model.head):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script compiles torchvision's own loss"
        ):
            torch.jit.script(part)
    torch.jit.script(model.eval().head)  # (the backbone of this model cannot be scripted)
    del model.train().head.compute_loss
    torch.jit.script(model.head)


@pytest.mark.parametrize("use", USES)
def test_an_average_of_the_model_is_on_its_own(model, batch, use):
    average = torch.optim.swa_utils.AveragedModel(USES[use](model))
    for twin in (average.module, pickle.loads(pickle.dumps(model))):
        assert twin.head.compute_loss.head is twin.head
        assert twin.compute_loss.model is twin
        sum(twin.train()(*batch).values()).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("use", "criterion"), [(use_alrp, ALRPLoss), (use_ap, APLoss)])
def test_pickling(model, batch, use, criterion):
    use(model, criterion())
    restored = pickle.loads(pickle.dumps(model))
    expected, actual = model(*batch), restored(*batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("use", "criterion"), [(use_alrp, ALRPLoss), (use_ap, APLoss)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(model, batch, use, criterion, dtype):
    use(model, criterion())
    expected = model(*batch)
    with torch.autocast("cpu", dtype=dtype):
        losses = model(*batch)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_inference_is_untouched(model, batch):
    expected = model.eval()(batch[0])
    use_alrp(model, ALRPLoss())
    torch.testing.assert_close(model(batch[0]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("label", [10, -1])
def test_a_label_outside_of_the_classes_is_named(model, batch, label):
    images, targets = batch
    wrong = [{**targets[0], "labels": torch.full_like(targets[0]["labels"], label)}, *targets[1:]]
    with pytest.raises(ValueError, match=rf"labels in \[0, 10\), got \[{label}\]"):
        use_alrp(model, ALRPLoss())(images, wrong)


def test_wrong_arguments_are_named(model):
    with pytest.raises(TypeError, match=r"model: expected a torchvision RetinaNet.*got Linear"):
        use_alrp(nn.Linear(1, 1), ALRPLoss())
    with pytest.raises(TypeError, match="criterion: expected ALRPLoss, got APLoss"):
        use_alrp(model, APLoss())
    with pytest.raises(TypeError, match="criterion: expected APLoss, got ALRPLoss"):
        use_ap(model, ALRPLoss())
    for use, criterion in [
        (use_alrp, ALRPLoss(ignore_index=-2)),
        (use_ap, APLoss(ignore_index=-2)),
    ]:
        with pytest.raises(ValueError, match=r"criterion: expected ignore_index=-100.*got -2"):
            use(model, criterion)


def run_python(code: str, *path: str) -> subprocess.CompletedProcess:
    prelude = f"import sys; sys.path[:0] = {list(path)}\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_package_does_not_import_torchvision():
    code = "import alrp_triton; assert 'torchvision' not in sys.modules"
    assert run_python(code).returncode == 0


@pytest.mark.slow
def test_torchvision_missing_or_built_for_another_torch(tmp_path):
    importing = "import alrp_triton.integrations.torchvision"
    missing = run_python(f"sys.modules['torchvision'] = None\n{importing}")
    assert "ImportError: alrp_triton.integrations.torchvision needs torchvision" in missing.stderr

    (tmp_path / "torchvision.py").write_text("raise RuntimeError('nms does not exist')")
    mismatched = run_python(importing, str(tmp_path))
    assert "ImportError: torchvision is installed but was built for another" in mismatched.stderr
