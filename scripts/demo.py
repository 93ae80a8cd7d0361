"""A small byte-level language model in the manner of Mamba-2, on real text.

It trains through ``causal_conv1d_fn``, then reads a prompt and writes on through
``causal_conv1d_update``, a token at a time. Fails if the loss does not fall, or if the logits of
the token-by-token form are not those of the same model on the whole sequence. Needs tqdm.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from causal_conv1d import _library, causal_conv1d_fn, causal_conv1d_update
from causal_conv1d._installation import tick

TEXTS = ("/usr/share/common-licenses/GPL-3", Path(__file__).resolve().parent.parent / "README.md")
WIDTH = 4
LEAST_STEPS = 60  # in which the loss falls enough, on a machine however slow


class Mixer(nn.Module):
    """h_t = decay_t h_{t-1} + dt_t B_t x_t^T, out_t = h_t^T C_t for each head; x, B and C come from
    a causal convolution with SiLU, and a gate multiplies the result."""

    def __init__(self, dim, heads, head_dim, state_dim):
        super().__init__()
        self.heads, self.head_dim, self.state_dim = heads, head_dim, state_dim
        self.inner = heads * head_dim
        self.conv_dim = self.inner + 2 * state_dim
        self.norm = nn.RMSNorm(dim)
        self.in_proj = nn.Linear(dim, self.inner + self.conv_dim + heads, bias=False)
        self.conv_weight = nn.Parameter(torch.randn(self.conv_dim, WIDTH) / WIDTH**0.5)
        self.conv_bias = nn.Parameter(torch.zeros(self.conv_dim))
        self.log_rate = nn.Parameter(torch.linspace(-4, 0, heads))
        self.skip = nn.Parameter(torch.ones(heads, 1))
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def split(self, u):
        sizes = (self.inner, self.conv_dim, self.heads)
        gate, xbc, dt = self.in_proj(self.norm(u)).split(sizes, dim=-1)
        dt = F.softplus(dt)
        return gate, xbc, dt, -dt * self.log_rate.exp()

    def split_conv(self, xbc):
        x, b, c = xbc.split((self.inner, self.state_dim, self.state_dim), dim=-1)
        return x.unflatten(-1, (self.heads, self.head_dim)), b, c

    def forward(self, u):
        """The whole sequence (batch, seqlen, dim) at once, and the state after it."""
        gate, xbc, dt, log_decay = self.split(u)
        # (batch, dim, seqlen) without a copy: the channels stay the contiguous axis.
        xbc, conv_state = causal_conv1d_fn(
            xbc.transpose(1, 2),
            self.conv_weight,
            self.conv_bias,
            return_final_states=True,
            activation="silu",
        )
        x, b, c = self.split_conv(xbc.transpose(1, 2))
        # The recurrence, written out as a sum over all s <= t.
        total = log_decay.cumsum(1).transpose(1, 2)
        between = total[..., :, None] - total[..., None, :]  # of s to t, (batch, head, t, s)
        later = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
        decay = between.masked_fill(later, float("-inf")).exp()
        scores = (c @ b.transpose(1, 2))[:, None] * decay * dt.transpose(1, 2)[..., None, :]
        y = torch.einsum("bhts,bshp->bthp", scores, x) + self.skip * x
        weights = decay[:, :, -1] * dt.transpose(1, 2)
        h = torch.einsum("bhs,bsn,bshp->bhnp", weights, b, x)
        return u + self.out_proj(y.flatten(2) * F.silu(gate)), (conv_state, h)

    def step(self, u, state):
        """One token (batch, dim); the state changes in place."""
        conv_state, h = state
        gate, xbc, dt, log_decay = self.split(u)
        xbc = causal_conv1d_update(
            xbc.contiguous(), conv_state, self.conv_weight, self.conv_bias, "silu"
        )
        x, b, c = self.split_conv(xbc)
        h.mul_(log_decay.exp()[..., None, None])
        h.add_(torch.einsum("bh,bn,bhp->bhnp", dt, b, x))
        y = torch.einsum("bn,bhnp->bhp", c, h) + self.skip * x
        return u + self.out_proj(y.flatten(1) * F.silu(gate))


class Model(nn.Module):
    def __init__(self, dim=96, layers=3, heads=6, head_dim=32, state_dim=16):
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.mixers = nn.ModuleList(Mixer(dim, heads, head_dim, state_dim) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens):
        u, states = self.embedding(tokens), []
        for mixer in self.mixers:
            u, state = mixer(u)
            states.append(state)
        return self.head(self.norm(u)), states

    def step(self, token, states):
        u = self.embedding(token)
        for mixer, state in zip(self.mixers, states, strict=True):
            u = mixer.step(u, state)
        return self.head(self.norm(u))


def train(model, text, steps, seconds, batch, seqlen):
    """The losses of the steps; it ends early once the time is over, but not before LEAST_STEPS."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses, start = [], time.monotonic()
    bar = tqdm(range(steps), unit="step", mininterval=0.1 if sys.stderr.isatty() else 5, ncols=90)
    for _ in bar:
        begins = torch.randint(len(text) - seqlen - 1, (batch,))
        rows = torch.stack([text[i : i + seqlen + 1] for i in begins.tolist()])
        logits, _ = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix_str(f"loss {losses[-1]:.3f}", refresh=False)
        if len(losses) >= LEAST_STEPS and time.monotonic() - start > seconds:
            break
    bar.close()
    return losses


