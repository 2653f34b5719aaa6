"""Models whose layers are watched, wrapped, pruned, quantized, traced and exported; timm's twins_* models are the oracle."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from test_gvt import SHALLOW, TIMMS, images, largest_error, pair, randomise
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize, prune
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor, get_graph_node_names

import gvt

ONE = dict(depths=(1, 1, 1, 1), num_classes=10)  # LSA only, whose maps are padded at 64 pixels


class LoRA(nn.Module):
    """A wrapped layer: its own output and a product of two small layers of the same input (arXiv 2106.09685)."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        if isinstance(base, nn.Conv2d):
            self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
            self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        else:
            self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def with_adapters(model):
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRA(layer))
    return model


def train_step(model, x, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    out.float().square().sum().backward()
    return out.detach().float()


def compare_steps(ours, theirs, x, autocast, bound=1e-5, exact=None):
    """A step of each gives the same outputs and gradients. With autocast to bfloat16, whose roundings are a machine's own: ours are not
    much further from float32's than timm's are. exact: of timm's, in float32; with autocast only"""
    found, wanted = train_step(ours, x, autocast), train_step(theirs, x, autocast)
    if not autocast:
        assert largest_error(found, wanted) <= bound
    else:
        true = train_step(exact, x, False)
        assert distance(found, true) <= 2 * distance(wanted, true) + 1e-3
    wanted, true = dict(theirs.named_parameters()), dict(exact.named_parameters()) if autocast else {}
    for name, p in ours.named_parameters():
        if not p.requires_grad:
            assert p.grad is None, name
        elif not autocast:
            assert largest_error(p.grad, wanted[name].grad) <= 1e-4, name
        else:
            assert distance(p.grad, true[name].grad) <= 3 * distance(wanted[name].grad, true[name].grad) + 1e-2, name


def distance(a, b):
    """Of all values, relative to their size."""
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


@pytest.mark.parametrize("size, autocast", [(64, False), (64, True), (224, False)])
def test_hooks_of_every_layer_fire_once_and_see_what_timms_give(size, autocast):
    """Also backward hooks, also at sizes whose windows are padded."""
    ours = timm.create_model("alt_gvt_small", **SHALLOW).train()  # 64 pixels: every window is padded, 224: none
    seen = {}
    for name, layer in ours.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            seen[name] = []
            layer.register_forward_hook(lambda m, i, o, name=name: seen[name].append("forward"))
            layer.register_full_backward_hook(lambda m, i, o, name=name: seen[name].append("backward"))
    train_step(ours, images(1, size, size), autocast)
    assert {name: calls for name, calls in seen.items() if calls != ["forward", "backward"]} == {}


@pytest.mark.parametrize("size", [64, 224])
def test_hooks_that_change_a_layer_change_what_they_change_in_timms(size):
    """Padding goes through the layer, too."""
    ours, theirs = pair("alt_gvt_small", torch.float64, **SHALLOW)
    for model in (ours, theirs):
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.register_forward_hook(lambda m, i, o: o * 1.25 + 0.5)
    x = images(1, size, size, torch.float64)
    with torch.inference_mode():
        assert largest_error(ours(x), theirs(x)) <= 1e-12


def test_convolutions_take_and_give_what_timms_do(shallow):
    ours, theirs = shallow
    shapes = []
    for model in (ours, theirs):
        found = {}
        hooks = [layer.register_forward_hook(lambda m, i, o, name=name, found=found: found.update({name: o.clone()}))
                 for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
        with torch.inference_mode():
            model(images(1, 64, 96))
        for hook in hooks:
            hook.remove()
        shapes.append(found)
    assert shapes[0].keys() == shapes[1].keys()
    assert all(largest_error(shapes[0][name], shapes[1][name]) <= 1e-5 for name in shapes[1])


@pytest.fixture(scope="module")
def shallow():
    return pair("alt_gvt_small", **SHALLOW)


@pytest.mark.parametrize("size, autocast", [(64, False), (64, True), (256, False)])
def test_adapters_of_every_layer_learn_what_timms_learn(size, autocast):
    ours, theirs = pair("alt_gvt_small", **ONE)
    ours, theirs = with_adapters(ours).train(), with_adapters(theirs).train()
    theirs.load_state_dict(randomise(ours).state_dict())
    x = images(1, size, size)
    compare_steps(ours, theirs, x, autocast, exact=copy.deepcopy(theirs))
    assert sum(p.requires_grad for p in ours.parameters()) == 2 * (4 + 4 * 4 + 1)


@pytest.mark.parametrize("autocast", [False, True])
def test_pruned_layers_train_step_after_step(autocast):
    ours, theirs = pair("alt_gvt_small", **ONE)
    exact = copy.deepcopy(theirs)
    for model in (ours, theirs, exact):
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                prune.l1_unstructured(layer, "weight", 0.5)
                prune.l1_unstructured(layer, "bias", 0.5)
        model.train()
    optimizers = [torch.optim.SGD(model.parameters(), 1e-3) for model in (ours, theirs, exact)]
    x = images(2, 64, 64)
    for _ in range(3):
        compare_steps(ours, theirs, x, autocast, 1e-4, exact)
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("autocast", [False, True])
def test_parametrized_layers_are_asked(autocast):
    ours, theirs = pair("alt_gvt_small", **ONE)
    exact = copy.deepcopy(theirs)
    for model in (ours, theirs, exact):
        for layer in list(model.modules()):
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                parametrize.register_parametrization(layer, "weight", Doubled())
                parametrize.register_parametrization(layer, "bias", Doubled())
    x = images(1, 64, 64)
    compare_steps(ours.train(), theirs.train(), x, autocast, exact=exact.train())


def test_quantized_models_work():
    """quantize_dynamic replaces every Linear by one whose weight is a method."""
    ours, theirs = (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in pair("alt_gvt_small", **SHALLOW))
    x = images(1, 64, 64)
    with torch.no_grad():
        assert largest_error(ours(x), theirs(x)) < 0.1  # activations are quantized by their range, in which padding counts


# ---- the tests that timm holds its own models to ----

def fx_of(model, train=False):
    """As timm's tests trace a model: the nodes that lead to the output, by torchvision's feature extraction."""
    how = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True)
    names, evaluating = get_graph_node_names(model, tracer_kwargs=how)
    if train:
        nodes = list(NodePathTracer(**how).trace(model).nodes)
        before = {node.name for node in nodes[-1].all_input_nodes}
        names = [name for name, node in zip(names, nodes) if node.name in before]
    return create_feature_extractor(model, train_return_nodes=names if train else names[-1:], eval_return_nodes=evaluating[-1:],
                                    tracer_kwargs=how)


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_fx_traces_give_the_same_numbers(name):
    model = timm.create_model(name, **SHALLOW).eval()
    x = images(2, 96, 96)
    with torch.inference_mode():
        traced = torch.cat(tuple(fx_of(model)(x).values()))
        assert torch.equal(traced, model(x))


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_fx_traces_train(rate):
    model = timm.create_model("alt_gvt_small", drop_path_rate=rate, **SHALLOW).train()
    traced, x = fx_of(model, train=True), images(2, 64, 64)
    torch.manual_seed(1)
    out = torch.cat(tuple(traced(x).values()))
    torch.manual_seed(1)
    assert torch.equal(out, model(x))
    out.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_of_each_image_are_those_of_the_image_alone(autocast):
    """torch.func's per-sample gradients, at a size whose windows are padded."""
    model = timm.create_model("alt_gvt_small", **ONE).eval()
    x, weights = images(3, 64, 64), dict(model.named_parameters())

    def loss(weights, image):
        return functional_call(model, weights, image[None]).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = vmap(grad(loss), (None, 0))({name: weight.detach() for name, weight in weights.items()}, x)
        alone = [torch.autograd.grad(loss(weights, image), list(weights.values())) for image in x]
    found, alone = (torch.cat([gradient.flatten() for gradient in gradients])
                    for gradients in (found.values(), map(torch.stack, zip(*alone))))
    assert torch.linalg.vector_norm(found - alone) / torch.linalg.vector_norm(alone) <= (0.03 if autocast else 1e-5)


def test_batched_gradients_are_the_gradients_one_by_one():
    """As torch.autograd.functional's vectorized Jacobians ask for them: their vmap knows fewer operators than torch.func's."""
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.5, **ONE).train()
    out = model(images(2, 64, 64)).sum(0)
    weights, each = list(model.parameters()), torch.eye(10)[:3]
    together = torch.autograd.grad(out, weights, each, retain_graph=True, is_grads_batched=True)
    apart = [torch.autograd.grad(out, weights, one, retain_graph=True) for one in each]
    assert all(torch.allclose(a, torch.stack(b), rtol=1e-4, atol=1e-5) for a, b in zip(together, zip(*apart)))


