"""The models: timm's twins_* models, which hold the same weights under the same names, are the oracle."""
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import nn

import gvt

TIMMS = {
    "pcpvt_small_v0": "twins_pcpvt_small", "pcpvt_base_v0": "twins_pcpvt_base", "pcpvt_large_v0": "twins_pcpvt_large",
    "alt_gvt_small": "twins_svt_small", "alt_gvt_base": "twins_svt_base", "alt_gvt_large": "twins_svt_large"}
SHALLOW = dict(depths=(2, 2, 2, 2), num_classes=10)
SIZES = [(192, 192), (256, 256), (320, 320), (384, 384), (224, 160), (96, 200), (37, 75)]


def randomise(model, seed=1):
    """Every number of the model drawn anew: biases and norms too, without which padding would not matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = p[0].numel() ** -0.5 if p.ndim > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * scale + (1 if "norm" in name and name.endswith("weight") else 0))
    return model


def pair(name, dtype=torch.float32, **settings):
    """Our model and timm's with the same random weights, evaluating."""
    ours, theirs = timm.create_model(name, **settings), timm.create_model(TIMMS[name], **settings)
    theirs.load_state_dict(randomise(ours).state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def images(batch, height, width, dtype=torch.float32, seed=2):
    return torch.randn(batch, 3, height, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def largest_error(a, b):
    """Largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="module")
def small():
    return pair("alt_gvt_small", num_classes=10)


# ---- names, keys, initial weights ----

@pytest.mark.parametrize("name", TIMMS)
def test_state_dict_is_timms_both_ways_and_starts_with_the_same_bits(name):
    """Names, shapes and, after the same seed, the initial weights bit for bit; and each loads the other's strictly."""
    assert timm.is_model(name)
    torch.manual_seed(3)
    ours = timm.create_model(name, num_classes=10, drop_path_rate=0.3)
    torch.manual_seed(3)
    theirs = timm.create_model(TIMMS[name], num_classes=10)
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert [v.shape for v in a.values()] == [v.shape for v in b.values()]
    assert all(torch.equal(a[key], b[key]) for key in a)
    ours.load_state_dict(b, strict=True)
    theirs.load_state_dict(a, strict=True)


def test_initial_distributions():
    """Linear: normal of .02, cut at +-2; convolutions: normal of sqrt(2 / fan_out); biases 0, norms 1 and 0.

    The normal comes from a uniform number in float32, whose end, drawn once in 2^24 times, is cut to -2: 100 deviations.
    """
    torch.manual_seed(0)
    model, cut = timm.create_model("alt_gvt_small"), 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            std, mean = 0.02, 0.0
            assert module.weight.abs().max() <= 2
            cut += int((module.weight.abs() == 2).sum())
        elif isinstance(module, nn.Conv2d):
            side = module.kernel_size[0]
            std, mean = math.sqrt(2 / (side * side * module.out_channels / module.groups)), 0.0
        elif isinstance(module, nn.LayerNorm):
            std, mean = 0.0, 1.0
        else:
            continue
        weight = module.weight[module.weight.abs() < 2]
        n = weight.numel()
        assert weight.mean().item() == pytest.approx(mean, abs=6 * std / math.sqrt(n) + 1e-9), name
        assert weight.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * n)), name
        assert not module.bias.any(), name
    assert cut <= 8


def test_layer_norm_eps():
    """1e-6 in blocks and the last norm, 1e-5 in the patch embeddings and the sub-sampling's norm."""
    eps = {name: m.eps for name, m in timm.create_model("alt_gvt_small", **SHALLOW).named_modules() if isinstance(m, nn.LayerNorm)}
    fine = {name for name, value in eps.items() if value == 1e-6}
    assert fine == {"norm"} | {f"blocks.{s}.{i}.norm{k}" for s in range(4) for i in range(2) for k in (1, 2)}
    rest = {name: value for name, value in eps.items() if name not in fine}
    assert rest == {f"patch_embeds.{s}.norm": 1e-5 for s in range(4)} | {f"blocks.{s}.1.attn.norm": 1e-5 for s in range(3)}


def test_parameters_and_their_decay():
    """24,060,776 parameters: 197 tensors of 83,816 numbers without decay, 93 of 23,976,960 with it; the PEG is exempt."""
    model = timm.create_model("alt_gvt_small")
    assert sum(p.numel() for p in model.parameters()) == 24_060_776
    assert model.no_weight_decay() == {f"pos_block.{s}.proj.0.{kind}" for s in range(4) for kind in ("weight", "bias")}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    sizes = {g["weight_decay"]: (len(g["params"]), sum(p.numel() for p in g["params"])) for g in groups}
    assert sizes == {0.0: (197, 83_816), 0.05: (93, 23_976_960)}


