"""How does the simulated NPU get into a program that does not know it? On PYTHONPATH, Python imports this by itself.

After torch_npu has been imported, npu_sim puts its operators under it. torchvision's compiled operators do not load
beside a CPU-only torch; placeholders keep its import alive, and fail when called. A sitecustomize further down the path
still runs.
"""

import importlib.machinery
import importlib.util
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def after_torch_npu():
    import npu_sim

    if hasattr(npu_sim, "install"):  # if not, it is npu_sim that is importing torch_npu, and installs at its end
        npu_sim.install()


def after_torchvision_extension():
    import torch
    from torchvision import extension

    if extension._has_ops():
        return
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    extension._npu_sim_library = library  # definitions live as long as the object


class AfterImport:
    """A finder that calls a function once a module's own code has run."""

    def __init__(self, hooks):
        self.hooks = hooks

    def find_spec(self, name, path=None, target=None):
        if name not in self.hooks:
            return None
        hook = self.hooks.pop(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_then_hook(module):
            exec_module(module)
            hook()

        spec.loader.exec_module = exec_then_hook
        return spec


def run_next_sitecustomize():
    path = [p for p in sys.path if os.path.abspath(p or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# Operators run on the host at once, so nothing may be queued behind them, whatever a script has exported since.
# Blocking launches would add a stream synchronisation to every collective.
os.environ.update(TASK_QUEUE_ENABLE="0", ASCEND_LAUNCH_BLOCKING="0")
sys.meta_path.insert(
    0, AfterImport({"torch_npu": after_torch_npu, "torchvision.extension": after_torchvision_extension})
)
run_next_sitecustomize()
