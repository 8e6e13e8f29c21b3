"""How fast chapter 5 generates, against the document's loop, and with guidance."""

import torch
import torch.nn as nn
from torch import Tensor

from minigen.bench import Row, medians
from minigen.imagegpt import ImageGPT, ImageGPTConfig
from minigen.sampling import Guidance

CODES, TOKENS = 1024, 256  # an image of 16 x 16 tokens


class DocumentImageGPT(nn.Module):
    """The model as the document gives it, slips included."""

    def __init__(self, n_codes, seq_len, d_model, n_heads, n_layers):
        super().__init__()
        self.tok_emb = nn.Embedding(n_codes + 1, d_model)  # +1 for BOS token
        self.pos_emb = nn.Embedding(seq_len + 1, d_model)
        encoder_layer = nn.TransformerEncoderLayer(d_model, n_heads, d_model*4,
                                                   batch_first=True)
        self.transformer = nn.TransformerEncoder(encoder_layer, n_layers)
        self.head = nn.Linear(d_model, n_codes)

    def forward(self, tokens):
        B, T = tokens.shape
        pos = torch.arange(T, device=tokens.device).unsqueeze(0)
        x = self.tok_emb(tokens) + self.pos_emb(pos)
        # Causal mask
        mask = torch.triu(torch.ones(T, T, device=tokens.device), diagonal=1).bool()
        x = self.transformer(x, mask=mask)
        return self.head(x)  # logits over n_codes

    @torch.no_grad()
    def generate(self, prompt_tokens, n_new, temperature=1.0, top_k=2048):
        tokens = prompt_tokens.clone()
        for _ in range(n_new):
            logits = self(tokens)[:, -1, :] / temperature
            if top_k: logits[logits < logits.topk(top_k)[0][:,-1:]] = -float('inf')  # noqa: E701
            probs = logits.softmax(-1)
            next_tok = torch.multinomial(probs, 1)
            tokens = torch.cat([tokens, next_tok], dim=1)
        return tokens


def document_seconds(model: DocumentImageGPT, images: int, windows: int,
                     repetitions: int) -> float:
    """Seconds of the document's loop: steps timed at some lengths, then integrated."""
    lengths = torch.linspace(1, TOKENS - 1, windows).long()
    prompts = {n: torch.randint(CODES, (images, n)) for n in lengths.tolist()}
    times = medians({n: lambda x=x: model.generate(x, 1, top_k=CODES)
                     for n, x in prompts.items()}, repetitions)
    return torch.trapezoid(torch.tensor(list(times.values())), lengths.float()).item()


@torch.inference_mode()
def cached_logits(model: ImageGPT, tokens: Tensor, labels: Tensor) -> Tensor:
    """The logits of `model(tokens, labels)`, computed token by token with the cache."""
    start = model.class_embedding(labels, len(labels))[:, None]
    x = torch.cat([start, model.tokens(tokens)], dim=1)
    cache = model.transformer.cache(len(tokens))
    hidden = [model.transformer(one, cache) for one in x.split(1, dim=1)]
    return model.head(torch.cat(hidden, dim=1))


def rows(quick: bool = False) -> list[Row]:
    """Chapter 5's table; `quick` takes width 128 and 2 layers instead of 512 and 6."""
    torch.manual_seed(0)
    dim, heads, depth = (128, 4, 2) if quick else (512, 8, 6)
    windows, repetitions = (4, 2) if quick else (9, 3)
    document = DocumentImageGPT(CODES, TOKENS, dim, heads, depth).eval()
    model = ImageGPT(ImageGPTConfig(
        codebook_size=CODES, height=16, width=16, classes=10, dim=dim, heads=heads,
        depth=depth)).eval()
    found = []
    for images, least in ((1, 5), (8, 10)):
        ours = medians({"ours": lambda n=images: model.generate(n, top_k=CODES)},
                       repetitions)["ours"]
        theirs = document_seconds(document, images, windows, repetitions)
        found.append(Row(
            f"{TOKENS} tokens, {images} at once, cached against the document's loop",
            theirs / ours, "x", None if quick else least,
            note=f"{ours:.2f} s against {theirs:.1f} s, the latter integrated from "
                 f"{windows} lengths"))
    tokens, labels = torch.randint(CODES, (4, TOKENS - 1)), torch.arange(4)
    with torch.inference_mode():
        error = cached_logits(model, tokens, labels) - model(tokens, labels)
    found.append(Row(
        f"largest difference of the logits at {TOKENS} positions to the cache's",
        error.abs().max().item(), "", 1e-4, at_least=False))
    for images in (1, 8):
        labels = torch.arange(images)
        time = medians({guidance.scale: lambda n=images, g=guidance, y=labels:
                        model.generate(n, y, guidance=g)
                        for guidance in (Guidance(1.0), Guidance(2.0))}, repetitions)
        found.append(Row(
            f"time of guided generation against unguided, {images} at once",
            time[2.0] / time[1.0], "x",
            note=f"{time[2.0]:.2f} s against {time[1.0]:.2f} s"))
    return found