@pytest.mark.parametrize("name, millions", [
    ("pcpvt_small_v0", 24.11), ("pcpvt_base_v0", 43.83), ("pcpvt_large_v0", 60.99),
    ("alt_gvt_small", 24.06), ("alt_gvt_base", 56.07), ("alt_gvt_large", 99.27)])
def test_published_sizes(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_layer_groups_are_timms(name, coarse):
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), timm.create_model(TIMMS[name])
    assert group_parameters(ours, ours.group_matcher(coarse)) == group_parameters(theirs, theirs.group_matcher(coarse))


# ---- outputs and gradients ----

@pytest.mark.parametrize("name", TIMMS)
def test_outputs_and_gradients_are_timms_in_float64(name):
    """Full depth, 64 pixels: a map of 16 x 16 tokens, which is no multiple of the windows."""
    ours, theirs = pair(name, torch.float64, num_classes=10)
    x, weight = images(2, 64, 64, torch.float64), torch.linspace(-1, 1, 10, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    assert (a - b).abs().max() <= 1e-9
    assert b.abs().max() > 0.1
    (a.softmax(-1) @ weight).sum().backward()
    (b.softmax(-1) @ weight).sum().backward()
    wanted = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        assert largest_error(p.grad, wanted[key].grad) <= 1e-9, key


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_outputs_are_timms_at_224(name):
    ours, theirs = pair(name)
    x = images(1, 224, 224)
    with torch.inference_mode():
        assert largest_error(ours(x), theirs(x)) <= 1e-5


@pytest.mark.parametrize("name", TIMMS)
def test_outputs_are_timms_in_float32(name):
    ours, theirs = pair(name, **SHALLOW)
    x = images(2, 64, 96)
    with torch.inference_mode():
        assert largest_error(ours(x), theirs(x)) <= 1e-5


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_outputs_are_timms_at_other_sizes(name, height, width, shallow):
    ours, theirs = shallow[name]
    x = images(1, height, width)
    with torch.inference_mode():
        assert largest_error(ours(x), theirs(x)) <= 1e-5


@pytest.fixture(scope="module")
def shallow():
    return {name: pair(name, **SHALLOW) for name in ("alt_gvt_small", "pcpvt_small_v0")}


def test_gradients_are_timms_at_a_ragged_size(shallow):
    ours, theirs = shallow["alt_gvt_small"]
    x = images(2, 96, 72)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        assert largest_error(p.grad, wanted[key].grad) <= 1e-4, key
    ours.zero_grad(), theirs.zero_grad()


def test_features_are_timms(small):
    """forward_features gives tokens; global_pool '' leaves them to the head."""
    ours, theirs = small
    x = images(2, 64, 64)
    with torch.inference_mode():
        assert largest_error(ours.forward_features(x), theirs.forward_features(x)) <= 1e-5
        tokens = ours.forward_features(x)
        assert tokens.shape == (2, 4, 512)
        assert torch.equal(ours.forward_head(tokens, pre_logits=True), tokens.mean(1))


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_explicit_formula_equals_fused_attention(name):
    fused = randomise(timm.create_model(name, **SHALLOW)).double().eval()
    explicit = timm.create_model(name, fused_attn=False, **SHALLOW).double().eval()
    explicit.load_state_dict(fused.state_dict())
    x = images(2, 64, 80, torch.float64)
    assert largest_error(explicit(x), fused(x)) <= 1e-12
    fused(x).square().sum().backward()
    explicit(x).square().sum().backward()
    for (key, p), q in zip(fused.named_parameters(), explicit.parameters()):
        assert largest_error(q.grad, p.grad) <= 1e-9, key


@pytest.mark.parametrize("fused", [True, False])
def test_the_switch_of_the_attention_decides_what_is_called(monkeypatch, fused):
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(q.ndim) or original(q, *a, **k))
    with torch.inference_mode():
        timm.create_model("alt_gvt_small", fused_attn=fused, **SHALLOW).eval()(images(1, 64, 64))
    assert calls == ([4] * 8 if fused else []), "4-D tensors: windows are folded into the batch"


@pytest.mark.parametrize("training", [False, True])
def test_bfloat16_autocast_is_close_to_float32(small, training):
    ours, _ = small
    model = timm.create_model("alt_gvt_small", num_classes=10, drop_path_rate=0.3).train(training)
    model.load_state_dict(ours.state_dict())
    x = images(2, 64, 64)
    with torch.no_grad():
        torch.manual_seed(0)
        exact = model(x)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x).float()
    error = ((rough - exact).square().mean() / exact.square().mean()).sqrt()
    assert 0 < error < 0.05


# ---- padding ----

