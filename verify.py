"""Is a run that was interrupted the same as one that was not, here, with these options?"""
import argparse
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
import options


class NotTheSame(RuntimeError):
    """A run that was interrupted and went on is another than one that was not."""


def verify_resume(train, args, ranks, say, updates=4, cut=2):
    """Train some updates whole, and once more interrupted and gone on with, in a folder that is removed afterwards, and compare what the
    two leave. train(args): one run. Raises NotTheSame where it differs by one bit."""
    if not (parent := options.output_folder(args)):
        raise ValueError("--verify-resume writes checkpoints: leave --output_dir '' away")
    folder = Path(parent) / ".verify-resume"

    def left_by(name, until, **changes):
        short = dict(no_eval=True, ckpt_minutes=0.0, output_dir=str(folder / name), max_step=until * args.accum_steps)
        train(argparse.Namespace(**{**vars(args), "verify_resume": False, **short, **changes}))
        return checkpoint.read(folder / name / checkpoint.LAST) if ranks.is_main else None

    def difference(a, b):
        """The same on all ranks: the first has the checkpoints."""
        found = [a and list(checkpoint.differences(*({key: saved[key] for key in verified} for saved in (a, b))))]
        if ranks.world_size > 1:
            dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]

    verified = ("model", "optimizer", "schedule", "scaler", "epoch", "progress", *(["model_ema"] if args.model_ema else []))
    try:
        whole = left_by("whole", updates)
        left_by("cut", cut)
        found = difference(whole, left_by("cut", updates - cut, resume="auto", finetune="", pretrained=False))
        if not found:
            say(f"--verify-resume: {updates} updates that were interrupted after {cut} leave what {updates} others do, bit for bit")
            return
        again = difference(whole, left_by("again", updates))
    finally:
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    raise NotTheSame(f"--verify-resume: {found[0]}, and {len(found) - 1} more differ" + (
        "; so do two runs that nothing interrupted: the kernels of this device do not compute twice the same" if again else ""))
