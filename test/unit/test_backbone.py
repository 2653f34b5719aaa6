"""The models under other people's heads: what timm asks of a backbone, torch.hub, and a detector of torchvision that trains."""
import math
import sys

import pytest
import timm
import torch
from conftest import ROOT, run
from test_gvt import TIMMS, images, largest_error, pair, randomise
from test_surgery import ONE
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import hubconf

SIZE = 96  # of timm's own tests of features
DIMS = dict(pcpvt=(64, 128, 320, 512), alt_gvt_small=(64, 128, 256, 512), alt_gvt_base=(96, 192, 384, 768),
            alt_gvt_large=(128, 256, 512, 1024))


def dims_of(name):
    return DIMS[name.partition("_")[0] if name.startswith("pcpvt") else name]


def check_maps(name, maps, channels, reduction, size=SIZE):
    """timm's demands: as many maps as the model says, of the channels and about the size it says, with no NaN."""
    assert list(channels) == list(dims_of(name)) and list(reduction) == [4, 8, 16, 32] and len(maps) == 4
    for found, dim, stride in zip(maps, channels, reduction):
        assert found.shape == (1, dim, size // stride, size // stride)
        assert size / (2 * stride) < found.shape[2] <= math.ceil(size / stride) + 1
        assert not found.isnan().any()


@pytest.mark.parametrize("name", TIMMS)
def test_timms_demands_of_intermediates_hold(name):
    """test_model_forward_intermediates and the tests of pruned models, in timm's tests/test_models.py."""
    model, x = timm.create_model(name).eval(), images(1, SIZE, SIZE)
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        output, maps = model.forward_intermediates(x, output_fmt="NCHW")
        check_maps(name, maps, info.channels(), info.reduction())
        assert torch.equal(output, model.forward_features(x))
        model.set_grad_checkpointing()
        again, _ = model.forward_intermediates(x)
        torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)
        for i in (2, 0):
            found, = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            assert torch.equal(found, maps[i])
            assert model.prune_intermediate_layers([i]) == [i]
            found, = model.forward_intermediates(x, indices=[i], intermediates_only=True)
            assert torch.equal(found, maps[i])
            assert (model.num_features, len(model.blocks)) == (maps[i].shape[1], i + 1)


@pytest.mark.parametrize("name", TIMMS)
def test_timms_demands_of_features_hold(monkeypatch, name):
    """test_model_forward_features, _forward_intermediates_features and _features_pretrained."""
    shallow = dict(depths=(1, 1, 1, 1))  # the other test's models are whole
    published = timm.create_model(TIMMS[name], **shallow).eval()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: published.state_dict())
    model, x = timm.create_model(name, pretrained=True, features_only=True, **shallow).eval(), images(1, SIZE, SIZE)
    theirs = published.forward_intermediates(x, intermediates_only=True)
    assert type(model).__name__ == "FeatureGetterNet"
    check_maps(name, model(x), model.feature_info.channels(), model.feature_info.reduction())
    assert all(largest_error(a, b) <= 1e-4 for a, b in zip(model(x), theirs))


@pytest.mark.parametrize("settings", [dict(indices=[1]), dict(indices=(0, 2), stop_early=True)])
def test_pruned_models_train_every_weight_that_is_left(settings):
    model = timm.create_model("alt_gvt_small", **ONE).train()
    model.prune_intermediate_layers(settings["indices"], prune_norm=True)
    maps = model.forward_intermediates(images(1, 64, 64), intermediates_only=True, **settings)
    sum(x.square().sum() for x in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_whole_model_without_pruning_its_head_answers_as_before():
    model, x = randomise(timm.create_model("pcpvt_small_v0", **ONE)).eval(), images(2, 64, 64)
    before = model(x)
    model.prune_intermediate_layers([3], prune_head=False)
    assert torch.equal(model(x), before)


def test_maps_are_before_the_norm_unless_it_is_asked_for():
    ours, theirs = pair("alt_gvt_base", torch.float64, **ONE)
    x = images(1, 64, 64, torch.float64)
    plain, normed = (ours.forward_intermediates(x, norm=norm, intermediates_only=True) for norm in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], normed[:3]))
    expected = nn.functional.layer_norm(plain[3].permute(0, 2, 3, 1), (768,), ours.norm.weight, ours.norm.bias, 1e-6)
    assert largest_error(normed[3].permute(0, 2, 3, 1), expected) <= 1e-12
    assert largest_error(normed[3], theirs.forward_intermediates(x, norm=True, intermediates_only=True)[3]) <= 1e-12


