"""What the decay of the moving averages does: five batch norms watch the same training, and a picture shows them.

    python examples/moving_averages.py [PICTURE.png]

The network is written out in NumPy: one hidden layer with a batch norm, trained on the handwritten digits by gradient
descent with `bnlayer_numpy`'s analytic backward pass. In training every batch norm normalizes with the batch, whatever
its moving averages are, so they can all watch one training; only eval differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import digits
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnlayer import BatchNormSpec
from bnlayer_numpy import BatchNorm, batch_norm

HIDDEN, RATE = 64, 1.0
SPEC = BatchNormSpec(HIDDEN)
# By name: the spec, and the color and style of its line. A plain average starts at mean 0 and variance 1.
AVERAGES = {
    "decay 0.5": (SPEC.replace(decay=0.5), "#E69F00", "-"),
    "decay 0.9": (SPEC.replace(decay=0.9), "#009E73", "-"),
    "decay 0.99": (SPEC.replace(decay=0.99), "#D55E00", "-"),
    "decay 0.99, zero-debiased": (SPEC.replace(decay=0.99, zero_debias="all"), "#D55E00", "--"),
    "cumulative": (SPEC.replace(decay="cumulative"), "#0072B2", "-"),
}
SHOWN_STEPS = (10, 50, digits.EPOCHS * digits.STEPS)


class Record(NamedTuple):
    """What was seen: statistics (steps, HIDDEN), of all training pictures at that step's weights, of the batch, and by
    name of each moving average; eval accuracy (steps,) by name."""

    all_mean: np.ndarray
    all_variance: np.ndarray
    batch_mean: np.ndarray
    batch_variance: np.ndarray
    mean: dict[str, np.ndarray]
    variance: dict[str, np.ndarray]
    accuracy: dict[str, np.ndarray]

    def distance(self, name: str) -> np.ndarray:
        """How far the moving mean is from the mean of all pictures at each step: in standard deviations, on average."""
        return np.mean(np.abs(self.mean[name] - self.all_mean) / np.sqrt(self.all_variance), axis=1)


def train(data: digits.Digits) -> Record:
    """Train the network, every batch norm watching."""
    kernel, last = digits.first_kernels(((64, HIDDEN), (HIDDEN, 10)))
    bias = np.zeros(10, np.float32)
    layers = {name: BatchNorm(spec) for name, (spec, _, _) in AVERAGES.items()}
    learner, *_ = layers.values()  # whose gamma and beta learn; the others' are set to them in eval
    train_x, eval_x = data.train_x.reshape(-1, 64), data.eval_x.reshape(-1, 64)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in Record._fields[:4]}
    means, variances, accuracies = ({name: [] for name in layers} for _ in range(3))
    for x, y in digits.batches(data):
        x = x.reshape(-1, 64)
        h = x @ kernel
        normalized, *_ = [layer(h, training=True) for layer in layers.values()]
        a = np.maximum(normalized, 0.0)
        dlogits = (softmax(a @ last + bias) - np.eye(10, dtype=np.float32)[y]) / len(y)

        for name, array in zip(seen, (*moments(train_x @ kernel), *moments(h)), strict=True):
            seen[name].append(array)

        back = learner.backward(dlogits @ last.T * (normalized > 0))
        assert back.dgamma is not None and back.dbeta is not None
        state = learner.state
        learner.state = state.replace(gamma=state.gamma - RATE * back.dgamma, beta=state.beta - RATE * back.dbeta)
        last, bias = last - RATE * a.T @ dlogits, bias - RATE * dlogits.sum(axis=0)
        kernel = kernel - RATE * x.T @ back.dx

        for name, layer in layers.items():
            state = layer.state.replace(gamma=learner.state.gamma, beta=learner.state.beta)
            normalized, _ = batch_norm(eval_x @ kernel, state, layer.spec, training=False)
            accuracies[name].append(digits.accuracy(np.maximum(normalized, 0.0) @ last + bias, data.eval_y))
            means[name].append(state.moving_mean)
            variances[name].append(state.moving_variance)
    by_name = ({name: np.array(rows) for name, rows in lists.items()} for lists in (means, variances, accuracies))
    return Record(*(np.array(rows) for rows in seen.values()), *by_name)


def moments(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of every column."""
    return h.mean(axis=0), h.var(axis=0)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of every row."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw(record: Record, path: Path) -> None:
    """The moving mean and variance of the channel that drifts most, and the eval accuracy, over the steps."""
    drift = (record.all_mean[-1] - record.all_mean[0]) / np.sqrt(record.all_variance[0])
    channel = int(np.argmax(np.abs(drift)))
    figure = Figure(figsize=(8.0, 9.5), layout="constrained")
    of_mean, of_variance, of_accuracy = figure.subplots(3, sharex=True)
    steps = np.arange(1, len(record.all_mean) + 1)

    def curves(axes: Axes, values: dict[str, np.ndarray], title: str) -> None:
        for name, (_, color, style) in AVERAGES.items():
            axes.plot(steps, values[name], style, color=color, linewidth=1.8, label=name)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)

    for axes, batch, everything, moving, title in (
        (of_mean, record.batch_mean, record.all_mean, record.mean, "Moving mean of the channel that drifts most"),
        (of_variance, record.batch_variance, record.all_variance, record.variance, "Its moving variance (logarithmic)"),
    ):
        axes.plot(steps, batch[:, channel], ".", color="0.75", markersize=4, label="the batch's own")
        axes.plot(
            steps, everything[:, channel], "k", linewidth=1.2, zorder=3, label="of all pictures, at these weights"
        )
        curves(axes, {name: values[:, channel] for name, values in moving.items()}, title)
    of_variance.set_yscale("log")
    of_variance.yaxis.set_major_formatter("{x:g}")
    curves(of_accuracy, record.accuracy, "Accuracy on held-out pictures, normalized with these averages")
    of_accuracy.set_xlabel("training step")
    of_accuracy.set_xlim(0, len(steps))
    figure.legend(*of_mean.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print a table, draw the picture."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "moving_averages.png")
    record = train(digits.load())
    print(f"{'':26}  eval accuracy at step    moving mean off by (in sd)")
    print(f"{'':26}" + "".join(f"{step:7}" for step in SHOWN_STEPS) + "  " + "".join(f"{s:8}" for s in SHOWN_STEPS))
    for name in AVERAGES:
        accuracy, distance = record.accuracy[name], record.distance(name)
        print(
            f"{name:26}"
            + "".join(f"{accuracy[step - 1]:7.3f}" for step in SHOWN_STEPS)
            + "  "
            + "".join(f"{distance[step - 1]:8.3f}" for step in SHOWN_STEPS)
        )
    draw(record, path)
    print(f"The picture is {path}.")


if __name__ == "__main__":
    main()
