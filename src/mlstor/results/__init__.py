"""The result record: what a run writes down, how the ranks' figures are merged, and how they are shown."""
