"""Which network is meant? Ours and timm's by name: what they are built with, how their images are prepared, their heads."""
import re

import timm
import torch
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models._manipulate import group_with_matcher

import gvt
import transforms
from checkpoint import first_line
from options import MODELS


def is_ours(name):
    return name.partition(".")[0] in MODELS


def configuration(name, option="--model"):
    """timm's pretrained_cfg of a model in its registry, NAME or NAME.TAG. Raises ValueError.

    A name of timm's may also be a place (hf-hub:, local-dir:), whose code and files nobody has looked at: never that.
    """
    if any(sign in name for sign in "/\\:"):
        bare = re.split(r"[/\\:]", name)[-1]
        remedy = f"name it {bare}" if bare and timm.is_model(bare) else "name one of timm.list_models(), and give its weights as a file"
        raise ValueError(f"{option} {name}: models are taken by name, not from a hub or a folder: {remedy}")
    if not timm.is_model(name):
        raise ValueError(f"{option} {name}: no such model: one of {', '.join(MODELS)}, or one of timm.list_models()")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ValueError(f"{option} {name}: {first_line(error)} See timm.list_pretrained()") from error
    return config.to_dict() if config else {}


def own_size(config):
    """The side of the images that published weights were trained on."""
    return (config.get("input_size") or (3, 224, 224))[-1]


def trained_size(config, content=None):
    """The side of the images that a teacher's weights were trained on: as our checkpoint says, else as timm publishes the model."""
    said = content.get("options") if isinstance(content, dict) else None
    size = said.get("input_size") if isinstance(said, dict) else None
    return size if isinstance(size, int) and size > 0 else own_size(config)


def heads(config):
    """The modules that classify, as timm names them: of two the one of the labels first."""
    names = config.get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def has_statistics(net):
    """Whether a network keeps statistics of what it has seen: batch norms do."""
    return any(getattr(module, "running_mean", None) is not None for module in net.modules())


def adapt_positions(net, state, say=lambda text: None):
    """`state` with position embeddings for the size of this network's images, interpolated as timm does and DeiT did."""
    own = net.state_dict().get("pos_embed")
    theirs = state.get("pos_embed")
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if own is None or theirs is None or grid is None or own.shape == theirs.shape or theirs.ndim != 3 or own.shape[2] != theirs.shape[2]:
        return state
    prefix = 0 if getattr(net, "no_embed_class", False) else getattr(net, "num_prefix_tokens", 0)
    say(f"note: position embeddings are interpolated, from {theirs.shape[1] - prefix} to {own.shape[1] - prefix}")
    return {**state, "pos_embed": resample_abs_pos_embed(theirs, new_size=grid, num_prefix_tokens=prefix)}


def has_windows(name):
    """Whether a model is one of ours with windows: SVT."""
    return is_ours(name) and name.startswith("alt_gvt")


def window(size):
    """The argument of a model of ours for windows of size x size tokens in all stages; {} for its own."""
    return {"window_sizes": (size,) * 4} if size else {}


def window_of(net):
    """The side of a network's windows in tokens, None where it has none."""
    return next((module.window_size for module in net.modules() if isinstance(module, gvt.LocallyGroupedAttention)), None)


def trained_window(content):
    """The side of the windows that weights were trained with, as our checkpoint says; None where it does not."""
    said = content.get("options") if isinstance(content, dict) else None
    size = said.get("window_size") if isinstance(said, dict) else None
    return size if type(size) is int and 0 < size <= 2**14 else None


@torch.no_grad()
def scale_heads(net, names, scale):
    """Multiply the weights and biases of the heads that have these names. timm's --head-init-scale."""
    for head in map(net.get_submodule, names):
        for parameter in head.parameters():
            parameter.mul_(scale)


def freeze(net, what, heads):
    """Leave parameters of `net` out of its training. -> modules that are to be computed as in an evaluation, the number of parameters

    what: "stem"; a number of stages (of layers as timm groups a model's), with all that comes before them; "backbone", all but the heads;
    or names of modules, with commas between them. heads: the names of the heads. Raises ValueError.
    """
    modules, heads = dict(net.named_modules()), tuple(f"{name}." for name in heads)
    parameters = {name: parameter for name, parameter in net.named_parameters()}
    if what == "backbone":
        chosen = [name for name in (*parameters, *modules) if not f"{name}.".startswith(heads) and name]
    elif what == "stem" or what.isdecimal():
        if not hasattr(net, "group_matcher"):
            raise ValueError(f"--freeze {what}: timm does not say what the stages of {type(net).__name__} are: name modules, or backbone")
        layers = group_with_matcher(((name, None) for name in (*parameters, *modules)), net.group_matcher(coarse=True), reverse=True)
        last, most = int(what) if what != "stem" else 0, max(layers[name] for name in parameters) - 1
        if not (what == "stem" or 0 < last <= most):
            raise ValueError(f"--freeze {what}: {type(net).__name__} has {most} stages: 1 to {most}, stem, or backbone")
        chosen = [name for name, layer in layers.items() if layer <= last]
    else:
        wanted = tuple(f"{name.strip()}." for name in what.split(","))
        for name in wanted:
            if name[:-1] not in modules or name == ".":
                raise ValueError(f"--freeze {what}: there is no module {name[:-1]}: stem, a number of stages, backbone, or names such as "
                                 f"{', '.join(name for name, _ in net.named_children())}")
        chosen = [name for name in (*parameters, *modules) if f"{name}.".startswith(wanted)]
    chosen = set(chosen)
    for name in chosen & parameters.keys():
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError(f"--freeze {what} leaves nothing to train")

    def rests(name, module):
        own = list(module.parameters())
        return not any(parameter.requires_grad for parameter in own) if own else name in chosen

    frozen = [module for name, module in modules.items() if rests(name, module)]
    return frozen, sum(parameter.numel() for parameter in net.parameters() if not parameter.requires_grad)


