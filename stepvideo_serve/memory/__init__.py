"""What a process holds on a device: one ledger for the planner, the loader and the doctor."""
