"""Whether a runtime computes what the frozen network does."""

import torch

from pcnn_lightning.layers import SignActivation


@torch.no_grad()
def logits_of(network, images):
    return network(network.preprocess(images))


@torch.no_grad()
def smallest_signed(network, images):
    """The smallest magnitude of each image's values whose sign the network takes, (B,)."""
    smallest = [torch.full((len(images),), torch.inf)]
    hooks = [
        module.register_forward_pre_hook(lambda _, given: smallest.append(given[0].abs().flatten(1).amin(1)))
        for module in network.modules()
        if isinstance(module, SignActivation)
    ]
    network(network.preprocess(images))
    for hook in hooks:
        hook.remove()
    return torch.stack(smallest).amin(0)


def assert_agree(network, images, labels, logits):
    """Fail unless they are the network's; return the number of images whose logits differ, each with a sign of 0.

    Zero means within float rounding, as the inputs of signs are outputs of batch norms, about 1.
    """
    expected = logits_of(network, images)
    assert logits.dtype == torch.float32
    differs = (logits - expected).abs().amax(1) > 1e-4 * expected.abs().amax(1).clamp(min=1)
    assert (smallest_signed(network, images)[differs] < 1e-6).all()
    assert torch.equal(labels[~differs], expected.argmax(1)[~differs])
    return int(differs.sum())
