"""Random linear heads, and their cross-entropy in float64."""

import numpy as np


def random_head(tokens=(6,), features=5, vocabulary=19, seed=0, dtype=np.float32):
    """Features, weights, labels, and a cotangent for every token."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(*tokens, features)).astype(dtype)
    kernel = rng.normal(size=(features, vocabulary)).astype(dtype)
    labels = rng.integers(vocabulary, size=tokens)
    return hidden, kernel, labels, rng.normal(size=tokens).astype(dtype)


def literal(hidden, kernel, labels, cotangents, z_loss=0.0):
    """Losses and gradients of the plain logits in float64 NumPy; labels are all in range."""
    h, w = np.asarray(hidden, np.float64), np.asarray(kernel, np.float64)
    h, y = h.reshape(-1, h.shape[-1]), np.ravel(labels)
    g = np.asarray(cotangents, np.float64).reshape(-1, 1)
    logits = h @ w
    top = logits.max(-1, keepdims=True)
    log_z = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    hot = np.eye(w.shape[1])[y]
    losses = (log_z - logits)[hot == 1] + z_loss * log_z[:, 0] ** 2
    d_logits = g * ((1 + 2 * z_loss * log_z) * np.exp(logits - log_z) - hot)
    return losses.reshape(np.shape(labels)), (d_logits @ w.T).reshape(hidden.shape), h.T @ d_logits
