"""Shows that a caller reached this library: counts its operators as PyTorch dispatches them."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCalls(TorchDispatchMode):
    """``with OperatorCalls() as calls: ...``; then calls.forward, calls.backward, calls.update."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "causal_conv1d":
            operator = function._schema.name.removeprefix("causal_conv1d::")
            self.counts[operator.split("_")[0]] += 1  # forward_states and forward_out are forward
        return function(*args, **(kwargs or {}))

    forward = property(lambda self: self.counts["forward"])
    backward = property(lambda self: self.counts["backward"])
    update = property(lambda self: self.counts["update"])

    @property
    def total(self):
        return self.forward + self.backward + self.update
