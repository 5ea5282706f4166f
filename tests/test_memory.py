"""The pool that results of the CPU kernels lie in."""

import gc
import threading

import pytest
import torch

import genfast
from genfast import backends

pytestmark = pytest.mark.skipif(
    backends.cpu_isa() is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="needs a native module and a torch with the exchange protocol",
)
TABLE = genfast.StepTable([[2.0, 0.5]], second=[[1.0, -1.0]])


def step(shape=(2, 3, 40), dtype=torch.float32):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    return x, genfast.sampler_step([x, x], TABLE, step=0)


@pytest.fixture(autouse=True)
def empty():
    step()  # the table's first call goes the checked way
    gc.collect()
    genfast.release_memory()


def test_memory_is_used_again_when_nobody_holds_it():
    _, (a, b) = step()
    address = a.data_ptr()
    view = a[1:, 0]
    del a
    _, (c, d) = step()
    assert c.data_ptr() != address and d.data_ptr() != address, "a view still held it"
    assert torch.equal(view, 2.5 * torch.arange(240.0).reshape(2, 3, 40)[1:, 0])
    del view
    _, (e, f) = step()
    assert address in (e.data_ptr(), f.data_ptr())
    assert torch.equal(b, torch.zeros(2, 3, 40))


def test_released_memory_is_what_nobody_uses():
    _, results = step((1024,))
    assert genfast.release_memory() == 0
    del results
    assert genfast.release_memory() == 2 * 4096
    assert genfast.release_memory() == 0


def test_what_is_kept_is_bounded():
    held = [step((64, 1024))[1] for _ in range(40)]
    del held
    assert genfast.release_memory() <= 32 * 64 * 1024 * 4
    for _ in range(3):
        held = [step((16, 1024, 1024))[1] for _ in range(3)]
        del held
    assert genfast.release_memory() <= 256 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 8, 8), (2, 1, 3, 1, 2, 1)])
def test_results_are_ordinary_tensors(shape, dtype):
    x, (a, b) = step(shape, dtype)
    like = torch.empty_like(x)
    for t in (a, b):
        assert t.shape == like.shape and t.stride() == like.stride() and t.dtype == dtype
        assert t.is_contiguous() and not t.requires_grad and t.data_ptr() % 64 == 0
        assert t.untyped_storage().nbytes() == like.untyped_storage().nbytes()
        assert torch.equal(t.clone(), t)
    a.add_(1).requires_grad_()
    (a.sum() * 2).backward()
    assert torch.equal(a.grad, torch.full_like(x, 2))
    assert torch.equal(b.share_memory_(), torch.zeros_like(x))


def test_under_inference_mode():
    with torch.inference_mode():
        x, (a, _) = step((2, 8))
    assert a.is_inference() and torch.equal(a, 2.5 * x)


def test_threads_take_and_return_memory():
    wrong = []

    def work(k):
        x = torch.full((64, 33), float(k))
        for _ in range(200):
            a, b = genfast.sampler_step([x, x], TABLE, step=0)
            if not (a == 2.5 * k).all() or b.any():
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
