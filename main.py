"""Train, fine-tune or evaluate Twins: what is one run?

    python main.py --data-path /data/imagenet --output_dir output/run          # one card, or the CPU; nothing said: into alt_gvt_small/
    torchrun --nproc_per_node=8 main.py --data-path /data/imagenet --dist-eval --output_dir output/run
    python main.py --resume auto --output_dir output/run --data-path /data/imagenet   # starts, and starts again where it was
    python main.py --finetune alt_gvt_small.pth --data-path /data/other --epochs 10 --output_dir output/other
    python main.py --eval --resume alt_gvt_small.pth --data-path /data/imagenet

Exit status: 0 done, 2 something is wrong with what was asked for, 3 the loss was not finite, 75 stopped by a signal and saved,
1 anything else.
"""
import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import partial

if (own := os.path.dirname(os.path.realpath(__file__))) not in map(os.path.realpath, sys.path):  # python -P, PYTHONSAFEPATH
    sys.path.insert(0, own)

import options
import watchdog
from options import get_args_parser  # noqa: F401  upstream's place for it

try:
    import devices  # before torch: it decides what torch may load
except ImportError as import_error:
    sys.exit(f"error: {import_error}")

import assembly
import engine
import keeper
import loaders
import pauses
import predictions
import training
import unreadable
import utils
from complaint import complain
from verify import verify_resume


def open_output(args, ranks, say):
    """The Keeper of the folder that this run saves into, with its folder locked, for a `with`. None in it where nothing is saved:
    of an evaluation, without --output_dir, and on all ranks but the first."""
    folder = options.output_folder(args)
    saves = folder and ranks.is_main and not (args.eval or args.throughout)
    output = keeper.Keeper(folder, say, args.keep, args.milestones) if saves else None
    devices.all_agree(ranks, lambda: output and output.open())
    return output or contextlib.nullcontext()


def main(args):
    """One run. args: as options.parse gives them; nothing changes them."""
    ranks = devices.init_distributed_mode(args.device)
    say = partial(print, flush=True) if ranks.is_main else (lambda *_: None)
    watch = watchdog.Watch(args.hang_timeout, ranks.rank, ranks.world_size, devices.open_store(ranks, "watchdog"), leave)

    def run_once(args):
        with open_output(args, ranks, say) as output, watch:
            run_in(output, watch, args, ranks, say)

    if args.verify_resume:
        verify_resume(run_once, args, ranks, say)
    else:
        run_once(args)


def run_in(output, watch, args, ranks, say):
    """The run of `main`. output: the Keeper of its folder, or None. watch: a watchdog.Watch, which is told what goes on"""
    device = ranks.device
    devices.set_tensor_float(device, args.fp32, args.hf32)
    devices.seed_everything(args.seed)  # the same weights everywhere
    for note in options.notes(args, device.type):
        say(f"note: {note}")
    parts = assembly.build(args, ranks, say)
    if args.throughout:
        return measure(args, device, parts, say)
    if args.predictions:
        devices.all_agree(ranks, lambda: predictions.check(args.predictions))
    rows = [] if args.predictions else None
    pause = pauses.Pauses(args.ckpt_steps, args.ckpt_minutes, ranks.world_size, ranks.rank)
    evaluate = partial(
        engine.evaluate, parts.val_loader, device=device, autocast=parts.precision.autocast, shared=args.dist_eval,
        ranks=ranks.world_size if args.dist_eval else 1, quiet=not ranks.is_main, stopped=pause.stopped, mark=watch.mark)
    if args.eval:
        stats = evaluate(parts.net, rows=rows)
        say(f"Accuracy of the network on the {stats['images']} test images: {stats['acc1']:.3f}%")
    else:
        run, peak_lr = assembly.restore(args, ranks, parts, say)
        epochs = training.Epochs(args, ranks, run, parts, output, watch.mark, say)
        saves = training.open_saves(args, ranks, run, parts, output, pause, watch, say)
        say(training.recipe(args, ranks, run, parts, peak_lr))
        say(training.which_run(args, ranks, parts, peak_lr))
        started = time.perf_counter()
        with pause.listening():
            training.train(args, run, epochs, partial(training.test, run, evaluate, say, rows), saves, say)
        say(f"Training time {timedelta(seconds=int(time.perf_counter() - started))}")
    if args.predictions and parts.val_loader:
        write_predictions(args, ranks, rows, parts, say)


def measure(args, device, parts, say):
    """--throughout"""
    rate = engine.throughput(parts.val_loader, parts.net, device, parts.precision.autocast, partial(devices.synchronize, device),
                             time.perf_counter)
    say(f"batch_size {min(args.batch_size, len(parts.val_loader.dataset))} throughput {rate:.2f}")


def write_predictions(args, ranks, rows, parts, say):
    """--predictions, of this rank's rows of an evaluation. Every rank calls this."""
    rows = unreadable.over_ranks(rows) if args.dist_eval else rows
    if not rows:
        say("note: nothing was evaluated, so --predictions writes nothing")
        return
    images = loaders.images_of(parts.val_loader)
    aside = devices.all_agree(ranks, lambda: predictions.save(args.predictions, rows, images, parts.classes, args.data_path))
    say(f"{utils.shown(args.predictions)} has what is said of {len(rows):,} images" + (
        f"; an earlier file is now {utils.shown(aside)}" if aside else ""))


def stop(*_):
    """Of SIGTERM before there is anything to save. It may go to the whole group: torch would tell of the loader workers that it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    sys.exit(143)


def run(argv=None):
    """main with errors turned into an exit status."""
    args = options.parse(argv)
    utils.open_output()
    signal.signal(signal.SIGTERM, stop)
    watchdog.follow_launcher(leave)
    try:
        main(args)
        status = 0
    except engine.Stopped:
        status = 75 if args.output_dir != '' and not args.verify_resume else 143  # EX_TEMPFAIL: the same command with --resume auto goes on
    except devices.NeedsRestart:
        devices.restart_without_npu()
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return complain(error, training="train_one_epoch" in "".join(traceback.format_exception(error)))
    if status in (0, 75):  # all ranks come here; after an error others may wait in a collective for this one
        devices.leave_the_others()
    return status


def leave(status):
    pauses.leave(status, multiprocessing.active_children())


if __name__ == "__main__":
    try:
        found = run()
    except SystemExit as ended:  # a mistake among the options, or a signal: also one in the middle of what is said of an error
        found = ended.code
    except KeyboardInterrupt:
        found = 130
    if found:
        leave(found)
