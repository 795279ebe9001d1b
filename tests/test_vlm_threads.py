"""Small passes take one thread, large ones all; whatever happens, the number is afterwards as it was."""

import pytest
import torch

from catlib.vlm.threads import WORTH_THREADS, fit_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_passes_take_one_thread_and_large_ones_all(two_threads):
    seen = []
    inner = torch.nn.Linear(64, 64)
    inner.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    fit_threads(model := torch.nn.Sequential(inner))
    many = int(WORTH_THREADS / 64**2) + 1
    for x in (torch.ones(1, 8, 64), torch.ones(1, many, 64), torch.ones(2, 64)):
        model(x)
    assert seen == [1, 2, 1] and torch.get_num_threads() == 2


def test_the_number_is_restored_after_an_error_and_within_another_pass(two_threads):
    seen = []
    inner, outer = torch.nn.Linear(8, 8), torch.nn.Sequential()
    fit_threads(inner)
    outer.append(inner)
    fit_threads(outer)
    with pytest.raises(RuntimeError):
        outer(torch.ones(1, 3))
    assert torch.get_num_threads() == 2
    outer.append(torch.nn.Identity())
    outer[1].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    outer(torch.ones(1, 8))
    assert seen == [1] and torch.get_num_threads() == 2
