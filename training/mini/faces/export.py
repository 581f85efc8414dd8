"""From a torch module to an ONNX file that is small, clean and the same bytes every time. Knows no particular network.

Weights are stored as fp16 with a Cast behind each: the file is half as large, and onnxruntime, which folds the casts when it
loads, computes in fp32. Node names are rewritten: insightface guesses a model's normalisation from them.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

OPSET = 18
"""The lowest opset that torch's exporter writes without converting; insightface and onnxruntime read all of them."""
_IR_VERSION = 10
_SMALLEST_HALVED = 256
"""Tensors of fewer elements (biases, slopes, shapes) stay fp32: nothing is saved on them, and some need the range."""
Dims = Mapping[int, str]


def export_onnx(
    module: nn.Module, example: Tensor, path: Path, outputs: Sequence[str], dynamic: Dims, *, input_name: str = "input", multiple: int = 1
) -> float:
    """Writes `module` (one input, tensors out in the order of `outputs`) and returns the largest output difference that halving made.

    example: an input; its values are used to measure that difference, its shape fixes every dimension not in `dynamic`.
    dynamic: input dimension -> name; dimension 0 is the batch. multiple: what dynamic heights and widths are divisible by.
    Raises ValueError when the file would answer differently from the module.
    """
    whole = _traced(folded(module), example, outputs, dynamic, input_name, multiple)
    halved = halve(whole)
    _refuse_misleading_names(halved)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_bytes(halved.SerializeToString(deterministic=True))
    beside.replace(path)
    with torch.no_grad():
        expected = module(example)
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    exact, stored = _run(whole, input_name, example), _run(halved, input_name, example)
    for name, a, b in zip(outputs, exact, expected, strict=True):
        if not np.allclose(a, b.numpy(), rtol=1e-3, atol=1e-3 * max(1.0, float(np.abs(a).max()))):
            raise ValueError(
                f"{path.name}: output '{name}' differs from the module's by {np.abs(a - b.numpy()).max():.2g}; the export is wrong"
            )
    return max(float(np.abs(a - b).max()) for a, b in zip(exact, stored, strict=True))


def folded(module: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch normalisations that follow a convolution in a Sequential have become part of it."""
    copied = copy.deepcopy(module).eval()
    for sequence in [m for m in copied.modules() if isinstance(m, nn.Sequential)]:
        for index, (layer, after) in enumerate(itertools.pairwise(list(sequence))):
            if isinstance(layer, nn.Conv2d) and isinstance(after, nn.BatchNorm2d):
                sequence[index], sequence[index + 1] = fuse_conv_bn_eval(layer, after), nn.Identity()
    return copied


def halve(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large fp32 initialisers are fp16 followed by a Cast to fp32.

    Raises ValueError for a weight beyond fp16's range (65504): the network has not been trained to anything sensible.
    """
    half = copy.deepcopy(model)
    graph = half.graph
    casts: list[onnx.NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < _SMALLEST_HALVED:
            continue
        with np.errstate(over="ignore"):  # refused in the next line, by name
            values = numpy_helper.to_array(tensor).astype(np.float16)
        if not np.isfinite(values).all():
            raise ValueError(f"weight '{tensor.name}' has values beyond the range of fp16; it cannot be halved")
        stored = f"{tensor.name}_fp16"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], f"widen_{len(casts)}", to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(values, stored))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    onnx.checker.check_model(half, full_check=True)
    return half


def _traced(module: nn.Module, example: Tensor, outputs: Sequence[str], dynamic: Dims, input_name: str, multiple: int) -> onnx.ModelProto:
    """torch's exporter, and everything taken out of its graph that depends on this machine or this version."""
    sizes = {
        dim: torch.export.Dim(name) if dim == 0 else multiple * torch.export.Dim(f"_{name}", min=1, max=1 << 12)
        for dim, name in dynamic.items()
    }
    with _quiet_exporter():
        program = torch.onnx.export(
            module, (example,), input_names=[input_name], output_names=list(outputs), opset_version=OPSET,
            dynamic_shapes=(sizes,), dynamo=True, verbose=False,
        )  # fmt: skip
    assert program is not None
    return _cleaned(program.model_proto, dynamic)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the exporter's remarks on itself: that torchvision is not there, that it uses deprecated parts of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cleaned(model: onnx.ModelProto, dynamic: Dims) -> onnx.ModelProto:
    """The same graph with names, order and metadata of our own; shapes of intermediate values are left to be inferred again."""
    graph = model.graph
    for index, node in enumerate(graph.node):
        node.name = f"{node.op_type.lower()}_{index}"
        node.doc_string = ""
        del node.metadata_props[:]
    for value in [*graph.input, *graph.output, *graph.initializer, graph, model]:
        value.doc_string = ""
        del value.metadata_props[:]
    del graph.value_info[:]
    for dim, name in dynamic.items():
        graph.input[0].type.tensor_type.shape.dim[dim].dim_param = name
    batch = dynamic.get(0)
    for output in graph.output:
        for index, size in enumerate(output.type.tensor_type.shape.dim):
            if size.dim_param:
                size.dim_param = batch if batch and index == 0 else f"{output.name}_{index}"
    graph.name = "graph"
    rebuilt = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="likeness")
    rebuilt.ir_version = _IR_VERSION
    return rebuilt


def _refuse_misleading_names(model: onnx.ModelProto) -> None:
    """insightface takes a model for one that normalises by itself if early nodes are called so (model_zoo/arcface_onnx.py)."""
    for node in model.graph.node[:8]:
        if node.name.startswith(("Sub", "_minus", "Mul", "_mul", "bn_data")):
            raise ValueError(f"node '{node.name}' would make insightface skip its normalisation; rename it")


def _run(model: onnx.ModelProto, input_name: str, example: Tensor) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, {input_name: example.numpy()})]
