"""What of a run must survive? Model, optimizer, schedule, precision, moving average and progress: one state_dict, one load_state_dict."""
import argparse

import checkpoint
import optim


class State:
    """A training between two epochs. What is added to a run is saved and restored here, side by side.

    net, optimizer, schedule, precision: of the training. model_ema: its moving average, or None. epoch: the last one that is
    done. best: the best accuracy so far, -1 before there is one. accuracy: the last one, None once the schedule was told it.
    """

    def __init__(self, net, optimizer, schedule, precision, model_ema=None, epoch=-1):
        self.net, self.optimizer, self.schedule, self.precision, self.model_ema = net, optimizer, schedule, precision, model_ema
        self.epoch, self.best, self.accuracy = epoch, -1.0, None

    def start_epoch(self, epoch):
        """Set the rates of `epoch`."""
        self.schedule.start_epoch(epoch, self.accuracy)
        self.accuracy = None  # told once: plateau counts

    def state_dict(self):
        average = {} if self.model_ema is None else {"model_ema": self.model_ema.module.state_dict()}
        return dict(model=self.net.state_dict(), optimizer=optim.portable_state(self.optimizer, self.net),
                    schedule=self.schedule.state_dict(), scaler=self.precision.state_dict(), epoch=self.epoch,
                    best_accuracy=self.best, last_accuracy=self.accuracy, **average)

    def load_state_dict(self, saved, path="the checkpoint"):
        """Take all of a checkpoint but the model's weights, which are in `net` already: it may have been wrapped since."""
        settings = saved.get("options") or vars(saved.get("args") or argparse.Namespace())
        optim.load_state(self.optimizer, saved["optimizer"], self.net, list(checkpoint.model_state(saved, path)), settings.get("opt"))
        self.schedule.load_state_dict(saved.get("schedule", {}))
        self.precision.load_state_dict(saved.get("scaler") or saved.get("amp") or {})
        if self.model_ema is not None and saved.get("model_ema"):
            checkpoint.load_weights(self.model_ema.module, checkpoint.model_state(saved, path, ema=True), path)
        self.epoch, self.best, self.accuracy = saved["epoch"], saved.get("best_accuracy", -1.0), saved.get("last_accuracy")
