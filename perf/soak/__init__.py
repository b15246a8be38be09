"""Many callers, right and wrong, while ranks are killed: plan, callers, growth of memory, report."""
