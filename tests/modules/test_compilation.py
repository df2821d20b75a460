"""Compiled training."""

import copy
from functools import partial

import pytest
import torch
from tiny import fit, tiny_digits, tiny_mcn, tiny_pcnn

from pcnn_lightning import StageSwitch
from pcnn_lightning.errors import InputError


def test_compiled_training_equals_eager_training():
    def run(compile):
        torch.manual_seed(0)
        model = tiny_pcnn(compile=compile, stage="ternary")
        fit(model, limit_train_batches=2)
        return model

    torch._dynamo.config.suppress_errors = False
    eager, compiled = run(False), run(True)
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("tiny", [tiny_pcnn, tiny_mcn])
def test_compiled_gradients_equal_eager_ones_on_a_gpu(tiny):
    def gradients(compile):
        torch.manual_seed(0)
        model = tiny().cuda()
        model.prepare_features(compile=compile, channels_last=True)
        images, labels = torch.randn(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda")
        losses, _ = model.losses(images, labels)
        sum(losses.values()).backward()
        return {name: one.grad for name, one in model.named_parameters()}

    eager, compiled = gradients(False), gradients(True)
    assert all(gradient.abs().max() > 0 for gradient in eager.values())
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def test_a_run_compiles_once_a_stage(monkeypatch):
    """Evaluation, its smaller last batch and the step after a validation do not recompile."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    data = tiny_digits(batch_size=24, train_size=72)  # 3 batches; 144 images to validate on do not fill the last
    model = tiny_pcnn(compile=True, stage="ternary")
    fit(model, data, max_epochs=4, callbacks=[StageSwitch(2)], num_sanity_val_steps=1)
    assert model.stage == "binary"
    assert len(graphs) == 2


def test_compilation_errors_are_reported_in_one_line(monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with pytest.raises(InputError, match=r"compile: .*no compiler here.*; to do without it, set compile") as caught:
        fit(tiny_pcnn(compile=True))
    assert "\n" not in str(caught.value)


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = tiny_pcnn(compile=True)
    fit(model, limit_train_batches=1)
    twin = copy.deepcopy(model).train()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(torch.randn(4, 1, 8, 8)).any()
