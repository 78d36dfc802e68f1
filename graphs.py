"""A step of training as a CUDA graph: one launch in place of thousands.

    step = graphs.graphed(step, enabled)        # at the start of an epoch
    for batch in batches:
        step(*batch)

The function that is recorded is the one that runs without graphs. What is constant in an epoch,
its support, learning rate and drop-path probability, is recorded as it is; so each epoch records
its own.
"""

import torch


def graphed(step, enabled):
    """A step that is recorded as a CUDA graph in its second call, and replayed from then on.

    Parameters
    ----------
    step : callable
        Takes tensors, returns nothing, changes what it changes in place, and asks the device for
        no value.
    enabled : bool

    Returns
    -------
    callable
        The step itself where no graph is wanted.
    """
    return Graphed(step) if enabled else step


class Graphed:
    def __init__(self, step):
        self.step, self.graph, self.inputs = step, None, None

    def __call__(self, *batch):
        if self.inputs is None:  # the first step makes what later ones change in place: momenta
            self.inputs = [x.clone() for x in batch]
            self.step(*batch)
        elif any(x.shape != own.shape for x, own in zip(batch, self.inputs, strict=True)):
            self.step(*batch)  # the last batch of an epoch
        else:
            for own, x in zip(self.inputs, batch, strict=True):
                own.copy_(x)
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                # Meanwhile a thread of imagenet's loader may pin memory, which is no part of it.
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self.step(*self.inputs)
            self.graph.replay()
