"""Diffusion transformer: (z_t, t, condition) -> output.

The latent is split into tokens, one per p x p patch, with 2-D rotary position embeddings. Each block is modulated by
the timestep and the pooled condition (adaLN-zero) and, with text, attends to the caption's tokens. Blocks use RMSNorm,
SwiGLU, and normalised queries and keys. This module imports only torch and diffusers.

Sources: Peebles & Xie 2023, arXiv:2212.09748 (adaLN-zero); Yao et al. 2025, arXiv:2501.01423
(SwiGLU, RMSNorm, RoPE); Dehghani et al. 2023, arXiv:2302.05442 (qk-norm).
"""

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Embed timesteps as sines and cosines with geometrically spaced frequencies, [b] -> [b, dim]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=timesteps.device) / (dim // 2))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_angles(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles, each [height * width, head_dim / 2].

    The first half of the angles encodes the row, the second half the column.
    """
    quarter = head_dim // 4
    frequencies = 100.0 ** (-torch.arange(quarter, device=device) / quarter)
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    angles = torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1).flatten(0, 1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of x [b, heads, tokens, d] by each token's angles."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in float32 even under autocast; the output has the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context, with normalised queries and keys."""

    def __init__(self, dim: int, head_dim: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_kv = nn.Linear(context_dim or dim, 2 * dim, bias=False)
        self.norm_q = RMSNorm(head_dim, eps=1e-6)
        self.norm_k = RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        batch, tokens, dim = x.shape
        context = x if context is None else context
        key, value = self.to_kv(context).chunk(2, dim=-1)
        query, key, value = (
            y.view(batch, -1, dim // self.head_dim, self.head_dim).transpose(1, 2) for y in (self.to_q(x), key, value)
        )
        query, key = self.norm_q(query), self.norm_k(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).reshape(batch, tokens, dim))


class SwiGLU(nn.Module):
    """x -> W_3 (silu(W_1 x) * W_2 x). The hidden width is 2/3 of a plain MLP's, so that the cost is the same."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio * 2 / 3 / 32 + 0.5) * 32
        if hidden <= 0:
            raise ValueError(f"mlp_ratio must be at least {24 / dim:g} with hidden_dim={dim}; got {mlp_ratio}")
        self.gate_and_value = nn.Linear(dim, 2 * hidden)
        self.out = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Self-attention, optional cross-attention to the caption, and SwiGLU. The gates are initialised to 0."""

    def __init__(self, dim: int, head_dim: int, mlp_ratio: float, context_dim: int | None) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, head_dim)
        self.norm2 = RMSNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = SwiGLU(dim, mlp_ratio)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.cross_attention = None
        if context_dim is not None:
            self.norm_cross = RMSNorm(dim, eps=1e-6)
            self.cross_attention = Attention(dim, head_dim, context_dim)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1, rotary=rotary)
        if self.cross_attention is not None:
            x = x + self.cross_attention(self.norm_cross(x), context, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer.

    Args:
        sample_size: Height and width of the latents during training.
        in_channels: Number of latent channels C.
        out_channels: C, or 2C if the variance is learned.
        patch_size: Patch size p in latent pixels; must divide sample_size.
        hidden_dim: Width of the token embeddings.
        depth: Number of blocks.
        head_dim: Width of an attention head; must be a multiple of 4 that divides hidden_dim.
        mlp_ratio: Hidden width of a plain MLP divided by hidden_dim; SwiGLU uses 2/3 of that hidden width.
        text_dim: Width of the caption's token embeddings; None if not conditioned on text.
        num_classes: Number of classes; None if not conditioned on classes. Label `num_classes` is the null class.
        cross_attention_every: If conditioned on text, every n-th block attends to the caption's tokens, where n is this
            value. 0 disables cross-attention, so that the network sees only the pooled caption.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int = 384,
        depth: int = 12,
        head_dim: int = 64,
        mlp_ratio: float = 4.0,
        text_dim: int | None = None,
        num_classes: int | None = None,
        cross_attention_every: int = 1,
    ) -> None:
        super().__init__()
        if hidden_dim % head_dim or head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4 that divides hidden_dim ({hidden_dim}); got {head_dim}")
        if sample_size % patch_size:
            raise ValueError(f"patch_size must divide the latent size ({sample_size}); got {patch_size}")
        self.patch_in = nn.Linear(in_channels * patch_size**2, hidden_dim)
        self.time_mlp = nn.Sequential(nn.Linear(256, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim))
        if text_dim is not None:
            self.pooled_mlp = nn.Sequential(
                nn.Linear(text_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim)
            )
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, hidden_dim)
        every = cross_attention_every
        self.blocks = nn.ModuleList(
            Block(hidden_dim, head_dim, mlp_ratio, text_dim if every and i % every == every - 1 else None)
            for i in range(depth)
        )
        self.norm_out = RMSNorm(hidden_dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.patch_out = nn.Linear(hidden_dim, out_channels * patch_size**2)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        zero_layers = [self.modulation_out, self.patch_out]
        for block in self.blocks:
            assert isinstance(block, Block)
            zero_layers.append(block.modulation)
            if block.cross_attention is not None:
                zero_layers.append(block.cross_attention.to_out)
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
        pooled: Tensor | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        """Return the network output for noisy latents.

        Args:
            sample: z_t, [b, C, h, w].
            timestep: [b], 0-based as in diffusers.
            tokens: Token embeddings of the captions, [b, l, text_dim].
            mask: 1 for tokens, 0 for padding, [b, l].
            pooled: Pooled embedding of each caption, [b, text_dim].
            label: Class labels, [b].
        """
        batch, _, height, width = sample.shape
        size = self.config.patch_size
        rows, columns = height // size, width // size
        x = F.pixel_unshuffle(sample, size).flatten(2).transpose(1, 2)
        x = self.patch_in(x)
        embedding = self.time_mlp(timestep_embedding(timestep, 256).to(x.dtype))
        if self.config.text_dim is not None:
            if tokens is None or mask is None or pooled is None:
                raise ValueError("This network is conditioned on text, so it needs tokens, mask and pooled.")
            embedding = embedding + self.pooled_mlp(pooled.to(x.dtype))
            tokens, mask = tokens.to(x.dtype), mask.bool()[:, None, None, :]
        if self.config.num_classes is not None:
            if label is None:
                raise ValueError("This network is conditioned on classes, so it needs the argument label.")
            embedding = embedding + self.class_embedding(label)
        embedding = F.silu(embedding)
        rotary = rotary_angles(rows, columns, self.config.head_dim, x.device)
        for block in self.blocks:
            x = block(x, embedding, rotary, tokens, mask)
        shift, scale = self.modulation_out(embedding)[:, None].chunk(2, dim=-1)
        x = self.patch_out(self.norm_out(x) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).reshape(batch, -1, rows, columns), size)
