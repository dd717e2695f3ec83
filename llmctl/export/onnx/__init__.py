"""A checkpoint as ONNX graphs.

The graphs are built from the values that a model is composed of (`models.config`), one small file for each kind of part,
not traced by torch.onnx. So no model is run or held in memory to write one: weights go from file to file, a few tensors at
a time. The graph has the operators that onnxruntime is fast with and no others, the same ones whichever torch is installed
(its exporters rewrite a graph with every release), and what is dynamic is so by construction.
"""