# ---- torch.hub ----

@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return lambda name, **settings: torch.hub.load(str(ROOT), name, source="local", **settings)


def test_torch_hub_finds_the_six_and_no_more_from_any_folder(tmp_path):
    done = run([sys.executable, "-c", f"""
import torch
for name in {sorted(TIMMS)}:
    model = torch.hub.load({str(ROOT)!r}, name, source="local", pretrained=False, num_classes=5, drop_path_rate=0.2, device="meta")
    print(name, model.pretrained_cfg["architecture"], model.num_classes, model.drop_path_rate, sum(p.numel() for p in model.parameters()))
"""], tmp_path, {"TORCH_HOME": str(tmp_path)}, 120)
    expected = [f"{name} {name} 5 0.2 {sum(p.numel() for p in timm.create_model(TIMMS[name], num_classes=5, device='meta').parameters())}"
                for name in sorted(TIMMS)]
    assert done.stdout.splitlines() == expected, done.stderr
    assert sorted(name for name, value in vars(hubconf).items() if callable(value)) == sorted(TIMMS)  # what torch.hub.list shows
    assert all(getattr(hubconf, name).__doc__ for name in TIMMS)


def test_torch_hub_fetches_what_pretrained_fetches(hub, monkeypatch):
    brought, asked = timm.create_model("twins_svt_small").state_dict(), []
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: asked.append(a[0]) or dict(brought))
    model = hub("alt_gvt_small", pretrained=True)
    assert asked == ["timm/twins_svt_small.in1k"]
    assert all(torch.equal(value, brought[key]) for key, value in model.state_dict().items())
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(RuntimeError, match="cannot fetch the published weights of alt_gvt_small"):
        hub("alt_gvt_small", pretrained=True)


# ---- detection ----

class Pyramid(nn.Module):
    """The four maps of a backbone and a feature pyramid over them, as torchvision's detectors want it."""

    def __init__(self, backbone, out_channels):
        super().__init__()
        self.backbone, self.out_channels = backbone, out_channels
        self.fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), out_channels)

    def forward(self, x):
        return self.fpn({str(i): found for i, found in enumerate(self.backbone(x))})


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_torchvisions_detector_trains_on_the_backbone(name):
    """Two images with a bright box each: the loss falls, and every stage's weights have a gradient."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, features_only=True, depths=(1, 1, 1, 1))
    detector = FasterRCNN(
        Pyramid(backbone, 32), num_classes=2, min_size=96, max_size=128, box_detections_per_img=5,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=5, sampling_ratio=2),
        rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50, rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20).train()
    batch = [torch.rand(3, 96, 112), torch.rand(3, 100, 96)]
    targets = [dict(boxes=torch.tensor([[10.0, 20.0, 50.0, 70.0]]), labels=torch.tensor([1])),
               dict(boxes=torch.tensor([[40.0, 30.0, 90.0, 80.0]]), labels=torch.tensor([1]))]
    for image, target in zip(batch, targets):
        left, top, right, bottom = target["boxes"][0].int().tolist()
        image[:, top:bottom, left:right] += 2
    optimizer, totals = torch.optim.AdamW(detector.parameters(), 3e-4), []
    for _ in range(8):
        total = sum(detector(batch, targets).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(map(math.isfinite, totals)) and totals[-1] < 0.7 * totals[0], totals
    assert [key for key, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []
    found = detector.eval()(batch)
    assert len(found) == 2 and all(result["boxes"].shape[1:] == (4,) for result in found)