def test_torch_func_and_forward_mode_train_with_drop_path():
    """A derivative along a direction is the gradient's product with it; both draw the same drop paths."""
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.5, fused_attn=False, **SHALLOW).double().train()
    x, direction = images(2, 64, 64).double(), images(2, 64, 64).double().flip(0)

    def loss(x):
        torch.manual_seed(1)
        return model(x).square().sum()

    x.requires_grad_()
    gradient, = torch.autograd.grad(loss(x), x)
    with forward_ad.dual_level():
        along = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), direction))).tangent
    assert torch.allclose(grad(loss)(x.detach()), gradient)
    assert torch.allclose(jvp(loss, (x.detach(),), (direction,))[1], (gradient * direction).sum())
    assert torch.allclose(along, (gradient * direction).sum())


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_take_any_number_of_images(strict, shallow):
    model, _ = shallow
    program = torch.export.export(model, (images(2, 64, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    x = images(5, 64, 64)
    with torch.inference_mode():
        assert largest_error(program.module()(x), model(x)) <= 1e-6


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
@pytest.mark.parametrize("settings", [dict(), dict(indices=2), dict(indices=(0, 2), stop_early=True), dict(indices=[3], norm=True),
                                      dict(intermediates_only=True, norm=True), dict(indices=[1], intermediates_only=True)])
def test_intermediates_are_timms(name, settings):
    ours, theirs = pair(name, torch.float64, **ONE)
    x = images(1, 64, 96, torch.float64)
    with torch.inference_mode():
        a, b = ours.forward_intermediates(x, **settings), theirs.forward_intermediates(x, **settings)
    if not settings.get("intermediates_only"):
        if not settings.get("stop_early"):
            assert largest_error(a[0], b[0]) <= 1e-12
        a, b = a[1], b[1]
    assert [t.shape for t in a] == [t.shape for t in b]
    assert all(largest_error(s, t) <= 1e-12 for s, t in zip(a, b))


def test_pruned_stages_are_timms():
    ours, theirs = pair("alt_gvt_small", torch.float64, **ONE)
    assert ours.prune_intermediate_layers([0, 2]) == theirs.prune_intermediate_layers([0, 2])
    x = images(1, 64, 64, torch.float64)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert (ours.num_features, ours.num_classes) == (theirs.num_features, theirs.num_classes)
    with torch.inference_mode():
        assert all(largest_error(a, b) <= 1e-12 for a, b in
                   zip(ours.forward_intermediates(x, [0, 2])[1], theirs.forward_intermediates(x, [0, 2])[1]))
        assert ours(x).shape == (1, 16, 256)


@pytest.mark.parametrize("name", TIMMS)
def test_features_only_is_timms(name):
    settings = dict(features_only=True, out_indices=(1, 3), depths=ONE["depths"])
    ours, theirs = timm.create_model(name, **settings).eval(), timm.create_model(TIMMS[name], **settings).eval()
    theirs.load_state_dict(ours.state_dict())
    assert ours.feature_info.channels() == theirs.feature_info.channels()
    assert ours.feature_info.reduction() == theirs.feature_info.reduction() == [8, 32]
    x = images(1, 64, 64)
    with torch.inference_mode():
        assert all(a.shape == b.shape and largest_error(a, b) <= 1e-5 for a, b in zip(ours(x), theirs(x)))


@pytest.mark.parametrize("kind", ["fx", "hook"])
def test_features_of_the_other_kinds_are_channels_last(kind):
    settings = dict(features_only=True, out_indices=(0, 2), depths=ONE["depths"])
    model, getter = (timm.create_model("alt_gvt_small", feature_cls=k, **settings).eval() for k in (kind, "getter"))
    (model.graph_module if kind == "fx" else model).load_state_dict(getter.model.state_dict(), strict=False)
    x = images(1, 64, 64)
    assert str(model.output_fmt.value) == "NHWC"
    with torch.inference_mode():
        for a, b in zip(model(x), getter(x)):
            assert a.shape == b.permute(0, 2, 3, 1).shape


def test_features_of_published_weights(monkeypatch):
    brought = randomise(timm.create_model("twins_svt_small")).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(brought))
    model = timm.create_model("alt_gvt_small", pretrained=True, features_only=True)
    assert torch.equal(model.model.blocks[0][0].attn.qkv.weight, brought["blocks.0.0.attn.qkv.weight"])


def test_a_mistake_is_not_blamed_on_the_network():
    with pytest.raises(Exception, match="nonsense") as caught:
        timm.create_model("alt_gvt_small", pretrained=True, features_only=True, feature_cls="nonsense", cache_dir="/nonexistent",
                          pretrained_cfg_overlay=dict(state_dict=timm.create_model("twins_svt_small").state_dict()))
    assert "network" not in str(caught.value)


@pytest.mark.parametrize("what", ["no bias", "another forward"])
def test_a_changed_layer_is_asked_for_the_padding_too(what):
    """36 pixels: 9 x 9 tokens, which windows of 7 x 7 do not fill."""
    ours = randomise(timm.create_model("alt_gvt_small", **ONE)).eval()
    theirs = timm.create_model("twins_svt_small", **ONE).eval()
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        layer = model.blocks[0][0].attn.qkv
        if what == "no bias":
            layer.bias = None
        else:
            layer.forward = lambda x, forward=layer.forward: 2 * forward(x)
    x = images(2, 36, 36)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# ---- devices, dtypes, drop rates ----

@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
def test_dtype_and_device_are_asked_for_as_of_timms(name):
    for settings in (dict(dtype=torch.float64), dict(device="meta"), dict(device="meta", dtype=torch.bfloat16)):
        ours, theirs = timm.create_model(name, **settings, **ONE), timm.create_model(TIMMS[name], **settings, **ONE)
        assert {(p.device, p.dtype) for p in ours.parameters()} == {(p.device, p.dtype) for p in theirs.parameters()}
        ours.reset_classifier(3)
        assert (ours.head.weight.device, ours.head.weight.dtype) == (ours.norm.weight.device, ours.norm.weight.dtype)


@pytest.mark.parametrize("name", ["alt_gvt_small", "pcpvt_small_v0"])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_are_told_on_meta(name, training):
    model = timm.create_model(name, drop_path_rate=0.5, device="meta", **ONE).train(training)
    out = model(torch.empty(2, 3, 65, 97, device="meta"))
    assert (out.shape, out.is_meta) == ((2, 10), True)


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_model_made_on_meta_trains_as_one_made_here(way):
    here = randomise(timm.create_model("alt_gvt_small", drop_path_rate=0.5, **ONE)).train()
    there = timm.create_model("alt_gvt_small", drop_path_rate=0.5, device="meta", **ONE).train()
    if way == "to_empty":
        there.to_empty(device="cpu").load_state_dict(here.state_dict())
    else:
        there.load_state_dict(here.state_dict(), assign=True)
    assert not list(there.buffers())
    outputs = []
    for model in (here, there):
        torch.manual_seed(3)
        outputs.append(model(images(4, 32, 32)))
    assert torch.equal(*outputs)


def test_a_model_of_bfloat16_trains_with_drop_path():
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.5, dtype=torch.bfloat16, **ONE).train()
    out = model(images(2, 32, 32, torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.grad is not None for p in model.parameters())


def test_under_autocast_drop_path_keeps_the_sum_of_branches_in_float32():
    """On a CPU the norms give bfloat16: without the factors' own precision the sum over all blocks would have it, too."""
    model = timm.create_model("alt_gvt_small", drop_path_rate=0.5, **SHALLOW).train()
    kinds = []
    for i, block in enumerate(block for stage in model.blocks for block in stage):
        block.register_forward_hook(lambda m, args, out, i=i: kinds.append((i, out.dtype)))
    train_step(model, images(2, 32, 32), True)
    assert {kind for i, kind in kinds if i} == {torch.float32}


@pytest.mark.parametrize("settings, rates", [
    (dict(drop_rate=0.1), (0.1, 0.1)), (dict(proj_drop_rate=0.2), (0.0, 0.2)), (dict(pos_drop_rate=0.3), (0.3, 0.0)),
    (dict(drop_rate=0.1, proj_drop_rate=0.0), (0.1, 0.0))])
def test_drop_rates(settings, rates):
    model = timm.create_model("alt_gvt_small", device="meta", **settings, **SHALLOW)
    assert {drop.p for drop in model.pos_drops} == {rates[0]}
    assert {m.p for m in model.blocks.modules() if isinstance(m, nn.Dropout)} == {rates[1]}


def test_another_pooling_is_refused_when_the_head_is_reset():
    model = timm.create_model("alt_gvt_small", device="meta", **ONE)
    with pytest.raises(ValueError, match="global_pool is 'avg' or '', not 'max'"):
        model.reset_classifier(3, "max")
    assert (model.num_classes, model.global_pool) == (10, "avg")


# ---- more windows than a kernel takes ----

@pytest.mark.parametrize("mask_padding", [False, True])
def test_windows_beyond_what_a_kernel_takes_are_split(monkeypatch, mask_padding):
    """1,024 images of 224 pixels are 65,536 windows; CUDA takes 65,535."""
    assert gvt.most_windows(torch.empty(1, device="meta")) == 65_535 and gvt.most_windows(torch.empty(1)) is None
    model = randomise(timm.create_model("alt_gvt_small", mask_padding=mask_padding, **ONE)).double().train()
    split = copy.deepcopy(model)
    x, calls, original = images(3, 64, 64, torch.float64), [], F.scaled_dot_product_attention
    whole = train_step(model, x, False)
    monkeypatch.setattr(gvt, "most_windows", lambda x: 5)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **k: calls.append(len(q)) or original(q, *a, **k))
    assert largest_error(train_step(split, x, False), whole) <= 1e-12
    assert calls == [5, 5, 5, 5, 5, 2] + [5, 5, 2] + [3] + [3]
    for (name, p), q in zip(model.named_parameters(), split.parameters()):
        assert largest_error(q.grad, p.grad) <= 1e-9, name


def masked_as_mmsegmentation(module, x):
    """LSA with -1000 between real tokens and padding, where both sides are padded; their rule for one side hides nothing."""
    B, H, W, C = x.shape
    size = module.window_size
    down, right = -H % size, -W % size
    hidden = torch.zeros(H + down, W + right)
    hidden[-down:, :], hidden[:, -right:] = 1, 1  # from -0 on is everything

    def windows(t):
        return t.unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    kind = windows(hidden)
    bias = torch.where(kind[:, None, :, None] != kind[:, None, None, :], -1000.0, 0.0)
    out = []
    for image in F.pad(x, (0, 0, 0, right, 0, down)):
        q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in module.qkv(windows(image)).split(C, -1))
        y = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v
        y = y.transpose(1, 2).flatten(2).unflatten(0, (-1, (W + right) // size)).unflatten(2, (size, size))
        out.append(module.proj(y.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:H, :W]))
    return torch.stack(out)


@pytest.mark.parametrize("height, width, hidden", [(16, 16, True), (9, 12, True), (14, 16, False), (16, 7, False), (14, 14, True)])
def test_which_padding_is_mmsegmentations(height, width, hidden):
    module = randomise(gvt.LocallyGroupedAttention(24, 3, 7, mask_padding=hidden)).double()
    x = images(2, height, width * 8, torch.float64).reshape(2, height, width, 24)
    assert largest_error(module(x), masked_as_mmsegmentation(module, x)) <= 1e-12
