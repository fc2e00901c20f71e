"""Dump the logits of a causal language model of `transformers` on a text, for `gklx score`.

    python examples/dump_transformers.py org/model text.txt original
    python examples/dump_transformers.py org/model-int4 text.txt int4
    gklx score int4-logits.npy original-logits.npy --targets original-targets.npy

It writes NAME-logits.npy [samples, classes], in float16 if the model computes in half precision, and NAME-targets.npy.
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_name: str, text_path: str, name: str, window: int = 512) -> None:
    """Dump window by window: each token of a window except the last is a sample, and the next token is its target."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open(text_path, encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(model_name)(file.read(), return_tensors="pt").input_ids[0]
    windows = [x for x in ids.split(window) if len(x) > 1]
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto").to(device).eval()
    np.save(f"{name}-targets.npy", torch.cat([x[1:] for x in windows]).numpy())
    samples, at, file = sum(len(x) - 1 for x in windows), 0, None
    for tokens in windows:
        with torch.inference_mode():
            logits = model(tokens[None].to(device)).logits[0, :-1]
        stored = np.float32 if logits.dtype == torch.float32 else np.float16
        if file is None:
            file = np.lib.format.open_memmap(f"{name}-logits.npy", "w+", stored, (samples, logits.shape[-1]))
        file[at : at + len(logits)] = logits.float().cpu().numpy()
        at += len(logits)
    print(f"{name}-logits.npy: {samples:,} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
