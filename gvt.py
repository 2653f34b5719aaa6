"""What is the model? Twins-PCPVT and Twins-SVT (arXiv 2104.13840), put together from the paper's parts.

Legend: B images, H x W tokens of a stage, C channels, heads x head_dim = C, M sub-sampled tokens (H W / sr_ratio^2).
Tokens stay a map (B, H, W, C) from one block to the next. State-dict keys and shapes are upstream's, which timm's
`twins_*` models share, so published weights load strictly.
"""
import math
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, get_device_dtype, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import register_notrace_function as traced_whole_function
from timm.models import register_notrace_module as traced_whole
from timm.models._features import feature_take_indices
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

__all__ = ["Twins"]


def most_windows(x):
    """How many windows a fused kernel takes in one call, None for any number.

    CUDA's put them in a grid's second or third dimension. Of other accelerators it is not known; there the split costs a copy.
    """
    return None if x.is_cpu else 65_535


def attention(q, k, v, dropout, fused, mask=None):
    """softmax(q k' / sqrt(head_dim)) v on (B', heads, tokens, head_dim); `mask` is True where a key may be seen.

    4-D on purpose: accelerators have one fused kernel for this shape and none for windows as a fifth dimension.
    On a CPU the fused kernel wins in fp32 but takes 2 to 6 times as long as the formula in bf16, at all sizes of Twins.
    """
    if fused and not (q.is_cpu and q.dtype == torch.bfloat16):
        most = most_windows(q)
        if most and q.shape[0] > most:
            parts = [slice(i, i + most) for i in range(0, q.shape[0], most)]
            return torch.cat([attention(q[part], k[part], v[part], dropout, fused, None if mask is None else mask[part])
                              for part in parts])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B', heads, tokens, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(dim=-1), dropout) @ v


def heads_of(x, parts, num_heads):
    """(B', tokens, parts heads head_dim) -> `parts` views (B', heads, tokens, head_dim).

    Unbound where they stand, so that the gradients are stacked in x's own order: no copy on the way back.
    """
    return [part.transpose(1, 2) for part in x.unflatten(-1, (parts, num_heads, -1)).unbind(2)]


