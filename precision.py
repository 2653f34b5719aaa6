"""What is one update? Autocast, loss scaling, backward, clipping and step; apex; the optimizers' flavours.

What is said of Ascend here comes from torch_npu's sources and CANN's documents.
"""
import contextlib
import inspect

import torch

import devices


def native_bf16(device):
    """Whether the device computes bfloat16 itself. A 910A only warns and computes fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" or torch.npu.is_bf16_supported()


def make_scaler(device):
    """The loss scaler for fp16. Without an inf/nan mode (910A) overflow is a flag of the device: torch_npu's scaler."""
    if device.type == "npu" and not torch.npu.utils.is_support_inf_nan():
        return torch.npu.amp.GradScaler()
    return torch.amp.GradScaler(device.type)


class FlatGradients:
    """Clips like torch's clip_grad_norm_ in 7 launches, and without a wait: torch's own makes one a tensor on an NPU.

    One launch gathers the gradients in a buffer of this object, whose views then are the gradients; the rest are of the
    whole buffer. torch_npu's flat optimizer already keeps them so.
    """

    def __init__(self):
        self.buffer, self.views = None, []

    def gather(self, parameters):
        """-> buffers that hold all gradients of `parameters`"""
        gradients = [p.grad for p in parameters]
        if [view.shape for view in self.views] != [gradient.shape for gradient in gradients]:
            self.buffer = torch.empty(sum(gradient.numel() for gradient in gradients), device=gradients[0].device)
            self.views = [part.view_as(gradient) for part, gradient in
                          zip(self.buffer.split([gradient.numel() for gradient in gradients]), gradients)]
        torch._foreach_copy_(self.views, gradients)
        for parameter, view in zip(parameters, self.views):
            parameter.grad = view
        return [self.buffer]

    @torch.no_grad()
    def clip_(self, optimizer, parameters, max_norm=None):
        """Scale the gradients so that their common 2-norm is at most max_norm, if there is one. -> the norm, a tensor"""
        if is_flat(optimizer):
            optimizer._maybe_init_combined_params_and_grads()
            buffers = [buffer for buffer in optimizer.get_combined_grads() if buffer is not None]
        else:
            buffers = self.gather(parameters)
        norms = [torch.linalg.vector_norm(buffer) for buffer in buffers]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        if max_norm:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for buffer in buffers:
                buffer.mul_(factor)
        return norm


def clip_gradients(parameters, max_norm=None):
    """torch's clipping, where there is a max_norm. -> the gradients' common 2-norm, a tensor"""
    if max_norm:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters])


class Precision:
    """What is computed in which precision, and how a loss becomes an update: precision(loss, optimizer, ...).

    amp: auto (bf16 where native, else fp16; on a CPU fp32), bf16, fp16, apex or off. A gradient that is not finite makes no update
    where that costs no wait: of torch's fused optimizers and under a loss scaler; with `skip` of every optimizer, for a wait a step.
    """

    overflows = property(lambda self: self.scaler is not None, doc="Whether gradients that are not finite belong to the method.")

    def __init__(self, device, amp="auto", skip=False):
        if amp == "auto":
            amp = "off" if device.type == "cpu" else "bf16" if native_bf16(device) else "fp16"
        if amp == "bf16" and not native_bf16(device):
            raise ValueError(f"--amp bf16: {devices.describe(device)} does not compute bfloat16: use --amp fp16")
        self.device, self.name = device, {"off": "fp32"}.get(amp, amp)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
        self.scaler = make_scaler(device) if amp == "fp16" else None
        self.gradients, self.skip = FlatGradients(), skip

    def autocast(self):
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def initialize(self, model, optimizer):
        """Before DDP: what apex does to both. -> model, optimizer"""
        return model, optimizer

    def backward(self, loss, optimizer):
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, optimizer, max_norm=None):
        """-> the gradients' norm before"""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.device.type == "npu":
            return self.gradients.clip_(optimizer, parameters, max_norm)
        return clip_gradients(parameters, max_norm)

    def __call__(self, loss, optimizer, clip_grad=None, need_update=True, measure=False):
        """Backward; and where need_update, clip and step. clip_grad: largest norm, None or 0 for no clipping.

        -> the norms of an update's gradient, before it was clipped, and, to `measure`, of what it moved: tensors on the device, or None
        """
        self.backward(loss, optimizer)
        if not need_update:
            return None, None
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = self.clip(optimizer, clip_grad)
        weights = [p.detach() for group in optimizer.param_groups for p in group["params"]] if measure else []
        before = [weight.clone() for weight in weights]
        if self.scaler is None:
            self.step(optimizer, norm)
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        return norm, torch.nn.utils.get_total_norm(torch._foreach_sub(weights, before)) if measure else None

    def step(self, optimizer, norm):
        """optimizer.step(), unless the norm is not finite and somebody can see that: the device, or with `skip` the host."""
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not self.skip or torch.isfinite(norm).item():  # the host waits for the device here
            optimizer.step()

    def state_dict(self):
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state):
        """Takes the state of any of the scalers: torch's, torch_npu's (one key more) and apex's."""
        if self.scaler is None or not state:
            return
        if "loss_scaler0" in state:
            apex = state["loss_scaler0"] if isinstance(state["loss_scaler0"], dict) else {}
            state = {"scale": apex.get("loss_scale"), "_growth_tracker": apex.get("unskipped")}
        own = self.scaler.state_dict()
        taken = {key: state.get(key, value) for key, value in own.items()}
        if not all(isinstance(value, (int, float)) for value in taken.values()):
            raise ValueError("the checkpoint's loss scaler is not one that torch writes: its weights alone start a new training: "
                             "--finetune FILE")
        self.scaler.load_state_dict(taken)


