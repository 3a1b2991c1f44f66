"""Linear layers without gradients: our product or oneDNN's where they are faster, PyTorch's everywhere else, the same results."""

from __future__ import annotations

import pytest
import torch
from absent import need_native
from torch.nn.functional import linear as plain

from mgrpo_kernels.ops.linear_token_stats import float32_logits, layers, tiled

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
NATIVE = pytest.mark.usefixtures("native_kernels")


@pytest.fixture
def native_kernels():
    need_native()


@pytest.fixture
def products(monkeypatch):
    """Return the names of the products that are taken, on a CPU where both are said to be faster than PyTorch's."""
    if not HAS_ONEDNN:
        pytest.skip("this PyTorch has no oneDNN")
    need_native()
    seen = []

    def watched(name, real):
        return lambda *given: seen.append(name) or real(*given)

    monkeypatch.setattr(layers, "is_faster", lambda: True)
    monkeypatch.setattr(layers, "few_rows_is_faster", lambda: True)
    operators = torch.ops.mkldnn, torch.ops.mgrpo_native
    for namespace, name in zip(operators, ("_linear_pointwise", "few_rows"), strict=True):
        monkeypatch.setattr(namespace, name, watched(name, getattr(namespace, name)))
    return seen


@torch.no_grad()
@pytest.mark.parametrize("rows", [(1,), (16,), (33,), (layers.FEW_ROWS,), (layers.FEW_ROWS + 1,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_a_linear_layer(products, rows, bias):
    x, weight, b = torch.randn(*rows, 256), torch.randn(300, 256), torch.randn(300) if bias else None
    got = layers.linear(x, weight, b)
    assert got.shape == (*rows, 300)
    want = plain(x.double(), weight.double(), b if b is None else b.double()).float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    assert products == ["few_rows" if x[..., 0].numel() <= layers.FEW_ROWS else "_linear_pointwise"]


@torch.no_grad()
def test_a_view_of_a_weight_and_of_states(products):
    for rows in (9, layers.FEW_ROWS + 9):
        x, weight = torch.randn(512, rows).t(), torch.randn(256, 400).t()[:, :]
        torch.testing.assert_close(
            layers.linear(x[:, :256], weight, None), x[:, :256] @ weight.t(), rtol=1e-5, atol=1e-4
        )


def test_where_it_may_not_be_used_it_is_not(products):
    for rows in (4, layers.FEW_ROWS + 4):
        x, weight = torch.randn(rows, 256, requires_grad=True), torch.randn(300, 256)
        (grad,) = torch.autograd.grad(layers.linear(x, weight, None).sum(), x)
        torch.testing.assert_close(grad, weight.sum(0).expand(rows, -1), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            layers.linear(x[:, :8].detach(), weight[:, :8], None)
            assert layers.linear(x.bfloat16(), weight.bfloat16(), None).dtype == torch.bfloat16
            assert layers.linear(x.double(), weight.double(), None).dtype == torch.float64
            with torch.autocast("cpu", torch.bfloat16):
                assert layers.linear(x, weight, None).dtype == torch.bfloat16
    assert not products


@torch.no_grad()
def test_logits_of_a_whole_head(products):
    for rows in (5, layers.FEW_ROWS + 5):
        hidden, weight, bias = torch.randn(rows, 256), torch.randn(1000, 256), torch.randn(1000)
        torch.testing.assert_close(
            float32_logits(hidden, weight, bias), hidden @ weight.t() + bias, rtol=1e-5, atol=1e-4
        )
    assert products == ["few_rows", "_linear_pointwise"]


def test_onednn_is_faster_where_blocks_are():
    ones = torch.ones(128, 128)
    blocks = tiled.native_accumulate(torch.empty(128, 128), ones, ones, True)
    assert layers.is_faster() == (blocks and HAS_ONEDNN)


@NATIVE
def test_our_product_is_faster_wherever_onednns_is():
    """Both where MKL leaves vector instructions of the processor unused; ours on processors without AVX-512 too, unless it is told to use none."""
    vectors = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert layers.few_rows_is_faster() == vectors or not layers.is_faster()


@NATIVE
@pytest.mark.parametrize("columns", [1, 5, 6, 11, 12, 13, 24, 1000])
@pytest.mark.parametrize("inner", [0, 1, 15, 16, 17, 100])
def test_few_rows_of_every_shape(columns, inner):
    """Blocks of 6 or 12 columns, 8 or 16 rows and 16 inner elements, and what is left over of each."""
    generator = torch.Generator().manual_seed(0)
    for rows in (0, 1, 7, 8, 9, 16, 17, 31, 32, 33, 80):
        x, weight = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
        bias = torch.randn(columns, generator=generator)
        for b in (None, bias):
            got = torch.ops.mgrpo_native.few_rows(x, weight, b)
            want = plain(x.double(), weight.double(), None if b is None else b.double()).float()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@NATIVE
def test_few_rows_reads_no_other_memory_and_keeps_nan_in_its_row():
    weight = torch.full((14, 40), torch.nan)
    weight[:13, :33] = torch.randn(13, 33)
    x = torch.randn(5, 40)
    x[2, 0] = torch.nan
    got = torch.ops.mgrpo_native.few_rows(x[:, :33], weight[:13, :33], None)
    finite = got.isfinite().all(1)
    assert finite.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(got[finite], (x[:, :33] @ weight[:13, :33].t())[finite], rtol=1e-5, atol=1e-5)


@NATIVE
def test_few_rows_refuses_what_does_not_fit():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    product = torch.ops.mgrpo_native.few_rows
    with pytest.raises(TypeError, match="x: expected one of the dtypes"):
        product(x.double(), weight, None)
    with pytest.raises(TypeError, match="weight: expected one of the dtypes"):
        product(x, weight.bfloat16(), None)
    with pytest.raises(ValueError, match="x: expected 2 dimensions"):
        product(x[0], weight, None)
    with pytest.raises(ValueError, match="weight: expected shape"):
        product(x, weight[:, :7], None)
    with pytest.raises(ValueError, match="bias: expected shape"):
        product(x, weight, torch.randn(3))
