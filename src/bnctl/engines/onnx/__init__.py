"""The ONNX engine: lift, fold and insert on onnx-ir models. It never imports torch.

shapes, tensors, constants    what is known of a model's values without running it
linear, elementwise, movement the translation table, one rule per operator
lift                          from the model to the normalised graph
editor, apply, insert         from a plan to a new model
calibrate                     moments of inner values over data
recalibrate, recalibration    new statistics from data
engine                        the face that the commands use
deferred                      onnx-ir imported without sympy
"""

from bnctl.engines.onnx.deferred import import_without

import_without("sympy", "onnx_ir")
