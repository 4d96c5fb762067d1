"""PyTorch's encoder-decoder Transformer with embeddings and positions, and beam search with it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.translation.data import BOS, EOS, PAD
from experiments.translation.settings import Settings


class Translator(nn.Module):
    """`nn.Transformer` in post-norm as in Vaswani et al.; all its norms are LayerNorm (section B.5).

    Sinusoidal positions, embeddings times sqrt(d_model), the output projection tied to the decoder's embedding.
    """

    def __init__(self, s: Settings, vocabulary: int):
        super().__init__()
        self.d_model, self.dropout = s.d_model, nn.Dropout(s.dropout)
        self.target_embedding = nn.Embedding(vocabulary, s.d_model, padding_idx=PAD)
        self.source_embedding = (
            self.target_embedding if s.share_all else nn.Embedding(vocabulary, s.d_model, padding_idx=PAD)
        )
        self.transformer = nn.Transformer(s.d_model, s.heads, s.layers, s.layers, s.ffn, s.dropout, batch_first=True)
        # torch adds a norm after each stack, which only the pre-norm form needs.
        self.transformer.encoder.norm = self.transformer.decoder.norm = None
        self.transformer.encoder.use_nested_tensor = False
        for layer in [*self.transformer.encoder.layers, *self.transformer.decoder.layers]:
            _drop_only_residuals(layer)
        for embedding in {self.source_embedding, self.target_embedding}:
            nn.init.normal_(embedding.weight, std=s.d_model**-0.5)
            with torch.no_grad():
                embedding.weight[PAD].zero_()

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        """Logits [B, T, V] of the next token from source [B, S] and decoder input [B, T]."""
        return self.decode(shifted, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Memory [B, S, d_model] and its padding mask [B, S]."""
        padding = source == PAD
        embedded = self._embed(self.source_embedding, source)
        return self.transformer.encoder(embedded, src_key_padding_mask=padding), padding

    def decode(self, shifted: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Logits [B, T, V]. Padding of the decoder input needs no mask, because it comes after all real tokens."""
        mask = torch.ones(shifted.shape[1], shifted.shape[1], dtype=torch.bool, device=shifted.device).triu(1)
        embedded = self._embed(self.target_embedding, shifted)
        hidden = self.transformer.decoder(
            embedded, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padding
        )
        return F.linear(hidden, self.target_embedding.weight)

    def _embed(self, embedding: nn.Module, pieces: Tensor) -> Tensor:
        positions = sinusoids(pieces.shape[1], self.d_model).to(pieces.device)
        return self.dropout(embedding(pieces) * math.sqrt(self.d_model) + positions)


def _drop_only_residuals(layer: nn.Module) -> None:
    """Apply dropout only to embeddings and additions to the residual stream, as in Vaswani et al. (section 5.4) and
    fairseq; torch's layers also drop attention weights and hidden units."""
    for module in layer.children():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    layer.dropout = nn.Identity()


def sinusoids(length: int, width: int) -> Tensor:
    """Positions [length, width]: sines in the first half, cosines in the second."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10000) / (width // 2)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def token_loss(model: nn.Module, source: Tensor, shifted: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Label-smoothed cross-entropy in nats, the mean over the micro-batch's target tokens, shape []."""
    logits = model(source, shifted)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 would lose the small terms
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=PAD, label_smoothing=smoothing)


@torch.no_grad()
def beam_search(model: Translator, source: Tensor, beam: int, max_length: Tensor) -> list[list[int]]:
    """The best translation of each source [B, S] by the mean log-probability of its tokens, EOS included.

    Each sentence keeps its `beam` most probable hypotheses; finished ones keep their probability. `max_length` [B]
    bounds the number of tokens before EOS.

    Returns:
        Tokens of each sentence, without BOS and EOS.
    """
    size, width = source.shape[0], beam
    memory, padding = (t.repeat_interleave(width, 0) for t in model.encode(source))
    pieces = torch.full((size * width, 1), BOS, device=source.device)
    scores = torch.full((size, width), -math.inf, device=source.device)
    scores[:, 0] = 0  # all beams start equal, so only one of them may branch
    ended = torch.zeros(size, width, dtype=torch.bool, device=source.device)
    first = torch.arange(size, device=source.device)[:, None] * width
    for length in range(int(max_length.max()) + 1):
        log_p = model.decode(pieces, memory, padding)[:, -1].float().log_softmax(-1).view(size, width, -1)
        _allow(log_p, ended, must_end=(max_length <= length)[:, None])
        vocabulary = log_p.shape[-1]
        scores, chosen = (scores[:, :, None] + log_p).flatten(1).topk(width)
        parent, piece = chosen // vocabulary, chosen % vocabulary
        ended = ended.gather(1, parent) | (piece == EOS)
        pieces = torch.cat([pieces[(first + parent).flatten()], piece.view(-1, 1)], 1)
        if bool(ended.all()):
            break
    hypotheses = pieces[:, 1:].view(size, width, -1)
    best = (scores / (hypotheses != PAD).sum(-1)).argmax(1)
    chosen_pieces = hypotheses[torch.arange(size, device=source.device), best].tolist()
    return [[p for p in sentence if p not in (PAD, EOS)] for sentence in chosen_pieces]


def _allow(log_p: Tensor, ended: Tensor, must_end: Tensor) -> None:
    """Mask log-probabilities [B, beam, V] in place: finished hypotheses continue with PAD at no cost, others cannot."""
    log_p[..., PAD] = log_p[..., BOS] = -math.inf
    end = log_p[..., EOS].clone()
    log_p.masked_fill_((ended | must_end)[..., None], -math.inf)
    log_p[..., EOS] = torch.where(ended, -math.inf, end)
    log_p[..., PAD].masked_fill_(ended, 0.0)