@traced_whole
class LocallyGroupedAttention(nn.Module):
    """LSA: self-attention inside windows of window_size x window_size tokens (section 3.2 of the paper).

    A map that is no multiple of the window is padded with zeros below and on the right. As in the published models,
    timm's and upstream's detection the padding is seen as keys, whose values are the bias; `mask_padding` hides it from
    the real tokens instead, as mmpretrain and mmsegmentation do (of a map that is padded on one side only they hide none).
    """

    def __init__(self, dim, num_heads, window_size=7, attn_drop=0.0, proj_drop=0.0, fused_attn=True,
                 mask_padding=False, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.num_heads, self.window_size = num_heads, window_size
        self.fused_attn, self.mask_padding = fused_attn, mask_padding
        self.qkv = nn.Linear(dim, dim * 3, **factory)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        B, H, W, _ = x.shape
        size = self.window_size
        pad_h, pad_w = -H % size, -W % size
        rows, cols = (H + pad_h) // size, (W + pad_w) // size
        windows = partial(rearrange, pattern="b (rows i) (cols j) c -> (b rows cols) (i j) c", i=size, j=size)
        if (pad_h or pad_w) and is_plain(self.qkv) and not is_transformed():
            # the product of the padding, which may be most of the map, is the bias
            x = windows(PadWith.apply(self.qkv(x), self.qkv.bias, pad_h, pad_w))
        else:
            x = self.qkv(windows(F.pad(x, (0, 0, 0, pad_w, 0, pad_h)) if pad_h or pad_w else x))
        q, k, v = heads_of(x, 3, self.num_heads)  # (B rows cols, heads, window_size^2, head_dim)
        mask = self.real_keys(B, H, W, rows, cols, x.device) if self.mask_padding and (pad_h or pad_w) else None
        x = attention(q, k, v, self.attn_drop if self.training else 0.0, self.fused_attn, mask)
        x = rearrange(x, "(b rows cols) heads (i j) d -> b (rows i) (cols j) (heads d)", rows=rows, cols=cols, i=size)
        return self.proj_drop(self.proj(x[:, :H, :W]))

    def real_keys(self, B, H, W, rows, cols, device):
        """(B rows cols, 1, 1, window_size^2), True where a window's token is no padding."""
        size = self.window_size
        real = torch.zeros(rows * size, cols * size, dtype=torch.bool, device=device)
        real[:H, :W] = True
        return rearrange(real, "(rows i) (cols j) -> (rows cols) 1 1 (i j)", i=size, j=size).repeat(B, 1, 1, 1)


class PadWith(torch.autograd.Function):
    """(B, H, W, C) -> (B, H + pad_h, W + pad_w, C): below and on the right stands `blank` (C,)."""

    @staticmethod
    def forward(ctx, x, blank, pad_h, pad_w):
        B, H, W, C = x.shape
        ctx.size, ctx.dtype = (H, W), blank.dtype
        padded = x.new_empty(B, H + pad_h, W + pad_w, C)
        padded[:, :H, :W] = x
        padded[:, :H, W:] = blank
        padded[:, H:] = blank
        return padded

    @staticmethod
    def backward(ctx, grad):
        H, W = ctx.size
        padding = torch.ones(grad.shape[:3], dtype=grad.dtype, device=grad.device)
        padding[:, :H, :W] = 0
        # a product, since the sum over what is no piece of memory takes a CPU several times as long
        return grad[:, :H, :W], grad.reshape(-1, grad.shape[-1]).t().mv(padding.view(-1)).to(ctx.dtype), None, None


def is_transformed():
    """Whether torch.func (vmap, grad, jvp) or forward mode differentiates: of a Function they ask more than ours give.

    What torch.autograd.Function.apply itself asks; a setup_context instead costs each call 50 us.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain(layer):
    """Whether a layer is what it was built as: nothing wraps or replaces its forward, and no hook can make its output another."""
    return (type(layer) is nn.Linear and layer.bias is not None and "forward" not in layer.__dict__
            and not layer._forward_hooks and not layer._forward_pre_hooks)


@traced_whole
class GlobalSubsampledAttention(nn.Module):
    """GSA: every token attends to one summary of each sr_ratio x sr_ratio patch (section 3.2 of the paper)."""

    def __init__(self, dim, num_heads, sr_ratio=1, attn_drop=0.0, proj_drop=0.0, fused_attn=True, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.num_heads, self.sr_ratio, self.fused_attn = num_heads, sr_ratio, fused_attn
        self.q = nn.Linear(dim, dim, **factory)
        self.kv = nn.Linear(dim, dim * 2, **factory)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = PatchConv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio, **factory)
            self.norm = nn.LayerNorm(dim, **factory)

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        H, W = x.shape[1:3]
        q = rearrange(self.q(x), "b h w (heads d) -> b heads (h w) d", heads=self.num_heads)
        if self.sr_ratio > 1:
            x = self.norm(channels_last(self.sr(channels_first(x))))
        k, v = heads_of(self.kv(x).flatten(1, 2), 2, self.num_heads)  # (B, heads, M, head_dim)
        x = attention(q, k, v, self.attn_drop if self.training else 0.0, self.fused_attn)
        return self.proj_drop(self.proj(rearrange(x, "b heads (h w) d -> b h w (heads d)", h=H, w=W)))


def channels_first(x):
    """(B, H, W, C) -> (B, C, H, W), a view"""
    return x.permute(0, 3, 1, 2)


def channels_last(x):
    """(B, C, H, W) -> (B, H, W, C), a view"""
    return x.permute(0, 2, 3, 1)


@traced_whole
class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: (B, C, H, W) -> (B, C', H // r, W // r).

    The same numbers as nn.Conv2d's. Its result is channels-last in memory, and so may be its input: no copy there and back.
    """

    def forward(self, x):
        r = self.stride[0]
        H, W = x.shape[2] // r * r, x.shape[3] // r * r
        # of a channels-last view, so that the gradient has the map's own strides: else each layer before copies its gradient
        x = rearrange(channels_last(x)[:, :H, :W], "b (h i) (w j) c -> b h w (c i j)", i=r, j=r)
        return channels_first(F.linear(x, self.weight.flatten(1), self.bias))


@traced_whole
class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d whose weight's gradient has the parameter's strides also for a channels-last map, as DDP wants."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.flatten(1).view_as(self.weight), self.bias)


class PositionalEncodingGenerator(nn.Module):
    """PEG: a depth-wise 3 x 3 convolution that adds the position (CPVT, arXiv 2102.10882)."""

    def __init__(self, dim, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Sequential(DepthwiseConv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype))

    def forward(self, x):
        """(B, H, W, C) -> (B, H, W, C)"""
        return x + channels_last(self.proj(channels_first(x)))


class PatchEmbed(nn.Module):
    """patch_size x patch_size pixels (or tokens of the stage before) become one token."""

    def __init__(self, in_chans, dim, patch_size, device=None, dtype=None):
        super().__init__()
        self.proj = PatchConv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x):
        """(B, H, W, C) -> (B, H // patch_size, W // patch_size, C')"""
        return self.norm(channels_last(self.proj(channels_first(lowered(x)))))


