"""How much faster than a plain loop? Needs `pip install transformers`; prints seed-epochs a second.

Both sides train 2 layers, 4 heads, dim 64 on V = 800 with AdamW and batches of 64, and evaluate on
all 400 sentences after every epoch, in turns. Plain: the published GPT-2 of Hugging Face in eager
mode, one seed, whole sentences of 3 tokens, batches from a DataLoader. Ours: all seeds at once.
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

EPOCHS = 20


def plain(seeds):
    generator = torch.Generator().manual_seed(0)
    data = revcurse.reversal_data(800, generator=generator)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=802, n_positions=3, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    batches = DataLoader(data.train, batch_size=64, shuffle=True, generator=generator)
    parts = [DataLoader(part, batch_size=64) for part in (data.train, data.validation)]
    started = time.perf_counter()
    for _ in range(EPOCHS):
        model.train()
        for batch in batches:
            labels = batch.clone()
            labels[:, :2] = -100  # loss on the last entity alone
            loss = model(batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            for part in parts:
                losses = [revcurse.nll(model(batch).logits[:, 1], batch[:, 2]) for batch in part]
                torch.cat(losses).mean().item()
    return EPOCHS / (time.perf_counter() - started)


def ours(seeds):
    generators = [torch.Generator().manual_seed(s) for s in range(seeds)]
    data = [revcurse.reversal_data(800, generator=g) for g in generators]
    models = [revcurse.GPT(802, 2, 2, 4, 64, generator=g) for g in generators]
    trainer = revcurse.Trainer(models, data, generators, lambda params: torch.optim.AdamW(
        params, lr=0.01, weight_decay=0.01, fused=True), epochs=EPOCHS)
    started = time.perf_counter()
    trainer.run()
    return seeds * EPOCHS / (time.perf_counter() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    logging.set_verbosity_error()
    plain(args.seeds), ours(args.seeds)  # warm up
    rates = {plain: [], ours: []}
    for _ in range(args.rounds):
        for side, found in rates.items():
            found.append(side(args.seeds))
    for side, found in rates.items():
        print(f"{side.__name__:5}  median {statistics.median(found):5.1f} seed-epochs/s  "
              f"({min(found):.1f} to {max(found):.1f})")
    ratios = [b / a for a, b in zip(rates[plain], rates[ours], strict=True)]
    print(f"ratio  median {statistics.median(ratios):.2f}  ({min(ratios):.2f} to "
          f"{max(ratios):.2f}), {args.seeds} seeds, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}")
