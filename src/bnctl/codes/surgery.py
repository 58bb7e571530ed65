"""Reasons of `insert` and `recalibrate`, and findings of `check`."""

from __future__ import annotations

from bnctl.codes.code import Code

INSERT = (
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
)  # fmt: skip

RECALIBRATE = (
    Code("BN301", "not selected",
         "The globs given with --where and --skip leave this layer out; its statistics stay as they were.",
         "Nothing is wrong. bnctl inspect lists the names of all layers."),
    Code("BN302", "never reached",
         "No batch led to a normalisation that reads these very statistics, or all that came there were empty. It may also be that the model computes the "
         "normalisation by hand, in a thread of its own, or from a copy of the statistics.",
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
    Code("BN307", "statistics merged with gamma and beta",
         "The ONNX graph scales and shifts each channel by constants. If that was a BatchNorm, mean and variance were multiplied into gamma and beta when the "
         "model was exported, and cannot be told from them; or 1/sqrt(var + eps) is a constant factor beside gamma, and which is which cannot be told.",
         "Nothing to do if it never was one. Else recalibrate the model that it was exported from, or export it without optimisation."),
    Code("BN308", "out of reach",
         "The BatchNormalization stands in the body of an If, Loop or Scan, or in a local function that cannot be inlined: what comes there, and how often, "
         "is not seen from outside. Or its statistics vary over positions (spatial=0 before opset 9).",
         "Recalibrate the model that it was exported from; inline the functions (onnx.inliner) where that is what holds the layer."),
    Code("BN309", "eps is not in the graph",
         "The ONNX graph divides by a stored sqrt(var + eps): the layer was recalibrated, and sqrt(var + 1e-5) of the new variance is stored. Where the "
         "layer was built with another eps, channels whose variance is not far above it differ from what a recalibration before the export gives.",
         "Nothing to do for the usual variances. Else recalibrate the model that it was exported from."),
)  # fmt: skip

CHECK = (
    Code("BN401", "foldable",
         "The layer could be folded into its neighbours: inference pays for it without need.",
         "bnctl fold, or bnctl export."),
    Code("BN402", "dead channel",
         "The scale of a channel is 0: whatever comes in, the shift goes out. Pruning leaves such channels, and so does training gone wrong.",
         "Prune the channel, or look at the training."),
)  # fmt: skip
