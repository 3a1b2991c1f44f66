"""Linear layers without gradients: oneDNN's product where it is faster, PyTorch's everywhere else, the same results."""

import pytest
import torch
from torch.nn.functional import linear as plain

from mgrpo_kernels.ops.linear_token_stats import float32_logits, layers, tiled

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """Return what is multiplied by oneDNN, on a CPU where it is taken to be faster."""
    if not HAS_ONEDNN:
        monkeypatch.setattr(layers, "is_faster", lambda: False)
        return None
    seen, real = [], torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(layers, "is_faster", lambda: True)
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *given: seen.append(given[0].shape) or real(*given)
    )
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (33,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_linear_layer(onednn, rows, bias):
    x, weight, b = torch.randn(*rows, 256), torch.randn(300, 256), torch.randn(300) if bias else None
    torch.testing.assert_close(
        layers.linear(x, weight, b),
        plain(x.double(), weight.double(), b if b is None else b.double()).float(),
        rtol=1e-5,
        atol=1e-4,
    )
    assert onednn is None or onednn == [x.shape]


@torch.no_grad()
def test_a_view_of_a_weight_and_of_states(onednn):
    x, weight = torch.randn(512, 9).t(), torch.randn(256, 400).t()[:, :]
    torch.testing.assert_close(layers.linear(x[:, :256], weight, None), x[:, :256] @ weight.t(), rtol=1e-5, atol=1e-4)


def test_where_it_may_not_be_used_it_is_not(onednn):
    x, weight = torch.randn(4, 256, requires_grad=True), torch.randn(300, 256)
    (grad,) = torch.autograd.grad(layers.linear(x, weight, None).sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        layers.linear(x[:, :8].detach(), weight[:, :8], None)
        assert layers.linear(x.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
        assert layers.linear(x.double(), weight.double(), None).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert layers.linear(x, weight, None).dtype == torch.bfloat16
    assert not onednn


@torch.no_grad()
def test_logits_of_a_whole_head(onednn):
    hidden, weight, bias = torch.randn(5, 256), torch.randn(1000, 256), torch.randn(1000)
    torch.testing.assert_close(float32_logits(hidden, weight, bias), hidden @ weight.t() + bias, rtol=1e-5, atol=1e-4)
    assert onednn is None or len(onednn) == 1


def test_it_is_faster_where_blocks_are():
    ones = torch.ones(128, 128)
    blocks = tiled.native_accumulate(torch.empty(128, 128), ones, ones, True)
    assert layers.is_faster() == (blocks and HAS_ONEDNN)
