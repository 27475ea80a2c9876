"""How much faster than a plain loop? Needs `pip install transformers`; prints seed-epochs a second.

Both sides train on V = 800 with AdamW and batches of 64, in turns, and evaluate on all 400
sentences: plain after every epoch, ours after every --every epochs. Plain: the published GPT-2 of
Hugging Face in eager mode, one seed, whole sentences of 3 tokens, batches from a DataLoader,
float32. Ours: all seeds at once (--preset laptop), or one of the paper's size (--preset paper,
about 10 GB).
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, logging

sys.path.insert(0, str(Path(__file__).parent.parent))
import revcurse  # noqa: E402

# layers, heads, dim, dropout, seeds at once, epochs of a round
PRESETS = {"laptop": (2, 4, 64, 0.0, 10, 20), "paper": (24, 12, 768, 0.1, 1, 1)}


class Plain:
    def __init__(self, layers, heads, dim, dropout, device):
        self.seeds, self.device = 1, device
        generator = torch.Generator().manual_seed(0)
        data = revcurse.reversal_data(800, generator=generator)
        self.model = GPT2LMHeadModel(GPT2Config(
            vocab_size=802, n_positions=3, n_embd=dim, n_layer=layers, n_head=heads,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0,
            eos_token_id=0, tie_word_embeddings=False)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.01)
        self.batches = DataLoader(data.train, batch_size=64, shuffle=True, generator=generator)
        self.parts = [DataLoader(part, batch_size=64) for part in (data.train, data.validation)]

    def epoch(self, _):
        self.model.train()
        for batch in self.batches:
            batch = batch.to(self.device)
            labels = batch.clone()
            labels[:, :2] = -100  # loss on the last entity alone
            loss = self.model(batch, labels=labels).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.model.eval()
        with torch.no_grad():
            for part in self.parts:
                losses = [revcurse.nll(self.model(batch).logits[:, 1], batch[:, 2])
                          for batch in (batch.to(self.device) for batch in part)]
                torch.cat(losses).mean().item()


class Ours:
    def __init__(self, layers, heads, dim, dropout, device, seeds, epochs, bf16):
        self.seeds = seeds
        generators = [torch.Generator().manual_seed(s) for s in range(seeds)]
        data = [revcurse.reversal_data(800, generator=g) for g in generators]
        models = [revcurse.GPT(802, 2, layers, heads, dim, dropout=dropout, generator=g)
                  for g in generators]
        self.trainer = revcurse.Trainer(models, data, generators, lambda params: torch.optim.AdamW(
            params, lr=0.01, weight_decay=0.01, fused=True), epochs=epochs, device=device,
            bf16=bf16, points=list(range(epochs + 1)))

    def epoch(self, every):
        for _ in range(self.trainer.steps_per_epoch):
            self.trainer.step()
        if self.trainer.steps // self.trainer.steps_per_epoch % every == 0:
            self.trainer.evaluate()
        if self.trainer.evaluations % 10 == 0 and self.trainer.curves.is_cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="laptop")
    parser.add_argument("--precision", choices=["highest", "high", "bf16"], default="highest")
    parser.add_argument("--every", type=int, default=1,
                        help="epochs between our evaluations; 3 in a run of 150, 60 in one of 3000")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high" if args.precision == "high" else "highest")
    *size, seeds, epochs = PRESETS[args.preset]
    epochs = max(epochs, args.every)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = {"plain": Plain(*size, device), "ours": Ours(
        *size, device, seeds, epochs * (args.rounds + 1), args.precision == "bf16")}
    rates = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            for _ in range(epochs):
                side.epoch(args.every)
            if device == "cuda":
                torch.cuda.synchronize()
            rates[name].append(side.seeds * epochs / (time.perf_counter() - started))
    rates = {name: found[1:] for name, found in rates.items()}  # the first round warms up
    for name, found in rates.items():
        print(f"{name:5}  median {statistics.median(found):.3g} seed-epochs/s  "
              f"({min(found):.3g} to {max(found):.3g})")
    ratios = [b / a for a, b in zip(rates["plain"], rates["ours"], strict=True)]
    print(f"ratio  median {statistics.median(ratios):.2f}  ({min(ratios):.2f} to "
          f"{max(ratios):.2f}), {seeds} seeds, every {args.every}, {args.precision}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")
