"""The checkpoint benchmark: model shapes, layout, plan and workload."""
