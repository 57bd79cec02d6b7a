"""A tensor's stamp changes when the tensor does, and only then."""

import pytest
import torch

from thresher.graph.stamp import stamp

nn = torch.nn


def _copy(m):
    m.weight.copy_(m.weight * 2)


def _data(m):
    m.weight.data = m.weight.data * 2


def _turn(m):
    m.weight.data = m.weight.data.t()


def _set(m):
    m.weight.set_(m.weight * 2)


def _swap(m):
    torch.utils.swap_tensors(m.weight, nn.Parameter(m.weight * 2))


def _load(m):
    m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()})


def _assign(m):
    m.load_state_dict({n: t * 2 for n, t in m.state_dict().items()}, assign=True)


def _half(m):
    m.half().float()


def _from_vector(m):
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.parameters()) * 2, m.parameters())


def _inference(m):
    with torch.inference_mode():
        m.weight.mul_(2)


def _step(m):
    with torch.enable_grad():
        m(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(m.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "edit",
    [_copy, _data, _turn, _set, _swap, _load, _assign, _half, _from_vector, _inference, _step],
    ids=lambda f: f.__name__[1:],
)
def test_a_changed_weight_has_another_stamp(edit):
    module = nn.Linear(4, 4)
    held, before = module.weight, stamp(module.weight)
    with torch.no_grad():
        edit(module)
    assert stamp(module.weight) != before, held.shape


def _call(m):
    m(torch.ones(2, 4))


def _views(m):
    m.weight.t(), m.weight.detach(), m.weight.data, m.state_dict(), list(m.parameters())


def _half_away(m):
    m.weight.half()


def _modes(m):
    m.eval().train().requires_grad_(False)


def _other(m):
    m.bias.add_(1)


@pytest.mark.parametrize("look", [_call, _views, _half_away, _modes, _other], ids=lambda f: f.__name__[1:])
def test_a_weight_that_was_only_read_keeps_its_stamp(look):
    module = nn.Linear(4, 4)
    before = stamp(module.weight)
    with torch.no_grad():
        look(module)
    assert stamp(module.weight) == before


def test_a_view_shares_the_count_of_writes():
    whole = torch.ones(4, 4)
    part = whole[:2]
    before = stamp(part)
    whole.add_(1)
    assert stamp(part) != before


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="meta"),
        lambda: torch.empty(0),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(3, dtype=torch.float8_e4m3fn),
    ],
    ids=["meta", "empty", "sparse", "float8"],
)
def test_every_kind_of_tensor_has_a_stamp(make):
    tensor = make()
    assert stamp(tensor) == stamp(tensor) != stamp(make())


def test_fake_and_inference_tensors_have_a_stamp():
    with torch._subclasses.FakeTensorMode():
        fake = torch.empty(3)
    assert stamp(fake) == stamp(fake)
    with torch.inference_mode():
        made = torch.ones(3)
    before = stamp(made)
    assert stamp(made) == before
    with torch.inference_mode():
        made.set_(torch.zeros(3))
    assert stamp(made) != before


class Pair(torch.Tensor):
    """A tensor made of two others, as a DTensor is of one."""

    @staticmethod
    def __new__(cls, a, b):
        return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

    def __init__(self, a, b):
        self.a, self.b = a, b

    def __tensor_flatten__(self):
        return ["a", "b"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Pair(inner["a"], inner["b"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def test_a_tensor_made_of_others_changes_with_its_parts():
    pair = Pair(torch.ones(3), torch.ones(3))
    before = stamp(pair)
    assert stamp(pair) == before
    pair.b.add_(1)
    written = stamp(pair)
    assert written != before
    pair.a = torch.ones(3)
    assert stamp(pair) != written
