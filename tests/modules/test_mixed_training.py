"""Runs on mixed images and weighted classes: resumed, compiled, and with the losses and accuracies of their batches."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import PROGRESSIVE, Stop, fit, tiny_digits, tiny_pcnn, tiny_trainer

from pcnn_lightning import Digits, LossCurves, StageSwitch
from pcnn_lightning.errors import InputError

MIXED = {"crop_padding": 1, "random_erasing": 0.5, "mixup_alpha": 0.4, "cutmix_alpha": 1.0}


def mixed_digits(**arguments) -> Digits:
    return tiny_digits(**MIXED, **arguments)


class Keep(Callback):
    """Keeps the batches and their losses."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append([part.clone() for part in batch])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches[-1].append(outputs["cross_entropy"].clone())


@pytest.mark.parametrize(("batches", "num_workers"), [(6, 0), (7, 1)])  # 4 per epoch
def test_a_resumed_run_ends_bit_equal(tmp_path, batches, num_workers):
    def run(*more, seed=0, **arguments):
        torch.manual_seed(seed)
        model, curves = tiny_pcnn(**PROGRESSIVE, class_weights="balanced", label_smoothing=0.1), LossCurves()
        every = ModelCheckpoint(tmp_path, "step", every_n_train_steps=1, enable_version_counter=False)
        data = mixed_digits(weighted_sampling=True, num_workers=num_workers if arguments else 0)
        callbacks = [StageSwitch(2), curves, every, *more]
        fit(model, data, max_epochs=3, callbacks=callbacks, enable_checkpointing=True, **arguments)
        return model.state_dict(), curves.epochs

    weights, epochs = run()
    with pytest.raises(RuntimeError, match="killed"):
        run(Stop(batches))
    resumed, its_epochs = run(seed=1, ckpt_path=str(tmp_path / "step.ckpt"))
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())
    assert its_epochs == epochs


def test_losses_and_accuracy_of_a_run_are_those_of_its_batches():
    """In float64, at a learning rate of zero, so that the network does not change."""
    torch.manual_seed(0)
    model = tiny_pcnn(eta1=1e-30, eta2=1e-30, class_weights="balanced").double()
    data = mixed_digits()
    prepared = data.on_after_batch_transfer
    data.on_after_batch_transfer = lambda batch, index: [
        part.double() if part.is_floating_point() else part for part in prepared(batch, index)
    ]
    keep = Keep()
    found = fit(model, data, callbacks=[keep]).callback_metrics
    counts = torch.tensor(data.class_counts).double()
    weights = 64 / (10 * counts)
    losses, correct = [], 0
    model.train()
    for images, probabilities, loss in keep.batches:
        logits = model(images).detach()
        terms = weights * probabilities * -logits.log_softmax(1)
        losses.append(terms.sum() / (weights * probabilities).sum())
        torch.testing.assert_close(loss, losses[-1], rtol=1e-6, atol=0)  # weights are rounded to float32
        correct += (logits.argmax(1) == probabilities.argmax(1)).sum().item()
        assert ((probabilities > 0).sum(1) == 2).any()
    assert float(found["train/cross_entropy"]) == pytest.approx(sum(map(float, losses)) / 4, rel=1e-5)
    assert float(found["train/accuracy"]) == pytest.approx(correct / 64)


def test_a_compiled_run_equals_an_eager_one():
    def run(compile):
        torch.manual_seed(0)
        model = tiny_pcnn(compile=compile, center_loss_weight=1e-3)
        fit(model, mixed_digits(), limit_train_batches=2)
        return model.state_dict()

    torch._dynamo.config.suppress_errors = False
    eager, compiled = run(False), run(True)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_validation_is_neither_weighted_nor_mixed():
    torch.manual_seed(0)
    model = tiny_pcnn(class_weights=[float(label + 1) for label in range(10)])
    data = mixed_digits()
    (found,) = tiny_trainer().validate(model, data, verbose=False)
    batches = [tiny_digits().on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()]
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(images), labels, reduction="sum") for images, labels in batches]
    count = sum(len(labels) for _, labels in batches)
    assert found["val/cross_entropy"] == pytest.approx(float(sum(losses)) / count, rel=1e-5)


def test_refusals():
    for wrong in ([1.0] * 9, [1.0] * 9 + [0.0], [1.0] * 9 + [float("nan")], ["a"] * 10, [True] * 10, "even", 3, {}):
        with pytest.raises(ValueError, match=r"^class_weights must be .*, but got ") as error:
            tiny_pcnn(class_weights=wrong)
        assert repr(wrong) in str(error.value)
    few = tiny_digits(train_size=5, batch_size=5)
    with pytest.raises(InputError, match=r"^class_weights must be a list, not balanced: class \d has no"):
        fit(tiny_pcnn(class_weights="balanced"), few)
    with pytest.raises(InputError, match=r"not balanced: NoneType has no class_counts"):
        tiny_trainer().fit(tiny_pcnn(class_weights="balanced"), tiny_digits().train_dataloader())
    other = tiny_digits(mixup_alpha=1.0)
    other.classes = [*"abcdefghijk"]
    with pytest.raises(InputError, match=r"probabilities of labels must have the shape \(B, 10\), but the batch has"):
        fit(tiny_pcnn(), other)
