"""The tensor that a value holds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant node; None for other values.

    (``onnx_ir.convenience.get_const_tensor`` gives the tensor of a Constant node another name on the way; models that are copies of each other share it.)
    """
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.domain != "" or node.op_type != "Constant":
        return None
    attributes = node.attributes
    if "value" in attributes and not attributes["value"].is_ref():
        return attributes["value"].as_tensor()
    for names, dtype in ((("value_float", "value_floats"), np.float32), (("value_int", "value_ints"), np.int64)):
        for name in names:
            if name in attributes and not attributes[name].is_ref():
                return ir.Tensor(np.asarray(attributes[name].value, dtype), name=value.name)
    return None