def window_attention(module, x):
    """LSA written out: every window by itself, only the tokens that exist."""
    B, H, W, C = x.shape
    size, heads = module.window_size, module.num_heads
    out = torch.zeros_like(x)
    for top in range(0, H, size):
        for left in range(0, W, size):
            window = x[:, top:top + size, left:left + size]
            rows, cols = window.shape[1:3]
            q, k, v = (t.reshape(B, rows * cols, heads, C // heads).transpose(1, 2)
                       for t in module.qkv(window.reshape(B, rows * cols, C)).split(C, dim=-1))
            weights = (q @ k.transpose(2, 3) / math.sqrt(C // heads)).softmax(-1)
            window = (weights @ v).transpose(1, 2).reshape(B, rows, cols, C)
            out[:, top:top + size, left:left + size] = module.proj(window)
    return out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("height, width", [(16, 16), (7, 9), (3, 5), (14, 21), (8, 14)])
def test_masked_padding_is_attention_over_the_real_tokens(height, width, fused):
    module = randomise(gvt.LocallyGroupedAttention(24, 3, 7, fused_attn=fused, mask_padding=True)).double()
    x = images(2, height, width * 8, torch.float64).reshape(2, height, width, 24)
    assert largest_error(module(x), window_attention(module, x)) <= 1e-12


def test_zero_padding_is_seen_and_masked_padding_is_not(shallow):
    """At 224 no window is padded and both agree; at 64 they differ."""
    zeros, _ = shallow["alt_gvt_small"]
    masked = timm.create_model("alt_gvt_small", mask_padding=True, **SHALLOW).eval()
    masked.load_state_dict(zeros.state_dict())
    with torch.inference_mode():
        x = images(1, 224, 224)
        assert torch.equal(masked(x), zeros(x))
        x = images(1, 64, 64)
        assert largest_error(masked(x), zeros(x)) > 1e-3


def test_a_padded_map_leaves_no_trace_outside_its_size():
    """What stands beyond the map cannot matter: a wider map's first windows give the same tokens."""
    module = randomise(gvt.LocallyGroupedAttention(24, 3, 7)).double()
    x = images(2, 14, 14 * 8, torch.float64).reshape(2, 14, 14, 24)
    assert largest_error(module(x[:, :10, :7]), module(F.pad(x[:, :10, :7], (0, 0, 0, 7, 0, 4)))[:, :10, :7]) <= 1e-12


# ---- drop path and dropout ----

class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor.view(-1, 1, 1)


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_drop_path_scales_the_branches_timm_scales(name):
    """In training, timm's model with our factors in place of its DropPath gives our output."""
    ours, theirs = pair(name, torch.float64, num_classes=10, drop_path_rate=0.5)
    x = images(4, 64, 64, torch.float64)
    torch.manual_seed(5)
    out = ours.train()(x)
    torch.manual_seed(5)
    factors = ours.drop_path_factors(x)
    branches = [(block, f"drop_path{k}") for stage in theirs.blocks for block in stage for k in (1, 2)]
    assert len(branches) == len(factors)
    for (block, place), factor in zip(branches, factors):
        if factor is not None:
            setattr(block, place, Scaled(factor))
        else:
            assert isinstance(getattr(block, place), nn.Identity)
    assert largest_error(out, theirs(x)) <= 1e-9
    assert largest_error(out, ours.eval()(x)) > 1e-3


def test_drop_path_factors_have_mean_one_and_linear_rates():
    """Rates rise from 0 to the last block's; the first block is kept; both branches of a block share a rate, not a draw."""
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.3).train()
    torch.manual_seed(0)
    n = 200_000
    factors = model.drop_path_factors(torch.empty(n))
    assert factors[:2] == [None, None]
    assert len(factors) == 36
    for i, factor in enumerate(factors[2:], 2):
        rate = 0.3 * (i // 2) / 17
        assert factor.shape == (n, 1, 1, 1)
        assert (factor == 0).float().mean().item() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
        assert factor.mean().item() == pytest.approx(1, abs=5 * math.sqrt(rate / (1 - rate) / n))
        assert torch.all((factor == 0) | ((factor - 1 / (1 - rate)).abs() < 1e-6))
    dropped = torch.stack([factor.flatten() == 0 for factor in factors[2:]]).float()
    together = torch.corrcoef(dropped)
    together.fill_diagonal_(0)
    assert together.abs().max() < 5 / math.sqrt(n), "no two branches are dropped together more than by chance"


def test_drop_path_is_one_draw_a_step(monkeypatch):
    draws = []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(a) or original(*a, **k))
    timm.create_model("alt_gvt_small", drop_path_rate=0.3, **SHALLOW).train()(images(2, 64, 64))
    assert draws == [(16, 2)]


@pytest.mark.parametrize("settings", [dict(drop_path_rate=0.5), dict(drop_rate=0.5), dict(attn_drop_rate=0.5)])
def test_evaluation_drops_nothing(settings):
    """Training is random, evaluation is the model without any dropping."""
    plain = randomise(timm.create_model("alt_gvt_small", **SHALLOW)).eval()
    model = timm.create_model("alt_gvt_small", **settings, **SHALLOW).eval()
    model.load_state_dict(plain.state_dict())
    x = images(4, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
        model.train()
        assert not torch.equal(model(x), model(x))


# ---- what training needs ----

def test_gradient_checkpointing_gives_the_same_gradients():
    """With drop path and dropout, from the same seed."""
    model = randomise(timm.create_model("alt_gvt_small", drop_path_rate=0.5, drop_rate=0.1, **SHALLOW)).train()
    x, results = images(4, 64, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        out = model(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_gradient_checkpointing_recomputes_the_blocks():
    """It must do something: in the backward pass every block runs again."""
    model = timm.create_model("alt_gvt_small", **SHALLOW).train()
    runs = []
    for stage in model.blocks:
        for block in stage:
            block.norm1.register_forward_hook(lambda *_: runs.append(1))
    for enable, expected in ((False, 8), (True, 16)):
        model.set_grad_checkpointing(enable)
        runs.clear()
        model(images(2, 64, 64)).sum().backward()
        assert len(runs) == expected


def test_reset_classifier():
    model = timm.create_model("alt_gvt_small", **SHALLOW).double()
    before = model.state_dict()
    model.reset_classifier(7)
    assert (model.num_classes, model.get_classifier()) == (7, model.head)
    assert model.head.weight.shape == (7, 512)
    assert model.head.weight.dtype == torch.float64
    assert 0.018 < model.head.weight.std().item() < 0.022
    assert not model.head.bias.any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if not key.startswith("head"))
    x = images(2, 64, 64, torch.float64)
    assert model.eval()(x).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_features(x).mean(1))
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), model.forward_features(x))


def test_no_pooling_gives_every_tokens_logits(small):
    ours, _ = small
    model = timm.create_model("alt_gvt_small", num_classes=10, global_pool="").eval()
    model.load_state_dict(ours.state_dict())
    x = images(2, 64, 64)
    with torch.inference_mode():
        assert model(x).shape == (2, 4, 10)
        assert largest_error(model(x).mean(1), ours(x)) <= 1e-5


def test_grey_and_many_channel_inputs_fit():
    model = timm.create_model("alt_gvt_small", in_chans=5, **SHALLOW).eval()
    assert model(torch.randn(1, 5, 64, 64)).shape == (1, 10)


# ---- mistakes ----

def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="global_pool is 'avg' or '', not 'max'"):
        timm.create_model("alt_gvt_small", global_pool="max", **SHALLOW)