def drop_path_of(net):
    """The highest rate of drop path in a network, 0.0 where it has none."""
    if isinstance(net, gvt.Twins):
        return net.drop_path_rate
    return round(max((layer.drop_prob for layer in net.modules() if isinstance(layer, DropPath)), default=0.0), 6)


def create(name, num_classes, input_size, *, pretrained=False, drop=0.0, drop_path=0.0, grad_checkpointing=False, distilled=False,
           option="--model", **ours):
    """-> network, notes: what it does not have of what was asked for. Raises ValueError where it cannot be trained so.

    distilled: a network with two heads answers with both while it trains. ours: what only our models have.
    """
    config = configuration(name, option)
    wanted = dict(drop_rate=drop, drop_path_rate=drop_path, **(ours if is_ours(name) else {"img_size": input_size}))
    if pretrained and not (config.get("url") or config.get("hf_hub_id") or config.get("file")):
        raise ValueError(f"{option} {name}: timm has no published weights of it: see timm.list_pretrained()")
    lacks = []
    while True:
        try:
            net = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **wanted)
            break
        except TypeError as error:  # each model has its own arguments
            unknown = re.search(r"unexpected keyword argument\W+(?:s\W+)?(\w+)'", str(error))
            if unknown is None or wanted.pop(unknown[1], None) is None:
                raise ValueError(f"{option} {name}: {first_line(error)}: this model of timm's does not train here") from error
            lacks.append(unknown[1])
        except Exception as error:
            if pretrained and is_ours(name):
                raise ValueError(first_line(error)) from error
            if pretrained:
                raise ValueError(f"{option} {name}: cannot fetch the published weights ({first_line(error)}): check the network, or "
                                 "give them as a file") from error
            raise ValueError(f"{option} {name}: it cannot be built for images of {input_size} pixels ({first_line(error)}): "
                             f"its own size is --input-size {own_size(config)}") from error
    notes = [f"--{word} {value} has no effect: {name} has none" for word, value, missing in (
        ("drop", drop, "drop_rate" in lacks), ("drop-path", drop_path, not drop_path_of(net))) if value and missing]
    if grad_checkpointing:
        try:
            net.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"--grad-checkpointing: {name} cannot recompute its blocks: train it without") from error
    if distilled and hasattr(net, "set_distilled_training"):
        net.set_distilled_training(True)
    if not is_ours(name):
        try_out(net, name, num_classes, input_size, own_size(config), option)
        if grad_checkpointing:
            try_checkpointing(net, name, input_size)
    return net, notes


def try_out(net, name, num_classes, input_size, own, option="--model"):
    """One image through `net`: what does not fit ends here, in one line and before anything is written."""
    training = net.training
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = net.eval()(torch.zeros(1, 3, input_size, input_size))  # statistics stay as they are
    except Exception as error:
        remedy = f"its own size is --input-size {own}" if own != input_size else "this model of timm's does not train here"
        raise ValueError(f"{option} {name} fails on an image of {input_size} pixels ({first_line(error)}): {remedy}") from error
    net.train(training)  # and what some keep for an evaluation is forgotten
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, num_classes):
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"{option} {name}: it gives {given} for an image, not logits of {num_classes} classes: it is no classifier")


def try_checkpointing(net, name, input_size):
    """Two images forth and back as in training: some models fail only where they recompute. The statistics are put back."""
    before = [buffer.clone() for buffer in net.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            outputs = net.train()(torch.zeros(2, 3, input_size, input_size))
            (sum(outputs) if isinstance(outputs, tuple) else outputs).sum().backward()
    except Exception as error:
        raise ValueError(f"--grad-checkpointing: {name} cannot recompute its blocks ({first_line(error)}): train it without") from error
    net.zero_grad(set_to_none=True)
    for buffer, value in zip(net.buffers(), before):
        buffer.copy_(value)


def preprocessing(name, input_size, content=None, published=False, path="the checkpoint"):
    """How images are prepared for weights: as our checkpoint says, else as timm publishes the model; without weights as Twins.

    content: the checkpoint, as read. published: timm's weights are taken. Our checkpoints that do not say it are of a time when
    all were trained as Twins. Raises ValueError.
    """
    config, said = configuration(name), content if isinstance(content, dict) else {}
    if {"options", "classes"} <= set(said):
        return transforms.Preprocessing.load(said["preprocessing"], path) if "preprocessing" in said else transforms.Preprocessing()
    if content is None and not published:
        return transforms.Preprocessing()
    return transforms.Preprocessing.published(config, input_size)
