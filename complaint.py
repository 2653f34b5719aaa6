"""What is said of a run that went wrong, and with which exit status does it end?"""
import os
import re
import sys
import time
import traceback
from pathlib import Path

import decode
import devices
import engine
import keeper
import unreadable
import utils
from verify import NotTheSame


def complain(error, training):
    """Say what went wrong: one line for what a user can mend, the traceback for the rest. -> exit status

    training: another rank may not know of it, so that this one must speak.
    """
    error = devices.explain(error)
    text = str(error).strip()
    if isinstance(error, engine.NonFiniteLoss):
        status, text, training = 3, f"{text}{circumstances(error)}: lower --lr, or look at the images of that batch: " + ", ".join(
            map(utils.shown, error.names)), False
    elif isinstance(error, engine.NonFiniteEvaluation):
        status, training = 3, False
    elif isinstance(error, NotTheSame):
        status = 1
    elif isinstance(error, keeper.SaveFailed):
        status, training = 1, True  # only the first rank knows
    elif isinstance(error, decode.DataError):  # from a loader's worker it comes with that worker's traceback
        status, text = 2, re.sub(r"^decode\.\w+: ", "", text.splitlines()[-1])
        if isinstance(error, decode.UnreadableImage):
            text += ", or go on without such images: --max-bad-fraction 0.001"
        training &= not isinstance(error, unreadable.TooManyUnreadable)
    elif isinstance(error, devices.DeviceError):
        status = 1
    elif isinstance(error, ValueError) and raised_here(error):
        status, text = 2, utils.shown(text)  # a path in it may hold a newline
    else:
        traceback.print_exception(error)
        return 1
    rank = os.environ.get("RANK")  # both as they stand: they may be what is wrong. Without a rank nobody else will say it
    local_rank = os.environ.get("LOCAL_RANK", "").strip("0") if rank else ""
    if isinstance(error, devices.LostConnection) or (local_rank.isdigit() and not training):
        time.sleep(10)  # the first one knows the same, or another one more: let it say so, and torchrun, which looks every 0.1 s, end this
    print(f"error: {text}" if not local_rank else f"error (rank {rank}): {text}", file=sys.stderr, flush=True)
    return status


def circumstances(error):
    """What is known of a NonFiniteLoss beside its place, in brackets."""
    said = [f"rate {error.rate:.4g}"] if hasattr(error, "rate") else []
    said += [f"gradient norm {error.norm:.4g}"] if error.norm is not None else []
    said += [f"loss scale {error.scale:g}"] if getattr(error, "scale", None) else []
    said += [f"first in {error.module}"] if getattr(error, "module", "") else []
    return f" ({', '.join(said)})" if said else ""


def raised_here(error):
    """Whether our own code raised it: a library's ValueError is a crash, and shows its traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().parent == Path(__file__).resolve().parent
