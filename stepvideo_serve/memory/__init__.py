"""What a process holds on a device: one ledger for the planner and the loader."""
