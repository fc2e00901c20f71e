"""Dump the log-probabilities of vLLM's offline engine on a text, for `gklx score`.

    python examples/dump_vllm.py org/model text.txt original
    python examples/dump_vllm.py org/model-awq text.txt awq
    gklx score awq-logits.npy original-logits.npy --targets original-targets.npy

It writes NAME-logits.npy [samples, classes] in float32 and NAME-targets.npy. The engine returns Python dictionaries of
the whole vocabulary, so that some thousand samples take minutes. A few texts are enough: the report has the standard
errors.
"""

import sys

import numpy as np
from vllm import LLM, SamplingParams


def main(model_name: str, text_path: str, name: str, window: int = 512) -> None:
    """Dump window by window: each token of a prompt except the last is a sample, and the next token is its target."""
    engine = LLM(model=model_name, max_model_len=window + 1, max_logprobs=-1, logprobs_mode="raw_logprobs")
    with open(text_path, encoding="utf-8") as file:
        ids = engine.get_tokenizer().encode(file.read())
    prompts = [ids[at : at + window] for at in range(0, len(ids) - 1, window) if len(ids) - at > 1]
    np.save(f"{name}-targets.npy", np.concatenate([np.asarray(x[1:]) for x in prompts]))
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=-1)  # -1: all classes
    samples, at, file = sum(len(x) - 1 for x in prompts), 0, None
    for prompt in prompts:
        (output,) = engine.generate([{"prompt_token_ids": prompt}], parameters)
        for entries in output.prompt_logprobs[1:]:  # the first token has no prediction
            if file is None:
                file = np.lib.format.open_memmap(f"{name}-logits.npy", "w+", np.float32, (samples, len(entries)))
            classes = np.fromiter(entries.keys(), np.int64, len(entries))
            file[at, classes] = np.fromiter((x.logprob for x in entries.values()), np.float32, len(entries))
            at += 1
    print(f"{name}-logits.npy: {samples:,} samples")


if __name__ == "__main__":
    main(*sys.argv[1:])
