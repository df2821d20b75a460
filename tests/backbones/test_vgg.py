"""The blocks of VGG."""

import pytest
import torch
from backbone_helpers import blocks_of, convolution_branch, pool_windows, prelu
from reference import EXACT


@torch.no_grad()
@pytest.mark.parametrize("size", [(6, 4), (7, 5)], ids=str)
def test_vgg_block_has_no_shortcut_and_max_pools_before_prelu(size):
    last = blocks_of("vgg_small")[0]
    assert (last.prelu.weight < 0).any()  # otherwise the order of pool and PReLU would not matter
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    expected = prelu(pool_windows(convolution_branch(x, last, 1), torch.amax), last)
    torch.testing.assert_close(last(x), expected, **EXACT)
