"""Which tool is meant, and how does it end?

    python tools                   # lists them; from any folder: python /elsewhere/tools
    python tools NAME --help

A tool is a file NAME.py beside this one: the first line of its docstring stands in the list, and its main(argv) returns the exit status
(None: 0). What begins with an underscore is a part of tools. Exit status: 0 done, 1 no, or something went wrong, 2 something is wrong
with what was asked for, 130 and 143 ended by a signal.
"""
import ast
import difflib
import importlib
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # the real one, where it was called through a link
# Ours come first: PYTHONPATH may hold another `datasets`. And not this folder, whose names are no modules' names.
sys.path[:] = [str(HERE.parent), *(place for place in sys.path if os.path.realpath(place) not in (str(HERE), str(HERE.parent)))]

import utils


def tools():
    """-> {name: the first line of its docstring}. Nothing is imported for it."""
    found = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("_"))
    return {path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))).partition("\n")[0] for path in found}


def listing():
    known = tools()
    width = max(map(len, known))
    return "\n".join(["python tools NAME ... (python tools NAME --help says more)", "",
                      *(f"  {name:<{width}}  {line}" for name, line in known.items())])


def start(argv):
    """Do what the words say. -> the exit status. Raises ValueError for a tool that does not exist."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(listing())
        return 0
    name, known = argv[0], tools()
    if name not in known:
        near = difflib.get_close_matches(name.removesuffix(".py"), known, 1, 0.5)
        raise ValueError(f"there is no tool {name}: " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"))
    return importlib.import_module(f"tools.{name}").main(argv[1:]) or 0


def run(argv):
    """start with errors turned into an exit status: one line for what a user can mend, the traceback for the rest."""
    utils.open_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written goes away
    try:
        return start(argv)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:  # of a package, from devices with its remedy; ours are a fault of ours
        if error.name and (HERE.parent / f"{error.name.partition('.')[0]}.py").exists():
            raise
        return complain(f"{error}: pip install -r requirements.txt" if error.name else error, 1)
    except (ValueError, OSError) as error:
        return complain(error, 2)
    except Exception as error:
        if (devices := sys.modules.get("devices")) is None:  # a tool that needs no torch
            raise
        if isinstance(error, devices.NeedsRestart):
            devices.restart_without_npu()
        if not isinstance(known := devices.explain(error), devices.DeviceError):
            raise
        return complain(known, 1)


def complain(error, status):
    print(f"error: {utils.shown(error)}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
