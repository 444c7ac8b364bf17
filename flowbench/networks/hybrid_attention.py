"""Attention for sequences of images: softmax within an image, and another kind across images.

Shape suffixes: T images, of all sequences one after the other (T = B * S), B sequences, S images of a sequence,
H heads, N tokens of an image, E channels of a head, D = H * E channels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, rms_norm, scaled_dot_product_attention, silu

from flowbench.core.checks import check_count

__all__ = ["Across", "Decay", "Entry", "HybridAttention", "ImageMixing", "Past", "image_mixing"]

Across = Literal["none", "linear", "full"]
Decay = Literal["cumsum", "mean"]
Entry = tuple[Tensor, Tensor]
"""What one layer remembers of one image: keys and values, or what a rule makes of them."""
Past = tuple[Entry, ...]
"""What one layer remembers of the images before, the oldest first; empty at the start of a sequence."""

# Divides the logarithm of the gates, as in the authors' code: a state halves in 16 images at a gate of 1/2.
GATE_NORMALIZER = 16.0
_EPS = 1e-6


class ImageMixing(ABC):
    """What the tokens of an image take from its own tokens and from those of earlier images of its sequence.

    Queries, keys and values have shape (T, H, N, E), the keys divided by sqrt(E) already; ``log_decay`` (T, H, N) <= 0
    is the logarithm of a gate for each head and token, where the rule is ``gated``.
    """

    gated = False

    @abstractmethod
    def parallel(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, group_size: int) -> Tensor:
        """All images of sequences of ``group_size`` at once, (T, H, N, E)."""

    @abstractmethod
    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, past: Past) -> Tensor:
        """One image of each sequence, given what is remembered of those before, (T, H, N, E)."""

    @abstractmethod
    def entry(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Entry:
        """What is remembered of an image."""

    def remembered(self, past: Past, entry: Entry, window: int | None) -> Past:
        """The past with one more image, of which the last ``window`` are kept; None keeps all."""
        return (*past, entry) if window is None else (*past, entry)[-window:]


class NoMixing(ImageMixing):
    """Softmax attention within each image, and nothing across them."""

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, group_size: int) -> Tensor:
        """See :meth:`ImageMixing.parallel`."""
        return _within(q, k, v)

    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, past: Past) -> Tensor:
        """See :meth:`ImageMixing.recurrent`."""
        return _within(q, k, v)

    def entry(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Entry:
        """Nothing: the entry is empty."""
        return k[:0], v[:0]

    def remembered(self, past: Past, entry: Entry, window: int | None) -> Past:
        """Nothing."""
        return ()


class SoftmaxMixing(ImageMixing):
    """One softmax over the tokens of the image and of all earlier images of its sequence."""

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, group_size: int) -> Tensor:
        """See :meth:`ImageMixing.parallel`; (S N)^2 logits for each sequence and head."""
        tokens = q.shape[2]
        image = torch.arange(group_size * tokens, device=q.device) // tokens
        q_all, k_all, v_all = (_joined(part, group_size) for part in (q, k, v))
        seen = image[:, None] >= image
        mixed = scaled_dot_product_attention(q_all, k_all, v_all, attn_mask=seen, scale=1.0)
        return mixed.unflatten(2, (group_size, tokens)).transpose(1, 2).reshape(q.shape)

    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, past: Past) -> Tensor:
        """See :meth:`ImageMixing.recurrent`."""
        keys = torch.cat([*(entry[0] for entry in past), k], 2)
        return _within(q, keys, torch.cat([*(entry[1] for entry in past), v], 2))

    def entry(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Entry:
        """Keys and values."""
        return k, v


class GatedLinearMixing(ImageMixing):
    """Softmax attention within each image, plus linear attention to a state that earlier images have filled.

    With ``g`` the logarithm of the gates and ``g_i`` its mean over the tokens of image i, the state of a head (E, E) is
    ``S_0 = 0``, ``S_(i+1) = exp(g_i) S_i + k_i^T v_i``, and image i takes ``exp(r) q_i S_i`` beside its softmax.
    Under the decay ``cumsum``, the authors', r is the running sum of g over the tokens of the image, so the last token
    reads a state that has decayed more than what the first one reads: 256 tokens at gates of 1/2 read it with 1 to
    1.5e-5. Under ``mean`` r is g_i for all tokens, so the order of the tokens does not matter.

    Args:
        decay: "cumsum" or "mean".
    """

    gated = True

    def __init__(self, decay: Decay) -> None:
        self.decay = decay

    def parallel(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, group_size: int) -> Tensor:
        """See :meth:`ImageMixing.parallel`; the states of all images from one product with the S x S decays."""
        inner = _within(q, k, v)
        if group_size == 1:
            return inner
        assert log_decay is not None, "the rule is gated"
        products, mean = self.entry(k, v, log_decay)
        sequences = (-1, group_size)
        decay_BHSS = _decays(mean.unflatten(0, sequences))
        states = torch.einsum("bhij,bjhef->bihef", decay_BHSS, products.unflatten(0, sequences)).flatten(0, 1)
        return inner + self._read(q, log_decay, states)

    def recurrent(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, past: Past) -> Tensor:
        """See :meth:`ImageMixing.recurrent`."""
        inner = _within(q, k, v)
        if not past:
            return inner
        assert log_decay is not None, "the rule is gated"
        return inner + self._read(q, log_decay, _state(past))

    def entry(self, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Entry:
        """The product ``k^T v`` (T, H, E, E), and the mean decay of the image (T, H).

        Both are float32 at least: a state is a sum over all steps of a sampler.
        """
        assert log_decay is not None, "the rule is gated"
        dtype = torch.promote_types(k.dtype, torch.float32)
        return (k.transpose(-1, -2) @ v).to(dtype), log_decay.mean(-1, dtype=dtype)

    def remembered(self, past: Past, entry: Entry, window: int | None) -> Past:
        """Without a window the images are added up in one state."""
        kept = super().remembered(past, entry, window)
        return kept if window is not None else ((_state(kept), entry[1]),)

    def _read(self, q: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
        read = log_decay.cumsum(-1) if self.decay == "cumsum" else log_decay.mean(-1, keepdim=True)
        return (q * read.exp()[..., None]) @ state.to(q.dtype)


def image_mixing(across: Across, decay: Decay | None) -> ImageMixing:
    """The rule of that name.

    Args:
        across: attention across images.
        decay: of linear attention; None is "cumsum". Others have none.

    Raises:
        ValueError: for another name, or a decay of a rule that has none.
    """
    if across not in get_args(Across):
        raise ValueError(f"across must be one of {', '.join(get_args(Across))}, got {across!r}")
    if across == "linear":
        if decay not in (None, *get_args(Decay)):
            raise ValueError(f"decay must be one of {', '.join(get_args(Decay))}, got {decay!r}")
        return GatedLinearMixing(decay or "cumsum")
    if decay is not None:
        raise ValueError(f"decay={decay!r} belongs to across='linear', got across={across!r}: set decay to null")
    return SoftmaxMixing() if across == "full" else NoMixing()


class HybridAttention(nn.Module):
    """Multi-head attention over sequences of images, gated at its output: (T, N, width) -> (T, N, width).

    Queries, keys and values are divided by their root mean square over the width (the paper's code normalises before it
    splits the heads), keys by sqrt(E) besides. The sum of what an image takes from itself and from earlier ones is
    normalised for each head, multiplied by ``silu(W x)`` and projected. The gates of linear attention are
    ``sigmoid(w (x + c))^(1/16)`` for each head and token, c the conditioning of the image. No layer has a bias.

    Args:
        width: token size D.
        num_heads: number of heads H; divides ``width``.
        mixing: the rule; see :func:`image_mixing`.

    Raises:
        ValueError: ``num_heads`` does not divide ``width``.

    References:
        Hui et al. (2025), ARFlow, arXiv 2501.16085, section 3.
    """

    end_layers: ClassVar[frozenset[str]] = frozenset({"decay"})

    def __init__(self, width: int, num_heads: int, mixing: ImageMixing) -> None:
        super().__init__()
        check_count("num_heads", num_heads, at_most=width, hint=f"it must divide the width {width}")
        if width % num_heads:
            raise ValueError(f"num_heads is {num_heads}; give a divisor of the width {width}")
        self.num_heads = num_heads
        self.mixing = mixing
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.decay = nn.Linear(width, num_heads, bias=False) if mixing.gated else nn.Identity()
        self.gate = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x_TND: Tensor, condition_TD: Tensor, group_size: int = 1) -> Tensor:
        """Attend within all images and across those of each sequence.

        Args:
            x_TND: tokens, the images of a sequence one after the other, shape (T, N, width).
            condition_TD: conditioning of the images, shape (T, width).
            group_size: images of a sequence, a divisor of T.
        """
        return self._project_out(x_TND, self.mixing.parallel(*self._project(x_TND, condition_TD), group_size))

    def extend(self, x_BND: Tensor, condition_BD: Tensor, past: Past) -> tuple[Tensor, Entry]:
        """One image of each sequence, given what is remembered of those before.

        Returns:
            Tokens (B, N, width), and what is to be remembered of these images.
        """
        q, k, v, log_decay = self._project(x_BND, condition_BD)
        mixed = self.mixing.recurrent(q, k, v, log_decay, past)
        return self._project_out(x_BND, mixed), self.mixing.entry(k, v, log_decay)

    def _project(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkv = self.qkv(x).unflatten(-1, (3, -1))
        heads = _normalised(qkv).unflatten(-1, (self.num_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        k = k / math.sqrt(k.shape[-1])
        if not self.mixing.gated:
            return q, k, v, None
        return q, k, v, logsigmoid(self.decay(x + condition[:, None])).transpose(1, 2) / GATE_NORMALIZER

    def _project_out(self, x: Tensor, mixed_THNE: Tensor) -> Tensor:
        mixed = _normalised(mixed_THNE).transpose(1, 2).flatten(2)
        projected: Tensor = self.output(silu(self.gate(x)) * mixed)
        return projected


def _normalised(x: Tensor) -> Tensor:
    """The last axis divided by its root mean square, without weights."""
    return rms_norm(x, x.shape[-1:], eps=_EPS)


def _within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, scale=1.0)


def _joined(x_THNE: Tensor, group_size: int) -> Tensor:
    """The tokens of a sequence in one axis, (B, H, S N, E)."""
    return x_THNE.unflatten(0, (-1, group_size)).transpose(1, 2).flatten(2, 3)


def _decays(mean_BSH: Tensor) -> Tensor:
    """How much of image j is left in the state that image i reads, (B, H, S, S): 0 unless j < i."""
    total = mean_BSH.transpose(1, 2).cumsum(-1)
    before = total - mean_BSH.transpose(1, 2)
    size = total.shape[-1]
    earlier = torch.ones(size, size, dtype=torch.bool, device=total.device).tril(-1)
    return (before[..., :, None] - total[..., None, :]).masked_fill(~earlier, -math.inf).exp()


def _state(past: Past) -> Tensor:
    """The state after some images, the oldest first."""
    state = past[0][0]
    for product, log_decay in past[1:]:
        state = state * log_decay.exp()[..., None, None] + product
    return state
