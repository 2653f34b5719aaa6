"""What are a Twins' weights called under other people's heads? OpenMMLab's names, and ours.

mmsegmentation's SVT and PCPVT name the layers anew and keep q, k and v of a GSA in one matrix, in_proj; mmpretrain's only name
them anew. Upstream's detectors and segmentors have our names under `backbone.`. Facts from mmsegmentation's
tools/model_converters/twins2mmseg.py and mmpretrain's twins2mmpretrain.py; `to_mmseg` gives what the former gives.
"""
import re

import torch

# (theirs, a pattern; what it becomes) in turn
NAMES = [(re.compile(theirs), ours) for theirs, ours in (
    (r"^(patch_embeds\.\d+)\.projection\.", r"\1.proj."),
    (r"^(?:layers|stages)\.(\d+\.\d+)\.", r"blocks.\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.attn\.attn\.out_proj\.", ".attn.proj."),
    (r"^position_encodings\.(\d+)\.proj\.", r"pos_block.\1.proj.0."),
    (r"^(?:norm_list\.3|norm_after_stage3)\.", "norm."),  # over the last stage's map, as the norm before the head
    (r"^head\.fc\.", "head."))]
OURS = re.compile(r"(patch_embeds|blocks|pos_block)\.\d|norm\.|head\.")
IN_PROJ = re.compile(r"(.+\.attn)\.attn\.in_proj_(weight|bias)")


def is_backbone(names):
    """Whether the weights are a Twins' under another's head, or under OpenMMLab's names."""
    return any(name in names for name in (
        "patch_embeds.0.projection.weight", "backbone.patch_embeds.0.projection.weight", "backbone.patch_embeds.0.proj.weight"))


def to_ours(state):
    """{name: tensor} in any of these layouts -> the same in ours, and the names of what it has no place for: necks, other heads,
    norms between the stages. Without the last norm (mmsegmentation's PCPVT has none) there is a new one."""
    found, left_out = {}, []
    under = any(name.startswith("backbone.") for name in state)
    for name, value in state.items():
        own = name.removeprefix("backbone.")
        for theirs, ours in NAMES:
            own = theirs.sub(ours, own)
        if (under and not name.startswith(("backbone.", "head.fc."))) or not OURS.match(own):
            left_out.append(name)
        elif joined := IN_PROJ.fullmatch(own):
            dim = len(value) // 3
            found[f"{joined[1]}.q.{joined[2]}"], found[f"{joined[1]}.kv.{joined[2]}"] = value[:dim], value[dim:]
        else:
            found[own] = value
    if "norm.weight" not in found and (last := state.get(f"{'backbone.' if under else ''}patch_embeds.3.norm.weight")) is not None:
        found["norm.weight"], found["norm.bias"] = torch.ones_like(last), torch.zeros_like(last)
    return found, left_out


def to_mmseg(state):
    """Our {name: tensor} -> mmsegmentation's, for its init_cfg=dict(type="Pretrained", checkpoint=FILE), without a head.

    Its last norm is `norm`, as twins2mmseg.py leaves it: mmsegmentation has no place for it and says so.
    """
    found = {}
    for name, value in state.items():
        name = re.sub(r"^(patch_embeds\.\d+)\.proj\.", r"\1.projection.", name)
        name = re.sub(r"^pos_block\.(\d+)\.proj\.0\.", r"position_encodings.\1.proj.", name)
        name = name.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
        block, _, rest = name.partition(".attn.")
        if f"{block}.attn.q.weight" in state:  # a GSA
            if rest.startswith("kv."):
                continue
            if rest.startswith("q."):
                value = torch.cat([value, state[f"{block}.attn.kv.{rest[2:]}"]])
            name = re.sub(r"\.attn\.q\.(\w+)$", r".attn.attn.in_proj_\1", name).replace(".attn.proj.", ".attn.attn.out_proj.")
        if not name.startswith("head."):
            found[re.sub(r"^blocks\.", "layers.", name)] = value
    return found
