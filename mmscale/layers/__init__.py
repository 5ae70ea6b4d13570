"""The table of a model's tensors: name, shape, sharded axis, modality and exported name of each. No torch.

Parameter counts and FLOPs of `mmscale plan`, exports to Hugging Face, imports from there and upcycling read this table.
A test compares it with the built model for every kind of layer.
"""

from mmscale.layers.layer_tensor import Form, LayerTensor, Routers, TensorPart
from mmscale.layers.whole import layer_tensors, model_tensors

__all__ = ["Form", "LayerTensor", "Routers", "TensorPart", "layer_tensors", "model_tensors"]
