"""``modulate`` against the equations in ``reference.py``."""

import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import few_examples, seeds, sizes
from reference import EXACT

from pcnn_lightning.functional import kmeans_1d, modulate

KINDS = {
    "mean": {},
    "constant": {"scale": 0.4},
    "three": {"levels": 3},
    "four": {"levels": 4},
    "unbinarised": {"binarize": False},
}


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 5)),
    st.tuples(sizes, st.integers(1, 4)),
    st.sampled_from(list(KINDS)),
    st.booleans(),
    st.sampled_from([1.0, 1024.0, 0.25]),
)
def test_gradients_are_the_equations_times_the_scale_of_the_loss(seed, channels, kernel, kind, average, scale):
    originals, in_channels, planes = channels
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(originals, in_channels, *kernel, dtype=torch.float64, generator=generator)
    modulation = torch.randn(planes, *kernel, dtype=torch.float64, generator=generator)
    # A loss linear in Q has its coefficients as δ.
    delta = torch.randn(originals * planes, in_channels, *kernel, dtype=torch.float64, generator=generator)
    levels = KINDS[kind].get("levels", 2)
    chosen = {"scale": KINDS[kind].get("scale"), "binarize": kind != "unbinarised"}
    chosen["centers"] = kmeans_1d(weight, levels) if levels > 2 else None
    leaves = weight.clone().requires_grad_(), modulation.clone().requires_grad_()
    modulated, loss = modulate(*leaves, average=average, loss_weight=0.3, **chosen)
    actual = torch.autograd.grad(scale * ((modulated * delta).sum() + loss), leaves)

    quantized = reference.quantize_by_levels(weight, **chosen)
    torch.testing.assert_close(modulated.detach(), reference.modulate(quantized, modulation, average), **EXACT)
    expected = reference.modulation_gradients(weight, modulation, quantized, delta, loss_weight=0.3, average=average)
    for gradient, formula in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient / scale, formula, **EXACT)


@few_examples
@given(
    seeds,
    st.tuples(sizes, sizes, st.integers(1, 5)),
    st.tuples(sizes, st.integers(1, 4)),
    st.floats(0.01, 100),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_modulated_kernels_have_their_shape_and_range(seed, channels, kernel, scale, average, dtype):
    originals, in_channels, planes = channels
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(originals, in_channels, *kernel, dtype=dtype, generator=generator)
    modulation = torch.randn(planes, *kernel, dtype=dtype, generator=generator)
    modulated, loss = modulate(weight, modulation, scale=scale, average=average, loss_weight=0.3)
    assert modulated.shape == (originals * planes, in_channels, *kernel)
    assert modulated.dtype == dtype
    assert loss.shape == ()
    assert loss.dtype == dtype
    assert loss >= 0
    assert modulated.abs().max() <= scale * modulation.abs().max() * (1 + 1e-6)
    signs = modulated.sign().unflatten(0, (originals, planes))
    assert torch.equal(signs, weight.sign().unsqueeze(1).expand_as(signs))  # whatever the signs of M
