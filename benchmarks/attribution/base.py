"""Trains the frozen base of the LoRA world: a byte-level GPT on the READMEs of ten packages that own nothing there.

    python -m benchmarks.attribution.base [--steps 2000]

Writes benchmarks/attribution/base.safetensors in float16; it is committed, since another machine's sums would give another base.
"""

import argparse

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from benchmarks.attribution.networks import BASE, CONTEXT, base_gpt
from benchmarks.attribution.texts import projects, windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = base_gpt()
    text = torch.cat([torch.from_numpy(windows(t, 1)).flatten() for _, t in projects("base")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    for step in range(given.steps):
        starts = torch.randint(len(text) - CONTEXT, (32,))
        x = text[starts[:, None] + torch.arange(CONTEXT + 1)]
        loss = cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == given.steps - 1:
            print(f"step {step:,}: {loss.item():.3f} nats a byte", flush=True)
    save_file({name: t.half().contiguous() for name, t in model.state_dict().items()}, BASE)


if __name__ == "__main__":
    main()
