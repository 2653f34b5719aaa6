"""What of a run must survive? Model, optimizer, schedule, precision, moving average and progress: one state_dict, one load_state_dict."""
import argparse
import math
from dataclasses import asdict, fields

from timm.utils import ModelEmaV3

import checkpoint
import engine
import optim


class MovingAverage(ModelEmaV3):
    """The average of a net's weights. The decay grows to `decay` with the updates, as 1 - updates ** -3/4: what a net began with
    is soon forgotten, and 0.9999 is reached after 215,000. timm's warm-up. updates: None for one that began without it."""

    def __init__(self, net, decay):
        super().__init__(net, decay=decay, use_warmup=True, warmup_power=3 / 4)
        self.updates = 0

    def update(self, model):
        self.updates = None if self.updates is None else self.updates + 1
        super().update(model, self.updates)


def number(value, what, least=-math.inf):
    """`value`, if it is one. ValueError with what it should be."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
        raise ValueError(f"the checkpoint's {what} is {str(value)[:40]!r}: no number that a run writes; its weights alone start a new "
                         "training: --finetune FILE")
    return value


def part(saved, key):
    """The state_dict under `key` of a checkpoint, {} where there is none. ValueError for what is no state_dict."""
    value = saved.get(key)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"the checkpoint's {key} is a {type(value).__name__}, not a state_dict: its weights alone start a new training: "
                         "--finetune FILE")
    return value or {}


class State:
    """A training between two updates. What is added to a run is saved and restored here, side by side.

    net, optimizer, schedule, precision: of the training. average: its MovingAverage, or None. epoch: the last one that is done.
    progress: what is done of the next one, an engine.Progress. best: the best accuracy so far, -1 before there is one.
    better: whose accuracy was the higher at the last evaluation, "model" or "model_ema". accuracy: the net's last one, None
    once the schedule was told it. unreadable: indices of training images that could not be read. kept: what a checkpoint had and
    this run has no use for; it is saved again.
    """

    def __init__(self, net, optimizer, schedule, precision, average=None, epoch=-1):
        self.net, self.optimizer, self.schedule, self.precision, self.average = net, optimizer, schedule, precision, average
        self.epoch, self.progress, self.best, self.better, self.accuracy, self.kept = epoch, engine.Progress(), -1.0, "model", None, {}
        self.unreadable = set()

    def start_epoch(self, epoch):
        """Set the rates of `epoch`. In the middle of it, too: but plateau, which counts, was told of it when it began."""
        self.schedule.start_epoch(epoch, self.accuracy, begun=self.progress.updates > 0)
        self.accuracy = None

    def end_epoch(self, epoch):
        self.epoch, self.progress = epoch, engine.Progress()

    def tested(self, accuracy, averages=None):
        """Note the accuracies of the net and of its average; the better one decides. -> whether they are the best so far"""
        self.accuracy = accuracy
        self.better, score = ("model_ema", averages) if averages is not None and averages > accuracy else ("model", accuracy)
        improved, self.best = score > self.best, max(self.best, score)
        return improved

    def remember(self):
        """Keep a copy of all of it on the host, for roll_back."""
        self.remembered = checkpoint.to_host(self.state_dict())

    def roll_back(self, updates, skipped):
        """Take the remembered state, and go on in its epoch after so many updates: those between are left out. skipped: in all"""
        self.net.load_state_dict(self.remembered["model"])
        self.load_state_dict(checkpoint.to_host(self.remembered))
        self.start_epoch(self.epoch + 1)  # what is remembered may be from before the schedule was told of it
        self.progress.updates, self.progress.skipped = updates, skipped

    def state_dict(self):
        own = {} if self.average is None else {"model_ema": self.average.module.state_dict(), "model_ema_updates": self.average.updates}
        scaler = self.precision.state_dict()
        return dict(model=self.net.state_dict(), optimizer=optim.portable_state(self.optimizer, self.net),
                    schedule=self.schedule.state_dict(), scaler=scaler or self.kept.get("scaler", {}), epoch=self.epoch,
                    progress=asdict(self.progress), best_accuracy=self.best, better=self.better, last_accuracy=self.accuracy,
                    unreadable=sorted(self.unreadable),
                    **{**{key: value for key, value in self.kept.items() if key != "scaler"}, **own})

    def load_state_dict(self, saved, path="the checkpoint"):
        """Take all of a checkpoint but the model's weights, which are in `net` already: it may have been wrapped since.

        -> notes, one line each, of what this run leaves as it is. Raises ValueError where a part does not fit.
        """
        settings = saved.get("options", saved.get("args"))
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        opt = settings.get("opt") if isinstance(settings, dict) else None
        notes = optim.load_state(self.optimizer, saved["optimizer"], self.net, list(checkpoint.model_state(saved, path, ema=False)),
                                 opt if isinstance(opt, str) else None)
        schedule, scaler = part(saved, "schedule"), part(saved, "scaler") or part(saved, "amp")
        self.schedule.load_state_dict(schedule)
        self.precision.load_state_dict(scaler)
        if scaler and not self.precision.state_dict():
            self.kept["scaler"] = scaler
            notes.append(f"{path} has a loss scaler, and {self.precision.name} needs none: it is kept as it is")
        if self.average is not None:
            notes += self.load_average(saved, path)
        elif part(saved, "model_ema"):
            self.kept |= {"model_ema": checkpoint.model_state(saved, path, ema=True), "model_ema_updates": saved.get("model_ema_updates")}
            notes.append(f"{path} has a moving average: without --model-ema it is kept as it is, and not moved")
        epoch = number(saved["epoch"], "epoch", -1)
        if epoch != int(epoch):
            number("", "epoch")
        self.epoch, self.progress = int(epoch), self.progress_in(saved)
        self.best = number(saved.get("best_accuracy", -1.0), "best accuracy")
        if (accuracy := saved.get("last_accuracy")) is not None:
            self.accuracy = number(accuracy, "last accuracy")
        self.better = saved.get("better", "model") if self.average is not None else "model"
        known = saved.get("unreadable", [])
        self.unreadable |= {int(number(index, "unreadable image", 0)) for index in (known if isinstance(known, list) else [""])}
        return notes

    def progress_in(self, saved):
        found = part(saved, "progress")
        kinds = {field.name: field.type for field in fields(engine.Progress)}
        return engine.Progress(**{name: kind(number(found.get(name, 0), "progress", *([0] if kind is int else [])))
                                  for name, kind in kinds.items()})

    def load_average(self, saved, path):
        if not part(saved, "model_ema"):
            return [f"{path} has no moving average: it starts here, from the model's weights"]
        checkpoint.load_weights(self.average.module, checkpoint.model_state(saved, path, ema=True), path)
        updates = saved.get("model_ema_updates")
        self.average.updates = None if updates is None else int(number(updates, "number of the average's updates", 0))
        return []
