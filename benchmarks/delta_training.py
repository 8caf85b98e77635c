"""A small network for handwritten digits, trained in numpy: two ReLU layers, momentum, fake quantisation on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
CLASSES = 10
BATCH = 32
MOMENTUM = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Images [n, 64] in [0, 1] and their labels [n]."""

    images: Floats
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Three matrices; no biases."""

    weights: tuple[Floats, ...]

    @classmethod
    def random(cls, width: int, *, seed: int) -> Network:
        """As He et al. (2015) begin."""
        rng = np.random.default_rng(seed)
        shapes = ((64, width), (width, width), (width, CLASSES))
        return cls(weights=tuple(rng.normal(0, (2 / s[0]) ** 0.5, s).astype(np.float32) for s in shapes))

    def accuracy(self, data: Digits) -> float:
        """Share of images that it names right."""
        hidden = data.images
        for weights in self.weights[:-1]:
            hidden = np.maximum(hidden @ weights, 0)
        return float(np.mean(np.argmax(hidden @ self.weights[-1], axis=1) == data.labels))


def load_digits(*, share: float) -> Digits:
    """The first `share` of the digits that scikit-learn carries, each also shifted by one pixel in four directions."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    kept = int(share * len(images))
    square = (images[:kept] / 16).astype(np.float32).reshape(-1, 8, 8)
    moved = [square, *(np.roll(square, step, axis) for axis in (1, 2) for step in (-1, 1))]
    return Digits(images=np.concatenate(moved).reshape(-1, 64), labels=np.tile(labels[:kept].astype(np.int64), 5))


def train(network: Network, data: Digits, *, epochs: int, scales: Sequence[float] = (), rate: float = 0.02) -> Network:
    """Minimise the cross entropy.

    Args:
        network: where to start.
        data: what to learn.
        epochs: passes over it.
        scales: fake-quantise the weights with these in the forward pass, and pass gradients straight through.
        rate: of the first epoch; it falls linearly.
    """
    rng = np.random.default_rng(epochs)
    weights = [each.copy() for each in network.weights]
    speeds = [np.zeros_like(each) for each in weights]
    for epoch in range(epochs):
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            used = (
                [np.round(w / s) * np.float32(s) for w, s in zip(weights, scales, strict=True)] if scales else weights
            )
            gradients = _gradients(used, data.images[chosen], data.labels[chosen])
            for weight, speed, gradient in zip(weights, speeds, gradients, strict=True):
                speed[:] = np.float32(MOMENTUM) * speed - np.float32(rate * (1 - epoch / epochs)) * gradient
                weight[:] = weight + speed
    return Network(weights=tuple(weights))


def finetune(network: Network, data: Digits, *, epochs: int, scales: Sequence[float] = ()) -> Network:
    """Train on with a tenth of the rate."""
    return train(network, data, epochs=epochs, scales=scales, rate=0.002)


def _gradients(weights: Sequence[Floats], images: Floats, labels: NDArray[np.int64]) -> list[Floats]:
    layers = [images]
    for each in weights[:-1]:
        layers.append(np.maximum(layers[-1] @ each, 0))
    logits = layers[-1] @ weights[-1]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1
    error: Floats = shares / np.float32(len(labels))
    gradients: list[Floats] = []
    for layer, weight in zip(reversed(layers), reversed(weights), strict=True):
        gradients.insert(0, layer.T @ error)
        error = (error @ weight.T) * (layer > 0)
    return gradients
