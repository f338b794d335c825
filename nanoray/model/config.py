"""The shape of a GPT: nanochat's seven fields, the recipe, and all that follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from nanoray.errors import NanorayError

RecipeName = Literal["july", "february"]

VOCAB_PADDING = 64  # weights are padded to whole tensor-core tiles; logits are cropped again
ROTARY_FACTOR = 10  # rotary tables reach this many sequence lengths: the hard context


@dataclass(frozen=True)
class Architecture:
    """What a recipe fixes beside the seven shape fields (nanochat, July and February 2026)."""

    gate_channels: int  # leading channels of the normed x that a value gate reads
    gate_scale: float  # value gate = gate_scale * sigmoid(...)
    gate_init_max: float  # gates start as U(0, gate_init_max)
    qk_scale: float  # factor on q and on k after their norm
    rope_base: float
    rotary_always_bf16: bool
    wte_std: float
    fc_scale: float  # factor on the MLP's first matrix at init
    resid_lambda: tuple[float, float]  # first and last layer, linear in between
    x0_lambda: tuple[float, float]
    smear_channels: int  # 0: neither smear nor backout


ARCHITECTURES: dict[str, Architecture] = {
    "july": Architecture(
        gate_channels=12,
        gate_scale=3.0,
        gate_init_max=0.02,
        qk_scale=1.2,
        rope_base=100_000.0,
        rotary_always_bf16=False,
        wte_std=0.8,
        fc_scale=0.4,
        resid_lambda=(1.15, 1.05),
        x0_lambda=(0.20, 0.05),
        smear_channels=24,
    ),
    "february": Architecture(
        gate_channels=32,
        gate_scale=2.0,
        gate_init_max=0.0,
        qk_scale=1.0,
        rope_base=10_000.0,
        rotary_always_bf16=True,
        wte_std=1.0,
        fc_scale=1.0,
        resid_lambda=(1.0, 1.0),
        x0_lambda=(0.1, 0.1),
        smear_channels=0,
    ),
}


@dataclass(frozen=True)
class GPTConfig:
    """A model's shape. The first seven fields are nanochat's; `recipe` picks the architecture.

    Raises NanorayError on construction when the fields cannot describe a model.
    """

    sequence_len: int = 2048
    """Training context T in tokens; windows and the rotary length follow it."""
    vocab_size: int = 32768
    """Number of token ids; weights are padded to a multiple of 64, logits cropped."""
    n_layer: int = 12
    """Number of blocks (the depth)."""
    n_head: int = 6
    """Number of query heads."""
    n_kv_head: int = 6
    """Number of key/value heads (fewer than n_head: grouped-query attention)."""
    n_embd: int = 768
    """Model width D."""
    window_pattern: str = "SSSL"
    """S = short, L = long window, tiled over the layers; the last layer is always L."""
    recipe: RecipeName = "july"
    """Which nanochat the architecture is: July or February 2026."""

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise NanorayError(f"{name} must be a whole number of at least 1, not {value!r}.")
        if self.recipe not in ARCHITECTURES:
            names = " or ".join(ARCHITECTURES)
            raise NanorayError(f"recipe must be {names}, not {self.recipe!r}.")
        if not self.window_pattern or set(self.window_pattern.upper()) - set("SL"):
            raise NanorayError(
                f"window_pattern {self.window_pattern!r} may only hold the letters S and L."
            )
        if self.n_embd % self.n_head:
            raise NanorayError(
                f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}; "
                "change the width or the number of heads."
            )
        if self.n_head % self.n_kv_head:
            raise NanorayError(
                f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}."
            )
        if self.head_dim % 2:
            raise NanorayError(
                f"the head width n_embd / n_head = {self.head_dim} must be even, for rotary."
            )
        least = max(self.architecture.gate_channels, self.architecture.smear_channels)
        if self.n_embd < least:
            raise NanorayError(
                f"n_embd must be at least {least}, the channels that the gates of the "
                f"{self.recipe} recipe read, not {self.n_embd}."
            )

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.recipe]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        """Width of the keys, the values and the value embeddings."""
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING

    @property
    def rotary_len(self) -> int:
        """The longest input in tokens that the model can read (the hard context)."""
        return ROTARY_FACTOR * self.sequence_len

    @property
    def backout_layer(self) -> int:
        """The block (0-based) whose output July subtracts again before the final norm."""
        return self.n_layer // 2

    def window_sizes(self) -> tuple[int, ...]:
        """Earlier tokens visible to a token, per layer. They follow T, not the input's length."""
        long = self.sequence_len
        # February: half of T. July: a quarter, rounded up to FlashAttention-3's tile of 128.
        short = long // 2 if self.recipe == "february" else -(-long // 512) * 128
        pattern = self.window_pattern.upper()
        letters = [pattern[layer % len(pattern)] for layer in range(self.n_layer)]
        return (*(long if letter == "L" else short for letter in letters[:-1]), long)

    def has_value_embedding(self, layer: int) -> bool:
        """Alternating layers, counted so that the last one always has a value embedding."""
        return layer % 2 == (self.n_layer - 1) % 2

    def num_parameters_by_group(self) -> dict[str, int]:
        """Parameters per optimiser group, and their `total`. Padding rows count."""
        arch, D, vocab = self.architecture, self.n_embd, self.padded_vocab_size
        num_value_layers = sum(map(self.has_value_embedding, range(self.n_layer)))
        block = 2 * D * D + 2 * D * self.kv_dim + 8 * D * D
        gates = num_value_layers * arch.gate_channels * self.n_kv_head
        smear_and_backout = arch.smear_channels + 2 if arch.smear_channels else 0
        groups = {
            "wte": vocab * D,
            "value_embeds": num_value_layers * vocab * self.kv_dim,
            "lm_head": vocab * D,
            "transformer_matrices": self.n_layer * block + gates,
            "scalars": 2 * self.n_layer + smear_and_backout,
        }
        return {**groups, "total": sum(groups.values())}

    def num_scaling_parameters(self) -> int:
        """N of the scaling laws: block matrices + head."""
        groups = self.num_parameters_by_group()
        return groups["transformer_matrices"] + groups["lm_head"]

    def flops_per_token(self) -> int:
        """Training FLOPs (forward and backward) of one token: 6 per matmul weight + attention.

        The convention of PaLM (arXiv 2204.02311), with sliding windows, as nanochat counts.
        """
        num_matmul = self.num_scaling_parameters() + self.architecture.smear_channels
        attention = sum(
            12 * self.n_head * self.head_dim * min(window, self.sequence_len)
            for window in self.window_sizes()
        )
        return 6 * num_matmul + attention

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of to_dict; raises NanorayError for keys that it does not know."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise NanorayError(f"unknown key(s) in the model's config: {', '.join(unknown)}.")
        return cls(**values)
