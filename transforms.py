"""What does the model see of an image? Augmentation, normalisation, and the mixing of batches."""
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torchvision import transforms
from torchvision.transforms import InterpolationMode


def build_transform(is_train, input_size=224, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
                    interpolation="bicubic", reprob=0.25, remode="pixel", recount=1, hflip=0.5, crop_scale=(0.08, 1.0),
                    native_size=False):
    """PIL image -> normalised (3, input_size, input_size), as DeiT trains and evaluates.

    native_size: the images already have the input's size (CIFAR at 32): padded random crops, and no resizing.
    """
    if is_train:
        try:
            transform = create_transform(
                input_size, is_training=True, color_jitter=color_jitter, interpolation=interpolation, re_prob=reprob,
                auto_augment=None if auto_augment in (None, "", "none") else auto_augment, re_mode=remode,
                re_count=recount, hflip=hflip, scale=tuple(crop_scale))
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"--aa {auto_augment}: timm does not know this policy ({error!r}): "
                             "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0 or none") from error
        for operator in augment_operators(transform):
            if operator.name.startswith("Posterize"):
                operator.aug_fn = posterize
        if native_size:
            transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
        return transform
    resize = [] if native_size else [transforms.Resize(int(256 / 224 * input_size), InterpolationMode.BICUBIC),
                                     transforms.CenterCrop(input_size)]
    return transforms.Compose([*resize, transforms.ToTensor(),
                               transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)])


def augment_operators(transform):
    """timm's AugmentOps inside a transform: of RandAugment, AutoAugment or AugMix."""
    for step in transform.transforms:
        yield from getattr(step, "ops", ())
        yield from (operator for policy in getattr(step, "policy", ()) for operator in policy)


def posterize(image, bits, **_):
    """As PIL's before Pillow 13: no bits left is a black image, not an error. The recipe draws it once in 600 images."""
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class FixedShapeMixup(Mixup):
    """timm's Mixup with its draws, but both mixup and cutmix are x + weight * (x.flip(0) - x).

    One copy and two launches, whose shapes do not depend on the boxes: a device that compiles each new shape (910A)
    compiles once for mixup and once for cutmix, and nothing waits for it. weight: (1 or B, 1, height or 1, width or 1).
    """

    def __call__(self, images, targets):
        """(B, 3, height, width) and classes (B,) -> mixed in place, probabilities (B, classes)"""
        assert len(images) % 2 == 0, "mixing pairs the images: the batch must be even"
        draws = {"batch": 1, "pair": len(images) // 2, "elem": len(images)}[self.mode]
        if draws == 1:
            lam, cutmix = ([x] for x in self._params_per_batch())
        else:
            lam, cutmix = self._params_per_elem(draws)
        lam = np.array(lam, dtype=np.float32)
        height, width = images.shape[-2:] if np.any(cutmix) else (1, 1)
        weight = np.empty((draws, 1, height, width), dtype=np.float32)
        for i in range(draws):
            weight[i] = 1 - lam[i]
            if cutmix[i] and lam[i] != 1:
                (top, bottom, left, right), lam[i] = cutmix_bbox_and_lam(
                    images.shape, lam[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam)
                weight[i] = 0
                weight[i, :, top:bottom, left:right] = 1
        if self.mode == "pair":  # the second half holds the partners
            weight, lam = np.concatenate((weight, weight[::-1])), np.concatenate((lam, lam[::-1]))
        images.lerp_(images.flip(0), to_device(weight, images))
        return images, mixup_target(targets, self.num_classes, to_device(lam[:, None], images), self.label_smoothing)


def to_device(array, like):
    """A host array beside the tensor `like`, without waiting for its device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor if like.is_cpu else tensor.pin_memory().to(like.device, non_blocking=True)
