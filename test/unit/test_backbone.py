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

import checkpoint
import hubconf
import openmmlab

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


# ---- OpenMMLab ----

def named(pairs):
    """A module without a forward that holds others under dotted names."""
    root = nn.Module()
    for path, module in pairs.items():
        *parents, last = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(last, module)
    return root


class MMSeg(nn.Module):
    """mmsegmentation's SVT and PCPVT, written anew from its layers' names and formulas: a GSA is torch's nn.MultiheadAttention.

    Maps are multiples of the window. Its norms add 1e-5, which names do not tell: here what upstream's add.
    """

    def __init__(self, name, dims, heads, ratios, depths, norms=False):
        super().__init__()
        self.svt, self.heads = name.startswith("alt"), heads
        chans = (3, *dims[:-1])
        self.patch_embeds = nn.ModuleList(named(dict(projection=nn.Conv2d(a, b, p, p), norm=nn.LayerNorm(b)))
                                          for a, b, p in zip(chans, dims, (4, 2, 2, 2)))
        self.position_encodings = nn.ModuleList(named(dict(proj=nn.Conv2d(d, d, 3, padding=1, groups=d))) for d in dims)
        self.layers = nn.ModuleList(nn.ModuleList(self.layer(d, h, r, sr, i) for i in range(depth))
                                    for d, h, r, sr, depth in zip(dims, heads, ratios, (8, 4, 2, 1), depths))
        if norms:
            self.norm_list = nn.ModuleList(nn.LayerNorm(d) for d in dims)

    def layer(self, dim, heads, ratio, sr, i):
        if self.svt and i % 2 == 0:
            attn = dict(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim))
        else:
            attn = dict(attn=nn.MultiheadAttention(dim, heads, batch_first=True))
            if sr > 1:
                attn |= dict(sr=nn.Conv2d(dim, dim, sr, sr), norm=nn.LayerNorm(dim))
        return named({"norm1": nn.LayerNorm(dim, 1e-6), "norm2": nn.LayerNorm(dim, 1e-6), **{f"attn.{k}": v for k, v in attn.items()},
                      "ffn.layers.0": nn.Sequential(nn.Linear(dim, ratio * dim)), "ffn.layers.1": nn.Linear(ratio * dim, dim)})

    def gsa(self, attn, x, H, W):
        keys = x
        if hasattr(attn, "sr"):
            keys = attn.norm(attn.sr(x.mT.unflatten(2, (H, W))).flatten(2).mT)
        return attn.attn(x, keys, keys, need_weights=False)[0]

    def lsa(self, attn, x, H, W, heads):
        B, _, C = x.shape
        x = x.view(B, H // 7, 7, W // 7, 7, C).transpose(2, 3).reshape(-1, 49, C)
        q, k, v = attn.qkv(x).view(-1, 49, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
        x = ((q @ k.mT) * (C // heads) ** -0.5).softmax(-1) @ v
        x = x.transpose(1, 2).reshape(B, H // 7, W // 7, 7, 7, C).transpose(2, 3).reshape(B, H * W, C)
        return attn.proj(x)

    def forward(self, x):
        maps = []
        for embed, stage, peg, heads in zip(self.patch_embeds, self.layers, self.position_encodings, self.heads):
            x = embed.projection(x)
            H, W = x.shape[2:]
            x = embed.norm(x.flatten(2).mT)
            for i, layer in enumerate(stage):
                attn, normed = layer.attn, layer.norm1(x)
                x = x + (self.lsa(attn, normed, H, W, heads) if hasattr(attn, "qkv") else self.gsa(attn, normed, H, W))
                hidden = nn.functional.gelu(getattr(layer.ffn.layers, "0")(layer.norm2(x)))
                x = x + getattr(layer.ffn.layers, "1")(hidden)
                if i == 0:
                    x = (peg.proj(x.mT.unflatten(2, (H, W))) + x.mT.unflatten(2, (H, W))).flatten(2).mT
            x = x.mT.unflatten(2, (H, W))
            maps.append(x)
        return maps


SHAPES = dict(alt_gvt_small=((64, 128, 256, 512), (2, 4, 8, 16), (4, 4, 4, 4)),
              pcpvt_small_v0=((64, 128, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4)))
TWO = dict(depths=(2, 2, 2, 2), num_classes=10)


def mmseg_of(name, **settings):
    return MMSeg(name, *SHAPES[name], TWO["depths"], **settings)


@pytest.mark.parametrize("name", SHAPES)
def test_mmsegmentation_computes_our_maps_with_our_weights(name):
    ours, theirs = randomise(timm.create_model(name, **TWO)).eval().double(), mmseg_of(name).double()
    state = openmmlab.to_mmseg(ours.state_dict())
    found = theirs.load_state_dict(state, strict=False)
    assert found.missing_keys == [] and found.unexpected_keys == ["norm.weight", "norm.bias"]
    x = images(1, 224, 224, torch.float64)
    with torch.no_grad():
        assert all(largest_error(a, b) <= 1e-10 for a, b in zip(theirs(x), ours.forward_intermediates(x, intermediates_only=True)))


@pytest.mark.parametrize("name", TIMMS)
def test_there_and_back_is_the_identity(name):
    state = timm.create_model(name, depths=(2, 2, 2, 2)).state_dict()
    back, left_out = openmmlab.to_ours(openmmlab.to_mmseg(state))
    assert left_out == [] and back.keys() == {key for key in state if not key.startswith("head.")}
    assert all(torch.equal(value, state[key]) for key, value in back.items())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("norms", [False, True])
def test_a_segmentor_gives_its_backbone(name, norms):
    """A whole checkpoint of mmsegmentation's; its norms between the stages, neck and head have no place in a classifier."""
    theirs, notes = randomise(mmseg_of(name, norms=norms)), []
    content = dict(meta=dict(epoch=3), state_dict={
        **{f"backbone.{key}": value for key, value in theirs.state_dict().items()},
        "neck.lateral_convs.0.conv.weight": torch.ones(2, 2, 1, 1), "decode_head.conv_seg.weight": torch.ones(4, 2, 1, 1)})
    state = checkpoint.model_state(content, "seg.pth", note=notes.append)
    model = timm.create_model(name, **TWO).eval()
    fits, classes = checkpoint.adapt_head(model, state, anew=True)
    checkpoint.load_weights(model, fits)
    assert (classes, checkpoint.outputs(state)) == (0, 0)
    assert notes == [f"seg.pth: {8 if norms else 2} of its weights have no place in a classifier and are left out: decode_head, neck"]
    last = theirs.norm_list[3] if norms else nn.LayerNorm(512)
    assert torch.equal(model.norm.weight, last.weight) and torch.equal(model.norm.bias, last.bias)
    x = images(1, 224, 224)
    with torch.no_grad():
        assert all(largest_error(a, b) <= 1e-4 for a, b in zip(model.forward_intermediates(x, intermediates_only=True), theirs(x)))


def test_mmpretrains_classifier_is_whole():
    """Its names as its twins2mmpretrain.py makes them."""
    ours = randomise(timm.create_model("alt_gvt_small", **TWO)).eval()
    state = {}
    for key, value in ours.state_dict().items():
        for old, new in (("blocks.", "stages."), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("proj.0.", "proj."),
                         ("pos_block", "position_encodings"), ("head.", "head.fc.")):
            key = key.replace(old, new)
        if key.startswith("patch_embeds"):
            key = key.replace("proj.", "projection.")
        key = f"norm_after_stage3.{key[5:]}" if key.startswith("norm.") else key
        state[key if key.startswith("head.") else f"backbone.{key}"] = value
    notes = []
    back = checkpoint.model_state(dict(state_dict=state), note=notes.append)
    assert notes == [] and back.keys() == ours.state_dict().keys()
    assert all(torch.equal(value, back[key]) for key, value in ours.state_dict().items())


def test_upstreams_detector_gives_its_backbone():
    ours = timm.create_model("pcpvt_small_v0", **TWO)
    state = {f"backbone.{key}": value for key, value in ours.state_dict().items() if not key.startswith(("head.", "norm."))}
    back, left_out = openmmlab.to_ours({**state, "rpn_head.rpn_cls.weight": torch.ones(1)})
    assert left_out == ["rpn_head.rpn_cls.weight"]
    assert back.keys() == {key for key in ours.state_dict() if not key.startswith("head.")}


def test_a_segmentors_backbone_is_fine_tuned_as_a_user_does_it(run_main, tiny_folder, tmp_path):
    state = openmmlab.to_mmseg(timm.create_model("alt_gvt_small").state_dict())
    state = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("norm.")}
    torch.save(dict(state_dict={**state, "neck.a": torch.ones(1)}), tmp_path / "seg.pth")
    words = ["--device=cpu", f"--data-path={tiny_folder}", "--input-size=32", "--batch-size=8", "--num_workers=0"]
    done = run_main(*words, f"--finetune={tmp_path / 'seg.pth'}", "--epochs=1", "--max-step=1", "--no-eval")
    assert done.returncode == 0, done.stderr
    assert f"note: {tmp_path / 'seg.pth'} has no head: a new one starts" in done.stdout
    assert "1 of its weights have no place in a classifier and are left out: neck" in done.stdout
    done = run_main(*words, f"--resume={tmp_path / 'seg.pth'}", "--eval")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr == f"error: {tmp_path / 'seg.pth'} has no head, so it tells no classes: --finetune it first\n"
