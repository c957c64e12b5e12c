"""What a step adds to a loaded model: what its layers keep from forward to backward, and the working memory.

Widths are values of a token (:mod:`halfbyte.memory.widths`). The counts follow :mod:`halfbyte.fast.layer_call` line by
line; a test compares what is kept with what autograd saves.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from halfbyte.fast.attention import _working_dtype
from halfbyte.fast.layer import LEVELS, FusedForward
from halfbyte.fast.parts import Decoder, LatentMaps
from halfbyte.fast.scores import chunk_rows
from halfbyte.memory import apart
from halfbyte.memory.experts import of_experts
from halfbyte.memory.mixers import of_mixers
from halfbyte.memory.widths import Widths, dtype, outputs, ranks

__all__ = ["LEVELS", "Activations", "activations", "kept_per_token"]

_LOG_SUM_BYTES = 4
_FLOAT32 = 4
_IDS = 6 * 8  # of a token: its id, label and position, twice
# TRL's own head (trl 1.16, trainer/utils.py): the tokens of a chunk, and how often it holds their logits in float32,
# with gradients and without.
_TRL_CHUNK, _TRL_COPIES, _TRL_FORWARD_COPIES = 32_768, 9, 6


@dataclass(frozen=True)
class Activations:
    """Bytes that are kept of all layers, and that are needed for a while beside them; the number of ``layers``.

    ``products`` is what the matrix products of one layer's MLP work with: it may be less than ``working``.
    """

    kept: int
    working: int
    products: int
    layers: int


def activations(model: nn.Module, workload: Any, level: int | None = None) -> Activations:
    """Return what a step of ``workload`` adds to ``model``, its fused layers at ``level`` (None: at their own)."""
    tokens, kept, layers, working, products = workload.tokens, 0, 0, 0, 0
    last: tuple[int, int] | None = None
    known: dict[type, int | None] = {}
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        layers += 1
        if isinstance(layer.forward, FusedForward):
            decoder, at = layer.forward.parts, layer.forward.level if level is None else level
            size = dtype(decoder).itemsize
            read = tokens
            if layer.forward.only_read and workload.read is not None:
                read = workload.read
            of_layer = tokens * kept_of_all(decoder, at, size)
            of_layer += read * (kept_per_token(decoder, at, size) - kept_of_all(decoder, at, size))
            kept += of_layer + tokens * _of_graph(decoder, at, size, workload.device)
            again = tokens * _recomputed(decoder, at, size)
            of_mlp = _of_mlp(decoder, at, size, read)
            inside = again + max(of_mlp, _of_attention(decoder, at, size, workload))
            if read < tokens:
                last = of_layer, inside
            else:
                products, working = max(products, of_mlp), max(working, inside)
        else:
            if workload.checkpointing and apart.keeps(layer, level):
                size = item_size(layer)
                kept += tokens * apart.kept_per_token(layer, model.config, size)
                working = max(working, apart.working(layer, model.config, workload, size))
                continue
            size, whole = _whole_per_token(layer)
            inside = tokens * whole + of_experts(
                layer, model.config, tokens, item_size(layer), workload.device
            )
            seen = max(workload.in_rows or 0, tokens)
            inside += of_mixers(layer, model.config, seen, workload.longest, item_size(layer), known)
            kept += tokens * size if workload.checkpointing else inside
            working = max(working, inside if workload.checkpointing else 0)
    head = _head(model, workload, tokens) + _around(model, tokens)
    if last is not None:  # whose backward is over where the one before it works, and has less to work with
        of_layer, inside = last
        head = max(head, inside)
        working = max(working - of_layer, 0)
    return Activations(kept, max(working, head) + tokens * _IDS, products, layers)


def evaluation(model: nn.Module, workload: Any) -> Activations:
    """Return what a batch of an evaluation adds to ``model``: the forward of one layer, or a chunk of the head."""
    tokens, layers, working, products = workload.evaluated, 0, 0, 0
    known: dict[type, int | None] = {}
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        layers += 1
        if isinstance(layer.forward, FusedForward):
            decoder = layer.forward.parts
            of_mlp, multiplied = _forward_of_mlp(decoder, tokens)
            products = max(products, multiplied)
            working = max(working, of_mlp, _forward_of_attention(decoder, workload))
        else:
            inside = tokens * _whole_per_token(layer)[1] // 2
            seen = max(workload.evaluated_in_rows or 0, tokens)
            longest = workload.evaluated_longest
            inside += of_mixers(layer, model.config, seen, longest, item_size(layer), known) // 2
            working = max(
                working, inside + of_experts(layer, model.config, tokens, item_size(layer), workload.device)
            )
    head = _head(model, workload, tokens, backward=False) + _around(model, tokens)
    return Activations(0, max(working, head) + tokens * _IDS, products, layers)


def kept_per_token(decoder: Decoder, level: int, size: int) -> int:
    """Return the bytes that one layer keeps of a token from forward to backward, in a dtype of ``size`` bytes."""
    widths = Widths.of(decoder)
    values = widths.stream
    other = 0
    if level >= 1:
        closed = sum(half.closing is not None for half in (decoder.attention, decoder.mlp))
        values += (closed + (not decoder.parallel)) * widths.stream + widths.outputs
        values += ranks(decoder.attention.out) + ranks(decoder.mlp.down)
        other += decoder.attention.heads * _LOG_SUM_BYTES
    if level >= 2:
        values += outputs(decoder.attention.maps.linears) + ranks(decoder.attention.maps.linears)
    if level >= 3:
        values += outputs(decoder.mlp.gate_up) + ranks(decoder.mlp.gate_up)
    return values * size + other


def kept_of_all(decoder: Decoder, level: int, size: int) -> int:
    """Return what of :func:`kept_per_token` the last layer keeps of every token: its input, and queries to values."""
    values = Widths.of(decoder).stream
    if level >= 2:
        values += outputs(decoder.attention.maps.linears) + ranks(decoder.attention.maps.linears)
    return values * size


def _of_graph(decoder: Decoder, level: int, size: int, device: str) -> int:
    """Bytes of a token that the graph of attention holds off the CPU beside what is kept of a layer.

    Of latents these are the keys, and, where its kernel takes them in the size of keys, values and outputs.
    """
    if device == "cpu" or level < 2 or not isinstance(decoder.attention.maps, LatentMaps):
        return 0
    widths = Widths.of(decoder)
    return size * (widths.keys if widths.keys == widths.values else 3 * widths.keys)


def _recomputed(decoder: Decoder, level: int, size: int) -> int:
    """Bytes of a token that level 0 computes again before the backward of a layer: what level 2 has kept."""
    return kept_per_token(decoder, 2, size) - kept_per_token(decoder, 0, size) if level == 0 else 0


def _of_mlp(decoder: Decoder, level: int, size: int, tokens: int) -> int:
    """Bytes that the backward of the MLP works with: the weights in the dtype of the products, and values of tokens."""
    widths = Widths.of(decoder)
    again = 0 if level >= 3 else widths.gate_up + ranks(decoder.mlp.gate_up)
    # The gradients of gate and up, the product, and those of the output and of the norm's input, with its output.
    values = again + widths.gate_up + widths.features + 4 * widths.stream
    weights = (widths.gate_up + widths.features) * widths.stream
    return (tokens * values + weights) * size


def _forward_of_mlp(decoder: Decoder, tokens: int) -> tuple[int, int]:
    """Bytes that the forward of the MLP works with beside what the attention before it has left, and its products."""
    widths, size = Widths.of(decoder), dtype(decoder).itemsize
    # The layer's input, the stream between the halves, the norm's output; queries, keys, values and what attends.
    left = tokens * (3 * widths.stream + widths.heads + widths.outputs)
    up = widths.gate_up * widths.stream + tokens * widths.gate_up
    down = widths.features * widths.stream + tokens * (widths.gate_up + widths.features + widths.stream)
    products = max(up, down)
    return (left + products) * size, products * size


def _forward_of_attention(decoder: Decoder, workload: Any) -> int:
    """Bytes that the forward of attention works with."""
    widths, size = Widths.of(decoder), dtype(decoder).itemsize
    total = workload.evaluated * (3 * widths.stream + widths.heads + widths.outputs) * size
    if workload.device == "cpu" and _in_float32(decoder):
        read = widths.queries + widths.keys + widths.values
        copies = read if size < _FLOAT32 else 0
        packed = read + widths.outputs
        total += (workload.evaluated * copies + workload.evaluated_longest * packed) * _FLOAT32
    return int(total)


def _of_attention(decoder: Decoder, level: int, size: int, workload: Any) -> int:
    """Bytes that the backward of attention works with: the gradients of its heads, twice, and what a device adds."""
    widths = Widths.of(decoder)
    read = widths.queries + widths.keys + widths.values
    values = read + widths.heads + 4 * widths.stream + (widths.heads if level == 1 else 0)
    total = workload.tokens * values * size
    if workload.device != "cpu":
        # Flash attention adds the gradients of queries up in float32; values, outputs and their gradients in its size.
        padded = 4 * widths.queries * size if widths.values != widths.keys else 0
        return int(total + workload.tokens * (widths.queries * _FLOAT32 + padded))
    if _in_float32(decoder):
        # Copies of do, q, k, v and o, and all of one sequence packed by heads, with their gradients; do beside sinks.
        copies = read + 2 * widths.outputs if size < _FLOAT32 else 0
        packed = 2 * widths.queries + (2 + decoder.attention.sinks) * widths.outputs
        packed += 3 * (widths.keys + widths.values)
        total += (workload.tokens * copies + workload.longest * packed) * _FLOAT32
    return int(total)


def _head(model: nn.Module, workload: Any, tokens: int, *, backward: bool = True) -> int:
    """Bytes that scoring the last chunk takes: its logits in the dtype of the head and in float32, and gradients."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(head, "original_module", head)  # PEFT wraps a head that is trained, or has trained rows
    if not isinstance(head, nn.Linear):
        return 0
    vocabulary, hidden = head.weight.shape
    size = head.weight.element_size()
    if not workload.chunked_head:
        copies = _TRL_COPIES if backward else _TRL_FORWARD_COPIES
        return int(min(tokens, _TRL_CHUNK) * vocabulary * copies * _FLOAT32)
    chunk = min(chunk_rows(vocabulary, workload.device), tokens)
    # Logits, twice in float32 (probabilities beside them for the entropy), and the gradient.
    logits = chunk * vocabulary * ((1 + backward) * size + 2 * _FLOAT32)
    return int(logits + backward * tokens * hidden * size)


