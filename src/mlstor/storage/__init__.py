"""Where bytes live: one module per kind of URL, behind `store.Store` and `transfers.Transfers`."""
