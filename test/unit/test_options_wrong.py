"""Every option with values that are wrong, extreme or no value at all: it works, or one line with status 2 names that option."""
import signal

import pytest

import main
import options

WRONG = {int: ("-1", "0", "1", "99999999999999999999", "-99999999999999999999", "1.5", "", "x", "2147483648", "9" * 400),
         float: ("-1", "0", "2", "nan", "inf", "-inf", "1e300", "1e-300", "", "x", "99999999999999999999"),
         options.floats: ("", "x", "nan nan", "-1 2", "0 0", "1 1", "1e300 1e300", "0.5 0.5", "0.9 0.1", "1", "0.1 0.2 0.3 0.4",
                          "inf inf", "1e-9 2e-9", "0.5 0.50001"),
         str: ("", "x", "-", "../..", "a" * 5000, "a\nb", "ü\udcff", "%s", "{}")}
# what gives a number its meaning; none of them may be what is blamed
CONTEXT = {"--momentum": "--opt=momentum", "--decay-rate": "--sched=step", "--decay-epochs": "--sched=step", "--color-jitter": "--aa=none",
           "--lr-noise-pct": "--lr-noise=0", "--lr-noise-std": "--lr-noise=0", "--model-ema-decay": "--model-ema"}
ROWS = [(names.split()[0], kind, unit) for rows in options.OPTIONS.values() for names, _, kind, unit, *_ in rows
        if kind is not options.SWITCH and not names.startswith(("--teacher", "--distillation", "--output"))]


def values(kind, unit):
    return WRONG[str][:4] if isinstance(unit, tuple) else WRONG[kind]


@pytest.mark.parametrize("name, kind, unit", ROWS, ids=[name for name, *_ in ROWS])
def test_a_wrong_value_is_one_line_or_trains(tiny_folder, capfd, name, kind, unit):
    """Through main: one step of a small model, in this process."""
    usual = ["--data-path", tiny_folder, "--device=cpu", "--input-size=32", "--batch-size=2", "--num_workers=0", "--max_step=1",
             "--epochs=1", "--model=test_convnext", "--warmup-epochs=0", "--no-eval", "--output_dir="]
    handler = signal.getsignal(signal.SIGTERM)
    try:
        for value in values(kind, unit):
            words = [name, *value.split(" ")] if kind is options.floats else [f"{name}={value}"]
            try:
                status = main.run([*map(str, usual), *CONTEXT.get(name, "").split(), *words])
            except SystemExit as error:
                status = error.code
            told = capfd.readouterr().err
            if status == 0:
                continue
            assert status == 2 and told.startswith("error: ") and told.count("\n") == 1 and told.endswith("\n"), (value, status, told)
            assert any(form in told for form in (name, name.replace("_", "-"))), (value, told)
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_limits_are_of_numbers_and_hold_their_defaults():
    kinds = {name[2:].replace("-", "_"): kind for name, kind, _ in ROWS} | {"distillation_tau": float}
    for name, (least, most) in options.LIMITS.items():
        assert kinds[name] in (int, float) and (options.DEFAULTS[name] is None or least <= options.DEFAULTS[name] <= most), name


@pytest.mark.parametrize("words", [["--seed=--"], ["--data-path=--"], ["--mean", "--"], ["--pretrained", "--lr", "--"]])
def test_two_hyphens_are_no_value(capsys, words):
    """argparse takes the word -- out of the values, and leaves an empty list where a number was wanted."""
    with pytest.raises(SystemExit) as ended:
        options.parse(["--data-path=x", *words])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and words[-1 if "=" in words[-1] else -2].partition("=")[0] in told
