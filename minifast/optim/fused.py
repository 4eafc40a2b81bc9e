"""Backward pass and weight update without what torch's Python does around them: the same work, the same bits.

Around the kernel of its fused AdamW, Adam or SGD, which takes a few microseconds, torch opens a range for the profiler,
looks for hooks, and checks and groups all parameters; `loss.backward()` checks what a loss in a fit cannot be. With a
small model that is half of the time. Here the same tensors go to the same kernel and the same engine.

Nothing is kept between updates, so anyone may load, thaw or change what the optimizer holds in between. Whatever is not
as it is known here (another optimizer, a hook, a profiler that runs, a learning rate in a tensor, another version of
torch, ...) is left to `opt.step()` and `loss.backward()`.
"""
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as base

DIRECT = True  # False: fits that begin from now on call `opt.step()` and `loss.backward()`

# What is used of torch's inside, as it is known: the arguments of the kernels, and of what makes Adam's state.
_OF_ADAM = ("self grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps lr beta1 beta2 weight_decay eps amsgrad "
            "maximize grad_scale found_inf")
_OF_SGD = ("self grads momentum_buffer_list weight_decay momentum lr dampening nesterov maximize is_first_step "
           "grad_scale found_inf")
_KERNELS = {"_fused_adam_": _OF_ADAM, "_fused_adamw_": _OF_ADAM, "_fused_sgd_": _OF_SGD}
_INIT_GROUP = "self group params_with_grad grads exp_avgs exp_avg_sqs max_exp_avg_sqs state_steps"
_GLOBAL_HOOKS = tuple(getattr(base, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post"))
_ONE = torch.ones((), dtype=torch.float32, device="cpu")  # a plain 1 becomes a new tensor for each parameter
Work = list[tuple[dict[str, Any], list[Tensor], list[Tensor], list[dict[str, Any]]]]  # of each group, see `_work`


def updater(opt: Optimizer) -> Callable[[], None]:
    """What makes one weight update of `opt` as `opt.step()` does, bit for bit: asked for anew by each fit."""
    def step() -> None:
        opt.step()  # looked up each time: someone may put another one in its place

    if not DIRECT or not _is_known(opt):
        return step
    launch = _launch_sgd if type(opt) is SGD else _launch_adam
    device = next(p.device for group in opt.param_groups for p in group["params"])

    def update() -> None:
        found_inf = getattr(opt, "found_inf", None)
        work = None if _is_watched(opt) else _work(opt)
        if work is None or (found_inf is not None and found_inf.device != device):
            step()
            return
        torch.set_grad_enabled(False)  # the fit has it on; a `with` takes as long as a kernel
        try:
            launch(work, found_inf)
        finally:
            torch.set_grad_enabled(True)
    return update


def backward() -> Callable[[Tensor, Tensor], None]:
    """What does `loss.backward(gradient)`, for a loss and a gradient of shape (): asked for anew by each fit."""
    engine = _engine() if DIRECT else None

    def call(loss: Tensor, gradient: Tensor) -> None:
        if engine is None or type(loss) is not Tensor:
            loss.backward(gradient)
        else:
            engine((loss,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    return call


@functools.cache
def _engine() -> Callable[..., Any] | None:
    """Torch's autograd engine, if it can be called as it is called here."""
    engine: Callable[..., Any] = getattr(torch.autograd.graph, "_engine_run_backward", Tensor.backward)
    x = torch.ones((), requires_grad=True)
    try:
        engine((2 * x,), (_ONE,), False, False, (), allow_unreachable=True, accumulate_grad=True)
    except Exception:  # of another version: whatever it is
        return None
    return engine if x.grad is not None and float(x.grad) == 2 else None


def _is_known(opt: Optimizer) -> bool:
    """Whether `opt` and this version of torch are what the functions below were written for."""
    if type(opt) not in (AdamW, Adam, SGD) or not _is_torchs_own(type(opt).step) or None in _GLOBAL_HOOKS:
        return False
    for name, arguments in _KERNELS.items():
        operator = getattr(torch.ops.aten, name, None)
        if operator is None or [a.name for a in operator.default._schema.arguments] != arguments.split():
            return False
    if type(opt) is not SGD and list(inspect.signature(Adam._init_group).parameters) != _INIT_GROUP.split():
        return False
    groups = [group["params"] for group in opt.param_groups if group["params"]]
    return (all(len({p.dtype for p in params}) == 1 for params in groups)
            and len({p.device for params in groups for p in params}) == 1)


def _is_torchs_own(step: Any) -> bool:
    """Whether nobody has put a function of his own around or in place of `step`."""
    home = torch.optim.__path__[0]
    while step is not None:
        if not step.__code__.co_filename.startswith(home):
            return False
        step = getattr(step, "__wrapped__", None)
    return True


def _is_watched(opt: Any) -> bool:
    """Whether someone listens to `opt.step`, or has put another one in its place."""
    return bool(opt._optimizer_step_pre_hooks or opt._optimizer_step_post_hooks or _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1]
                or "step" in vars(opt) or torch._C._autograd._profiler_enabled()
                or getattr(opt, "grad_scale", None) is not None)


def _work(opt: Any) -> Work | None:
    """(group, parameters with a gradient, their gradients, their states) of each group; None: let `opt` do it."""
    work, is_adam = [], type(opt) is not SGD
    for group in opt.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        grads = [p.grad for p in params]
        states = [opt.state[p] for p in params] if is_adam or group["momentum"] else []
        has_numbers = not isinstance(group["lr"], Tensor) and not isinstance(group.get("betas", [0])[0], Tensor)
        takes_kernel = group["fused"] and not group["differentiable"] and has_numbers
        if not takes_kernel or any([grad.is_sparse for grad in grads]):
            return None
        if is_adam and not all(states):
            opt._init_group(group, [], [], [], [], [], [])  # makes those that are missing
        if not is_adam and not all([state.get("momentum_buffer") is not None for state in states]):
            return None
        work.append((group, params, grads, states))
    return work


def _launch_adam(work: Work, found_inf: Tensor | None) -> None:
    steps = [[state["step"] for state in states] for _, _, _, states in work]
    together = [step for of_group in steps for step in of_group]
    if together and together[0].is_cpu:
        torch._foreach_add_(together, _ONE, alpha=1.0)  # without alpha torch reads the number back
    elif together:
        torch._foreach_add_(together, 1)
    for (group, params, grads, states), of_group in zip(work, steps, strict=True):
        amsgrad, (beta1, beta2) = group["amsgrad"], group["betas"]
        kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        kernel(params, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
               [state["max_exp_avg_sq"] for state in states] if amsgrad else [], of_group, amsgrad=amsgrad,
               lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
               maximize=group["maximize"], grad_scale=None, found_inf=found_inf)
    if found_inf is not None and together:  # an update that was not made does not count
        torch._foreach_sub_(together, [found_inf] * len(together))


def _launch_sgd(work: Work, found_inf: Tensor | None) -> None:
    for group, params, grads, states in work:
        torch._fused_sgd_(params, grads, [state["momentum_buffer"] for state in states],
                          weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
                          dampening=group["dampening"], nesterov=group["nesterov"], maximize=group["maximize"],
                          is_first_step=False, grad_scale=None, found_inf=found_inf)
