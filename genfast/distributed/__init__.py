"""Reduction of gradients across processes, on torch.distributed: a hook for DDP, and reducers that need no DDP.

Empty where torch was built without torch.distributed.
"""

import torch.distributed

if torch.distributed.is_available():
    from genfast.distributed.failures import RankFailure
    from genfast.distributed.finished import Finished
    from genfast.distributed.hook import HookState, comm_hook
    from genfast.distributed.reducer import GradientReducer
    from genfast.distributed.sharded import ShardedReducer

    __all__ = ["Finished", "GradientReducer", "HookState", "RankFailure", "ShardedReducer", "comm_hook"]
