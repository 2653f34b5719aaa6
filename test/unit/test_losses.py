"""What is minimised: closed forms, timm's losses and DeiT's formula are the oracle."""
import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from losses import Criterion, DistillationLoss


def draw(*shape, seed=0, scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * scale


LOGITS, CLASSES, IMAGES = draw(12, 7), torch.arange(12) % 7, draw(12, 5, seed=1)


# ---- criterion ----

def test_closed_forms():
    """Equal logits cost log(classes), whatever the target; one image worked out by hand."""
    equal = torch.zeros(4, 10)
    for smoothing in (0.0, 0.1):
        assert Criterion(smoothing)(equal, torch.arange(4)).item() == pytest.approx(math.log(10), rel=1e-6)
    assert Criterion()(equal, torch.full((4, 10), 0.1)).item() == pytest.approx(math.log(10), rel=1e-6)
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    log_sum = math.log(math.e**2 + math.e + 1)
    assert Criterion()(logits, torch.tensor([1])).item() == pytest.approx(log_sum - 1, rel=1e-6)
    assert Criterion(0.3)(logits, torch.tensor([1])).item() == pytest.approx(0.7 * (log_sum - 1) + 0.3 * (log_sum - 1), rel=1e-6)
    assert Criterion(0.3)(logits, torch.tensor([0])).item() == pytest.approx(0.7 * (log_sum - 2) + 0.3 * (log_sum - 1), rel=1e-6)
    soft = torch.tensor([[0.5, 0.25, 0.25]])
    assert Criterion()(logits, soft).item() == pytest.approx(log_sum - 1.25, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_classes_are_timms_smoothed_cross_entropy(smoothing):
    expected = LabelSmoothingCrossEntropy(smoothing)(LOGITS, CLASSES)
    torch.testing.assert_close(Criterion(smoothing)(LOGITS, CLASSES), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(Criterion(0.0)(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES), rtol=1e-6, atol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_are_timms_soft_cross_entropy(smoothing):
    """Mixup has smoothed them already: the criterion's own smoothing stays out."""
    targets = draw(12, 7, seed=4).softmax(-1)
    torch.testing.assert_close(Criterion(smoothing)(LOGITS, targets), SoftTargetCrossEntropy()(LOGITS, targets), rtol=1e-6, atol=0)


def test_gradients_are_the_closed_form():
    """softmax - target, over the batch."""
    targets = draw(12, 7, seed=4).softmax(-1)
    for given, target in ((CLASSES, F.one_hot(CLASSES, 7) * 0.9 + 0.1 / 7), (targets, targets)):
        logits = LOGITS.clone().requires_grad_()
        Criterion(0.1)(logits, given).backward()
        torch.testing.assert_close(logits.grad, (LOGITS.softmax(-1) - target) / 12, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits = draw(8, 1000, seed=5).to(dtype)
    targets = torch.arange(8)
    for given in (targets, F.one_hot(targets, 1000).float()):
        loss = Criterion()(logits, given)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets), rtol=1e-6, atol=0)


# ---- distillation ----

def deit(base, student, teacher, kind, alpha, tau):
    """The formula of DeiT's losses, written out."""
    if kind == "soft":
        p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
        distance = (p * (p.log() - q.log())).sum() * tau**2 / student.numel()
    else:
        distance = -student.log_softmax(1)[range(len(student)), teacher.argmax(1)].mean()
    return base * (1 - alpha) + distance * alpha


class Two(nn.Module):
    """A distilled model: logits and distillation logits."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(5, 7)

    def forward(self, x):
        return self.a(x), self.b(x)


@pytest.fixture
def teacher():
    torch.manual_seed(3)
    return nn.Linear(5, 7)


@pytest.mark.parametrize("targets", [CLASSES, draw(12, 7, seed=4).softmax(-1)], ids=["classes", "probabilities"])
@pytest.mark.parametrize("alpha, tau", [(0.5, 1.0), (0.1, 3.0), (1.0, 0.5), (0.0, 2.0)])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation_is_deits(teacher, kind, alpha, tau, targets):
    """A student with one output learns from the teacher with it, one with two outputs with its second."""
    loss = DistillationLoss(Criterion(0.1), teacher, kind, alpha, tau)
    base, second = Criterion(0.1)(LOGITS, targets), draw(12, 7, seed=9)
    with torch.no_grad():
        decided = teacher(IMAGES)
    torch.testing.assert_close(loss(IMAGES, LOGITS, targets), deit(base, LOGITS, decided, kind, alpha, tau), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss(IMAGES, (LOGITS, second), targets), deit(base, second, decided, kind, alpha, tau), rtol=1e-5, atol=1e-7)


def test_without_distillation_it_is_the_base_criterion(teacher):
    for outputs in (LOGITS, (LOGITS, draw(12, 7, seed=9))):
        assert torch.equal(DistillationLoss(Criterion(0.1))(IMAGES, outputs, CLASSES), Criterion(0.1)(LOGITS, CLASSES))


def test_a_perfect_student_costs_nothing(teacher):
    loss = DistillationLoss(Criterion(), teacher, "soft", alpha=1.0, tau=2.0)
    assert loss(IMAGES, teacher(IMAGES), CLASSES).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_student_learns_and_the_teacher_does_not(teacher, kind):
    student = nn.Linear(5, 7)
    loss = DistillationLoss(Criterion(), teacher, kind, alpha=1.0, tau=1.0)
    assert list(loss.parameters()) == [], "an optimizer must not see the teacher"
    loss(IMAGES, student(IMAGES), CLASSES).backward()
    assert student.weight.grad.abs().max() > 0
    assert teacher.weight.grad is None
    assert teacher.weight.requires_grad
    teacher.eval()
    loss.train()
    assert not teacher.training, "training the criterion leaves the teacher in evaluation"


def test_a_teacher_with_two_outputs_teaches_with_the_first(teacher):
    two = Two()
    expected = DistillationLoss(Criterion(), two.a, "hard")(IMAGES, LOGITS, CLASSES)
    assert torch.equal(DistillationLoss(Criterion(), two, "hard")(IMAGES, LOGITS, CLASSES), expected)


def test_gradients_of_both_outputs(teacher):
    """The first output learns from the labels alone, the second from the teacher alone."""
    student = Two()
    loss = DistillationLoss(Criterion(), teacher, "hard", alpha=0.25)
    loss(IMAGES, student(IMAGES), CLASSES).backward()
    with torch.no_grad():
        a, b = student(IMAGES)
        labels, decided = F.one_hot(CLASSES, 7), F.one_hot(teacher(IMAGES).argmax(1), 7)
    torch.testing.assert_close(student.a.bias.grad, 0.75 * (a.softmax(1) - labels).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(student.b.bias.grad, 0.25 * (b.softmax(1) - decided).mean(0), rtol=1e-5, atol=1e-7)


def test_wrong_distillation():
    with pytest.raises(ValueError, match="none, soft or hard, not 'warm'"):
        DistillationLoss(Criterion(), nn.Linear(1, 1), "warm")
    with pytest.raises(ValueError, match="soft distillation needs a teacher"):
        DistillationLoss(Criterion(), None, "soft")