@torch.inference_mode()
def write(model, prompt, length, temperature=0.6):
    """The prompt and the tokens written after it, and the logits each was drawn from."""
    logits, states = model(prompt[None])
    tokens, all_logits = [], [logits[:, -1]]
    for _ in range(length):
        probabilities = (all_logits[-1].float() / temperature).softmax(-1)
        tokens.append(torch.multinomial(probabilities, 1)[:, 0])
        all_logits.append(model.step(tokens[-1], states))
    return torch.cat([prompt, *tokens]), torch.cat(all_logits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--seconds",
        type=float,
        default=60,
        help=f"end the training after this time, but not before {LEAST_STEPS} steps",
    )
    parser.add_argument("--length", type=int, default=300, help="bytes to write")
    parser.add_argument("--text", type=Path, default=next(t for t in TEXTS if Path(t).exists()))
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available() and _library.cuda.problem is None
    device = arguments.device or ("cuda" if has_gpu else "cpu")

    torch.manual_seed(0)
    data = bytearray(Path(arguments.text).read_bytes())
    text = torch.frombuffer(data, dtype=torch.uint8).long().to(device)
    model = Model().to(device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{arguments.text}: {len(data):,} bytes; {count:,} parameters on {device}")
    least = min(LEAST_STEPS, arguments.steps)
    print(
        f"Training: {arguments.steps} steps (--steps), or fewer once {arguments.seconds:.0f} s are "
        f"over (--seconds), but at least {least}, so that the loss falls on a slow machine too",
        flush=True,
    )

    start = time.monotonic()
    losses = train(model, text, arguments.steps, arguments.seconds, batch=8, seqlen=256)
    first, last = losses[0], sum(losses[-10:]) / len(losses[-10:])
    print(
        f"{len(losses)} steps in {time.monotonic() - start:.1f} s: loss {first:.3f} to {last:.3f}"
    )

    prompt = torch.tensor(list(b"  The "), device=device)
    start = time.monotonic()
    tokens, logits = write(model, prompt, arguments.length)
    seconds = time.monotonic() - start
    print(f"{arguments.length} bytes written in {seconds:.2f} s, token by token:\n")
    print("    " + bytes(tokens.tolist()).decode(errors="replace").replace("\n", "\n    ") + "\n")

    with torch.inference_mode():
        whole = model(tokens[None])[0][0, len(prompt) - 1 :]
    error = ((logits - whole).norm() / whole.norm()).item()
    fell, agree = last < 0.8 * first, error < 1e-4
    print("What this showed:")
    print(
        f"{tick(fell)} causal_conv1d_fn and its gradient train a model: the loss went from "
        f"{first:.2f} to {last:.2f}"
    )
    print(
        f"{tick(agree)} causal_conv1d_update, token by token, gives the logits that the whole "
        f"sequence gives: relative error {error:.0e}"
    )
    return 0 if fell and agree else 1


if __name__ == "__main__":
    sys.exit(main())