def _around(model: nn.Module, tokens: int) -> int:
    """Bytes of the stream behind the layers while the head is computed: the last norm in float32 and its output."""
    config: Any = model.config
    width = config.get_text_config().hidden_size
    size = item_size(model)
    return int(tokens * (width * (2 * _FLOAT32 + 2 * size)))


def item_size(model: nn.Module) -> int:
    """Return the bytes of a value of the stream: the base's dtype that is not packed."""
    return next(p.element_size() for p in model.parameters() if p.is_floating_point())


def _whole_per_token(layer: nn.Module) -> tuple[int, int]:
    """Bytes of a token in a layer that runs its own forward: of its input, and of all that autograd keeps.

    An estimate: each LoRA linear keeps its input in float32, as PEFT casts it; norms, attention and the activation
    keep about eight times the stream.
    """
    linears = [each for each in layer.modules() if isinstance(each, LoraLayer | nn.Linear)]
    outer = [each for each in linears if isinstance(each, LoraLayer)] or linears
    widths = [_features(each) for each in outer]
    if not widths:
        return 0, 0
    stream = min(widths)
    size = item_size(layer)
    return stream * size, sum(widths) * _FLOAT32 + 8 * stream * size


def _features(linear: Any) -> int:
    found: int = linear.in_features
    return found


def _in_float32(decoder: Decoder) -> bool:
    return _working_dtype(dtype(decoder)) == torch.float32
