"""The reverse layer sweep: exact statistics with the gradients of only one layer alive.

A transformers model is a stack of layers, each a function of the layer before it. One forward pass
a batch, without a graph, keeps the input of every layer; the loss is differentiated down to the
output of the last one. Then, from the last layer to the first and batch by batch, a layer is run
again with a graph and its backward pass gives the gradient at its input, which is the next one's
start. All batches of a layer are done before the layer below begins, so that what needs every
batch's gradient, as Gram matrices do, needs it for one layer at a time.

Several stacks, as an encoder and a decoder, are swept in the reverse of the order they are called
in. What a stack takes from those before it, as a decoder its encoder's output, is cut off when the
batch runs forward; the gradient there adds up over the layers that use it, and goes down to the
stack before when they are done.

The loss of a causal language model is differentiated in chunks of tokens, since the logits of a
batch would be larger than anything else that is alive.

Extra memory: the inputs of all layers for all batches, `M T d` numbers a layer, and the statistics
of one layer. Extra time: the second forward pass of each layer.
"""

from rankwise.profiling.sweep.engine import sweep_engine
from rankwise.profiling.sweep.structure import UnsuitableError

__all__ = ["UnsuitableError", "sweep_engine"]
