"""The scripts in `examples/` that dump logits write what `gklx score` reads."""

import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import gklx

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DUMPS = Path(__file__).parent / "data" / "llama.cpp"
TEXT = "one two three four five six seven eight nine ten " * 4


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return "text.txt"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_dump_has_the_models_logits_and_targets(text, tmp_path, monkeypatch, dtype):
    """With a tiny random model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: at for at, word in enumerate(sorted({*TEXT.split(), "?"}))}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    runpy.run_path(str(EXAMPLES / "dump_transformers.py"))["main"](str(tmp_path / "model"), text, "x", window=16)
    logits, targets = np.load("x-logits.npy"), np.load("x-targets.npy")
    ids = np.asarray([words[word] for word in TEXT.split()])
    assert targets.tolist() == [*ids[1:16], *ids[17:32], *ids[33:40]]
    assert (logits.shape, logits.dtype) == ((37, 11), np.float32 if dtype == "float32" else np.float16)
    with torch.no_grad():
        expected = model(torch.asarray(ids[None, 16:32])).logits[0, :-1].float().numpy()
    np.testing.assert_allclose(logits[15:30], expected, rtol=1e-5, atol=1e-5)
    found = gklx.score("x-logits.npy", "x-logits.npy", targets="x-targets.npy")
    own = log_softmax(logits.astype(np.float64))[np.arange(37), targets]
    assert found.perplexity.student.value == pytest.approx(np.exp(-own.mean()), rel=1e-5)


def test_vllm_dump_has_the_engines_log_probabilities(text, monkeypatch):
    """With a stand-in for vLLM: prompt_logprobs has None, and then for each token a dictionary of all classes."""
    rng = np.random.default_rng(0)
    words = {word: at for at, word in enumerate(sorted(set(TEXT.split())))}
    given, asked = [], []

    class Engine:
        def __init__(self, **kwargs):
            assert kwargs["max_logprobs"] == -1

        def get_tokenizer(self):
            return types.SimpleNamespace(encode=lambda text: [words[word] for word in text.split()])

        def generate(self, prompts, parameters):
            assert parameters == {"max_tokens": 1, "prompt_logprobs": -1}
            (prompt,) = prompts
            asked.append(prompt["prompt_token_ids"])
            rows = log_softmax(rng.standard_normal((len(asked[-1]) - 1, len(words))))
            given.extend(rows)
            found = [None]
            for row in rows:  # the most probable first, as there
                order = np.argsort(-row)
                found.append({int(at): types.SimpleNamespace(logprob=float(row[at]), rank=1) for at in order})
            return [types.SimpleNamespace(prompt_logprobs=found)]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=Engine, SamplingParams=dict))
    runpy.run_path(str(EXAMPLES / "dump_vllm.py"))["main"]("model", text, "x", window=16)
    logits, targets = np.load("x-logits.npy"), np.load("x-targets.npy")
    np.testing.assert_allclose(logits, np.stack(given), rtol=1e-6)
    assert targets.tolist() == [token for prompt in asked for token in prompt[1:]]
    assert [len(prompt) for prompt in asked] == [16, 16, 8]
    assert gklx.score("x-logits.npy", "x-logits.npy", targets="x-targets.npy").samples == 37


@pytest.mark.skipif(shutil.which("sh") is None, reason="a shell script")
def test_llama_cpp_script_scores_the_dumps(tmp_path):
    """With a stand-in for llama.cpp's tool, which copies dumps of the real one."""
    tool = tmp_path / "tool"
    tool.write_text(
        '#!/bin/sh\n[ "$1 $3 $4 $5" = "-m -f text.txt --kl-divergence-base" ] || exit 9\n'
        f'cp "{DUMPS}/$(basename "$2" .gguf).kld" "$6"\n'
    )
    tool.chmod(0o755)
    done = subprocess.run(
        [str(EXAMPLES / "dump_llama_cpp.sh"), "text.txt", "models/q4_0.gguf", "models/f32.gguf"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={
            **os.environ,
            "LLAMA_PERPLEXITY": str(tool),
            "GKLX": f"{sys.executable} -m gklx",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert "by llama.cpp's rule" in done.stdout
    assert "0.033294" in done.stdout or "3.3294e-02" in done.stdout
    assert "top-10 overlap" in done.stdout