@pytest.mark.parametrize("height, width", [(31, 64), (64, 31), (16, 16)])
def test_small_images_are_refused(small, height, width):
    with pytest.raises(ValueError, match=rf"images are {height} x {width} pixels.* at least 32 x 32.*--input-size"):
        small[0](images(1, height, width))


def test_32_pixels_are_enough(small):
    ours, theirs = small
    with torch.inference_mode():
        assert largest_error(ours(images(1, 32, 32)), theirs(images(1, 32, 32))) <= 1e-5


def test_published_weights_without_a_network(monkeypatch, tmp_path):
    """One clear line that says which weights, why, and what to do instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError) as caught:
        timm.create_model("alt_gvt_small", pretrained=True, cache_dir=str(tmp_path))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("cannot fetch the published weights of alt_gvt_small (")
    assert "--finetune" in text


@pytest.mark.parametrize("name", TIMMS)
def test_published_weights_are_timms(name):
    """The place they come from, and what they were trained on; images are prepared as upstream does: 256 / 224."""
    ours, theirs = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(TIMMS[name])
    for key in ("hf_hub_id", "num_classes", "input_size", "interpolation", "mean", "std", "first_conv", "classifier", "license"):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.crop_pct == 224 / 256


def test_published_weights_are_loaded_and_the_head_replaced(monkeypatch):
    """What timm's loader brings arrives in the model; other classes get a new head."""
    brought = randomise(timm.create_model("twins_svt_small")).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(brought))
    model = timm.create_model("alt_gvt_small", pretrained=True).state_dict()
    assert all(torch.equal(model[key], brought[key]) for key in brought)
    model = timm.create_model("alt_gvt_small", pretrained=True, num_classes=7).state_dict()
    assert model["head.weight"].shape == (7, 512)
    assert all(torch.equal(model[key], brought[key]) for key in brought if not key.startswith("head"))
