"""Trains a tiny language model of mamba_ssm and prints its losses as JSON.

usage: mamba_loss_curve.py FOLDER-WITH-mamba_ssm DEVICE LAYER(Mamba1|Mamba2) STEPS
"""

import json
import sys

import torch
from mamba_harness import prepare

folder, device, layer, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
sys.path.insert(0, folder)
prepare(device)

import mamba_ssm  # noqa: E402
from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402

assert mamba_ssm.__file__.startswith(folder), mamba_ssm.__file__
torch.manual_seed(0)
options = {"layer": layer} | (
    {"d_state": 8} if layer == "Mamba1" else {"d_state": 16, "headdim": 8}
)
config = MambaConfig(
    d_model=32, n_layer=2, vocab_size=32, ssm_cfg=options, fused_add_norm=False, rms_norm=False
)
model = mamba_ssm.MambaLMHeadModel(config, device=device, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(1)
losses = []
for _ in range(steps):
    # Each next token is the one before times 3, plus 1, or that plus 7.
    rows = [torch.randint(32, (4, 1), generator=generator)]
    for _ in range(24):
        rows.append((3 * rows[-1] + 1 + 7 * torch.randint(2, (4, 1), generator=generator)) % 32)
    ids = torch.cat(rows, dim=1).to(device)
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(json.dumps(losses))
