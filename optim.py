"""How are weights moved? Effective learning rate, parameter groups, optimizer and schedule: one function, in that order."""
import copy
import inspect
from types import SimpleNamespace

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_weight_decay
from timm.scheduler import TanhLRScheduler, create_scheduler_v2

import devices


def effective_lr(lr, global_batch):
    """`lr` is the rate of 512 images a step. DeiT, arXiv 2012.12877."""
    return lr * global_batch / 512


class Schedule:
    """timm's scheduler, asked before each epoch: epoch e runs at its step e - lag.

    Epoch 0, and what comes before step 0, run at the rates the scheduler begins with, as upstream's, which is asked for
    the first time when epoch 0 is over: noise never moves that epoch.
    """

    def __init__(self, optimizer, scheduler, lag=0):
        self.optimizer, self.scheduler, self.lag = optimizer, scheduler, lag

    def start_epoch(self, epoch, metric=None):
        """Set the rates of `epoch`. metric: the accuracy after the epoch before, for plateau; None where there is none."""
        if self.scheduler is not None and epoch >= max(self.lag, 1):
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
            found.append(twin.optimizer.param_groups[0]["lr"])
        return found

    def state_dict(self):
        """Only what the options do not say again: plateau counts bad epochs, the others are functions of the epoch."""
        plateau = getattr(self.scheduler, "lr_scheduler", None)
        if plateau is None:
            return {}
        return {"rates": [group["lr"] for group in plateau.optimizer.param_groups],
                **{k: v for k, v in plateau.state_dict().items() if isinstance(v, (int, float, bool))}}

    def load_state_dict(self, state):
        plateau = getattr(self.scheduler, "lr_scheduler", None)
        if plateau is not None:
            for group, rate in zip(plateau.optimizer.param_groups, state.get("rates", ())):
                group["lr"] = rate
            plateau.__dict__.update({k: v for k, v in state.items() if k in plateau.state_dict()})


def build(model, device, *, lr, global_batch, epochs, opt="adamw", weight_decay=0.05, momentum=0.9, eps=None, betas=None,
          precision="fp32", sched="cosine", sched_lag=1, warmup_lr=1e-6, warmup_epochs=5, min_lr=1e-5,
          cooldown_epochs=10, decay_epochs=30, decay_rate=0.1, patience_epochs=10, lr_noise=None, lr_noise_pct=0.67,
          lr_noise_std=1.0, seed=0):
    """-> optimizer, Schedule, peak learning rate. Raises ValueError for an optimizer that is not known or not here.

    The rate is scaled before the optimizer is built: the original scaled a number that nothing read any more.
    """
    peak_lr = effective_lr(lr, global_batch)
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=exempt)
    opt = opt.lower()
    constructor, flavour = devices.optimizer_flavour(device, opt, precision)
    try:
        accepted = inspect.signature(constructor or get_optimizer_class(opt, bind_defaults=False)).parameters
        settings = {name: value for name, value in dict(eps=eps, betas=betas).items() if value is not None}
        if unknown := [name for name in settings if name not in accepted and name != "eps"]:
            raise ValueError(f"it has no {unknown[0]} (--opt-{unknown[0]})")
        if "eps" in settings and not ("eps" in accepted and isinstance(accepted["eps"].default, float)):
            settings.pop("eps")  # some have none, and some a pair of their own
        if betas is not None and not isinstance(accepted["betas"].default, tuple):
            raise ValueError("it has no betas (--opt-betas)")
        if betas is not None and len(betas) != len(accepted["betas"].default):
            raise ValueError(f"--opt-betas takes {len(accepted['betas'].default)} numbers")
        if constructor is not None:
            optimizer = constructor(groups, lr=peak_lr, weight_decay=weight_decay, **settings)
        else:
            optimizer = create_optimizer_v2(groups, opt, lr=peak_lr, weight_decay=weight_decay, momentum=momentum,
                                            **settings, **flavour)
    except (AssertionError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--opt {opt}: {reason}: see timm.optim.list_optimizers()") from error
    scheduler, _ = create_scheduler_v2(
        optimizer, sched, num_epochs=epochs, decay_epochs=decay_epochs, cooldown_epochs=cooldown_epochs,
        patience_epochs=patience_epochs, decay_rate=decay_rate, min_lr=min_lr,
        warmup_lr=peak_lr if sched == "plateau" and not warmup_epochs else warmup_lr,  # timm's plateau starts there all the same
        warmup_epochs=warmup_epochs, noise=list(lr_noise) if lr_noise else None, noise_pct=lr_noise_pct,
        noise_std=lr_noise_std, noise_seed=seed)
    if sched == "tanh":  # upstream's timm 0.3.2 drew it from -6 to 4, today's from -7 to 3: up to 4.9 times that rate
        scheduler = TanhLRScheduler(
            optimizer, epochs, lb=-6.0, ub=4.0, lr_min=min_lr, warmup_t=warmup_epochs, warmup_lr_init=warmup_lr,
            noise_range_t=scheduler.noise_range_t, noise_pct=lr_noise_pct, noise_std=lr_noise_std, noise_seed=seed)
    return optimizer, Schedule(optimizer, scheduler, sched_lag), peak_lr


def portable_state(optimizer):
    """The optimizer's state as torch's AdamW writes it, whichever optimizer it is."""
    state = optimizer.state_dict()
    moments = {i: {key: torch.tensor(float(value)) if key == "step" else value for key, value in entry.items()}
               for i, entry in state["state"].items()}
    return {"state": moments, "param_groups": state["param_groups"]}


def load_state(optimizer, state):
    """Take a portable state. Raises ValueError where it belongs to other parameters or another kind of optimizer.

    The state is moments and steps: rates, decay and betas stay the running optimizer's, as its options say. Before the
    first step: torch_npu's flat optimizer ignores what comes later. Its steps are plain numbers, since tensors that
    alias would count twice; torch's are tensors.
    """
    own = optimizer.state_dict()["param_groups"]
    saved = state["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        raise ValueError("the checkpoint's optimizer has other parameters: was it another model, or another --weight-decay?")
    groups = [{**new, **old} for old, new in zip(own, saved)]  # only what an optimizer counts in its groups is the saved one's
    if ("betas" in own[0]) != ("betas" in saved[0]):
        raise ValueError("the checkpoint's optimizer is of another kind (--opt)")
    flat = devices.is_flat(optimizer)

    def step(value):
        return int(value) if flat else torch.as_tensor(float(value))

    moments = {i: {key: step(value) if key == "step" else value for key, value in entry.items()}
               for i, entry in state["state"].items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
