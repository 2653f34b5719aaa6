"""What does the model see of an image? Augmentation, normalisation, and the mixing of batches."""
import math
import random
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, create_transform, resolve_data_config
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """What weights expect of their images, in the words of timm's pretrained_cfg. The defaults are Twins' own.

    mean, std: of red, green and blue in 0..1. crop_pct: the side of the evaluated part, of the resized image.
    """
    mean: tuple = IMAGENET_DEFAULT_MEAN
    std: tuple = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    @classmethod
    def published(cls, config, input_size):
        """Of timm's published weights. Some are evaluated at another size than they were trained at, and then cropped otherwise."""
        sides = [(config.get(key) or (0,))[-1] for key in ("input_size", "test_input_size")]
        found = resolve_data_config(pretrained_cfg=config or {"num_classes": 1000},
                                    use_test_size=input_size == sides[1] and input_size != sides[0])
        return cls.load({field.name: found[field.name] for field in fields(cls)})

    @classmethod
    def load(cls, saved, path="the checkpoint"):
        """What `save` gave. Raises ValueError for anything else: a checkpoint may be anybody's."""
        try:
            found = cls(**{**saved, "mean": tuple(map(float, saved["mean"])), "std": tuple(map(float, saved["std"])),
                           "crop_pct": float(saved["crop_pct"])})
            numbers = (*found.mean, *found.std, found.crop_pct)
            right = (len(found.mean) == len(found.std) == 3 and all(map(math.isfinite, numbers)) and min(found.std) > 0
                     and found.crop_pct > 0 and found.crop_mode in CROP_MODES and found.interpolation in INTERPOLATIONS)
        except (TypeError, KeyError, ValueError, AttributeError):
            right = False
        if not right:
            raise ValueError(f"{path}: its preprocessing is {str(saved)[:100]!r}: expected mean, std, crop_pct, crop_mode and "
                             "interpolation of images with three channels: write them there, or remove it")
        return found

    def save(self):
        return asdict(self)

    def override(self, mean=None, std=None, crop_pct=None, interpolation=None):
        """The same but for what a user says."""
        said = dict(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
        return replace(self, **{key: value for key, value in said.items() if value is not None})

    def describe(self, train_interpolation=None, native_size=False):
        """What is done to images, as `build_transform` is told."""
        mean, std = (" ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        if native_size:
            return f"mean {mean}, std {std}, never resized"
        mode = "" if self.crop_mode == "center" else f" ({self.crop_mode})"
        return f"mean {mean}, std {std}, {self.interpolation}, crop {self.crop_pct:g}{mode}" + (
            f", random crops {train_interpolation}" if train_interpolation not in (None, self.interpolation) else "")

    def __str__(self):
        return self.describe()


TWINS = Preprocessing()


def build_transform(is_train, input_size=224, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1",
                    interpolation=None, reprob=0.25, remode="pixel", recount=1, hflip=0.5, crop_scale=(0.08, 1.0),
                    native_size=False, preprocessing=TWINS, three_augment=False, simple_crop=False):
    """PIL image -> normalised (3, input_size, input_size), as DeiT trains and evaluates.

    three_augment: DeiT III's, in place of auto_augment; simple_crop: of it, the whole image and a shift of 4 pixels, no random crop.

    interpolation: of the random crop; None: the weights'. native_size: the images already have the input's size (CIFAR at
    32): padded random crops, and no resizing.
    """
    normalisation = dict(mean=preprocessing.mean, std=preprocessing.std)
    if is_train:
        try:
            transform = create_transform(
                input_size, is_training=True, color_jitter=color_jitter,
                interpolation=interpolation or preprocessing.interpolation, re_prob=reprob,
                auto_augment=None if three_augment or auto_augment in (None, "", "none") else auto_augment, re_mode=remode,
                re_count=recount, hflip=hflip, scale=tuple(crop_scale), **normalisation)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"--aa {auto_augment}: timm does not know this policy ({error!r}): "
                             "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0 or none") from error
        for operator in augment_operators(transform):
            if operator.name.startswith("Posterize"):
                operator.aug_fn = posterize
        if native_size:
            transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
        if simple_crop:
            resize = transforms.Resize(input_size, str_to_interp_mode(interpolation or preprocessing.interpolation))
            transform.transforms[:1] = [resize, transforms.RandomCrop(input_size, padding=4, padding_mode="reflect")]
        if three_augment:
            transform.transforms.insert(1 + simple_crop + bool(hflip), transforms.RandomChoice(THREE))
        return transform
    if native_size:
        return transforms.Compose([transforms.ToTensor(), transforms.Normalize(**normalisation)])
    transform = create_transform(input_size, crop_pct=preprocessing.crop_pct, crop_mode=preprocessing.crop_mode,
                                 interpolation=preprocessing.interpolation, **normalisation)
    if preprocessing.crop_mode == "center":
        transform.transforms.insert(0, middle)
    return transform


def blur(image, least=0.1, most=2.0):
    """Gaussian, of a radius in pixels that is drawn."""
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(least, most)))


# One of them for each image (DeiT III, arXiv 2204.07118, section 3.2)
THREE = (transforms.Grayscale(3), ImageOps.solarize, blur)


def middle(image, most=100):
    """The middle of an image that is more than `most` times as long as wide, others as they are: the centre crop sees no more of
    it, and resizing all of 20000 x 1 pixels takes 6 GB."""
    width, height = image.size
    side = most * min(width, height)
    if max(width, height) <= side:
        return image
    left, top = (max(0, (length - side) // 2) for length in (width, height))
    return image.crop((left, top, min(width, left + side), min(height, top + side)))


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
