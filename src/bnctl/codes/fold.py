"""Reasons why `fold` leaves a site. The examples that are torch code are executed by a test: folding leaves a site with that code."""

from __future__ import annotations

from bnctl.codes.code import Code

FOLD = (
    Code("BN101", "the value has another reader",
         "The value that would change is read by a second operator, which must go on seeing the old one. A convolution that feeds both a BatchNorm and a "
         "skip connection cannot take the BatchNorm into its weights: the skip connection would receive normalised values.",
         "Nothing is wrong. Where the readers are parallel branches that are summed (RepVGG, MobileOne), --merge-branches makes one operator of them. If the "
         "other reader is yours to change, let it read the normalised value.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

             def forward(self, x):
                 y = self.conv(x)
                 return y.sigmoid() * self.bn(y).relu()  # y has two readers

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN102", "the value is an output of the model",
         "Folding would change a tensor that the model returns.",
         "If the output was only kept for debugging, drop it and fold again.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

             def forward(self, x):
                 y = self.conv(x)
                 return y, self.bn(y)

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN103", "a non-linear operator stands in the way",
         "Between the BatchNorm and the nearest linear operator stands an operator through which scale and shift cannot be moved, for example "
         "relu(conv(x)): scale * relu(z) + shift is not relu(something linear in z). Pre-activation networks (DenseNet, ResNet-v2) are built that way.",
         "Nothing to do: the BatchNorm stays. onnxruntime and torch.compile fuse it with its neighbours.",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN104", "fed by the model's input",
         "No linear operator comes before the BatchNorm, and those behind it could not take it either.",
         "Fold the normalisation into the preprocessing, or let the first convolution have no zero padding.",
         example="""
         model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3))
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN105", "normalises with batch statistics",
         "The layer computes mean and variance from its input in inference too (track_running_stats=False, a layer left in training mode, "
         "training_mode=1 in ONNX): it is no fixed affine.",
         "Put the model in eval mode; give the layer running statistics (bnctl recalibrate needs track_running_stats=True).",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN106", "weight shared with another call",
         "The layer that would take scale and shift is called several times, and not every call is followed by the same BatchNorm.",
         "Give the calls layers of their own.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

             def forward(self, x):
                 return self.conv(self.bn(self.conv(x)).relu())  # only the first call is followed by bn

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN107", "a hook reads the value",
         "A forward hook of the user's sees a tensor that folding would change, or is attached to a layer that folding would remove.",
         "Remove the hook before folding and attach it afterwards.",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
         model[0].register_forward_hook(lambda module, inputs, output: None)
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN108", "weight is computed",
         "The weight of the linear operator is not a stored parameter but is computed in every pass, by code that bnctl cannot replace with a "
         "layer that stores the result (for weight_norm, spectral_norm and standardised convolutions it can); or torch.autocast, in the forward of the model, "
         "casts it in every pass. insert leaves all layers with computed weights: a norm behind one could not be folded back.",
         "Bake the computed weight in first: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm. "
         "Take autocast out of the forward: it can be put around the folded model.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.scale = nn.Parameter(torch.ones(1))
                 self.weight, self.bn = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.BatchNorm2d(8)

             def forward(self, x):
                 return self.bn(functional.conv2d(x, self.weight * self.scale))

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN109", "not a layer of its own",
         "The affine is computed in the forward of a module that also does other things, and one recorded run does not tell enough to write that "
         "forward anew, for example because it looks at values of tensors.",
         "Export to ONNX or .pt2 first (bnctl export --keep-bn) and fold the graph, which has no such limits.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

             def forward(self, x):
                 bn, y = self.bn, self.conv(x)
                 y = functional.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias)
                 return y if x.sum() > 0 else y.relu()

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN110", "varies along another axis",
         "Scale and shift vary along an axis that is not the channel axis of the linear operator, for example Linear on (N, C, L), whose "
         "features are the last axis, and BatchNorm1d, whose channels are axis 1. Where both sizes are equal, "
         "other tools fold here and are wrong without a word.",
         "Nothing to do; or transpose in the model, so that both mean the same axis.",
         example="""
         model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))  # features are axis 2, channels are axis 1
         x = torch.randn(2, 8, 8)
         """),
    Code("BN111", "quantised",
         "The weight is quantised; folding would change the grid on which it was quantised.",
         "Fold before quantising.",
         example="""
         <ir_version: 8, opset_import: ["": 17]>
         net (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y)
         <int8[2, 2, 1, 1] q = {1, 0, 0, 1}, float k = {0.5}, float[2] s = {1, 2}, float[2] b = {1, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}>
         {
             W = DequantizeLinear(q, k)
             c = Conv(x, W)
             y = BatchNormalization(c, s, b, m, v)
         }
         """),
    Code("BN112", "overridable initializer",
         "The ONNX parameter is also an input of the graph: a caller may pass another value.",
         "Use --freeze-initializers, or remove the parameter from the graph's inputs (models of IR version 3 list all initializers there).",
         example="""
         <ir_version: 8, opset_import: ["": 17]>
         net (float[N, 2, 4, 4] x, float[2, 2, 1, 1] W = {1, 0, 0, 1}) => (float[N, 2, 4, 4] y)
         <float[2] s = {1, 2}, float[2] b = {1, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}>
         {
             c = Conv(x, W)
             y = BatchNormalization(c, s, b, m, v)
         }
         """),
    Code("BN113", "negative scale before a maximum",
         "max(s*x) = s*max(x) holds only for s >= 0.",
         "Nothing to do.",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.BatchNorm2d(8))
         nn.init.constant_(model[2].weight, -1.0)
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN114", "zero padding",
         "Constants are put around the value, between the linear operator and the BatchNorm or by the convolution behind it. Once the BatchNorm is "
         "folded on the other side, they would have to stand for other numbers: the border would be wrong.",
         "Behind the BatchNorm, --pad-exact folds all the same, by one more input channel of ones; in between, nothing.",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.BatchNorm2d(8))
         nn.init.ones_(model[2].bias)
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN115", "overflow",
         "The folded weights do not fit the dtype of the layer (half precision), or are not finite: var + eps is not positive, or the statistics hold NaN.",
         "Look at the layer's statistics with bnctl inspect; fold in float32 and convert afterwards.",
         example="""
         model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
         model[1].running_var[0] = float("nan")
         x = torch.randn(2, 3, 8, 8)
         """),
    Code("BN116", "no rule for this operator",
         "bnctl has no rule to move an affine through this operator, or its shapes are not known.",
         "Tell us: an issue with the operator's name helps. For ONNX, run shape inference first.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

             def forward(self, x):
                 return self.bn(self.conv(x).cumsum(-1))

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN117", "written in place through a view",
         "The tensor is changed in place through a view of it, or through a second name.",
         "Use the out-of-place form of the operator.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

             def forward(self, x):
                 y = self.conv(x)
                 y[:, :, 0].zero_()
                 return self.bn(y)

         model, x = Net(), torch.randn(2, 3, 8, 8)
         """),
    Code("BN118", "no room for the shift",
         "The linear operator has no bias and none can be added at this place, but the shift is not 0.",
         "Give the layer a bias.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.weight, self.bn = nn.Parameter(torch.randn(8, 3)), nn.BatchNorm1d(8)

             def forward(self, x):
                 y = self.bn(functional.linear(x, self.weight))
                 return y if x.sum() > 0 else y.relu()

         model, x = Net(), torch.randn(2, 3)
         nn.init.ones_(model.bn.bias)
         """),
    Code("BN119", "constant factor of 0 in between",
         "A constant multiplication by 0 stands between BatchNorm and linear operator; nothing can be moved through it.",
         "Remove the dead channel.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
                 self.gain = nn.Parameter(torch.zeros(8, 1, 1))

             def forward(self, x):
                 y = self.conv(x)
                 return self.bn(y * self.gain) + y.sigmoid()

         model, x = Net(), torch.randn(2, 3, 8, 8)
         nn.init.ones_(model.bn.bias)
         """),
    Code("BN120", "in a subgraph",
         "The way to the linear operator leads over the border of a branch or loop body (If, Loop, Scan), or the layer is in a local function that "
         "cannot be inlined.",
         "Nothing to do for a body; inline the functions (onnx.inliner) where that is what holds the layer.",
         example="""
         <ir_version: 8, opset_import: ["": 17]>
         net (float[N, 2, 4, 4] x, bool flag) => (float[N, 2, 4, 4] y)
         <float[2, 2, 1, 1] W = {1, 0, 0, 1}, float[2] s = {1, 2}, float[2] b = {1, 1}, float[2] m = {0, 0}, float[2] v = {1, 1}>
         {
             c = Conv(x, W)
             y = If (flag) <
                 then_branch = yes () => (float[N, 2, 4, 4] t) { t = BatchNormalization(c, s, b, m, v) },
                 else_branch = no () => (float[N, 2, 4, 4] e) { e = Identity(x) }
             >
         }
         """),
    Code("BN121", "not reached",
         "The layer was not called on the example input, so nothing is known of its neighbours.",
         "Give an --input that reaches it.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.conv, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

             def forward(self, x):
                 return self.conv(x).relu() if len(x) < 3 else self.other(x).relu()

         # bnctl insert nets:Net -o out/ --input 2x3x8x8 --data batches.npz, in batches of 32: conv is never reached
         """),
    Code("BN123", "memory of its own is needed",
         "The layer's input is a transposed, sliced or expanded view; its result lies in new memory, in the usual order, and an operator behind it "
         "(view, or a write in place) works only on that.",
         "Use reshape instead of view, or the out-of-place form of the operator.",
         example="""
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.linear, self.bn = nn.Linear(4, 8), nn.BatchNorm1d(8)

             def forward(self, x):
                 return self.bn(self.linear(x).transpose(1, 2)).view(len(x), -1)

         model, x = Net(), torch.randn(2, 5, 4)
         """),
    Code("BN122", "weight tied to another parameter",
         "The layer that would take scale and shift shares its weight with another layer, and --no-untie forbids to give it one of its own.",
         "Leave --no-untie out; the report then counts the parameters that are added.",
         example="""
         # bnctl fold nets:Net --input 2x3x8x8 -o out/ --no-untie
         class Net(nn.Module):
             def __init__(self):
                 super().__init__()
                 self.a, self.b, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
                 self.b.weight = self.a.weight

             def forward(self, x):
                 return self.bn(self.a(x)) + self.b(x)
         """),
)  # fmt: skip
