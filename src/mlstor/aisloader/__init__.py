"""``mlstor aisloader``: aisloader's command lines, carried out by ``mlstor stream``'s workload."""
