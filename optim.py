"""How are weights moved? Effective learning rate, parameter groups, optimizer and schedule: one function, in that order."""
import copy
import inspect
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from timm.optim import (
    Lookahead,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import TanhLRScheduler, create_scheduler_v2

from precision import is_flat, optimizer_flavour


def effective_lr(lr, global_batch, unscaled=False):
    """`lr` is the rate of 512 images a step. DeiT, arXiv 2012.12877. unscaled: of any number, as DeiT III's."""
    return lr if unscaled else lr * global_batch / 512


class Schedule:
    """timm's scheduler, asked before each epoch: epoch e runs at its step e - lag.

    Epoch 0, and what comes before step 0, run at the rates the scheduler begins with, as upstream's, which is asked for
    the first time when epoch 0 is over: noise never moves that epoch.
    """

    def __init__(self, optimizer, scheduler, lag=0):
        self.optimizer, self.scheduler, self.lag = optimizer, scheduler, lag

    def start_epoch(self, epoch, metric=None, begun=False):
        """Set the rates of `epoch`. metric: the accuracy after the epoch before, for plateau; None where there is none.

        begun: the epoch has begun before this was saved and loaded: plateau, which counts, has its rates already.
        """
        if self.scheduler is not None and epoch >= max(self.lag, 1) and not (begun and hasattr(self.scheduler, "lr_scheduler")):
            self.scheduler.step(epoch - self.lag, metric)

    def rates(self, epochs):
        """The rate of each of `epochs`, before they run and without a change: plateau's as if the accuracy always rose."""
        twin = copy.copy(self)
        twin.optimizer = SimpleNamespace(param_groups=[dict(group) for group in self.optimizer.param_groups])
        if self.scheduler is not None:
            twin.scheduler = copy.copy(self.scheduler)
            twin.scheduler.optimizer = twin.optimizer
        found = []
        for epoch in epochs:
            twin.start_epoch(epoch)
            found.append(max(group["lr"] for group in twin.optimizer.param_groups))
        return found

    def state_dict(self):
        """Only what the options do not say again: plateau counts bad epochs, the others are functions of the epoch."""
        plateau = getattr(self.scheduler, "lr_scheduler", None)
        if plateau is None:
            return {}
        return {"rates": [group["lr"] for group in plateau.optimizer.param_groups],
                "restore": list(self.scheduler.restore_lr or ()),  # what noise has moved for this epoch
                **{k: v for k, v in plateau.state_dict().items() if isinstance(v, (int, float, bool))}}

    def load_state_dict(self, state):
        plateau = getattr(self.scheduler, "lr_scheduler", None)
        if plateau is not None:
            rates, restore = state.get("rates", ()), state.get("restore", ())
            if not all(isinstance(found, (list, tuple)) and all(isinstance(rate, (int, float)) for rate in found)
                       for found in (rates, restore)):
                raise ValueError("the checkpoint's schedule is not one of plateau's: its weights start a new training: --finetune FILE")
            for group, rate in zip(plateau.optimizer.param_groups, rates):
                group["lr"] = rate
            if len(restore) == len(plateau.optimizer.param_groups):
                self.scheduler.restore_lr = list(restore)
            plateau.__dict__.update({k: v for k, v in state.items() if k in plateau.state_dict() and isinstance(v, (int, float))})


def decay_groups(model, weight_decay, layer_decay=None):
    """Parameters without weight decay (biases, norms, what the model exempts), and those with it, each in the model's order.

    layer_decay: these two of each layer, whose rate is that of the layer behind it times this; the head's is the whole rate. The layers
    are the model's own (group_matcher). BEiT, arXiv 2106.08254, as timm has it. Raises ValueError where the model has none.
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    groups = param_groups_layer_decay(model, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay)
    if not hasattr(model, "group_matcher") or (layer_decay != 1 and len({group["lr_scale"] for group in groups}) == 1):
        raise ValueError(f"--layer-decay: the layers of {type(model).__name__} are not known, or only one is trained: leave it away")
    return groups


@dataclass(frozen=True)
class Settings:
    """Which optimizer, and its constants, as the options name them; what is None is the optimizer's own."""
    opt: str = "adamw"
    weight_decay: float = 0.05
    momentum: float = 0.9
    opt_eps: float | None = None
    opt_betas: tuple | None = None
    layer_decay: float | None = None


@dataclass(frozen=True)
class Course:
    """How the rate goes over the epochs, as the options name it."""
    sched: str = "cosine"
    sched_lag: int = 1
    warmup_lr: float = 1e-6
    warmup_epochs: int = 5
    min_lr: float = 1e-5
    cooldown_epochs: int = 10
    decay_epochs: float = 30
    decay_rate: float = 0.1
    patience_epochs: int = 10
    lr_noise: tuple | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0


def build(model, device, settings=Settings(), course=Course(), *, lr, global_batch, epochs, unscale_lr=False, precision="fp32",
          seed=0):
    """-> optimizer, Schedule, peak learning rate. Raises ValueError for an optimizer that is not known or not here.

    The rate is scaled before the optimizer is built: the original scaled a number that nothing read any more.
    """
    peak_lr = effective_lr(lr, global_batch, unscale_lr)
    optimizer = build_optimizer(model, device, settings, peak_lr, precision)
    return optimizer, Schedule(optimizer, build_scheduler(optimizer, course, peak_lr, epochs, seed), course.sched_lag), peak_lr


def build_optimizer(model, device, settings, lr, precision):
    groups = decay_groups(model, settings.weight_decay, settings.layer_decay)
    opt, eps, betas = settings.opt.lower(), settings.opt_eps, settings.opt_betas
    constructor, flavour = optimizer_flavour(device, opt, precision)
    try:
        base = opt.removeprefix("lookahead_")
        if constructor is None and get_optimizer_info(base).second_order:
            raise ValueError("it needs second derivatives, which this training does not compute")
        accepted = inspect.signature(constructor or get_optimizer_class(base, bind_defaults=False)).parameters
        constants = {name: value for name, value in dict(eps=eps, betas=betas).items() if value is not None}
        if unknown := [name for name in constants if name not in accepted and name != "eps"]:
            raise ValueError(f"it has no {unknown[0]} (--opt-{unknown[0]})")
        if "eps" in constants and not ("eps" in accepted and isinstance(accepted["eps"].default, float)):
            constants.pop("eps")  # some have none, and some a pair of their own
        if betas is not None and not isinstance(accepted["betas"].default, tuple):
            raise ValueError("it has no betas (--opt-betas)")
        if betas is not None and len(betas) != len(accepted["betas"].default):
            raise ValueError(f"--opt-betas takes {len(accepted['betas'].default)} numbers")
        if constructor is not None:
            return constructor(groups, lr=lr, weight_decay=settings.weight_decay, **constants)
        return create_optimizer_v2(groups, opt, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
                                   **constants, **flavour)
    except (AssertionError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--opt {opt}: {reason}: see timm.optim.list_optimizers()") from error


def build_scheduler(optimizer, course, peak_lr, epochs, seed):
    """timm's; None for sched "none"."""
    noise = dict(noise_pct=course.lr_noise_pct, noise_std=course.lr_noise_std, noise_seed=seed)
    warmup_lr = course.warmup_lr
    if course.sched == "plateau" and not course.warmup_epochs:
        warmup_lr = peak_lr  # timm's plateau starts there all the same
    scheduler, _ = create_scheduler_v2(
        optimizer, course.sched, num_epochs=epochs, decay_epochs=course.decay_epochs, cooldown_epochs=course.cooldown_epochs,
        patience_epochs=course.patience_epochs, decay_rate=course.decay_rate, min_lr=course.min_lr, warmup_lr=warmup_lr,
        warmup_epochs=course.warmup_epochs, noise=list(course.lr_noise) if course.lr_noise else None, **noise)
    if course.sched == "tanh":  # upstream's timm 0.3.2 drew it from -6 to 4, today's from -7 to 3: up to 4.9 times that rate
        scheduler = TanhLRScheduler(optimizer, epochs, lb=-6.0, ub=4.0, lr_min=course.min_lr, warmup_t=course.warmup_epochs,
                                    warmup_lr_init=warmup_lr, noise_range_t=scheduler.noise_range_t, **noise)
    if scheduler is None or (course.sched == "plateau" and not course.warmup_epochs):  # no other one is asked before the first epoch
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * group.get("lr_scale", 1.0)
    return scheduler


def kind_of(optimizer):
    """The name that a checkpoint knows an optimizer by. AdamW's implementations, fused, foreach and flat, have one state."""
    if isinstance(optimizer, Lookahead):
        return f"Lookahead {kind_of(optimizer._base_optimizer)}"
    return "AdamW" if is_flat(optimizer) else type(optimizer).__name__


def names_of(optimizer, model):
    """The parameters' names in the optimizer's own order, a list a group. A parameter may have two names: the first."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def portable_state(optimizer, model=None):
    """The optimizer's state in torch's layout, with its kind and, where `model` is given, its parameters' names.

    torch_npu's flat AdamW counts its steps in plain numbers; here they are tensors, as torch's AdamW has them.
    """
    state = optimizer.state_dict()
    if is_flat(optimizer):
        state["state"] = {i: {key: torch.tensor(float(value)) if key == "step" else value for key, value in entry.items()}
                          for i, entry in state["state"].items()}
    names = names_of(optimizer, model) if model is not None else [None] * len(state["param_groups"])
    groups = [{**group, **({"param_names": own} if own else {})} for group, own in zip(state["param_groups"], names)]
    return {**state, "param_groups": groups, "kind": kind_of(optimizer)}


def expected(optimizer):
    """What the optimizer keeps once it has stepped, told by a twin of it that steps with gradients of 0.

    -> {(group, shape): {key: value}}, [the keys that each group counts in]
    """
    if is_flat(optimizer):  # a twin would gather its parameters into a buffer of its own
        shapes = {(i, p.shape): p for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        return {at: dict(step=0, exp_avg=p, exp_avg_sq=p) for at, p in shapes.items()}, [{"step"} for _ in optimizer.param_groups]
    base = optimizer._base_optimizer if isinstance(optimizer, Lookahead) else optimizer
    own = [(i, p) for i, group in enumerate(base.param_groups) for p in group["params"]]
    stands_in = {(i, p.shape): torch.nn.Parameter(torch.zeros_like(p)) for i, p in own}
    twin = copy.deepcopy(base, {id(p): stands_in[i, p.shape] for i, p in own})
    for i, group in enumerate(twin.param_groups):
        group["params"] = [p for (of, _), p in stands_in.items() if of == i]
    for p in stands_in.values():
        p.grad = torch.zeros_like(p)
    with torch.random.fork_rng(devices=[]):
        twin.step()
    counted = [{key for key in after if key != "params" and (key not in before or before[key] != after[key])}
               for before, after in zip(base.param_groups, twin.param_groups)]
    kept = {at: dict(twin.state[p]) for at, p in stands_in.items()}
    if isinstance(optimizer, Lookahead):
        kept = {at: {"lookahead_slow_buff": stands_in[at], **entry} for at, entry in kept.items()}
        counted = [keys | {"lookahead_step"} for keys in counted]
    return kept, counted


def fitted(value, like):
    """`value` as the optimizer keeps it: steps are integers to some, floats or tensors to others. ValueError where it cannot be."""
    if isinstance(like, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(like):
            raise ValueError("it is no list of the right length")
        return type(like)(fitted(a, b) for a, b in zip(value, like))
    if like is None or value is None:
        if value is not like:
            raise ValueError("it is kept by one of the two only")
        return None
    if not isinstance(value, (torch.Tensor, int, float)):
        raise ValueError(f"it is a {type(value).__name__}")
    if isinstance(like, torch.Tensor):
        value = torch.as_tensor(value)
        value = value.reshape(like.shape) if value.numel() == like.numel() == 1 else value
        if value.shape != like.shape or value.layout != like.layout:
            raise ValueError(f"its shape is {tuple(value.shape)}, not {tuple(like.shape)}")
        return value if value.is_floating_point() and like.dim() else value.to(like.dtype)
    if torch.as_tensor(value).numel() != 1 or not math.isfinite(value := float(value)):
        raise ValueError("it is no number")
    return type(like)(value)


def names_in(state, order, model):
    """The names of a saved optimizer's parameters, as its positions count them.

    order: names of the parameters in the order of the saved model. A state without names (upstream's, and ours before it
    had them) is of timm's groups: those that do not decay and then those that do, each in the model's order; or of one.
    """
    groups = state["param_groups"]
    if all(isinstance(group.get("param_names"), (list, tuple)) for group in groups):
        return [name for group in groups for name in group["param_names"]]
    if len(groups) == 1:
        return list(order)
    exempt = {id(p) for group in decay_groups(model, 1.0) if not group["weight_decay"] for p in group["params"]}
    exempt = {name for name, p in model.named_parameters() if id(p) in exempt}
    split = [[name for name in order if name in exempt], [name for name in order if name not in exempt]]
    return [name for part in split for name in part] if [len(part) for part in split] == [len(g["params"]) for g in groups] else []


def check_layout(state):
    """ValueError for what is no optimizer's state_dict()."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not (isinstance(groups, list) and groups and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
            and all(type(i) is int for g in groups for i in g["params"])
            and isinstance(state.get("state"), dict) and all(isinstance(entry, dict) for entry in state["state"].values())
            and isinstance(state.get("kind", ""), str)):
        raise ValueError("the checkpoint's optimizer state is not one that torch writes: start from its weights, --finetune FILE")


def kind_named(opt):
    """kind_of the optimizer that --opt calls so; None for a name that is not known."""
    try:
        name = get_optimizer_class(opt.removeprefix("lookahead_").removeprefix("npufused"), bind_defaults=False).__name__
    except Exception:  # another version's name, or none at all
        return None
    return f"Lookahead {name}" if opt.startswith("lookahead_") else name


def load_state(optimizer, state, model=None, order=None, opt=None):
    """Take a saved state: by its parameters' names, or, where it has none, by `order`, the saved model's names in their order.

    opt: the --opt that it was saved under, where the state does not say its kind. Where nothing does, what AdamW keeps is taken
    for AdamW's, which is what upstream trains with, and anything else for the running optimizer's. -> notes, one line each

    Raises ValueError where it is of other parameters, of another kind of optimizer, or of other shapes. The state is moments
    and steps: rates, decay and betas stay the running optimizer's, as its options say. Before the first step: torch_npu's
    flat optimizer ignores what comes later, and its steps are plain numbers, since tensors that alias would count twice.
    """
    check_layout(state)
    saved_groups, own = state["param_groups"], optimizer.state_dict()
    other = "the checkpoint's optimizer has other parameters: was it another model"
    positions = [i for group in saved_groups for i in group["params"]]
    if model is None:
        if [len(group["params"]) for group in own["param_groups"]] != [len(group["params"]) for group in saved_groups]:
            raise ValueError(f"{other}, or another --weight-decay?")
        own_names = saved_names = range(len(positions))
    else:
        groups = names_of(optimizer, model)
        own_names = [name for group in groups for name in group]
        known = set(own_names)
        saved_names = names_in(state, [name for name in order or own_names if name in known], model)
    if sorted(map(str, saved_names)) != sorted(map(str, own_names)) or len(positions) != len(saved_names):
        raise ValueError(f"{other}? It has {len(positions)}, and the model {len(own_names)}")
    entries = {name: state["state"][i] for name, i in zip(saved_names, positions) if i in state["state"]}
    own_kind, saved_kind, notes = kind_of(optimizer), state.get("kind") or (opt and kind_named(opt)), []
    if not saved_kind and entries:
        saved_kind = "AdamW" if all(entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for entry in entries.values()) else own_kind
        notes = [f"the checkpoint does not say its optimizer's kind: by what it keeps it is taken for {saved_kind}"]
    if saved_kind and saved_kind != own_kind:
        raise ValueError(f"the checkpoint's optimizer is of another kind, {saved_kind}{' by what it keeps' if notes else ''}, not "
                         f"{own_kind} (--opt); its weights alone start a new training: --finetune FILE")
    load_entries(optimizer, own, entries, own_names, state)
    return notes


def load_entries(optimizer, own, entries, names, state):
    """The part of load_state that looks into the moments. own: optimizer.state_dict(); entries: the saved ones, by name."""
    kept, counted = expected(optimizer)
    moments, names = {}, iter(names)
    for i, group in enumerate(optimizer.param_groups):
        for position, parameter in zip(own["param_groups"][i]["params"], group["params"]):
            name, like = next(names), kept[i, parameter.shape]
            if not (entry := entries.get(name)):
                continue
            if odd := sorted(map(str, (entry.keys() ^ like.keys()) - {"lookahead_slow_buff"})):
                raise ValueError(f"the checkpoint's optimizer is of another kind (--opt): {odd[0]} is kept by one of the two only")
            try:
                moments[position] = {key: fitted(value, like[key]) for key, value in entry.items()}
            except (ValueError, TypeError, OverflowError, RuntimeError) as error:
                raise ValueError(f"the checkpoint's optimizer does not fit the model: of {name}, {error}") from error
    saved_groups = state["param_groups"]
    groups = []
    for i, group in enumerate(own["param_groups"]):
        saved = saved_groups[i] if len(saved_groups) == len(own["param_groups"]) else saved_groups[0]
        groups.append({**group, **{key: saved[key] for key in counted[i] if isinstance(saved.get(key), (int, float, torch.Tensor))}})
    try:
        optimizer.load_state_dict({**{key: value for key, value in state.items() if key in own}, "state": moments, "param_groups": groups})
    except Exception as error:  # timm's optimizers check what they take, each in its own way
        raise ValueError(f"the checkpoint's optimizer state does not fit ({type(error).__name__}): was it another --opt?") from error
