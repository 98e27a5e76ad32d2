"""Load an export as its users do, without this package: compare it with the student, or time it.

Run as `python foreign.py REQUEST OUTPUT`, both JSON files. The process imports plain torch,
transformers and onnxruntime only, so an export that needs our code cannot pass.

Shapes: B sequences, T tokens, V vocabulary, N predicted tokens, P prompts.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # The folder of a script comes first by default, and modules there would shadow packages.
    sys.path.pop(0)

import contextlib
import itertools
import json
import math
import resource
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TOKENS_PER_BATCH = 1024
"""Tokens of a batch: about 200 MB of float32 logits for 50,000 of vocabulary."""


class Model(Protocol):
    """A causal language model with a key-value cache."""

    vocab_size: int

    def logits(self, ids_BT: Array, state: Any = None) -> tuple[Array, Any]:
        """Append tokens to the state, and return float32 logits (B, T, V) and the new state."""
        ...


class TransformersModel:
    """A folder, or a GGUF file in one, under plain transformers."""

    def __init__(self, folder: str, *, file: str | None = None, dtype: str = "float32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if file is None:
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        else:
            model = _read_gguf(folder, file)
        self._model = model.eval()
        self._torch = torch
        self.vocab_size = model.get_output_embeddings().weight.shape[0]

    def logits(self, ids_BT: Array, state: Any = None) -> tuple[Array, Any]:
        with self._torch.no_grad():
            output = self._model(
                self._torch.from_numpy(ids_BT), past_key_values=state, use_cache=True
            )
        return output.logits.float().numpy(), output.past_key_values


def _read_gguf(folder: str, file: str) -> Any:
    """Load a GGUF file in float32, with the config that it describes.

    Settings that the reader of transformers does not read come from config.json, as does
    everything in files of a family that only llama.cpp reads.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    config: Any = AutoConfig.from_pretrained(folder)
    arch = config.model_type.removesuffix("_text")
    if arch not in GGUF_CONFIG_MAPPING:
        return _dequantized(config, str(Path(folder) / file))
    described: Any = AutoConfig.from_pretrained(folder, gguf_file=file)
    for key in filter(None, GGUF_CONFIG_MAPPING[arch].values()):
        pair = getattr(described, key, None), getattr(config, key, None)
        if key != "rope_theta" and _rounded(pair[0]) != _rounded(pair[1]):
            raise ValueError(f"{file}: {key} is {pair[0]}, and {pair[1]} in config.json")
    if described.rope_parameters == config.rope_parameters and _shape(described) == _shape(config):
        config = described
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, config=config, dtype="float32"
    )


def _shape(config: Any) -> dict[str, Any]:
    """Return the settings of a config that its reader may miss: numbers, and lists of layers."""
    kept = {k: v for k, v in config.to_dict().items() if not k.endswith("_token_id")}
    return {k: _rounded(v) for k, v in kept.items() if isinstance(v, int | float | list)}


def _rounded(value: Any) -> Any:
    # As the file does, to float32.
    return float(np.float32(value)) if isinstance(value, float) else value


