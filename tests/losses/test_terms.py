"""Terms of the loss in a module: when they begin, what evaluation counts, and what a checkpoint holds of them."""

import pytest
import torch
from lightning.pytorch import Callback
from tiny import fit, tiny_digits, tiny_pcnn
from torch import Tensor

from pcnn_lightning import LossCurves
from pcnn_lightning.losses import CrossEntropy, LossTerm, Outputs


class Counter(LossTerm):
    """A constant that counts its calls, as state of its own."""

    label = "counter"
    steps: Tensor

    def __init__(self, start: int | str = 0) -> None:
        super().__init__(start)
        self.register_buffer("steps", torch.zeros(()))
        self.calls = torch.zeros(())

    def value(self, outputs: Outputs, batches: int = 1) -> Tensor:
        if self.training:
            self.calls += 1
        return 0.25 * torch.ones((), device=outputs.logits.device)

    def step(self) -> None:
        self.steps += 1
        self.calls = torch.zeros(())

    def pending(self) -> dict[str, Tensor]:
        return {"calls": self.calls}

    def restore_pending(self, pending: dict[str, Tensor]) -> None:
        self.calls = pending.get("calls", torch.zeros(()))


def with_counter(start: int | str = 0, **arguments):
    torch.manual_seed(0)
    model = tiny_pcnn(**arguments)
    model.add_term("counter", Counter(start))
    return model


def test_a_term_is_added_logged_and_stepped(tmp_path):
    curves = LossCurves()
    model = with_counter()
    metrics = fit(model, max_epochs=2, callbacks=[curves], default_root_dir=tmp_path).callback_metrics
    assert metrics["train/counter"] == metrics["val/counter"] == 0.25
    parts = ("cross_entropy", "projection_loss", "counter")
    for split in ("train", "val"):
        total = sum(float(metrics[f"{split}/{name}"]) for name in parts)
        assert float(metrics[f"{split}/loss"]) == pytest.approx(total, rel=1e-5)
    assert model.terms["counter"].steps == 8  # two epochs of four batches
    assert [row["train/counter"] for row in curves.epochs] == [0.25, 0.25]


def test_a_term_begins_at_its_epoch():
    curves = LossCurves()
    fit(with_counter(start=1), max_epochs=2, callbacks=[curves])
    assert ["train/counter" in row for row in curves.epochs] == [False, True]


def test_a_term_leaves_the_gradients_of_others_alone():
    ends = []
    for model in (with_counter(), tiny_pcnn()):
        torch.manual_seed(0)
        model.load_state_dict(with_counter().state_dict(), strict=False)
        fit(model)
        ends.append(model.net.state_dict())
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_state_of_an_unfinished_update_waits_in_a_checkpoint(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:  # the first of the two batches of an update
                trainer.save_checkpoint(tmp_path / "within.ckpt")
                raise RuntimeError("killed")

    data = {"train_size": 96}
    with pytest.raises(RuntimeError, match="killed"):
        fit(with_counter(accumulate=2), tiny_digits(**data), callbacks=[Save()])
    pending = torch.load(tmp_path / "within.ckpt", weights_only=True)["pending"]
    assert pending["terms.counter"]["calls"] == 1
    resumed = with_counter(accumulate=2)
    fit(resumed, tiny_digits(**data), ckpt_path=str(tmp_path / "within.ckpt"))
    assert resumed.terms["counter"].steps == 3


def test_label_smoothing_is_for_training_only():
    term = CrossEntropy(0.5)
    logits, labels = torch.randn(8, 4), torch.randint(4, (8,))
    outputs = Outputs(logits, logits, labels, [])
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.5)
    assert torch.equal(term.train().value(outputs), expected)
    assert torch.equal(term.eval().value(outputs), torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", ["loss", "accuracy", "cross_entropy"])
def test_a_taken_name_is_refused(name):
    with pytest.raises(ValueError, match=f"but got '{name}'"):
        tiny_pcnn().add_term(name, Counter())


def test_the_loss_trains_a_network_that_is_in_evaluation_mode():
    """As for fine-tuning with frozen batch norms; Lightning leaves the modes as they are."""

    def train(weight, part):
        torch.manual_seed(0)
        model = tiny_pcnn(projection_loss_weight=weight, center_loss_weight=1e-3, label_smoothing=0.1)
        (model if part == "model" else model.net).eval()
        fit(model, max_epochs=2)
        return model.state_dict()

    weak, strong = train(0.0, "model"), train(0.1, "model")
    kernels = [name for name in weak if name.endswith("conv.weight")]
    assert kernels
    assert not any(torch.equal(weak[name], strong[name]) for name in kernels)
    alone = train(0.1, "net")
    assert all(torch.equal(alone[name], value) for name, value in strong.items())
    assert (strong["_terms.center_loss.centers"] != 0).any()


def test_a_term_that_never_begins_is_said():
    for arguments, place in (({"center_loss_start": 5}, "5"), ({"center_loss_start": "binary"}, "binary")):
        with pytest.warns(UserWarning, match=f"center_loss takes no part: it begins at {place}, which this run"):
            fit(tiny_pcnn(stage="ternary", center_loss_weight=1e-3, **arguments), max_epochs=2)


@torch.no_grad()
def test_evaluation_after_a_change_of_weights_has_a_fresh_quantization_loss():
    model = tiny_pcnn()
    layers = list(model.one_bit_layers.values())
    term = model.terms["projection_loss"].eval()
    term.begin_evaluation(layers)
    before = term.value(Outputs(None, None, None, layers))
    model.train()
    layers[0].weight *= 3
    model.eval()
    assert term.value(Outputs(None, None, None, layers)) > before