class Block(nn.Module):
    """Attention and MLP, each normed before and added after."""

    def __init__(self, dim, attn, mlp_ratio, drop, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **factory)
        self.mlp = Mlp(dim, hidden_features=int(dim * mlp_ratio), drop=drop, **factory)

    def forward(self, x, keep1=None, keep2=None):
        """(B, H, W, C) -> (B, H, W, C); keep: the drop-path factors (B, 1, 1, 1) of the two branches, or None."""
        x = add_branch(x, self.attn(lowered(self.norm1(x))), keep1)
        return add_branch(x, self.mlp(lowered(self.norm2(x))), keep2)


@traced_whole_function
def add_branch(x, branch, keep):
    if keep is None:
        return x + branch
    return torch.addcmul(x, branch, keep) if is_transformed() else AddScaled.apply(x, branch, keep)


class AddScaled(torch.autograd.Function):
    """x + branch * keep; the backward pass of torch.addcmul, without the product of keep with its factor 1."""

    @staticmethod
    def forward(ctx, x, branch, keep):
        ctx.save_for_backward(keep)
        ctx.dtype = branch.dtype
        return torch.addcmul(x, branch, keep)

    @staticmethod
    def backward(ctx, grad):
        return grad, (grad * ctx.saved_tensors[0]).to(ctx.dtype), None


@traced_whole_function
def lowered(x):
    """x in autocast's dtype: cast once, before it is copied into windows and patches and read by several layers."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else x


def autocasts(x):
    """Whether autocast is on for the device of `x`: torch does not answer for the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class CastTogether(torch.autograd.Function):
    """Many fp32 tensors in another dtype with one launch, and their gradients back with one."""

    @staticmethod
    def forward(ctx, dtype, *tensors):
        cast = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(cast, tensors)
        return tuple(cast)

    @staticmethod
    def backward(ctx, *grads):
        cast = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        torch._foreach_copy_(cast, grads)
        return None, *cast


def call(module, *inputs):
    """module(*inputs). Under autocast its products' weights are cast together, instead of two launches for each.

    Of layers as they were built; what wraps, prunes or quantizes a layer keeps its tensors to itself. Any other call
    than a training step of tensors (torch.compile's, torch.func's, a tracer's) is the module's own.
    """
    x = inputs[0]
    if (not isinstance(x, torch.Tensor) or not autocasts(x) or not torch.is_grad_enabled() or torch.compiler.is_compiling()
            or is_transformed()):
        return module(*inputs)
    weights = {f"{prefix}.{name}" if prefix else name: weight for prefix, layer in module.named_modules()
               if type(layer) in (nn.Linear, PatchConv2d, DepthwiseConv2d)
               for name, weight in layer.named_parameters(recurse=False)
               if name in ("weight", "bias") and weight.requires_grad and weight.dtype == torch.float32}
    if not weights:
        return module(*inputs)
    cast = CastTogether.apply(torch.get_autocast_dtype(x.device.type), *weights.values())
    return functional_call(module, dict(zip(weights, cast)), inputs)


@lru_cache
def keep_probabilities(rate, blocks, device):
    """(2 blocks, 1): of both branches of each block, falling linearly from 1 at the first to 1 - rate at the last.

    Kept for each device instead of in the model, where to_empty() and a model on meta would leave it without numbers.
    """
    return 1 - torch.linspace(0, rate, blocks).repeat_interleave(2).view(-1, 1).to(device)