def load_apex():
    """Ascend's patch of NVIDIA apex, or ValueError with what is missing."""
    remedy = "install Ascend's apex, or go on without it: --amp auto"
    try:
        from apex import amp
    except ImportError as error:
        try:
            import apex  # noqa: F401
        except ImportError:
            raise ValueError(f"--amp apex: apex is not installed: {remedy}") from error
        raise ValueError("--amp apex: the installed apex has no amp (NVIDIA removed it in 2025, and PyPI's package of "
                         f"that name is something else): {remedy}") from error
    if "combine_grad" not in inspect.signature(amp.initialize).parameters:
        raise ValueError("--amp apex: the installed apex is NVIDIA's, whose amp.initialize has no combine_grad: "
                         f"{remedy}")
    return amp


class ApexPrecision(Precision):
    """apex's O1 as the original trained: initialize before DDP, scale_loss, clipping of the master parameters."""

    overflows = True

    def __init__(self, device):
        self.amp, self.device, self.name, self.dtype, self.scaler, self.skip = load_apex(), device, "apex", None, None, False

    def initialize(self, model, optimizer):
        return self.amp.initialize(model, optimizer, opt_level="O1", combine_grad=True)

    def step(self, optimizer, norm):
        """apex itself leaves a step out where gradients overflow."""
        optimizer.step()

    def backward(self, loss, optimizer):
        with self.amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()

    def clip(self, optimizer, max_norm=None):
        """In place, since apex steps from gradients that it keeps in a buffer of its own."""
        return clip_gradients([p for p in self.amp.master_params(optimizer) if p.grad is not None], max_norm)

    def state_dict(self):
        return self.amp.state_dict()

    def load_state_dict(self, state):
        if "scale" in state:  # of one of torch's scalers
            state = {"loss_scaler0": {"loss_scale": state["scale"], "unskipped": state.get("_growth_tracker", 0)}}
        if state:
            self.amp.load_state_dict(state)


def make_precision(device, amp="auto", skip=False):
    return ApexPrecision(device) if amp == "apex" else Precision(device, amp, skip)


def optimizer_flavour(device, opt, precision="fp32"):
    """(constructor or None for timm's of this name, keyword arguments) of the fastest correct optimizer here.

    AdamW: torch's fused one on cuda and cpu; on an NPU its foreach one, which steps in 8 launches, where foreach works
    (910B and later), else torch_npu's flat one. Never fused=True on an NPU: it ignores the loss scaler's overflow.
    """
    if opt == "npufusedadamw":
        if device.type != "npu":
            raise ValueError(f"--opt npufusedadamw runs on an NPU, not on {device.type}: use --opt adamw")
        if precision == "apex":
            from apex.optimizers import NpuFusedAdamW
        else:
            from torch_npu.optim import NpuFusedAdamW
        return NpuFusedAdamW, {}
    if opt != "adamw":
        return None, {}
    if device.type != "npu":
        return None, {"fused": True}
    if precision != "apex" and native_bf16(device):
        return None, {"foreach": True}
    return optimizer_flavour(device, "npufusedadamw", precision)


def is_flat(optimizer):
    """Whether this is torch_npu's or apex's flat optimizer: it keeps gradients in one buffer and steps as plain numbers."""
    return getattr(optimizer, "is_fused_optimizer", False) or getattr(optimizer, "is_npu_fused_optimizer", False)
