"""Every reason code, in one place: what it means, why, and what the user can do.

BN1xx  fold          BN2xx  insert          BN3xx  recalibrate          BN4xx  check
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    """A reason that `bnctl explain` documents."""

    id: str
    title: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Obstacle:
    """A reason at one place: the code, and the detail that names what stands in the way."""

    code: str
    detail: str


_ALL = [
    Code("BN101", "the value has another reader",
         "The value that would change is read by a second operator, which must go on seeing the old one. A convolution that feeds both a BatchNorm and a "
         "skip connection cannot take the BatchNorm into its weights: the skip connection would receive normalised values.",
         "Nothing is wrong. If the other reader is yours to change, let it read the normalised value."),
    Code("BN102", "the value is an output of the model",
         "Folding would change a tensor that the model returns.",
         "If the output was only kept for debugging, drop it and fold again."),
    Code("BN103", "a non-linear operator stands in the way",
         "Between the BatchNorm and the nearest linear operator stands an operator through which scale and shift cannot be moved, for example "
         "relu(conv(x)): scale * relu(z) + shift is not relu(something linear in z). Pre-activation networks (DenseNet, ResNet-v2) are built that way.",
         "Nothing to do: the BatchNorm stays. onnxruntime and torch.compile fuse it with its neighbours."),
    Code("BN104", "fed by the model's input",
         "No linear operator comes before the BatchNorm, and those behind it could not take it either.",
         "Fold the normalisation into the preprocessing, or let the first convolution have no zero padding."),
    Code("BN105", "normalises with batch statistics",
         "The layer computes mean and variance from its input in inference too (track_running_stats=False, a layer left in training mode, "
         "training_mode=1 in ONNX): it is no fixed affine.",
         "Put the model in eval mode; give the layer running statistics (bnctl recalibrate needs track_running_stats=True)."),
    Code("BN106", "weight shared with another call",
         "The layer that would take scale and shift is called several times, and not every call is followed by the same BatchNorm.",
         "Give the calls layers of their own."),
    Code("BN107", "a hook reads the value",
         "A forward hook of the user's sees a tensor that folding would change, or is attached to a layer that folding would remove.",
         "Remove the hook before folding and attach it afterwards."),
    Code("BN108", "weight is computed",
         "The weight of the linear operator is not a stored parameter but is computed in every pass (weight_norm, spectral_norm, standardised convolution, a "
         "quantised weight that is dequantised).",
         "Bake the computed weight in first: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm."),
    Code("BN109", "not a layer of its own",
         "The affine is computed in the forward of a module that also does other things, so it cannot be taken out without rewriting code.",
         "Export to ONNX or .pt2 first (bnctl export --keep-bn) and fold the graph, which has no such limits."),
    Code("BN110", "varies along another axis",
         "Scale and shift vary along an axis that is not the channel axis of the linear operator, for example Linear on (N, C, L), whose "
         "features are the last axis, and BatchNorm1d, whose channels are axis 1. Where both sizes are equal, "
         "other tools fold here and are wrong without a word.",
         "Nothing to do; or transpose in the model, so that both mean the same axis."),
    Code("BN111", "quantised",
         "The weight is quantised; folding would change the grid on which it was quantised.",
         "Fold before quantising."),
    Code("BN112", "overridable initializer",
         "The ONNX parameter is also an input of the graph: a caller may pass another value.",
         "Remove the parameter from the graph's inputs (models of IR version 3 list all initializers there)."),
    Code("BN113", "negative scale before a maximum",
         "max(s*x) = s*max(x) holds only for s >= 0.",
         "Nothing to do."),
    Code("BN114", "zero padding",
         "The operator behind the BatchNorm pads with zeros. The padding stands for shift, not for 0, once the BatchNorm is folded: the border would be wrong.",
         "Nothing to do in this version."),
    Code("BN115", "overflow",
         "The folded weights do not fit the dtype of the layer (half precision), or are not finite: var + eps is not positive, or the statistics hold NaN.",
         "Look at the layer's statistics with bnctl inspect; fold in float32 and convert afterwards."),
    Code("BN116", "no rule for this operator",
         "bnctl has no rule to move an affine through this operator, or its shapes are not known.",
         "Tell us: an issue with the operator's name helps. For ONNX, run shape inference first."),
    Code("BN117", "written in place through a view",
         "The tensor is changed in place through a view of it, or through a second name.",
         "Use the out-of-place form of the operator."),
    Code("BN118", "no room for the shift",
         "The linear operator has no bias and none can be added at this place, but the shift is not 0.",
         "Give the layer a bias."),
    Code("BN119", "constant factor of 0 in between",
         "A constant multiplication by 0 stands between BatchNorm and linear operator; nothing can be moved through it.",
         "Remove the dead channel."),
    Code("BN120", "in a subgraph",
         "The layer is inside a branch or loop body (If, Loop, Scan) or a local function, which this version does not enter.",
         "Inline the functions (onnx.inliner) where that is what holds the layer."),
    Code("BN121", "not reached",
         "The layer was not called on the example input, so nothing is known of its neighbours.",
         "Give an --input that reaches it."),
    Code("BN201", "already normalised",
         "The layer's output goes into a normalisation layer before the activation.",
         "Nothing to do. To replace the normalisation, fold it first."),
    Code("BN202", "last layer",
         "No linear layer comes after it: its outputs are the model's predictions, whose scale matters.",
         "Nothing to do."),
    Code("BN203", "feeds no activation",
         "The layer's output does not go into an activation.",
         "Name the layer exactly with --where to insert all the same."),
    Code("BN204", "not selected",
         "--where or --skip leaves the layer out.",
         "Change the globs."),
    Code("BN205", "channels are not axis 1",
         "The layer's output has its channels on the last axis and more than two axes; BatchNormalization in ONNX normalises axis 1.",
         "Insert in the torch model, where bnctl brings a layer for the last axis."),
    Code("BN206", "no layer of its own",
         "The linear operator is computed by a function inside a larger module (multi-head attention, a custom forward): there is no module to attach BN to.",
         "Use nn.Linear or nn.Conv in its place, or insert in an ONNX or .pt2 export."),
    Code("BN207", "one value per channel",
         "The calibration data give this layer a single value per channel, so there is no variance.",
         "Give more data."),
    Code("BN208", "almost no variance",
         "Some channels hardly vary on the calibration data. The function is preserved, but gamma is tiny there: in training those channels react violently.",
         "Calibrate on more data; or raise --eps."),
    Code("BN301", "not selected",
         "The globs given with --where and --skip leave this layer out; its statistics stay as they were.",
         "Nothing is wrong. bnctl inspect lists the names of all layers."),
    Code("BN302", "never reached",
         "No batch led to a normalisation that reads these statistics, or all that came there were empty.",
         "Calibrate with data that reach this layer. Operators inside torch.compile cannot be seen: recalibrate before compiling."),
    Code("BN303", "statistics are frozen on purpose",
         "They are constants by the model's own word: a FrozenBatchNorm, momentum 0, or a layer in eval mode inside a model in train mode.",
         "Give the layer's very name with --where to recalibrate it all the same; a FrozenBatchNorm must be made a BatchNorm first."),
    Code("BN304", "normalises with its own input",
         "The layer uses the statistics of its batch in inference too (track_running_stats=False, or training=True in custom code): there are no running "
         "statistics that inference reads.",
         "Build the layer with track_running_stats=True."),
    Code("BN305", "statistics are not part of the model's state",
         "The running statistics handed to the operator are neither a buffer nor a parameter of the model, or are computed on the way: there is no place where "
         "new ones could be stored.",
         "Register them with register_buffer."),
    Code("BN306", "statistics did not settle",
         "The layer is called several times in a pass, or in different orders by different batches, so its statistics depend on themselves. The iteration "
         "ended before they agreed with what they produce; self_consistency says by how much.",
         "Look at self_consistency: below 1e-3 it hardly matters. Else give each call a layer of its own."),
    Code("BN401", "foldable",
         "The layer could be folded into its neighbours: inference pays for it without need.",
         "bnctl fold, or bnctl export."),
    Code("BN402", "dead channel",
         "The scale of a channel is 0: whatever comes in, the shift goes out. Pruning leaves such channels, and so does training gone wrong.",
         "Prune the channel, or look at the training."),
]  # fmt: skip

CODES: dict[str, Code] = {code.id: code for code in _ALL}