@traced_whole_function
def drop_path_factors(rate, blocks, batch, device, dtype):
    """2 * blocks factors (batch, 1, 1, 1) that are 0 or 1 / keep_prob: one draw for the whole model, not one a branch."""
    make = keep_probabilities.__wrapped__ if torch.compiler.is_compiling() else keep_probabilities
    keep = make(rate, blocks, device)
    drawn = torch.rand(keep.shape[0], batch, device=device) < keep
    return (drawn / keep).to(dtype).view(-1, batch, 1, 1, 1).unbind(0)


@traced_whole_function
def check_size(x):
    if min(x.shape[-2:]) < 32:
        raise ValueError(f"images are {x.shape[-2]} x {x.shape[-1]} pixels, Twins needs at least 32 x 32: "
                         "use a larger --input-size")


def check_pooling(global_pool):
    if global_pool not in ("", "avg"):
        raise ValueError(f"global_pool is 'avg' or '', not {global_pool!r}")


class Twins(nn.Module):
    """Four stages: patch embedding, blocks, and a PEG after the first block; then global average pooling and a head.

    window_sizes: one a stage, LSA on even blocks and GSA on odd ones (SVT); None, GSA everywhere (PCPVT).
    drop_rate: dropout after patch embedding, projections and MLP, as upstream; pos_drop_rate (patch embedding) and
    proj_drop_rate (the others) say it apart, as timm. drop_path_rate: of the last block;
    it rises linearly from 0 at the first. fused_attn: F.scaled_dot_product_attention, or the explicit formula.
    mask_padding: see LocallyGroupedAttention. Images may have any size of at least 32 x 32 pixels.
    """

    def __init__(self, embed_dims, num_heads, mlp_ratios, depths, sr_ratios=(8, 4, 2, 1), window_sizes=None,
                 patch_size=4, in_chans=3, num_classes=1000, global_pool="avg", drop_rate=0.0, pos_drop_rate=None,
                 proj_drop_rate=None, attn_drop_rate=0.0, drop_path_rate=0.0, fused_attn=True, mask_padding=False,
                 device=None, dtype=None):
        super().__init__()
        check_pooling(global_pool)
        factory = dict(device=device, dtype=dtype)
        pos_drop_rate = drop_rate if pos_drop_rate is None else pos_drop_rate
        proj_drop_rate = drop_rate if proj_drop_rate is None else proj_drop_rate
        self.num_classes, self.global_pool, self.in_chans = num_classes, global_pool, in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.grad_checkpointing = False

        in_dims, patch_sizes = (in_chans, *embed_dims[:-1]), (patch_size, 2, 2, 2)
        self.patch_embeds = nn.ModuleList(map(partial(PatchEmbed, **factory), in_dims, embed_dims, patch_sizes))
        self.pos_drops = nn.ModuleList(nn.Dropout(pos_drop_rate) for _ in depths)

        def attention_of(stage, i):
            dim, heads = embed_dims[stage], num_heads[stage]
            if window_sizes is None or i % 2 == 1:
                return GlobalSubsampledAttention(dim, heads, sr_ratios[stage], attn_drop_rate, proj_drop_rate, fused_attn, **factory)
            return LocallyGroupedAttention(dim, heads, window_sizes[stage], attn_drop_rate, proj_drop_rate, fused_attn,
                                           mask_padding, **factory)

        self.blocks = nn.ModuleList(
            nn.ModuleList(Block(embed_dims[s], attention_of(s, i), mlp_ratios[s], proj_drop_rate, **factory) for i in range(depth))
            for s, depth in enumerate(depths))
        self.pos_block = nn.ModuleList(map(partial(PositionalEncodingGenerator, **factory), embed_dims))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6, **factory)
        self.head = nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()
        self.depths, self.drop_path_rate = tuple(depths), drop_path_rate
        self.feature_info = [dict(module=f"blocks.{s}.{depth - 1}", num_chs=embed_dims[s], reduction=patch_size * 2 ** s)
                             for s, depth in enumerate(depths)]
        self.apply(init_weights)

    def no_weight_decay(self):
        return {f"pos_block.{name}" for name, _ in self.pos_block.named_parameters()}

    def group_matcher(self, coarse=False):
        """Which layer a parameter belongs to, for timm's layer decay."""
        blocks = [(r"^(?:blocks|patch_embeds|pos_drops|pos_block)\.(\d+)", None)] if coarse else [
            (r"^blocks\.(\d+)\.(\d+)", None), (r"^(?:patch_embeds|pos_drops|pos_block)\.(\d+)", (0,))]
        return {"stem": r"^(?:patch_embeds|pos_drops)\.0", "blocks": [*blocks, (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable=True):
        self.grad_checkpointing = enable

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        if global_pool is not None:
            check_pooling(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes, **get_device_dtype(self)) if num_classes else nn.Identity()
        self.head = head.apply(init_weights).train(self.training)

    def drop_path_factors(self, x):
        """2 * blocks factors (B, 1, 1, 1) for images x, or None where nothing is dropped."""
        blocks = sum(self.depths)
        if not (self.training and self.drop_path_rate):
            return [None] * (2 * blocks)
        dtype = self.patch_embeds[0].norm.weight.dtype  # not the map's: under autocast float32 factors keep the sum of branches float32
        factors = drop_path_factors(self.drop_path_rate, blocks, x.shape[0], x.device, dtype)
        return [None, None, *(factors[i] for i in range(2, 2 * blocks))]  # the first block is always kept

    def forward_stages(self, x, stages):
        """(B, in_chans, height, width) -> the maps (B, H, W, C) that the first `stages` stages end with"""
        check_size(x)
        factors, maps = iter(self.drop_path_factors(x)), []
        x = channels_last(x)
        for embed, drop, blocks, peg in zip(self.patch_embeds, self.pos_drops, self.blocks, self.pos_block):
            if len(maps) == stages:
                break
            x = drop(call(embed, x))
            for i, block in enumerate(blocks):
                keep1, keep2 = next(factors), next(factors)
                if not block.training:  # it is frozen
                    keep1 = keep2 = None
                if self.grad_checkpointing and self.training:
                    x = checkpoint(call, block, x, keep1, keep2, use_reentrant=False)
                else:
                    x = call(block, x, keep1, keep2)
                if i == 0:
                    x = call(peg, x)
            maps.append(x)
        return maps

    def forward_features(self, x):
        """(B, in_chans, height, width) -> (B, H W of the last stage, C)"""
        return self.norm(self.forward_stages(x, len(self.blocks))[-1]).flatten(1, 2)

    def forward_intermediates(self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False):
        """The tokens of forward_features and the maps (B, C, H, W) of the stages `indices`, as timm's twins give them.

        indices: of stages, the last n for a number n, all for None. norm: the last stage's map is normed. stop_early:
        no stage after the last wanted is computed; the tokens then are its own, without the norm.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is NCHW, not {output_fmt!r}")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        maps = self.forward_stages(x, last + 1 if stop_early else len(self.blocks))
        whole = len(maps) == len(self.blocks)
        final = self.norm(maps[-1]) if whole and not (intermediates_only and not norm) else maps[-1]
        found = [channels_first(final if norm and i == len(self.blocks) - 1 else maps[i]).contiguous()
                 for i in range(len(maps)) if i in wanted]
        return found if intermediates_only else (final.flatten(1, 2), found)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Drop what the maps of the stages `indices` do not need. -> their indices"""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        shorter = last + 1 < len(self.blocks)
        for name in ("patch_embeds", "pos_drops", "blocks", "pos_block"):
            setattr(self, name, getattr(self, name)[:last + 1])
        if prune_norm or shorter:  # the norm and the head are as wide as the last stage
            self.norm = nn.Identity()
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return wanted

    def forward_head(self, x, pre_logits=False):
        """(B, tokens, C) -> (B, num_classes)"""
        x = x.mean(dim=1) if self.global_pool == "avg" else x
        return x if pre_logits else self.head(x)

    def forward(self, x):
        """(B, in_chans, height, width) -> (B, num_classes)"""
        return self.forward_head(self.forward_features(x))


def init_weights(module):
    """Upstream's distributions: linear trunc_normal(.02), convolution normal(sqrt(2 / fan_out)), biases 0, norms 1."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# timm's published weights, by the name of our model
PUBLISHED = {
    "pcpvt_small_v0": "twins_pcpvt_small", "pcpvt_base_v0": "twins_pcpvt_base", "pcpvt_large_v0": "twins_pcpvt_large",
    "alt_gvt_small": "twins_svt_small", "alt_gvt_base": "twins_svt_base", "alt_gvt_large": "twins_svt_large",
}
default_cfgs = generate_default_cfgs({
    f"{name}.in1k": dict(
        hf_hub_id=f"timm/{theirs}.in1k", num_classes=1000, input_size=(3, 224, 224), pool_size=None, crop_pct=0.875,
        interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embeds.0.proj", classifier="head", license="apache-2.0")
    for name, theirs in PUBLISHED.items()})


def build(variant, pretrained, kwargs, **config):
    for unused in ("img_size", "drop_block_rate"):  # upstream and timm pass them; the model fits any size
        kwargs.pop(unused, None)
    features = dict(out_indices=kwargs.pop("out_indices", len(config["depths"])), feature_cls=kwargs.pop("feature_cls", "getter"))
    if features["feature_cls"] in ("fx", "hook"):  # they give the blocks' own maps
        features["output_fmt"] = "NHWC"
    try:
        return build_model_with_cfg(Twins, variant, pretrained, feature_cfg=features, **{**config, **kwargs})
    except Exception as error:
        if not pretrained or not is_network(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"cannot fetch the published weights of {variant} ({reason}): check the network, or "
                           "download them by hand and pass the file as --finetune or --resume") from error


def is_network(error):
    """Whether an error is of a file that could not be fetched, and not of what was asked."""
    return isinstance(error, OSError) or any(
        kind.__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests", "urllib") for kind in type(error).__mro__)


def pcpvt(variant, pretrained, kwargs, depths):
    return build(variant, pretrained, kwargs, embed_dims=(64, 128, 320, 512), num_heads=(1, 2, 5, 8),
                 mlp_ratios=(8, 8, 4, 4), depths=depths)


def alt_gvt(variant, pretrained, kwargs, embed_dims, num_heads, depths):
    return build(variant, pretrained, kwargs, embed_dims=embed_dims, num_heads=num_heads, mlp_ratios=(4, 4, 4, 4),
                 depths=depths, window_sizes=(7, 7, 7, 7))


@register_model
def pcpvt_small_v0(pretrained=False, **kwargs):
    """Twins-PCPVT-S: 24.1 M parameters, published 81.2 %."""
    return pcpvt("pcpvt_small_v0", pretrained, kwargs, (3, 4, 6, 3))


@register_model
def pcpvt_base_v0(pretrained=False, **kwargs):
    """Twins-PCPVT-B: 43.8 M parameters, published 82.7 %."""
    return pcpvt("pcpvt_base_v0", pretrained, kwargs, (3, 4, 18, 3))


@register_model
def pcpvt_large_v0(pretrained=False, **kwargs):
    """Twins-PCPVT-L: 61.0 M parameters, published 83.1 %."""
    return pcpvt("pcpvt_large_v0", pretrained, kwargs, (3, 8, 27, 3))


@register_model
def alt_gvt_small(pretrained=False, **kwargs):
    """Twins-SVT-S: 24.1 M parameters, published 81.7 %."""
    return alt_gvt("alt_gvt_small", pretrained, kwargs, (64, 128, 256, 512), (2, 4, 8, 16), (2, 2, 10, 4))


@register_model
def alt_gvt_base(pretrained=False, **kwargs):
    """Twins-SVT-B: 56.1 M parameters, published 83.2 %."""
    return alt_gvt("alt_gvt_base", pretrained, kwargs, (96, 192, 384, 768), (3, 6, 12, 24), (2, 2, 18, 2))


@register_model
def alt_gvt_large(pretrained=False, **kwargs):
    """Twins-SVT-L: 99.3 M parameters, published 83.7 %."""
    return alt_gvt("alt_gvt_large", pretrained, kwargs, (128, 256, 512, 1024), (4, 8, 16, 32), (2, 2, 18, 2))
