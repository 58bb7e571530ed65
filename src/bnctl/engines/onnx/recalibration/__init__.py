"""Recalibration of ONNX models with ONNX Runtime.

chains, sites           which statistics a model keeps, and where it reads them
rewire                  a site reads other values as its statistics
network, extract        the model with its statistics as inputs, cut between the sites
workbench, activations  one cut run on one batch; what a site saw of it
schedules               in which order cuts and batches take turns
kept                    how far a run has come, for a file from which another one goes on
"""
