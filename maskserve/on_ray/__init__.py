"""Tasks on a Ray cluster, joined or started here: the same `run` as processes have, and the merge of states where they lie.

    cluster.py     which cluster, what it has, and one line where there is none
    executor.py    tasks on their way, and what happens when a worker or a node dies
    reduction.py   the tree in which states of shards merge on the cluster
    entry.py       what Ray calls at the other end, sent by value: it tells where maskserve is missing
    worker.py      the other end

Only cluster.py imports ray, and only when a cluster is asked for. Nothing here imports torch by itself.
"""
