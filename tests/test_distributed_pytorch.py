"""PyTorch's own tests of DistributedDataParallel, with our hook in every module that they wrap.

They are in ``torch.testing._internal.distributed.distributed_test``. Most ask for GPUs but test nothing of theirs: here
``cuda`` means the CPU, and Gloo joins the ranks. Left out are those that

* count DDP's own all-reduces, or compare what DDP logs about hooks and devices (``profiling``, ``logging_data_gpu``,
  ``comm_hook_logging``, ``ddp_device``);
* register a hook or an optimizer of their own in the place of ours (``apply_optim_in_backward``, ``PowerSGD``, ...),
  need events of a GPU (``native_mixed_precision``) or its kernels (``SyncBatchNorm``, ``uneven_inputs``);
* divide by the number of ranks that still have data (``grad_div_uneven_inputs``), which no hook is told;
* reach no backward pass (samplers, environment variables, what is refused at construction);
* compile for half a minute (``compile_static_graph``; ``test_options_of_ddp`` has a compiled model);
* PyTorch itself skips.
"""

import functools
import os
import sys
import tempfile
import types
import unittest
import weakref

import torch
import torch.distributed as dist
from distributed_ranks import all_well
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genfast

TESTS = """
DistributedDataParallelCPU DistributedDataParallelCPU_grad_is_view DistributedDataParallel_with_amp_and_grad_is_view
accumulate_gradients_no_sync accumulate_gradients_no_sync_grad_is_view grads_same_across_ranks_with_no_sync
ddp_bucket_cap_mb_list ddp_create_graph ddp_sink_noclone ddp_forward_backward_hook ddp_ignore_params_arg
ddp_remove_autograd_hooks static_graph_api_cpu static_graph_multi_forward ddp_static_graph_nested_types
detect_ddp_is_actually_static ddp_new_tensor_in_fwd ddp_new_tensor_in_fwd_static_graph ddp_returns_tensor_with_no_grad
ddp_control_flow_same_across_ranks ddp_control_flow_different_across_ranks undefined_grad_parity_unused_parameters
ddp_join_model_equivalence ddp_join_respects_forward_sync_buffers_false ddp_uneven_input_join_disable
ddp_broadcast_buffer ddp_broadcast_buffer_via_hook ddp_buffer_hook_allreduce ddp_buffer_hook_allreduce_return_future
ddp_init_sync_buffers_with_forward_sync_buffers_false ddp_logging_data_cpu
""".split()  # noqa: SIM905


def on_cpu(where):
    """``where`` as an argument, if it does not name a GPU."""
    names_gpu = type(where) is int or (isinstance(where, (str, torch.device)) and str(where).startswith("cuda"))
    return "cpu" if names_gpu else where


class OnCPU(torch.overrides.TorchFunctionMode):
    """Tensors that are asked to be on a GPU are not."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = on_cpu(kwargs["device"])
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to:
            args = (args[0], *map(on_cpu, args[1:]))
        return function(*args, **kwargs)


def modules_on_cpu():
    to, init = nn.Module.to, DistributedDataParallel.__init__

    @functools.wraps(init)
    def without_devices(self, *args, device_ids=None, output_device=None, **options):
        init(self, *args, **options)

    nn.Module.to = lambda self, *args, **options: to(self, *map(on_cpu, args), **options)
    nn.Module.cuda = lambda self, *_: self
    torch.cuda.set_device = torch.cuda.synchronize = lambda *_, **__: None
    DistributedDataParallel.__init__ = without_devices


calls = [0]


def counted_hook(state, bucket):
    calls[0] += 1
    return genfast.comm_hook(state, bucket)


def inject():
    """Our hook in every DDP that runs, from its first step on."""
    forward, hooked = DistributedDataParallel.forward, weakref.WeakSet()

    def forward_hooked(self, *inputs, **options):
        if self not in hooked:
            hooked.add(self)
            state = genfast.HookState(self, "fp32", process_group=self.process_group, timeout=20)
            self.register_comm_hook(state, counted_hook)
        return forward(self, *inputs, **options)

    DistributedDataParallel.forward = forward_hooked


def their_tests(rank):
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(dist.get_world_size()), "TEMP_DIR": tempfile.mkdtemp()}
    # Of what torch's tests import from it they use no more here.
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase, ACCEPT=False))
    import torch.testing._internal.common_distributed as common

    common.skip_if_lt_x_gpu = common.nccl_skip_if_lt_x_gpu = lambda *_, **__: lambda test: test
    common.skip_if_no_gpu = lambda test: test
    import torch.testing._internal.distributed.distributed_test as theirs
    from torch.testing._internal.common_utils import TestCase

    theirs.DistTestCases.backend_feature["cuda"] = {"gloo"}
    theirs.init_multigpu_helper = lambda ranks, _: {r: [r] for r in range(ranks)}
    modules_on_cpu()

    class Case(theirs.DistributedTest._DistTestBase, TestCase):
        world_size = dist.get_world_size()

        def _barrier(self, *_, **__):
            dist.barrier()

    Case.rank = rank
    return Case


def run_theirs(rank):
    found = {}
    kind = their_tests(rank)
    inject()
    for name in TESTS:
        before = calls[0]
        torch.manual_seed(0)
        try:
            with OnCPU():
                getattr(kind(f"test_{name}"), f"test_{name}")()
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        found[name] = calls[0] - before
        dist.barrier()
    return found


def test_of_pytorch():
    first, second = all_well(2, run_theirs, timeout=180)
    assert first == second and list(first) == TESTS
    assert all(first.values()), first


def run_their_parity(rank):
    """100 steps of DDP with a hook beside DDP without, to the bit."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    from genfast.dropin import ddp_hooks

    case = their_tests(rank)("test_ddp_hook_parity_allreduce")
    with OnCPU():
        for name in ("allreduce_hook", "fp16_compress_hook"):
            default_hooks.allreduce_hook = getattr(ddp_hooks, name)
            case.test_ddp_hook_parity_allreduce()
            case.test_ddp_hook_parity_allreduce_process_group()
    return True


def test_of_pytorch_for_its_hooks():
    assert all_well(2, run_their_parity, timeout=120) == [True, True]