def _dequantized(config: Any, path: str) -> Any:
    """Build a model from a file with the package `gguf` only."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    reader = gguf.GGUFReader(path)
    arch = config.model_type.replace("gpt_neox", "gptneox")
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {one.name: gguf.dequantize(one.data, one.tensor_type) for one in reader.tensors}
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for key, parameter in model.named_parameters():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        values = tensors.pop(str(name))
        if arch == "gemma" and key.endswith("norm.weight"):
            values = values - 1
        if ".attn_qkv." in str(name):
            parts = values.reshape(3, config.num_attention_heads, -1, *values.shape[1:])
            values = parts.swapaxes(0, 1).reshape(values.shape)
        parameter.data = torch.from_numpy(np.array(values, dtype=np.float32))
    if tensors:
        raise ValueError(f"{path}: {min(tensors)} is not a tensor of {arch}")
    return model


class OnnxModel:
    """A graph under ONNX Runtime, whose key-value cache is an input and an output."""

    def __init__(self, path: str, *, threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        inputs = self._session.get_inputs()
        self._names = {one.name for one in inputs}
        self._past = [one for one in inputs if one.name.startswith("past_key_values.")]
        self.vocab_size = self._session.get_outputs()[0].shape[-1]

    def logits(self, ids_BT: Array, state: Any = None) -> tuple[Array, Any]:
        size, length = ids_BT.shape
        if state is None:
            shapes = [(size, one.shape[1], 0, one.shape[3]) for one in self._past]
            state = [np.zeros(shape, np.float32) for shape in shapes]
        start = state[0].shape[2]
        positions = np.arange(start, start + length, dtype=np.int64)
        inputs = {
            "input_ids": ids_BT,
            "attention_mask": np.ones((size, start + length), np.int64),
            "position_ids": np.broadcast_to(positions, ids_BT.shape),
        }
        feeds = {name: value for name, value in inputs.items() if name in self._names}
        feeds |= {one.name: value for one, value in zip(self._past, state, strict=True)}
        output, *present = cast(list[Any], self._session.run(None, feeds))
        return output, present


def load(source: dict[str, Any], threads: int) -> Model:
    """Load a model by the name of its loader."""
    folder, loader = source["folder"], source["loader"]
    if loader == "onnxruntime":
        return OnnxModel(str(Path(folder) / source["file"]), threads=threads)
    return TransformersModel(folder, file=source.get("file"), dtype=source.get("dtype", "float32"))


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """Compare the logits of an export with those of the student on held-out text."""
    threads = request["threads"]
    student, export = (load(request[key], threads) for key in ("student", "export"))
    if student.vocab_size != export.vocab_size:
        return {"problem": f"has {export.vocab_size} logits per token, not {student.vocab_size}"}
    texts = dict(np.load(request["texts"]))
    sums = _compared(student, export, texts)
    tokens, count = sums["tokens"], sums["count"]
    mean = sums["logit_sum"] / count
    scores = {}
    for prefix, key in (("student_", "nll"), ("", "export_nll")):
        scores[f"{prefix}perplexity"] = math.exp(min(sums[key] / tokens, 700))
        bits = sums[key] / math.log(2)
        scores[f"{prefix}bits_per_byte"] = bits / sums["bytes"] if sums["bytes"] else None
    return {
        "num_tokens": int(tokens),
        "max_logit_difference": sums["max"],
        "mean_logit_difference": sums["sum"] / count,
        "logit_spread": math.sqrt(max(sums["logit_squares"] / count - mean**2, 0.0)),
        "kl": sums["kl"] / tokens,
        "top1_agreement": sums["same_top1"] / tokens,
        **scores,
        **_continuations(student, export, texts["prompts"], request["new_tokens"]),
        **_tokenizer(request, texts),
    }


def _batches(texts: dict[str, Array]) -> Iterator[tuple[Array, Array, Array]]:
    """Yield ids (B, T), padded on the right, labels of the next tokens and bytes (B, T - 1)."""
    spans = [slice(a, b) for a, b in itertools.pairwise(texts["starts"])]
    spans.sort(key=lambda span: span.start - span.stop)
    while spans:
        longest = spans[0].stop - spans[0].start
        size = max(1, TOKENS_PER_BATCH // longest)
        batch, spans = spans[:size], spans[size:]
        arrays = {"ids": 0, "labels": -100, "num_bytes": 0}
        # A causal model ignores padding on the right.
        padded = {name: np.full((len(batch), longest), fill) for name, fill in arrays.items()}
        for row, span in enumerate(batch):
            for name, array in padded.items():
                array[row, : span.stop - span.start] = texts[name][span]
        yield padded["ids"], padded["labels"][:, 1:], padded["num_bytes"][:, 1:]


def _compared(student: Model, export: Model, texts: dict[str, Array]) -> dict[str, float]:
    names = ("max", "sum", "count", "logit_sum", "logit_squares", "kl", "same_top1")
    sums: dict[str, float] = {n: 0.0 for n in (*names, "nll", "export_nll", "tokens", "bytes")}
    for ids_BT, labels_BT, bytes_BT in _batches(texts):
        chosen_BT = labels_BT >= 0
        if not chosen_BT.any():
            continue
        ours_NV, theirs_NV = (
            model.logits(ids_BT)[0][:, :-1][chosen_BT] for model in (student, export)
        )
        difference_NV = np.abs(ours_NV - theirs_NV)
        sums["max"] = float(np.maximum(sums["max"], difference_NV.max()))  # keeps NaN
        sums["sum"] += float(difference_NV.sum(dtype=np.float64))
        sums["count"] += difference_NV.size
        sums["logit_sum"] += float(ours_NV.sum(dtype=np.float64))
        sums["logit_squares"] += float(np.square(ours_NV, dtype=np.float64).sum())
        sums["same_top1"] += float((ours_NV.argmax(1) == theirs_NV.argmax(1)).sum())
        ours_NV, theirs_NV = _log_softmax(ours_NV), _log_softmax(theirs_NV)
        sums["kl"] += float((np.exp(ours_NV) * (ours_NV - theirs_NV)).sum())
        rows_N, labels_N = np.arange(len(ours_NV)), labels_BT[chosen_BT]
        sums["nll"] -= float(ours_NV[rows_N, labels_N].sum())
        sums["export_nll"] -= float(theirs_NV[rows_N, labels_N].sum())
        sums["tokens"] += len(rows_N)
        sums["bytes"] += float(bytes_BT[chosen_BT].sum())
    return sums


def _log_softmax(logits_NV: Array) -> Array:
    logits_NV = logits_NV.astype(np.float64)
    logits_NV -= logits_NV.max(1, keepdims=True)
    return logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))


def _continuations(
    student: Model, export: Model, prompts_PT: Array, new_tokens: int
) -> dict[str, float]:
    """Continue prompts greedily: the share of differing texts, and the closest call among them.

    `tie_gap` is the largest difference of the student's logits between its own choice and the
    choice of the export, where a text differs first: 0 if none differs.
    """
    ours, theirs = (_greedy(model, prompts_PT, new_tokens) for model in (student, export))
    differs_PT = ours[0] != theirs[0]
    differing_P = differs_PT.any(1)
    gap = 0.0
    for prompt in np.flatnonzero(differing_P):
        step = differs_PT[prompt].argmax()
        logits_V = ours[1][step][prompt]  # after the same tokens as in the export
        mine, other = (float(logits_V[tokens[0][prompt, step]]) for tokens in (ours, theirs))
        gap = max(gap, mine - other)
    return {
        "num_prompts": len(prompts_PT),
        "differing_texts": float(differing_P.mean()),
        "tie_gap": gap,
    }


def _greedy(model: Model, prompts_PT: Array, new_tokens: int) -> tuple[Array, list[Array]]:
    """Return the most likely tokens (P, new_tokens), and the logits (P, V) of each step."""
    logits_PTV, state = model.logits(prompts_PT)
    chosen, logits = list[Array](), [logits_PTV[:, -1].copy()]
    for _ in range(new_tokens):
        chosen.append(logits[-1].argmax(1)[:, None].astype(np.int64))
        logits_PTV, state = model.logits(chosen[-1], state)
        logits.append(logits_PTV[:, -1].copy())
    return np.concatenate(chosen, axis=1), logits


def _tokenizer(request: dict[str, Any], texts: dict[str, Array]) -> dict[str, Any]:
    """Compare the tokenizer that the export carries with that of the student, on held-out text."""
    from transformers import AutoTokenizer

    source = request["export"]
    ours = AutoTokenizer.from_pretrained(request["student"]["folder"])
    if source["loader"] == "gguf":
        theirs, is_known = _gguf_tokenizer(str(Path(source["folder"]) / source["file"]))
    else:
        theirs, is_known = AutoTokenizer.from_pretrained(source["folder"]), True
    written = [ours.decode(texts["ids"][a:b]) for a, b in itertools.pairwise(texts["starts"])]
    same = [
        ours(text, add_special_tokens=False)["input_ids"]
        == theirs(text, add_special_tokens=False)["input_ids"]
        and theirs.decode(ours(text)["input_ids"]) == ours.decode(ours(text)["input_ids"])
        for text in written
    ]
    return {
        "differing_tokenizations": 1 - statistics.mean(same) if is_known else None,
        "same_chat_template": ours.chat_template == theirs.chat_template,
        "same_eos": ours.eos_token == theirs.eos_token,
    }


def _gguf_tokenizer(path: str) -> tuple[Any, bool]:
    """Build the tokenizer in a GGUF file. Also return whether its splitting rule is known there."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping as mapping

    arch, content, settings = mapping.get_gguf_tokenizer(path)
    backend, _ = mapping.convert_gguf_tokenizer(arch, content)
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = settings.get("chat_template")
    is_known = content["pre_tokenizer_type"] in {
        "gpt-2",
        "default",
        *mapping.GGUF_PRE_TOKENIZER_SPLITS,
    }
    return tokenizer, is_known


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Time one model: the first token, prefill and decoding, and its memory above the libraries."""
    threads, source = request["threads"], request["model"]
    if source["loader"] == "onnxruntime":
        import onnxruntime as onnxruntime  # so that memory counts the model only
    else:
        from transformers import LlamaConfig, LlamaForCausalLM

        # transformers imports the code of models when the first is built.
        sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    before = _reset_peak()
    model = load(source, threads)
    prompt_tokens, new_tokens = request["prompt_tokens"], request["new_tokens"]
    generator, speeds, first = np.random.default_rng(0), {}, math.nan
    for size in request["batch_sizes"]:
        ids_BT = generator.integers(0, request["vocab_size"], (size, prompt_tokens))
        _timed(model, ids_BT, 2)  # the first calls allocate and choose kernels
        prefill, decode = _timed(model, ids_BT, new_tokens)
        first = prefill if size == 1 else first
        tokens = size * prompt_tokens, size * (new_tokens - 1)
        speeds[str(size)] = [tokens[0] / prefill, tokens[1] / decode]
    return {"first_token_s": first, "speeds": speeds, "peak_bytes": _peak() - before}


def _timed(model: Model, ids_BT: Array, new_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first token and those of the other `new_tokens` - 1."""
    start = time.perf_counter()
    logits_BTV, state = model.logits(ids_BT)
    next_B1 = logits_BTV[:, -1].argmax(1)[:, None].astype(np.int64)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        logits_BTV, state = model.logits(next_B1, state)
        next_B1 = logits_BTV[:, -1].argmax(1)[:, None].astype(np.int64)
    return first - start, time.perf_counter() - first


def _reset_peak() -> int:
    """Start a new peak of the resident memory, and return its current size in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Return the largest resident memory in bytes since `_reset_peak`."""
    # `ru_maxrss` starts at the size of the parent process on Linux: exec keeps it.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _run(request: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    if request["task"] == "compare" or request["model"]["loader"] != "onnxruntime":
        import torch

        torch.set_num_threads(request["threads"])
    answer = {"compare": compare, "measure": measure}[request["task"]](request)
    # A foreign process: our package would hide a folder that only it can load.
    answer["imported"] = sorted(name for name in sys.modules if name.startswith("collegium"))
    return answer


if __name__ == "__main__":
    answer = _run(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answer))
