"""What is minimised? One criterion for hard and soft targets, and distillation on top of it."""
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import nn


class Criterion(nn.Module):
    """Mean cross entropy of logits (B, classes) with classes (B,) or, where mixup made them, probabilities (B, classes).

    The shape of the targets decides, so every mix of mixup, cutmix and smoothing trains. `smoothing` is for classes
    only: mixup smooths the probabilities it makes.
    """

    def __init__(self, smoothing=0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits, targets):
        logits = logits.float()  # half precision would lose the sum over classes
        if targets.ndim == 2:
            return -(targets * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
        return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)


class BinaryCriterion(nn.Module):
    """Binary cross entropy of each class by itself (DeiT III, arXiv 2204.07118; ResNet strikes back, arXiv 2110.00476).

    Of logits (B, classes) with classes (B,) or the probabilities (B, classes) that mixing makes; the mean over classes too, or with
    `sum_classes` their sum. threshold: what is above it is 1, the rest 0. smoothing: for classes only, as Criterion's.
    """

    def __init__(self, smoothing=0.0, threshold=None, sum_classes=False):
        super().__init__()
        self.loss = BinaryCrossEntropy(smoothing, threshold, sum_classes=sum_classes)

    def forward(self, logits, targets):
        return self.loss(logits.float(), targets)


class DistillationLoss(nn.Module):
    """(1 - alpha) * base criterion + alpha * distance to the teacher (DeiT, arXiv 2012.12877).

    soft: tau^2 * KL(teacher || student) of the softened distributions, averaged over the logits as DeiT does.
    hard: cross entropy with the teacher's decision. A student with two outputs (logits, distillation logits) learns
    from the teacher with the second; a student with one output, as Twins, learns from it directly.
    """

    def __init__(self, base_criterion, teacher_model=None, distillation_type="none", alpha=0.5, tau=1.0):
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            raise ValueError(f"distillation is none, soft or hard, not {distillation_type!r}")
        if distillation_type != "none" and teacher_model is None:
            raise ValueError(f"{distillation_type} distillation needs a teacher")
        self.base_criterion, self.distillation_type, self.alpha, self.tau = base_criterion, distillation_type, alpha, tau
        self.teacher = [teacher_model]  # in a list: the teacher is no part of this module's parameters or mode

    def forward(self, inputs, outputs, labels):
        """images (B, 3, height, width), student outputs, targets -> scalar"""
        outputs, learned = outputs if isinstance(outputs, (tuple, list)) else (outputs, outputs)
        base = self.base_criterion(outputs, labels)
        if self.distillation_type == "none":
            return base
        with torch.no_grad():
            teacher = self.teacher[0](inputs)
            teacher = (teacher[0] if isinstance(teacher, tuple) else teacher).float()
        learned = learned.float()
        if self.distillation_type == "soft":
            distance = F.kl_div(F.log_softmax(learned / self.tau, dim=1), F.log_softmax(teacher / self.tau, dim=1),
                                reduction="sum", log_target=True) * self.tau**2 / learned.numel()
        else:
            distance = F.cross_entropy(learned, teacher.argmax(dim=1))
        return base * (1 - self.alpha) + distance * self.alpha


class Teacher(nn.Module):
    """A network that is shown a student's images (B, 3, height, width) as its own weights want them: its size, mean and std.

    size: the side of its images. own, student: transforms.Preprocessing. Nothing waits for the device.
    """

    def __init__(self, net, size, own, student):
        super().__init__()
        self.net, self.size, self.same = net, size, (own.mean, own.std) == (student.mean, student.std)
        mean, std, own_mean, own_std = (torch.tensor(x).view(1, 3, 1, 1) for x in (student.mean, student.std, own.mean, own.std))
        self.register_buffer("scale", std / own_std, persistent=False)
        self.register_buffer("shift", (mean - own_mean) / own_std, persistent=False)

    def forward(self, images):
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        return self.net(images if self.same else images * self.scale + self.shift)
